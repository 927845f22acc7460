"""`FlowMemory`: decisions about flows, in bounded shares, so that no peer uses up the memory of all."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Final, Generic, TypeVar

MOST_FLOWS: Final = 16384
"""Flows that are remembered at once. For others the databases are asked again."""

LARGEST_SHARE: Final = MOST_FLOWS // 4
"""Flows of one owner."""

_K = TypeVar("_K", bound=Hashable)
_D = TypeVar("_D")


class _Share(Generic[_K]):
    """The flows of one owner, oldest first, and how many had to make room since the share was begun."""

    __slots__ = ("evictions", "flows")

    def __init__(self) -> None:
        self.flows: dict[_K, None] = {}
        self.evictions = 0


class FlowMemory(Generic[_K, _D]):
    """Decisions by flow, each charged to an owner: the SA, or the policy where there is no SA.

    A full share evicts its own newest flow, so whoever opens flow after flow pushes out what came last, and
    the flows from before stay. A share that has been evicting for as long as it is large is begun anew: its
    old flows may be over. Where all shares together are full, the largest one makes room.

    Any thread may learn and read. Two that learn at once may evict one flow more.
    """

    def __init__(self, most: int = 0, share: int = 0) -> None:
        """`most`: flows in all; `share`: of one owner. 0: `MOST_FLOWS`, `LARGEST_SHARE`."""
        self._most = most or MOST_FLOWS
        self._share = share or LARGEST_SHARE
        self.decisions: dict[_K, _D] = {}
        """To be read directly, which costs less for every packet."""
        self._shares: dict[Hashable, _Share[_K]] = {}
        self._largest: _Share[_K] = _Share()

    def learn(self, owner: Hashable, flow: _K, decision: _D) -> None:
        """Remember `decision`, made for `owner`."""
        share = self._shares.get(owner)
        if share is None:
            share = self._shares[owner] = _Share()
        if flow not in self.decisions:
            if len(share.flows) >= self._share:
                self._evict(share)
            elif len(self.decisions) >= self._most:
                self._evict(self._largest)
        share.flows[flow] = None
        self.decisions[flow] = decision
        if len(share.flows) > len(self._largest.flows):
            self._largest = share

    def _evict(self, share: _Share[_K]) -> None:
        share.evictions += 1
        if share.evictions >= self._share:
            share.evictions = 0
            flows, share.flows = share.flows, {}
            for flow in flows:
                self.decisions.pop(flow, None)
            return
        try:
            flow, _ = share.flows.popitem()
        except KeyError:  # another thread was faster
            return
        self.decisions.pop(flow, None)
