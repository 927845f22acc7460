"""What the other kernels do with a UDP socket, as data: the verdicts, the options, the privileges.

Each rule names where it was read. Nothing of it was measured on the system: these are models. The
versions read: illumos of January 2015; FreeBSD 11.1 and later (udpencap.c of 2016); NetBSD 10; OpenBSD
of 2014 to 2021; XNU of 2022.
"""

from __future__ import annotations

import enum
import socket
import struct
from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple


class Fate(enum.Enum):
    """What a kernel does with a datagram for a socket with its option."""

    DROP = "it is gone, and nobody wakes"
    ESP = "IPsec has it; without an SA it is gone"
    RAW = "delivered byte for byte"
    STRIP = "delivered without its first four bytes"


class First(enum.Enum):
    """What the first 32 bits are."""

    ANY = "anything, or too short for that"
    ZERO = "zero"
    NOT_ZERO = "not zero"


class Rule(NamedTuple):
    """One rule; of a kernel's rules the first that matches decides."""

    shortest: int
    longest: int
    """Of the UDP payload, bytes."""
    first: First
    fate: Fate
    source: str
    octet: int | None = None
    """The first byte, where that matters."""

    def matches(self, payload: bytes) -> bool:
        """Tell whether it is about `payload`."""
        return (
            self.shortest <= len(payload) <= self.longest
            and (self.octet is None or payload[0] == self.octet)
            and (self.first is First.ANY or (payload[:4] == bytes(4)) == (self.first is First.ZERO))
        )


class Kernel(NamedTuple):
    """One kernel."""

    platform: str
    """``sys.platform`` of Python there."""
    rules: tuple[Rule, ...]
    versions: tuple[int, ...]
    """Of IP, in which it demultiplexes."""
    families: tuple[int, ...]
    """That take the option."""
    source: str
    option: int = 0
    """At level IPPROTO_UDP; 0: there is none, and the whole system has one port."""
    value: int = 1
    """What switches it on."""
    values: tuple[int, ...] = (0, 1)
    """What else it takes; EINVAL for the rest. Empty: any int, and 0 is off."""
    readable: bool = True
    """By getsockopt; else EINVAL."""
    exemption: tuple[int, int] = (0, 0)
    """Options that exempt a socket from IPsec policies, at IPPROTO_IP and IPPROTO_IPV6."""
    levels: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    """Options with the least protection that a socket wants, likewise; 0: none, which is the default."""
    pf_key: int = 0
    """Address family of PF_KEY."""

    def fate(self, payload: bytes, version: int) -> Fate:
        """Return what becomes of `payload` that came by IP `version`."""
        if version not in self.versions:
            return Fate.RAW
        return next(rule.fate for rule in self.rules if rule.matches(payload))


ENDLESS: Final = 65535
_INET, _BOTH = (socket.AF_INET,), (socket.AF_INET, socket.AF_INET6)
_ANY, _ZERO, _NOT_ZERO = First

KERNELS: Final[Mapping[str, Kernel]] = {
    "solaris": Kernel(
        "sunos5",
        (
            Rule(0, 3, _ANY, Fate.DROP, "zero_spi_check(), ip.c: esp_nat_t_ka, whatever the bytes are"),
            Rule(4, ENDLESS, _ZERO, Fate.STRIP, "zero_spi_check(), ip.c: 4 bytes removed, lengths corrected"),
            Rule(4, ENDLESS, _NOT_ZERO, Fate.ESP, "zero_spi_check(), ip.c: no least length of ESP"),
        ),
        (4,),
        _INET,
        "udp_do_opt_set() and udp_opt_get(), udp.c; secpolicy_ip_config(), policy.c; udp(4P)",
        option=0x0103,
        values=(),
        exemption=(0x22, 0x22),
        pf_key=27,
    ),
    "freebsd": Kernel(
        "freebsd14",
        (
            Rule(
                0, 3, _ANY, Fate.RAW, "udp_ipsec_input(), udpencap.c: shorter than struct esp; keepalives too"
            ),
            Rule(4, ENDLESS, _ZERO, Fate.RAW, "udp_ipsec_input(), udpencap.c: SPI 0 returns to UDP"),
            Rule(4, ENDLESS, _NOT_ZERO, Fate.ESP, "udp_ipsec_input(), udpencap.c: sizeof(struct esp) is 4"),
        ),
        (4,),
        _BOTH,
        "udp_ipsec_pcbctl(), udpencap.c; the hook is in udp_append(), of IPv4 alone",
        option=1,
        value=2,
        values=(0, 2),
        exemption=(21, 28),
        pf_key=27,
    ),
    "netbsd": Kernel(
        "netbsd10",
        (
            Rule(1, 1, _ANY, Fate.DROP, "udp4_espinudp(), udp_usrreq.c: a keepalive", octet=0xFF),
            Rule(
                0, 4, _ANY, Fate.RAW, "udp4_espinudp(), udp_usrreq.c: len <= sizeof(struct esp), which is 4"
            ),
            Rule(5, ENDLESS, _ZERO, Fate.RAW, "udp4_espinudp(), udp_usrreq.c: a non-ESP marker"),
            Rule(5, ENDLESS, _NOT_ZERO, Fate.ESP, "udp4_espinudp(), udp_usrreq.c: ipsec4_common_input()"),
        ),
        (4,),
        _BOTH,
        "udp_ctloutput(), udp_usrreq.c: no PRCO_GETOPT; udp6 has no hook",
        option=100,
        value=2,
        values=(0, 1, 2),
        readable=False,
        exemption=(22, 28),
        pf_key=29,
    ),
    "openbsd": Kernel(
        "openbsd7",
        (
            Rule(0, 3, _ANY, Fate.DROP, "udp_input(), udp_usrreq.c: freed, length 0 too"),
            Rule(4, ENDLESS, _ZERO, Fate.RAW, "udp_input(), udp_usrreq.c: SPI 0"),
            Rule(4, ENDLESS, _NOT_ZERO, Fate.ESP, "udp_input(), udp_usrreq.c: ipsec_common_input()"),
        ),
        (4, 6),
        (),
        "sysctl net.inet.esp.udpencap and .udpencap_port: every socket of the port; ip_esp.h",
        levels=((20, 21, 22, 29), (53, 54, 55, 60)),
        pf_key=30,
    ),
    "macos": Kernel(
        "darwin",
        (
            Rule(1, 1, _ANY, Fate.DROP, "udp_input(), udp_usrreq.c: a keepalive", octet=0xFF),
            Rule(0, 3, _ANY, Fate.RAW, "udp_input(), udp_usrreq.c: payload < 4"),
            Rule(4, ENDLESS, _ZERO, Fate.RAW, "udp_input(), udp_usrreq.c: a non-ESP marker"),
            Rule(4, ENDLESS, _NOT_ZERO, Fate.ESP, "udp_input(), udp_usrreq.c: esp4_input(), esp6_input()"),
        ),
        (4, 6),
        (),
        "sysctl net.inet.ipsec.esp_port, ipsec.c: every socket of the port, once ipsec_bypass is 0",
        exemption=(21, 28),
        pf_key=29,
    ),
}

