"""IPsec as an IKE daemon sees it: what goes in, what comes back, and what every implementation offers.

The values that go in are defined in `natcompat.ipsec.associations` and `natcompat.ipsec.transforms` and are
importable from here. `IPsec` is what takes them: the kernel of this machine, or an ESP of
natcompat's own. This module knows neither.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Interface, IPv6Interface
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
from natcompat.ipsec.offload import HardwareOffload
from natcompat.ipsec.policies import Policy
from natcompat.ipsec.selectors import AddressRange, PortRange, TrafficSelector
from natcompat.ipsec.transforms import Encr, Integ, Key
from natcompat.ipsec.values import Action, Direction, IPAddress, IPNetwork, Mark, Mode

__all__ = [
    "LARGEST_REPLAY_WINDOW",
    "LARGEST_SPI",
    "SMALLEST_SPI",
    "Acquire",
    "Action",
    "AddressRange",
    "Direction",
    "Encr",
    "Event",
    "Events",
    "EventsLost",
    "Expire",
    "Features",
    "HardwareOffload",
    "IPAddress",
    "IPNetwork",
    "IPsec",
    "InstalledSA",
    "Integ",
    "IntegrityFailure",
    "Key",
    "Lifetime",
    "MappingChange",
    "Mark",
    "Mode",
    "PeerSilent",
    "Policy",
    "PolicyUsage",
    "PortRange",
    "ProtectionRestored",
    "SaId",
    "SecurityAssociation",
    "TrafficSelector",
    "Transforms",
    "UDPEncapsulation",
    "Usage",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """The counters of an SA."""

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
    last_received: float | None = None
    """When the last authentic packet came, dummy packets included; seconds since the epoch. None: never, or
    this implementation does not say."""
    last_sent: float | None = None
    """When the last packet was sent, dummy packets included; seconds since the epoch, None likewise."""


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
class ProtectionRestored:
    """Somebody took away rules, routes or the device that policies stand on, and they were put back.

    Meanwhile what the policies cover was blocked, not sent in the clear, unless `description` says otherwise.
    """

    description: str
    """What was taken away and put back, in words for a log."""
    count: int
    """How often this has happened since IPsec was opened."""


@dataclass(frozen=True, slots=True, kw_only=True)
class IntegrityFailure:
    """The first of a series of packets of an SA whose integrity check value is wrong.

    Usual causes: the peer has another key or other transforms, or a middlebox changes packets. Anybody on the
    path can cause it, so it says nothing about the peer for certain.
    """

    sa_id: SaId
    reqid: int
    address: IPAddress | None
    """Where the packet seemed to come from; None where a kernel does not say."""
    port: int
    count: int
    """Packets of this SA that have failed so far."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerSilent:
    """This end sends by an SA, and no authentic packet has come from its peer for a while."""

    sa_id: SaId
    """The outbound SA."""
    reqid: int
    seconds: float
    """For how long nothing has come."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventsLost:
    """The kernel had more events than the queue took. The SAs are what they were.

    The events behind it say what could be found out again: expiries and acquires that are still due.
    Some may have been reported before.
    """


Event: TypeAlias = (
    Acquire | Expire | MappingChange | ProtectionRestored | IntegrityFailure | PeerSilent | EventsLost
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """The optional abilities of an `IPsec`."""

    requires_udp_encapsulation: bool
    """It carries ESP in UDP only, so IKE must act as if there were a NAT."""
    mapping_events: bool
    kernel_keepalive: bool
    """Keepalives go on without this process."""
    marks: bool
    interface_ids: bool
    sa_direction: bool
    """The kernel knows which way an SA goes, and refuses to use it the other way."""
    host_traffic: bool = True
    """The policies hold for the traffic of this host's own programs. False: only for what a program puts into
    a packet device."""
    ranges: bool = False
    """`TrafficSelector` may have ranges of addresses and ports."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transforms:
    """The transforms that an `IPsec` installs: what an IKE daemon may propose."""

    encryption: Mapping[Encr, tuple[int, ...]]
    """Key lengths in bits, without salt, for each; NULL has (0,)."""
    integrity: frozenset[Integ]
    """For the transforms of `encryption` that are no AEAD; `Integ.NONE` is not among them."""
    esn: bool
    """Extended sequence numbers."""


class Events(Protocol):
    """A queue of events; ``with`` closes it. Its descriptor is readable while there may be events."""

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
        """Return the optional abilities of this implementation."""
        ...

    def allocate_spi(
        self,
        source: IPAddress | str,
        destination: IPAddress | str,
        *,
        reqid: int = 0,
        minimum: int | bytes = SMALLEST_SPI,
        maximum: int | bytes = LARGEST_SPI,
        lifetime: float = 165.0,
        sequence: int = 0,
    ) -> int:
        """Reserve an SPI for an inbound SA, for `lifetime` seconds, and return it."""
        ...

    def release_spi(self, spi: int | bytes, destination: IPAddress | str) -> None:
        """Give back an SPI that `allocate_spi` reserved and no SA took. ESRCH: it is not reserved."""
        ...

    def transforms(self) -> Transforms:
        """Return the transforms that SAs may have here, so that IKE proposes nothing else.

        Installs nothing. A kernel may load modules for the answer, which takes up to seconds the first time.
        """
        ...

    def add_sa(self, sa: SecurityAssociation, *, legacy: bool = False) -> SaId:
        """Install `sa`, whole or not at all; completes what `allocate_spi` began.

        EPROTONOSUPPORT without `legacy`: a transform of it is old (`Encr.is_legacy`, `Integ.is_legacy`).
        """
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

    def flush_sas(self, *, reqid: int | None = None) -> None:
        """Remove every ESP SA, whoever installed it; with `reqid`, those that have it."""
        ...

    def list_sas(self) -> list[InstalledSA]:
        """Return every SA, with its keys where this process may see them."""
        ...

    def add_policy(self, policy: Policy, *, replace: bool = False) -> None:
        """Install `policy`. EEXIST: there is one with its selector, direction, mark and interface.

        With `replace` it takes the place of that one, and there is no moment with neither.
        """
        ...

    def get_policy(self, policy: Policy) -> PolicyUsage:
        """Return the installed policy with the selector, direction, mark and interface of `policy`."""
        ...

    def delete_policy(self, policy: Policy) -> None:
        """Remove the policy with the selector, direction, mark and interface of `policy`."""
        ...

    def flush_policies(self, *, reqid: int | None = None) -> None:
        """Remove every policy, whoever installed it; with `reqid`, those that have it."""
        ...

    def list_policies(self) -> list[PolicyUsage]:
        """Return every policy."""
        ...

    def add_address(self, address: str | IPAddress | IPv4Interface | IPv6Interface) -> None:
        """Give this host an inner address ("10.9.0.10/32"), before or after the policies for it.

        Routes follow the outbound policies and prefer it as source. It is gone on `close`, and with the
        process. EEXIST: it was given. EOPNOTSUPP: this implementation assigns no addresses.
        """
        ...

    def remove_address(self, address: str | IPAddress | IPv4Interface | IPv6Interface) -> None:
        """Take an inner address away. EADDRNOTAVAIL: it was not given."""
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
