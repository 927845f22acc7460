"""Changes of a peer's NAT mapping: reported, and followed where the owner wants it."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest

from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.results import Opened, Reason
from natcompat.ipsec import (
    Direction,
    MappingChange,
    TrafficSelector,
    UDPEncapsulation,
)
from tests.support.esp import (
    INBOUND_SELECTOR,
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


def test_a_new_mapping_is_reported_and_not_followed() -> None:
    pair = Pair()
    with pair.far.events() as events:
        assert isinstance(pair.far.open(pair.seal(inner())[0], pair.source), Opened)
        assert not events.read()
        old, new = pair.seal(inner())[0], pair.seal(inner())[0]
        replayed_from = ("198.51.100.9", 9)
        assert isinstance(pair.far.open(new, ("::ffff:198.51.100.1", 1024, 0, 0)), Opened)
        assert drop_reason(pair.far.open(new, replayed_from)) is Reason.REPLAYED
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
            policy(Direction.IN, selector=INBOUND_SELECTOR, source="198.51.100.1", destination="192.0.2.2")
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
        far.add_policy(
            policy(Direction.IN, selector=INBOUND_SELECTOR, source="192.0.2.1", destination="192.0.2.2")
        )
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
