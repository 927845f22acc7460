"""The seam to a consumer of ESP: what takes diverted ESP packets, and by which socket it sends its own."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

Address: TypeAlias = tuple[Any, ...]
"""A socket address as `socket.recvfrom` returns it."""

EspCallable: TypeAlias = Callable[[memoryview, Address], object]
"""Takes one diverted ESP packet (SPI first, the UDP header is gone) and where it came from."""


@runtime_checkable
class EspInbound(Protocol):
    """Takes diverted ESP packets by the burst.

    What follows is optional; a consumer has it or not:

    `coalesce` (default False) asks for UDP_GRO on the sockets that ESP is steered to: fewer and
    larger receives, worth it where a burst is handled in one piece.

    `traffic_classes` (default False) asks for the outer TOS or traffic class of each packet: where
    they are known `inbound` gets a list of them, one for each packet, as a second argument.

    `shed(count)` is told of packets that were dropped before `inbound`, since more came than it takes.

    `read_sockets(sockets, diversion, take)` is asked who reads the sockets that ESP is steered to: it
    returns a `SocketReader`, or None for a thread of their own. `take(socket)` takes a burst from one to
    `inbound`; who does without it has to hand IKE back that is glued to ESP there. `engines` (default 1):
    how many sockets.

    `attached(outlet)` and `detached(outlet)` tell which endpoints hand their ESP to it, for a
    consumer that sends ESP, too: see `EspOutlet`. `detached` runs in finalizers and takes no lock.
    """

    def inbound(self, burst: list[tuple[memoryview, Address]]) -> object:
        """Take `burst`: (ESP packet, source address) pairs in the order in which they came.

        Runs in the thread that steers, or in the thread that receives where demultiplexing is in
        line. What it raises is logged and counted, and goes nowhere else. The packets may be kept.
        """


EspConsumer: TypeAlias = EspCallable | EspInbound

TakeBurst: TypeAlias = Callable[[socket.socket], object]
"""Takes a bounded burst of what has come to a socket."""


class EspOutlet(Protocol):
    """Where ESP leaves by the port of an endpoint, without the marker. Any thread may use it."""

    own: bool
    """Whether `sock` is there for ESP alone, so that its options may be set; else it is the application's."""

    @property
    def address(self) -> Address:
        """Of the endpoint's socket, as `socket.socket.getsockname` tells it; port 0 while it is not bound."""
        ...

    @property
    def sock(self) -> socket.socket:
        """What it sends from, as it would without the option. Raises EBADF once that is closed."""
        ...

    @property
    def application(self) -> socket.socket:
        """The application's socket, likewise."""
        ...

    def sendmsg(
        self, buffers: Sequence[bytes], ancillary: Sequence[tuple[int, int, bytes]], address: Address
    ) -> int:
        """Send one datagram, which `buffers` are put together to. Never waits: EAGAIN if there is no room."""
        ...


class SocketReader(Protocol):
    """Reads sockets to which ESP is steered."""

    def count(self) -> None:
        """Bring the counters of the endpoint up to date."""
        ...

    def close(self) -> None:
        """Read no more. When it returns no thread touches the sockets, which stay open."""
        ...

    def abandon(self) -> None:
        """Likewise, and close them. Runs in finalizers, and in forked children, which have no threads."""
        ...
