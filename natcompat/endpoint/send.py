"""Sends datagrams behind the non-ESP marker."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

from natcompat.contract import NON_ESP_MARKER

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from natcompat.endpoint.state import EndpointState

_MSG_MORE: Final = getattr(socket, "MSG_MORE", 0)


def send_message(
    sock: Any,
    state: EndpointState,
    data: ReadableBuffer,
    flags: int,
    destination: tuple[Any, ...] = (),
    **timeout: Any,
) -> int:
    """Send `data` behind the marker; return how many bytes of `data` were sent.

    `destination` holds one socket address, or none for the connected peer; `timeout` is gevent's.
    """
    if flags & ~_MSG_MORE and hasattr(state.root, "sendmsg"):
        return send_buffers(sock, state, [data], [], flags, destination)

    def send(marker: bytes) -> int:
        datagram = b"".join((marker, data))  # + would call the operator of `data` (numpy's arrays)
        if destination:
            return state.root.sendto(sock, datagram, flags, *destination)
        return state.root.send(sock, datagram, flags, **timeout)

    return _send_behind_marker(sock, state, [data], flags, destination, send)


def send_buffers(
    sock: Any,
    state: EndpointState,
    buffers: list[Any],
    ancillary: list[Any],
    flags: int,
    destination: tuple[Any, ...] = (),
) -> int:
    """Send the concatenated `buffers` behind the marker; return how many of their bytes were sent.

    The buffers go to the system call as they are, since the kernel reads them later with MSG_ZEROCOPY.
    """
    return _send_behind_marker(
        sock,
        state,
        buffers,
        flags,
        destination,
        lambda marker: state.root.sendmsg(
            sock, [marker, *buffers] if marker else buffers, ancillary, flags, *destination
        ),
    )


def _send_behind_marker(
    sock: Any,
    state: EndpointState,
    buffers: list[Any],
    flags: int,
    destination: tuple[Any, ...],
    send: Callable[[bytes], int],
) -> int:
    """Call `send` with the marker, or with nothing where MSG_MORE has sent the marker already."""
    if state.unprepared:
        prepare_send(sock, state)
    marker = b"" if state.message_open else NON_ESP_MARKER
    try:
        sent = send(marker)
    except OSError:
        # an error ends the open datagram, except that of a message longer than any datagram, which IPv4
        # refuses before it looks at the open one (udp_sendmsg)
        state.message_open = (
            state.message_open
            and sock.family == socket.AF_INET
            and sum(memoryview(buffer).nbytes for buffer in buffers) > 0xFFFF
        )
        raise
    state.message_open = bool(flags & _MSG_MORE)
    if not state.message_open:
        state.counters.markers_inserted += 1
    note_sent = state.note_sent  # another thread may remove the observer meanwhile
    if note_sent is not None:
        note_sent(destination[0] if destination else None)
    return sent - len(marker)


def prepare_send(sock: Any, state: EndpointState) -> None:
    """Do what `EndpointState.unprepared` announces."""
    if state.in_child is not None:
        state.in_child()
    if state.unbound:
        _bind_implicitly(sock, state)


def _bind_implicitly(sock: Any, state: EndpointState) -> None:
    """Bind to any address and port, as the kernel does at a first send, and attach the bound socket."""

    def bind() -> None:
        try:
            state.root.bind(sock, ("::" if sock.family == socket.AF_INET6 else "0.0.0.0", 0))  # noqa: S104
        except OSError:
            if not sock.getsockname()[1]:  # else another thread has just bound it
                raise

    state.reattach_around(sock, bind)
