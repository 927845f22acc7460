"""Policies, selectors, outer headers, lifetimes, mappings and acquires of the ESP engine."""

from __future__ import annotations

import errno
import gc
import select
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from queue import Queue
from typing import Any

import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers import aead

from natcompat.errors import NatCompatError
from natcompat.esp.engine.base import link_of
from natcompat.esp.engine.engine import ACQUIRE_INTERVAL, LONGEST_QUEUE, EspEngine
from natcompat.esp.engine.events import LONGEST_QUEUE as MOST_EVENTS
from natcompat.esp.engine.inbound import PortableInbound
from natcompat.esp.engine.portable import PortableDataPath
from natcompat.esp.engine.results import Destination, Dropped, Opened, Packet, Reason
from natcompat.ipsec import (
    Acquire,
    Action,
    Direction,
    Encr,
    EventsLost,
    Expire,
    Lifetime,
    MappingChange,
    Mode,
    TrafficSelector,
    UDPEncapsulation,
)
from tests.support.esp import OUTER, SPI, Pair, inner, ip_packet, keys, only, policy, sa, udp

pytestmark = pytest.mark.usefixtures("datapath")


@pytest.fixture
def engine() -> Iterator[EspEngine]:
    with EspEngine(timer=False) as engine:
        yield engine


def reason(result: object) -> Reason | None:
    return result.reason if isinstance(result, Dropped) else None


# -- which policy, which SA


def test_what_policies_do(engine: EspEngine) -> None:
    networks: dict[str, Any] = {"source": "10.0.0.0/8", "destination": "0.0.0.0/0"}
    assert reason(engine.seal(inner())) is Reason.NO_POLICY
    engine.add_policy(policy(Direction.OUT, selector=TrafficSelector(**networks), action=Action.DISCARD))
    assert reason(engine.seal(inner())) is Reason.DISCARD
    engine.add_policy(
        policy(Direction.OUT, selector=TrafficSelector(**networks, protocol=17), action=Action.BYPASS)
    )
    assert reason(engine.seal(inner())) is Reason.BYPASS
    engine.add_policy(policy(Direction.OUT))
    assert reason(engine.seal(inner())) is Reason.ACQUIRE
    engine.add_sa(sa(Direction.OUT))
    sealed, destination = only(engine.seal(inner()))
    assert sealed[:8] == SPI.to_bytes(4) + b"\0\0\0\1"
    assert destination == ("192.0.2.2", 4500)
    assert isinstance(destination, Destination)
    assert destination.local_port == 4500
    assert engine.get_policy(policy(Direction.OUT)).last_used is not None
    assert engine.counters() == {
        Reason.NO_POLICY: 1,
        Reason.DISCARD: 1,
        Reason.BYPASS: 1,
        Reason.ACQUIRE: 1,
    }


def test_the_smaller_priority_comes_first_and_specific_ones_before_wide_ones(engine: EspEngine) -> None:
    """Whatever the order in which they are added."""
    wide, narrow = (
        TrafficSelector(source=f"10.1.0.0/{length}", destination="0.0.0.0/0") for length in (16, 32 - 8)
    )
    engine.add_policy(policy(Direction.OUT, selector=wide, action=Action.DISCARD))
    engine.add_policy(policy(Direction.OUT, selector=narrow, action=Action.BYPASS))
    assert reason(engine.seal(inner())) is Reason.BYPASS
    engine.delete_policy(policy(Direction.OUT, selector=wide, action=Action.DISCARD))
    engine.add_policy(policy(Direction.OUT, selector=wide, action=Action.DISCARD, priority=1))
    assert reason(engine.seal(inner())) is Reason.DISCARD
    engine.flush_policies()
    assert reason(engine.seal(inner())) is Reason.NO_POLICY


def test_of_equal_policies_the_first(engine: EspEngine) -> None:
    for source, destination, action in (
        ("10.1.0.0/16", "0.0.0.0/0", Action.BYPASS),
        ("0.0.0.0/0", "10.2.0.0/16", Action.DISCARD),
    ):
        selector = TrafficSelector(source=source, destination=destination)
        engine.add_policy(policy(Direction.OUT, selector=selector, action=action, priority=5))
    assert reason(engine.seal(inner())) is Reason.BYPASS


@pytest.mark.parametrize(
    "changes",
    [
        {"reqid": 8},
        {"destination": "192.0.2.77"},
        {"source": "192.0.2.77"},
        {"mode": Mode.TRANSPORT},
        {"selectors": [TrafficSelector(source="10.1.0.2", destination="10.2.0.0/16")]},
        {"selectors": [TrafficSelector(source="10.1.0.0/16", destination="10.2.0.0/16", protocol=6)]},
    ],
    ids=["reqid", "destination", "source", "mode", "selector", "protocol"],
)
def test_an_sa_that_the_policy_does_not_mean(engine: EspEngine, changes: dict[str, Any]) -> None:
    engine.add_policy(policy(Direction.OUT))
    engine.add_sa(sa(Direction.OUT, **changes))
    assert reason(engine.seal(inner())) is Reason.ACQUIRE


