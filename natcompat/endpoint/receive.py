"""The process's half of an endpoint: receive IKE and divert the rest, send behind the marker.

These are functions of a socket object and not methods, since the class of the object may become
the application's again while a thread is inside, and since that class may have methods of any name.
"""

from __future__ import annotations

import errno
import operator
import os
import socket
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from natcompat.backends.diversion import Counters, Diversion, HandBack
from natcompat.backends.system_calls import (
    Message,
    cut,
    is_connected,
    let_greenlets_run,
    on_event_loop,
    own_address,
    receive,
    receive_now,
    root_class,
    wait_readable,
)
from natcompat.contract import MARKER_LENGTH, NON_ESP_MARKER

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from natcompat.endpoint.socket_class import NatTSocket

HEADROOM: Final = HandBack.HEADROOM
LARGEST_DATAGRAM: Final = 65535
_MSG_ERRQUEUE: Final = getattr(socket, "MSG_ERRQUEUE", 0)
_MSG_DONTWAIT: Final = getattr(socket, "MSG_DONTWAIT", 0)
_MSG_MORE: Final = getattr(socket, "MSG_MORE", 0)
_TURN: Final = 64  # datagrams that one receive drops before somebody else has a turn
_LEAST_ROOM_OF_A_DATAGRAM: Final = 512  # in SO_RCVBUF; Linux takes 768 for an empty one


class ProcessHalf:
    """What the methods of one endpoint's sockets share. Threads read it without a lock."""

    __slots__ = (
        "alias_closed",
        "alias_made",
        "counters",
        "diversion",
        "draining",
        "hidden",
        "in_piece",
        "note_sent",
        "on",
        "original",
        "prefix",
        "rearrange",
        "room",
        "root",
        "sensitive",
        "set_option",
        "unbound",
        "unwrap",
    )

    def __init__(
        self, original: type[socket.socket], root: type[socket.socket], diversion: Diversion
    ) -> None:
        self.original: type[socket.socket] = original
        """The class that the socket had."""
        self.root: type[socket.socket] = root
        """The library's class at its root, whose methods are the system calls."""
        self.diversion: Diversion = diversion
        self.counters: Counters = diversion.counters
        self.prefix: bytes = diversion.hand_back.prefix
        self.unwrap: Callable[[bytes], tuple[bytes, Any] | None] = diversion.hand_back.unwrap
        self.room: int = LARGEST_DATAGRAM
        """What to receive at least, so that ESP comes whole; 0 once the kernel delivers IKE alone."""
        self.on: bool = True
        """Whether the option has not been switched off since: cheaper to ask than the class."""
        self.draining: bool = False
        """Whether it will be 0 once the queue has no datagrams from before that."""
        self.unbound: bool = False
        """Whether something is to be done at the bind that a send implies."""
        self.in_piece: bool = False
        """Whether a datagram begun with MSG_MORE is open: its marker is in."""
        self.sensitive: frozenset[str | tuple[int, int]] = frozenset()
        self.hidden: dict[tuple[int, int], int] = {}
        self.note_sent: Callable[[Any], None] | None = None
        """Told the destination of every send, while somebody wants to know."""
        # set by the endpoint
        self.rearrange: Callable[[NatTSocket, Callable[[], Any]], Any]
        self.set_option: Callable[[NatTSocket, bool], None]
        self.alias_made: Callable[[NatTSocket], None]
        self.alias_closed: Callable[[NatTSocket], None]


def half_of(sock: Any) -> ProcessHalf | None:
    """Return what the class of `sock` holds now, None once it is plain again."""
    return getattr(type(sock), "_nat_t", None)


def root_of(sock: Any) -> type[socket.socket]:
    """Return the library's class at the root of `sock`, plain again or not.

    Where a method finds that the option has just gone, this class's method is what ``super()`` in
    an override of the application's, which may be running, would have reached without us.
    """
    root = root_class(type(sock))
    assert root is not None, "a socket is what set_nat_t_endpoint takes"  # noqa: S101
    return root


def receive_ike(
    sock: Any,
    root: type[socket.socket],
    size: int,
    ancillary_size: int,
    flags: int,
    first: Message | None = None,
    begun: float | None = None,
) -> Message:
    """Receive until IKE comes, the deadline passes or there is an error.

    `first` came already, to a receive that had `begun` then (``time.monotonic``).
    """
    size = operator.index(size)
    if size < 0:  # raises what it raises on a plain socket
        return receive(root, sock, size, ancillary_size, flags)
    timeout = sock.gettimeout()
    deadline = (begun or time.monotonic()) + timeout if timeout else None
    never_waits = timeout == 0 or (timeout is None and bool(flags & _MSG_DONTWAIT))
    dropped = 0
    # ESP has to come whole even where the application's buffer is small
    room = max(size + HEADROOM, LARGEST_DATAGRAM)
    message = first or receive(root, sock, room, ancillary_size, flags)
    while True:
        half = half_of(sock)  # it may have been switched off, or on anew, while this thread waited
        if half is None:
            return cut(message, 0, size, flags)
        if flags & _MSG_ERRQUEUE:
            led = message[0].startswith(NON_ESP_MARKER)
            return cut(message, MARKER_LENGTH if led else 0, size, flags)
        if half.draining and not wait_readable(root, sock, 0):
            half.draining, half.room = False, 0
        datagram, ancillary, message_flags, source = message
        if datagram.startswith(NON_ESP_MARKER):
            if not flags & socket.MSG_PEEK:
                half.counters.ike += 1
            returned = half.unwrap(datagram)
            if returned is None:
                return cut(message, MARKER_LENGTH, size, flags)
            return cut((returned[0], ancillary, message_flags, returned[1]), 0, size, flags)
        if flags & socket.MSG_PEEK:
            discard_peeked(sock, root, half)
        elif message is first and (source is None or len(datagram) == size + HEADROOM):
            half.diversion.error("ESP came to a receive that the kernel had been trusted with, and is lost")
        else:
            half.diversion.take([(memoryview(datagram), source)])
        dropped += 1
        if dropped % _TURN == 0:
            # once all that was there at the call has been looked at, a flood must not hold the caller; on
            # a loop, which looks again as long as there is something, no longer than a turn
            if never_waits and (on_event_loop() or dropped > _queue_length(sock, root)):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            if not never_waits:
                let_greenlets_run(root)
        if deadline is not None:
            message = _receive_until(sock, root, deadline, room, ancillary_size, flags)
            continue
        message = receive(root, sock, room, ancillary_size, flags)


