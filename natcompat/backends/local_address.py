"""The local address of a datagram, in ancillary data: read on receive, chosen on send.

| system | IPv4, received | IPv4, sent | IPv6, both |
|---|---|---|---|
| Linux | IP_PKTINFO | IP_PKTINFO | IPV6_PKTINFO |
| FreeBSD, NetBSD, OpenBSD | IP_RECVDSTADDR | IP_SENDSRCADDR (the same number) | IPV6_PKTINFO |
| macOS, Solaris, illumos | IP_RECVDSTADDR | IP_PKTINFO | IPV6_PKTINFO |
| Windows | none: Python has no ``recvmsg`` there | none | none |

A dual-stack socket of IPv6 tells the addresses of IPv4 as mapped ones (ip(7), ipv6(7), ip(4), ip(4P);
RFC 3542, section 6).
"""

from __future__ import annotations

import contextlib
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address
from typing import TYPE_CHECKING, Any, Final, TypeAlias

if TYPE_CHECKING:
    from natcompat.ipsec import IPAddress

Ancillary: TypeAlias = list[tuple[int, int, bytes]]

# Python names IP_PKTINFO from 3.14 on: linux/in.h; bsd/netinet/in.h of XNU; netinet/in.h of illumos
_IP_PKTINFO: Final[int | None] = {"linux": 8, "darwin": 26, "sunos5": 0x1A}.get(sys.platform)
_IP_RECVDSTADDR: Final[int | None] = (
    None if sys.platform == "linux" else getattr(socket, "IP_RECVDSTADDR", None)
)
_IPV6_PKTINFO: Final[int | None] = getattr(socket, "IPV6_PKTINFO", None)
_IPV6_RECVPKTINFO: Final[int | None] = getattr(socket, "IPV6_RECVPKTINFO", None)

ANCILLARY_SIZE: Final[int] = socket.CMSG_SPACE(20) if hasattr(socket, "CMSG_SPACE") else 0
"""Bytes of a buffer for the local address: the larger of the two structures, in6_pktinfo."""


def request_local_addresses(sock: socket.socket) -> Callable[[socket.socket], object] | None:
    """Have `sock` tell the local address of each datagram; return the function that undoes it on a socket.

    None: the socket tells it already, or this system cannot.
    """
    if sock.family == socket.AF_INET6:
        level, option = socket.IPPROTO_IPV6, _IPV6_RECVPKTINFO
    else:
        level, option = socket.IPPROTO_IP, _IP_RECVDSTADDR or _IP_PKTINFO
    if option is None or not hasattr(socket.socket, "recvmsg") or sock.getsockopt(level, option):
        return None
    sock.setsockopt(level, option, 1)
    return lambda other: other.setsockopt(level, option, 0)


def local_address(ancillary: Sequence[tuple[int, int, bytes]]) -> IPAddress | None:
    """Return the local address in the `ancillary` data of a datagram, None if it tells none.

    Of a multicast or broadcast datagram it is the address of the interface that took it where the system
    tells that (Linux, IPv4), else None. An address of the link-local scope has the index of its interface as
    zone (``fe80::1%2``).
    """
    for level, kind, data in ancillary:
        with contextlib.suppress(struct.error):  # truncated
            if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
                _, preferred, destination = struct.unpack_from("=i4s4s", data)
                # zero for a datagram queued before the option was set (ipv4_pktinfo_prepare)
                return _unicast(IPv4Address(preferred if any(preferred) else destination))
            if level == socket.IPPROTO_IP and kind == _IP_RECVDSTADDR:
                return _unicast(IPv4Address(struct.unpack_from("4s", data)[0]))
            if level == socket.IPPROTO_IPV6 and kind == _IPV6_PKTINFO:
                packed, interface = struct.unpack_from("=16si", data)
                address = IPv6Address(packed)
                if address.ipv4_mapped is not None:
                    return _unicast(address.ipv4_mapped)
                return IPv6Address(f"{address}%{interface}") if address.is_link_local else _unicast(address)
    return None


def destination(ancillary: Sequence[tuple[int, int, bytes]]) -> tuple[str, int] | None:
    """Return the local address, as text of the socket's family, and the index of the interface.

    For the envelope that hands a message back (`natcompat.backends.hand_back`). None: the `ancillary` data do
    not tell both.
    """
    for level, kind, data in ancillary:
        with contextlib.suppress(struct.error):  # truncated
            if level == socket.IPPROTO_IP and kind == _IP_PKTINFO:
                interface, preferred, _ = struct.unpack_from("=i4s4s", data)
                return (socket.inet_ntop(socket.AF_INET, preferred), interface) if interface else None
            if level == socket.IPPROTO_IPV6 and kind == _IPV6_PKTINFO:
                packed, interface = struct.unpack_from("=16si", data)
                return (socket.inet_ntop(socket.AF_INET6, packed), interface) if interface else None
    return None


def source_address(family: int, address: IPAddress) -> Ancillary:
    """Return the ancillary data that sends a datagram of a `family` socket from the local `address`.

    Raises ValueError for an address of another family, an unknown zone, and where the system cannot.
    """
    if family == socket.AF_INET6 and _IPV6_PKTINFO is not None:
        interface = 0
        if isinstance(address, IPv4Address):
            address = IPv6Address(f"::ffff:{address}")
        elif address.scope_id:
            interface = _interface_index(address.scope_id)
        return [(socket.IPPROTO_IPV6, _IPV6_PKTINFO, struct.pack("=16si", address.packed, interface))]
    if family == socket.AF_INET and isinstance(address, IPv4Address):
        if _IP_PKTINFO is not None:
            return [(socket.IPPROTO_IP, _IP_PKTINFO, struct.pack("=i4s4s", 0, address.packed, bytes(4)))]
        if _IP_RECVDSTADDR is not None:  # IP_SENDSRCADDR has the same number
            return [(socket.IPPROTO_IP, _IP_RECVDSTADDR, address.packed)]
    raise ValueError(f"a socket of this family cannot send from {address} on this system")


def is_bound_to(sock: Any, address: IPAddress) -> bool:
    """Tell whether `sock` is bound to `address` alone, so that no ancillary data is needed."""
    host = sock.getsockname()[0].partition("%")[0]
    return bool(host == str(address).partition("%")[0] or host == f"::ffff:{address}")


def _unicast(address: IPAddress) -> IPAddress | None:
    return None if address.is_multicast or str(address) == "255.255.255.255" else address


def _interface_index(zone: str) -> int:
    try:
        return int(zone) if zone.isdecimal() else socket.if_nametoindex(zone)
    except OSError:
        raise ValueError(f"there is no interface {zone}") from None