def test_the_newest_sa_is_used_and_the_older_one_when_it_goes(engine: EspEngine) -> None:
    engine.add_policy(policy(Direction.OUT))
    names = [engine.add_sa(sa(Direction.OUT, spi=0x1000 + number)) for number in range(3)]
    for used in (2, 1, 0):
        sealed, _ = only(engine.seal(inner()))
        assert int.from_bytes(sealed[:4]) == 0x1000 + used
        engine.delete_sa(names[used])
    assert reason(engine.seal(inner())) is Reason.ACQUIRE


def test_optional_policies_let_pass_while_there_is_no_sa(engine: EspEngine) -> None:
    engine.add_policy(policy(Direction.OUT, optional=True))
    with engine.events() as events:
        assert reason(engine.seal(inner())) is Reason.BYPASS
        assert isinstance(events.read()[0], Acquire)
    engine.add_sa(sa(Direction.OUT))
    assert reason(engine.seal(inner())) is None


# -- inbound: the inner packet must be what the SA is for


def test_selectors_of_the_sa_or_the_policies() -> None:
    pair = Pair()
    other = ip_packet("10.1.0.1", "10.2.0.1", udp(destination_port=54))
    assert pair.open(pair.seal(inner())[0]) == inner()
    far = pair.far
    far.delete_policy(policy(Direction.IN, selector=SELECTOR))
    assert pair.open(pair.seal(inner())[0]) is Reason.SELECTOR
    far.delete_sa(pair.expected)
    selectors = [
        TrafficSelector(source="10.1.0.0/16", destination="10.9.0.0/16"),
        TrafficSelector(source="10.1.0.0/16", destination="10.2.0.0/16", protocol=17, destination_port=53),
    ]
    far.add_sa(sa(Direction.IN, source="192.0.2.1", destination="192.0.2.2", selectors=selectors))
    assert pair.open(pair.seal(inner())[0]) == inner()
    assert pair.open(pair.seal(inner())[0]) == inner(), "remembered"
    assert pair.open(pair.seal(other)[0]) is Reason.SELECTOR


SELECTOR = TrafficSelector(source="10.1.0.0/16", destination="10.2.0.0/16")


@pytest.mark.parametrize(
    "changes",
    [
        {"reqid": 8},
        {"action": Action.DISCARD},
        {"action": Action.BYPASS},
        {"mode": Mode.TRANSPORT},
        {"source": "192.0.2.77", "destination": "192.0.2.2"},
    ],
    ids=str,
)
def test_a_policy_that_does_not_mean_this_sa(changes: dict[str, Any]) -> None:
    """Or one tunnel could speak for another (RFC 4301, 5.2)."""
    pair = Pair()
    pair.far.flush_policies()
    pair.far.add_policy(
        policy(
            Direction.IN,
            **{"source": "192.0.2.1", "destination": "192.0.2.2", **changes, "selector": SELECTOR},
        )
    )
    assert pair.open(pair.seal(inner())[0]) is Reason.SELECTOR


def test_one_spi_at_two_addresses() -> None:
    """The peer's address tells them apart; who knows the own one may not have to."""
    engine = EspEngine(timer=False)
    for number in (1, 2):
        engine.add_sa(
            sa(
                Direction.IN,
                source=f"192.0.2.{number}",
                destination=f"203.0.113.{number}",
                encryption_key=bytes([number]) * 20,
                selectors=[SELECTOR],
            )
        )
    for number in (1, 2):
        with EspEngine(timer=False) as near:
            near.add_sa(sa(Direction.OUT, encryption_key=bytes([number]) * 20), sequence=10 * number)
            near.add_policy(policy(Direction.OUT))
            sealed, _ = only(near.seal(inner()))
        assert reason(engine.open(sealed, (f"192.0.2.{3 - number}", 4500))) is Reason.INTEGRITY
        assert reason(engine.open(sealed, ("nowhere", 4500))) is (Reason.INTEGRITY if number == 2 else None)
        if number == 2:
            assert reason(engine.open(sealed, (f"::ffff:192.0.2.{number}", 4500, 0, 0))) is None
    engine.delete_sa(sa(Direction.IN, destination="203.0.113.1").sa_id)
    assert [str(each.sa_id.destination) for each in engine.list_sas()] == ["203.0.113.2"]
    assert engine.open(SPI.to_bytes(4) + b"\0\0\1\0" + bytes(60), ("192.0.2.1", 1)) == Dropped(
        Reason.INTEGRITY
    )


# -- outer headers


@pytest.mark.parametrize("copy_dscp", [True, False])
@pytest.mark.parametrize("copy_ecn", [True, False])
@pytest.mark.parametrize("copy_df", [True, False])
@pytest.mark.parametrize("dont_fragment", [True, False])
@pytest.mark.parametrize("version", [4, 6])
def test_outer_header(
    version: int, dont_fragment: bool, copy_df: bool, copy_ecn: bool, copy_dscp: bool
) -> None:
    pair = Pair(version=4, inner=version, copy_dscp=copy_dscp, copy_ecn=copy_ecn, copy_df=copy_df)
    for traffic_class in (0, 0xB8, 0xB9, 0xB8, 2):
        packet = inner(version, traffic_class=traffic_class, dont_fragment=dont_fragment)
        _, destination = pair.seal(packet)
        expected = (traffic_class & 0xFC if copy_dscp else 0) | (traffic_class & 3 if copy_ecn else 0)
        assert destination.traffic_class == expected
        assert destination.dont_fragment is ((dont_fragment or version == 6) and copy_df)


