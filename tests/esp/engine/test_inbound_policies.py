"""The SPD decides about inbound packets (RFC 4301, 5.2): from an SA, in the clear, and for endpoints."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest

from natcompat.errors import NatCompatError
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.results import Destination, Dropped, Opened, Reason
from natcompat.ipsec import Action, Direction, Mode, Policy, TrafficSelector
from tests.support.esp import (
    INBOUND_SELECTOR,
    OUTER,
    SPI,
    Pair,
    drop_reason,
    inner,
    ip_packet,
    only,
    policy,
    sa,
    udp,
)

pytestmark = pytest.mark.usefixtures("datapath")

NARROW = TrafficSelector(source="10.1.0.0/24", destination="10.2.0.0/16")
ENDS: dict[str, Any] = {"source": "192.0.2.1", "destination": "192.0.2.2"}
FIRST: list[tuple[str, dict[str, Any] | None, Reason | None]] = [
    ("only the wide PROTECT", None, None),
    ("DISCARD", {"action": Action.DISCARD}, Reason.SELECTOR),
    ("BYPASS", {"action": Action.BYPASS}, Reason.SELECTOR),
    ("PROTECT with another reqid", {"reqid": 99, **ENDS}, Reason.SELECTOR),
    ("PROTECT without a reqid", {"reqid": 0, **ENDS}, Reason.SELECTOR),
    ("PROTECT with other ends", {"source": "192.0.2.9", "destination": "192.0.2.2"}, Reason.SELECTOR),
    ("PROTECT in transport mode", {"mode": Mode.TRANSPORT}, Reason.SELECTOR),
    ("optional PROTECT of this SA", {"optional": True, **ENDS}, None),
    ("optional PROTECT of another", {"optional": True, "reqid": 99, **ENDS}, Reason.SELECTOR),
    ("DISCARD behind the wide one", {"action": Action.DISCARD, "priority": 1 << 20}, None),
]


@pytest.mark.parametrize("without_policies", [False, True])
@pytest.mark.parametrize("selectors", [(), (INBOUND_SELECTOR,)], ids=["no selectors", "selectors"])
@pytest.mark.parametrize(("narrow", "expected"), [row[1:] for row in FIRST], ids=[row[0] for row in FIRST])
def test_the_first_policy_decides(
    narrow: dict[str, Any] | None,
    expected: Reason | None,
    selectors: tuple[TrafficSelector, ...],
    without_policies: bool,
) -> None:
    pair = Pair()
    pair.far.delete_sa(pair.expected)
    pair.far.add_sa(sa(Direction.IN, selectors=selectors, **ENDS), without_policies=without_policies)
    if narrow is not None:
        pair.far.add_policy(policy(Direction.IN, selector=NARROW, **narrow))
    for _ in range(2):  # the second time the decision is remembered
        assert pair.open(pair.seal(inner())[0]) == (expected or inner())
    pair.far.flush_policies()
    assert pair.open(pair.seal(inner())[0]) == (inner() if without_policies else Reason.SELECTOR)


def test_selectors_of_the_sa_hold_under_any_policy() -> None:
    pair = Pair()
    pair.far.delete_sa(pair.expected)
    other = TrafficSelector(source="10.1.9.0/24", destination="10.2.0.0/16")
    pair.far.add_sa(sa(Direction.IN, selectors=(other,), **ENDS), without_policies=True)
    assert pair.open(pair.seal(inner())[0]) is Reason.SELECTOR


def test_transport_mode_needs_a_policy_too() -> None:
    """XFRM takes such packets; here an SA says so when it is added."""
    pair = Pair(mode=Mode.TRANSPORT)
    packet = ip_packet(*OUTER[4], udp())
    assert isinstance(pair.open(pair.seal(packet)[0]), bytes)
    pair.far.flush_policies()
    assert pair.open(pair.seal(packet)[0]) is Reason.SELECTOR


# -- in the clear


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, Reason.CLEARTEXT),
        ({"optional": True}, None),
        ({"action": Action.DISCARD}, Reason.CLEARTEXT),
        ({"action": Action.BYPASS}, None),
    ],
    ids=str,
)
def test_cleartext_that_a_policy_covers(
    engine: EspEngine, changes: dict[str, Any], expected: Reason | None
) -> None:
    covered = ip_packet("10.2.0.1", "10.1.0.1", udp())
    assert engine.check_clear(covered) is None
    engine.add_policy(policy(Direction.IN, **changes))
    assert drop_reason(engine.check_clear(covered)) is expected
    assert engine.check_clear(memoryview(ip_packet("10.3.0.1", "10.1.0.1", udp()))) is None
    assert drop_reason(engine.check_clear(b"rubbish")) is Reason.MALFORMED
    assert engine.counters().get(Reason.CLEARTEXT, 0) == (expected is not None)


# -- endpoints of this host


@pytest.mark.parametrize("wildcard", [False, True])
def test_what_an_sa_brings_for_an_endpoint_is_dropped(wildcard: bool) -> None:
    pair = Pair()
    ike = inner(payload=udp(bytes(4) + b"IKE", destination_port=4500))
    tcp = inner(payload=udp(bytes(20), destination_port=4500), protocol=6)
    assert pair.open(pair.seal(ike)[0]) == ike
    asked: list[str] = []

    def is_local(address: object) -> bool:
        asked.append(str(address))
        return str(address) == "10.2.0.1"

    pair.far.protect_endpoints([(ip_address("0.0.0.0" if wildcard else "10.2.0.1"), 4500)], is_local)
    for _ in range(3):
        assert pair.open(pair.seal(ike)[0]) is Reason.ENDPOINT
    assert asked == ["10.2.0.1"] * wildcard
    for packet in (
        tcp,
        inner(payload=udp(destination_port=4501)),
        ip_packet("10.1.0.1", "10.2.0.9", udp(destination_port=4500)),
    ):
        assert pair.open(pair.seal(packet)[0]) == packet
    pair.far.protect_endpoints([])
    assert pair.open(pair.seal(ike)[0]) == ike


# -- sealing with a given SA


def test_two_clients_behind_one_nat() -> None:
    """Transport mode, one address, one selector: the SA that brought the question takes the answer."""
    server = EspEngine(timer=False)
    selector = TrafficSelector(source="192.0.2.1", destination="192.0.2.2")
    server.add_policy(policy(Direction.OUT, mode=Mode.TRANSPORT, selector=selector))
    names = [
        server.add_sa(
            sa(Direction.OUT, mode=Mode.TRANSPORT, spi=SPI + number, encryption_key=bytes([number]) * 20)
        )
        for number in range(2)
    ]
    answer = ip_packet("192.0.2.1", "192.0.2.2", udp())
    for name in names:
        sealed, destination = only(server.seal_with(name, answer))
        assert int.from_bytes(sealed[:4]) == name.spi
        assert isinstance(destination, Destination)
    assert int.from_bytes(only(server.seal(answer))[0][:4]) == SPI + 1
    assert server.get_policy(policy(Direction.OUT, mode=Mode.TRANSPORT, selector=selector)).last_used


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"action": Action.DISCARD}, Reason.DISCARD),
        ({"action": Action.BYPASS}, Reason.BYPASS),
        ({"reqid": 99}, Reason.SELECTOR),
        (None, Reason.NO_POLICY),
    ],
    ids=str,
)
def test_policies_decide_whatever_sa_is_named(
    engine: EspEngine, changes: dict[str, Any] | None, expected: Reason
) -> None:
    name = engine.add_sa(sa(Direction.OUT))
    if changes is not None:
        engine.add_policy(policy(Direction.OUT, **changes))
    assert engine.seal_with(name, inner()) == Dropped(expected)
    assert engine.seal_with(name, b"rubbish") == Dropped(Reason.MALFORMED)
    assert engine.counters() == {expected: 1, Reason.MALFORMED: 1}
    assert engine.get_sa(name).packets == 0
    with pytest.raises(NatCompatError, match="there is no SA"):
        engine.seal_with(sa(Direction.OUT, spi=0x999).sa_id, inner())


def test_an_sa_without_policies_seals_what_it_is_told_to(engine: EspEngine) -> None:
    selector = TrafficSelector(source="10.1.0.0/16", destination="10.2.0.0/16")
    name = engine.add_sa(sa(Direction.OUT, selectors=(selector,)), without_policies=True)
    only(engine.seal_with(name, inner()))
    assert engine.seal_with(name, ip_packet("10.9.0.1", "10.2.0.1", udp())) == Dropped(Reason.SELECTOR)


# -- ESP without UDP, and dummy packets


def test_esp_without_udp_where_the_owner_carries_it() -> None:
    with EspEngine(timer=False, raw_esp=True) as near, EspEngine(timer=False, raw_esp=True) as far:
        near.add_sa(sa(Direction.OUT, encapsulation=None))
        near.add_policy(policy(Direction.OUT))
        far.add_sa(sa(Direction.IN, encapsulation=None, **ENDS))
        far.add_policy(policy(Direction.IN, selector=INBOUND_SELECTOR, **ENDS))
        with far.events() as events:
            for source in ("192.0.2.1", "198.51.100.1"):
                sealed, destination = only(near.seal(inner()))
                assert (tuple(destination), destination.local_port) == (("192.0.2.2", 0), 0)
                assert isinstance(far.open(sealed, (source, 0)), Opened)
            assert not events.read(), "no NAT passes ESP without UDP, so no peer is behind one"


def test_dummy_packets_are_sent_and_count_as_authentic() -> None:
    sent: list[tuple[bytes, Destination]] = []
    pair = Pair()
    with EspEngine(timer=False, transmit=sent.extend) as near:
        name = near.add_sa(sa(Direction.OUT, encryption_key=bytes(20)))
        pair.far.add_sa(sa(Direction.IN, spi=0x999, encryption_key=bytes(20), **ENDS))
        near.send_dummy(name)
        ((_, destination),) = sent
        assert destination == ("192.0.2.2", 4500)
        assert near.get_sa(name).last_sent is not None
        assert near.get_sa(name).last_received is None
        near.delete_sa(name)
        name = near.add_sa(sa(Direction.OUT, spi=0x999, encryption_key=bytes(20)))
        near.send_dummy(name)
        expected = sa(Direction.IN, spi=0x999, **ENDS).sa_id
        assert pair.far.get_sa(expected).last_received is None
        assert pair.open(sent[1][0]) is Reason.DUMMY
        assert pair.far.get_sa(expected).last_received is not None
    with pytest.raises(NatCompatError, match="nothing to send dummy packets with"):
        pair.near.send_dummy(pair.sent)


def test_policies_are_made_for_one_direction() -> None:
    """An OUT policy says nothing about inbound packets."""
    pair = Pair()
    pair.far.add_policy(Policy(direction=Direction.OUT, selector=INBOUND_SELECTOR, action=Action.DISCARD))
    assert pair.open(pair.seal(inner())[0]) == inner()
