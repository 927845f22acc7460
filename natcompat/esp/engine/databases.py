"""The security association database and the security policy database (RFC 4301, 4.4).

Look-ups take the same time however many entries there are. The caller holds a lock to change one;
looking up needs none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import TypeAlias, TypeVar

from natcompat.esp.engine.association import Association, Inbound, Link, Outbound, Pair, link_of
from natcompat.esp.engine.packet import Flow, address_of, matches
from natcompat.ipsec import (
    Direction,
    IPAddress,
    Mode,
    Policy,
    SaId,
    SecurityAssociation,
    TrafficSelector,
)
from natcompat.ipsec.policies import default_priority

_K = TypeVar("_K")
_A = TypeVar("_A", bound=Association)


class AssociationDatabase:
    """SAs by SPI, outbound SAs also by their links to policies and by their pairs.

    Each step costs the same however many SAs there are.
    """

    def __init__(self) -> None:
        self.inbound: dict[int, tuple[Inbound, ...]] = {}
        """Almost always one per SPI: this host chose it."""
        self._outbound: dict[int, tuple[Outbound, ...]] = {}
        self._linked: dict[Link, tuple[Outbound, ...]] = {}
        self._paired: dict[Pair, tuple[Outbound, ...]] = {}
        self._local: Counter[IPAddress] = Counter()
        """Outer addresses of this host, by how many SAs have them."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Association]:
        """Yield the SAs that are here now, also while others come and go."""
        for associations in (*self.inbound.values(), *self._outbound.values()):
            yield from associations

    def find(self, sa_id: SaId) -> Association | None:
        """Return the SA with the name `sa_id`, or None."""
        spi = sa_id.spi
        candidates = (*self.inbound.get(spi, ()), *self._outbound.get(spi, ()))
        return next((association for association in candidates if association.sa.sa_id == sa_id), None)

    def add(self, association: Association) -> None:
        """Add `association`, which becomes the newest."""
        self._count += 1
        self._local[local_address(association.sa)] += 1
        if isinstance(association, Inbound):
            _append(self.inbound, association.sa.spi, association)
        elif isinstance(association, Outbound):
            _append(self._outbound, association.sa.spi, association)
            _append(self._linked, association.link, association)
            _append(self._paired, association.pair, association)

    def remove(self, sa_id: SaId) -> Association | None:
        """Remove the SA with the name `sa_id`, and return it; None: there is none."""
        association = self.find(sa_id)
        if association is None:
            return None
        self._count -= 1
        self._forget_address(association.sa)
        if isinstance(association, Inbound):
            _discard(self.inbound, sa_id.spi, association)
        elif isinstance(association, Outbound):
            _discard(self._outbound, sa_id.spi, association)
            _discard(self._linked, association.link, association)
            _discard(self._paired, association.pair, association)
        return association

    def move(self, association: Association, sa: SecurityAssociation) -> None:
        """Give `association` the addresses that the owner says; links and pairs follow them.

        It keeps its turn among the SAs with the same link, unless the link changes.
        """
        link, pair = association.link, association.pair
        self._forget_address(association.sa)
        association.place(sa, link_of(sa))
        association.settle()
        self._local[local_address(sa)] += 1
        if isinstance(association, Outbound):
            if association.link != link:
                _discard(self._linked, link, association)
                _append(self._linked, association.link, association)
            if association.pair != pair:
                _discard(self._paired, pair, association)
                _append(self._paired, association.pair, association)

    def is_local(self, address: IPAddress) -> bool:
        """Tell whether an SA has `address` as its outer address of this host."""
        return address in self._local

    def _forget_address(self, sa: SecurityAssociation) -> None:
        address = local_address(sa)
        self._local[address] -= 1
        if not self._local[address]:
            del self._local[address]

    def answering(self, association: Association) -> tuple[Outbound, ...]:
        """Return the outbound SAs to the peer of an inbound SA, as the owner installed both."""
        return self._paired.get(association.pair, ())

    def outbound_for(self, entry: PolicyEntry, flow: Flow) -> Outbound | None:
        """Return the newest SA of this policy that `flow` may pass: the one that rekeying made last."""
        link = entry.link
        if link[0] is Mode.TRANSPORT:
            link = (*link[:3], address_of(flow.version, flow.destination))
        for association in reversed(self._linked.get(link, ())):
            if allows(association.sa.selectors, flow):
                return association
        return None

    def serves(self, association: Outbound, entry: PolicyEntry, flow: Flow) -> bool:
        """Tell whether `association` is an SA of this policy, and `flow` may pass it."""
        link = entry.link
        if link[0] is Mode.TRANSPORT:
            link = (*link[:3], address_of(flow.version, flow.destination))
        return association.link == link and allows(association.sa.selectors, flow)


def local_address(sa: SecurityAssociation) -> IPAddress:
    """Return the outer address of this host."""
    return sa.source if sa.direction is Direction.OUT else sa.destination


def _append(index: dict[_K, tuple[_A, ...]], key: _K, association: _A) -> None:
    index[key] = (*index.get(key, ()), association)


def _discard(index: dict[_K, tuple[_A, ...]], key: _K, association: _A) -> None:
    rest = tuple(other for other in index[key] if other is not association)
    if rest:
        index[key] = rest
    else:
        del index[key]


