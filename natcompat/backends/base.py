"""What a backend is: the seam between the one call and the operating systems.

A third party implements `Backend` and registers it in the entry-point group ``natcompat.backends``;
`natcompat.testing.EndpointConformance` tells whether it keeps the contract.
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
    """The ESP of a backend's own: what takes ESP of endpoints that nobody gave an `esp`."""

    @property
    def consumer(self) -> EspConsumer | None:
        """Who takes it in this process now; None: nobody, and it is counted and dropped."""
        ...

    def follow(self, changed: Callable[[], None]) -> object:
        """Have the method `changed` called, which is held weakly, whenever `consumer` is another."""
        ...


@dataclass(frozen=True, slots=True)
class Viability:
    """Whether a backend works in this process, and if it does not, why and what would help."""

    backend: str
    viable: bool
    duties: Mapping[Duty, Performer] = field(default_factory=dict)
    """Who would do which duty on a bound, unconnected socket."""
    reason: str = ""
    """One sentence: what was found."""
    remedy: str = ""
    """One sentence: what to do about it; empty when there is nothing to do."""
    automatic: bool = True
    """Whether ``auto`` may choose it: False where it works only with the help of another process."""
    code: int = errno.ENOTSUP
    """The errno for who asks for it by name where it is not viable: EPERM where a privilege is missing."""


class Attachment(Protocol):
    """A backend's hold on one socket, from `Backend.attach` to `detach`.

    `esp_socket` (optional): a socket of the backend's on the same port, which never waits and from
    which ESP may leave, or None.
    """

    @property
    def mode(self) -> str:
        """How this socket is served now: ``kernel``, ``filter``, ``steering``, ``in line``, ``unbound``."""

    @property
    def reason(self) -> str:
        """Why this mode and not a stronger one; empty for the strongest."""

    @property
    def duties(self) -> Mapping[Duty, Performer]:
        """Who does what on this socket now; natcompat does in the process what is left to it."""

    sensitive: frozenset[str | tuple[int, int]]
    """What the application may do that needs `detach` before it and a new `attach` after it:
    ``"bind"``, ``"connect"``, and socket options as (level, option)."""
    hidden: dict[tuple[int, int], int]
    """Options that the backend has set for itself, with the value that the application shall read.
    What the application sets of these is kept here, and put on the socket by `detach`."""

    def counters(self) -> Mapping[str, int]:
        """Return what only the backend knows, of this as far as it applies.

        ``engine_drops``: datagrams dropped in the kernel on sockets of the backend's own;
        ``bypassed``: 1 if the kernel's IPsec policies leave the socket alone, 0 if they do not;
        names with a colon: what the kernel counts under them for the whole system.
        """

    def detach(self, sock: socket.socket) -> None:
        """Give `sock` back as it was before `attach`, and free all that was made."""

    def release(self) -> None:
        """Free what was made besides the socket, which is about to be closed or is closed.

        Runs in finalizers too: touches no descriptor but the backend's own, and in a forked child
        only closes.
        """

    def adopt(self) -> None:
        """Carry on in a forked child what `attach` began in its parent (threads do not survive)."""


@runtime_checkable
class LeakingAttachment(Attachment, Protocol):
    """A hold on a socket whose kernel does not do all of a duty that it has."""

    leaks: frozenset[str]
    """Names of the rows of `natcompat.contract.TABLE` that come to the process all the same, which drops
    them; `select` wakes for them."""


@runtime_checkable
class WholeAttachment(Attachment, Protocol):
    """A hold on a socket whose kernel has all four duties: its object stays what it is, class and all.

    The process then takes no part, so `sensitive` and `hidden` have no effect, nothing is counted, and what
    was queued before the option was set is delivered as it came.
    """

    def is_on(self, sock: socket.socket) -> bool:
        """Tell whether the kernel still has the option on `sock`: the application may set it as well."""

    def send_keepalive(self, sock: socket.socket, address: Any) -> None:
        """Send one NAT-keepalive from the port of `sock`, which puts a marker in front of all it sends.

        `address` is a socket address, or None for the connected peer. Raises OSError like a send,
        `natcompat.errors.NatCompatError` where a privilege is missing.
        """


class Backend(Protocol):
    """One way of serving sockets.

    Where a kernel serves one local port, or one address family alone, attributes ``port`` and ``families``
    tell who tests the backend; see `port_of` and `families_of`.

    `own_esp` (optional): an `OwnEsp`, where ESP comes to this process and has a place to go to there.
    """

    name: str
    hands_over_esp: bool
    """Whether diverted ESP comes to this process, so that a consumer can have it."""

    def viability(self) -> Viability:
        """Tell whether this works here. Never raises, never changes the system."""

    def attach(self, sock: socket.socket, diversion: Diversion) -> Attachment:
        """Make the kernel do what it can on `sock`, now; natcompat does the rest.

        `sock` is open, UDP, AF_INET or AF_INET6, bound or not, connected or not. What is not IKE
        and reaches a socket of the backend's goes to `diversion`. Raises
        `natcompat.errors.NatCompatError` and leaves the socket as it was when this cannot be done.
        """


def port_of(backend: Backend) -> int | None:
    """Return the one local port at which `backend` can serve sockets (its `port`).

    None: they may have any; 0: any, as long as all have the same.
    """
    port: int | None = getattr(backend, "port", None)
    return port


def families_of(backend: Backend) -> tuple[int, ...]:
    """Return the address families that `backend` serves (its `families`); without a word, both."""
    families: tuple[int, ...] = getattr(backend, "families", (socket.AF_INET, socket.AF_INET6))
    return families


class IPsecBackend(Backend, Protocol):
    """A backend that has a SAD and an SPD, too."""

    def open_ipsec(self, **options: Any) -> IPsec:
        """Open them, with what the backend takes of the options of `natcompat.open_ipsec`.

        Raises `natcompat.errors.NatCompatError`: EPERM without the privilege.
        """