def test_transport_mode_leaves_the_header_as_it_is() -> None:
    pair = Pair(mode=Mode.TRANSPORT, copy_dscp=False, copy_ecn=False, copy_df=False)
    packet = ip_packet(*OUTER[4], udp(), traffic_class=0xB9, dont_fragment=True)
    sealed, destination = pair.seal(packet)
    assert (destination.traffic_class, destination.dont_fragment) == (0xB9, True)
    assert pair.open(sealed, 0xB9) == ip_packet(*OUTER[4], udp(), traffic_class=0xB9)


@pytest.mark.parametrize("copy_ecn", [True, False])
def test_congestion_goes_inside(copy_ecn: bool) -> None:
    pair = Pair(copy_ecn=copy_ecn)
    capable, incapable = inner(traffic_class=2), inner(traffic_class=0)
    assert pair.open(pair.seal(capable)[0], 3) == (inner(traffic_class=3) if copy_ecn else capable)
    assert pair.open(pair.seal(incapable)[0], 3) == (Reason.ECN if copy_ecn else incapable)


@pytest.mark.parametrize("size", [0, 1, 700, 1372, 1400])
def test_traffic_flow_confidentiality(size: int) -> None:
    pair = Pair(tfc=1400)
    packet = inner(payload=udp(bytes(size)))
    sealed, _ = pair.seal(packet)
    assert len(sealed) == max(1400, len(packet)) + (-max(1400, len(packet)) - 2) % 4 + 2 + 8 + 8 + 16
    assert pair.open(sealed) == packet


def test_dummy_packets() -> None:
    pair = Pair()
    dummy = pair.near.seal_dummy(pair.sent, 300)
    assert not isinstance(dummy, Dropped)
    assert pair.open(dummy[0]) is Reason.DUMMY
    assert pair.open(dummy[0]) is Reason.REPLAYED
    assert pair.open(pair.seal(inner())[0]) == inner()
    with pytest.raises(NatCompatError, match="no outbound SA"):
        pair.far.seal_dummy(pair.expected, 300)
    assert pair.near.seal_dummy(pair.sent, 70000) == Dropped(Reason.TOO_BIG)


@pytest.mark.parametrize("original", [None, "10.9.8.7"])
def test_transport_mode_checksums_through_a_nat(original: str | None) -> None:
    """The peer is 10.9.8.7 and seen as 192.0.2.1."""
    from scapy.layers.inet import IP, TCP

    near, far = EspEngine(timer=False), EspEngine(timer=False)
    ports = UDPEncapsulation(
        local_port=4500, remote_port=4500, original_address=None if original is None else ip_address(original)
    )
    near.add_sa(sa(Direction.OUT, mode=Mode.TRANSPORT, source="10.9.8.7"))
    near.add_policy(
        policy(
            Direction.OUT,
            mode=Mode.TRANSPORT,
            selector=TrafficSelector(source="10.9.8.7", destination="192.0.2.2"),
        )
    )
    arguments: dict[str, Any] = {"source": "192.0.2.1", "destination": "192.0.2.2"}
    far.add_sa(sa(Direction.IN, mode=Mode.TRANSPORT, encapsulation=ports, **arguments))
    far.add_policy(policy(Direction.IN, mode=Mode.TRANSPORT, selector=TrafficSelector(**arguments)))
    sent, received = (
        bytes(IP(src=source, dst="192.0.2.2") / TCP(sport=1, dport=2) / b"payload")
        for source in ("10.9.8.7", "192.0.2.1")
    )
    sealed, _ = only(near.seal(sent))
    opened = far.open(sealed, ("192.0.2.1", 4500))
    assert isinstance(opened, Opened)
    assert opened.inner[20:] == received[20:]
    assert opened.inner[12:20] == received[12:20]


# -- sequence numbers


@pytest.mark.parametrize("esn", [False, True])
def test_the_last_sequence_number(esn: bool) -> None:
    last = (1 << 64 if esn else 1 << 32) - 1
    pair = Pair(esn=esn, sequence=last - 2)
    with pair.near.events() as events:
        for number in (last - 1, last):
            sealed, _ = pair.seal(inner())
            assert int.from_bytes(sealed[4:8]) == number & 0xFFFF_FFFF
        assert not events.read()
        assert reason(pair.near.seal(inner())) is Reason.SEQUENCE
        assert events.read() == [Expire(sa_id=pair.sent, reqid=7, hard=True)]
        assert reason(pair.near.seal(inner())) is Reason.ACQUIRE, "nothing goes in the clear"
    assert pair.near.list_sas() == []


