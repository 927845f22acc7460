"""Traffic selectors of IKEv2 (ranges) as selectors of policies: exact, or refused. Never wider."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network, summarize_address_range
from typing import Final, Self

from natcompat.ipsec import (
    AddressRange,
    Direction,
    IPAddress,
    IPNetwork,
    PortRange,
    TrafficSelector,
)

LARGEST_SPLIT: Final = 256
"""Policies that one pair of traffic selectors may become."""

_TS_IPV4_ADDR_RANGE, _TS_IPV6_ADDR_RANGE = 7, 8
_LENGTH: Final = {_TS_IPV4_ADDR_RANGE: 16, _TS_IPV6_ADDR_RANGE: 40}
_ALL_PORTS: Final = (0, 65535)
_WITH_TYPES: Final = frozenset({1, 58})
"""ICMP and ICMPv6: the first byte of a port is the type, the second the code (RFC 7296, 3.13.1)."""
_MOBILITY: Final = 135
"""Mobility header: the first byte of a port is the type, the second is 0."""


@dataclass(frozen=True, slots=True)
class IkeSelector:
    """One traffic selector of IKEv2: address range, protocol and port range, both ends included.

    Protocol 0 is any. For ICMP and ICMPv6 a port is type * 256 + code (RFC 7296, 3.13.1).
    """

    first_address: IPAddress
    last_address: IPAddress
    protocol: int = 0
    first_port: int = 0
    last_port: int = 65535

    def __post_init__(self) -> None:
        object.__setattr__(self, "first_address", ip_address(self.first_address))
        object.__setattr__(self, "last_address", ip_address(self.last_address))
        if self.first_address.version != self.last_address.version:
            raise ValueError("first_address, last_address: a range has one address family")
        if int(self.first_address) > int(self.last_address):
            raise ValueError(f"first_address: {self.first_address} comes after {self.last_address}")
        if not 0 <= self.protocol <= 255:
            raise ValueError(f"protocol: {self.protocol} is not in 0..255")
        if (self.first_port, self.last_port) == (65535, 0):
            raise ValueError(
                "first_port, last_port: OPAQUE (65535 to 0) has no policy here; narrow it to any port"
            )
        if not 0 <= self.first_port <= self.last_port <= 65535:
            raise ValueError(
                f"first_port, last_port: {self.first_port}..{self.last_port} is no range of ports"
            )

    @classmethod
    def of(
        cls,
        network: str | IPNetwork | IPAddress,
        protocol: int = 0,
        first_port: int = 0,
        last_port: int = 65535,
    ) -> Self:
        """Return the selector of a whole network: ``IkeSelector.of("10.1.0.0/16", 6, 443, 443)``."""
        whole = ip_network(network)
        return cls(whole[0], whole[-1], protocol, first_port, last_port)

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Return the selector of one Traffic Selector substructure, TS Type included (RFC 7296, 3.13.1).

        ValueError: an unknown TS type, a wrong length, a range that is none.
        """
        if len(data) < 4 or _LENGTH.get(data[0]) != len(data) or int.from_bytes(data[2:4]) != len(data):
            raise ValueError(f"a traffic selector of type {data[:1].hex() or 'none'} and {len(data)} bytes")
        middle = 8 + (len(data) - 8) // 2
        return cls(
            ip_address(data[8:middle]),
            ip_address(data[middle:]),
            data[1],
            int.from_bytes(data[4:6]),
            int.from_bytes(data[6:8]),
        )

    def to_bytes(self) -> bytes:
        """Return the Traffic Selector substructure (RFC 7296, 3.13.1): 16 bytes for IPv4, 40 for IPv6."""
        kind = _TS_IPV4_ADDR_RANGE if self.first_address.version == 4 else _TS_IPV6_ADDR_RANGE
        return (
            bytes((kind, self.protocol))
            + _LENGTH[kind].to_bytes(2)
            + self.first_port.to_bytes(2)
            + self.last_port.to_bytes(2)
            + self.first_address.packed
            + self.last_address.packed
        )


