"""`NatTEndpoint`, the object that `set_nat_t_endpoint()` returns."""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Callable, Mapping
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any

from natcompat import backends
from natcompat.backends.base import Address, Backend, EspConsumer, leaks_of
from natcompat.backends.diversion import Diversion
from natcompat.backends.local_address import (
    ANCILLARY_SIZE,
    Ancillary,
    is_bound_to,
    local_address,
    request_local_addresses,
    source_address,
)
from natcompat.backends.system_calls import SystemCalls, root_class
from natcompat.contract import NAT_KEEPALIVE, Duty, Performer
from natcompat.endpoint.datagram import Datagram
from natcompat.endpoint.receive import receive_ike
from natcompat.endpoint.send import prepare_send, send_buffers
from natcompat.endpoint.state import LARGEST_DATAGRAM, EndpointState
from natcompat.endpoint.stats import Stats
from natcompat.endpoint.switch import Switch
from natcompat.errors import NatCompatError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from natcompat.ipsec import IPAddress


class NatTEndpoint:
    """A socket with the option; `set_nat_t_endpoint` makes it.

    Its methods may be called from any thread. It ends with the socket, or earlier by `close`.

    In a forked child the endpoint goes on stripping and inserting markers; to have ESP in the child, call
    `set_nat_t_endpoint` there again. A child that switches the option off does so for itself alone, as long
    as its parent lives; a daemon that outlives its parent owns the endpoint alone.

    `close` and `set_nat_t_endpoint` wait for the thread that calls the ESP consumer, so their caller must
    hold no lock for which the consumer waits.
    """

    def __init__(
        self, sock: socket.socket, root: type[socket.socket], backend: Backend, esp: EspConsumer | None
    ) -> None:
        self._keepalives_sent = 0
        self._observers: dict[object, Callable[[Any], object]] = {}
        self._drops_before = _kernel_drops(sock)
        self._family = sock.family
        self._tells_local_address = False
        self._state = state = EndpointState(type(sock), root, Diversion(None, sock.family))
        state.endpoint, state.arrive = self, arrive
        self._switch = Switch(state, sock, backend, esp)

    @property
    def backend(self) -> str:
        """Name of the backend that serves the socket."""
        return self._switch.backend.name

    @property
    def family(self) -> int:
        """Address family of the socket: AF_INET or AF_INET6."""
        return self._family

    @property
    def peer(self) -> Address | None:
        """Address of the connected peer; None if the socket is not connected or closed."""
        sock = self._switch.aliases.any()
        try:
            return None if sock is None else sock.getpeername()
        except OSError:
            return None

    @property
    def duties(self) -> Mapping[Duty, Performer]:
        """Who performs each of the four duties now; bind, connect and socket options may change it."""
        attachment = self._switch.attachment()
        return dict(attachment.duties) if attachment is not None else {}

    @property
    def leaks(self) -> frozenset[str]:
        """Rows of `natcompat.contract.TABLE` that the process drops although the kernel has the duty.

        `select` may wake for them. Empty where one performer does the whole of each duty.
        """
        return leaks_of(self._switch.attachment())

    @property
    def mode(self) -> str:
        """How the socket is served now; ``off`` once the option is off.

        ``kernel``, ``filter`` and ``steering`` are exact: `select` wakes for IKE alone. ``in line`` is
        exact on sockets with a timeout and on non-blocking ones; `select` may wake there for datagrams that
        are then dropped, a receive on a blocking socket then waits, and IKE shares its queue with ESP.
        ``unbound``: the backend does its part when the socket is bound.
        """
        attachment = self._switch.attachment()
        return attachment.mode if attachment is not None else "off"

    @property
    def reason(self) -> str:
        """Why the mode is not a stronger one; empty for the strongest."""
        attachment = self._switch.attachment()
        return attachment.reason if attachment is not None else ""

    @property
    def hand_back(self) -> str:
        """How IKE that came to a socket of the backend returns: ``loopback``, ``none``, or empty.

        ``loopback``: in an authenticated envelope by the interface lo. ``none``: such IKE is counted as an
        error and lost, and the backend does without coalesced receives, which would bring it there; see
        `hand_back_reason`. Empty: IKE comes to the application's socket alone.
        """
        return getattr(self._switch.attachment(), "hand_back", "")

    @property
    def hand_back_reason(self) -> str:
        """Why `hand_back` is ``none``; else empty."""
        return getattr(self._switch.attachment(), "hand_back_reason", "")

    @property
    def closed(self) -> bool:
        """Whether the option is off again."""
        self._switch.attachment()
        return self._switch.closed

    def stats(self) -> Stats:
        """Return the counters."""
        if self._state.in_child is not None:
            self._state.in_child()
        counters = self._state.counters
        attachment = self._switch.attachment()
        sock = self._switch.aliases.any()
        drops = _kernel_drops(sock) if sock is not None else None
        if drops is not None and self._drops_before is not None:
            drops -= self._drops_before
        of_backend = attachment.counters() if attachment is not None else {}
        return Stats(
            backend=self.backend,
            mode=self.mode,
            reason=self.reason,
            ike=counters.ike,
            esp=counters.esp,
            keepalives=counters.keepalives,
            runts=counters.runts,
            markers_inserted=counters.markers_inserted,
            keepalives_sent=self._keepalives_sent,
            dropped_in_kernel=drops,
            esp_dropped_in_kernel=of_backend.get("engine_drops"),
            bypassed=bool(of_backend["bypassed"]) if "bypassed" in of_backend else None,
            handed_back=counters.handed_back,
            datapath=getattr(self._state.diversion.consumer, "datapath", None),
            errors=counters.errors,
            system_wide={name: value for name, value in of_backend.items() if ":" in name},
        )

    def receive(self, bufsize: int = LARGEST_DATAGRAM, flags: int = 0) -> Datagram:
        """Receive one message, its source, and the local address to which it came; see `Datagram`.

        For a socket that is bound to no address in particular (0.0.0.0 or ::) on a host with several. In
        all else it is `socket.socket.recvmsg`: `bufsize` in bytes, `flags`, the mode and timeout of the
        socket, and the errors. EBADF once the socket is closed.

        The first call sets the socket option that tells the address (IP_PKTINFO on Linux, IP_RECVDSTADDR on
        BSD, macOS and Solaris, IPV6_RECVPKTINFO), if it is not set, and `close` clears it; until then the
        application's own ``recvmsg`` gets the ancillary data, too. Datagrams that were queued before that
        call may have no local address, except on Linux. Windows tells none.
        """
        sock = self._living_socket()
        root = self._state.root
        if not self._tells_local_address:
            undo = request_local_addresses(SystemCalls(sock, root))
            self._tells_local_address = True
            if undo is not None:
                self._switch.undo_at_close(undo)
        message = receive_ike(sock, root, bufsize, ANCILLARY_SIZE, flags)
        return Datagram(message[0], message[3], local_address(message[1]))

    def send(
        self,
        payload: ReadableBuffer,
        destination: Any = None,
        *,
        local_address: IPAddress | str | None = None,
    ) -> int:
        """Send `payload` behind the marker to `destination`, or to the peer; return its length.

        The datagram leaves from `local_address`, such as that of the `Datagram` which it answers; None leaves
        the choice to the system. Raises what `socket.socket.sendmsg` raises; ValueError where the socket or
        the system cannot send from that address.
        """
        sock = self._living_socket()
        ancillary = self._source(sock, local_address)
        to = _without_none(destination)
        if self._switch.sender_of_keepalives() is None:
            return send_buffers(sock, self._state, [payload], ancillary, 0, to)
        return self._state.root.sendmsg(sock, [payload], ancillary, 0, *to)  # the kernel inserts the marker

    def send_keepalive(self, address: Any = None, *, local_address: IPAddress | str | None = None) -> None:
        """Send one NAT-keepalive (RFC 3948, 2.3: one byte 0xFF, no marker) to `address`, or to the peer.

        It leaves from `local_address`; None leaves the choice to the system. Raises OSError like any send:
        EDESTADDRREQ without an address on an unconnected socket, EBADF once the socket is closed;
        BlockingIOError on a non-blocking socket whose buffer is full; ValueError where the system cannot
        send from that address. The backend ``solaris``, whose kernel puts a marker in front of every send,
        needs a raw socket for it, and so a privilege: EPERM.
        """
        self._switch.attachment()
        sock = self._living_socket()
        root = self._state.root
        if self._state.unprepared:
            prepare_send(sock, self._state)
        sender = self._switch.sender_of_keepalives()
        if sender is not None:
            sender.send_keepalive(SystemCalls(sock, root), address, *_without_none(local_address))
        elif local_address is not None:
            ancillary = self._source(sock, local_address)
            root.sendmsg(sock, [NAT_KEEPALIVE], ancillary, 0, *_without_none(address))
        elif address is None:
            root.send(sock, NAT_KEEPALIVE)
        else:
            root.sendto(sock, NAT_KEEPALIVE, address)
        self._keepalives_sent += 1

    def observe_sends(self, observer: Callable[[Any], object]) -> Callable[[], None]:
        """Call `observer` with the destination of every send; None stands for the connected peer.

        Keepalives do not count as sends. `observer` runs in the sending thread, after the send, and must
        not raise. Returns a function that removes it, which may be called anywhere, in finalizers too.
        """
        key = object()
        state = self._state

        def remove() -> None:
            self._observers.pop(key, None)
            state.note_sent = None
            if self._observers:  # looked at last: another thread may have added one
                state.note_sent = self._notify_observers

        self._observers[key] = observer
        state.note_sent = self._notify_observers
        return remove

    def close(self) -> None:
        """Switch the option off; the socket stays open and is what it was before. May be repeated."""
        self._switch.close()

    def set_again(self, backend: Backend | None, esp: EspConsumer | None) -> None:
        """Set the option once more; use `natcompat.set_nat_t_endpoint`, which checks the arguments."""
        self._switch.set_again(backend, esp)

    def _living_socket(self) -> socket.socket:
        sock = self._switch.aliases.any()
        if sock is None:
            raise NatCompatError(errno.EBADF, "the endpoint's socket is closed")
        return sock

    def _source(self, sock: socket.socket, address: IPAddress | str | None) -> Ancillary:
        """Return the ancillary data that sends from the local `address`."""
        if address is None:
            return []
        address = ip_address(address)
        return [] if is_bound_to(sock, address) else source_address(self._family, address)

    def _notify_observers(self, destination: Any) -> None:
        for observer in list(self._observers.values()):
            observer(destination)

    def __repr__(self) -> str:
        return f"<NatTEndpoint backend={self.backend!r} mode={self.mode!r}>"


def arrive(
    original: type[socket.socket],
    descriptor: Any,
    family: int,
    kind: int,
    protocol: int,
    timeout: float | None,
) -> socket.socket:
    """Make the socket that another process sent by multiprocessing; this process performs its duties.

    ESP stays with the process that sent the socket.
    """
    sock = original(family, kind, protocol, fileno=descriptor.detach())
    sock.settimeout(timeout)
    root = root_class(original)
    assert root is not None, "only endpoints' sockets are sent"  # noqa: S101
    NatTEndpoint(sock, root, backends.get("userspace:in-line"), None)
    return sock


def _without_none(argument: Any) -> tuple[Any, ...]:
    """Return the argument for a call that takes it or leaves it out."""
    return () if argument is None else (argument,)


def _kernel_drops(sock: socket.socket) -> int | None:
    """Return how many datagrams the kernel has dropped on `sock`; None where it does not say."""
    if sys.platform != "linux":
        return None
    from natcompat.backends.linux_sockets.filters import drops

    return drops(sock)