_UDP_HEADER: Final = 8  # a socket filter begins there
_LD_W, _LD_B, _LD_LEN, _LDX = 0x20, 0x30, 0x80, 0x80
_JEQ, _JGT, _JGE, _RET = 0x15, 0x25, 0x35, 0x06
_PROTOCOL: Final = 0xFFFF_F000  # SKF_AD_OFF + SKF_AD_PROTOCOL, linux/filter.h
_ETHERTYPE: Final = {4: 0x0800, 6: 0x86DD}
_NEXT, _ON = "next", "on"  # where a jump goes

_Line = tuple[int, int | str, int | str, int]


def filter_program(kernel: Kernel) -> bytes:
    """Return the classic BPF program (struct sock_filter[]) that drops what never comes to the socket."""
    parts = []
    if len(kernel.versions) == 1:
        other = _ETHERTYPE[6 if kernel.versions == (4,) else 4]
        parts.append([(_LD_W, 0, 0, _PROTOCOL), (_JEQ, _ON, _NEXT, other), (_RET, 0, 0, ENDLESS)])
    parts += [list(_rule(rule)) for rule in kernel.rules]
    program = []
    for part in parts:
        for at, (code, true, false, k) in enumerate(part):
            jumps = [len(part) - at - 1 if to == _NEXT else 0 for to in (true, false)]
            program.append(struct.pack("=HBBI", code, *jumps, k))
    return b"".join([*program, struct.pack("=HBBI", _RET, 0, 0, ENDLESS)])


def _rule(rule: Rule) -> Iterator[_Line]:
    yield (_LD_LEN, 0, 0, 0)
    yield (_JGE, _ON, _NEXT, _UDP_HEADER + rule.shortest)
    yield (_JGT, _NEXT, _ON, _UDP_HEADER + rule.longest)
    if rule.octet is not None:
        yield (_LD_B, 0, 0, _UDP_HEADER)
        yield (_JEQ, _ON, _NEXT, rule.octet)
    if rule.first is not First.ANY:
        yield (_LD_W, 0, 0, _UDP_HEADER)
        zero = rule.first is First.ZERO
        yield (_JEQ, _ON if zero else _NEXT, _NEXT if zero else _ON, 0)
    yield (_RET, 0, 0, ENDLESS if rule.fate in (Fate.RAW, Fate.STRIP) else 0)


def header(kernel: Kernel) -> str:
    """Return model.h of `kernel`."""
    program = filter_program(kernel)
    lines = (struct.unpack_from("=HBBI", program, at) for at in range(0, len(program), 8))
    words = ", ".join(f"{{{code}, {true}, {false}, {k}U}}" for code, true, false, k in lines)
    fates = {rule.fate for rule in kernel.rules}
    numbers = {
        "OPTION": kernel.option,
        "VALUE": kernel.value,
        "READABLE": int(kernel.readable),
        "STRIPS": int(Fate.STRIP in fates),
        "IPV4_EXEMPTION": kernel.exemption[0],
        "IPV6_EXEMPTION": kernel.exemption[1],
        "PF_KEY_FAMILY": kernel.pf_key,
        "TAKES_IPV6": int(socket.AF_INET6 in kernel.families),
    }
    defined = {
        **numbers,
        "PROGRAM": f"{{ {words} }}",
        "VALUES": f"{{ {', '.join(map(str, kernel.values)) or '0'} }}",
        "ANY_VALUE": int(not kernel.values),
        "IPV4_LEVELS": f"{{ {', '.join(map(str, kernel.levels[0])) or '-1'} }}",
        "IPV6_LEVELS": f"{{ {', '.join(map(str, kernel.levels[1])) or '-1'} }}",
    }
    return "".join(f"#define {name} {value}\n" for name, value in defined.items())
