"""`KERNEL_SUPPORT`: the duties that each BSD kernel and that of macOS perform on a UDP socket."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from natcompat.backends.sysctl import Sysctl
from natcompat.contract import TABLE, Duty, Verdict

INET, INET6 = int(socket.AF_INET), int(socket.AF_INET6)


@dataclass(frozen=True, slots=True, kw_only=True)
class KernelSupport:
    """The duties of one kernel on a UDP socket, and the option or sysctl that switches them on."""

    name: str
    system: str
    option: int = 0
    """Socket option at level IPPROTO_UDP; 0: the kernel has none, see `port`."""
    value: int = 0
    """Value that switches the option on; 0 switches it off."""
    readable: bool = True
    """Whether getsockopt answers for the option."""
    port: Sysctl | None = None
    """Sysctl with the local port whose ESP the kernel takes, on every socket of the system."""
    port_is_ours: bool = False
    """Whether an endpoint may set `port`, which is 0 while it is free; else the system's value stays."""
    enabled: Sysctl | None = None
    """Sysctl that is 1 where the kernel takes ESP of that port."""
    asleep: Sysctl | None = None
    """Sysctl that is 1 until the kernel has its first SA or policy; until then it takes no ESP."""
    families: frozenset[int] = frozenset({INET, INET6})
    """Address families of the sockets that the kernel demultiplexes."""
    duties: frozenset[Duty]
    """Duties that the kernel performs on sockets of `families`."""
    leaks: frozenset[str] = frozenset()
    """Rows of `natcompat.contract.TABLE` that reach the process although the kernel has their duty."""
    comes: str
    """Datagrams besides IKE that the kernel delivers and the process drops; for `reason`."""
    without_ipsec: str
    """Remedy for a kernel without IPsec."""


def _rows(verdict: Verdict, length: int) -> frozenset[str]:
    return frozenset(row.name for row in TABLE if row.verdict is verdict and len(row.payload) == length)


KERNEL_SUPPORT: Final[Mapping[str, KernelSupport]] = {
    support.name: support
    for support in (
        KernelSupport(
            name="freebsd",
            system="FreeBSD",
            option=1,  # UDP_ENCAP, netinet/udp.h
            value=2,  # UDP_ENCAP_ESPINUDP
            families=frozenset({INET}),  # the hook is in udp_append() of IPv4
            duties=frozenset({Duty.DIVERT_ESP}),
            comes="payloads under four bytes, NAT-keepalives too",
            without_ipsec="Load IPsec (kldload ipsec), or build a kernel with options IPSEC",
        ),
        KernelSupport(
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
        KernelSupport(
            name="openbsd",
            system="OpenBSD",
            port=Sysctl(
                "net.inet.esp.udpencap_port", (4, 2, 50, 3)
            ),  # CTL_NET, PF_INET, IPPROTO_ESP; ip_esp.h
            enabled=Sysctl("net.inet.esp.udpencap", (4, 2, 50, 2)),
            duties=frozenset({Duty.DROP_RUNTS, Duty.DIVERT_ESP}),
            comes="",
            without_ipsec="Run a kernel with option IPSEC, as GENERIC is",
        ),
        KernelSupport(
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
"""By the name of the backend."""
