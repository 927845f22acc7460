"""Rekeying of a CHILD_SA under traffic: make before break, and no packet is lost."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from itertools import count

import pytest

from natcompat import NatCompatError
from natcompat.esp.engine import Dropped, EspEngine, Opened
from natcompat.ike import IkeSelector
from natcompat.ipsec import Mode
from tests.ike.children import FAR, NEAR, PATHS, Negotiated, databases, two_engines
from tests.support.esp import ip_packet, udp

Engines = tuple[EspEngine, EspEngine]


@pytest.fixture(params=PATHS, ids=["Python", "C"])
def engines(request: pytest.FixtureRequest) -> Iterator[Engines]:
    with two_engines(request.param) as both:
        yield both


class Wire:
    """Traffic in both directions, whose packets are `delay` bursts under way."""

    def __init__(self, near: EspEngine, far: EspEngine, delay: int = 3) -> None:
        self._ends = ((near, far, NEAR, "10.1.0.1", "10.2.0.1"), (far, near, FAR, "10.2.0.1", "10.1.0.1"))
        self._under_way: list[list[tuple[EspEngine, bytes, tuple[str, int]]]] = [[] for _ in range(delay)]
        self._numbers = count()
        self.sent, self.received = 0, 0
        self.lost: list[object] = []

    def step(self) -> None:
        """Send a burst in both directions, and deliver the oldest one."""
        burst: list[tuple[EspEngine, bytes, tuple[str, int]]] = []
        for sender, receiver, source, here, there in self._ends:
            for _ in range(5):
                sealed = sender.seal(ip_packet(here, there, udp(str(next(self._numbers)).encode())))
                self.sent += 1
                if isinstance(sealed, Dropped):
                    self.lost.append(sealed)
                else:
                    burst += [(receiver, payload, source) for payload, _ in sealed]
        self._under_way.append(burst)
        self._deliver(self._under_way.pop(0))

    def drain(self) -> None:
        while self._under_way:
            self._deliver(self._under_way.pop(0))

    def _deliver(self, burst: list[tuple[EspEngine, bytes, tuple[str, int]]]) -> None:
        for receiver, payload, source in burst:
            opened = receiver.open(payload, source)
            if isinstance(opened, Opened):
                self.received += 1
            else:
                self.lost.append(opened)


@pytest.mark.parametrize("near_begins", [True, False], ids=["initiator", "responder"])
def test_nothing_is_lost(engines: Engines, near_begins: bool) -> None:
    """IKE's own messages take as long as the packets: each side acts when the other's message arrives."""
    near, far = engines
    wire = Wire(near, far)
    first = Negotiated(1)
    children = [first.install(near, near=True), first.install(far, near=False)]

    def travel() -> None:
        for _ in range(5):
            wire.step()

    travel()
    for number in range(2, 6):
        new = Negotiated(number)
        begins, answers = (0, 1) if near_begins else (1, 0)
        ipsec = (near, far)
        travel()  # CREATE_CHILD_SA, request
        answered = new.install(ipsec[answers], near=answers == 0, initiator=False, rekeys=children[answers])
        assert answered.outbound is None
        travel()  # its response
        begun = new.install(ipsec[begins], near=begins == 0, initiator=True, rekeys=children[begins])
        children[begins].rekeyed_by(begun)
        travel()  # INFORMATIONAL with Delete
        children[answers].rekeyed_by(answered)
        travel()  # its response; what was sent on the old SA before has come
        children[begins].delete()
        children[answers].delete()
        children[begins], children[answers] = begun, answered
        travel()
        assert [len(each.list_sas()) for each in ipsec] == [2, 2]
        assert [len(each.list_policies()) for each in ipsec] == [2, 2]
    wire.drain()
    assert wire.lost == []
    assert wire.received == wire.sent >= 1000
    for child in children:
        child.delete()
    assert databases(near) == databases(far) == ([], [])


def test_the_old_one_goes_on_when_the_new_one_fails(engines: Engines) -> None:
    _, far = engines
    old = Negotiated(1).install(far, near=False)
    new = Negotiated(2).install(far, near=False, rekeys=old)
    # an SA of the name that the new outbound one shall have
    blocker = Negotiated(4, keymat=bytes(range(1, 73)), reqid=11)
    blocker.spis = Negotiated(2).spis[0], blocker.spis[1]
    other = blocker.install(
        far, near=False, selectors=[(IkeSelector.of("10.9.0.0/16"), IkeSelector.of("10.8.0.0/16"))]
    )
    before = databases(far)
    with pytest.raises(NatCompatError) as caught:
        old.rekeyed_by(new)
    assert caught.value.errno == errno.EEXIST
    assert databases(far) == before
    other.delete()
    old.rekeyed_by(new)
    assert not old.policies
    assert len(new.policies) == 2


def test_deleting_a_new_one_leaves_the_policies_of_the_old_one(engines: Engines) -> None:
    near, _ = engines
    old = Negotiated(1).install(near, near=True)
    before = databases(near)
    Negotiated(2).install(near, near=True, rekeys=old).delete()
    assert databases(near) == before


def test_a_child_that_moves_between_both_steps(engines: Engines) -> None:
    near, _ = engines
    old = Negotiated(1).install(near, near=True)
    new = Negotiated(2).install(near, near=True, initiator=False, rekeys=old)
    for child in (old, new):
        child.move(remote=("198.51.100.7", 31234))
    old.rekeyed_by(new)
    assert new.outbound is not None
    assert str(new.outbound.destination) == "198.51.100.7"
    assert {str(policy.destination) for policy in new.policies} == {"198.51.100.7", "192.0.2.1"}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"reqid": 8}, "reqid"),
        ({"mode": Mode.TRANSPORT}, "mode"),
        (
            {"selectors": [(IkeSelector.of("10.1.0.0/16"), IkeSelector.of("10.3.0.0/16"))]},
            "keeps its selectors",
        ),
    ],
)
def test_a_rekey_keeps_reqid_mode_and_selectors(
    engines: Engines, changes: dict[str, object], words: str
) -> None:
    near, _ = engines
    old = Negotiated(1).install(near, near=True)
    before = databases(near)
    with pytest.raises(ValueError, match=words):
        Negotiated(2).install(near, near=True, rekeys=old, **changes)
    assert databases(near) == before


def test_a_child_does_not_replace_itself(engines: Engines) -> None:
    near, _ = engines
    child = Negotiated(1).install(near, near=True)
    with pytest.raises(ValueError, match="itself"):
        child.rekeyed_by(child)
