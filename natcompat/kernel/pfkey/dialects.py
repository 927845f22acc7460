"""The dialects of PF_KEY v2 (RFC 2367) on each operating system, as data.

Every number is that of the header of the OS (net/pfkeyv2.h, linux/pfkeyv2.h), every rule that of its
kernel; what a kernel lacks is refused with the reason that stands here, and never left out in silence.
Only the dialect ``linux`` has been run on its kernel; the others are held against layouts.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType

from natcompat.ipsec.transforms import Encr, Integ


class NatT(enum.Enum):
    """The extensions by which an SA asks for UDP encapsulation."""

    PORTS = "NAT_T_TYPE, NAT_T_SPORT and NAT_T_DPORT: source and destination, network byte order"
    ADDRESSES = "ADDRESS_NATT_LOC and ADDRESS_NATT_REM: ours and the peer's, whatever the direction"
    PEER = "UDPENCAP: the peer's port alone, network byte order, and a flag"
    SA = "struct sadb_sa_2: the peer's port in host, ours in network byte order, and a flag"


class Modes(enum.Enum):
    """The extension by which an SA tells its mode."""

    SA2 = "the field mode of sadb_x_sa2, which has the reqid, too"
    FLAG = "a flag of sadb_sa"
    INNER = "a flag of sadb_sa, and inner addresses"


class Policies(enum.Enum):
    """The messages for policies."""

    SPD = "SADB_X_SPDADD and its kin"
    FLOWS = "SADB_X_ADDFLOW and SADB_X_DELFLOW"
    RULES = "a socket of its own, PF_POLICY"


class Move(enum.Flag):
    """The fields of an SA in use that SADB_UPDATE changes, while sequence numbers and window go on."""

    NOTHING = 0
    PORTS = enum.auto()
    ADDRESSES = enum.auto()


def _table(**numbers: int) -> Mapping[Encr, int]:
    return MappingProxyType({Encr[name]: number for name, number in numbers.items()})


_GCM = {"AES_GCM_8": 18, "AES_GCM_12": 19, "AES_GCM_16": 20}
_CCM = {"AES_CCM_8": 14, "AES_CCM_12": 15, "AES_CCM_16": 16}
_CIPHERS = {"NULL": 11, "AES_CBC": 12}
_HMACS: Mapping[Integ, int] = MappingProxyType(
    {
        Integ.HMAC_SHA1_96: 3,
        Integ.HMAC_SHA2_256_128: 5,
        Integ.HMAC_SHA2_384_192: 6,
        Integ.HMAC_SHA2_512_256: 7,
    }
)
_NO_REASONS: Mapping[str, str] = MappingProxyType({})

_ROOT = "Run as root"


@dataclass(frozen=True, slots=True, kw_only=True)
class Dialect:
    """PF_KEY as one kernel speaks it. The defaults are what the descendants of KAME have in common."""

    name: str
    system: str
    """The operating system, for error texts."""
    family: int
    """PF_KEY, the address family of the socket."""
    inet6: int
    """AF_INET6; AF_INET is 2 everywhere."""
    privilege: str
    """What opening the socket takes."""
    lengths: bool = True
    """Socket addresses begin with their length in bytes."""
    sockaddr_in6_size: int = 28
    esp: int = 3
    """SADB_SATYPE_ESP."""
    encryption: Mapping[Encr, int]
    integrity: Mapping[Integ, int] = field(default_factory=lambda: _HMACS)
    reasons: Mapping[str, str] = field(default_factory=lambda: _NO_REASONS)
    """Why a transform is refused, by its name, where that is not simply that there is no number for it."""
    null_key: bool = True
    """ESP with NULL encryption comes with a key of no bits; False: without a key."""
    address_protocol: int | None = 255
    """sadb_address_proto of an outer address; None: the field is reserved."""
    spi_range_in_network_order: bool = False
    nat_t: NatT = NatT.PORTS
    nat_t_versions: frozenset[int] = frozenset({4})
    maps_ipv4: bool = False
    """IPv4 addresses may come as IPv6 addresses that map them."""
    modes: Modes = Modes.SA2
    cross_family: bool = True
    """A tunnel may carry another IP version than its own."""
    largest_reqid: int = 0xFFFF_FFFF
    """Of an SA; 0: the kernel keeps none, and SAs and policies find each other by addresses."""
    window_in_bytes: bool = True
    """sadb_sa_replay counts bytes of the bitmap, eight packets each."""
    largest_window: int = 8 * 255
    wide_windows: bool = False
    """SADB_X_EXT_SA_REPLAY takes windows beyond `largest_window`."""
    window_outbound: bool = False
    """Outbound SAs want one as well."""
    esn: int = 0
    """The flag for extended sequence numbers."""
    no_ecn: int = 0
    """The flag against copying ECN."""
    no_pmtu_discovery: int = 0
    """The flag against copying DF."""
    lifetimes_together: bool = True
    """HARD and SOFT come both, or neither."""
    packet_lifetimes: bool = False
    """sadb_lifetime_allocations counts packets."""
    moves: Move = Move.NOTHING
    mapping_events: bool = False
    kernel_keepalive: int = 0
    """Shortest interval of NAT-keepalives that the kernel sends if an SA asks for them; 0: it sends none."""
    policies: Policies = Policies.SPD
    request_size: int = 8
    """sizeof(struct sadb_x_ipsecrequest)."""
    policy_priority: bool = False
    forward_policies: bool = False
    """What is forwarded meets policies of a direction of its own."""
    answers_at_once: bool = False
    """What answers a request is in the queue when it has been sent, or has been lost."""
    dump_ends: bool = True
    """The last message of a dump has sequence number 0."""
    keys_in_broadcasts: bool = False
    """Keys go to every PF_KEY socket of the system."""
    limits: tuple[str, ...] = ()
    """What else a daemon has to know, a sentence each."""


LINUX = Dialect(
    name="linux",
    system="Linux (af_key)",
    family=15,
    inet6=10,
    privilege="Run as root, or grant CAP_NET_ADMIN (docker run --cap-add NET_ADMIN)",
    lengths=False,
    encryption=_table(**_CIPHERS, AES_CTR=13),
    integrity={
        Integ.HMAC_SHA1_96: 3,
        Integ.HMAC_SHA2_384_192: 6,
        Integ.HMAC_SHA2_512_256: 7,
        Integ.AES_XCBC_96: 9,
    },
    reasons={
        "HMAC_SHA2_256_128": "af_key cuts its check values to 96 bits, so that no peer would take them",
        **dict.fromkeys((each.name for each in Encr if each.is_aead), "af_key cannot set combined ciphers"),
    },
    address_protocol=0,
    nat_t_versions=frozenset({4, 6}),
    cross_family=False,
    window_in_bytes=False,
    largest_window=32,
    no_ecn=0x8000_0000,
    no_pmtu_discovery=0x2000_0000,
    packet_lifetimes=True,
    moves=Move.PORTS,
    mapping_events=True,
    request_size=16,
    policy_priority=True,
    forward_policies=True,
    answers_at_once=True,
    keys_in_broadcasts=True,
    limits=("It says neither sequence numbers nor what was dropped.",),
)

FREEBSD = Dialect(
    name="freebsd",
    system="FreeBSD",
    family=27,
    inet6=28,
    privilege=_ROOT,
    encryption=_table(**_CIPHERS, **_GCM, AES_CTR=13, CHACHA20_POLY1305=15, NULL_AUTH_AES_GMAC=23),
    wide_windows=True,
    esn=0x400,
    moves=Move.PORTS | Move.ADDRESSES,
    policy_priority=True,
    limits=(
        "An SPI is taken once in the whole system, whatever the destination.",
        "ESP from another port than that of the SA is dropped; no event tells.",
    ),
)

NETBSD = Dialect(
    name="netbsd",
    system="NetBSD",
    family=29,
    inet6=24,
    privilege=_ROOT,
    encryption=_table(**_CIPHERS, **_GCM, AES_CTR=13, NULL_AUTH_AES_GMAC=23),
    integrity={**_HMACS, Integ.AES_XCBC_96: 9},
    largest_reqid=0xFFFF,
    limits=("Policies are asked in the order in which they were installed.",),
)

OPENBSD = Dialect(
    name="openbsd",
    system="OpenBSD",
    family=30,
    inet6=24,
    privilege=_ROOT,
    esp=2,
    encryption=_table(**_CIPHERS, **_GCM, AES_CTR=13, NULL_AUTH_AES_GMAC=21, CHACHA20_POLY1305=22),
    null_key=False,
    address_protocol=None,
    nat_t=NatT.PEER,
    nat_t_versions=frozenset({4, 6}),
    modes=Modes.FLAG,
    largest_reqid=0,
    window_in_bytes=False,
    largest_window=64,
    window_outbound=True,
    esn=0x400,
    lifetimes_together=False,
    moves=Move.PORTS | Move.ADDRESSES,
    policies=Policies.FLOWS,
    dump_ends=False,
    limits=(
        "The local port is that of the sysctl net.inet.esp.udpencap_port, for all SAs.",
        "SAs and flows find each other by addresses; a reqid means nothing.",
        "Flows are shown and flushed by who has installed them.",
    ),
)

MACOS = Dialect(
    name="macos",
    system="macOS",
    family=29,
    inet6=30,
    privilege=_ROOT,
    encryption=_table(NULL=3, AES_CBC=12, AES_GCM_16=13, CHACHA20_POLY1305=14, NULL_AUTH_AES_GMAC=15),
    integrity={
        Integ.HMAC_SHA1_96: 2,
        Integ.HMAC_SHA2_256_128: 6,
        Integ.HMAC_SHA2_384_192: 7,
        Integ.HMAC_SHA2_512_256: 8,
    },
    nat_t=NatT.SA,
    nat_t_versions=frozenset({4, 6}),
    kernel_keepalive=1,
    limits=(
        "Encapsulation uses a private structure of the kernel (sadb_sa_2).",
        "Policies are asked in the order in which they were installed.",
    ),
)

SOLARIS = Dialect(
    name="solaris",
    system="Solaris",
    family=27,
    inet6=26,
    privilege="Run as root, or grant the privilege sys_ip_config (ppriv, user_attr)",
    lengths=False,
    sockaddr_in6_size=32,
    encryption=_table(**_CIPHERS, **_GCM, **_CCM),
    null_key=False,
    address_protocol=0,
    spi_range_in_network_order=True,
    nat_t=NatT.ADDRESSES,
    maps_ipv4=True,
    modes=Modes.INNER,
    largest_reqid=0,
    window_in_bytes=False,
    largest_window=255,
    lifetimes_together=False,
    kernel_keepalive=20,
    policies=Policies.RULES,
    policy_priority=True,
    limits=(
        "Keepalives go every 20 to 28 seconds (tunable ipsecesp_nat_keepalive_interval), for all SAs.",
        "A changed port of the peer is followed for SAs in pairs only, and natcompat makes no pairs.",
        "A tunnel policy belongs to the tunnel interface ip.tunN, N being its interface_id.",
        "SAs and policies find each other by addresses; a reqid means nothing.",
        "Rules are shown without the addresses of their tunnel, unless by who has installed them.",
    ),
)

DIALECTS: Mapping[str, Dialect] = MappingProxyType(
    {each.name: each for each in (LINUX, FREEBSD, NETBSD, OPENBSD, MACOS, SOLARIS)}
)
"""By the names of the backends."""
