"""What the kernels of FreeBSD, NetBSD, OpenBSD and macOS do on a UDP socket, as data."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from natcompat.backends.sysctl import Sysctl
from natcompat.contract import TABLE, Duty, Verdict

if TYPE_CHECKING:
    pass


INET, INET6 = int(socket.AF_INET), int(socket.AF_INET6)


@dataclass(frozen=True, slots=True, kw_only=True)
class SocketHalf:
    """What one kernel does on a UDP socket, and what makes it."""

    name: str
    system: str
    option: int = 0
    """At level IPPROTO_UDP; 0: there is none, see `port`."""
    value: int = 0
    """What switches it on; 0 switches it off."""
    readable: bool = True
    port: Sysctl | None = None
    """The local port of which the kernel takes ESP, for every socket of the system."""
    port_is_ours: bool = False
    """Whether that is the port of whoever needs it, and 0 while nobody does; else it is the system's."""
    enabled: Sysctl | None = None
    """1 where the kernel looks at that port at all."""
    asleep: Sysctl | None = None
    """1 until the kernel has its first SA or policy; until then it takes nothing."""
    families: frozenset[int] = frozenset({INET, INET6})
    """Of the sockets that it demultiplexes for."""
    duties: frozenset[Duty]
    """That it has on these."""
    leaks: frozenset[str] = frozenset()
    """Rows of `natcompat.contract.TABLE` that come to the process although it has their duty."""
    comes: str
    """What else it delivers, which the process drops; for `reason`."""
    without_ipsec: str
    """What to do about a kernel without IPsec."""


def _rows(verdict: Verdict, length: int) -> frozenset[str]:
    return frozenset(row.name for row in TABLE if row.verdict is verdict and len(row.payload) == length)


HALVES: Final[Mapping[str, SocketHalf]] = {
    half.name: half
    for half in (
        SocketHalf(
            name="freebsd",
            system="FreeBSD",
            option=1,  # UDP_ENCAP, netinet/udp.h
            value=2,  # UDP_ENCAP_ESPINUDP
            families=frozenset({INET}),  # the hook is in udp_append() of IPv4
            duties=frozenset({Duty.DIVERT_ESP}),
            comes="payloads under four bytes, NAT-keepalives too",
            without_ipsec="Load IPsec (kldload ipsec), or build a kernel with options IPSEC",
        ),
        SocketHalf(
            name="netbsd",
            system="NetBSD",
            option=100,
            value=2,
            readable=False,  # getsockopt answers EINVAL
            families=frozenset({INET}),
            duties=frozenset({Duty.DIVERT_ESP}),
            leaks=_rows(Verdict.ESP, 4),  # udp4_espinudp(): len <= sizeof(struct esp)
            comes="payloads up to four bytes, NAT-keepalives excepted",
            without_ipsec="Run a kernel with options IPSEC",
        ),
        SocketHalf(
            name="openbsd",
            system="OpenBSD",
            port=Sysctl(
                "net.inet.esp.udpencap_port", (4, 2, 50, 3)
            ),  # CTL_NET, PFINET, IPPROTO_ESP; ip_esp.h
            enabled=Sysctl("net.inet.esp.udpencap", (4, 2, 50, 2)),
            duties=frozenset({Duty.DROP_RUNTS, Duty.DIVERT_ESP}),
            comes="",
            without_ipsec="Run a kernel with option IPSEC, as GENERIC is",
        ),
        SocketHalf(
            name="macos",
            system="macOS",
            port=Sysctl("net.inet.ipsec.esp_port"),
            port_is_ours=True,
            asleep=Sysctl("net.inet.ipsec.bypass"),
            duties=frozenset({Duty.DIVERT_ESP}),
            comes="payloads under four bytes, NAT-keepalives excepted",
            without_ipsec="Run a kernel with IPsec, as Apple's are",
        ),
    )
}
"""By the names of the backends."""
