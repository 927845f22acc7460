"""Policies and selectors of the ESP engine: which SA or verdict a packet gets."""

from __future__ import annotations

from typing import Any

import pytest

from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.results import Destination, Dropped, Reason
from natcompat.ipsec import (
    Acquire,
    Action,
    Direction,
    Mode,
    TrafficSelector,
)
from tests.support.esp import (
    INBOUND_SELECTOR,
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


def test_what_policies_do(engine: EspEngine) -> None:
    networks: dict[str, Any] = {"source": "10.0.0.0/8", "destination": "0.0.0.0/0"}
    assert drop_reason(engine.seal(inner())) is Reason.NO_POLICY
    engine.add_policy(policy(Direction.OUT, selector=TrafficSelector(**networks), action=Action.DISCARD))
    assert drop_reason(engine.seal(inner())) is Reason.DISCARD
    engine.add_policy(
        policy(Direction.OUT, selector=TrafficSelector(**networks, protocol=17), action=Action.BYPASS)
    )
    assert drop_reason(engine.seal(inner())) is Reason.BYPASS
    engine.add_policy(policy(Direction.OUT))
    assert drop_reason(engine.seal(inner())) is Reason.ACQUIRE
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
    assert drop_reason(engine.seal(inner())) is Reason.BYPASS
    engine.delete_policy(policy(Direction.OUT, selector=wide, action=Action.DISCARD))
    engine.add_policy(policy(Direction.OUT, selector=wide, action=Action.DISCARD, priority=1))
    assert drop_reason(engine.seal(inner())) is Reason.DISCARD
    engine.flush_policies()
    assert drop_reason(engine.seal(inner())) is Reason.NO_POLICY


def test_of_equal_policies_the_first(engine: EspEngine) -> None:
    for source, destination, action in (
        ("10.1.0.0/16", "0.0.0.0/0", Action.BYPASS),
        ("0.0.0.0/0", "10.2.0.0/16", Action.DISCARD),
    ):
        selector = TrafficSelector(source=source, destination=destination)
        engine.add_policy(policy(Direction.OUT, selector=selector, action=action, priority=5))
    assert drop_reason(engine.seal(inner())) is Reason.BYPASS


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
    assert drop_reason(engine.seal(inner())) is Reason.ACQUIRE


def test_the_newest_sa_is_used_and_the_older_one_when_it_goes(engine: EspEngine) -> None:
    engine.add_policy(policy(Direction.OUT))
    names = [engine.add_sa(sa(Direction.OUT, spi=0x1000 + number)) for number in range(3)]
    for used in (2, 1, 0):
        sealed, _ = only(engine.seal(inner()))
        assert int.from_bytes(sealed[:4]) == 0x1000 + used
        engine.delete_sa(names[used])
    assert drop_reason(engine.seal(inner())) is Reason.ACQUIRE


def test_optional_policies_let_pass_while_there_is_no_sa(engine: EspEngine) -> None:
    engine.add_policy(policy(Direction.OUT, optional=True))
    with engine.events() as events:
        assert drop_reason(engine.seal(inner())) is Reason.BYPASS
        assert isinstance(events.read()[0], Acquire)
    engine.add_sa(sa(Direction.OUT))
    assert drop_reason(engine.seal(inner())) is None


# -- inbound: the inner packet must be what the SA is for


def test_selectors_of_the_sa_or_the_policies() -> None:
    pair = Pair()
    other = ip_packet("10.1.0.1", "10.2.0.1", udp(destination_port=54))
    assert pair.open(pair.seal(inner())[0]) == inner()
    far = pair.far
    far.delete_policy(policy(Direction.IN, selector=INBOUND_SELECTOR))
    assert pair.open(pair.seal(inner())[0]) is Reason.SELECTOR
    far.delete_sa(pair.expected)
    selectors = [
        TrafficSelector(source="10.1.0.0/16", destination="10.9.0.0/16"),
        TrafficSelector(source="10.1.0.0/16", destination="10.2.0.0/16", protocol=17, destination_port=53),
    ]
    far.add_sa(sa(Direction.IN, source="192.0.2.1", destination="192.0.2.2", selectors=selectors))
    assert pair.open(pair.seal(inner())[0]) is Reason.SELECTOR, "no policy covers it"
    far.delete_sa(pair.expected)
    far.add_sa(
        sa(Direction.IN, source="192.0.2.1", destination="192.0.2.2", selectors=selectors),
        without_policies=True,
    )
    assert pair.open(pair.seal(inner())[0]) == inner()
    assert pair.open(pair.seal(inner())[0]) == inner(), "remembered"
    assert pair.open(pair.seal(other)[0]) is Reason.SELECTOR


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
            **{"source": "192.0.2.1", "destination": "192.0.2.2", **changes, "selector": INBOUND_SELECTOR},
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
                selectors=[INBOUND_SELECTOR],
            ),
            without_policies=True,
        )
    for number in (1, 2):
        with EspEngine(timer=False) as near:
            near.add_sa(sa(Direction.OUT, encryption_key=bytes([number]) * 20), sequence=10 * number)
            near.add_policy(policy(Direction.OUT))
            sealed, _ = only(near.seal(inner()))
        assert drop_reason(engine.open(sealed, (f"192.0.2.{3 - number}", 4500))) is Reason.INTEGRITY
        assert drop_reason(engine.open(sealed, ("nowhere", 4500))) is (
            Reason.INTEGRITY if number == 2 else None
        )
        if number == 2:
            assert drop_reason(engine.open(sealed, (f"::ffff:192.0.2.{number}", 4500, 0, 0))) is None
    engine.delete_sa(sa(Direction.IN, destination="203.0.113.1").sa_id)
    assert [str(each.sa_id.destination) for each in engine.list_sas()] == ["203.0.113.2"]
    assert engine.open(SPI.to_bytes(4) + b"\0\0\1\0" + bytes(60), ("192.0.2.1", 1)) == Dropped(
        Reason.INTEGRITY
    )
