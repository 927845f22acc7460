"""The chains, sets and rules of the guard's table, as messages of nf_tables. No I/O. See `guard`."""

from __future__ import annotations

import socket
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple, TypeAlias

from natcompat.esp.device import nftables as nft
from natcompat.esp.device.selector_sets import MOBILITY, SelectorSets, Shape

BLOCKED: Final = ("output", "input", "forward")
"""Counters of packets that were blocked, by where they were."""
INSIDE: Final = "endpoint-inside"
"""Counter of datagrams for an endpoint's port that came out of the device."""
LOOPED: Final = "looped"
"""Counter of outer packets that a route led into the device."""

_BEFORE_NAT: Final = 99  # NF_IP_PRI_NAT_SRC is 100 (linux/netfilter_ipv4.h)
_AFTER_NAT: Final = 301
_HOOKS: Final = {
    "output": (nft.POST_ROUTING, _BEFORE_NAT),
    "output-nat": (nft.POST_ROUTING, _AFTER_NAT),
    "input": (nft.LOCAL_IN, 0),
    "forward": (nft.FORWARD, 0),
}
_LOOPBACK: Final = 1
"""The index of lo in every network namespace (LOOPBACK_IFINDEX, net/flow.h)."""
_ESP, _UDP, _ICMPV6 = 50, 17, 58
_FRAGMENT: Final = 44
_NEIGHBOUR_DISCOVERY: Final = range(133, 138)
"""ICMPv6 types (RFC 4861, 4)."""
_ADDRESSES: Final = {4: (12, 16, 4), 6: (8, 24, 16)}
"""By IP version: offsets of source and destination, and bytes of an address."""
_FAMILY: Final = {4: bytes([socket.AF_INET]), 6: bytes([socket.AF_INET6])}
ENDPOINT_SETS: Final = {"endpoints4": 8, "endpoints6": 20, "ports4": 2, "ports6": 2}
"""Sets of endpoints (address and port; bound to all addresses: port), and the length of their keys."""

_DROP, _ACCEPT = nft.verdict(nft.DROP), nft.verdict(nft.ACCEPT)

Rule: TypeAlias = tuple[str, tuple[bytes, ...]]
"""A chain and the expressions of a rule in it."""


class Identity(NamedTuple):
    """The marks and names by which the guard recognises packets that may pass."""

    interface: int
    """Index of the device's interface."""
    mark: int
    """Bit of the mark that outer packets have."""
    passed: int
    """Bit that packets have as well which the engine handed back."""
    socket_marks: bool
    """Whether this kernel can look the mark of a packet's socket up (nft_socket)."""


def skeleton(table: str, flags: int, identity: Identity) -> Iterator[nft.Message]:
    """Yield the messages that create the table with everything but the policies."""
    yield nft.new_table(table, flags)
    for counter in (*BLOCKED, INSIDE, LOOPED):
        yield nft.new_counter(table, counter)
    for number, (name, length) in enumerate(ENDPOINT_SETS.items(), 1):
        yield nft.new_set(table, name, number, length)
    for chain in ("device", *(f"block-{place}" for place in BLOCKED)):
        yield nft.new_chain(table, chain)
    for place in BLOCKED:
        for version in (4, 6):
            yield nft.new_chain(table, f"{place}{version}")
    for name, hook in _HOOKS.items():
        yield nft.new_chain(table, name, hook)
    for chain, expressions in _fixed_rules(identity):
        yield nft.new_rule(table, chain, *expressions)


