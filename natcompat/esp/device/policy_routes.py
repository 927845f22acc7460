"""Which destinations policies want in the packet device, and which past it. No I/O.

Routes know a destination only, and take the longest prefix; policies know more, and take the first by
priority. So what routes cannot tell apart as the policies do goes into the device: ESP knows, and drops it
if need be. Nothing that a policy protects or discards ever goes past.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from natcompat.ipsec import Action, Direction, IPAddress, IPNetwork, Policy
from natcompat.ipsec.policies import default_priority


class PolicyRoutes:
    """What outbound policies want of routes.

    A change costs as much with thousands of them as with one, as long as few of them are for `BYPASS`.
    """

    def __init__(self, policies: Iterable[Policy] = ()) -> None:
        self._closed: dict[IPNetwork, dict[IPNetwork, list[Policy]]] = {}
        """Those that protect or discard, by destination and source."""
        self._bypassing: dict[IPNetwork, dict[Policy, int]] = {}
        """Those that bypass, by destination, and how many of the others do not let them."""
        for each in policies:
            self.add(each)

    def destinations(self) -> set[IPNetwork]:
        """Return the destinations of which something is said."""
        return {*self._closed, *self._bypassing}

    def add(self, policy: Policy) -> set[IPNetwork]:
        """Take `policy` in; return the destinations for which `sources` may be others now."""
        if policy.direction is not Direction.OUT:
            return set()
        destination = policy.selector.destination
        if policy.action is Action.BYPASS:
            self._bypassing.setdefault(destination, {})[policy] = sum(
                _hinders(each, policy)
                for network in covering(destination)
                for found in self._closed.get(network, {}).values()
                for each in found
            )
            return {destination}
        self._closed.setdefault(destination, {}).setdefault(policy.selector.source, []).append(policy)
        return {destination, *self._count(policy, 1)}

    def remove(self, policy: Policy) -> set[IPNetwork]:
        """Undo `add` of an equal one, and return the same."""
        if policy.direction is not Direction.OUT:
            return set()
        destination, source = policy.selector.destination, policy.selector.source
        if policy.action is Action.BYPASS:
            del self._bypassing[destination][policy]
            if not self._bypassing[destination]:
                del self._bypassing[destination]
            return {destination}
        sources = self._closed[destination]
        sources[source].remove(policy)
        if not sources[source]:
            del sources[source]
        if not sources:
            del self._closed[destination]
        return {destination, *self._count(policy, -1)}

    def _count(self, closed: Policy, change: int) -> Iterator[IPNetwork]:
        """Count `closed` where it hinders a bypass; yield the destinations of these."""
        for destination, policies in self._bypassing.items():
            if _contains(closed.selector.destination, destination):
                for each in policies:
                    if _hinders(closed, each):
                        policies[each] += change
                        yield destination

    def sources(self, destination: IPNetwork) -> frozenset[IPNetwork] | None:
        """Return whose packets go into the device; none: they go past it. None: nothing is said."""
        if destination in self._closed:
            return frozenset(self._closed[destination])
        passing = self._bypassing.get(destination, {})
        simple = (each for each, hindered in passing.items() if not hindered and _is_simple(each))
        return frozenset() if any(simple) else None

    def peers(self) -> set[IPAddress]:
        """Return the outer addresses to which policies send."""
        policies = (each for sources in self._closed.values() for found in sources.values() for each in found)
        return {each.destination for each in policies if each.destination is not None}


def covering(network: IPNetwork) -> Iterator[IPNetwork]:
    """Yield `network`, and every network that contains it."""
    for length in range(network.prefixlen, -1, -1):
        yield network.supernet(new_prefix=length)


def _is_simple(bypass: Policy) -> bool:
    """Tell whether the destination alone decides, among the packets of the sources that it is for."""
    selector = bypass.selector
    return not (selector.protocol or selector.source_port or selector.destination_port)


def _hinders(closed: Policy, bypass: Policy) -> bool:
    """Tell whether `closed`, which is for the destination of `bypass`, wants some of the packets there.

    It does if it comes first by its priority, or has sources that `bypass` is not for. One for a part of the
    destination only is not asked: it has a route that is more specific, too.
    """
    mine = bypass.selector.source
    return not _contains(mine, closed.selector.source) or _priority(bypass) >= _priority(closed)


def _contains(wide: IPNetwork, narrow: IPNetwork) -> bool:
    return narrow.network_address in wide and narrow.prefixlen >= wide.prefixlen


def _priority(policy: Policy) -> int:
    return default_priority(policy.selector) if policy.priority is None else policy.priority
