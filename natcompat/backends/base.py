"""The interface of a backend: the seam between `natcompat.set_nat_t_endpoint` and an operating system.

A third party implements `Backend` and registers it in the entry-point group ``natcompat.backends``.
`natcompat.testing.EndpointConformance` checks that it keeps the contract.
"""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, runtime_checkable

from natcompat.backends.consumer import (
    Address,
    EspCallable,
    EspConsumer,
    EspInbound,
    EspOutlet,
    SocketReader,
    TakeBurst,
)
from natcompat.contract import Duty, Performer

if TYPE_CHECKING:
    from natcompat.backends.diversion import Diversion
    from natcompat.ipsec import IPsec
    from natcompat.ipsec.device import PacketDevice

DeviceChoice: TypeAlias = "PacketDevice | Literal['auto', 'tun', 'queue']"
"""Where ESP in this process takes inner packets from: a device, or the kind of device to make."""
NetworkNamespace: TypeAlias = str | os.PathLike[str] | int
"""A network namespace: its name as ``ip netns`` knows it, the path of a namespace file, or a descriptor."""

__all__ = [
    "Address",
    "Attachment",
    "Backend",
    "DeviceChoice",
    "EspCallable",
    "EspConsumer",
    "EspInbound",
    "EspOutlet",
    "IPsecBackend",
    "LeakingAttachment",
    "NetworkNamespace",
    "OwnEsp",
    "SocketReader",
    "TakeBurst",
    "Viability",
    "WholeAttachment",
    "families_of",
    "port_of",
]


class OwnEsp(Protocol):
    """The default consumer of a backend's ESP, for endpoints that were given no `esp`."""

    @property
    def consumer(self) -> EspConsumer | None:
        """The consumer in this process now; None: ESP is counted and dropped."""
        ...

    def follow(self, changed: Callable[[], None]) -> object:
        """Call the method `changed`, which is held weakly, whenever `consumer` changes."""
        ...


@dataclass(frozen=True, slots=True)
class Viability:
    """Whether a backend works in this process; if not, the reason and the remedy."""

    backend: str
    viable: bool
    duties: Mapping[Duty, Performer] = field(default_factory=dict)
    """Who would perform each duty on a bound, unconnected socket."""
    reason: str = ""
    """One sentence: what the probe found."""
    remedy: str = ""
    """One sentence: what the user can do; empty when there is nothing to do."""
    automatic: bool = True
    """Whether ``auto`` may choose the backend; False where it needs another process to install the SAs."""
    code: int = errno.ENOTSUP
    """The errno when a caller requests a backend that is not viable: EPERM where a privilege is missing."""


class Attachment(Protocol):
    """A backend's hold on one socket, from `Backend.attach` to `detach`.

    `esp_socket` (optional): a non-blocking socket of the backend on the same port, from which ESP may be
    sent, or None.

    `hand_back` and `hand_back_reason` (optional): see `natcompat.NatTEndpoint.hand_back`.
    """

    @property
    def mode(self) -> str:
        """How the socket is served now: ``kernel``, ``filter``, ``steering``, ``in line``, ``unbound``."""

    @property
    def reason(self) -> str:
        """Why the mode is not a stronger one; empty for the strongest."""

    @property
    def duties(self) -> Mapping[Duty, Performer]:
        """Who performs each duty on this socket now; natcompat performs those of the process."""

    sensitive: frozenset[str | tuple[int, int]]
    """Operations of the application that need `detach` before them and a new `attach` after them:
    ``"bind"``, ``"connect"``, and socket options as (level, option)."""
    hidden: dict[tuple[int, int], int]
    """Options that the backend set for its own use, with the value that the application reads.
    A value that the application sets is stored here, and `detach` sets it on the socket."""

    def counters(self) -> Mapping[str, int]:
        """Return the counters that only the backend has; any of the following.

        ``engine_drops``: datagrams that the kernel dropped on the backend's sockets;
        ``bypassed``: 1 if the kernel's IPsec policies exempt the socket, else 0;
        names with a colon: the kernel's counters for the whole system.
        """

    def detach(self, sock: socket.socket) -> None:
        """Restore `sock` as it was before `attach`, and free everything that `attach` made."""

    def release(self) -> None:
        """Free everything that `attach` made; the application's socket is closed or about to be closed.

        Runs in finalizers, too. Touches no descriptor but those of the backend; a forked child only closes
        them.
        """

    def adopt(self) -> None:
        """Restart in a forked child what `attach` started in its parent: threads do not survive a fork."""


