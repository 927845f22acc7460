"""Changes of a peer's NAT mapping: reported, and followed where the owner wants it."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest

from natcompat.esp.engine.databases import AssociationDatabase
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.events import LONGEST_QUEUE as MOST_EVENTS
from natcompat.esp.engine.results import Dropped, Opened, Reason
from natcompat.ipsec import (
    Direction,
    EventsLost,
    MappingChange,
    ProtectionRestored,
    TrafficSelector,
    UDPEncapsulation,
)
from tests.esp.datapath.twins import forger
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


# -- who moves, and where to


class TwoPeers:
    """A follower with two peers, A and B, that have the same reqid; both forge as they like."""

    def __init__(self) -> None:
        self.engine = EspEngine(timer=False, follow_mapping=True)
        self.forge, self.numbers = {}, {}
        for number, (peer, network) in enumerate(
            {"192.0.2.2": "10.2.0.0/16", "192.0.2.3": "10.3.0.0/16"}.items()
        ):
            inbound = sa(Direction.IN, source=peer, spi=SPI + number, encryption_key=bytes([number]) * 20)
            self.engine.add_sa(inbound)
            self.engine.add_sa(
                sa(Direction.OUT, destination=peer, spi=SPI + number, encryption_key=bytes([9 - number]) * 20)
            )
            for direction in Direction:
                ends, networks = ("192.0.2.1", peer), ("10.1.0.0/16", network)
                if direction is Direction.IN:
                    ends, networks = ends[::-1], networks[::-1]
                self.engine.add_policy(
                    policy(
                        direction,
                        selector=TrafficSelector(source=networks[0], destination=networks[1]),
                        source=ends[0],
                        destination=ends[1],
                    )
                )
            self.forge[peer], self.numbers[peer] = forger(inbound), 0

    def arrive(self, peer: str, source: tuple[str, int]) -> Opened | Dropped:
        """Let `peer`, which has its own keys, send with the outer source `source`."""
        self.numbers[peer] += 1
        network = "10.2.0.1" if peer == "192.0.2.2" else "10.3.0.1"
        packet = ip_packet(network, "10.1.0.1", udp())
        return self.engine.open(self.forge[peer](self.numbers[peer], packet + bytes((0, 4))), source)

    def destination(self, network: str) -> tuple[str, int]:
        """Return where packets for `network` go."""
        host, port = only(self.engine.seal(ip_packet("10.1.0.1", network, udp())))[1]
        return host, port


def test_a_peer_moves_only_itself() -> None:
    """Also where it claims the address of another one first."""
    peers = TwoPeers()
    for source in (("192.0.2.3", 4500), ("198.51.100.66", 6666), ("192.0.2.3", 4500)):
        assert isinstance(peers.arrive("192.0.2.2", source), Opened)
        assert peers.destination("10.2.0.1") == source
        assert peers.destination("10.3.0.1") == ("192.0.2.3", 4500)
    assert isinstance(peers.arrive("192.0.2.3", ("192.0.2.3", 1024)), Opened)
    assert peers.destination("10.3.0.1") == ("192.0.2.3", 1024)
    assert peers.destination("10.2.0.1") == ("192.0.2.3", 4500)


@pytest.mark.parametrize(
    "source",
    [
        ("192.0.2.2", 0),
        ("224.0.0.1", 4500),
        ("255.255.255.255", 4500),
        ("0.0.0.0", 4500),
        ("127.0.0.1", 4500),
        ("::ffff:127.0.0.1", 4500),
        ("192.0.2.1", 4500),
        ("ff02::1", 4500),
        ("::", 1),
    ],
    ids=str,
)
def test_places_where_no_peer_can_be(source: tuple[str, int], caplog: pytest.LogCaptureFixture) -> None:
    """The packet is taken, since it is authentic; nothing moves, and nobody is told."""
    peers = TwoPeers()
    with peers.engine.events() as events:
        for _ in range(5):
            assert isinstance(peers.arrive("192.0.2.2", source), Opened)
        assert not events.read()
        assert peers.destination("10.2.0.1") == ("192.0.2.2", 4500)
        assert isinstance(peers.arrive("192.0.2.2", ("192.0.2.2", 4501)), Opened)
        assert len(events.read()) == 1
    assert sum("is not followed" in message for message in caplog.messages) <= 1


def test_the_newest_mapping_is_told_after_events_were_lost() -> None:
    peers = TwoPeers()
    with peers.engine.events() as events:
        peers.arrive("192.0.2.3", ("192.0.2.3", 7777))
        for number in range(MOST_EVENTS + 1):
            peers.engine._emit(ProtectionRestored(description="as from a busy system", count=number))
        lost, *told = events.read()
        assert lost == EventsLost()
        (moved,) = told
        assert isinstance(moved, MappingChange)
        assert (str(moved.new_address), moved.new_port) == ("192.0.2.3", 7777)


def test_a_noisy_peer_pushes_nothing_out() -> None:
    peers = TwoPeers()
    with peers.engine.events() as events:
        peers.arrive("192.0.2.3", ("192.0.2.3", 7777))
        for number in range(MOST_EVENTS + 50):
            peers.arrive("192.0.2.2", ("192.0.2.2", 5000 + number % 2))
        quiet, noisy = events.read()
        assert isinstance(quiet, MappingChange)
        assert isinstance(noisy, MappingChange)
        assert (quiet.new_port, noisy.new_port) == (7777, 5000 + (MOST_EVENTS + 49) % 2)


def test_a_move_looks_at_no_other_sa(monkeypatch: pytest.MonkeyPatch) -> None:
    """With thousands of SAs as with two: the databases are not walked over, no decision is forgotten."""
    peers = TwoPeers()
    for number in range(2000):
        peers.engine.add_sa(
            sa(
                Direction.OUT,
                destination="192.0.2.9",
                spi=0x10000 + number,
                encryption_key=number.to_bytes(20),
            )
        )
    peers.arrive("192.0.2.2", ("192.0.2.2", 4500))

    def refuse(*_: object) -> None:
        raise AssertionError("a move has nothing to do with the other SAs")

    monkeypatch.setattr(AssociationDatabase, "__iter__", refuse)
    monkeypatch.setattr(type(peers.engine.path), "forget", refuse)
    assert isinstance(peers.arrive("192.0.2.2", ("192.0.2.2", 999)), Opened)
    assert peers.destination("10.2.0.1") == ("192.0.2.2", 999)
    assert peers.engine.counters() == {}
