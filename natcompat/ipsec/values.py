"""The values that selectors, policies and SAs have in common, and their checks."""

from __future__ import annotations

import enum
from dataclasses import dataclass, fields
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, TypeAlias

IPAddress: TypeAlias = IPv4Address | IPv6Address

IPNetwork: TypeAlias = IPv4Network | IPv6Network


def describe(self: Any) -> str:
    """The ``repr()`` of a value, also of one that is half made when a debugger or traceback prints it."""
    shown = (f"{each.name}={getattr(self, each.name, '?')!r}" for each in fields(self) if each.repr)
    return f"{type(self).__name__}({', '.join(shown)})"


class Direction(enum.Enum):
    """The direction of the packets of an SA or a policy."""

    IN = "in"
    OUT = "out"


class Mode(enum.Enum):
    """The mode of ESP (RFC 4301, 3.2)."""

    TUNNEL = "tunnel"
    TRANSPORT = "transport"


class Action(enum.Enum):
    """The action of a policy (RFC 4301, 4.4.1)."""

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
