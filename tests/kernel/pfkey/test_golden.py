"""Every message, byte by byte, against layouts made of the systems' documented structures."""

from __future__ import annotations

import ctypes
import socket
from ipaddress import ip_address
from typing import Any

import pytest

from natcompat.ipsec.associations import Lifetime, SaId, SecurityAssociation, UDPEncapsulation
from natcompat.ipsec.policies import Policy
from natcompat.ipsec.selectors import TrafficSelector
from natcompat.ipsec.transforms import Encr, Integ
from natcompat.ipsec.values import Action, Direction, Mode
from natcompat.kernel.pfkey import bypass, flows, rules, spd
from natcompat.kernel.pfkey.dialects import DIALECTS
from natcompat.kernel.pfkey.translate import check_sa, encode_allocate, encode_sa, encode_sa_id
from tests.kernel.pfkey import layouts
from tests.kernel.pfkey.layouts import (
    FREEBSD,
    LINUX,
    MACOS,
    NETBSD,
    OPENBSD,
    SOLARIS,
    System,
    extension,
    key,
    port,
)

ADD, UPDATE = 3, 2
SPI = 0x0A0B0C0D
OURS, PEER = "192.0.2.1", "198.51.100.2"
OURS6, PEER6 = "2001:db8::1", "2001:db8::2"
PORTS = UDPEncapsulation(local_port=4500, remote_port=40001)
GCM: dict[str, Any] = {"encryption": Encr.AES_GCM_16, "encryption_key": bytes(range(1, 21))}
CBC: dict[str, Any] = {
    "encryption": Encr.AES_CBC,
    "encryption_key": bytes(range(1, 17)),
    "integrity": Integ.HMAC_SHA2_512_256,
    "integrity_key": bytes(range(64)),
}
BOTH = pytest.mark.parametrize("direction", Direction, ids=lambda each: each.value)


def association(direction: Direction, version: int = 4, **changes: Any) -> SecurityAssociation:
    ends = (OURS, PEER) if version == 4 else (OURS6, PEER6)
    source, destination = ends if direction is Direction.OUT else ends[::-1]
    arguments: dict[str, Any] = {
        "spi": SPI,
        "source": source,
        "destination": destination,
        "direction": direction,
        "replay_window": 32,
        "reqid": 7,
        **changes,
    }
    return SecurityAssociation(**arguments)


def encoded(system: System, sa: SecurityAssociation, kind: int = ADD) -> bytes:
    dialect = DIALECTS[system.name]
    check_sa(dialect, sa)
    return bytes(encode_sa(dialect, sa, kind).encode())


def ends(system: System, direction: Direction, version: int = 4, **fields: int) -> tuple[bytes, bytes]:
    """Return SADB_EXT_ADDRESS_SRC and _DST, in the order of the packets."""
    ours, peer = (OURS, PEER) if version == 4 else (OURS6, PEER6)
    source, destination = (ours, peer) if direction is Direction.OUT else (peer, ours)
    return system.address(5, source, **fields), system.address(6, destination, **fields)


def nat_t(direction: Direction) -> tuple[bytes, ...]:
    """Return SADB_X_EXT_NAT_T_TYPE, _SPORT, _DPORT: ours is the source of what goes out."""
    source, destination = (4500, 40001) if direction is Direction.OUT else (40001, 4500)
    return extension(layouts.sadb_x_nat_t_type(0, 20, 2)), port(21, source), port(22, destination)


def sa2(mode: int, reqid: int = 7) -> bytes:
    return extension(layouts.sadb_x_sa2(0, 19, mode, 0, 0, 0, reqid))


@pytest.mark.parametrize(
    ("structure", "size"), layouts.SIZES.items(), ids=lambda each: getattr(each, "__name__", "")
)
def test_the_layouts_have_the_sizes_of_the_headers(structure: type[ctypes.Structure], size: int) -> None:
    assert ctypes.sizeof(structure) == size


# --- SADB_ADD: a tunnel through a NAT ----------------------------------------------------------------


@BOTH
def test_linux(direction: Direction) -> None:
    inbound = direction is Direction.IN
    assert encoded(LINUX, association(direction, **CBC, encapsulation=PORTS)) == layouts.message(
        ADD,
        3,
        layouts.sa(SPI, replay=32 if inbound else 0, auth=7, encrypt=12),
        *ends(LINUX, direction, prefix=32),
        key(8, bytes(range(64))),
        key(9, bytes(range(1, 17))),
        sa2(2),
        *nat_t(direction),
    )


