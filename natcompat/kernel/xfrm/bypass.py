"""Exempting one socket from all IPsec policies of the kernel.

Without it a policy that wants all traffic protected also catches IKE itself, and, since the inbound
check comes before decapsulation, every ESP-in-UDP packet on the NAT-T socket
(xfrm4_policy_check() in net/ipv4/udp.c). Needs no netlink, so no pyroute2 either.
"""

from __future__ import annotations

import errno
import socket
import struct

from natcompat.errors import NatCompatError

IP_XFRM_POLICY = 17  # linux/in.h
IPV6_XFRM_POLICY = 35  # linux/in6.h
XFRM_POLICY_IN, XFRM_POLICY_OUT = 0, 1  # linux/xfrm.h


def bypass(sock: socket.socket) -> None:
    """Let everything pass that `sock` sends and receives, whatever the policies say.

    Works before and after bind and connect; lasts as long as the socket. A dual-stack IPv6 socket has
    one slot per direction and so is exempt for IPv6 only: use an IPv4 socket of its own.
    Raises EPERM without CAP_NET_ADMIN, and then leaves the socket as it was.
    """
    level, option = _level_and_option(sock)
    try:
        for direction in (XFRM_POLICY_OUT, XFRM_POLICY_IN):
            # xfrm_userpolicy_info: selector with nothing but a family (offset 40), limits, action ALLOW.
            policy = bytearray(168)
            struct.pack_into("=H", policy, 40, sock.family)
            struct.pack_into("=4Q", policy, 56, *[(1 << 64) - 1] * 4)
            struct.pack_into("=BB", policy, 160, direction, 0)
            sock.setsockopt(level, option, bytes(policy))
    except OSError as error:
        remedy = "Run as root or grant CAP_NET_ADMIN; or add BYPASS policies for UDP ports 500 and 4500"
        if error.errno not in (errno.EPERM, errno.EACCES):
            remedy = "Use a kernel with CONFIG_XFRM, or do without: there are no policies to be exempt from"
        text = f"The socket cannot be exempted from IPsec policies: {error.strerror}"
        raise NatCompatError(error.errno or errno.EINVAL, text, remedy) from None


def undo_bypass(sock: socket.socket) -> None:
    """Subject `sock` to the policies again; no error where it already is."""
    level, option = _level_and_option(sock)
    try:
        sock.setsockopt(level, option, None, 0)
    except OSError as error:
        text = f"The socket's exemption from IPsec policies cannot be taken back: {error.strerror}"
        raise NatCompatError(error.errno or errno.EINVAL, text, "Close the socket") from None


def _level_and_option(sock: socket.socket) -> tuple[int, int]:
    if sock.family == socket.AF_INET:
        return socket.IPPROTO_IP, IP_XFRM_POLICY
    if sock.family == socket.AF_INET6:
        return socket.IPPROTO_IPV6, IPV6_XFRM_POLICY
    raise NatCompatError(
        errno.EAFNOSUPPORT,
        f"A socket of family {sock.family!r} meets no IPsec policy",
        "Use AF_INET or AF_INET6",
    )
