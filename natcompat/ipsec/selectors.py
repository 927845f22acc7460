"""`TrafficSelector`: which packets a policy or an SA is for (RFC 4301, 4.4.1.1)."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address, ip_network, summarize_address_range
from typing import Final

from natcompat.errors import NatCompatError
from natcompat.ipsec.values import (
    IPAddress,
    IPNetwork,
    check_address,
    check_network,
    check_range,
    describe,
)

PROTOCOLS_WITH_PORTS = frozenset({6, 17, 33, 132, 136, 1, 58, 135})
"""TCP, UDP, DCCP, SCTP, UDP-Lite; ICMP, ICMPv6 and MH, where type and code stand in (RFC 4301, 4.4.1.1)."""


@dataclass(frozen=True, slots=True)
class PortRange:
    """Ports from `first` to `last`, both included, as integers from 0 to 65535."""

    first: int
    last: int

    def __post_init__(self) -> None:
        check_range("first", self.first, 0, 65535)
        check_range("last", self.last, 0, 65535)
        if self.first > self.last:
            raise ValueError(f"first: {self.first} comes after last, {self.last}")

    @property
    def mask(self) -> int | None:
        """The mask under which the ports of this range, and no others, equal `first`; None: there is none."""
        size = self.last - self.first + 1
        return 0x10000 - size if size & (size - 1) == 0 and self.first % size == 0 else None

    def __contains__(self, port: int) -> bool:
        return self.first <= port <= self.last

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"


ANY_PORT: Final = PortRange(0, 65535)
"""Every port, and also packets in which the ports cannot be seen."""


@dataclass(frozen=True, slots=True, init=False)
class AddressRange:
    """Addresses of one family from `first` to `last`, both included (IKEv2: RFC 7296, 3.13.1)."""

    first: IPAddress
    last: IPAddress

    def __init__(self, first: IPAddress | str, last: IPAddress | str) -> None:
        lower, upper = check_address("first", first), check_address("last", last)
        if lower.version != upper.version:
            raise ValueError("first, last: a range has one address family")
        if int(lower) > int(upper):
            raise ValueError(f"first: {lower} comes after last, {upper}")
        object.__setattr__(self, "first", lower)
        object.__setattr__(self, "last", upper)

    def __contains__(self, address: IPAddress) -> bool:
        return address.version == self.first.version and int(self.first) <= int(address) <= int(self.last)

    def __str__(self) -> str:
        return f"{self.first}-{self.last}"

    def networks(self) -> list[IPNetwork]:
        """Return the networks that together are this range, as few as possible."""
        return list(summarize_address_range(self.first, self.last))

    def covering_network(self) -> IPNetwork:
        """Return the smallest network that contains this range."""
        differing = (int(self.first) ^ int(self.last)).bit_length()
        return ip_network((self.first, self.first.max_prefixlen - differing), strict=False)


@dataclass(frozen=True, slots=True, kw_only=True, init=False)
class TrafficSelector:
    """The packets that a policy or an SA is for (RFC 4301, 4.4.1.1), by addresses and ports as sent.

    `source` and `destination` take a network, an address, or a range ("10.0.0.5-10.0.0.9", `AddressRange`);
    `source_port` and `destination_port` take a port, or a range ("5000-5999", `PortRange`). `protocol` 0 and
    port 0 stand for any; `PortRange(0, 0)` is port 0 alone. For ICMP the source port is the message type and
    the destination port the code.

    A range is kept beside the smallest network that covers it: `source` alone is wider than a selector with
    a `source_range`. Whoever has no ranges refuses such a selector (`has_ranges`) and never widens it.
    """

    source: IPNetwork
    destination: IPNetwork
    protocol: int = 0
    source_port: int = 0
    """The one port; 0: any, or the range in `source_ports`."""
    destination_port: int = 0
    source_range: AddressRange | None = None
    """The exact addresses where they are no network; None: all of `source`."""
    destination_range: AddressRange | None = None
    source_ports: PortRange = field(default=ANY_PORT)
    """The ports in any case: one, a range, or 0 to 65535."""
    destination_ports: PortRange = field(default=ANY_PORT)

    def __init__(
        self,
        *,
        source: IPNetwork | IPAddress | AddressRange | str,
        destination: IPNetwork | IPAddress | AddressRange | str,
        protocol: int = 0,
        source_port: int | PortRange | str = 0,
        destination_port: int | PortRange | str = 0,
        source_range: AddressRange | None = None,
        destination_range: AddressRange | None = None,
        source_ports: PortRange = ANY_PORT,
        destination_ports: PortRange = ANY_PORT,
    ) -> None:
        """The last four are for `dataclasses.replace`, which hands over every field."""
        put = object.__setattr__
        for name, addresses, kept in (
            ("source", source, source_range),
            ("destination", destination, destination_range),
        ):
            network, exact = _addresses(name, addresses)
            if kept is not None and exact is None:
                if kept.covering_network() != network:
                    raise ValueError(f"{name}: {network} is not the network of the range {kept}")
                exact = kept
            put(self, name, network)
            put(self, f"{name}_range", exact)
        put(self, "protocol", check_range("protocol", protocol, 0, 255))
        for name, ports, kept_ports in (
            ("source_port", source_port, source_ports),
            ("destination_port", destination_port, destination_ports),
        ):
            exact_ports = _ports(name, ports)
            if kept_ports.first != kept_ports.last and exact_ports == ANY_PORT:
                exact_ports = kept_ports
            put(self, f"{name}s", exact_ports)
            put(self, name, exact_ports.first if exact_ports.first == exact_ports.last else 0)
        if self.source.version != self.destination.version:
            raise ValueError("source, destination: a selector has one address family")
        limited = self.source_ports != ANY_PORT or self.destination_ports != ANY_PORT
        if limited and protocol not in PROTOCOLS_WITH_PORTS:
            raise ValueError(f"protocol: {protocol} has no ports")

    def __repr__(self) -> str:
        return describe(self)

    def __str__(self) -> str:
        ends = (
            (self.source_range or self.source, self.source_ports),
            (self.destination_range or self.destination, self.destination_ports),
        )
        words = [
            f"{addresses}{'' if ports == ANY_PORT else f' port {_words(ports)}'}" for addresses, ports in ends
        ]
        protocol = f", protocol {self.protocol}" if self.protocol else ""
        return " to ".join(words) + protocol

    @property
    def has_ranges(self) -> bool:
        """Whether addresses are no network, or ports neither one nor all."""
        return (
            self.source_range is not None
            or self.destination_range is not None
            or (not self.source_port and self.source_ports != ANY_PORT)
            or (not self.destination_port and self.destination_ports != ANY_PORT)
        )

    def matches(
        self,
        source: IPAddress,
        destination: IPAddress,
        protocol: int,
        source_port: int = 0,
        destination_port: int = 0,
    ) -> bool:
        """Tell whether a packet with these fields is meant. For ICMP the ports are type and code."""
        return (
            source in (self.source_range or self.source)
            and destination in (self.destination_range or self.destination)
            and self.protocol in (0, protocol)
            and source_port in self.source_ports
            and destination_port in self.destination_ports
        )


def refuse_ranges(
    selectors: Iterable[TrafficSelector], implementation: str, *, port_masks: bool = False
) -> None:
    """Raise `natcompat.NatCompatError` (EOPNOTSUPP) if one of `selectors` has ranges: none is ever widened.

    `implementation` is named in the error: "XFRM", "PF_KEY of FreeBSD". `port_masks`: it knows masks of
    ports, so that a range of a power of two that is aligned to its size is no range to it.
    """
    for selector in selectors:
        if selector.has_ranges and not (port_masks and _masks_say(selector)):
            ports = "ports under a mask" if port_masks else "single ports"
            raise NatCompatError(
                errno.EOPNOTSUPP,
                f"{implementation} knows networks and {ports}, and this selector has ranges: {selector}",
                "Split it into networks (AddressRange.networks()) and ports, or use the backend userspace",
            )


def _masks_say(selector: TrafficSelector) -> bool:
    return (
        selector.source_range is None
        and selector.destination_range is None
        and selector.source_ports.mask is not None
        and selector.destination_ports.mask is not None
    )


def _addresses(
    name: str, value: IPNetwork | IPAddress | AddressRange | str
) -> tuple[IPNetwork, AddressRange | None]:
    """Return the network, and the range where the addresses are less than that."""
    if isinstance(value, str) and "-" in value:
        first, _, last = value.partition("-")
        try:
            value = AddressRange(ip_address(first.strip()), ip_address(last.strip()))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if not isinstance(value, AddressRange):
        return check_network(name, value), None
    network = value.covering_network()
    whole = network.network_address == value.first and network.broadcast_address == value.last
    return network, None if whole else value


def _ports(name: str, value: int | PortRange | str) -> PortRange:
    if isinstance(value, str):
        first, dash, last = value.partition("-")
        try:
            value = PortRange(int(first), int(last)) if dash else int(first)
        except ValueError as error:
            raise ValueError(f"{name}: {value!r} is no port and no range of ports ({error})") from None
    if isinstance(value, PortRange):
        return value
    port = check_range(name, value, 0, 65535)
    return PortRange(port, port) if port else ANY_PORT


def _words(ports: PortRange) -> str:
    return str(ports.first) if ports.first == ports.last else str(ports)