@BOTH
@pytest.mark.parametrize(
    ("system", "inet_proto"), [(FREEBSD, 255), (NETBSD, 255)], ids=lambda each: getattr(each, "name", "")
)
def test_freebsd_and_netbsd(system: System, inet_proto: int, direction: Direction) -> None:
    inbound = direction is Direction.IN
    assert encoded(system, association(direction, **GCM, encapsulation=PORTS)) == layouts.message(
        ADD,
        3,
        layouts.sa(SPI, replay=4 if inbound else 0, auth=0, encrypt=20),  # bytes: 32 packets
        *ends(system, direction, proto=inet_proto, prefix=32),
        key(9, bytes(range(1, 21))),  # key and salt: 160 bits
        sa2(2),
        *nat_t(direction),
    )


@BOTH
def test_openbsd(direction: Direction) -> None:
    assert encoded(OPENBSD, association(direction, **GCM, encapsulation=PORTS, esn=True)) == layouts.message(
        ADD,
        2,  # SADB_SATYPE_ESP
        layouts.sa(SPI, replay=64, auth=0, encrypt=20, flags=0x4 | 0x200 | 0x400),  # TUNNEL, UDPENCAP, ESN
        *ends(OPENBSD, direction),
        key(9, bytes(range(1, 21))),
        port(31, 40001),  # the peer's, in both directions
    )


@BOTH
def test_macos(direction: Direction) -> None:
    inbound = direction is Direction.IN
    fields = layouts.sadb_sa(
        0, 1, socket.htonl(SPI), 4 if inbound else 0, 1, 0, 13, 0x2 if inbound else 0x2 | 0x4
    )
    # the peer's port in host byte order, ours in network byte order, whatever the direction
    sa_2 = layouts.sadb_sa_2(fields, 40001, 0 if inbound else 20, 0, socket.htons(4500))
    keepalive = None if inbound else 20
    sa = association(direction, **GCM, encapsulation=PORTS, nat_keepalive=keepalive)
    assert encoded(MACOS, sa) == layouts.message(
        ADD,
        3,
        extension(sa_2),
        *ends(MACOS, direction, proto=255, prefix=32),
        key(9, bytes(range(1, 21))),
        sa2(2),
    )


@BOTH
def test_solaris(direction: Direction) -> None:
    inbound = direction is Direction.IN
    # TUNNEL, NATT_REM, and INBOUND or OUTBOUND; who asks for keepalives is NATTED, with NATT_LOC
    flags = 0x20000 | 0x80000 | (0x4000 if inbound else 0x8000 | 0x100000 | 0x1000)
    local = () if inbound else (SOLARIS.address(20, "0.0.0.0", port=4500, proto=17),)
    sa = association(direction, **GCM, encapsulation=PORTS, nat_keepalive=None if inbound else 20)
    assert encoded(SOLARIS, sa) == layouts.message(
        ADD,
        3,
        layouts.sa(SPI, replay=32 if inbound else 0, auth=0, encrypt=20, flags=flags),
        *ends(SOLARIS, direction, proto=4),  # IPv4 in it
        key(9, bytes(range(1, 21))),
        SOLARIS.address(7, "0.0.0.0"),
        SOLARIS.address(22, "0.0.0.0"),
        *local,
        SOLARIS.address(21, "0.0.0.0", port=40001, proto=17),
    )


def test_solaris_is_told_of_another_local_port() -> None:
    ports = UDPEncapsulation(local_port=4501, remote_port=40001)
    found = encoded(SOLARIS, association(Direction.IN, **GCM, encapsulation=ports))
    assert SOLARIS.address(20, "0.0.0.0", port=4501, proto=17) in found
    assert layouts.sa(SPI, replay=32, encrypt=20, flags=0x20000 | 0x80000 | 0x4000 | 0x100000) in found


