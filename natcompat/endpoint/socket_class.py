"""`NatTSocket`: the methods that an application calls on a socket with the option.

`set_nat_t_endpoint` changes the class of the application's socket object and keeps the object. Each
endpoint has a class of its own with the bases (the application's class, `NatTSocket`, the library's
socket class): the application's overrides run first, and their ``super()`` reaches `NatTSocket`.
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
from natcompat.endpoint.bypassing_loops import object_to_bypassing_loop
from natcompat.endpoint.receive import HEADROOM, SMALLEST_RECEIVE, receive_ike
from natcompat.endpoint.send import send_buffers, send_message
from natcompat.endpoint.state import EndpointState, root_of, state_of

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    _Socket = socket.socket
else:
    _Socket = object

_IOV_MAX: Final = 1024
_NO_ADDRESS: Final[Any] = object()


class NatTSocket(_Socket):
    """A socket with the option: a base class of every endpoint's socket.

    Every method does what that of `socket.socket` does, but receives IKE alone, without the marker, and
    sends behind the marker. A timeout is a deadline: dropped datagrams do not prolong it.

    ``makefile`` reads a bare marker, a datagram of length zero, as the end of the file. Descriptors that
    natcompat does not see being made (``os.dup``, ``fileno=``, ``detach``) keep the duties of the kernel
    and lose those of the process; see `NatTEndpoint.duties`.
    """

    __slots__ = ()

    _nat_t: ClassVar[EndpointState]

    # --- receiving --------------------------------------------------------------------------------

    def recv(self, bufsize: int, flags: int = 0, /) -> bytes:
        """Receive one message; see `recv(2)`."""
        state = state_of(self)
        if state is None or bufsize <= 0:  # Python receives nothing into no bytes
            return root_of(self).recv(self, bufsize, flags)
        if flags or state.receive_size or state.draining:  # an ESP consumer needs the source
            return NatTSocket.recvfrom(self, bufsize, flags)[0]
        root = state.root
        size = bufsize if bufsize > SMALLEST_RECEIVE else SMALLEST_RECEIVE  # max() takes longer
        datagram = root.recv(self, size + HEADROOM)
        # the option may have been switched off while this thread waited
        if (
            state.enabled
            and datagram[:MARKER_LENGTH] == NON_ESP_MARKER
            and not datagram.startswith(state.envelope_prefix)
        ):
            state.counters.ike += 1
            return datagram[MARKER_LENGTH : MARKER_LENGTH + bufsize]
        return receive_ike(self, root, bufsize, 0, 0, (datagram, [], 0, None))[0]

    def recvfrom(self, bufsize: int, flags: int = 0, /) -> tuple[bytes, Any]:
        """Receive one message and its source; see `recvfrom(2)`."""
        try:
            state = self._nat_t  # state_of() without a call
        except AttributeError:
            return root_of(self).recvfrom(self, bufsize, flags)
        root = state.root
        if flags or bufsize < 0 or state.draining:
            message = receive_ike(self, root, bufsize, 0, flags)
            return message[0], message[3]
        begun = time.monotonic() if state.receive_size else None
        size = bufsize if bufsize > SMALLEST_RECEIVE else SMALLEST_RECEIVE
        datagram, source = root.recvfrom(self, state.receive_size or size + HEADROOM)
        # the option may have been switched off while this thread waited
        if (
            state.enabled
            and datagram[:MARKER_LENGTH] == NON_ESP_MARKER
            and not datagram.startswith(state.envelope_prefix)
        ):
            state.counters.ike += 1
            return datagram[MARKER_LENGTH : MARKER_LENGTH + bufsize], source
        message = receive_ike(self, root, bufsize, 0, 0, (datagram, [], 0, source), begun)
        return message[0], message[3]

    def recv_into(self, buffer: WriteableBuffer, nbytes: int = 0, flags: int = 0) -> int:
        """Receive one message into `buffer`, in which nothing but IKE is ever written."""
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
        state = state_of(self)
        if state is None:
            return root_of(self).recvmsg(self, bufsize, ancbufsize, flags)
        return receive_ike(self, state.root, bufsize, ancbufsize, flags)

    def recvmsg_into(
        self, buffers: Iterable[WriteableBuffer], ancbufsize: int = 0, flags: int = 0, /
    ) -> tuple[int, list[tuple[int, int, bytes]], int, Any]:
        """Receive one message, scattered over `buffers`, with its ancillary data."""
        with contextlib.ExitStack() as stack:
            views = [stack.enter_context(_octets(buffer)) for buffer in buffers]
            size = sum(map(len, views))
            data, ancillary, message_flags, source = NatTSocket.recvmsg(self, size, ancbufsize, flags)
            return _fill(views, data), ancillary, message_flags, source

    # --- sending ----------------------------------------------------------------------------------

    def send(self, data: ReadableBuffer, flags: int = 0, **timeout: Any) -> int:
        """Send `data` as one datagram behind the marker; returns the bytes of `data` that were sent."""
        state: EndpointState | None = getattr(self, "_nat_t", None)
        if state is None:
            return root_of(self).send(self, data, flags, **timeout)
        if flags or timeout or state.unprepared or state.message_open or state.note_sent is not None:
            return send_message(self, state, data, flags, **timeout)
        datagram = NON_ESP_MARKER + data if type(data) is bytes else b"".join((NON_ESP_MARKER, data))
        sent = state.root.send(self, datagram)
        state.counters.markers_inserted += 1
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
            state = self._nat_t
        except AttributeError:
            return root_of(self).sendto(self, data, flags, address)
        if flags or state.unprepared or state.message_open or state.note_sent is not None:
            if address is None:  # for sendmsg() None is the peer
                raise TypeError("sendto() takes an address, not None")
            return send_message(self, state, data, flags, (address,))
        # + is faster, but would call the operator of other types (numpy's arrays)
        datagram = NON_ESP_MARKER + data if type(data) is bytes else b"".join((NON_ESP_MARKER, data))
        sent = state.root.sendto(self, datagram, address)
        state.counters.markers_inserted += 1
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
        state = state_of(self)
        if state is None:
            return root_of(self).sendmsg(self, buffers, ancdata, flags, address)
        ancillary = list(ancdata)
        for item in ancillary:
            refuse_option(*item[:2])
        message = list(buffers)
        if len(message) == _IOV_MAX:  # the kernel takes no more buffers, and the marker is one more
            message = [b"".join(message)]
        return send_buffers(self, state, message, ancillary, flags, () if address is None else (address,))

    # --- calls that may change how the socket is served -------------------------------------------

    def bind(self, address: Any, /) -> None:
        """Bind, and serve the bound socket: some backends can do nothing before."""
        _reattaching(self, "bind", lambda root: root.bind(self, address))

    def connect(self, address: Any, /) -> None:
        """Connect; the mode in which the endpoint is served may change."""
        _reattaching(self, "connect", lambda root: root.connect(self, address))

    def connect_ex(self, address: Any, /) -> int:
        """Connect and return an errno; the mode in which the endpoint is served may change."""
        return int(_reattaching(self, "connect", lambda root: root.connect_ex(self, address)))

    def setsockopt(self, level: int, option: int, value: Any, *length: Any) -> None:
        """Set an option; UDP_NAT_T_ENDPOINT too, as on Solaris.

        Raises OSError: EOPNOTSUPP for UDP_SEGMENT and UDP_CORK, with which one send is not one datagram
        and some datagrams would leave without a marker.
        """
        state = state_of(self)
        if state is None:
            root_of(self).setsockopt(self, level, option, value, *length)
            return
        if (level, option) == (socket.IPPROTO_UDP, UDP_NAT_T_ENDPOINT):
            state.set_option(option_value(value, *length))
            return
        if (level, option) in REFUSED_OPTIONS and option_value(value, *length):
            refuse_option(level, option)
        if (level, option) in state.hidden and (level, option) not in state.sensitive:
            state.hidden[level, option] = int(option_value(value, *length))
            return
        _reattaching(self, (level, option), lambda root: root.setsockopt(self, level, option, value, *length))

    def getsockopt(self, level: int, option: int, *length: int) -> Any:
        """Read an option; UDP_NAT_T_ENDPOINT too, as on Solaris."""
        state = state_of(self)
        if state is None:
            return root_of(self).getsockopt(self, level, option, *length)
        if (level, option) == (socket.IPPROTO_UDP, UDP_NAT_T_ENDPOINT):
            return option_answer(1, *length)
        if (level, option) in state.hidden:
            return option_answer(state.hidden[level, option], *length)
        return state.root.getsockopt(self, level, option, *length)

    # --- identity and end -------------------------------------------------------------------------

    def dup(self) -> NatTSocket:
        """Return another object for the same socket; the option holds on both."""
        state = state_of(self)
        if state is None:
            return root_of(self).dup(self)
        other = state.root.dup(self)
        state.add_alias(other)
        return other

    def detach(self) -> int:
        """Give up the descriptor, which keeps the kernel's duties and loses the process's."""
        state = state_of(self)
        if state is None:
            return root_of(self).detach(self)
        state.remove_alias(self)
        return state.root.detach(self)

    def _real_close(self, *arguments: Any) -> None:
        state = state_of(self)
        if state is None:
            root_of(self)._real_close(self, *arguments)  # type: ignore[attr-defined]  # noqa: SLF001
            return
        state.remove_alias(self)  # first, since the endpoint's own sockets would hold the port
        state.root._real_close(self, *arguments)  # type: ignore[attr-defined]  # noqa: SLF001

    def setblocking(self, flag: bool, /) -> None:
        """Set the blocking mode. False refuses, or warns of, an event loop that would bypass this object."""
        state = state_of(self)
        if state is None:
            root_of(self).setblocking(self, flag)
            return
        if not flag and not state.warned_of_loop:  # such a loop's transports make the socket non-blocking
            state.warned_of_loop = object_to_bypassing_loop(self, has_option=True)
        state.root.setblocking(self, flag)

    def __reduce__(self) -> tuple[Any, ...]:
        # for multiprocessing, which can send plain sockets alone
        if "multiprocessing.reduction" not in sys.modules:
            raise TypeError(f"cannot pickle {type(self).__name__!r} object")
        from multiprocessing.reduction import DupFd

        state = self._nat_t
        return state.arrive, (
            state.original,
            DupFd(self.fileno()),
            self.family,
            self.type,
            self.proto,
            self.gettimeout(),
        )

    def __reduce_ex__(self, protocol: object, /) -> tuple[Any, ...]:
        return self.__reduce__()


def make_class(state: EndpointState) -> type[NatTSocket]:
    """Return a new class for the sockets of the endpoint with this `state`.

    Raises TypeError if the application's class cannot be combined with `NatTSocket`.
    """
    core = _cores.get(state.root)
    if core is None:
        core = _cores[state.root] = type(
            "NatTSocket", (NatTSocket, state.root), {"__slots__": (), "__module__": __name__}
        )
    bases = (core,) if state.original is state.root else (state.original, core)
    namespace = {
        "__slots__": (),
        "__module__": state.original.__module__,
        "__qualname__": f"{state.original.__qualname__}[NAT-T]",
        "_nat_t": state,
    }
    made: type[NatTSocket] = types.new_class(
        state.original.__name__, bases, exec_body=lambda body: body.update(namespace)
    )
    return made


_cores: dict[type, type] = {}


def change_class(sock: socket.socket, cls: type[socket.socket]) -> None:
    """Make `cls` the class of `sock`, past a ``__setattr__`` of the application's class."""
    object.__setattr__(sock, "__class__", cls)


def _reattaching(
    sock: NatTSocket, change: str | tuple[int, int], operation: Callable[[type[socket.socket]], Any]
) -> Any:
    """Call `operation` with the root class; detach the socket meanwhile if its attachment says so.

    `change` is what `operation` does, as `natcompat.backends.base.Attachment.sensitive` names it.
    """
    state = state_of(sock)
    if state is None:
        return operation(root_of(sock))
    if change not in state.sensitive:
        return operation(state.root)
    root = state.root
    return state.reattach_around(sock, lambda: operation(root))


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


def _fill(views: list[memoryview], data: bytes) -> int:
    """Scatter `data` over `views`; return its length, which MSG_TRUNC lets be more than they hold."""
    start = 0
    for view in views:
        part = data[start : start + len(view)]
        view[: len(part)] = part
        start += len(part)
    return len(data)
