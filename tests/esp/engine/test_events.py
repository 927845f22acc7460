"""Acquires, and what a listener of the ESP engine reads."""

from __future__ import annotations

import select
import time
from ipaddress import ip_network
from typing import Any

import pytest

from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.events import LONGEST_QUEUE as MOST_EVENTS
from natcompat.esp.engine.reporting import ACQUIRE_INTERVAL
from natcompat.esp.engine.results import Reason
from natcompat.ipsec import (
    Acquire,
    Direction,
    EventsLost,
    Expire,
    Lifetime,
    Mode,
    TrafficSelector,
)
from tests.support.esp import (
    OUTER,
    drop_reason,
    inner,
    ip_packet,
    policy,
    sa,
    udp,
)

pytestmark = pytest.mark.usefixtures("datapath")


@pytest.mark.parametrize("mode", list(Mode))
def test_acquires(engine: EspEngine, mode: Mode) -> None:
    engine.add_policy(policy(Direction.OUT, mode=mode))
    packet = inner() if mode is Mode.TUNNEL else ip_packet(*OUTER[4], udp())
    assert drop_reason(engine.seal(packet)) is Reason.ACQUIRE, "nobody listens, nobody is told"
    with engine.events() as events:
        results = engine.seal_burst([packet] * 50)
        assert {drop_reason(each) for each in results} == {Reason.ACQUIRE}
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
        assert drop_reason(engine.seal(packet)) is None
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
        assert drop_reason(engine.seal(inner())) is None
        ended = []
        for number in range(MOST_EVENTS + 5):
            arguments: dict[str, Any] = {"lifetime": Lifetime(hard_packets=1), "spi": 0x1000 + number}
            engine.add_sa(sa(Direction.OUT, **arguments))
            assert drop_reason(engine.seal(inner())) is None
            ended.append(Expire(sa_id=sa(Direction.OUT, **arguments).sa_id, reqid=7, hard=True))
        assert select.select([events], [], [], 0)[0]
        assert events.read() == [EventsLost(), *ended, Expire(sa_id=dying, reqid=7, hard=False)]
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