# --- SADB_ADD: what else an SA has ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("system", "auth", "encrypt", "replay", "proto", "satype"),
    [
        (LINUX, 7, 12, 32, 0, 3),
        (FREEBSD, 7, 12, 4, 255, 3),
        (NETBSD, 7, 12, 4, 255, 3),
        (MACOS, 8, 12, 4, 255, 3),
    ],
    ids=lambda each: getattr(each, "name", ""),
)
def test_transport_mode_over_ipv6_with_lifetimes(
    system: System, auth: int, encrypt: int, replay: int, proto: int, satype: int
) -> None:
    lifetime = Lifetime(hard_seconds=200, soft_bytes=3000)
    sa = association(Direction.IN, 6, **CBC, mode=Mode.TRANSPORT, lifetime=lifetime)
    assert encoded(system, sa) == layouts.message(
        ADD,
        satype,
        layouts.sa(SPI, replay=replay, auth=auth, encrypt=encrypt),
        extension(layouts.sadb_lifetime(0, 3, 0, 0, 200, 0)),
        extension(layouts.sadb_lifetime(0, 4, 0, 3000, 0, 0)),
        *ends(system, Direction.IN, 6, proto=proto, prefix=128),
        key(8, bytes(range(64))),
        key(9, bytes(range(1, 17))),
        sa2(1),
    )


def test_transport_mode_over_ipv6_on_openbsd() -> None:
    sa = association(
        Direction.OUT, 6, **CBC, mode=Mode.TRANSPORT, lifetime=Lifetime(hard_seconds=200), replay_window=64
    )
    assert encoded(OPENBSD, sa, UPDATE) == layouts.message(
        UPDATE,
        2,
        layouts.sa(SPI, replay=64, auth=7, encrypt=12),
        extension(layouts.sadb_lifetime(0, 3, 0, 0, 200, 0)),  # alone, where that is allowed
        *ends(OPENBSD, Direction.OUT, 6),
        key(8, bytes(range(64))),
        key(9, bytes(range(1, 17))),
    )


def test_transport_mode_on_solaris() -> None:
    ports = UDPEncapsulation(local_port=4500, remote_port=40001, original_address=ip_address("10.0.0.9"))
    sa = association(Direction.IN, **CBC, mode=Mode.TRANSPORT, encapsulation=ports, replay_window=0)
    assert encoded(SOLARIS, sa) == layouts.message(
        ADD,
        3,
        layouts.sa(SPI, auth=7, encrypt=12, flags=0x2 | 0x4000 | 0x80000),  # NOREPLAY
        *ends(SOLARIS, Direction.IN),
        key(8, bytes(range(64))),
        key(9, bytes(range(1, 17))),
        SOLARIS.address(21, "10.0.0.9", port=40001, proto=17),
    )


def test_inner_addresses_on_solaris() -> None:
    selector = TrafficSelector(
        source="fd00:2::/64", destination="fd00:1::/64", protocol=6, source_port=80, destination_port=0
    )
    sa = association(Direction.IN, **GCM, selectors=[selector])
    assert encoded(SOLARIS, sa) == layouts.message(
        ADD,
        3,
        layouts.sa(SPI, replay=32, encrypt=20, flags=0x4000 | 0x20000),
        *ends(SOLARIS, Direction.IN, proto=41),  # IPv6 in it
        key(9, bytes(range(1, 21))),
        SOLARIS.address(7, "fd00:2::", port=80, proto=6, prefix=64),
        SOLARIS.address(22, "fd00:1::", proto=6, prefix=64),
    )


def test_original_addresses_on_freebsd() -> None:
    """For the checksums of what comes in: the address that the source had before the NAT (OAI)."""
    ports = UDPEncapsulation(local_port=4500, remote_port=40001, original_address=ip_address("10.0.0.9"))
    found = encoded(FREEBSD, association(Direction.IN, **GCM, mode=Mode.TRANSPORT, encapsulation=ports))
    assert found.endswith(FREEBSD.address(23, "10.0.0.9", proto=255, prefix=32))


@pytest.mark.parametrize("system", [LINUX, FREEBSD, NETBSD, MACOS], ids=lambda each: each.name)
def test_null_encryption_has_a_key_of_no_bits(system: System) -> None:
    null = {
        "encryption": Encr.NULL,
        "encryption_key": b"",
        **{name: CBC[name] for name in ("integrity", "integrity_key")},
    }
    assert key(9, b"") in encoded(system, association(Direction.OUT, **null))


@pytest.mark.parametrize("system", [OPENBSD, SOLARIS], ids=lambda each: each.name)
def test_null_encryption_has_no_key(system: System) -> None:
    null = {
        "encryption": Encr.NULL,
        "encryption_key": b"",
        **{name: CBC[name] for name in ("integrity", "integrity_key")},
    }
    assert encoded(system, association(Direction.OUT, **null, mode=Mode.TRANSPORT)).endswith(
        key(8, bytes(range(64)))
    )