def _fixed_rules(identity: Identity) -> Iterator[Rule]:
    device, loopback = _native(identity.interface), _native(_LOOPBACK)
    from_device = nft.meta(nft.IIF), nft.compare(device)
    to_device = nft.meta(nft.OIF), nft.compare(device)
    marked = nft.masked(_native(identity.mark)), nft.compare(_native(identity.mark))
    sealed = nft.masked(_native(identity.mark | identity.passed)), nft.compare(_native(identity.mark))
    yield "device", (nft.meta(nft.MARK), *marked, nft.count(LOOPED), _DROP)
    yield "device", (_ACCEPT,)
    for chain in ("output", "output-nat"):
        yield chain, (*to_device, nft.verdict(nft.GOTO, "device"))
    for version in (4, 6):
        for expressions in _to_endpoint(version):
            yield "input", (*from_device, *expressions, nft.count(INSIDE), _DROP)
    for chain in ("input", "forward"):
        yield chain, (*from_device, _ACCEPT)
    for chain in _HOOKS:
        for version in (4, 6):
            decision = nft.verdict(nft.GOTO, f"{chain.removesuffix('-nat')}{version}")
            yield chain, (nft.meta(nft.NFPROTO), nft.compare(_FAMILY[version]), decision)
    yield "block-output", (nft.meta(nft.OIF), nft.compare(loopback), _ACCEPT)
    yield "block-output", (nft.meta(nft.MARK), *sealed, _ACCEPT)
    yield "block-input", (nft.meta(nft.IIF), nft.compare(loopback), _ACCEPT)
    yield "block-input", (nft.meta(nft.L4PROTO), nft.compare(bytes([_ESP])), _ACCEPT)
    if identity.socket_marks:
        yield "block-input", (nft.socket_mark(), *marked, _ACCEPT)
    else:
        for version in (4, 6):
            for expressions in _to_endpoint(version):
                yield "block-input", (*expressions, _ACCEPT)
    for place in ("output", "input"):
        for kind in _NEIGHBOUR_DISCOVERY:
            protocol = nft.meta(nft.L4PROTO), nft.compare(bytes([_ICMPV6]))
            icmp_type = nft.payload(nft.TRANSPORT, 0, 1), nft.compare(bytes([kind]))
            yield f"block-{place}", (*protocol, *icmp_type, _ACCEPT)
    for place in BLOCKED:
        yield f"block-{place}", (nft.count(place), _DROP)


