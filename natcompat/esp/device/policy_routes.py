"""Computes which destinations must be routed into the packet device for the policies. No I/O.

Routes know a destination only, and the longest prefix wins; policies know more, and the first by priority
wins. So traffic that routes cannot tell apart as the policies do goes into the device, where the engine looks
up its policy. No packet that a policy protects or discards ever passes by the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from natcompat.ipsec import Action, Direction, IPAddress, IPNetwork, Policy
from natcompat.ipsec.policies import default_priority


class PolicyRoutes:
    """The routes that outbound policies need.

    A change costs as much with thousands of them as with one, as long as few of them are for `BYPASS`.
    """

    def __init__(self, policies: Iterable[Policy] = ()) -> None:
        self._closed: dict[IPNetwork, dict[IPNetwork, list[Policy]]] = {}
        """Policies that protect or discard, by destination and source."""
        self._bypassing: dict[IPNetwork, dict[Policy, int]] = {}
        """Policies that bypass, by destination, and how many of the other policies hinder each."""
        for policy in policies:
            self.add(policy)

    def destinations(self) -> set[IPNetwork]:
        """Return the destinations of the policies."""
        return {*self._closed, *self._bypassing}

    def add(self, policy: Policy) -> set[IPNetwork]:
        """Add `policy`; return the destinations whose `sources` may have changed."""
        if policy.direction is not Direction.OUT:
            return set()
        destination = policy.selector.destination
        if policy.action is Action.BYPASS:
            self._bypassing.setdefault(destination, {})[policy] = sum(
                _hinders(closed, policy)
                for network in covering(destination)
                for policies in self._closed.get(network, {}).values()
                for closed in policies
            )
            return {destination}
        self._closed.setdefault(destination, {}).setdefault(policy.selector.source, []).append(policy)
        return {destination, *self._count(policy, 1)}

    def remove(self, policy: Policy) -> set[IPNetwork]:
        """Undo `add` of an equal policy; return the same destinations."""
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
        """Count `closed` for each bypass that it hinders; yield the destinations of these bypasses."""
        for destination, policies in self._bypassing.items():
            if _contains(closed.selector.destination, destination):
                for bypass in policies:
                    if _hinders(closed, bypass):
                        policies[bypass] += change
                        yield destination

    def sources(self, destination: IPNetwork) -> frozenset[IPNetwork] | None:
        """Return the networks whose packets go into the device; empty: none do; None: no policy says."""
        if destination in self._closed:
            return frozenset(self._closed[destination])
        passing = self._bypassing.get(destination, {})
        simple = (bypass for bypass, hindering in passing.items() if not hindering and _is_simple(bypass))
        return frozenset() if any(simple) else None

    def peers(self) -> set[IPAddress]:
        """Return the outer addresses to which policies send."""
        closed = (
            policy for sources in self._closed.values() for found in sources.values() for policy in found
        )
        return {policy.destination for policy in closed if policy.destination is not None}


def covering(network: IPNetwork) -> Iterator[IPNetwork]:
    """Yield `network`, and every network that contains it."""
    for length in range(network.prefixlen, -1, -1):
        yield network.supernet(new_prefix=length)


def _is_simple(bypass: Policy) -> bool:
    """Tell whether `bypass` selects by addresses only."""
    selector = bypass.selector
    return not (selector.protocol or selector.source_port or selector.destination_port)


def _hinders(closed: Policy, bypass: Policy) -> bool:
    """Tell whether `closed`, whose destination contains that of `bypass`, applies to some of its packets.

    It does if it has the better priority, or sources that `bypass` has not. A policy for a part of the
    destination only is not asked: its route is more specific, too.
    """
    source = bypass.selector.source
    return not _contains(source, closed.selector.source) or _priority(bypass) >= _priority(closed)


def _contains(wide: IPNetwork, narrow: IPNetwork) -> bool:
    return narrow.network_address in wide and narrow.prefixlen >= wide.prefixlen


def _priority(policy: Policy) -> int:
    return default_priority(policy.selector) if policy.priority is None else policy.priority