def test_windows() -> None:
    wide = extension(layouts.sadb_x_sa_replay(0, 26, 4096))
    assert encoded(FREEBSD, association(Direction.IN, **GCM, replay_window=4096)).endswith(wide)
    assert layouts.sa(SPI, replay=255, encrypt=20) in encoded(
        FREEBSD, association(Direction.IN, **GCM, replay_window=4096)
    )
    assert layouts.sa(SPI, replay=255, encrypt=20) in encoded(
        NETBSD, association(Direction.IN, **GCM, replay_window=2040)
    )
    assert layouts.sa(SPI, replay=0, encrypt=20) in encoded(
        NETBSD, association(Direction.IN, **GCM, replay_window=0)
    )
    assert layouts.sa(SPI, replay=5, encrypt=20) in encoded(
        NETBSD, association(Direction.IN, **GCM, replay_window=33)
    )


NUMBERS: list[tuple[Encr | Integ, tuple[int | None, ...]]] = [
    # transform: linux, freebsd, netbsd, openbsd, macos, solaris; None: there is none
    (Encr.NULL, (11, 11, 11, 11, 3, 11)),
    (Encr.AES_CBC, (12, 12, 12, 12, 12, 12)),
    (Encr.AES_CTR, (13, 13, 13, 13, None, None)),
    (Encr.AES_CCM_8, (None, None, None, None, None, 14)),
    (Encr.AES_CCM_12, (None, None, None, None, None, 15)),
    (Encr.AES_CCM_16, (None, None, None, None, None, 16)),
    (Encr.AES_GCM_8, (None, 18, 18, 18, None, 18)),
    (Encr.AES_GCM_12, (None, 19, 19, 19, None, 19)),
    (Encr.AES_GCM_16, (None, 20, 20, 20, 13, 20)),
    (Encr.NULL_AUTH_AES_GMAC, (None, 23, 23, 21, 15, None)),
    (Encr.CHACHA20_POLY1305, (None, 15, None, 22, 14, None)),
    (Integ.HMAC_SHA1_96, (3, 3, 3, 3, 2, 3)),
    (Integ.AES_XCBC_96, (9, None, 9, None, None, None)),
    (Integ.AES_CMAC_96, (None, None, None, None, None, None)),
    (Integ.HMAC_SHA2_256_128, (None, 5, 5, 5, 6, 5)),
    (Integ.HMAC_SHA2_384_192, (6, 6, 6, 6, 7, 6)),
    (Integ.HMAC_SHA2_512_256, (7, 7, 7, 7, 8, 7)),
]


@pytest.mark.parametrize(("transform", "numbers"), NUMBERS, ids=lambda each: getattr(each, "name", ""))
def test_numbers_of_transforms(transform: Encr | Integ, numbers: tuple[int | None, ...]) -> None:
    systems = ("linux", "freebsd", "netbsd", "openbsd", "macos", "solaris")
    for name, number in zip(systems, numbers, strict=True):
        table: Any = DIALECTS[name].encryption if isinstance(transform, Encr) else DIALECTS[name].integrity
        assert table.get(transform) == number, name


# --- SPIs and names ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "system", [LINUX, FREEBSD, NETBSD, OPENBSD, MACOS, SOLARIS], ids=lambda each: each.name
)
def test_spis(system: System) -> None:
    swap = socket.htonl if system is SOLARIS else int  # network byte order there, host byte order elsewhere
    proto = {"freebsd": 255, "netbsd": 255, "macos": 255}.get(system.name, 0)
    expected = [
        *ends(system, Direction.IN, proto=proto, prefix=32),
        extension(layouts.sadb_spirange(0, 16, swap(0x1000), swap(0x1FFF))),
    ]
    if system not in (OPENBSD, SOLARIS):
        expected.append(sa2(2, 9))
    message = encode_allocate(
        DIALECTS[system.name], ip_address(PEER), ip_address(OURS), reqid=9, minimum=0x1000, maximum=0x1FFF
    )
    assert bytes(message.encode()) == layouts.message(1, 2 if system is OPENBSD else 3, *expected)


@pytest.mark.parametrize(
    "system", [LINUX, FREEBSD, NETBSD, OPENBSD, MACOS, SOLARIS], ids=lambda each: each.name
)
def test_names(system: System) -> None:
    proto = {"freebsd": 255, "netbsd": 255, "macos": 255}.get(system.name, 0)
    sa_id = SaId(spi=SPI, source=ip_address(OURS), destination=ip_address(PEER))
    message = encode_sa_id(DIALECTS[system.name], 4, sa_id, Direction.OUT)
    flags = 0x8000 if system is SOLARIS else 0
    assert bytes(message.encode()) == layouts.message(
        4,
        2 if system is OPENBSD else 3,
        layouts.sa(SPI, flags=flags),
        *ends(system, Direction.OUT, proto=proto, prefix=32),
    )


