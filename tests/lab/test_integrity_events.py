"""Packets that fail authentication become events, once for each series, from the counters of the kernel."""

from __future__ import annotations

import dataclasses
import select
import time

import pytest

from natcompat.ipsec import IntegrityFailure, Key
from natcompat.kernel.xfrm import integrity
from tests.lab.connection import connect, key
from tests.lab.making import next_event
from tests.lab.topology import Network

pytestmark = pytest.mark.kernel_esp


def test_another_key(network: Network, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first of a series is told with the SA, the rest of it is not; the next series is."""
    with (
        connect(network, network.initiator, 1) as connection,
        network.responder.events() as events,
    ):
        for name, host, sa in connection.associations():
            if name == "initiator out":
                sa = dataclasses.replace(sa, encryption_key=Key(key(99)))
            connection.ids[name] = host.ipsec.add_sa(sa)
        connection.add_policies()
        inbound = connection.ids["responder in"]
        assert network.initiator.ping("10.2.0.1", "-W", "1", count=2) == 0
        event = next_event(events, IntegrityFailure)
        assert (event.sa_id, event.reqid, event.count) == (inbound, 1, 2)
        network.initiator.ping("10.2.0.1", "-W", "1", count=1)
        first = time.monotonic()
        while time.monotonic() < first + integrity.INTERVAL + 1:
            select.select([events], [], [], 1)
            assert not [event for event in events.read() if isinstance(event, IntegrityFailure)]
        assert network.responder.ipsec.get_sa(inbound).integrity_drops == 3
        monkeypatch.setattr(integrity, "SERIES", 0.5)
        network.initiator.ping("10.2.0.1", "-W", "1", count=1)
        assert next_event(events, IntegrityFailure).count == 4


def test_idle_watches_do_not_look_at_sas(network: Network) -> None:
    """Without a failure no SA is looked at, however often the timer comes."""
    looked: list[bool] = []

    def dump() -> list[bytes]:
        looked.append(True)
        return []

    watch = integrity.IntegrityWatch(dump, interval=0.05)
    try:
        assert watch.works
        for _ in range(5):
            assert select.select([watch], [], [], 5)[0]
            assert watch.read() == []
        assert not looked
    finally:
        watch.close()
