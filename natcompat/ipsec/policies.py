"""Security policies in the words of RFC 4301, 4.4.1, and the order among them."""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, TypeAlias

IPAddress: TypeAlias = IPv4Address | IPv6Address

IPNetwork: TypeAlias = IPv4Network | IPv6Network

PRIORITY_BASE = 0x2000
"""Priority of the most specific selector; there is room for others before it and behind it."""


def describe(self: Any) -> str:
    """The ``repr()`` of a value, also of one that is half made when a debugger or traceback prints it."""
    shown = (f"{each.name}={getattr(self, each.name, '?')!r}" for each in fields(self) if each.repr)
    return f"{type(self).__name__}({', '.join(shown)})"


class Direction(enum.Enum):
    """Which way the packets go that an SA or a policy is for."""

    IN = "in"
    OUT = "out"


class Mode(enum.Enum):
    """How ESP wraps a packet (RFC 4301, 3.2)."""

    TUNNEL = "tunnel"
    TRANSPORT = "transport"


class Action(enum.Enum):
    """What a policy does with a packet (RFC 4301, 4.4.1)."""

    PROTECT = "protect"
    BYPASS = "bypass"
    DISCARD = "discard"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mark:
    """A packet mark: only packets with ``packet_mark & mask == value`` are meant."""

    value: int
    mask: int = 0xFFFF_FFFF

    def __post_init__(self) -> None:
        check_range("mark value", self.value, 0, 0xFFFF_FFFF)
        check_range("mark mask", self.mask, 0, 0xFFFF_FFFF)
        if self.value & ~self.mask:
            raise ValueError("mark: the value has bits that the mask does not have, so it never matches")


PROTOCOLS_WITH_PORTS = frozenset({6, 17, 33, 132, 136, 1, 58, 135})
"""TCP, UDP, DCCP, SCTP, UDP-Lite; ICMP, ICMPv6 and MH, where type and code stand in (RFC 4301, 4.4.1.1)."""


@dataclass(frozen=True, slots=True, kw_only=True, init=False)
class TrafficSelector:
    """Which packets are meant (RFC 4301, 4.4.1.1), by the addresses of the packet as it is sent.

    `protocol` 0 and port 0 stand for any. For ICMP the ports are message type and code.
    """

    source: IPNetwork
    destination: IPNetwork
    protocol: int = 0
    source_port: int = 0
    destination_port: int = 0

    __repr__ = describe

    def __init__(
        self,
        *,
        source: IPNetwork | IPAddress | str,
        destination: IPNetwork | IPAddress | str,
        protocol: int = 0,
        source_port: int = 0,
        destination_port: int = 0,
    ) -> None:
        put = object.__setattr__
        put(self, "source", check_network("source", source))
        put(self, "destination", check_network("destination", destination))
        put(self, "protocol", check_range("protocol", protocol, 0, 255))
        put(self, "source_port", check_range("source_port", source_port, 0, 65535))
        put(self, "destination_port", check_range("destination_port", destination_port, 0, 65535))
        if self.source.version != self.destination.version:
            raise ValueError("source, destination: a selector has one address family")
        if (source_port or destination_port) and protocol not in PROTOCOLS_WITH_PORTS:
            raise ValueError(f"protocol: {protocol} has no ports")


@dataclass(frozen=True, slots=True, kw_only=True, init=False)
class Policy:
    """One entry of the security policy database (RFC 4301, 4.4.1), one direction."""

    direction: Direction
    selector: TrafficSelector
    source: IPAddress | None = None
    destination: IPAddress | None = None
    """The tunnel's outer addresses; transport mode and the other actions have none."""
    mode: Mode = Mode.TUNNEL
    reqid: int = 0
    action: Action = Action.PROTECT
    priority: int | None = None
    """The smaller, the earlier; None: the more specific selector first."""
    optional: bool = False
    """Let packets pass in the clear while there is no SA."""
    mark: Mark | None = None
    interface_id: int | None = None

    __repr__ = describe

    def __init__(
        self,
        *,
        direction: Direction,
        selector: TrafficSelector,
        source: IPAddress | str | None = None,
        destination: IPAddress | str | None = None,
        mode: Mode = Mode.TUNNEL,
        reqid: int = 0,
        action: Action = Action.PROTECT,
        priority: int | None = None,
        optional: bool = False,
        mark: Mark | int | None = None,
        interface_id: int | None = None,
    ) -> None:
        put = object.__setattr__
        put(self, "direction", Direction(direction))
        put(self, "selector", selector)
        put(self, "source", None if source is None else check_address("source", source))
        put(self, "destination", None if destination is None else check_address("destination", destination))
        put(self, "mode", Mode(mode))
        put(self, "reqid", check_range("reqid", reqid, 0, 0xFFFF_FFFF))
        put(self, "action", Action(action))
        put(self, "priority", priority)
        put(self, "optional", bool(optional))
        put(self, "mark", Mark(value=mark) if isinstance(mark, int) else mark)
        put(self, "interface_id", interface_id)
        if priority is not None:
            check_range("priority", priority, 0, 0xFFFF_FFFF)
        if interface_id is not None:
            check_range("interface_id", interface_id, 1, 0xFFFF_FFFF)
        tunnel = self.action is Action.PROTECT and self.mode is Mode.TUNNEL
        if tunnel and (self.source is None or self.destination is None):
            raise ValueError("source, destination: a tunnel policy needs both outer addresses")
        if self.source and self.destination and self.source.version != self.destination.version:
            raise ValueError("source, destination: a tunnel has one outer address family")


def default_priority(selector: TrafficSelector) -> int:
    """Return the priority of a policy that has none: the more specific, the smaller."""
    bits = selector.source.prefixlen + selector.destination.prefixlen
    wide = (not selector.protocol) * 4 + (not selector.source_port) * 2 + (not selector.destination_port)
    return PRIORITY_BASE + (256 - bits) * 8 + wide


def check_range(name: str, value: int, smallest: int, largest: int) -> int:
    """Return `value`, an integer in the range; else TypeError or ValueError names the argument."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: an integer is wanted, not {type(value).__name__}")
    if not smallest <= value <= largest:
        raise ValueError(f"{name}: {value} is not in {smallest}..{largest}")
    return value


def check_address(name: str, value: IPAddress | str) -> IPAddress:
    """Return `value` as an IP address; ValueError names the argument."""
    if isinstance(value, (IPv4Address, IPv6Address)):
        return value  # not a copy: SAs are many, and share their addresses
    try:
        return ip_address(value)
    except ValueError:
        raise ValueError(f"{name}: {value!r} is not an IP address") from None


def check_network(name: str, value: IPNetwork | IPAddress | str) -> IPNetwork:
    """Return `value` as an IP network; ValueError names the argument."""
    try:
        return ip_network(value)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