@runtime_checkable
class LeakingAttachment(Attachment, Protocol):
    """An `Attachment` whose kernel performs a duty incompletely."""

    leaks: frozenset[str]
    """Names of the rows of `natcompat.contract.TABLE` that reach the process although the kernel has the
    duty. The process drops them; `select` wakes for them."""


@runtime_checkable
class WholeAttachment(Attachment, Protocol):
    """An `Attachment` whose kernel performs all four duties; the socket object keeps its class.

    The process performs nothing, so `sensitive` and `hidden` have no effect, nothing is counted, and
    datagrams that were queued before the option was set are delivered unchanged.
    """

    def is_on(self, sock: socket.socket) -> bool:
        """Return whether the option is still set on `sock`; the application may change it itself."""

    def send_keepalive(self, sock: socket.socket, address: Any, local_address: Any = None) -> None:
        """Send one NAT-keepalive without marker from the port of `sock`, whose kernel marks every send.

        `address` is a socket address, or None for the connected peer; `local_address` is the IP address from
        which the keepalive leaves, and is passed where the caller names one. Raises OSError like a send,
        `natcompat.errors.NatCompatError` where a privilege is missing.
        """


class Backend(Protocol):
    """Serves UDP sockets with the option on one operating system.

    ``port`` and ``families`` (optional): the only local port, and the only address families, that the kernel
    serves; see `port_of` and `families_of`.

    `own_esp` (optional): an `OwnEsp`, where ESP comes to this process by default.
    """

    name: str
    hands_over_esp: bool
    """Whether diverted ESP comes to this process, where a consumer can take it."""

    def viability(self) -> Viability:
        """Return whether the backend works here. Never raises, never changes the system."""

    def attach(self, sock: socket.socket, diversion: Diversion) -> Attachment:
        """Make the kernel perform the duties that it can on `sock`; natcompat performs the others.

        `sock` is an open UDP socket of AF_INET or AF_INET6, bound or not, connected or not. Datagrams that
        reach a socket of the backend and are not IKE go to `diversion`. On failure, raises
        `natcompat.errors.NatCompatError` and leaves the socket as it was.
        """


def port_of(backend: Backend) -> int | None:
    """Return the only local port on which `backend` serves sockets (its `port`).

    None: every port; 0: any port, but the same for all sockets.
    """
    port: int | None = getattr(backend, "port", None)
    return port


def families_of(backend: Backend) -> tuple[int, ...]:
    """Return the address families that `backend` serves (its `families`, by default both)."""
    families: tuple[int, ...] = getattr(backend, "families", (socket.AF_INET, socket.AF_INET6))
    return families


def own_esp_of(backend: Backend) -> OwnEsp | None:
    """Return the default consumer of ESP that `backend` has (its `own_esp`); None: it has none."""
    own_esp: OwnEsp | None = getattr(backend, "own_esp", None)
    return own_esp


def leaks_of(attachment: Attachment | None) -> frozenset[str]:
    """Return the rows of the contract that reach the process though the kernel has the duty."""
    return attachment.leaks if isinstance(attachment, LeakingAttachment) else frozenset()


class IPsecBackend(Backend, Protocol):
    """A `Backend` that also has a SAD and an SPD."""

    def open_ipsec(self, **options: Any) -> IPsec:
        """Open SAD and SPD, with those options of `natcompat.open_ipsec` that differ from their defaults.

        A backend without `own_esp` gets no options.

        Raises `natcompat.errors.NatCompatError`: EPERM without the privilege.
        """