@pytest.mark.parametrize("esn", [False, True])
def test_sequence_numbers_that_are_reserved(esn: bool) -> None:
    """None is used before it is permitted, and the SA waits for more."""
    pair = Pair(esn=esn)
    pair.near.delete_sa(pair.sent)
    sent = pair.near.add_sa(
        sa(Direction.OUT, esn=esn, encryption_key=bytes(20)), sequence=1000, permitted=1002
    )
    for number in (1001, 1002):
        assert int.from_bytes(pair.seal(inner())[0][4:8]) == number
    for _ in range(2):
        assert reason(pair.near.seal(inner())) is Reason.UNRESERVED
    assert isinstance(pair.near.seal_dummy(sent, 10), Dropped)
    assert pair.near.get_sa(sent).sequence == 1002
    assert pair.near.counters()[Reason.UNRESERVED] == 2
    pair.near.permit(sent, 900)  # what is permitted stays so
    pair.near.permit(sent, 1003)
    sealed = pair.seal(inner())[0]
    assert (sealed[4:8], sealed[8:16]) == ((1003).to_bytes(4), (1003).to_bytes(8))
    assert reason(pair.near.seal(inner())) is Reason.UNRESERVED
    pair.near.permit(sent, 1 << 70)
    pair.seal(inner())
    with pytest.raises(NatCompatError) as caught:
        pair.far.permit(pair.expected, 5)
    assert caught.value.errno == errno.ESRCH


def test_the_last_sequence_number_ends_an_sa_that_reserves() -> None:
    pair = Pair()
    pair.near.delete_sa(pair.sent)
    last = 0xFFFF_FFFF
    pair.near.add_sa(sa(Direction.OUT, encryption_key=bytes(20)), sequence=last - 1, permitted=1 << 40)
    pair.seal(inner())
    assert reason(pair.near.seal(inner())) is Reason.SEQUENCE
    assert pair.near.list_sas() == []


@pytest.mark.parametrize("esn", [False, True])
def test_what_was_received_before_a_restart_is_a_replay(esn: bool) -> None:
    pair = Pair(esn=esn, sequence=(1 << 33) - 2 if esn else 98)
    old, last, new = (pair.seal(inner())[0] for _ in range(3))
    assert pair.open(last) == (Reason.REPLAYED if esn else inner()), "a fresh window begins at 0"
    highest = (pair.near.get_sa(pair.sent).sequence or 0) - 1
    installed = pair.far.list_sas()[0].association
    assert installed is not None
    pair.far.delete_sa(pair.expected)
    pair.far.add_sa(installed, sequence=highest)
    assert pair.open(old) is Reason.REPLAYED
    assert pair.open(last) is Reason.REPLAYED
    assert pair.open(new) == inner(), "also from another 2**32 than the first"
    assert pair.far.get_sa(pair.expected).sequence == highest + 1


# -- lifetimes


@pytest.mark.parametrize("unit", ["packets", "bytes"])
def test_lifetimes(unit: str) -> None:
    each = 1 if unit == "packets" else len(inner())
    lifetime = Lifetime(**{f"soft_{unit}": 2 * each, f"hard_{unit}": 4 * each})
    pair = Pair(lifetime=lifetime)
    with pair.near.events() as sending, pair.far.events() as receiving:
        for number in range(1, 7):
            result = pair.near.seal(inner())
            if number > 4:
                assert reason(result) is Reason.ACQUIRE
                continue
            sealed, _ = only(result)
            assert pair.open(sealed) == inner(), "the last packet is one of the lifetime"
            for events, sa_id in ((sending, pair.sent), (receiving, pair.expected)):
                expected = {2: False, 4: True}.get(number)
                found = [event for event in events.read() if isinstance(event, Expire)]
                assert found == ([] if expected is None else [Expire(sa_id=sa_id, reqid=7, hard=expected)])
    assert not pair.far.list_sas()
    assert pair.open(sealed) is Reason.NO_SA


def test_soft_and_hard_at_once_is_hard() -> None:
    pair = Pair(lifetime=Lifetime(soft_packets=1, hard_packets=1))
    with pair.near.events() as events:
        pair.seal(inner())
        assert events.read() == [Expire(sa_id=pair.sent, reqid=7, hard=True)]


def test_lifetimes_in_seconds(engine: EspEngine) -> None:
    lifetime = Lifetime(soft_seconds=60, hard_seconds=90)
    sa_id = engine.add_sa(sa(Direction.IN, lifetime=lifetime))
    spi = engine.allocate_spi(*OUTER[4], lifetime=30)
    start = time.monotonic()
    with engine.events() as events:
        engine.tick(start + 29)
        assert len(engine.list_sas()) == 2
        engine.tick(start + 31)
        assert [each.sa_id for each in engine.list_sas()] == [sa_id], f"SPI {spi} is free again"
        assert not events.read()
        engine.tick(start + 61)
        assert events.read() == [Expire(sa_id=sa_id, reqid=7, hard=False)]
        assert engine.next_deadline() == pytest.approx(start + 90, abs=5)
        engine.tick(start + 91)
        assert events.read() == [Expire(sa_id=sa_id, reqid=7, hard=True)]
    assert engine.list_sas() == []
    assert engine.next_deadline() is None


