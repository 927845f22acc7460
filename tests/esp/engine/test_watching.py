"""Failures of authentication, silent peers, and the memory of flows."""

from __future__ import annotations

import time

import pytest

from natcompat.esp.engine.association import Inbound
from natcompat.esp.engine.data_path import Admission
from natcompat.esp.engine.flows import FlowMemory
from natcompat.esp.engine.packet import Flow
from natcompat.esp.engine.portable import PortableDataPath
from natcompat.esp.engine.results import Reason
from natcompat.esp.engine.watching import INTERVAL, SERIES
from natcompat.ipsec import Direction, IntegrityFailure, PeerSilent
from tests.support.esp import Pair, inner, ip_packet, only, policy, sa, udp

BOTH_PATHS = pytest.mark.usefixtures("datapath")


@BOTH_PATHS
def test_the_first_failure_of_a_series_is_reported() -> None:
    pair = Pair()
    bad = pair.seal(inner())[0][:-1] + b"\0"
    now = time.monotonic()
    with pair.far.events() as events:
        for elapsed, packets, expected in (
            (INTERVAL, 3, 3),
            (2 * INTERVAL, 2, None),
            (3 * INTERVAL, 0, None),
            (4 * INTERVAL + SERIES, 1, 6),
        ):
            for _ in range(packets):
                assert pair.open(bad) is Reason.INTEGRITY
            pair.far.tick(now + elapsed + 1)
            found = events.read()
            if expected is None:
                assert not found
                continue
            (event,) = found
            assert isinstance(event, IntegrityFailure)
            assert (event.sa_id, event.count) == (pair.expected, expected)
            assert (str(event.address), event.port) == ("192.0.2.1", 4500)


@BOTH_PATHS
def test_a_peer_that_does_not_answer() -> None:
    pair = Pair()
    near = pair.near
    near._silence = 30.0
    near.add_sa(sa(Direction.IN))
    near.add_policy(policy(Direction.IN))
    answers = Pair()
    answers.near.delete_sa(answers.sent)
    now = time.monotonic()
    with near.events() as events:
        near.tick(now + 100)
        assert not events.read(), "nobody sends, so nobody is silent"
        pair.seal(inner())
        near.tick(now + 110)
        near.tick(now + 120)
        assert not events.read()
        near.tick(now + 145)
        (event,) = events.read()
        assert isinstance(event, PeerSilent)
        assert event.sa_id == pair.sent
        assert event.seconds == pytest.approx(35, abs=1)
        near.tick(now + 200)
        assert not events.read(), "once"
        answers.near.add_sa(sa(Direction.OUT, source="192.0.2.2", destination="192.0.2.1"))
        selector = policy(Direction.IN).selector
        answers.near.flush_policies()
        answers.near.add_policy(
            policy(Direction.OUT, selector=selector, source="192.0.2.2", destination="192.0.2.1")
        )
        answer = only(answers.near.seal(ip_packet("10.2.0.1", "10.1.0.1", udp())))[0]
        near.open(answer, ("192.0.2.2", 4500))
        near.tick(now + 210)
        assert not near._unanswered


# -- the memory of flows


def test_a_full_share_evicts_what_came_last() -> None:
    memory: FlowMemory[int, str] = FlowMemory(most=100, share=10)
    for flow in range(10):
        memory.learn("scanner", flow, "old")
    memory.learn("quiet", 1000, "theirs")
    for flow in range(100, 105):
        memory.learn("scanner", flow, "new")
    assert set(memory.decisions) == {*range(9), 104, 1000}


def test_a_share_begins_anew_when_it_has_evicted_as_many_as_it_holds() -> None:
    """Or flows that are over would keep their places for ever."""
    memory: FlowMemory[int, str] = FlowMemory(most=100, share=10)
    for flow in range(10 + 10):
        memory.learn("peer", flow, "")
    assert set(memory.decisions) == {19}


def test_the_largest_share_makes_room_for_others() -> None:
    memory: FlowMemory[int, str] = FlowMemory(most=30, share=25)
    for flow in range(25):
        memory.learn("large", flow, "")
    for flow in range(100, 110):
        memory.learn("small", flow, "")
    assert len(memory.decisions) == 30
    assert {*range(100, 110)} <= set(memory.decisions)


def test_a_flow_that_is_learnt_again_takes_no_room() -> None:
    memory: FlowMemory[int, str] = FlowMemory(most=5, share=5)
    for round_ in range(20):
        memory.learn("peer", round_ % 5, str(round_))
    assert memory.decisions == {flow: str(15 + flow) for flow in range(5)}


@BOTH_PATHS
def test_the_flows_of_one_peer_do_not_cost_another_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """The databases are not asked again for a flow that was there first."""
    pair = Pair()
    quiet = inner(payload=udp(b"quiet", source_port=7))
    assert pair.open(pair.seal(quiet)[0]) == quiet
    path, asked = pair.far.path, []
    assert isinstance(path, PortableDataPath)
    original = path._admission

    def admission(association: Inbound, flow: Flow) -> Admission:
        asked.append(flow)
        return original(association, flow)

    monkeypatch.setattr(path, "_admission", admission)
    for port in range(100, 130):
        packet = inner(payload=udp(source_port=port))
        assert pair.open(pair.seal(packet)[0]) == packet
    before = len(asked)
    assert pair.open(pair.seal(quiet)[0]) == quiet
    assert len(asked) == before == 30
