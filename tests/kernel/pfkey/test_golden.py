"""Every message, byte by byte, against layouts made of the systems' documented structures."""

from __future__ import annotations

import ctypes
import socket
from ipaddress import ip_address
from typing import Any

import pytest

from natcompat.ipsec.associations import Lifetime, SaId, UDPEncapsulation
from natcompat.ipsec.selectors import TrafficSelector
from natcompat.ipsec.transforms import Encr, Integ
from natcompat.ipsec.values import Direction, Mode
from natcompat.kernel.pfkey.dialects import DIALECTS
from natcompat.kernel.pfkey.translate import encode_allocate, encode_sa_id
from tests.kernel.pfkey import layouts
from tests.kernel.pfkey.golden import (
    ADD,
    BOTH,
    CBC,
    GCM,
    OURS,
    PEER,
    PORTS,
    SPI,
    UPDATE,
    association,
    encoded,
    ends,
    nat_t,
    sa2,
)
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


# --- sockets that are exempt ---------------------------------------------------------------------------