# --- policies ----------------------------------------------------------------------------------------

SELECTOR = TrafficSelector(
    source="10.2.0.0/24", destination="10.1.0.0/16", protocol=17, source_port=1000, destination_port=2000
)


def policy(direction: Direction, **changes: Any) -> Policy:
    source, destination = (OURS, PEER) if direction is Direction.OUT else (PEER, OURS)
    arguments: dict[str, Any] = {
        "direction": direction,
        "selector": SELECTOR,
        "source": source,
        "destination": destination,
        "reqid": 7,
        **changes,
    }
    return Policy(**arguments)


@BOTH
@pytest.mark.parametrize("system", [FREEBSD, NETBSD, MACOS, LINUX], ids=lambda each: each.name)
def test_policies_of_kame_and_linux(system: System, direction: Direction) -> None:
    mine = policy(direction, priority=1000 if system in (FREEBSD, LINUX) else None)
    addresses = system.sockaddr(str(mine.source)) + system.sockaddr(str(mine.destination))
    # the length of a request counts bytes; level 3 is "unique": this reqid
    request = (
        bytes(layouts.sadb_x_ipsecrequest_linux(48, 50, 2, 3, 0, 7))
        if system is LINUX
        else bytes(layouts.sadb_x_ipsecrequest(40, 50, 2, 3, 7))
    )
    number = 1 if direction is Direction.IN else 2
    priority = 1000 if system in (FREEBSD, LINUX) else 0
    dialect = DIALECTS[system.name]
    assert spd.kernel_directions(dialect, mine)[0] == number
    assert bytes(spd.encode_policy(dialect, mine, number).encode()) == layouts.message(
        14,
        0,
        system.address(5, "10.2.0.0", port=1000, proto=17, prefix=24),
        system.address(6, "10.1.0.0", port=2000, proto=17, prefix=16),
        extension(layouts.sadb_x_policy(0, 18, 2, number, 0, 0, priority), request + addresses),
    )


@pytest.mark.parametrize("system", [FREEBSD, NETBSD, MACOS, LINUX], ids=lambda each: each.name)
@pytest.mark.parametrize(
    ("action", "kind"), [(Action.DISCARD, 0), (Action.BYPASS, 1)], ids=["discard", "bypass"]
)
def test_policies_without_ipsec(system: System, action: Action, kind: int) -> None:
    wide = TrafficSelector(source="::/0", destination="::/0")
    mine = policy(Direction.OUT, selector=wide, action=action, source=None, destination=None)
    found = bytes(spd.encode_policy(DIALECTS[system.name], mine, 2).encode())
    priority = 0x2000 + 256 * 8 + 7 if system in (FREEBSD, LINUX) else 0
    assert found == layouts.message(
        14,
        0,
        system.address(5, "::", proto=255),
        system.address(6, "::", proto=255),
        extension(layouts.sadb_x_policy(0, 18, kind, 2, 0, 0, priority)),
    )


def test_a_tunnel_over_ipv6_in_a_policy() -> None:
    """Two socket addresses of 28 bytes back to back, and the whole request in words of 64 bits."""
    mine = policy(Direction.OUT, source=OURS6, destination=PEER6, reqid=0)
    addresses = FREEBSD.sockaddr(OURS6) + FREEBSD.sockaddr(PEER6)
    request = bytes(layouts.sadb_x_ipsecrequest(64, 50, 2, 2, 0)) + addresses
    assert len(request) == 64
    found = bytes(spd.encode_policy(DIALECTS["freebsd"], mine, 2).encode())
    assert found.endswith(request)


@BOTH
def test_flows_of_openbsd(direction: Direction) -> None:
    found = bytes(flows.encode_flow(DIALECTS["openbsd"], policy(direction), 12).encode())
    number = 1 if direction is Direction.IN else 2
    assert found == layouts.message(
        12,
        2,
        extension(layouts.sadb_protocol(0, 20, 3, number)),  # SADB_X_FLOW_TYPE_REQUIRE
        OPENBSD.address(5, OURS),  # ours and the peer's, whatever the direction
        OPENBSD.address(6, PEER),
        OPENBSD.address(21, "10.2.0.0", port=1000),
        OPENBSD.address(17, "255.255.255.0", port=0xFFFF),
        OPENBSD.address(22, "10.1.0.0", port=2000),
        OPENBSD.address(18, "255.255.0.0", port=0xFFFF),
        extension(layouts.sadb_protocol(0, 19, 17)),
    )


