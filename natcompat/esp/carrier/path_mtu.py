"""Asks the system for path MTUs, and sets DF on the packets of a UDP socket.

Linux tells the path MTU of a connected socket (IP_MTU, IPV6_MTU); elsewhere `kernel_path_mtu` knows
nothing, and `natcompat.esp.carrier.mtu.PathMtus` goes down by the steps of RFC 1191.
"""

from __future__ import annotations

import contextlib
import socket
import sys
from typing import Final

# linux/in.h, linux/in6.h; Python does not name them
IP_MTU_DISCOVER: Final = 10
IP_MTU: Final = 14
IPV6_MTU_DISCOVER: Final = 23
IPV6_MTU: Final = 24
PMTUDISC_DONT: Final = 0
PMTUDISC_DO: Final = 2

_SO_BINDTODEVICE: Final = 25  # asm-generic/socket.h
_LARGEST_NAME: Final = 16  # IFNAMSIZ, linux/if.h
_DISCARD_PORT: Final = 9  # nothing is sent there

_DONT_FRAGMENT: Final[dict[str, tuple[tuple[int, int], tuple[int, int]]]] = {
    "linux": ((socket.IPPROTO_IP, IP_MTU_DISCOVER), (socket.IPPROTO_IPV6, IPV6_MTU_DISCOVER)),
    "darwin": ((socket.IPPROTO_IP, 28), (socket.IPPROTO_IPV6, 62)),  # IP_DONTFRAG, IPV6_DONTFRAG
    "freebsd": ((socket.IPPROTO_IP, 67), (socket.IPPROTO_IPV6, 62)),
}
"""Level and option for IPv4 and IPv6, by the beginning of `sys.platform`."""


def set_dont_fragment(sock: socket.socket, on: bool) -> bool:
    """Set DF on what `sock` sends from now on: what is too long fails with EMSGSIZE; else it is fragmented.

    On an IPv6 socket for both families. False: this system cannot, and does as it likes.
    """
    system = next((each for each in _DONT_FRAGMENT if sys.platform.startswith(each)), None)
    if system is None:
        return False
    of_ipv4, of_ipv6 = _DONT_FRAGMENT[system]
    value = (PMTUDISC_DO if on else PMTUDISC_DONT) if system == "linux" else int(on)
    if sock.family == socket.AF_INET:
        sock.setsockopt(*of_ipv4, value)
        return True
    sock.setsockopt(*of_ipv6, value)
    with contextlib.suppress(OSError):  # for IPv4-mapped addresses, where the system has that
        sock.setsockopt(*of_ipv4, value)
    return True


def kernel_path_mtu(host: str, like: socket.socket | None = None) -> int | None:
    """Return the path MTU to `host`, an address, as the kernel knows it now; None: it does not tell.

    Asks by a socket that is connected there and sends nothing, with the mark, the device and the address
    of `like`, so that it takes the way of that socket's packets.
    """
    if sys.platform != "linux":
        return None
    version = 6 if ":" in host else 4
    family = socket.AF_INET6 if version == 6 else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            if like is not None:
                _take_the_way_of(like, probe)
            probe.connect((host, _DISCARD_PORT))
            if version == 6:
                return probe.getsockopt(socket.IPPROTO_IPV6, IPV6_MTU)
            return probe.getsockopt(socket.IPPROTO_IP, IP_MTU)
    except OSError:
        return None


def _take_the_way_of(like: socket.socket, probe: socket.socket) -> None:
    mark = like.getsockopt(socket.SOL_SOCKET, socket.SO_MARK)
    if mark:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
    device = like.getsockopt(socket.SOL_SOCKET, _SO_BINDTODEVICE, _LARGEST_NAME)
    if device.strip(b"\0"):
        probe.setsockopt(socket.SOL_SOCKET, _SO_BINDTODEVICE, device)
    if like.family == probe.family:
        probe.bind((like.getsockname()[0], 0))
