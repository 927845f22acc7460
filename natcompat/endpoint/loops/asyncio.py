"""Endpoints on event loops.

asyncio's selector loop needs nothing from here: its ``create_datagram_endpoint(sock=...)`` reads through
the socket object. uvloop and the Proactor of Windows read the descriptor behind Python's back; there
`create_nat_t_endpoint` takes its place. `open_nat_t_endpoint` is for ``await``, on asyncio and trio alike.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import contextvars
import errno
import logging
import socket
import sys
import time
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, Final, TypeVar

from natcompat.endpoint import get_nat_t_endpoint, set_nat_t_endpoint
from natcompat.endpoint.endpoint import NatTEndpoint
from natcompat.endpoint.loops.readiness import READ, WRITE, Waits, readiness, running_loop, waits_on
from natcompat.errors import NatCompatError

if TYPE_CHECKING:
    from typing import Self

    from natcompat.backends.base import Backend, EspConsumer

_AnyProtocol = TypeVar("_AnyProtocol", bound=asyncio.DatagramProtocol)

_log = logging.getLogger("natcompat")
_LARGEST_MESSAGE: Final = 65535
_BURST: Final = 64  # datagrams that are read before the loop's other callbacks have their turn
_TURN: Final = 0.01  # seconds after which they have it in any case
_UDP_HEADER: Final = 8  # what an empty datagram counts in the buffer
_HIGH_WATER: Final = 64 * 1024


# --- the objection -------------------------------------------------------------------------------

_own_use: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "natcompat's own use of a loop", default=False
)
_warned: weakref.WeakSet[NatTEndpoint] = weakref.WeakSet()


def object_to_bypassing_loop(sock: socket.socket) -> None:
    """Refuse or warn if the running event loop reads the descriptor of `sock` behind Python's back.

    Called for a socket that gets the option, which a transport may be reading already, and once more
    when an endpoint's socket becomes non-blocking, as these loops' transports make it. The Proactor
    of Windows reads whatever non-blocking socket it is given: EOPNOTSUPP. Of uvloop's there may be
    others, so it is a RuntimeWarning.
    """
    loop = asyncio._get_running_loop()
    if loop is None or _own_use.get():
        return
    problem = (
        f"datagram transports of {type(loop).__module__}.{type(loop).__name__} read the descriptor without "
        "this socket object, so that the application would see keepalives, ESP and the non-ESP marker"
    )
    remedy = "use natcompat.endpoint.loops.create_nat_t_endpoint() instead of create_datagram_endpoint()"
    endpoint = get_nat_t_endpoint(sock)
    if any(cls.__module__ == "asyncio.proactor_events" for cls in type(loop).__mro__):
        if endpoint is not None or sock.gettimeout() == 0:
            raise NatCompatError(
                errno.EOPNOTSUPP, problem, f"{remedy[0].upper()}{remedy[1:]}, or a SelectorEventLoop"
            )
        return
    if "uvloop" not in {cls.__module__.partition(".")[0] for cls in type(loop).__mro__}:
        return
    if endpoint is None:
        if not getattr(sock, "_io_refs", 0):  # its transports take a reference, as makefile() does
            return
    elif endpoint in _warned:
        return
    else:
        _warned.add(endpoint)
    warnings.warn(f"{problem}: {remedy}", RuntimeWarning, stacklevel=_stacklevel_of_application())


def _stacklevel_of_application() -> int:
    """Return the stacklevel, for a warning of the caller's, that names the application's line."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "natcompat",
        "asyncio",
        "uvloop",
    ):
        level, frame = level + 1, frame.f_back
    return level


@contextlib.contextmanager
def _without_warning() -> Iterator[None]:
    token = _own_use.set(True)
    try:
        yield
    finally:
        _own_use.reset(token)


def _make_endpoint(
    sock: socket.socket, backend: str | Backend | None, esp: EspConsumer | None
) -> NatTEndpoint:
    """Set the option, and the mode that loops need."""
    with _without_warning():
        endpoint = set_nat_t_endpoint(sock, backend=backend, esp=esp)
        sock.setblocking(False)
    return endpoint


# --- transports ----------------------------------------------------------------------------------