def selector_pairs(
    local: Iterable[IkeSelector], remote: Iterable[IkeSelector]
) -> list[tuple[IkeSelector, IkeSelector]]:
    """Return each pair of a TSi/TSr negotiation that packets can match (RFC 7296, 2.9).

    Any local selector goes with any remote one, unless their families or protocols differ.
    """
    return [pair for pair in itertools.product(list(local), list(remote)) if _fits(*pair)]


def policy_selectors(
    local: IkeSelector,
    remote: IkeSelector,
    direction: Direction,
    *,
    ranges: bool = False,
    limit: int = LARGEST_SPLIT,
) -> tuple[TrafficSelector, ...]:
    """Return policy selectors that together match exactly the packets that `local` and `remote` match.

    `ranges` is the IPsec's `features.ranges`. True: one selector, with ranges. False: as many selectors as
    the address ranges have prefixes and the port ranges have blocks of a power of two, which port masks
    can say.

    ValueError: the pair matches no packet, needs more than `limit` selectors, or cannot be said exactly.
    """
    if not _fits(local, remote):
        raise ValueError(f"selectors: {local} and {remote} match no packet together")
    protocol = local.protocol or remote.protocol
    if protocol in _WITH_TYPES or protocol == _MOBILITY:
        ports, swap_ports = _types_and_codes(local, remote, protocol), False
    else:
        ports = ((local.first_port, local.last_port), (remote.first_port, remote.last_port))
        swap_ports = direction is Direction.IN
    near, far = _addresses(local, ranges), _addresses(remote, ranges)
    first, second = (_port_ranges(*each, ranges) for each in ports)
    count = len(near) * len(far) * len(first) * len(second)
    if count > limit:
        raise ValueError(
            f"selectors: {local} and {remote} take {count} policies, more than {limit}; narrow them"
        )
    if direction is Direction.IN:
        near, far = far, near
    if swap_ports:
        first, second = second, first
    return tuple(
        TrafficSelector(
            source=source,
            destination=destination,
            protocol=protocol,
            source_port=source_port,
            destination_port=destination_port,
        )
        for source, destination, source_port, destination_port in itertools.product(near, far, first, second)
    )


def _fits(local: IkeSelector, remote: IkeSelector) -> bool:
    return local.first_address.version == remote.first_address.version and (
        local.protocol == remote.protocol or 0 in (local.protocol, remote.protocol)
    )


def _addresses(selector: IkeSelector, ranges: bool) -> list[IPNetwork | AddressRange]:
    first, last = selector.first_address, selector.last_address
    if isinstance(first, IPv4Address) and isinstance(last, IPv4Address):
        prefixes: list[IPNetwork] = list(summarize_address_range(first, last))
    else:
        assert isinstance(first, IPv6Address)
        assert isinstance(last, IPv6Address)
        prefixes = list(summarize_address_range(first, last))
    if ranges and len(prefixes) > 1:
        return [AddressRange(first, last)]
    return list(prefixes)


def _port_ranges(first: int, last: int, ranges: bool) -> list[PortRange]:
    return [PortRange(first, last)] if ranges else [PortRange(*block) for block in _blocks(first, last)]


def _blocks(first: int, last: int) -> Iterator[tuple[int, int]]:
    """Return the fewest ranges of a power of two, each aligned to its size, that make up a range."""
    while first <= last:
        size = first & -first or 1 << 16
        while first + size - 1 > last:
            size >>= 1
        yield first, first + size - 1
        first += size


def _types_and_codes(
    local: IkeSelector, remote: IkeSelector, protocol: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the ranges of types and of codes; a packet has one of each, whatever its direction."""
    stated = {ports for ports in map(_ports, (local, remote)) if ports != _ALL_PORTS}
    if not stated:
        return _ALL_PORTS, _ALL_PORTS
    if len(stated) > 1:
        raise ValueError("selectors: the two ends state different message types")
    ((first, last),) = stated
    types, codes = (first >> 8, last >> 8), (first & 255, last & 255)
    if protocol == _MOBILITY or codes == (0, 255):
        return types, _ALL_PORTS
    if types[0] != types[1]:
        raise ValueError("selectors: codes of several message types; state one type, or all codes")
    return types, codes


def _ports(selector: IkeSelector) -> tuple[int, int]:
    return selector.first_port, selector.last_port