def _to_endpoint(version: int) -> Iterator[tuple[bytes, ...]]:
    """Yield what tells datagrams for an endpoint's port, bound to one address or to all."""
    _, offset, length = _ADDRESSES[version]
    udp = (
        nft.meta(nft.NFPROTO),
        nft.compare(_FAMILY[version]),
        nft.meta(nft.L4PROTO),
        nft.compare(bytes([_UDP])),
    )
    address = nft.payload(nft.NETWORK, offset, length)
    port = nft.payload(nft.TRANSPORT, 2, 2, length // 4)
    yield *udp, address, port, nft.lookup(f"endpoints{version}")
    yield *udp, nft.payload(nft.TRANSPORT, 2, 2), nft.lookup(f"ports{version}")


def let_device_pass(table: str, index: int) -> list[nft.Message]:
    """Return the messages by which another table of this kind lets the interface `index` pass."""
    rules = [(chain, nft.OIF) for chain in ("output", "output-nat")]
    rules += [(chain, nft.IIF) for chain in ("input", "forward")]
    return [
        nft.first_rule(table, chain, nft.meta(key), nft.compare(_native(index)), _ACCEPT)
        for chain, key in rules
    ]


class Program:
    """The rules and sets of policies, as they are to be."""

    def __init__(self, table: str) -> None:
        self._table = table
        self.sets: list[str] = []
        """Names of the sets that `replace` makes."""

    def replace(self, sides: dict[str, SelectorSets], before: list[str]) -> list[nft.Message]:
        """Return the messages that put `sides` in the place of what is there; `before`: its sets."""
        table = self._table
        messages = [nft.flush_rules(table, f"{place}{version}") for place in BLOCKED for version in (4, 6)]
        messages += [nft.delete_set(table, name) for name in before]
        for name, side in sides.items():
            if any(level.blocks for level in side.levels):
                messages += self._make_sets(name, side)
                for place in ("output",) if side.outbound else ("input", "forward"):
                    chain = f"{place}{side.version}"
                    block = nft.verdict(nft.GOTO, f"block-{place}")
                    messages += [nft.new_rule(table, chain, *rule) for rule in _rules(name, side, block)]
        return messages

    def _make_sets(self, name: str, side: SelectorSets) -> Iterator[nft.Message]:
        if side.prefilter_length:
            length = _ADDRESSES[side.version][2]
            yield from self._make_set(f"{name}-prefilter", length, list(side.prefilter))
        for level in side.levels:
            for fragments, sets in ((False, level.sets), (True, level.fragments)):
                for shape, keys in sets.items():
                    _, length = _load(shape, side.version)
                    set_name = name_of_set(name, level.number, shape, fragments=fragments)
                    yield from self._make_set(set_name, length, [_element(key, side.version) for key in keys])

    def _make_set(self, name: str, length: int, keys: list[bytes]) -> Iterator[nft.Message]:
        self.sets.append(name)
        yield nft.new_set(self._table, name, len(ENDPOINT_SETS) + len(self.sets), length)
        yield from nft.set_elements(self._table, name, keys)


def _rules(name: str, side: SelectorSets, block: bytes) -> Iterator[tuple[bytes, ...]]:
    source, destination, length = _ADDRESSES[side.version]
    if side.prefilter_length:
        remote = nft.payload(nft.NETWORK, destination if side.outbound else source, length)
        mask = _prefix_mask(side.prefilter_length, length)
        yield remote, *mask, nft.lookup(f"{name}-prefilter", inverted=True), _ACCEPT
    for level in side.levels:
        then = block if level.blocks else _ACCEPT
        for fragments, sets in ((False, level.sets), (True, level.fragments)):
            for shape in sets:
                loads, _ = _load(shape, side.version)
                condition = _later_fragment(side.version) if fragments else ()
                set_name = name_of_set(name, level.number, shape, fragments=fragments)
                yield *condition, *loads, nft.lookup(set_name), then


def changes_of(table: str, sides: dict[str, SelectorSets]) -> list[nft.Message]:
    """Return the messages that bring the sets up to date where no rule has to change."""
    grouped: dict[tuple[str, bool], list[bytes]] = {}
    for name, side in sides.items():
        for key, added in side.prefilter_changes:
            grouped.setdefault((f"{name}-prefilter", added), []).append(key)
        for change in side.changes:
            set_name = name_of_set(name, change.level, change.shape, fragments=change.fragments)
            grouped.setdefault((set_name, change.added), []).append(_element(change.key, side.version))
    return [
        message
        for (set_name, added), keys in grouped.items()
        for message in nft.set_elements(table, set_name, keys, delete=not added)
    ]


def name_of_set(side: str, level: int, shape: Shape, *, fragments: bool) -> str:
    """Return the name of the set of one level and shape."""
    ports = f"{shape.source_mask:x}-{shape.destination_mask:x}"
    kind = "f" if fragments else "s"
    lengths = f"{shape.source_length}-{shape.destination_length}"
    return f"{side}-{level}{kind}{lengths}-{int(shape.protocol)}-{shape.layout}-{ports}"


def _element(key: bytes, version: int) -> bytes:
    """Return `key` as the element of a set; a key of no fields is what `_load` loads then."""
    return key or _FAMILY[version].ljust(4, b"\0")


def _load(shape: Shape, version: int) -> tuple[list[bytes], int]:
    """Return the expressions that load the key of `shape`, and its length."""
    source, destination, length = _ADDRESSES[version]
    loads: list[bytes] = []
    register = 0
    for offset, prefix in ((source, shape.source_length), (destination, shape.destination_length)):
        if prefix:
            loads += [
                nft.payload(nft.NETWORK, offset, length, register),
                *_prefix_mask(prefix, length, register),
            ]
            register += length // 4
    if shape.protocol:
        loads.append(nft.meta(nft.L4PROTO, register))
        register += 1
    size = 1 if shape.layout else 2
    start = 2 if shape.layout == MOBILITY else 0
    for offset, port_mask in ((start, shape.source_mask), (start + size, shape.destination_mask)):
        if port_mask:
            loads.append(nft.payload(nft.TRANSPORT, offset, size, register))
            if port_mask != (1 << 8 * size) - 1:
                loads.append(nft.masked(port_mask.to_bytes(size), register))
            register += 1
    if not loads:  # every packet of this IP version
        return [nft.meta(nft.NFPROTO)], 4
    return loads, 4 * register


def _later_fragment(version: int) -> tuple[bytes, ...]:
    """Return the expressions that end the rule unless the packet is a fragment but the first."""
    if version == 4:
        offset, bits = nft.payload(nft.NETWORK, 6, 2), b"\x1f\xff"
    else:
        offset, bits = nft.extension_header(_FRAGMENT, 2, 2), b"\xff\xf8"
    return offset, nft.masked(bits), nft.compare(bytes(2), operator=nft.NOT_EQUAL)


def _prefix_mask(prefix: int, length: int, register: int = 0) -> list[bytes]:
    bits = 8 * length
    mask = ((1 << prefix) - 1 << bits - prefix).to_bytes(length)
    return [] if prefix == bits else [nft.masked(mask, register)]


def _native(value: int) -> bytes:
    return struct.pack("=I", value)
