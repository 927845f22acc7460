"""Policies as hash sets of masked header fields, in the order in which they decide. No I/O.

A selector is one key or a few in the set of its shape (prefix lengths, port masks), as in the engine's
policy database: a look-up is one hash for each shape, however many policies there are. Policies that decide
alike and follow each other by priority share a level; a packet goes through the levels in order.
"""

from __future__ import annotations

import errno
from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable
from itertools import count, product
from math import prod
from typing import Final, NamedTuple

from natcompat.errors import NatCompatError
from natcompat.ipsec import Action, IPNetwork, Policy, TrafficSelector
from natcompat.ipsec.policies import default_priority
from natcompat.ipsec.selectors import ANY_PORT, AddressRange, PortRange

ICMP_PROTOCOLS: Final = frozenset({1, 58})
MOBILITY: Final = 135
MOST_KEYS: Final = 4096
"""Keys of one selector."""


class Shape(NamedTuple):
    """The bits of a packet that the selectors of one set compare."""

    source_length: int
    """Bits of the prefix; 0: the address is not looked at."""
    destination_length: int
    protocol: bool
    layout: int = 0
    """1, 58, 135: the fields in place of ports are those of this protocol."""
    source_mask: int = 0
    """Of the source port (ICMP: type); 0: it is not looked at."""
    destination_mask: int = 0

    @property
    def has_ports(self) -> bool:
        """Whether a later fragment lacks what this shape looks at."""
        return bool(self.source_mask or self.destination_mask)


def keys_of(selector: TrafficSelector) -> list[tuple[Shape, bytes]]:
    """Return shapes and keys that together are exactly `selector`. Fields are padded to four bytes.

    EOPNOTSUPP: its ranges would take more than `MOST_KEYS`.
    """
    protocol = selector.protocol
    layout = protocol if protocol in ICMP_PROTOCOLS or protocol == MOBILITY else 0
    bits = 8 if layout else 16
    choices = (
        _networks(selector.source, selector.source_range),
        _networks(selector.destination, selector.destination_range),
        _port_prefixes(selector.source_ports, bits),
        _port_prefixes(selector.destination_ports, bits),
    )
    if prod(len(choice) for choice in choices) > MOST_KEYS:
        raise NatCompatError(
            errno.EOPNOTSUPP,
            f"the ranges of {selector} cannot be guarded: they take more than {MOST_KEYS} keys",
            "Use networks and port ranges that begin and end at powers of two",
        )
    keys = []
    for source, destination, (source_port, source_mask), (port, mask) in product(*choices):
        shape = Shape(source.prefixlen, destination.prefixlen, bool(protocol), layout, source_mask, mask)
        keys.append((shape, _key(shape, source, destination, protocol, source_port, port)))
    return keys


def _networks(network: IPNetwork, addresses: AddressRange | None) -> list[IPNetwork]:
    return [network] if addresses is None else addresses.networks()


def _port_prefixes(ports: PortRange, bits: int) -> list[tuple[int, int]]:
    """Return values and masks that together are `ports`, of fields with `bits`; mask 0: every packet."""
    if ports == ANY_PORT:
        return [(0, 0)]
    first, end = ports.first, min(ports.last, (1 << bits) - 1) + 1
    prefixes = []
    while first < end:
        size = min(first & -first or 1 << bits, 1 << (end - first).bit_length() - 1)
        prefixes.append((first, (1 << bits) - size))
        first += size
    return prefixes


def without_ports(shape: Shape, key: bytes) -> tuple[Shape, bytes]:
    """Return what a later fragment shows of `key`: addresses and protocol."""
    length = 4 * ((shape.source_mask > 0) + (shape.destination_mask > 0))
    return shape._replace(layout=0, source_mask=0, destination_mask=0), key[: len(key) - length]


def _key(
    shape: Shape,
    source: IPNetwork,
    destination: IPNetwork,
    protocol: int,
    source_port: int,
    destination_port: int,
) -> bytes:
    parts = []
    if shape.source_length:
        parts.append(source.network_address.packed)
    if shape.destination_length:
        parts.append(destination.network_address.packed)
    if shape.protocol:
        parts.append(bytes((protocol, 0, 0, 0)))
    size = 1 if shape.layout else 2
    for mask, port in ((shape.source_mask, source_port), (shape.destination_mask, destination_port)):
        if mask:
            parts.append(port.to_bytes(size).ljust(4, b"\0"))
    return b"".join(parts)


class Level:
    """Policies that decide alike, none of which another policy comes between."""

    def __init__(self, number: int, *, blocks: bool) -> None:
        self.number: int = number
        self.blocks: bool = blocks
        self.size: int = 0
        """How many policies are in."""
        self.sets: dict[Shape, Counter[bytes]] = {}
        self.fragments: dict[Shape, Counter[bytes]] = {}
        """Keys without ports of policies that block by port: later fragments of their packets are blocked."""


class _Entry(NamedTuple):
    rank: tuple[int, int]
    blocks: bool
    keys: tuple[tuple[Shape, bytes], ...]
    network: IPNetwork
    """Of the remote end."""


