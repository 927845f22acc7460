"""The process's half: a socket class that strips, drops, diverts and inserts.

`set_nat_t_endpoint` changes the class of the application's socket object, not the object. The new
class is made per endpoint, with the bases (the application's class, `NatTSocket`, the library's
socket class), so that overrides of the application's run first and their ``super()`` comes here.
"""

from __future__ import annotations

import errno
import socket
import sys
import time
import types
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Final

from natcompat.contract import MARKER_LENGTH, NON_ESP_MARKER, UDP_NAT_T_ENDPOINT
from natcompat.diversion import Counters, Diversion, HandBack
from natcompat.errors import NatCompatError
from natcompat.system import (
    Message,
    cut,
    option_answer,
    option_value,
    own_address,
    receive,
    receive_now,
    wait_readable,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    _Socket = socket.socket
else:
    _Socket = object

HEADROOM: Final = HandBack.HEADROOM
LARGEST_DATAGRAM: Final = 65535
_MSG_ERRQUEUE: Final = getattr(socket, "MSG_ERRQUEUE", 0)
_MSG_PEEK: Final = socket.MSG_PEEK
_MSG_MORE: Final = getattr(socket, "MSG_MORE", 0)
_IOV_MAX: Final = 1024

# include/uapi/linux/udp.h: options that make one send several datagrams, or several sends one
_UDP_CORK: Final = 1
_UDP_SEGMENT: Final = 103
_REFUSED_OPTIONS: Final = (
    {(socket.IPPROTO_UDP, _UDP_CORK): "UDP_CORK", (socket.IPPROTO_UDP, _UDP_SEGMENT): "UDP_SEGMENT"}
    if sys.platform == "linux"
    else {}
)


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
        self.original = original
        """The class that the socket had."""
        self.root = root
        """The library's class at its root, whose methods are the system calls."""
        self.diversion = diversion
        self.counters: Counters = diversion.counters
        self.prefix = diversion.hand_back.prefix
        self.unwrap = diversion.hand_back.unwrap
        self.room = LARGEST_DATAGRAM
        """What to receive at least, so that ESP comes whole; 0 once the kernel delivers IKE alone."""
        self.draining = False
        """Whether it will be 0 once the queue has no datagrams from before that."""
        self.unbound = False
        """Whether something is to be done at the bind that a send implies."""
        self.in_piece = False
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


class NatTSocket(_Socket):
    """The methods of a socket with the option; found in the class of every endpoint's socket.

    Every method does what the one of `socket.socket` does, with the marker stripped and inserted and
    what is not IKE gone. Timeouts are deadlines: what is dropped on the way does not prolong them.

    ``makefile`` reads a bare marker, a datagram of length zero, as the end of the file. Descriptors
    that this object does not know of (``os.dup``, ``fileno=``, ``detach``) keep what the kernel does
    and lose what the process does.
    """

    __slots__ = ()

    _nat_t: ClassVar[ProcessHalf]

    # --- receiving -----------------------------------------------------------------------------

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """Receive one message; see `socket.recv(2)`."""
        half = _half(self)
        if half is None:
            return self.recv(bufsize, flags)
        if flags or bufsize < 0 or half.draining:
            return self._receive(half, bufsize, 0, flags)[0]
        begun = time.monotonic()
        datagram = half.root.recv(self, half.room or bufsize + HEADROOM)
        if datagram[:MARKER_LENGTH] == NON_ESP_MARKER and not datagram.startswith(half.prefix):
            half = _half(self)  # it may have been switched off while this thread waited
            if half is not None:
                half.counters.ike += 1
                return datagram[MARKER_LENGTH : MARKER_LENGTH + bufsize]
        return self._receive(half, bufsize, 0, 0, (datagram, [], 0, None), begun)[0]

    def recvfrom(self, bufsize: int, flags: int = 0, /) -> tuple[bytes, Any]:
        """Receive one message and its source; see `recvfrom(2)`."""
        half = _half(self)
        if half is None:
            return self.recvfrom(bufsize, flags)
        if flags or bufsize < 0 or half.draining:
            message = self._receive(half, bufsize, 0, flags)
            return message[0], message[3]
        begun = time.monotonic()
        datagram, source = half.root.recvfrom(self, half.room or bufsize + HEADROOM)
        if datagram[:MARKER_LENGTH] == NON_ESP_MARKER and not datagram.startswith(half.prefix):
            half = _half(self)
            if half is not None:
                half.counters.ike += 1
                return datagram[MARKER_LENGTH : MARKER_LENGTH + bufsize], source
        message = self._receive(half, bufsize, 0, 0, (datagram, [], 0, source), begun)
        return message[0], message[3]

    def recv_into(self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0) -> int:
        """Receive one message into `buffer`; only IKE is ever written there."""
        return self.recvfrom_into(buffer, nbytes, flags)[0]

    def recvfrom_into(self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0) -> tuple[int, Any]:
        """Receive one message into `buffer`, and its source."""
        with memoryview(buffer) as view, view.cast("B") as octets:
            if nbytes < 0:
                raise ValueError("negative buffersize in recvfrom_into")
            if nbytes > len(octets):
                raise ValueError("nbytes is greater than the length of the buffer")
            data, source = NatTSocket.recvfrom(self, nbytes or len(octets), flags)
            # with MSG_TRUNC the length is the datagram's, which may be more than came
            held = min(len(data), len(octets))
            octets[:held] = data[:held]
        return len(data), source

    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /) -> Message:
        """Receive one message with its ancillary data; see `recvmsg(2)`.

        MSG_ERRQUEUE reads are not classified: they return what was sent, without the marker.
        """
        return self._receive(_half(self), bufsize, ancbufsize, flags)

    def recvmsg_into(
        self, buffers: Iterable[WriteableBuffer], ancbufsize: int = 0, flags: int = 0, /
    ) -> tuple[int, list[tuple[int, int, bytes]], int, Any]:
        """Receive one message, scattered over `buffers`, with its ancillary data."""
        views = [memoryview(buffer).cast("B") for buffer in buffers]
        room = sum(map(len, views))
        data, ancillary, message_flags, source = self._receive(_half(self), room, ancbufsize, flags)
        rest = memoryview(data)[:room]
        for view in views:
            count = min(len(view), len(rest))
            view[:count] = rest[:count]
            rest = rest[count:]
        return len(data), ancillary, message_flags, source

    def _receive(
        self,
        half: ProcessHalf | None,
        size: int,
        ancillary_size: int,
        flags: int,
        first: Message | None = None,
        begun: float | None = None,
    ) -> Message:
        """Receive until IKE comes, the deadline passes or there is an error.

        `first` came already, to a receive that had `begun` then (``time.monotonic``).
        """
        if half is None:  # switched off between the call and here
            return (
                cut(first, 0, size, flags) if first is not None else self.recvmsg(size, ancillary_size, flags)
            )
        if size < 0:
            raise ValueError("negative buffer size in receive")
        timeout = self.gettimeout()
        deadline = (begun or time.monotonic()) + timeout if timeout else None
        # ESP has to come whole even where the application's buffer is small
        room = max(size + HEADROOM, LARGEST_DATAGRAM)
        message = first or receive(half.root, self, room, ancillary_size, flags)
        while True:
            half = _half(self)  # it may have been switched off, or on anew, while this thread waited
            if half is None:
                return cut(message, 0, size, flags)
            if flags & _MSG_ERRQUEUE:
                led = message[0].startswith(NON_ESP_MARKER)
                return cut(message, MARKER_LENGTH if led else 0, size, flags)
            if half.draining and not wait_readable(half.root, self, 0):
                half.draining, half.room = False, 0
            datagram, ancillary, message_flags, source = message
            if datagram.startswith(NON_ESP_MARKER):
                if not flags & _MSG_PEEK:
                    half.counters.ike += 1
                returned = half.unwrap(datagram)
                if returned is None:
                    return cut(message, MARKER_LENGTH, size, flags)
                return cut((returned[0], ancillary, message_flags, returned[1]), 0, size, flags)
            if flags & _MSG_PEEK:
                self._discard_peeked(half)
            elif message is first and len(datagram) == size + HEADROOM:
                half.diversion.error(
                    "ESP came to a receive that the kernel had been trusted with, and was cut"
                )
            else:
                half.diversion.take([(memoryview(datagram), source)])
            message = self._receive_until(half.root, deadline, room, ancillary_size, flags)

    def _discard_peeked(self, half: ProcessHalf) -> None:
        """Take from the queue what a peek showed not to be IKE.

        Another thread may have been faster; what comes then may be IKE, and goes back to the end of
        the queue through a datagram to ourselves.
        """
        try:
            datagram, _, _, source = receive_now(half.root, self, LARGEST_DATAGRAM, 0, 0)
        except BlockingIOError:
            return
        if not datagram.startswith(NON_ESP_MARKER):
            half.diversion.take([(memoryview(datagram), source)])
            return
        returned = half.unwrap(datagram)
        message, source = returned or (datagram[MARKER_LENGTH:], source)
        try:
            half.root.sendto(self, half.diversion.hand_back.wrap(message, source), own_address(self))
        except OSError as error:
            half.diversion.error(f"IKE that a peek displaced could not be handed back: {error}")

    def _receive_until(
        self, root: type[socket.socket], deadline: float | None, size: int, ancillary_size: int, flags: int
    ) -> Message:
        """Receive once more, by `deadline` (None: as the socket's mode says)."""
        if deadline is None:
            return receive(root, self, size, ancillary_size, flags)
        while True:
            try:
                return receive_now(root, self, size, ancillary_size, flags)
            except BlockingIOError:
                remaining = deadline - time.monotonic()
                if remaining <= 0 or not wait_readable(root, self, remaining):
                    raise TimeoutError("timed out") from None

    # --- sending -------------------------------------------------------------------------------

    def send(self, data: ReadableBuffer, flags: int = 0, **timeout: Any) -> int:
        """Send `data` as one datagram behind the marker; returns the bytes of `data` that were sent."""
        return self._send(data, flags, None, timeout)

    def sendall(self, data: ReadableBuffer, flags: int = 0, /) -> None:
        """Send `data` as one datagram behind the marker."""
        self._send(data, flags, None, {})

    def sendto(self, data: ReadableBuffer, flags_or_address: Any, address: Any = None, /) -> int:
        """Send `data` as one datagram behind the marker to `address`.

        Raises OSError: EMSGSIZE above `natcompat.contract.LARGEST_PAYLOAD`.
        """
        if address is None:
            flags, address = 0, flags_or_address
        else:
            flags = flags_or_address
        half = _half(self)
        if half is None:
            return self.sendto(data, flags, address)
        if flags or half.unbound or half.in_piece or half.note_sent is not None:
            return self._send(data, flags, address, {})
        sent = half.root.sendto(self, NON_ESP_MARKER + data, address)
        half.counters.markers_inserted += 1
        return sent - MARKER_LENGTH

    def sendmsg(
        self,
        buffers: Iterable[ReadableBuffer],
        ancdata: Iterable[tuple[int, int, ReadableBuffer]] = (),
        flags: int = 0,
        address: Any = None,
        /,
    ) -> int:
        """Send the concatenated `buffers` as one datagram behind the marker, with ancillary data."""
        half = _half(self)
        if half is None:
            return self.sendmsg(buffers, ancdata, flags, address)
        ancillary = list(ancdata)
        for level, option, _ in ancillary:
            _refuse_option(level, option)
        pieces = list(buffers)
        if len(pieces) >= _IOV_MAX:
            pieces = [b"".join(pieces)]
        return self._send_pieces(half, pieces, ancillary, flags, address)

    def _send(self, data: ReadableBuffer, flags: int, address: Any, timeout: dict[str, Any]) -> int:
        half = _half(self)
        if half is None:
            return self.sendto(data, flags, address) if address is not None else self.send(data, flags)
        if flags & ~_MSG_MORE == 0 or not hasattr(half.root, "sendmsg"):
            return self._begin(
                half,
                flags,
                address,
                lambda lead: self._send_joined(half, lead, data, flags, address, timeout),
            )
        return self._send_pieces(half, [data], [], flags, address)

    def _send_joined(
        self,
        half: ProcessHalf,
        lead: bytes,
        data: ReadableBuffer,
        flags: int,
        address: Any,
        timeout: dict[str, Any],
    ) -> int:
        datagram = lead + data
        if address is None:
            return half.root.send(self, datagram, flags, **timeout)
        return half.root.sendto(self, datagram, flags, address)

    def _send_pieces(
        self, half: ProcessHalf, pieces: list[Any], ancillary: list[Any], flags: int, address: Any
    ) -> int:
        # the application's buffers themselves go down: with MSG_ZEROCOPY the kernel keeps them
        destination = () if address is None else (address,)
        return self._begin(
            half,
            flags,
            address,
            lambda lead: half.root.sendmsg(
                self, [lead, *pieces] if lead else pieces, ancillary, flags, *destination
            ),
        )

    def _begin(self, half: ProcessHalf, flags: int, address: Any, send: Callable[[bytes], int]) -> int:
        """Send with the marker, or without it the rest of a datagram that MSG_MORE began."""
        if half.unbound:
            _bind_implicitly(self)
        lead = b"" if half.in_piece else NON_ESP_MARKER
        half.in_piece = False  # an error ends the pending datagram (udp_flush_pending_frames)
        sent = send(lead)
        half.in_piece = bool(flags & _MSG_MORE)
        if lead:
            half.counters.markers_inserted += 1
        if half.note_sent is not None:
            half.note_sent(address)
        return sent - len(lead)

    # --- what changes the way in which the socket is served --------------------------------------

    def bind(self, address: Any, /) -> None:
        """Bind, and take up what the option could not do before."""
        self._rearrange("bind", lambda root: root.bind(self, address))

    def connect(self, address: Any, /) -> None:
        """Connect; the mode in which the endpoint is served may change."""
        self._rearrange("connect", lambda root: root.connect(self, address))

    def connect_ex(self, address: Any, /) -> int:
        """Connect and return an errno; the mode in which the endpoint is served may change."""
        return int(self._rearrange("connect", lambda root: root.connect_ex(self, address)))

    def setsockopt(self, level: int, option: int, value: Any, *length: Any) -> None:
        """Set an option; UDP_NAT_T_ENDPOINT too, as on Solaris.

        Raises OSError: EOPNOTSUPP for UDP_SEGMENT and UDP_CORK, with which one send is not one
        datagram, so that markers would be missing.
        """
        half = _half(self)
        if half is None:
            self.setsockopt(level, option, value, *length)
            return
        if (level, option) == (socket.IPPROTO_UDP, UDP_NAT_T_ENDPOINT):
            half.set_option(self, option_value(value, *length))
            return
        if value:
            _refuse_option(level, option)
        if (level, option) in half.hidden and (level, option) not in half.sensitive:
            half.hidden[level, option] = int(option_value(value, *length))
            return
        self._rearrange((level, option), lambda root: root.setsockopt(self, level, option, value, *length))

    def getsockopt(self, level: int, option: int, *length: int) -> Any:
        """Read an option; UDP_NAT_T_ENDPOINT too, as on Solaris."""
        half = _half(self)
        if half is None:
            return self.getsockopt(level, option, *length)
        if (level, option) == (socket.IPPROTO_UDP, UDP_NAT_T_ENDPOINT):
            return option_answer(1, *length)
        if (level, option) in half.hidden:
            return option_answer(half.hidden[level, option], *length)
        return half.root.getsockopt(self, level, option, *length)

    def _rearrange(self, what: str | tuple[int, int], operation: Callable[[type[socket.socket]], Any]) -> Any:
        half = _half(self)
        if half is None:
            return operation(type(self))
        if what not in half.sensitive:
            return operation(half.root)
        return half.rearrange(self, lambda: operation(half.root))

    # --- identity and end ------------------------------------------------------------------------

    def dup(self) -> NatTSocket:
        """Return another object for the same socket; the option holds on both."""
        half = _half(self)
        if half is None:
            return self.dup()
        other = half.root.dup(self)
        half.alias_made(other)
        return other

    def detach(self) -> int:
        """Give up the descriptor. It keeps what the kernel does and loses what the process does."""
        half = _half(self)
        if half is None:
            return self.detach()
        half.alias_closed(self)
        return half.root.detach(self)

    def _real_close(self, *arguments: Any) -> None:
        half = _half(self)
        if half is None:
            self._real_close(*arguments)
            return
        half.alias_closed(self)  # before: a socket of ours that outlives this one would hold the port
        half.root._real_close(self, *arguments)  # type: ignore[attr-defined]

    def setblocking(self, flag: bool, /) -> None:
        """Set the blocking mode; warns where a uvloop loop, which comes next, would bypass this object."""
        half = _half(self)
        if half is None:
            self.setblocking(flag)
            return
        if not flag and "uvloop" in sys.modules:
            from natcompat.aio import warn_of_bypassing_loop

            warn_of_bypassing_loop()
        half.root.setblocking(self, flag)

    def __reduce__(self) -> tuple[Any, ...]:
        # for multiprocessing, which knows how to send plain sockets alone
        from multiprocessing.reduction import DupFd

        from natcompat.endpoint import _arrive

        half = self._nat_t
        return _arrive, (
            half.original,
            DupFd(self.fileno()),
            self.family,
            self.type,
            self.proto,
            self.gettimeout(),
        )

    def __reduce_ex__(self, protocol: object, /) -> tuple[Any, ...]:
        return self.__reduce__()