def test_a_thread_sees_to_it_where_nobody_ticks() -> None:
    with EspEngine() as engine, engine.events() as events:
        sa_id = engine.add_sa(sa(Direction.IN, lifetime=Lifetime(hard_seconds=1)))
        assert select.select([events], [], [], 10)[0]
        assert events.read() == [Expire(sa_id=sa_id, reqid=7, hard=True)]


def test_soft_is_said_once_whatever_comes_first(engine: EspEngine) -> None:
    engine.add_policy(policy(Direction.OUT))
    engine.add_sa(sa(Direction.OUT, lifetime=Lifetime(soft_packets=1, soft_seconds=60)))
    with engine.events() as events:
        assert reason(engine.seal(inner())) is None
        engine.tick(time.monotonic() + 61)
        assert len(events.read()) == 1


def test_ticks_are_bounded(engine: EspEngine) -> None:
    for _ in range(1500):
        engine.allocate_spi(*OUTER[4], lifetime=1)
    later = time.monotonic() + 2
    engine.tick(later)
    assert len(engine.list_sas()) == 500
    assert (engine.next_deadline() or later) < later
    engine.tick(later)
    assert engine.list_sas() == []


def test_an_engine_that_is_forgotten_ends_its_thread() -> None:
    engine = EspEngine()
    engine.add_sa(sa(Direction.IN, lifetime=Lifetime(hard_seconds=3600)))
    assert engine._timer is not None
    thread = engine._timer._thread
    assert thread is not None
    assert thread.is_alive()
    del engine
    gc.collect()
    thread.join(10)
    assert not thread.is_alive()


def test_deadlines_of_what_is_gone_are_let_go(engine: EspEngine) -> None:
    for number in range(1000):
        lifetime = Lifetime(soft_seconds=3600, hard_seconds=7200)
        engine.delete_sa(engine.add_sa(sa(Direction.IN, spi=0x1000 + number, lifetime=lifetime)))
    assert len(engine._deadlines) < 100


# -- keepalives