@pytest.mark.parametrize(
    ("changes", "kind"),
    [({"action": Action.BYPASS}, 4), ({"action": Action.DISCARD}, 5), ({"optional": True}, 1)],
    ids=["bypass", "discard", "optional"],
)
def test_types_of_flows(changes: dict[str, Any], kind: int) -> None:
    wide = TrafficSelector(source="::/0", destination="::/0")
    found = bytes(
        flows.encode_flow(DIALECTS["openbsd"], policy(Direction.OUT, selector=wide, **changes), 13).encode()
    )
    peers = (OPENBSD.address(5, OURS), OPENBSD.address(6, PEER)) if "optional" in changes else ()
    assert found == layouts.message(
        13,
        2,
        extension(layouts.sadb_protocol(0, 20, kind, 2)),
        *peers,
        *(OPENBSD.address(number, "::") for number in (21, 17, 22, 18)),
    )


@BOTH
def test_rules_of_solaris(direction: Direction) -> None:
    mine = policy(direction, interface_id=3, priority=100)
    inbound = direction is Direction.IN
    # local and remote: the source of what goes out is local, that of what comes in is remote
    local, remote = ("10.1.0.0", 16, 2000), ("10.2.0.0", 24, 1000)
    if not inbound:
        local, remote = remote, local
    addresses = [
        extension(layouts.spd_address(0, kind, 2, prefix), socket.inet_aton(address))
        for kind, (address, prefix, _) in ((4, local), (5, remote))
    ]
    ports = [
        extension(layouts.spd_portrange(0, kind, socket.htons(number), socket.htons(number)))
        for kind, (_, _, number) in ((1, local), (2, remote))
    ]
    attributes = b"".join(
        bytes(layouts.spd_attribute(*each)) for each in ((0x100, 3), (0x101, 2), (1, 0))
    )  # TYPE ipsec, FLAGS apply ESP, END
    common = [
        extension(layouts.spd_rule(0, 7, 0x7FFFFFFF - 100, (1 if inbound else 2) | 4, 0, 0)),
        extension(layouts.sadb_ext(0, 10), b"ip.tun3\0"),
        extension(layouts.spd_proto(0, 3, 17)),
        *addresses,
        *ports,
    ]
    action = extension(layouts.spd_ext_actions(0, 6, 1), attributes)
    dialect = DIALECTS["solaris"]
    assert bytes(rules.encode_rule(dialect, mine, 2).encode(1)) == layouts.message(
        2, 0, *common, action, version=1
    )
    assert bytes(rules.encode_rule(dialect, mine, 3).encode(1)) == layouts.message(3, 0, *common, version=1)


# --- sockets that are exempt ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("freebsd", 4, [(0, 21)] * 2),
        ("freebsd", 6, [(41, 28)] * 2),
        ("netbsd", 4, [(0, 22)] * 2),
        ("macos", 6, [(41, 28)] * 2),
        ("linux", 4, [(0, 16)] * 2),
        ("linux", 6, [(41, 34)] * 2),
    ],
)
def test_sockets_are_exempt_by_a_policy(name: str, version: int, expected: list[tuple[int, int]]) -> None:
    found = bypass.options(DIALECTS[name], version)
    assert [each[:2] for each in found] == expected
    # IPSEC_POLICY_BYPASS, out first, so that nothing that is sent goes before
    assert [each[2] for each in found] == [
        extension(layouts.sadb_x_policy(0, 18, 4, direction)) for direction in (2, 1)
    ]


def test_sockets_are_exempt_by_levels_and_by_preference() -> None:
    zero = bytes(ctypes.c_int(0))
    assert bypass.options(DIALECTS["openbsd"], 4) == [(0, number, zero) for number in (20, 21, 22, 29)]
    assert bypass.options(DIALECTS["openbsd"], 6) == [(41, number, zero) for number in (53, 54, 55, 60)]
    never = bytes((ctypes.c_uint32 * 3)(1, 1, 1)) + bytes(4)  # ipsec_req_t
    assert bypass.options(DIALECTS["solaris"], 4) == [(0, 0x22, never)]
    assert bypass.options(DIALECTS["solaris"], 6) == [(41, 0x22, never)]
