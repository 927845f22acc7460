"""What must not hurt: counted by reason, never raised, nothing learnt from it."""

from __future__ import annotations

import gc
import os
import tracemalloc
from collections import Counter
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natcompat.esp.engine.association import Inbound
from natcompat.esp.engine.crypto import make_cipher
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.faults import FAULTS
from natcompat.esp.engine.packet import DUMMY, IPV4, IPV6, PADDINGS, Flow
from natcompat.esp.engine.results import Destination, Dropped, Opened, Reason
from natcompat.ipsec import (
    Direction,
    Encr,
    Integ,
    MappingChange,
    Mode,
    SecurityAssociation,
    TrafficSelector,
)
from tests.support.esp import (
    OUTER,
    SPI,
    TRANSFORMS,
    Pair,
    inner,
    ip_packet,
    keys,
    name,
    only,
    policy,
    sa,
    udp,
)

pytestmark = pytest.mark.usefixtures("datapath")

ELSEWHERE = ("198.51.100.1", 6666)


def state(pair: Pair) -> object:
    """Return all that `far` could have learnt, but for its counters of drops."""
    usage = pair.far.get_sa(pair.expected)
    return usage.packets, usage.octets, usage.first_used, usage.sequence, pair.far.list_policies()


@pytest.mark.parametrize("transforms", TRANSFORMS, ids=name)
def test_tampered_in_each_byte(transforms: tuple[Encr, Integ]) -> None:
    pair = Pair(**keys(*transforms))
    with pair.far.events() as events:
        for _ in range(2):
            sealed, _ = pair.seal(inner(payload=udp(b"short")))
            before = state(pair)
            for at in range(len(sealed)):
                for bit in (0x01, 0x80):
                    bad = sealed[:at] + bytes((sealed[at] ^ bit,)) + sealed[at + 1 :]
                    dropped = pair.far.open(bad, ELSEWHERE)
                    assert isinstance(dropped, Dropped)
                    if at < 4:
                        assert dropped.reason is Reason.NO_SA
                    elif not (4 <= at < 8):  # another sequence number may be an old one
                        assert dropped.reason is Reason.INTEGRITY
            assert state(pair) == before
            assert not events.read()
            assert pair.open(sealed) == inner(payload=udp(b"short")), "the window has not moved"
        assert (pair.far.get_sa(pair.expected).integrity_drops or 0) > 0


@pytest.mark.parametrize("transforms", TRANSFORMS, ids=name)
def test_truncated_and_extended_at_every_length(transforms: tuple[Encr, Integ]) -> None:
    pair = Pair(**keys(*transforms))
    sealed, _ = pair.seal(inner())
    reasons = {pair.open(sealed[:length]) for length in range(len(sealed))}
    assert reasons == {Reason.SHORT, Reason.INTEGRITY}
    for more in range(1, 40):
        assert pair.open(sealed + bytes(more)) in (Reason.SHORT, Reason.INTEGRITY)
    assert pair.open(sealed) == inner()


class Forger:
    """A peer that has the keys and no manners."""

    def __init__(self, association: SecurityAssociation) -> None:
        self.cipher = make_cipher(
            association.encryption,
            association.encryption_key,
            association.integrity,
            association.integrity_key,
        )
        self.sequence = 0

    def seal(self, plaintext: bytes, sequence: int | None = None) -> bytes:
        self.sequence = self.sequence + 1 if sequence is None else sequence
        iv = os.urandom(self.cipher.iv_length)
        return self.cipher.seal(SPI.to_bytes(4) + self.sequence.to_bytes(4) + iv, plaintext, b"")


BAD_PLAINTEXTS = {
    "no payload": (bytes((0, IPV4)), Reason.MALFORMED),
    "padding longer than the packet": (bytes((9, IPV4)), Reason.PADDING),
    "padding of zeros": (inner() + bytes(2) + bytes((2, IPV4)), Reason.PADDING),
    "dummy": (os.urandom(50) + bytes((0, DUMMY)), Reason.DUMMY),
    "empty dummy": (bytes((0, DUMMY)), Reason.DUMMY),
    "TCP in a tunnel": (bytes(20) + bytes((0, 6)), Reason.NEXT_HEADER),
    "IPv6 said to be IPv4": (inner(6) + bytes((0, IPV4)), Reason.MALFORMED),
    "IPv4 said to be IPv6": (inner(4) + bytes((0, IPV6)), Reason.MALFORMED),
    "cut inside": (inner()[:-1] + bytes((0, IPV4)), Reason.MALFORMED),
    "other source": (
        ip_packet("10.3.0.1", "10.2.0.1", udp()) + bytes((0, IPV4)),
        Reason.SELECTOR,
    ),
    "other destination": (ip_packet("10.1.0.1", "10.3.0.1", udp()) + bytes((0, IPV4)), Reason.SELECTOR),
    "other family": (inner(6) + bytes((0, IPV6)), Reason.SELECTOR),
    "endless extension headers": (
        ip_packet("fd00:1::1", "fd00:2::1", b"\x3c\0\0\0\0\0\0\0" * 20, protocol=60) + bytes((0, IPV6)),
        Reason.MALFORMED,
    ),
}