def discard_peeked(sock: Any, root: type[socket.socket], half: ProcessHalf) -> None:
    """Take from the queue what a peek showed not to be IKE.

    Another thread may have been faster; what comes then may be IKE, and goes back to the end of
    the queue through a datagram to ourselves.
    """
    try:
        datagram, _, _, source = receive_now(root, sock, LARGEST_DATAGRAM, 0, 0)
    except BlockingIOError:
        return
    if not datagram.startswith(NON_ESP_MARKER):
        half.diversion.take([(memoryview(datagram), source)])
        return
    message, source = half.unwrap(datagram) or (datagram[MARKER_LENGTH:], source)
    try:
        if is_connected(sock):
            raise OSError(errno.EISCONN, "a connected socket takes nothing from itself")
        root.sendto(sock, half.diversion.hand_back.wrap(message, source), own_address(sock))
    except OSError as error:
        half.diversion.error(f"IKE that a peek displaced could not be handed back: {error}")


def _receive_until(
    sock: Any, root: type[socket.socket], deadline: float, size: int, ancillary_size: int, flags: int
) -> Message:
    """Receive once more, by `deadline`: what comes without end does not put it off."""
    while (remaining := deadline - time.monotonic()) > 0:
        try:
            return receive_now(root, sock, size, ancillary_size, flags)
        except BlockingIOError:
            if not wait_readable(root, sock, remaining):
                break
    raise TimeoutError("timed out")


def _queue_length(sock: Any, root: type[socket.socket]) -> int:
    """Return how many datagrams the queue of `sock` can hold at most."""
    return root.getsockopt(sock, socket.SOL_SOCKET, socket.SO_RCVBUF) // _LEAST_ROOM_OF_A_DATAGRAM


def send_message(
    sock: NatTSocket,
    half: ProcessHalf,
    data: ReadableBuffer,
    flags: int,
    destination: tuple[Any, ...] = (),
    **timeout: Any,
) -> int:
    """Send `data` to `destination`, one address or none."""
    if flags & ~_MSG_MORE and hasattr(half.root, "sendmsg"):
        return send_pieces(sock, half, [data], [], flags, destination)

    def send(lead: bytes) -> int:
        datagram = b"".join((lead, data))  # not +, which asks `data` (numpy's arrays) for its opinion
        if destination:
            return half.root.sendto(sock, datagram, flags, *destination)
        return half.root.send(sock, datagram, flags, **timeout)

    return _send_behind_marker(sock, half, [data], flags, destination, send)


def send_pieces(
    sock: NatTSocket,
    half: ProcessHalf,
    pieces: list[Any],
    ancillary: list[Any],
    flags: int,
    destination: tuple[Any, ...] = (),
) -> int:
    """Send the concatenated `pieces`; the buffers themselves go down, since MSG_ZEROCOPY keeps them."""
    return _send_behind_marker(
        sock,
        half,
        pieces,
        flags,
        destination,
        lambda lead: half.root.sendmsg(
            sock, [lead, *pieces] if lead else pieces, ancillary, flags, *destination
        ),
    )


def _send_behind_marker(
    sock: NatTSocket,
    half: ProcessHalf,
    pieces: list[Any],
    flags: int,
    destination: tuple[Any, ...],
    send: Callable[[bytes], int],
) -> int:
    """Send with the marker, or without it the rest of a datagram that MSG_MORE began."""
    if half.unbound:
        bind_implicitly(sock, half)
    lead = b"" if half.in_piece else NON_ESP_MARKER
    try:
        sent = send(lead)
    except OSError:
        # an error ends the pending datagram; but IPv4 refuses what no datagram can hold before (udp_sendmsg)
        half.in_piece = (
            half.in_piece
            and sock.family == socket.AF_INET
            and sum(memoryview(piece).nbytes for piece in pieces) > 0xFFFF
        )
        raise
    half.in_piece = bool(flags & _MSG_MORE)
    if not half.in_piece:
        half.counters.markers_inserted += 1
    note_sent = half.note_sent  # another thread may end it meanwhile
    if note_sent is not None:
        note_sent(destination[0] if destination else None)
    return sent - len(lead)


def bind_implicitly(sock: Any, half: ProcessHalf) -> None:
    """Bind as the kernel would at the first send, and take up what the option could not do before."""

    def bind() -> None:
        try:
            half.root.bind(sock, ("::" if sock.family == socket.AF_INET6 else "0.0.0.0", 0))  # noqa: S104
        except OSError:
            if not sock.getsockname()[1]:  # else another thread's send was faster
                raise

    half.rearrange(sock, bind)
