"""The interface of a consumer of ESP, which takes diverted ESP and sends its own by an endpoint's port."""

from __future__ import annotations

import socket
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeAlias, runtime_checkable

Address: TypeAlias = tuple[Any, ...]
"""A socket address as `socket.recvfrom` returns it."""

EspCallable: TypeAlias = Callable[[memoryview, Address], object]
"""Takes one diverted ESP packet (without UDP header; the SPI is first) and its source address."""


@runtime_checkable
class EspInbound(Protocol):
    """Takes diverted ESP packets in bursts.

    A consumer may have the following attributes and methods, too:

    `coalesce` (default False) requests UDP_GRO on the sockets to which ESP is steered: fewer and larger
    receives, for a consumer that handles a burst as one piece.

    `traffic_classes` (default False) requests the outer TOS or traffic class of each packet. Where they are
    known, `inbound` gets a list of them, one for each packet, as a second argument.

    `shed(count)` reports packets that were dropped before `inbound` because more came than it takes.

    `read_sockets(sockets, diversion, take)` decides how the sockets to which ESP is steered are read: it
    returns a `SocketReader`, or None for a thread of natcompat. `take(socket)` takes one burst from a socket
    to `inbound`. A reader that does not call `take` has to hand back IKE that is coalesced with ESP
    (`natcompat.backends.hand_back`). `engines` (default 1): the number of sockets.

    `attached(outlet)` and `detached(outlet)` report the endpoints that hand their ESP to the consumer, for a
    consumer that sends ESP: see `EspOutlet`. `detached` runs in finalizers and takes no lock.

    `process` (default: any) is the number of the only process in which the consumer works, for one that a
    forked child cannot use.

    `exempt(sock)` keeps what an endpoint's socket sends out of the consumer's IPsec policies. An endpoint
    calls it before its socket can send, bound or not, and calls the function that it returns with the
    socket when the option is cleared. What it raises fails the call that set the option.
    """

    def inbound(self, burst: list[tuple[memoryview, Address]]) -> object:
        """Take `burst`: (ESP packet, source address) pairs in the order of their arrival.

        Runs in the thread that reads the steered socket, or in the thread that receives where
        demultiplexing is in line. An exception is logged and counted, and not propagated. The consumer may
        keep the packets.
        """


EspConsumer: TypeAlias = EspCallable | EspInbound

TakeBurst: TypeAlias = Callable[[socket.socket], object]
"""Takes a bounded burst of the datagrams that a socket has queued."""


class EspOutlet(Protocol):
    """Sends ESP, without the marker, from the port of an endpoint. Any thread may use it."""

    own: bool
    """Whether `sock` is for ESP alone, so that its options may be set; else the application's socket."""

    @property
    def address(self) -> Address:
        """Address of the endpoint's socket, as `getsockname` returns it; port 0 until it is bound."""
        ...

    @property
    def sock(self) -> socket.socket:
        """The socket that sends, as it is without the option. Raises EBADF once it is closed."""
        ...

    @property
    def application(self) -> socket.socket:
        """The application's socket, as it is without the option. Raises EBADF once it is closed."""
        ...

    def sendmsg(
        self, buffers: Sequence[bytes], ancillary: Sequence[tuple[int, int, bytes]], address: Address
    ) -> int:
        """Send the concatenated `buffers` as one datagram. Never waits: EAGAIN if there is no room."""
        ...


class SocketReader(Protocol):
    """Reads sockets to which ESP is steered."""

    def count(self) -> None:
        """Bring the counters of the endpoint up to date."""
        ...

    def close(self) -> None:
        """Stop reading. On return no thread touches the sockets, which stay open."""
        ...

    def abandon(self) -> None:
        """Stop reading and close the sockets. Runs in finalizers, and in children, which have no threads."""
        ...
