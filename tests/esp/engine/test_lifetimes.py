"""Lifetimes, deadlines and NAT-keepalives of the ESP engine."""

from __future__ import annotations

import errno
import gc
import select
import time
from queue import Queue

import pytest

from natcompat.errors import NatCompatError
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.results import Destination, Reason
from natcompat.ipsec import (
    Direction,
    Expire,
    Lifetime,
)
from tests.support.esp import (
    OUTER,
    Pair,
    drop_reason,
    inner,
    only,
    policy,
    sa,
)

pytestmark = pytest.mark.usefixtures("datapath")


@pytest.mark.parametrize("unit", ["packets", "bytes"])
def test_lifetimes(unit: str) -> None:
    each = 1 if unit == "packets" else len(inner())
    lifetime = Lifetime(**{f"soft_{unit}": 2 * each, f"hard_{unit}": 4 * each})
    pair = Pair(lifetime=lifetime)
    with pair.near.events() as sending, pair.far.events() as receiving:
        for number in range(1, 7):
            result = pair.near.seal(inner())
            if number > 4:
                assert drop_reason(result) is Reason.ACQUIRE
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
        assert drop_reason(engine.seal(inner())) is None
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
    assert drop_reason(engine.seal(inner())) is None
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