class Change(NamedTuple):
    """A key that a set gains or loses."""

    level: int
    shape: Shape
    fragments: bool
    key: bytes
    added: bool


class SelectorSets:
    """The policies of one direction and one IP version. Not thread-safe."""

    def __init__(self, version: int, *, outbound: bool) -> None:
        self.version: int = version
        self.outbound: bool = outbound
        self.levels: list[Level] = []
        self.prefilter_length: int = 0
        """Bits of the remote address by which most packets are let pass at once; 0: there is no such set."""
        self.prefilter: Counter[bytes] = Counter()
        self.restructured: bool = False
        """Levels, shapes or the prefilter are others than when this was last set to False."""
        self.changes: list[Change] = []
        """What has changed in the sets since then, in order."""
        self.prefilter_changes: list[tuple[bytes, bool]] = []
        self._entries: list[_Entry] = []
        self._ranks: list[tuple[int, int]] = []
        self._entry_levels: list[Level] = []
        self._by_selector: dict[TrafficSelector, _Entry] = {}
        self._insertions = count()
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._entries)

    def settle(self) -> None:
        """Forget changes: they have been applied."""
        self.restructured = False
        self.changes.clear()
        self.prefilter_changes.clear()

    def add(self, policy: Policy, insertion: int | None = None) -> None:
        """Put `policy` in, whose selector is not in yet. `insertion`: what `remove` returned, to undo it."""
        selector = policy.selector
        priority = default_priority(selector) if policy.priority is None else policy.priority
        network = selector.destination if self.outbound else selector.source
        blocks = policy.action is not Action.BYPASS and not policy.optional
        entry = _Entry(
            (priority, next(self._insertions) if insertion is None else insertion),
            blocks,
            tuple(keys_of(selector)),
            network,
        )
        self._by_selector[selector] = entry
        index = bisect_left(self._ranks, entry.rank)
        level = self._neighbour(index, blocks=blocks)
        self._ranks.insert(index, entry.rank)
        self._entries.insert(index, entry)
        if level is None or (blocks and network.prefixlen < self.prefilter_length):
            self._rebuild()
            return
        self._entry_levels.insert(index, level)
        self._enter(level, entry)

    def remove(self, policy: Policy) -> int:
        """Take the policy with the selector of `policy` out; return its number in the order of insertion."""
        entry = self._by_selector.pop(policy.selector)
        index = bisect_left(self._ranks, entry.rank)
        del self._ranks[index], self._entries[index]
        level = self._entry_levels.pop(index)
        if level.size == 1:
            self._rebuild()
            return entry.rank[1]
        level.size -= 1
        for sets, shape, key, fragments in self._places(level, entry):
            sets[shape][key] -= 1
            if not sets[shape][key]:
                del sets[shape][key]
                self.changes.append(Change(level.number, shape, fragments, key, added=False))
        if entry.blocks and self.prefilter_length:
            key = self._prefilter_key(entry)
            self.prefilter[key] -= 1
            if not self.prefilter[key]:
                del self.prefilter[key]
                self.prefilter_changes.append((key, False))
        return entry.rank[1]

    def _neighbour(self, index: int, *, blocks: bool) -> Level | None:
        """Return the level that an entry at `index` can join; None: it needs one of its own."""
        for neighbour in (index - 1, index):
            if 0 <= neighbour < len(self._entries) and self._entries[neighbour].blocks is blocks:
                return self._entry_levels[neighbour]
        return None

    def _enter(self, level: Level, entry: _Entry) -> None:
        level.size += 1
        for sets, shape, key, fragments in self._places(level, entry):
            if shape not in sets:
                sets[shape] = Counter()
                self.restructured = True
            sets[shape][key] += 1
            if sets[shape][key] == 1:
                self.changes.append(Change(level.number, shape, fragments, key, added=True))
        if entry.blocks and self.prefilter_length:
            key = self._prefilter_key(entry)
            self.prefilter[key] += 1
            if self.prefilter[key] == 1:
                self.prefilter_changes.append((key, True))

    @staticmethod
    def _places(
        level: Level, entry: _Entry
    ) -> Iterable[tuple[dict[Shape, Counter[bytes]], Shape, bytes, bool]]:
        for shape, key in entry.keys:
            yield level.sets, shape, key, False
            if level.blocks and shape.has_ports:
                yield level.fragments, *without_ports(shape, key), True

    def _prefilter_key(self, entry: _Entry) -> bytes:
        return entry.network.supernet(new_prefix=self.prefilter_length).network_address.packed

    def _rebuild(self) -> None:
        """Make levels and prefilter anew."""
        self.restructured = True
        self.levels = []
        self.prefilter = Counter()
        self._entry_levels = []
        lengths = [entry.network.prefixlen for entry in self._entries if entry.blocks]
        self.prefilter_length = min(lengths, default=0)
        for entry in self._entries:
            if not self.levels or self.levels[-1].blocks is not entry.blocks:
                self.levels.append(Level(next(self._numbers), blocks=entry.blocks))
            self._entry_levels.append(self.levels[-1])
            self._enter(self.levels[-1], entry)
