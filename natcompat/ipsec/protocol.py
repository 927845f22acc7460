"""IPsec as an IKE daemon sees it: what goes in, what comes back, and what every implementation offers.

The values that go in are defined in `natcompat.ipsec.associations` and `natcompat.ipsec.transforms` and are
importable from here. `IPsec` is what takes them: the kernel of this machine, or an ESP of
natcompat's own. This module knows neither.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Protocol, Self, TypeAlias

from natcompat.ipsec.associations import (
    LARGEST_REPLAY_WINDOW,
    LARGEST_SPI,
    SMALLEST_SPI,
    Lifetime,
    SaId,
    SecurityAssociation,
    UDPEncapsulation,
)
from natcompat.ipsec.policies import (
    Action,
    Direction,
    IPAddress,
    IPNetwork,
    Mark,
    Mode,
    Policy,
    TrafficSelector,
)
from natcompat.ipsec.transforms import Encr, Integ, Key

__all__ = [
    "LARGEST_REPLAY_WINDOW",
    "LARGEST_SPI",
    "SMALLEST_SPI",
    "Acquire",
    "Action",
    "Direction",
    "Encr",
    "Event",
    "Events",
    "EventsLost",
    "Expire",
    "Features",
    "IPAddress",
    "IPNetwork",
    "IPsec",
    "InstalledSA",
    "Integ",
    "Key",
    "Lifetime",
    "MappingChange",
    "Mark",
    "Mode",
    "Policy",
    "PolicyUsage",
    "SaId",
    "SecurityAssociation",
    "TrafficSelector",
    "UDPEncapsulation",
    "Usage",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """What an SA has done so far."""

    packets: int
    octets: int
    added: float
    """Seconds since the epoch."""
    first_used: float | None
    last_used: float | None
    """Seconds since the epoch; None: never, or (`last_used` only) not known to this kernel."""
    replay_drops: int | None
    """Packets dropped because their sequence number had been seen; None: this kernel does not say."""
    window_drops: int | None
    """Packets dropped because their sequence number was older than the window."""
    integrity_drops: int | None
    """Packets dropped because their integrity check value was wrong."""
    sequence: int | None
    """The sequence number of the last packet sent, or the highest received."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyUsage:
    """A policy as it is installed, and when a packet last met it."""

    policy: Policy
    added: float
    last_used: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class InstalledSA:
    """An SA as it was found, whoever installed it."""

    sa_id: SaId
    association: SecurityAssociation | None
    """None for what cannot be said in the words of this module; see `description`."""
    usage: Usage
    larval: bool = False
    """Only an SPI so far, or what the kernel keeps while it waits for IKE."""
    description: str = ""
    """Protocol and algorithms in the words of the kernel; never keys."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Acquire:
    """Traffic met a policy that has no SA: IKE should negotiate one."""

    source: IPAddress
    destination: IPAddress
    """The outer addresses of the SA that is wanted."""
    reqid: int
    selector: TrafficSelector
    """Of the packet, as specific as the kernel says it."""
    sequence: int
    """To be handed to `IPsec.allocate_spi`, so that the kernel knows which acquire is answered."""
    mark: Mark | None = None
    interface_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Expire:
    """An SA reached a limit of its `Lifetime`."""

    sa_id: SaId
    reqid: int
    hard: bool
    """True: the SA is gone; False: it is time to rekey."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MappingChange:
    """Authenticated packets of an SA come from another address or port: the peer's NAT mapping changed.

    Advice, not more: the daemon decides (RFC 7296, 2.23) and calls `IPsec.update_sa`.
    """

    sa_id: SaId
    reqid: int
    old_address: IPAddress
    old_port: int
    new_address: IPAddress
    new_port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EventsLost:
    """The kernel had more events than the queue took. The SAs are what they were.

    The events behind it say what could be found out again: expiries and acquires that are still due.
    Some may have been reported before.
    """


Event: TypeAlias = Acquire | Expire | MappingChange | EventsLost


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What an `IPsec` can do beyond what every one can."""

    requires_udp_encapsulation: bool
    """It carries ESP in UDP only, so IKE must act as if there were a NAT."""
    mapping_events: bool
    kernel_keepalive: bool
    """Keepalives go on without this process."""
    marks: bool
    interface_ids: bool
    sa_direction: bool
    """The kernel knows which way an SA goes, and refuses to use it the other way."""


class Events(Protocol):
    """Where events come from. Readable (select, asyncio, trio) when there are some; closed by ``with``."""

    def fileno(self) -> int:
        """Return the descriptor to wait on; reading it is for `read` alone."""
        ...

    def read(self) -> Sequence[Event]:
        """Return what has happened since the last call, oldest first; never waits."""
        ...

    def close(self) -> None:
        """Stop listening."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class IPsec(Protocol):
    """The security association and policy databases of one IPsec implementation.

    Every method raises `natcompat.NatCompatError` (EPERM: no privilege; ESRCH: no such SA or policy;
    EEXIST: there is one already; ENOSYS or EPROTONOSUPPORT: the kernel lacks an algorithm or ESP) and
    then has changed nothing. Methods may be called from any thread; a forked child opens its own.
    """

    @property
    def features(self) -> Features:
        """What this one can do."""
        ...

    def allocate_spi(
        self,
        source: IPAddress | str,
        destination: IPAddress | str,
        *,
        reqid: int = 0,
        minimum: int = SMALLEST_SPI,
        maximum: int = LARGEST_SPI,
        lifetime: float = 165.0,
        sequence: int = 0,
    ) -> int:
        """Reserve an SPI for an inbound SA, for `lifetime` seconds, and return it."""
        ...

    def add_sa(self, sa: SecurityAssociation) -> SaId:
        """Install `sa`, whole or not at all; completes what `allocate_spi` began."""
        ...

    def update_sa(
        self,
        sa_id: SaId,
        *,
        source: IPAddress | str | None = None,
        destination: IPAddress | str | None = None,
        encapsulation: UDPEncapsulation | EllipsisType | None = ...,
    ) -> SaId:
        """Move an SA to other addresses or ports; sequence numbers and replay window go on."""
        ...

    def get_sa(self, sa_id: SaId) -> Usage:
        """Return what the SA has done so far."""
        ...

    def delete_sa(self, sa_id: SaId) -> None:
        """Remove one SA."""
        ...

    def flush_sas(self) -> None:
        """Remove every ESP SA, whoever installed it."""
        ...

    def list_sas(self) -> list[InstalledSA]:
        """Return every SA, with its keys where this process may see them."""
        ...

    def add_policy(self, policy: Policy) -> None:
        """Install `policy`."""
        ...

    def get_policy(self, policy: Policy) -> PolicyUsage:
        """Return the installed policy with the selector, direction, mark and interface of `policy`."""
        ...

    def delete_policy(self, policy: Policy) -> None:
        """Remove the policy with the selector, direction, mark and interface of `policy`."""
        ...

    def flush_policies(self) -> None:
        """Remove every policy, whoever installed it."""
        ...

    def list_policies(self) -> list[PolicyUsage]:
        """Return every policy."""
        ...

    def bypass(self, sock: socket.socket) -> None:
        """Exempt `sock` from all policies, both directions, so that IKE never needs an SA itself."""
        ...

    def events(self) -> Events:
        """Start listening for acquires, expiries and mapping changes."""
        ...

    def close(self) -> None:
        """Let go of what this object holds; SAs and policies stay."""
        ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...