@pytest.mark.parametrize(("plaintext", "reason"), BAD_PLAINTEXTS.values(), ids=BAD_PLAINTEXTS)
def test_authentic_and_wrong(plaintext: bytes, reason: Reason) -> None:
    pair = Pair()
    forger = Forger(sa(Direction.IN))
    assert pair.open(forger.seal(plaintext)) is reason
    assert pair.far.counters() == {reason: 1}
    assert pair.open(forger.seal(plaintext, 1)) is Reason.REPLAYED, "authentic: its number is used"


def test_padding_of_every_length() -> None:
    pair = Pair()
    forger = Forger(sa(Direction.IN))
    for length in range(256):
        plaintext = inner() + PADDINGS[length] + bytes((length, IPV4))
        assert pair.open(forger.seal(plaintext)) == inner()


def test_replayed_old_and_future() -> None:
    pair = Pair(replay_window=64)
    packets = [pair.seal(inner())[0] for _ in range(200)]
    assert pair.open(packets[99]) == inner()
    for number, expected in ((99, Reason.REPLAYED), (35, Reason.TOO_OLD), (0, Reason.TOO_OLD)):
        assert pair.open(packets[number]) is expected
    assert pair.open(packets[36]) == inner()
    assert pair.open(packets[36]) is Reason.REPLAYED
    future = packets[150][:4] + b"\xff\xff\xff\xf0" + packets[150][8:]
    assert pair.open(future) is Reason.INTEGRITY
    assert pair.open(packets[150]) == inner(), "the forged number has moved nothing"
    usage = pair.far.get_sa(pair.expected)
    assert (usage.replay_drops, usage.window_drops, usage.integrity_drops) == (2, 2, 1)
    assert pair.far.counters() == {Reason.REPLAYED: 2, Reason.TOO_OLD: 2, Reason.INTEGRITY: 1}


def test_numbers_that_are_none() -> None:
    pair = Pair()
    assert pair.open(Forger(sa(Direction.IN)).seal(inner() + bytes((0, IPV4)), 0)) is Reason.REPLAYED


ADDRESSES = st.one_of(
    st.tuples(st.ip_addresses().map(str), st.integers(0, 65535)),
    st.tuples(st.ip_addresses(v=6).map(str), st.integers(0, 65535), st.just(0), st.just(0)),
    st.sampled_from([(), ("nowhere", 1), ("", 0), ("fe80::1%eth0", 4500, 0, 2), (b"\0", "x")]),
)
GARBAGE = st.one_of(
    st.binary(max_size=120),
    st.binary(max_size=120).map(lambda tail: SPI.to_bytes(4) + tail),
    st.binary(max_size=120).map(lambda tail: SPI.to_bytes(4) + b"\0\0\0\1" + tail),
)


@settings(max_examples=300, deadline=None)
@given(burst=st.lists(st.tuples(GARBAGE, ADDRESSES), max_size=20))
def test_garbage(burst: list[tuple[bytes, tuple[object, ...]]]) -> None:
    with EspEngine(timer=False) as engine:
        engine.add_sa(sa(Direction.IN, **keys(Encr.NULL, Integ.HMAC_SHA1_96)))
        engine.add_policy(policy(Direction.IN))
        results = engine.open_burst([(memoryview(packet), source) for packet, source in burst])
        reasons = [each.reason for each in results if isinstance(each, Dropped)]
        assert len(reasons) == len(burst)
        assert engine.counters() == Counter(reasons)
        engine.inbound([(memoryview(packet), source) for packet, source in burst])
        assert engine.received() == []


