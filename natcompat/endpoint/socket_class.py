"""The socket class that strips, drops, diverts and inserts: the methods an application calls.

`set_nat_t_endpoint` changes the class of the application's socket object, not the object. The new
class is made per endpoint, with the bases (the application's class, `NatTSocket`, the library's
socket class), so that overrides of the application's run first and their ``super()`` comes here.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import time
import types
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, ClassVar, Final

from natcompat.backends.system_calls import Message, option_answer, option_value
from natcompat.contract import MARKER_LENGTH, NON_ESP_MARKER, UDP_NAT_T_ENDPOINT
from natcompat.endpoint.admission import REFUSED_OPTIONS, refuse_option
from natcompat.endpoint.receive import (
    HEADROOM,
    ProcessHalf,
    half_of,
    receive_ike,
    root_of,
    send_message,
    send_pieces,
)

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    _Socket = socket.socket
else:
    _Socket = object

_IOV_MAX: Final = 1024
_NO_ADDRESS: Final[Any] = object()


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
        """Receive one message; see `recv(2)`."""
        half = half_of(self)
        if half is None or bufsize <= 0:  # asked for no byte, Python takes no datagram
            return root_of(self).recv(self, bufsize, flags)
        if flags or half.room or half.draining:  # whoever takes ESP is to know its source
            return NatTSocket.recvfrom(self, bufsize, flags)[0]
        root = half.root
        datagram = root.recv(self, bufsize + HEADROOM)
        # it may have been switched off while this thread waited
        if half.on and datagram[:MARKER_LENGTH] == NON_ESP_MARKER and not datagram.startswith(half.prefix):
            half.counters.ike += 1
            return datagram[MARKER_LENGTH : MARKER_LENGTH + bufsize]
        return receive_ike(self, root, bufsize, 0, 0, (datagram, [], 0, None))[0]

    def recvfrom(self, bufsize: int, flags: int = 0, /) -> tuple[bytes, Any]:
        """Receive one message and its source; see `recvfrom(2)`."""
        try:
            half = self._nat_t  # half_of() without a call
        except AttributeError:
            return root_of(self).recvfrom(self, bufsize, flags)
        root = half.root
        if flags or bufsize < 0 or half.draining:
            message = receive_ike(self, root, bufsize, 0, flags)
            return message[0], message[3]
        begun = time.monotonic() if half.room else None
        datagram, source = root.recvfrom(self, half.room or bufsize + HEADROOM)
        # it may have been switched off while this thread waited
        if half.on and datagram[:MARKER_LENGTH] == NON_ESP_MARKER and not datagram.startswith(half.prefix):
            half.counters.ike += 1
            return datagram[MARKER_LENGTH : MARKER_LENGTH + bufsize], source
        message = receive_ike(self, root, bufsize, 0, 0, (datagram, [], 0, source), begun)
        return message[0], message[3]

    def recv_into(self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0) -> int:
        """Receive one message into `buffer`; only IKE is ever written there."""
        with _octets(buffer, nbytes) as octets:
            return _fill([octets], NatTSocket.recv(self, len(octets), flags))

    def recvfrom_into(self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0) -> tuple[int, Any]:
        """Receive one message into `buffer`, and its source."""
        with _octets(buffer, nbytes) as octets:
            data, source = NatTSocket.recvfrom(self, len(octets), flags)
            return _fill([octets], data), source

    def recvmsg(self, bufsize: int, ancbufsize: int = 0, flags: int = 0, /) -> Message:
        """Receive one message with its ancillary data; see `recvmsg(2)`.

        MSG_ERRQUEUE reads are not classified: they return what was sent, without the marker.
        """
        half = half_of(self)
        if half is None:
            return root_of(self).recvmsg(self, bufsize, ancbufsize, flags)
        return receive_ike(self, half.root, bufsize, ancbufsize, flags)

    def recvmsg_into(
        self, buffers: Iterable[WriteableBuffer], ancbufsize: int = 0, flags: int = 0, /
    ) -> tuple[int, list[tuple[int, int, bytes]], int, Any]:
        """Receive one message, scattered over `buffers`, with its ancillary data."""
        with contextlib.ExitStack() as views:
            pieces = [views.enter_context(_octets(buffer)) for buffer in buffers]
            room = sum(map(len, pieces))
            data, ancillary, message_flags, source = NatTSocket.recvmsg(self, room, ancbufsize, flags)
            return _fill(pieces, data), ancillary, message_flags, source

    # --- sending -------------------------------------------------------------------------------

    def send(self, data: ReadableBuffer, flags: int = 0, **timeout: Any) -> int:
        """Send `data` as one datagram behind the marker; returns the bytes of `data` that were sent."""
        half: ProcessHalf | None = getattr(self, "_nat_t", None)
        if half is None:
            return root_of(self).send(self, data, flags, **timeout)
        if flags or timeout or half.unbound or half.in_piece or half.note_sent is not None:
            return send_message(self, half, data, flags, **timeout)
        datagram = NON_ESP_MARKER + data if type(data) is bytes else b"".join((NON_ESP_MARKER, data))
        sent = half.root.send(self, datagram)
        half.counters.markers_inserted += 1
        return sent - MARKER_LENGTH

    def sendall(self, data: ReadableBuffer, flags: int = 0, /) -> None:
        """Send `data` as one datagram behind the marker."""
        NatTSocket.send(self, data, flags)

    def sendto(self, data: ReadableBuffer, flags_or_address: Any, address: Any = _NO_ADDRESS, /) -> int:
        """Send `data` as one datagram behind the marker to `address`.

        Raises OSError: EMSGSIZE above `natcompat.contract.LARGEST_PAYLOAD`.
        """
        if address is _NO_ADDRESS:
            flags, address = 0, flags_or_address
        else:
            flags = flags_or_address
        try:
            half = self._nat_t
        except AttributeError:
            return root_of(self).sendto(self, data, flags, address)
        if flags or half.unbound or half.in_piece or half.note_sent is not None:
            if address is None:  # to sendmsg() that means the peer
                raise TypeError("sendto() takes an address, not None")
            return send_message(self, half, data, flags, (address,))
        # + is faster, but asks what is not bytes (numpy's arrays) for its opinion
        datagram = NON_ESP_MARKER + data if type(data) is bytes else b"".join((NON_ESP_MARKER, data))
        sent = half.root.sendto(self, datagram, address)
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
        half = half_of(self)
        if half is None:
            return root_of(self).sendmsg(self, buffers, ancdata, flags, address)
        ancillary = list(ancdata)
        for item in ancillary:
            refuse_option(*item[:2])
        pieces = list(buffers)
        if len(pieces) == _IOV_MAX:  # as many as the kernel takes, and the marker is one more
            pieces = [b"".join(pieces)]
        return send_pieces(self, half, pieces, ancillary, flags, () if address is None else (address,))

    # --- what changes the way in which the socket is served --------------------------------------

    def bind(self, address: Any, /) -> None:
        """Bind, and take up what the option could not do before."""
        _rearranged(self, "bind", lambda root: root.bind(self, address))

    def connect(self, address: Any, /) -> None:
        """Connect; the mode in which the endpoint is served may change."""
        _rearranged(self, "connect", lambda root: root.connect(self, address))

    def connect_ex(self, address: Any, /) -> int:
        """Connect and return an errno; the mode in which the endpoint is served may change."""
        return int(_rearranged(self, "connect", lambda root: root.connect_ex(self, address)))

    def setsockopt(self, level: int, option: int, value: Any, *length: Any) -> None:
        """Set an option; UDP_NAT_T_ENDPOINT too, as on Solaris.

        Raises OSError: EOPNOTSUPP for UDP_SEGMENT and UDP_CORK, with which one send is not one
        datagram, so that markers would be missing.
        """
        half = half_of(self)
        if half is None:
            root_of(self).setsockopt(self, level, option, value, *length)
            return
        if (level, option) == (socket.IPPROTO_UDP, UDP_NAT_T_ENDPOINT):
            half.set_option(self, option_value(value, *length))
            return
        if (level, option) in REFUSED_OPTIONS and option_value(value, *length):
            refuse_option(level, option)
        if (level, option) in half.hidden and (level, option) not in half.sensitive:
            half.hidden[level, option] = int(option_value(value, *length))
            return
        _rearranged(self, (level, option), lambda root: root.setsockopt(self, level, option, value, *length))

    def getsockopt(self, level: int, option: int, *length: int) -> Any:
        """Read an option; UDP_NAT_T_ENDPOINT too, as on Solaris."""
        half = half_of(self)
        if half is None:
            return root_of(self).getsockopt(self, level, option, *length)
        if (level, option) == (socket.IPPROTO_UDP, UDP_NAT_T_ENDPOINT):
            return option_answer(1, *length)
        if (level, option) in half.hidden:
            return option_answer(half.hidden[level, option], *length)
        return half.root.getsockopt(self, level, option, *length)

    # --- identity and end ------------------------------------------------------------------------

    def dup(self) -> NatTSocket:
        """Return another object for the same socket; the option holds on both."""
        half = half_of(self)
        if half is None:
            return root_of(self).dup(self)
        other = half.root.dup(self)
        half.alias_made(other)
        return other

    def detach(self) -> int:
        """Give up the descriptor. It keeps what the kernel does and loses what the process does."""
        half = half_of(self)
        if half is None:
            return root_of(self).detach(self)
        half.alias_closed(self)
        return half.root.detach(self)

    def _real_close(self, *arguments: Any) -> None:
        half = half_of(self)
        if half is None:
            root_of(self)._real_close(self, *arguments)  # type: ignore[attr-defined]
            return
        half.alias_closed(self)  # before: a socket of ours that outlives this one would hold the port
        half.root._real_close(self, *arguments)  # type: ignore[attr-defined]

    def setblocking(self, flag: bool, /) -> None:
        """Set the blocking mode; objects where a loop, which comes next, would bypass this object."""
        half = half_of(self)
        if half is None:
            root_of(self).setblocking(self, flag)
            return
        if not flag and "asyncio" in sys.modules:
            from natcompat.endpoint.loops.asyncio import object_to_bypassing_loop

            object_to_bypassing_loop(self)
        half.root.setblocking(self, flag)

    def __reduce__(self) -> tuple[Any, ...]:
        # for multiprocessing, which knows how to send plain sockets alone
        if "multiprocessing.reduction" not in sys.modules:
            raise TypeError(f"cannot pickle {type(self).__name__!r} object")
        from multiprocessing.reduction import DupFd

        from natcompat.endpoint import arrive

        half = self._nat_t
        return arrive, (
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


def change_class(sock: socket.socket, cls: type[socket.socket]) -> None:
    """Make `cls` the class of `sock`, whatever its own ``__setattr__`` thinks of that."""
    object.__setattr__(sock, "__class__", cls)


def _rearranged(
    sock: NatTSocket, what: str | tuple[int, int], operation: Callable[[type[socket.socket]], Any]
) -> Any:
    """Do `operation`, without the attachment if that would be in the way."""
    half = half_of(sock)
    if half is None:
        return operation(root_of(sock))
    if what not in half.sensitive:
        return operation(half.root)
    root = half.root
    return half.rearrange(sock, lambda: operation(root))


def _octets(buffer: WriteableBuffer, size: int = 0) -> memoryview:
    """Return the bytes of `buffer`, the first `size` of them if it is not 0."""
    view = memoryview(buffer)
    if view.readonly:
        raise TypeError(f"a read-write bytes-like object is required, not {type(buffer).__name__!r}")
    octets = view.cast("B")
    if size < 0:
        raise ValueError("negative buffer size")
    if size > len(octets):
        raise ValueError("nbytes is greater than the length of the buffer")
    return octets[:size] if size else octets


def _fill(pieces: list[memoryview], data: bytes) -> int:
    """Scatter `data` over `pieces`; return its length, with MSG_TRUNC more than has room in them."""
    start = 0
    for piece in pieces:
        part = data[start : start + len(piece)]
        piece[: len(part)] = part
        start += len(part)
    return len(data)