async def create_nat_t_endpoint(
    protocol_factory: Callable[[], _AnyProtocol],
    sock: socket.socket,
    *,
    backend: str | Backend | None = None,
    esp: EspConsumer | None = None,
) -> tuple[NatTTransport, _AnyProtocol]:
    """Return transport and protocol, like ``loop.create_datagram_endpoint(protocol_factory, sock=sock)``.

    On every loop of asyncio's: the selector loops, uvloop, and by a thread that waits those without
    ``add_reader`` (Proactor). `sock` gets the option if it has not got it; `backend` and `esp` as for
    `natcompat.set_nat_t_endpoint`, and so are the errors. It belongs to the transport then.

    Unlike asyncio's transports (before 3.13) this one sends empty datagrams. ``get_extra_info`` knows
    ``socket``, ``sockname``, ``peername`` and ``nat_t_endpoint``. When the kernel takes no more, what
    waits is bounded by twice the high-water mark; what comes on top is dropped, and the protocol's
    ``error_received`` gets ENOBUFS.
    """
    loop = asyncio.get_running_loop()
    protocol = protocol_factory()
    transport = NatTTransport(loop, sock, protocol, _make_endpoint(sock, backend, esp))
    try:
        transport._begin()
    except BaseException:
        transport.abort()
        raise
    return transport, protocol


class NatTTransport(asyncio.DatagramTransport):
    """A datagram transport that goes through the socket object; made by `create_nat_t_endpoint`."""

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        sock: socket.socket,
        protocol: asyncio.DatagramProtocol,
        endpoint: NatTEndpoint,
    ) -> None:
        peer = None
        with contextlib.suppress(OSError):  # not connected
            peer = sock.getpeername()
        super().__init__(
            {
                "socket": sock,
                "sockname": sock.getsockname(),
                "peername": peer,
                "nat_t_endpoint": endpoint,
            }
        )
        self._loop, self._sock = loop, sock
        self._protocol: Any = protocol
        self._closing = self._lost = self._paused = False
        self._waiting: collections.deque[tuple[bytes, Any]] = collections.deque()
        self._waiting_size = 0
        self.set_write_buffer_limits()
        self._readiness = readiness(loop, sock)

    def _begin(self) -> None:
        """Tell the protocol, and read."""
        self._protocol.connection_made(self)
        if not self._closing:
            self._readiness.watch(READ, self._read_ready)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the protocol."""
        protocol: asyncio.BaseProtocol = self._protocol
        return protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Tell `protocol` from now on."""
        self._protocol = protocol

    def is_closing(self) -> bool:
        """Whether `close` or `abort` was called, or the socket is gone."""
        return self._closing

    def close(self) -> None:
        """Read no more, send what waits, then tell the protocol and close the socket."""
        if self._closing:
            return
        self._closing = True
        self._readiness.watch(READ, None)
        if not self._waiting:
            self._loop.call_soon(self._lose, None)

    def abort(self) -> None:
        """Close at once; what waits is not sent."""
        self._end(None)

    # --- reading -----------------------------------------------------------------------------------

    def _read_ready(self) -> None:
        end = time.monotonic() + _TURN
        for _ in range(_BURST):
            if self._closing:
                return
            try:
                data, source = self._sock.recvfrom(_LARGEST_MESSAGE)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._failed(error)
            else:
                self._protocol.datagram_received(data, source)
            if time.monotonic() > end:
                return

    def _failed(self, error: OSError) -> None:
        """Pass on an error of the peer's (ICMP) or the network's; only a closed socket ends anything."""
        if error.errno == errno.EBADF:
            self._end(error)
        else:
            self._protocol.error_received(error)

    # --- writing -----------------------------------------------------------------------------------

    def sendto(self, data: bytes | bytearray | memoryview, addr: Any = None) -> None:
        """Send `data`, empty or not, behind the marker to `addr`, or to the peer of a connected socket."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        if self._closing:
            _log.warning("sendto() on a transport that is closing: dropped")
            return
        if not self._waiting:
            try:
                self._send(data, addr)
                return
            except (BlockingIOError, InterruptedError):
                self._readiness.watch(WRITE, self._write_ready)
            except OSError as error:
                self._failed(error)
                return
        size = len(data) + _UDP_HEADER
        if self._waiting and self._waiting_size + size > 2 * self._high:
            self._protocol.error_received(
                NatCompatError(
                    errno.ENOBUFS,
                    "a datagram was dropped: the kernel takes no more, and the transport's buffer is full",
                    "Send no more between pause_writing() and resume_writing()",
                )
            )
            return
        self._waiting.append((bytes(data), addr))
        self._waiting_size += size
        if self._waiting_size > self._high and not self._paused:
            self._paused = True
            self._tell("pause_writing")

    def _send(self, data: bytes | bytearray | memoryview, address: Any) -> None:
        if address is None:
            self._sock.send(data)
        else:
            self._sock.sendto(data, address)

    def _write_ready(self) -> None:
        for _ in range(min(_BURST, len(self._waiting))):
            data, address = self._waiting[0]
            try:
                self._send(data, address)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._failed(error)
            if self._lost:
                return
            self._waiting.popleft()
            self._waiting_size -= len(data) + _UDP_HEADER
        if self._paused and self._waiting_size <= self._low:
            self._paused = False
            self._tell("resume_writing")
        if not self._waiting and not self._lost:
            self._readiness.watch(WRITE, None)
            if self._closing:
                self._lose(None)

    def get_write_buffer_size(self) -> int:
        """Return the bytes that wait for the kernel; each datagram counts eight for its header."""
        return self._waiting_size

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return the low- and the high-water mark in bytes."""
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the marks that pause and resume the protocol, as on other transports."""
        if high is None:
            high = _HIGH_WATER if low is None else 4 * low
        if low is None:
            low = high // 4
        if not 0 <= low <= high:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self._low, self._high = low, high

    # --- end -----------------------------------------------------------------------------------------

    def _end(self, error: OSError | None) -> None:
        """Drop what waits; the protocol hears of it in the loop's next turn, since it may be calling."""
        if self._lost:
            return
        self._closing = self._lost = True
        self._waiting.clear()
        self._waiting_size = 0
        self._readiness.close()
        self._loop.call_soon(self._finish, error)

    def _lose(self, error: OSError | None) -> None:
        if not self._lost:
            self._lost = True
            self._readiness.close()
            self._finish(error)

    def _finish(self, error: OSError | None) -> None:
        try:
            self._protocol.connection_lost(error)
        finally:
            self._sock.close()

    def _tell(self, method: str) -> None:
        try:
            getattr(self._protocol, method)()
        except Exception as error:  # noqa: BLE001 - the protocol's fault, reported as asyncio does
            self._loop.call_exception_handler(
                {
                    "message": f"protocol.{method}() failed",
                    "exception": error,
                    "transport": self,
                    "protocol": self._protocol,
                }
            )

    def __repr__(self) -> str:
        state = "closed" if self._lost else "closing" if self._closing else "open"
        return f"<natcompat.endpoint.loops.asyncio transport {state} {self._sock!r}>"

    def __del__(self, _warn: Any = warnings.warn) -> None:
        if not getattr(self, "_lost", True):
            with contextlib.suppress(RuntimeError):  # the loop is closed
                self._readiness.close()
            self._sock.close()
            _warn(f"unclosed transport {self!r}", ResourceWarning, source=self)


