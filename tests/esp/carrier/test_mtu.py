"""Overhead per SA, path MTUs, and the ICMP messages: against the engine, scapy and the kernel."""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natcompat.commands.verify.namespaces import INITIATOR, RESPONDER, Topology
from natcompat.errors import NatCompatError
from natcompat.esp.carrier.mtu import (
    PLATEAUS,
    SMALLEST_MTU,
    Overhead,
    PathMtus,
    TooBigReplies,
    device_mtu,
    may_fragment,
    overhead_of,
    too_big,
)
from natcompat.esp.carrier.path_mtu import kernel_path_mtu, set_dont_fragment
from natcompat.esp.engine.crypto import make_cipher
from natcompat.ipsec import Direction, Encr, Integ, Mode
from tests.support import esp as making
from tests.support.linux import FAMILIES, LINUX
from tests.support.tun import mtu_of

with contextlib.suppress(ImportError):
    from scapy.layers.inet import ICMP, IP
    from scapy.layers.inet6 import ICMPv6PacketTooBig, IPv6

VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["v4", "v6"])
MODES = pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.name.lower())
HEADERS = {4: 20, 6: 40}


def packet(version: int, length: int, **changes: Any) -> bytes:
    """Return an inner packet of `length` bytes."""
    fields = {"dont_fragment": True, **changes}
    return making.inner(version, making.udp(bytes(length - HEADERS[version] - 8)), **fields)


# --- overhead ------------------------------------------------------------------------------------


@MODES
@VERSIONS
@pytest.mark.parametrize("transforms", making.TRANSFORMS, ids=making.name)
def test_the_largest_packet_fits_and_one_byte_more_does_not(
    transforms: tuple[Encr, Integ], version: int, mode: Mode
) -> None:
    keys = making.keys(*transforms)
    cipher = make_cipher(transforms[0], keys["encryption_key"], transforms[1], keys["integrity_key"])
    pair = making.Pair(version=version, mode=mode, **keys)
    overhead = overhead_of(making.sa(Direction.OUT, version=version, mode=mode, **keys))
    assert overhead.block == max(cipher.block_length, 4)
    addresses = making.OUTER[version] if mode is Mode.TRANSPORT else making.INNER[version]

    def outer(inner: int) -> int:
        payload = making.udp(bytes(inner - HEADERS[version] - 8))
        return HEADERS[version] + 8 + len(pair.seal(making.ip_packet(*addresses, payload))[0])

    for path_mtu in (1280, 1281, 1499, 1500, *range(1500, 1500 + cipher.block_length)):
        largest = overhead.largest_inner(path_mtu)
        assert outer(largest) <= path_mtu < outer(largest + 1)
        assert overhead.outer_length(largest) == outer(largest)
        assert overhead.outer_length(largest + 1) == outer(largest + 1)


@given(
    headers=st.integers(36, 120),
    block=st.sampled_from([4, 16]),
    path=st.integers(0, 70000),
    tunnel=st.booleans(),
)
def test_largest_and_length_agree(headers: int, block: int, path: int, tunnel: bool) -> None:
    overhead = Overhead(headers, block, 0 if tunnel else 20)
    largest = overhead.largest_inner(path)
    if largest:
        assert overhead.outer_length(largest) <= path < overhead.outer_length(largest + 1)
    else:
        assert path < overhead.outer_length(overhead.replaced + 1)


def test_known_overheads() -> None:
    """AES-GCM in UDP over IPv4: 20 + 8 + 8 + 8 + 16, and 2 of the trailer."""
    assert overhead_of(making.sa(Direction.OUT)).largest_inner(1500) == 1500 - 60 - 2
    kernel = making.sa(Direction.OUT, version=6, encapsulation=None)
    assert overhead_of(kernel).largest_inner(1500) == 1500 - 72 - 2
    cbc = making.sa(Direction.OUT, **making.keys(Encr.AES_CBC, Integ.HMAC_SHA2_256_128))
    assert overhead_of(cbc).largest_inner(1500) == (1500 - 20 - 8 - 8 - 16 - 16) // 16 * 16 - 2


