"""Which destinations policies want in the packet device, and which past it. No I/O.

Routes know a destination only, and take the longest prefix; policies know more, and take the first by
priority. So what routes cannot tell apart as the policies do goes into the device: ESP knows, and drops it
if need be. Nothing that a policy protects or discards ever goes past.
"""

from __future__ import annotations

from collections.abc import Iterable

from natcompat.associations import default_priority
from natcompat.ipsec import Action, Direction, IPNetwork, Policy


def routes_for(policies: Iterable[Policy]) -> tuple[dict[IPNetwork, list[Policy]], set[IPNetwork]]:
    """Return the networks that go into the device, each with its policies, and those that go past it."""
    outbound = [each for each in policies if each.direction is Direction.OUT]
    closed = [each for each in outbound if each.action is not Action.BYPASS]
    caught: dict[IPNetwork, list[Policy]] = {}
    for each in closed:
        caught.setdefault(each.selector.destination, []).append(each)
    thrown = {each.selector.destination for each in outbound if _goes_past(each, closed)}
    return caught, thrown - caught.keys()


def _goes_past(policy: Policy, closed: Iterable[Policy]) -> bool:
    """Tell whether what goes where `policy` says may pass by the device, because of its destination alone.

    Only what no policy of `closed`, which protect or discard, wants: none that overlaps comes first by its
    priority, or has sources that `policy` is not for. One whose destination is more specific has a route
    that is, too.
    """
    mine = policy.selector
    if policy.action is not Action.BYPASS or mine.protocol or mine.source_port or mine.destination_port:
        return False
    for each in closed:
        other = each.selector
        if not _overlap(mine.destination, other.destination):
            continue
        if other.destination.prefixlen > mine.destination.prefixlen:
            continue
        if not _contains(mine.source, other.source) or _priority(policy) >= _priority(each):
            return False
    return True


def _overlap(one: IPNetwork, other: IPNetwork) -> bool:
    return _contains(one, other) or _contains(other, one)


def _contains(wide: IPNetwork, narrow: IPNetwork) -> bool:
    return narrow.network_address in wide and narrow.prefixlen >= wide.prefixlen


def _priority(policy: Policy) -> int:
    return default_priority(policy.selector) if policy.priority is None else policy.priority
