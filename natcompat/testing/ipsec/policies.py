"""Conformance of policies by the packets on the wire: what each lets pass in the clear, seals or drops.

The same cases hold for every implementation whose policies are for a host. A harness is that host::

    class MyHost:
        ipsec = open_ipsec()
        outer = ("192.0.2.1", "203.0.113.2")  # this host and its peer, to which there is an outbound SA

        def outcome(self, packet: Packet) -> Outcome: ...  # send it, and look at the wire


    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_policies(case: PolicyCase) -> None:
        check(case, MyHost())
"""

from __future__ import annotations

import enum
from typing import Any, Final, NamedTuple, Protocol

from natcompat.ipsec import Action, Direction, IPsec, Policy, TrafficSelector

NEAR: Final = "10.1.0.1"
"""An address of the host under test."""
BEHIND: Final = "10.1.7.7"
"""A host for which it forwards."""
FAR: Final = "10.2.0.1"
TCP, UDP, ICMP = 6, 17, 1


class Outcome(enum.Enum):
    """The fate of a packet."""

    CLEAR = "clear"
    SEALED = "sealed"
    DROPPED = "dropped"


class Packet(NamedTuple):
    """A packet that the host sends, or forwards."""

    protocol: int
    port: int = 0
    """The destination port; for ICMP the type."""
    source: str = NEAR
    """`NEAR`, or `BEHIND` for a packet that is forwarded."""
    destination: str = FAR


class Rule(NamedTuple):
    """An outbound policy of a case."""

    action: Action
    source: str = "10.1.0.0/16"
    destination: str = "10.2.0.0/16"
    protocol: int = 0
    port: int = 0
    priority: int | None = None
    source_port: int = 0


class PolicyCase(NamedTuple):
    """Policies, and what becomes of packets under them."""

    name: str
    rules: tuple[Rule, ...]
    packets: tuple[tuple[Packet, Outcome], ...]

    def __str__(self) -> str:
        return self.name


class PolicyHarness(Protocol):
    """A host with an implementation of IPsec."""

    @property
    def ipsec(self) -> IPsec:
        """The implementation. It has an outbound SA of reqid 1 between the outer addresses."""
        ...

    @property
    def outer(self) -> tuple[str, str]:
        """The outer addresses: of this host and of the peer."""
        ...

    def outcome(self, packet: Packet) -> Outcome:
        """Have `packet` sent or forwarded, and tell what was on the wire."""
        ...


_PROTECT, _BYPASS, _DISCARD = Action.PROTECT, Action.BYPASS, Action.DISCARD
_CLEAR, _SEALED, _DROPPED = Outcome.CLEAR, Outcome.SEALED, Outcome.DROPPED

CASES: Final = (
    PolicyCase(
        "networks",
        (Rule(_PROTECT),),
        (
            (Packet(UDP, 53), _SEALED),
            (Packet(TCP, 80), _SEALED),
            (Packet(ICMP, 8), _SEALED),
            (Packet(UDP, 53, BEHIND), _SEALED),
            (Packet(UDP, 53, destination="10.3.0.1"), _CLEAR),
            (Packet(UDP, 53, BEHIND, "10.3.0.1"), _CLEAR),
        ),
    ),
    PolicyCase(
        "one port",
        (Rule(_PROTECT, protocol=TCP, port=23),),
        (
            (Packet(TCP, 23), _SEALED),
            (Packet(TCP, 80), _CLEAR),
            (Packet(UDP, 23), _CLEAR),
            (Packet(ICMP, 8), _CLEAR),
            (Packet(UDP, 23, BEHIND), _CLEAR),
        ),
    ),
    PolicyCase(
        "a protocol discarded",
        (Rule(_PROTECT), Rule(_DISCARD, protocol=UDP)),
        ((Packet(UDP, 9), _DROPPED), (Packet(UDP, 9, BEHIND), _DROPPED), (Packet(TCP, 9), _SEALED)),
    ),
    PolicyCase(
        "a bypass that comes first by its priority",
        (Rule(_PROTECT, protocol=UDP, port=53, priority=2), Rule(_BYPASS, priority=1)),
        ((Packet(UDP, 53), _CLEAR), (Packet(TCP, 80), _CLEAR)),
    ),
    PolicyCase(
        "a bypass for the rest",
        (Rule(_PROTECT, protocol=UDP, port=53), Rule(_BYPASS)),
        ((Packet(UDP, 53), _SEALED), (Packet(UDP, 54), _CLEAR), (Packet(TCP, 53), _CLEAR)),
    ),
    PolicyCase(
        "the more specific destination first",
        (Rule(_PROTECT), Rule(_BYPASS, destination="10.2.0.0/24"), Rule(_DISCARD, destination="10.2.0.1/32")),
        (
            (Packet(UDP, 9), _DROPPED),
            (Packet(UDP, 9, destination="10.2.0.2"), _CLEAR),
            (Packet(UDP, 9, destination="10.2.1.1"), _SEALED),
        ),
    ),
    PolicyCase(
        "one of two sources",
        (Rule(_PROTECT, source=f"{BEHIND}/32"),),
        ((Packet(UDP, 9, BEHIND), _SEALED), (Packet(UDP, 9), _CLEAR)),
    ),
    PolicyCase(
        "ICMP by type",
        (Rule(_PROTECT, protocol=ICMP, source_port=8),),
        ((Packet(ICMP, 8), _SEALED), (Packet(ICMP, 13), _CLEAR), (Packet(UDP, 8), _CLEAR)),
    ),
)
"""What holds on every implementation."""


def check(case: PolicyCase, harness: PolicyHarness) -> None:
    """Install the policies of `case` in both orders, and assert what becomes of its packets."""
    for rules in (case.rules, case.rules[::-1]):
        policies = [_policy(rule, harness.outer) for rule in rules]
        for policy in policies:
            harness.ipsec.add_policy(policy)
        for packet, expected in case.packets:
            outcome = harness.outcome(packet)
            assert outcome is expected, f"{case}: {packet} is {outcome.value}, not {expected.value}"
        for policy in policies:
            harness.ipsec.delete_policy(policy)
    for packet, _ in case.packets:
        assert harness.outcome(packet) is Outcome.CLEAR, f"{case}: {packet} without a policy"


def _policy(rule: Rule, outer: tuple[str, str]) -> Policy:
    ends: dict[str, Any] = dict(zip(("source", "destination"), outer, strict=True))
    return Policy(
        direction=Direction.OUT,
        selector=TrafficSelector(
            source=rule.source,
            destination=rule.destination,
            protocol=rule.protocol,
            source_port=rule.source_port,
            destination_port=rule.port,
        ),
        action=rule.action,
        priority=rule.priority,
        reqid=1,
        **(ends if rule.action is Action.PROTECT else {}),
    )