def test_keepalives(engine: EspEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.add_policy(policy(Direction.OUT))
    start, epoch = time.monotonic(), time.time()
    engine.add_sa(sa(Direction.OUT, nat_keepalive=20))

    def at(elapsed: float, set_back: float = 0) -> list[tuple[bytes, Destination]]:
        monkeypatch.setattr(time, "time", lambda: epoch + elapsed - set_back)
        return engine.tick(start + elapsed)

    keepalive = [(b"\xff", ("192.0.2.2", 4500))]
    assert at(19) == []
    assert at(21) == keepalive
    assert at(30) == []
    assert reason(engine.seal(inner())) is None
    assert at(42) == [], "there was a packet"
    assert at(49) == []
    assert at(51) == keepalive
    assert at(72, set_back=3600) == keepalive, "rather too many, where the clock is set back"
    engine.flush_sas()
    assert at(5000) == []


def test_keepalives_are_sent_where_nobody_ticks() -> None:
    sent: Queue[list[tuple[bytes, Destination]]] = Queue()
    with EspEngine(transmit=sent.put) as engine:
        engine.add_sa(sa(Direction.OUT, nat_keepalive=1))
        assert sent.get(timeout=10) == sent.get(timeout=10) == [(b"\xff", ("192.0.2.2", 4500))]


def test_a_function_that_raises_does_not_stop_time(caplog: pytest.LogCaptureFixture) -> None:
    def transmit(_: object) -> None:
        raise OSError("no route")

    with EspEngine(transmit=transmit) as engine, engine.events() as events:
        engine.add_sa(sa(Direction.OUT, nat_keepalive=1, lifetime=Lifetime(hard_seconds=2)))
        assert select.select([events], [], [], 10)[0]
        assert "no route" in caplog.text


def test_keepalives_need_a_way_out() -> None:
    with EspEngine() as engine:
        with pytest.raises(NatCompatError, match="nothing to send NAT-keepalives with") as caught:
            engine.add_sa(sa(Direction.OUT, nat_keepalive=20))
        assert caught.value.errno == errno.EOPNOTSUPP
        assert engine.list_sas() == []


# -- mappings


def test_a_new_mapping_is_reported_and_not_followed() -> None:
    pair = Pair()
    with pair.far.events() as events:
        assert isinstance(pair.far.open(pair.seal(inner())[0], pair.source), Opened)
        assert not events.read()
        old, new = pair.seal(inner())[0], pair.seal(inner())[0]
        replayed_from = ("198.51.100.9", 9)
        assert isinstance(pair.far.open(new, ("::ffff:198.51.100.1", 1024, 0, 0)), Opened)
        assert reason(pair.far.open(new, replayed_from)) is Reason.REPLAYED
        assert isinstance(pair.far.open(old, replayed_from), Opened), "authentic, but not the newest"
        change = MappingChange(
            sa_id=pair.expected,
            reqid=7,
            old_address=ip_address("192.0.2.1"),
            old_port=4500,
            new_address=ip_address("198.51.100.1"),
            new_port=1024,
        )
        assert events.read() == [change]
        for _ in range(3):
            assert isinstance(pair.far.open(pair.seal(inner())[0], ("198.51.100.1", 1024)), Opened)
        assert not events.read(), "reported once"
        assert pair.far.list_sas()[0].sa_id.source == ip_address("192.0.2.1")
        moved = pair.far.update_sa(
            pair.expected,
            source="198.51.100.1",
            encapsulation=UDPEncapsulation(local_port=4500, remote_port=1024),
        )
        assert moved == pair.expected
        pair.far.flush_policies()
        pair.far.add_policy(
            policy(Direction.IN, selector=SELECTOR, source="198.51.100.1", destination="192.0.2.2")
        )
        assert isinstance(pair.far.open(pair.seal(inner())[0], ("198.51.100.1", 1024)), Opened)
        assert not events.read()
        assert isinstance(pair.far.open(pair.seal(inner())[0], pair.source), Opened)
        (back,) = events.read()
        assert isinstance(back, MappingChange)
        assert (str(back.old_address), str(back.new_address)) == ("198.51.100.1", "192.0.2.1")
        assert isinstance(pair.far.open(pair.seal(inner())[0], ("198.51.100.1", 1024)), Opened)
        assert not events.read(), "and back to what the SA says"


def test_a_new_mapping_is_followed_when_asked() -> None:
    pair = Pair()
    with EspEngine(timer=False, follow_mapping=True) as far:
        far.add_sa(sa(Direction.IN, source="192.0.2.1", destination="192.0.2.2"))
        far.add_policy(policy(Direction.IN, selector=SELECTOR, source="192.0.2.1", destination="192.0.2.2"))
        ends: dict[str, Any] = {"source": "192.0.2.2", "destination": "192.0.2.1"}
        answers = TrafficSelector(source="10.2.0.0/16", destination="10.1.0.0/16")
        far.add_sa(sa(Direction.OUT, spi=0xA000, encryption_key=bytes(20), **ends))
        far.add_sa(sa(Direction.OUT, spi=0xA001, encryption_key=bytes(20), reqid=8, **ends))
        far.add_policy(policy(Direction.OUT, selector=answers, **ends))
        answer = ip_packet("10.2.0.1", "10.1.0.1", udp())
        _, destination = only(far.seal(answer))
        assert destination == ("192.0.2.1", 4500)
        for address in (("198.51.100.1", 1024), ("198.51.100.2", 4500), ("2001:db8::9", 1)):
            with far.events() as events:
                assert isinstance(far.open(pair.seal(inner())[0], address), Opened)
                assert isinstance(events.read()[0], MappingChange)
            _, destination = only(far.seal(answer))
            assert destination == (address if "." in address[0] else ("198.51.100.2", 4500))
        others = [each for each in far.list_sas() if each.association and each.association.reqid == 8]
        assert str(others[0].sa_id.destination) == "192.0.2.1"


# -- acquires


@pytest.mark.parametrize("mode", list(Mode))
def test_acquires(engine: EspEngine, mode: Mode) -> None:
    engine.add_policy(policy(Direction.OUT, mode=mode))
    packet = inner() if mode is Mode.TUNNEL else ip_packet(*OUTER[4], udp())
    assert reason(engine.seal(packet)) is Reason.ACQUIRE, "nobody listens, nobody is told"
    with engine.events() as events:
        results = engine.seal_burst([packet] * 50)
        assert {reason(each) for each in results} == {Reason.ACQUIRE}
        (acquire,) = events.read()
        assert isinstance(acquire, Acquire)
        assert [str(each) for each in (acquire.source, acquire.destination)] == list(OUTER[4])
        assert acquire.reqid == 7
        hosts = [
            str(ip_network(each)) for each in (("10.1.0.1", "10.2.0.1") if mode is Mode.TUNNEL else OUTER[4])
        ]
        assert acquire.selector == TrafficSelector(
            source=hosts[0], destination=hosts[1], protocol=17, source_port=1234, destination_port=53
        )
        spi = engine.allocate_spi(acquire.destination, acquire.source, sequence=acquire.sequence)
        assert spi >= 256
        engine.add_sa(sa(Direction.OUT, mode=mode))
        assert reason(engine.seal(packet)) is None
        assert not events.read()


def test_acquires_are_not_too_many(engine: EspEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    engine.add_policy(policy(Direction.OUT))
    now = time.monotonic()
    with engine.events() as events:
        counts = []
        for elapsed in (0.0, ACQUIRE_INTERVAL - 1, ACQUIRE_INTERVAL + 1):
            monkeypatch.setattr(time, "monotonic", lambda elapsed=elapsed: now + elapsed)
            engine.seal_burst([inner(payload=udp(source_port=port)) for port in range(100)])
            counts.append(len(events.read()))
        assert counts == [1, 0, 1]


# -- events


def test_a_listener_that_does_not_read_is_told_what_it_missed(engine: EspEngine) -> None:
    engine.add_policy(policy(Direction.OUT))
    with engine.events() as events:
        dying = engine.add_sa(sa(Direction.OUT, lifetime=Lifetime(soft_packets=1), spi=0x999))
        assert reason(engine.seal(inner())) is None
        for number in range(MOST_EVENTS + 5):
            arguments: dict[str, Any] = {"lifetime": Lifetime(hard_packets=1), "spi": 0x1000 + number}
            engine.add_sa(sa(Direction.OUT, **arguments))
            assert reason(engine.seal(inner())) is None
        assert select.select([events], [], [], 0)[0]
        assert events.read() == [EventsLost(), Expire(sa_id=dying, reqid=7, hard=False)]
        assert not select.select([events], [], [], 0)[0]
        assert events.read() == []


def test_every_listener_hears_everything(engine: EspEngine) -> None:
    engine.add_policy(policy(Direction.OUT))
    with engine.events() as one, engine.events() as other:
        engine.add_sa(sa(Direction.OUT, lifetime=Lifetime(hard_packets=1)))
        engine.seal(inner())
        assert one.read() == other.read() != []
        other.close()
        engine.add_sa(sa(Direction.OUT, lifetime=Lifetime(hard_packets=1)))
        engine.seal(inner())
        assert len(one.read()) == 1
        assert other.fileno() == -1
        assert other.read() == []


# -- races, step by step


def test_an_sa_that_ends_while_a_packet_is_under_way() -> None:
    """It was found, and is gone when the packet gets its lock: the next one is taken, or none."""
    pair = Pair()
    sealed, _ = pair.seal(inner())
    for engine, sa_id in ((pair.near, pair.sent), (pair.far, pair.expected)):
        engine._find(sa_id).retire()
    assert pair.open(sealed) is Reason.NO_SA
    assert reason(pair.near.seal(inner())) is Reason.ACQUIRE
    assert pair.near.seal_dummy(pair.sent, 10) == Dropped(Reason.NO_SA)


def test_traffic_while_an_sa_moves_back_and_forth() -> None:
    """In another thread: nothing is lost for want of an SA, nobody is asked for one."""
    pair = Pair()
    ports = [UDPEncapsulation(local_port=4500, remote_port=port) for port in (4500, 1024)]
    stop = threading.Event()

    def move() -> None:
        while not stop.is_set():
            for each in ports:
                pair.near.update_sa(pair.sent, encapsulation=each)

    thread = threading.Thread(target=move)
    with pair.near.events() as events:
        thread.start()
        try:
            results = [pair.near.seal(inner()) for _ in range(2000)]
        finally:
            stop.set()
            thread.join()
        assert not events.read()
    sealed = [only(each) for each in results if not isinstance(each, Dropped)]
    assert {destination[1] for _, destination in sealed} <= {4500, 1024}
    numbers = [int.from_bytes(packet[4:8]) for packet, _ in sealed]
    assert numbers == list(range(1, len(sealed) + 1))
    assert len(sealed) == 2000


def test_dummies_count_towards_a_lifetime() -> None:
    pair = Pair(lifetime=Lifetime(hard_packets=1))
    assert not isinstance(pair.near.seal_dummy(pair.sent, 10), Dropped)
    assert pair.near.list_sas() == []


def test_more_flows_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natcompat.esp.engine.portable.MOST_FLOWS", 10)
    pair = Pair()
    for port in range(1, 35):
        packet = inner(payload=udp(source_port=port))
        assert pair.open(pair.seal(packet)[0]) == packet
    path = pair.near._path
    assert isinstance(path, PortableDataPath)
    assert len(path._ways) <= 10


# -- what is refused


def test_ranges_of_spis(engine: EspEngine) -> None:
    for minimum, maximum in ((255, 300), (300, 299), (256, 1 << 32)):
        with pytest.raises(ValueError, match="no range within"):
            engine.allocate_spi(*OUTER[4], minimum=minimum, maximum=maximum)
    assert engine.list_sas() == []


def test_spis_are_unique_whatever_the_destination(engine: EspEngine) -> None:
    engine.add_sa(sa(Direction.IN, spi=0x4000))
    one = engine.allocate_spi("192.0.2.2", "192.0.2.1", minimum=0x4000, maximum=0x4002)
    other = engine.allocate_spi("192.0.2.2", "192.0.2.9", minimum=0x4000, maximum=0x4002)
    assert {one, other} == {0x4001, 0x4002}
    assert engine.get_sa(engine.list_sas()[1].sa_id).packets == 0


def test_without_encapsulation_there_is_no_state() -> None:
    with pytest.raises(ValueError, match="encapsulation"):
        PortableInbound(sa(Direction.IN, encapsulation=None), link_of(sa(Direction.IN)))


def test_a_transform_that_openssl_was_built_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of a host in FIPS mode, where ChaCha20-Poly1305 is refused."""

    def refuse(_: bytes) -> None:
        raise UnsupportedAlgorithm("ChaCha20Poly1305 is not supported by this version of OpenSSL")

    monkeypatch.setattr(aead, "ChaCha20Poly1305", refuse)
    engine = EspEngine(timer=False, datapath=PortableDataPath)
    with pytest.raises(NatCompatError, match="has no CHACHA20_POLY1305") as caught:
        engine.add_sa(sa(Direction.OUT, **keys(Encr.CHACHA20_POLY1305)))
    assert caught.value.errno == errno.EPROTONOSUPPORT


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (
            "import sys; sys.modules['cryptography'] = None; import natcompat.esp.engine.engine",
            "pip install 'natcompat[userspace]'",
        ),
        ("import natcompat, natcompat.ipsec, sys; print(sorted(sys.modules))", None),
    ],
    ids=["cryptography is missing", "it is not loaded before it is needed"],
)
def test_cryptography_is_optional(program: str, expected: str | None) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if expected:
        assert expected in done.stderr
        assert "NatCompatError" in done.stderr
    else:
        assert "natcompat.ipsec" in done.stdout
        assert "cryptography" not in done.stdout
        assert "natcompat.esp" not in done.stdout


@pytest.mark.parametrize(
    ("changes", "number", "problem"),
    [
        ({"encapsulation": None}, errno.EPROTONOSUPPORT, "carried in UDP only"),
        ({"mark": 5}, errno.EOPNOTSUPP, "neither packet marks"),
        ({"interface_id": 5}, errno.EOPNOTSUPP, "neither packet marks"),
        (
            {"encryption": 12, "encryption_key": bytes(16), "integrity": 5, "integrity_key": bytes(16)},
            errno.EPROTONOSUPPORT,
            "has no AES_XCBC_96",
        ),
    ],
    ids=["no UDP", "mark", "interface", "XCBC"],
)
def test_refused(engine: EspEngine, changes: dict[str, Any], number: int, problem: str) -> None:
    with pytest.raises(NatCompatError, match=problem) as caught:
        engine.add_sa(sa(Direction.OUT, **changes))
    assert caught.value.errno == number
    assert caught.value.remedy
    assert engine.list_sas() == []


@pytest.mark.parametrize("changes", [{"mark": 5}, {"interface_id": 5}], ids=str)
def test_policies_refused(engine: EspEngine, changes: dict[str, int]) -> None:
    with pytest.raises(NatCompatError, match="neither packet marks"):
        engine.add_policy(policy(Direction.OUT, **changes))


def test_moving_to_a_name_that_is_taken(engine: EspEngine) -> None:
    one = engine.add_sa(sa(Direction.OUT))
    engine.add_sa(sa(Direction.OUT, destination="192.0.2.77"))
    with pytest.raises(NatCompatError) as caught:
        engine.update_sa(one, destination="192.0.2.77")
    assert caught.value.errno == errno.EEXIST
    assert len(engine.list_sas()) == 2
    with pytest.raises(NatCompatError) as caught:
        engine.update_sa(one, encapsulation=None)
    assert caught.value.errno == errno.EPROTONOSUPPORT


def test_closed() -> None:
    engine = EspEngine()
    engine.add_sa(sa(Direction.OUT, lifetime=Lifetime(hard_seconds=60)))
    events = engine.events()
    engine.close()
    engine.close()
    assert engine.seal(inner()) == Dropped(Reason.CLOSED)
    assert engine.open(bytes(64), ("192.0.2.1", 1)) == Dropped(Reason.CLOSED)
    assert events.fileno() == -1
    with pytest.raises(NatCompatError, match="closed"):
        engine.list_sas()


# -- as the consumer of a socket's ESP


def test_inbound_waits_to_be_received_and_not_for_ever() -> None:
    pair = Pair(replay_window=4096)
    sealed = [pair.seal(inner(payload=udp(number.to_bytes(4))))[0] for number in range(LONGEST_QUEUE + 5)]
    pair.far.inbound([(memoryview(packet), pair.source) for packet in sealed])
    received = pair.far.received()
    assert [each.inner for each in received] == [
        inner(payload=udp(number.to_bytes(4))) for number in range(LONGEST_QUEUE)
    ]
    assert received[0].sa.sa_id == pair.expected
    assert pair.far.counters() == {Reason.QUEUE: 5}
    assert pair.far.received() == []


def test_inbound_delivers() -> None:
    delivered: list[list[Opened]] = []
    pair = Pair()
    with EspEngine(timer=False, deliver=delivered.append) as far:
        far.add_sa(sa(Direction.IN, source="192.0.2.1", destination="192.0.2.2", selectors=[SELECTOR]))
        far.inbound([(memoryview(pair.seal(inner())[0]), pair.source), (memoryview(b"short"), pair.source)])
        far.inbound([(memoryview(b"short"), pair.source)])
        assert [[each.inner for each in burst] for burst in delivered] == [[inner()]]


def test_bursts_keep_their_order() -> None:
    pair = Pair()
    burst: list[Packet] = [inner(), b"rubbish", memoryview(inner(payload=udp(b"2")))]
    sealed = pair.near.seal_burst(burst)
    assert reason(sealed[1]) is Reason.MALFORMED
    packets = [each[0] for each in sealed if not isinstance(each, Dropped)]
    opened = pair.far.open_burst([(each, pair.source) for each in packets], [0, 0])
    assert [each.inner for each in opened if isinstance(each, Opened)] == [burst[0], bytes(burst[2])]