def test_the_device_has_room_for_what_every_sa_carries() -> None:
    sas = [
        making.sa(Direction.OUT, destination="192.0.2.2"),
        making.sa(Direction.OUT, destination="192.0.2.3"),
        making.sa(Direction.IN, source="192.0.2.4", destination="192.0.2.1"),
    ]
    paths = {"192.0.2.2": 1500, "192.0.2.3": 1400, "192.0.2.1": 600}
    assert device_mtu(sas, paths.__getitem__) == 1400 - 62
    paths["192.0.2.3"] = 1300
    assert device_mtu(sas, paths.__getitem__) == 1280, "with less there is no IPv6"
    assert device_mtu(sas[2:], paths.__getitem__) == 1280, "no SA, no promise"


# --- path MTUs -----------------------------------------------------------------------------------


class System:
    """What a system knows of path MTUs, and a clock."""

    def __init__(self, mtu: int | None) -> None:
        self.mtu = mtu
        self.now = 1000.0
        self.asked: list[str] = []

    def ask(self, host: str) -> int | None:
        self.asked.append(host)
        return self.mtu

    def paths(self, **keywords: Any) -> PathMtus:
        return PathMtus(self.ask, clock=lambda: self.now, **keywords)


SA = making.sa(Direction.OUT)
PEER = str(SA.destination)


def test_the_system_is_asked_once_and_again_after_ten_minutes() -> None:
    system = System(1480)
    paths = system.paths()
    assert [paths.of(PEER), paths.of(PEER)] == [1480, 1480]
    system.mtu = 1500
    assert paths.of(PEER) == 1480
    assert system.asked == [PEER]
    system.now += 601
    assert paths.of(PEER) == 1500


def test_a_system_that_tells_nothing_has_the_default() -> None:
    assert System(None).paths().of(PEER) == 1500
    assert System(None).paths(default=9000).of(PEER) == 9000


def test_after_a_refusal_the_system_is_asked() -> None:
    system = System(1500)
    paths = system.paths()
    assert paths.of(PEER) == 1500
    system.mtu = 1400
    assert paths.refused(SA, 1438) == 1400 - 62
    assert paths.refused(SA, 1438) == 1400 - 62
    assert system.asked == [PEER] * 2, "what is known need not be asked for"
    system.mtu = 1300
    assert paths.refused(SA, 1338) == 1300 - 62


def test_where_the_system_tells_nothing_it_goes_down_step_by_step() -> None:
    paths = System(None).paths()
    found = [1438]
    while (largest := paths.refused(SA, found[-1])) < found[-1]:
        found.append(largest)
    overhead = overhead_of(SA)
    assert found[1:] == [overhead.largest_inner(mtu) for mtu in PLATEAUS if mtu < 1500]


def test_a_system_that_contradicts_itself_ends_the_same() -> None:
    paths = System(1500).paths()
    assert paths.refused(SA, 1438) == overhead_of(SA).largest_inner(1492)


@VERSIONS
def test_less_than_every_path_has_is_not_believed(version: int) -> None:
    sa = making.sa(Direction.OUT, version=version)
    system = System(68)
    paths = system.paths()
    assert paths.of(str(sa.destination)) == SMALLEST_MTU[version]
    largest = overhead_of(sa).largest_inner(SMALLEST_MTU[version])
    assert paths.refused(sa, 1400) == largest
    assert paths.refused(sa, largest) == largest
    assert may_fragment(packet(4, largest), largest), "then the kernel may as well fragment it"


def test_tfc_padding_that_is_too_long_is_fragmented() -> None:
    sa = making.sa(Direction.OUT, tfc=1450)
    largest = System(1500).paths().refused(sa, 100)
    assert largest > 100
    assert may_fragment(packet(4, 100), largest)


def test_what_is_known_is_bounded() -> None:
    system = System(1400)
    paths = system.paths(limit=10)
    for number in range(100):
        paths.of(f"192.0.2.{number}")
    assert len(paths._known) == 10
    paths.of("192.0.2.99")
    assert len(system.asked) == 100, "the newest is still known"


