"""Receives, sends and waits on a socket by the methods of its library class, never by overridden ones."""

from __future__ import annotations

import contextlib
import errno
import os
import selectors
import socket
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from natcompat.errors import NatCompatError

if TYPE_CHECKING:
    _Socket = socket.socket
else:
    _Socket = object

Message: TypeAlias = tuple[bytes, list[tuple[int, int, bytes]], int, Any]
"""What `socket.recvmsg` returns: data, ancillary data, flags, address."""

_MSG_TRUNC = getattr(socket, "MSG_TRUNC", 0)
_MSG_DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)


def root_class(cls: type) -> type[socket.socket] | None:
    """Return the library's socket class from which `cls` derives: the stdlib's or gevent's."""
    for ancestor in cls.__mro__:
        if "_nat_t" in vars(ancestor):
            continue  # the class of an endpoint's socket has the name of the class that it replaces
        if ancestor.__name__ == "socket" and ancestor.__module__ in ("socket", "gevent._socket3"):
            return ancestor
    return None


def option_value(value: Any, *length: Any) -> bool:
    """Return the boolean that a setsockopt call passes: an int, or 4 bytes in native order.

    Raises OSError: EINVAL for any other length, as udp_opt_set() of Solaris does.
    """
    if isinstance(value, int) and not length:
        return bool(value)
    if value is None or length:
        raise NatCompatError(errno.EINVAL, "the option takes an int")
    octets = bytes(value)
    if len(octets) != 4:
        raise NatCompatError(errno.EINVAL, f"an int has 4 bytes, not {len(octets)}")
    return any(octets)


def option_answer(value: int, *length: int) -> int | bytes:
    """Return the result of getsockopt for an int option: the int, or up to `length` of its bytes."""
    if not length or not length[0]:
        return value
    if not 0 < length[0] <= 1024:
        raise OSError("getsockopt buflen out of range")
    return value.to_bytes(4, sys.byteorder)[: length[0]]


def cut(message: Message, start: int, size: int, flags: int) -> Message:
    """Return `message` without its first `start` bytes, as if received into `size` bytes."""
    datagram, ancillary, message_flags, source = message
    if len(datagram) - start <= size:
        return (datagram[start:] if start else datagram), ancillary, message_flags, source
    # MSG_TRUNC as an argument asks for the real length
    end = None if flags & _MSG_TRUNC else start + size
    return datagram[start:end], ancillary, message_flags | _MSG_TRUNC, source


def receive(root: type[socket.socket], sock: Any, size: int, ancillary_size: int, flags: int) -> Message:
    """Receive one message, waiting as the timeout of `sock` says."""
    if hasattr(root, "recvmsg"):
        return root.recvmsg(sock, size, ancillary_size, flags)
    data, source = root.recvfrom(sock, size, flags)
    return data, [], 0, source


def receive_now(root: type[socket.socket], sock: Any, size: int, ancillary_size: int, flags: int) -> Message:
    """Receive one message without waiting. Raises BlockingIOError if the queue is empty."""
    if _of_gevent(root):  # its sockets wrap one that never waits
        inner = sock._sock
        return receive(type(inner), inner, size, ancillary_size, flags)
    if not sock.gettimeout():
        if not _MSG_DONTWAIT and not wait_readable(root, sock, 0):  # Windows
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return receive(root, sock, size, ancillary_size, flags | _MSG_DONTWAIT)
    with _never_waiting(sock) as alias:
        return receive(type(alias), alias, size, ancillary_size, flags)


def send_now(
    root: type[socket.socket],
    sock: Any,
    buffers: Sequence[bytes],
    ancillary: Sequence[tuple[int, int, bytes]],
    address: Any,
) -> int:
    """Send one datagram without waiting. Raises BlockingIOError if the buffer is full.

    Systems without ancillary data (Windows) send without it.
    """
    if _of_gevent(root):  # its sockets wrap one that never waits
        sock = sock._sock
        root = type(sock)
    elif sock.gettimeout():
        with _never_waiting(sock) as alias:
            return _send(type(alias), alias, buffers, ancillary, 0, address)
    return _send(root, sock, buffers, ancillary, _MSG_DONTWAIT, address)


def _send(
    root: type[socket.socket],
    sock: Any,
    buffers: Sequence[bytes],
    ancillary: Sequence[tuple[int, int, bytes]],
    flags: int,
    address: Any,
) -> int:
    if not hasattr(root, "sendmsg"):
        return root.sendto(sock, b"".join(buffers), flags, address)
    try:
        return root.sendmsg(sock, buffers, ancillary, flags, address)
    except OSError as error:
        # elsewhere than on Linux a connected socket takes no address, not even its peer's
        if error.errno != errno.EISCONN or sock.getpeername()[:2] != tuple(address)[:2]:
            raise
        return root.sendmsg(sock, buffers, ancillary, flags)


@contextlib.contextmanager
def _never_waiting(sock: Any) -> Iterator[socket.socket]:
    """Give a non-blocking object for the descriptor, since a timeout outweighs MSG_DONTWAIT."""
    import _socket

    alias: Any = _socket.socket(sock.family, sock.type, sock.proto, _descriptor(sock))
    try:
        alias.settimeout(0)  # the descriptor is non-blocking already
        yield alias
    finally:
        alias.detach()


def _of_gevent(root: type) -> bool:
    return root.__module__.startswith("gevent")


def _descriptor(sock: Any) -> int:
    descriptor: int = sock.fileno()
    if descriptor < 0:  # closed by another thread
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))
    return descriptor


def wait_readable(root: type, sock: Any, seconds: float) -> bool:
    """Wait until `sock` is readable, at most `seconds`; return whether it is."""
    if _of_gevent(root) and seconds > 0:
        from gevent.socket import wait_read

        try:
            wait_read(_descriptor(sock), seconds)
        except TimeoutError:
            return False
        return True
    # not DefaultSelector, which would make a descriptor; not select(), which knows only 1024
    with getattr(selectors, "PollSelector", selectors.SelectSelector)() as selector:
        selector.register(_descriptor(sock), selectors.EVENT_READ)
        return bool(selector.select(seconds))


def let_greenlets_run(root: type) -> None:
    """Let other greenlets run; a receive that returns at once does not."""
    if _of_gevent(root):
        import gevent

        gevent.sleep(0)


def on_event_loop() -> bool:
    """Return whether the caller runs on an event loop of asyncio or trio."""
    asyncio = sys.modules.get("asyncio")
    return (asyncio is not None and asyncio._get_running_loop() is not None) or in_trio_task()


def in_trio_task() -> bool:
    """Return whether the caller is a task of trio; trio has a function for that since 0.31."""
    trio = sys.modules.get("trio")
    if trio is None:
        return False
    try:
        trio.lowlevel.current_task()
    except RuntimeError:
        return False
    return True


def is_connected(sock: Any) -> bool:
    """Return whether `sock` is connected."""
    try:
        sock.getpeername()
    except OSError as error:
        return error.errno != errno.ENOTCONN
    return True


def own_address(sock: Any) -> Any:
    """Return the address at which `sock` can send to itself."""
    host, *rest = sock.getsockname()
    return ({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), *rest)  # noqa: S104


class SystemCalls(_Socket):
    """An endpoint's socket with the methods of its library class, as backends use it."""

    def __init__(self, sock: socket.socket, root: type[socket.socket]) -> None:
        self._sock, self._root = sock, root

    def __getattr__(self, name: str) -> Any:
        attribute = getattr(self._root, name)
        return attribute.__get__(self._sock) if hasattr(attribute, "__get__") else attribute
