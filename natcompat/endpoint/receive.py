"""Receives IKE without its marker, and diverts every other datagram.

These are functions of a socket object and not its methods: the option may be switched off while a thread
is in a receive, and the application's class may have methods of any name.
"""

from __future__ import annotations

import contextlib
import errno
import operator
import os
import socket
import time
from typing import TYPE_CHECKING, Any, Final

from natcompat.backends.hand_back import OVERHEAD, Enveloped
from natcompat.backends.hand_back_way import open_way
from natcompat.backends.local_address import ANCILLARY_SIZE, destination
from natcompat.backends.system_calls import (
    Message,
    SystemCalls,
    cut,
    let_greenlets_run,
    on_event_loop,
    receive,
    receive_now,
    wait_readable,
)
from natcompat.contract import MARKER_LENGTH, NON_ESP_MARKER
from natcompat.endpoint.state import LARGEST_DATAGRAM, state_of

if TYPE_CHECKING:
    from natcompat.endpoint.state import EndpointState

HEADROOM: Final = OVERHEAD
"""Bytes by which a datagram can be longer than the IKE message in it: the marker, or an envelope."""
SMALLEST_RECEIVE: Final = 9216
"""Least size in bytes of a receive without `HEADROOM`: a truncated envelope cannot be opened, and IKE that
was coalesced with ESP is no larger than a packet."""

_MSG_ERRQUEUE: Final = getattr(socket, "MSG_ERRQUEUE", 0)
_MSG_DONTWAIT: Final = getattr(socket, "MSG_DONTWAIT", 0)
_DROPS_IN_A_ROW: Final = 64  # that one receive makes before other tasks and greenlets run
_SMALLEST_CHARGE: Final = (
    512  # bytes of SO_RCVBUF that a datagram takes at least; Linux: 768 for an empty one
)


def receive_ike(
    sock: Any,
    root: type[socket.socket],
    size: int,
    ancillary_size: int,
    flags: int,
    first: Message | None = None,
    begun: float | None = None,
) -> Message:
    """Receive until IKE comes, the deadline passes or an error occurs; return the message cut to `size`.

    `first` is a datagram that the caller has received already, in a receive that began at `begun`
    (``time.monotonic``).
    """
    size = operator.index(size)
    if size < 0:  # raises what it raises on a plain socket
        return receive(root, sock, size, ancillary_size, flags)
    timeout = sock.gettimeout()
    deadline = (begun or time.monotonic()) + timeout if timeout else None
    never_waits = timeout == 0 or (timeout is None and bool(flags & _MSG_DONTWAIT))
    dropped = 0
    state = state_of(sock)
    if state is not None and state.in_child is not None:
        state.in_child()
    # ESP must not be truncated, even where the application's buffer is small
    receive_size = max(size + HEADROOM, LARGEST_DATAGRAM)
    message = first or receive(root, sock, receive_size, ancillary_size, flags)
    while True:
        state = state_of(sock)  # while this thread waited, the option may have gone, or come again
        if state is None:
            return cut(message, 0, size, flags)
        if flags & _MSG_ERRQUEUE:
            marked = message[0].startswith(NON_ESP_MARKER)
            return cut(message, MARKER_LENGTH if marked else 0, size, flags)
        if state.draining and state.in_child is None and not wait_readable(root, sock, 0):
            state.draining, state.receive_size = False, 0
        datagram, ancillary, message_flags, source = message
        if datagram.startswith(NON_ESP_MARKER):
            if not flags & socket.MSG_PEEK:
                state.counters.ike += 1
            opened = state.open_envelope(datagram, peek=bool(flags & socket.MSG_PEEK))
            if opened is not None:
                ancillary = opened.restore_destination(ancillary)
                return cut((opened.message, ancillary, message_flags, opened.source), 0, size, flags)
            whole = message is not first or len(datagram) < max(size, SMALLEST_RECEIVE) + HEADROOM
            if whole or not datagram.startswith(state.envelope_prefix):
                return cut(message, MARKER_LENGTH, size, flags)
            state.diversion.error("an IKE message that was handed back was lost: the buffer is too small")
        elif flags & socket.MSG_PEEK:
            discard_peeked(sock, root, state)
        elif message is first and (source is None or len(datagram) == max(size, SMALLEST_RECEIVE) + HEADROOM):
            state.diversion.error(
                "an ESP packet was lost: it came to a receive that expected IKE alone, and may be truncated"
            )
        else:
            state.diversion.take([(memoryview(datagram), source)])
        dropped += 1
        if dropped % _DROPS_IN_A_ROW == 0:
            # a flood must not hold a caller that does not wait: it gets EAGAIN once everything that was
            # queued at the call has been read; on an event loop, which calls again, after one run of drops
            if never_waits and (on_event_loop() or dropped > _queue_length(sock, root)):
                raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
            if not never_waits:
                let_greenlets_run(root)
        if deadline is not None:
            message = _receive_until(sock, root, deadline, receive_size, ancillary_size, flags)
            continue
        message = receive(root, sock, receive_size, ancillary_size, flags)


def discard_peeked(sock: Any, root: type[socket.socket], state: EndpointState) -> None:
    """Remove from the queue the datagram that a peek showed not to be IKE.

    Another thread may have removed it already. If this receive then takes IKE, the message goes back to
    the end of the queue in an envelope to the socket's own address.
    """
    try:
        datagram, ancillary, _, source = receive_now(root, sock, LARGEST_DATAGRAM, ANCILLARY_SIZE, 0)
    except BlockingIOError:
        return
    if not datagram.startswith(NON_ESP_MARKER):
        state.diversion.take([(memoryview(datagram), source)])
        return
    opened = state.open_envelope(datagram)
    content = opened or Enveloped(datagram[MARKER_LENGTH:], source, destination(ancillary))
    try:
        with contextlib.closing(open_way(SystemCalls(sock, root))) as way:
            way.send(state.diversion.hand_back.wrap(*content))
    except OSError as error:
        state.diversion.error(f"an IKE message displaced by a peek could not be handed back: {error}")


def _receive_until(
    sock: Any, root: type[socket.socket], deadline: float, size: int, ancillary_size: int, flags: int
) -> Message:
    """Receive once more before `deadline`, which a stream of dropped datagrams does not prolong."""
    while (remaining := deadline - time.monotonic()) > 0:
        try:
            return receive_now(root, sock, size, ancillary_size, flags)
        except BlockingIOError:
            if not wait_readable(root, sock, remaining):
                break
    raise TimeoutError("timed out")


def _queue_length(sock: Any, root: type[socket.socket]) -> int:
    """Return how many datagrams the queue of `sock` can hold at most."""
    return root.getsockopt(sock, socket.SOL_SOCKET, socket.SO_RCVBUF) // _SMALLEST_CHARGE