# --- awaitable sockets -----------------------------------------------------------------------------


def open_nat_t_endpoint(
    sock: socket.socket, *, backend: str | Backend | None = None, esp: EspConsumer | None = None
) -> AsyncNatTSocket:
    """Return an object that receives and sends by ``await``, on the running asyncio or trio loop.

    `sock` gets the option if it has not got it; `backend` and `esp` as for
    `natcompat.set_nat_t_endpoint`, and so are the errors. It belongs to the object then::

        async with open_nat_t_endpoint(sock) as ike:
            message, source = await ike.recvfrom(65535)

    Raises RuntimeError outside of a running loop.
    """
    running_loop()
    endpoint = _make_endpoint(sock, backend, esp)
    return AsyncNatTSocket(sock, endpoint, waits_on(sock))


class AsyncNatTSocket:
    """A socket with the option on an event loop; made by `open_nat_t_endpoint` alone.

    Any number of tasks of that loop may receive and send. Every call lets other tasks run, so no flood
    starves them.
    """

    def __init__(self, sock: socket.socket, endpoint: NatTEndpoint, waits: Waits) -> None:
        self._sock, self._endpoint, self._waits = sock, endpoint, waits

    @property
    def endpoint(self) -> NatTEndpoint:
        """The endpoint, for its counters and keepalives."""
        return self._endpoint

    async def recvfrom(self, bufsize: int) -> tuple[bytes, Any]:
        """Receive one message, without the marker, and its source.

        Raises OSError: ICMP errors of a connected socket; EBADF when it is closed, meanwhile too.
        """
        await self._waits.checkpoint()
        while True:
            try:
                return self._sock.recvfrom(bufsize)
            except (BlockingIOError, InterruptedError):
                await self._waits.wait(READ)

    async def sendto(self, data: bytes | bytearray | memoryview, address: Any = None) -> int:
        """Send `data` behind the marker to `address`, or to the peer; returns the length of `data`."""
        await self._waits.checkpoint()
        while True:
            try:
                return self._sock.send(data) if address is None else self._sock.sendto(data, address)
            except (BlockingIOError, InterruptedError):
                await self._waits.wait(WRITE)

    def close(self) -> None:
        """Close the socket, and with it the endpoint. Tasks that wait get EBADF. May be repeated."""
        if self._sock.fileno() >= 0:
            self._waits.close()
            self._sock.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