@settings(max_examples=300, deadline=None)
@given(
    plaintext=st.one_of(
        st.binary(max_size=150),
        st.binary(max_size=150).map(lambda tail: b"\x45" + tail),
        st.binary(max_size=150).map(lambda tail: b"\x60" + tail),
    ),
    trailer=st.one_of(
        st.tuples(st.integers(0, 255), st.integers(0, 255)).map(bytes),
        st.sampled_from([bytes((0, IPV4)), bytes((0, IPV6))]),
    ),
    source=ADDRESSES,
    traffic_class=st.integers(0, 255),
    mode=st.sampled_from(list(Mode)),
)
def test_garbage_from_who_has_the_key(
    plaintext: bytes, trailer: bytes, source: tuple[object, ...], traffic_class: int, mode: Mode
) -> None:
    with EspEngine(timer=False) as engine:
        arguments = keys(Encr.NULL, Integ.HMAC_SHA1_96)
        association = sa(Direction.IN, mode=mode, **arguments)
        engine.add_sa(association)
        packet = Forger(association).seal(plaintext + trailer)
        result = engine.open(packet, source, traffic_class)
        assert isinstance(result, Dropped), "there is no policy that could let it in"


@settings(max_examples=300, deadline=None)
@given(
    packet=st.one_of(
        st.binary(max_size=100),
        st.binary(max_size=100).map(lambda tail: b"\x45" + tail),
        st.binary(max_size=100).map(lambda tail: (b"\x60" + tail).ljust(60, b"\0")),
        st.binary(min_size=20, max_size=100).map(lambda tail: b"\x45\0" + len(tail).to_bytes(2) + tail[4:]),
        st.binary(min_size=40, max_size=100).map(
            lambda tail: b"\x60\0\0\0" + (len(tail) - 40).to_bytes(2) + tail[6:]
        ),
    ),
    mode=st.sampled_from(list(Mode)),
)
def test_garbage_to_be_sealed(packet: bytes, mode: Mode) -> None:
    with EspEngine(timer=False) as engine:
        engine.add_sa(sa(Direction.OUT, mode=mode))
        engine.add_policy(policy(Direction.OUT, mode=mode))
        result = engine.seal(packet)
        if isinstance(result, Dropped):
            assert engine.counters() == {result.reason: 1}
        else:
            sealed, destination = only(result)
            assert isinstance(destination, Destination)
            assert sealed[:4] == SPI.to_bytes(4)


def test_packets_that_would_not_fit_are_refused_before_a_number_is_used() -> None:
    for version, largest in ((4, 65507), (6, 65527)):
        pair = Pair(version=version)
        addresses = ("10.1.0.1", "10.2.0.1") if version == 4 else ("fd00:1::1", "fd00:2::1")
        header = 20 if version == 4 else 40
        room = largest - 8 - 8 - 16 - 2 - header  # ESP header, IV, ICV, trailer
        fits = ip_packet(*addresses, bytes(room - (room + header + 2) % 4))
        sealed, _ = pair.seal(fits)
        assert len(sealed) <= largest
        assert pair.open(sealed) == fits
        for more in range(4, 24):
            over = ip_packet(*addresses, bytes(len(fits) - header + more))
            assert pair.near.seal(over) == Dropped(Reason.TOO_BIG)
        assert pair.near.get_sa(pair.sent).sequence == 1


def test_a_flood_costs_nothing_that_stays() -> None:
    pair = Pair()
    with pair.far.events() as events:
        flood = [(os.urandom(64), (f"198.51.100.{number % 250}", number + 1)) for number in range(5000)]
        flood += [(SPI.to_bytes(4) + packet, source) for packet, source in flood]
        results = pair.far.open_burst(flood)
        assert not any(isinstance(each, Opened) for each in results)
        assert sum(pair.far.counters().values()) == len(flood)
        assert not events.read()
        usage = pair.far.get_sa(pair.expected)
        assert (usage.packets, usage.sequence, usage.last_used) == (0, 0, None)
        assert OUTER[4][0] == pair.source[0]


def test_a_flood_takes_no_memory() -> None:
    pair = Pair()

    def flood() -> None:
        burst = [(os.urandom(100), (f"198.51.100.{number % 250}", number + 1)) for number in range(2000)]
        pair.far.open_burst([*burst, *((SPI.to_bytes(4) + packet, source) for packet, source in burst)])

    flood()
    gc.collect()
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        flood()
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 10_000, "4000 packets, and nobody who sent one is remembered"