@pytest.mark.parametrize(
    ("inner", "largest", "expected"),
    [
        (packet(4, 1400), 1300, False),
        (packet(4, 1400, dont_fragment=False), 1300, True),
        (packet(6, 1400), 1300, False),
        (packet(6, 1280), 1218, True),
        (packet(6, 1281), 1218, False),
        (packet(4, 1300), 1300, True),
    ],
)
def test_what_may_be_fragmented(inner: bytes, largest: int, expected: bool) -> None:
    assert may_fragment(inner, largest) is expected


# --- ICMP ----------------------------------------------------------------------------------------


def test_fragmentation_needed_as_scapy_reads_it() -> None:
    pytest.importorskip("scapy")
    inner = packet(4, 1400)
    message = too_big(inner, 1338)
    assert message is not None
    assert len(message) == 576
    seen = IP(message)
    assert (seen.src, seen.dst) == making.INNER[4][::-1]
    assert (seen[ICMP].type, seen[ICMP].code, seen[ICMP].nexthopmtu) == (3, 4, 1338)
    assert message[28:] == inner[: 576 - 28]
    assert bytes(fresh(seen, ICMP)) == message, "lengths and checksums are scapy's"


def test_packet_too_big_as_scapy_reads_it() -> None:
    pytest.importorskip("scapy")
    inner = packet(6, 1400)
    message = too_big(inner, 1338)
    assert message is not None
    assert len(message) == 1280
    seen = IPv6(message)
    assert (seen.src, seen.dst) == making.INNER[6][::-1]
    assert (seen[ICMPv6PacketTooBig].code, seen[ICMPv6PacketTooBig].mtu) == (0, 1338)
    assert bytes(seen[ICMPv6PacketTooBig].payload) == inner[: 1280 - 48]
    assert bytes(fresh(seen, ICMPv6PacketTooBig)) == message
    assert IPv6(too_big(inner, 1000) or b"")[ICMPv6PacketTooBig].mtu == 1280, (
        "an IPv6 sender goes no further down"
    )


def fresh(seen: Any, layer: Any) -> Any:
    """Return the packet with lengths and checksums to be computed anew."""
    for each in (seen, seen[layer]):
        for field in ("chksum", "cksum", "len", "plen"):
            if field in each.fields:
                delattr(each, field)
    return seen


def icmp(kind: int, version: int) -> bytes:
    return making.inner(version, bytes((kind, 0)) + bytes(1300), protocol={4: 1, 6: 58}[version])


NOT_TO_BE_ANSWERED = {
    "an ICMP error": icmp(3, 4),
    "an ICMPv6 error": icmp(2, 6),
    "an ICMPv6 redirect": icmp(137, 6),
    "a later fragment": making.inner(4)[:6] + b"\x40\x02" + making.inner(4)[8:],
    "to a group": making.ip_packet("10.1.0.1", "224.0.0.5", bytes(1300)),
    "to an IPv6 group": making.ip_packet("fd00:1::1", "ff02::1", bytes(1300)),
    "a broadcast": making.ip_packet("10.1.0.1", "255.255.255.255", bytes(1300)),
    "from nobody": making.ip_packet("0.0.0.0", "10.2.0.1", bytes(1300)),
    "from nobody in IPv6": making.ip_packet("::", "fd00:2::1", bytes(1300)),
    "from loopback": making.ip_packet("127.0.0.1", "10.2.0.1", bytes(1300)),
    "no packet": b"",
    "cut short": packet(4, 1400)[:-1],
    "of another version": b"\x70" + packet(4, 1400)[1:],
}


@pytest.mark.parametrize("inner", NOT_TO_BE_ANSWERED.values(), ids=NOT_TO_BE_ANSWERED.keys())
def test_what_must_not_be_answered(inner: bytes) -> None:
    assert too_big(inner, 1280) is None


@pytest.mark.parametrize("version", [4, 6])
def test_a_ping_is_answered(version: int) -> None:
    assert too_big(icmp({4: 8, 6: 128}[version], version), 1280) is not None


