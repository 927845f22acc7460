"""Datagram transports of asyncio that go through the socket object, on every loop of asyncio's.

asyncio's selector loop does not need them: its ``create_datagram_endpoint(sock=...)`` reads through the
socket object, too. uvloop and the Proactor of Windows read the descriptor without the object.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import errno
import socket
import time
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, TypeVar

from natcompat.endpoint.loops.nonblocking import make_nonblocking_endpoint
from natcompat.endpoint.loops.readiness import READ, WRITE, readiness
from natcompat.errors import NatCompatError, get_logger

if TYPE_CHECKING:
    from natcompat.backends.base import Backend, EspConsumer
    from natcompat.endpoint.endpoint import NatTEndpoint

_AnyProtocol = TypeVar("_AnyProtocol", bound=asyncio.DatagramProtocol)

_log = get_logger()
_LARGEST_MESSAGE: Final = 65535
_BURST: Final = 64  # datagrams that are read before the loop's other callbacks run
_READING_TIME: Final = 0.01  # seconds after which they run in any case
_UDP_HEADER: Final = 8  # bytes by which each datagram counts in the buffer besides its payload
_HIGH_WATER: Final = 64 * 1024


async def create_nat_t_endpoint(
    protocol_factory: Callable[[], _AnyProtocol],
    sock: socket.socket,
    *,
    backend: str | Backend | None = None,
    esp: EspConsumer | None = None,
) -> tuple[NatTTransport, _AnyProtocol]:
    """Return transport and protocol, like ``loop.create_datagram_endpoint(protocol_factory, sock=sock)``.

    It works on every asyncio loop: the selector loops, uvloop, and, with a thread that waits, those
    without ``add_reader`` (Proactor). `sock` gets the option if it does not have it, and belongs to the
    transport; `backend`, `esp` and the errors are those of `natcompat.set_nat_t_endpoint`.

    Unlike asyncio's transports before Python 3.13 this one sends empty datagrams. ``get_extra_info`` knows
    ``socket``, ``sockname``, ``peername`` and ``nat_t_endpoint``. While the kernel's buffer is full, up to
    twice the high-water mark is kept; further datagrams are dropped, and the protocol's
    ``error_received`` gets ENOBUFS for each.
    """
    loop = asyncio.get_running_loop()
    protocol = protocol_factory()
    transport = NatTTransport(loop, sock, protocol, make_nonblocking_endpoint(sock, backend, esp))
    try:
        transport.begin()
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
        self._buffered: collections.deque[tuple[bytes, Any]] = collections.deque()
        self._buffered_size = 0
        self.set_write_buffer_limits()
        self._readiness = readiness(loop, sock)

    def begin(self) -> None:
        """Call the protocol's ``connection_made`` and begin to read; `create_nat_t_endpoint` does so."""
        self._protocol.connection_made(self)
        if not self._closing:
            self._readiness.watch(READ, self._read_ready)

    def get_protocol(self) -> asyncio.BaseProtocol:
        """Return the protocol."""
        protocol: asyncio.BaseProtocol = self._protocol
        return protocol

    def set_protocol(self, protocol: asyncio.BaseProtocol) -> None:
        """Use `protocol` from now on."""
        self._protocol = protocol

    def is_closing(self) -> bool:
        """Whether `close` or `abort` was called, or the socket is gone."""
        return self._closing

    def close(self) -> None:
        """Read no more, send the buffered datagrams, then call ``connection_lost`` and close the socket."""
        if self._closing:
            return
        self._closing = True
        self._readiness.watch(READ, None)
        if not self._buffered:
            self._loop.call_soon(self._lose, None)

    def abort(self) -> None:
        """Close at once; buffered datagrams are not sent."""
        self._end(None)

    # --- reading ----------------------------------------------------------------------------------

    def _read_ready(self) -> None:
        end = time.monotonic() + _READING_TIME
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
        """Report an ICMP or network error to the protocol; a closed socket ends the transport."""
        if error.errno == errno.EBADF:
            self._end(error)
        else:
            self._protocol.error_received(error)

    # --- writing ----------------------------------------------------------------------------------

    def sendto(self, data: bytes | bytearray | memoryview, addr: Any = None) -> None:
        """Send `data`, empty or not, behind the marker to `addr`, or to the peer of a connected socket."""
        if not isinstance(data, (bytes, bytearray, memoryview)):
            raise TypeError(f"data argument must be a bytes-like object, not {type(data).__name__!r}")
        if self._closing:
            _log.warning("a datagram was dropped: sendto() was called on a transport that is closing")
            return
        if not self._buffered:
            try:
                self._send(data, addr)
                return
            except (BlockingIOError, InterruptedError):
                self._readiness.watch(WRITE, self._write_ready)
            except OSError as error:
                self._failed(error)
                return
        size = len(data) + _UDP_HEADER
        if self._buffered and self._buffered_size + size > 2 * self._high:
            self._protocol.error_received(
                NatCompatError(
                    errno.ENOBUFS,
                    "a datagram was dropped: the buffers of the kernel and of the transport are full",
                    "Send nothing between pause_writing() and resume_writing()",
                )
            )
            return
        self._buffered.append((bytes(data), addr))
        self._buffered_size += size
        if self._buffered_size > self._high and not self._paused:
            self._paused = True
            self._call_protocol("pause_writing")

    def _send(self, data: bytes | bytearray | memoryview, address: Any) -> None:
        if address is None:
            self._sock.send(data)
        else:
            self._sock.sendto(data, address)

    def _write_ready(self) -> None:
        for _ in range(min(_BURST, len(self._buffered))):
            data, address = self._buffered[0]
            try:
                self._send(data, address)
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                self._failed(error)
            if self._lost:
                return
            self._buffered.popleft()
            self._buffered_size -= len(data) + _UDP_HEADER
        if self._paused and self._buffered_size <= self._low:
            self._paused = False
            self._call_protocol("resume_writing")
        if not self._buffered and not self._lost:
            self._readiness.watch(WRITE, None)
            if self._closing:
                self._lose(None)

    def get_write_buffer_size(self) -> int:
        """Return the size of the buffered datagrams in bytes, eight for each header included."""
        return self._buffered_size

    def get_write_buffer_limits(self) -> tuple[int, int]:
        """Return the low- and the high-water mark in bytes."""
        return self._low, self._high

    def set_write_buffer_limits(self, high: int | None = None, low: int | None = None) -> None:
        """Set the marks in bytes at which the protocol is paused and resumed; see `asyncio`."""
        if high is None:
            high = _HIGH_WATER if low is None else 4 * low
        if low is None:
            low = high // 4
        if not 0 <= low <= high:
            raise ValueError(f"high ({high!r}) must be >= low ({low!r}) must be >= 0")
        self._low, self._high = low, high

    # --- end --------------------------------------------------------------------------------------

    def _end(self, error: OSError | None) -> None:
        """Drop buffered datagrams; the loop calls ``connection_lost``, as the protocol may be the caller."""
        if self._lost:
            return
        self._closing = self._lost = True
        self._buffered.clear()
        self._buffered_size = 0
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

    def _call_protocol(self, method: str) -> None:
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