@pytest.mark.parametrize("length", [65_507, 65_535, 65_536, 1 << 20])
def test_longer_than_any_datagram(length: int) -> None:
    pair = Pair()
    sealed, _ = pair.seal(inner())
    for packet in (os.urandom(length), SPI.to_bytes(4) + bytes(length), sealed + bytes(length)):
        assert pair.open(packet) in (Reason.NO_SA, Reason.INTEGRITY, Reason.REPLAYED)
    assert pair.near.seal(inner()[:2] + b"\xff\xff" + bytes(length)) == Dropped(Reason.MALFORMED)
    assert pair.open(sealed) == inner()


@pytest.mark.parametrize("source", [("2001:db8::66", 4500, 0, 0), ("::ffff:198.51.100.6", 4500, 0, 0)])
def test_authentic_and_from_another_family(source: tuple[str, int, int, int]) -> None:
    """It is taken; where answers go does not change to what the policy's outer addresses cannot be."""
    pair = Pair()
    with (
        EspEngine(timer=False, follow_mapping=True) as far,
        far.events() as events,
    ):
        local, remote = OUTER[4]
        expected = sa(Direction.IN, source=local, destination=remote)
        far.add_sa(expected)
        far.add_policy(
            policy(
                Direction.IN,
                selector=TrafficSelector(source="10.1.0.0/16", destination="10.2.0.0/16"),
                source=local,
                destination=remote,
            )
        )
        assert isinstance(far.open(pair.seal(inner())[0], source), Opened)
        (event,) = events.read()
        assert isinstance(event, MappingChange)
        mapped = ip_address(source[0])
        assert event.new_address == (getattr(mapped, "ipv4_mapped", None) or mapped)
        (found,) = far.list_sas()
        assert found.association is not None
        assert found.association.source.version == 4


HOSTILE_SOURCES: st.SearchStrategy[Any] = st.one_of(
    ADDRESSES,
    st.tuples(st.ip_addresses().map(str), st.integers(-(1 << 70), 1 << 70)),
    st.sampled_from([None, 5, [], ["192.0.2.1", 4500], ({}, 1), ("192.0.2.1",), ("192.0.2.1", "port"), b"x"]),
)


@settings(max_examples=200, deadline=None)
@given(
    sources=st.lists(HOSTILE_SOURCES, min_size=1, max_size=12),
    classes=st.integers(-(1 << 40), 1 << 40),
    follow=st.booleans(),
    mode=st.sampled_from(list(Mode)),
)
def test_no_field_of_an_outer_header_costs_another_packet(
    sources: list[Any], classes: int, follow: bool, mode: Mode
) -> None:
    """Every packet is authentic: what differs is written by the network, and none is lost for it."""
    association = sa(Direction.IN, mode=mode, copy_ecn=False)
    forger = Forger(association)
    packet = inner() if mode is Mode.TUNNEL else udp()
    padding = -(len(packet) + 2) % 4
    text = packet + PADDINGS[padding] + bytes((padding, IPV4 if mode is Mode.TUNNEL else 17))
    with EspEngine(timer=False, follow_mapping=follow) as engine:
        engine.add_sa(association, without_policies=True)
        burst = [(forger.seal(text), source) for source in sources]
        results = engine.open_burst(burst, [classes] * len(burst))
        assert all(isinstance(result, Opened) for result in results), results
        assert engine.counters() == {}


def test_an_error_costs_one_packet(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Reports and decisions about a packet may fail. The rest of the burst does not notice."""
    monkeypatch.setattr(FAULTS, "_logged", {})
    pair = Pair()

    def fail(*_: object) -> None:
        raise RuntimeError("a mistake in the engine")

    moved = [(pair.seal(inner())[0], ("198.51.100.1", 1000 + number)) for number in range(3)]
    monkeypatch.setattr(pair.far, "_report_move", fail)
    assert [type(result) for result in pair.far.open_burst(moved)] == [Opened] * 3
    assert pair.far.counters() == {Reason.FAULT: 3}
    assert sum("acting on an SA that is due failed" in message for message in caplog.messages) == 1
    packets = [inner(), inner(payload=udp(source_port=9)), inner()]
    burst = [(pair.seal(packet)[0], ("198.51.100.1", 1002)) for packet in packets]
    decide = pair.far.path._admission  # type: ignore[attr-defined]

    def fail_once(association: Inbound, flow: Flow) -> Any:
        return fail() if flow.source_port == 9 else decide(association, flow)

    monkeypatch.setattr(pair.far.path, "_admission", fail_once)
    kinds = [type(result) for result in pair.far.open_burst(burst)]
    assert kinds == [Opened, Dropped, Opened]
    assert pair.far.counters() == {Reason.FAULT: 4}