@given(
    st.binary(max_size=80)
    | st.builds(lambda b, v: bytes([v]) + b, st.binary(max_size=80), st.sampled_from([0x45, 0x60]))
)
def test_garbage_makes_nothing_fail(garbage: bytes) -> None:
    message = too_big(garbage, 1280)
    assert message is None or ip_address(message[12:16] if message[0] >> 4 == 4 else message[8:24])


def test_a_flood_is_not_answered_with_a_flood() -> None:
    now = 0.0
    replies = TooBigReplies(per_second=10, burst=3, clock=lambda: now)
    inner = packet(4, 1400)
    assert [bool(replies.too_big(inner, 1300)) for _ in range(5)] == [True] * 3 + [False] * 2
    assert replies.suppressed == 2
    now = 0.2
    assert [bool(replies.too_big(inner, 1300)) for _ in range(3)] == [True] * 2 + [False]
    now = 1000
    assert replies.too_big(NOT_TO_BE_ANSWERED["an ICMP error"], 1300) is None
    assert [bool(replies.too_big(inner, 1300)) for _ in range(4)] == [True] * 3 + [False], (
        "silence costs nothing"
    )


# --- the system ----------------------------------------------------------------------------------


@LINUX
@FAMILIES
def test_the_path_mtu_of_loopback(family: socket.AddressFamily) -> None:
    host = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}[family]
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((host, 0))
        mtu = min(mtu_of("lo"), 65535 if family == socket.AF_INET else 65536)
        assert kernel_path_mtu(host) == kernel_path_mtu(host, sock) == mtu


@pytest.mark.parametrize("platform", ["sunos5", "netbsd10", "win32"])
def test_systems_that_tell_nothing(platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        assert not set_dont_fragment(sock, True)
        assert kernel_path_mtu("127.0.0.1", sock) is None


def test_no_route_no_path_mtu() -> None:
    assert kernel_path_mtu("fe80::1") is None


def _set_mtu(name: str, mtu: int) -> None:
    from pyroute2 import IPRoute

    with IPRoute() as route:
        route.link("set", index=route.link_lookup(ifname=name)[0], mtu=mtu)


@pytest.fixture(scope="module")
def network() -> Iterator[Topology]:
    """A network in which the path to the responder is narrower than the first link."""
    try:
        made = Topology()
    except NatCompatError as error:
        pytest.skip(f"no network: {error}")
    with made:
        made.router.call(_set_mtu, "outside", 1300)
        made.responder.call(_set_mtu, "uplink", 1300)
        yield made


@LINUX
@FAMILIES
def test_a_smaller_path_mtu_is_learnt_from_the_kernels_refusal(
    network: Topology, family: socket.AddressFamily
) -> None:
    version = 4 if family == socket.AF_INET else 6
    peer, headers = RESPONDER[version], HEADERS[version] + 8
    sa = making.sa(Direction.OUT, version=version, source=INITIATOR[version], destination=peer)
    overhead = overhead_of(sa)
    with network.initiator.socket(family) as sock, network.responder.socket(family) as far:
        sock.bind((INITIATOR[version], 0))
        far.bind((peer, 0))
        far.settimeout(10)
        address = far.getsockname()[:2]
        paths = PathMtus(lambda host: network.initiator.call(kernel_path_mtu, host, sock))
        assert paths.of(peer) == 1500

        assert set_dont_fragment(sock, True)
        inner = overhead.largest_inner(1500)
        payload = bytes(overhead.outer_length(inner) - headers)
        refused = None
        for _ in range(100):  # the first goes, and is answered by the router
            try:
                sock.sendto(payload, address)
            except OSError as error:
                refused = error.errno
                break
            with contextlib.suppress(TimeoutError):
                far.settimeout(0.05)
                pytest.fail(f"{len(far.recv(65535))} bytes passed a link of 1300")
        assert refused == errno.EMSGSIZE
        largest = paths.refused(sa, inner)
        assert paths.of(peer) == 1300
        assert largest == overhead.largest_inner(1300)

        far.settimeout(10)
        sock.sendto(bytes(overhead.outer_length(largest) - headers), address)
        assert len(far.recv(65535)) <= 1300 - headers
        assert set_dont_fragment(sock, False)
        sock.sendto(payload, address)
        assert far.recv(65535) == payload, "in fragments"