def make_class(half: ProcessHalf) -> type[NatTSocket]:
    """Return a new class for the sockets of the endpoint that `half` belongs to.

    Raises TypeError if the application's class cannot be combined with `NatTSocket`.
    """
    core = _cores.get(half.root)
    if core is None:
        core = _cores[half.root] = type(
            "NatTSocket", (NatTSocket, half.root), {"__slots__": (), "__module__": __name__}
        )
    bases = (core,) if half.original is half.root else (half.original, core)
    namespace = {
        "__slots__": (),
        "__module__": half.original.__module__,
        "__qualname__": f"{half.original.__qualname__}[NAT-T]",
        "_nat_t": half,
    }
    made: type[NatTSocket] = types.new_class(
        half.original.__name__, bases, exec_body=lambda body: body.update(namespace)
    )
    return made


_cores: dict[type, type] = {}


def _half(sock: Any) -> ProcessHalf | None:
    """Return what the socket's class holds now, None once it is plain again."""
    return getattr(sock, "_nat_t", None)


def _bind_implicitly(sock: NatTSocket) -> None:
    sock.bind(("::" if sock.family == socket.AF_INET6 else "0.0.0.0", 0))  # noqa: S104 - as the kernel would


def refuse_set_options(root: type[socket.socket], sock: Any) -> None:
    """Raise `NatCompatError` (EOPNOTSUPP) if an option is set on `sock` that cannot go with ours."""
    for level, option in _REFUSED_OPTIONS:
        try:
            value = root.getsockopt(sock, level, option)
        except OSError:  # not known here
            continue
        if value:
            _refuse_option(level, option)


def _refuse_option(level: int, option: int) -> None:
    name = _REFUSED_OPTIONS.get((level, option))
    if name is not None:
        raise NatCompatError(
            errno.EOPNOTSUPP,
            f"{name} does not go with UDP_NAT_T_ENDPOINT: one send would not be one datagram with one marker",
            "Send the messages one by one",
        )