def allows(selectors: Iterable[TrafficSelector], flow: Flow) -> bool:
    """Tell whether `flow` may pass an SA with these `selectors`; without any, every flow may."""
    selectors = tuple(selectors)
    return not selectors or any(matches(selector, flow) for selector in selectors)


class PolicyEntry:
    """An installed policy."""

    __slots__ = ("acquired", "added", "has_ranges", "last_used", "link", "meter", "policy", "rank")

    def __init__(self, policy: Policy, number: int, added: float) -> None:
        self.policy: Policy = policy
        self.has_ranges: bool = policy.selector.has_ranges
        self.link: Link = link_of(policy)
        self.added: float = added
        self.last_used: float | None = None
        self.meter: Sequence[float] | None = None
        """`last_used` as the C data path writes it; 0: never."""
        self.acquired: float = float("-inf")
        """When an SA was last asked for, on the monotonic clock."""
        priority = default_priority(policy.selector) if policy.priority is None else policy.priority
        self.rank: tuple[int, int] = (priority, number)

    def when_used(self) -> float | None:
        """Return when a packet last met this policy."""
        if self.meter is None or not self.meter[0]:
            return self.last_used
        return max(self.meter[0], self.last_used or 0.0)


_Shape: TypeAlias = tuple[int, int, int, bool, bool, bool]
"""Version, bits of the addresses that are not looked at, and whether protocol and ports are."""


class PolicyDatabase:
    """Policies by direction and selector.

    Tuple space search: selectors of one shape (prefix lengths, which fields are wildcards) share a
    dictionary, so a look-up costs as many steps as there are shapes, and those are few. Ranges are
    looked up by the network that covers them, and as any port; then each is compared.
    """

    def __init__(self) -> None:
        self._numbers = count()
        self.clear()

    def clear(self) -> None:
        """Remove all policies."""
        self._by_name: dict[tuple[Direction, TrafficSelector], PolicyEntry] = {}
        self._shapes: dict[Direction, dict[_Shape, dict[tuple[int, ...], tuple[PolicyEntry, ...]]]] = {
            direction: {} for direction in Direction
        }

    def __iter__(self) -> Iterator[PolicyEntry]:
        return iter(list(self._by_name.values()))

    def get(self, policy: Policy) -> PolicyEntry | None:
        """Return the entry with the direction and selector of `policy`."""
        return self._by_name.get((policy.direction, policy.selector))

    def add(self, policy: Policy, now: float) -> None:
        """Add `policy`, in the place of one with its direction and selector."""
        entry = PolicyEntry(policy, next(self._numbers), now)
        before = self._by_name.get((policy.direction, policy.selector))
        self._by_name[policy.direction, policy.selector] = entry
        shape = _shape(policy.selector)
        key = _key(policy.selector, shape)
        shapes = self._shapes[policy.direction]
        if shape in shapes:
            others = (other for other in shapes[shape].get(key, ()) if other is not before)
            shapes[shape][key] = tuple(sorted((*others, entry), key=_rank))
        else:  # another thread may be walking over the shapes as they were
            self._shapes[policy.direction] = {**shapes, shape: {key: (entry,)}}

    def remove(self, entry: PolicyEntry) -> None:
        """Remove `entry`, which is one of these."""
        policy = entry.policy
        del self._by_name[policy.direction, policy.selector]
        shape = _shape(policy.selector)
        shapes = self._shapes[policy.direction]
        key = _key(policy.selector, shape)
        rest = tuple(other for other in shapes[shape][key] if other is not entry)
        if rest:
            shapes[shape][key] = rest
        else:
            del shapes[shape][key]
        if not shapes[shape]:
            self._shapes[policy.direction] = {other: shapes[other] for other in shapes if other != shape}

    def has_policies(self, direction: Direction) -> bool:
        """Tell whether there is a policy of this direction."""
        return bool(self._shapes[direction])

    def look_up(self, direction: Direction, flow: Flow) -> PolicyEntry | None:
        """Return the first policy for `flow`, by priority."""
        version, protocol, source, destination, source_port, destination_port = flow
        best: PolicyEntry | None = None
        for shape, entries in self._shapes[direction].items():
            if shape[0] != version:
                continue
            _, source_bits, destination_bits, with_protocol, with_source, with_destination = shape
            candidates = entries.get(
                (
                    source >> source_bits,
                    destination >> destination_bits,
                    protocol if with_protocol else 0,
                    source_port if with_source else 0,
                    destination_port if with_destination else 0,
                )
            )
            for entry in candidates or ():  # by rank; there is more than one only where there are ranges
                if best is not None and best.rank < entry.rank:
                    break
                if not entry.has_ranges or matches(entry.policy.selector, flow):
                    best = entry
                    break
        return best


def _rank(entry: PolicyEntry) -> tuple[int, int]:
    return entry.rank


def _shape(selector: TrafficSelector) -> _Shape:
    source, destination = selector.source, selector.destination
    return (
        source.version,
        source.max_prefixlen - source.prefixlen,
        destination.max_prefixlen - destination.prefixlen,
        bool(selector.protocol),
        bool(selector.source_port),
        bool(selector.destination_port),
    )


def _key(selector: TrafficSelector, shape: _Shape) -> tuple[int, ...]:
    return (
        int(selector.source.network_address) >> shape[1],
        int(selector.destination.network_address) >> shape[2],
        selector.protocol,
        selector.source_port,
        selector.destination_port,
    )
