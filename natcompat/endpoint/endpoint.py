"""What the one call returns."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from natcompat import backends
from natcompat.backends.base import (
    Attachment,
    Backend,
    EspConsumer,
    LeakingAttachment,
    OwnEsp,
    WholeAttachment,
)
from natcompat.backends.diversion import Diversion
from natcompat.backends.linux_sockets.reading import is_reading_thread
from natcompat.backends.system_calls import SystemCalls
from natcompat.contract import NAT_KEEPALIVE, Duty, Performer
from natcompat.endpoint.aliases import Aliases
from natcompat.endpoint.outlet import Outlet
from natcompat.endpoint.receive import LARGEST_DATAGRAM, ProcessHalf, bind_implicitly
from natcompat.endpoint.socket_class import change_class, make_class
from natcompat.endpoint.stats import Stats
from natcompat.errors import NatCompatError


class NatTEndpoint:
    """A socket with the option; made by `set_nat_t_endpoint` alone.

    Methods may be called from any thread. It ends with the socket, or earlier by `close`. In a
    forked child the endpoint goes on stripping and inserting; to have ESP in the child, too, call
    `set_nat_t_endpoint` there again. What a child switches off it switches off for itself, as long as
    its parent lives; a daemon that outlives its parent has the endpoint to itself.

    Whoever switches off waits for the consumer of ESP, so he must hold no lock that it waits for.
    """

    def __init__(
        self, sock: socket.socket, root: type[socket.socket], backend: Backend, esp: EspConsumer | None
    ) -> None:
        self._backend = backend
        self._esp = esp  # None: the backend's own
        self._outlet: Outlet | None = None
        self._pid = self._served_in = os.getpid()
        self._lock = threading.RLock()
        self._aliases = Aliases(self, type(sock), self._release)
        self._attachment: Attachment | None = None  # None also while it is being exchanged
        self._left_alone = False  # whether the kernel does all of it, so that the object is not ours
        self._closed = False
        self._keepalives_sent = 0
        self._observers: dict[object, Callable[[Any], object]] = {}
        self._drops_before = _drops(sock)
        half = self._half = ProcessHalf(type(sock), root, Diversion(None, sock.family))
        half.rearrange = self._rearrange
        half.set_option = self._set_option
        half.alias_made = self._add_alias
        half.alias_closed = self._alias_closed
        self._class = make_class(half)
        own_esp = _own_esp(backend)
        if own_esp is not None:
            own_esp.follow(self._take_up)
        with self._lock:  # so that who takes ESP is exchanged before or after, and not in between
            try:
                self._attach(sock)
                self._dress(sock)
            except BaseException:
                self._detach(sock)
                raise
            self._add_alias(sock)
        _endpoints.add(self)

    @property
    def backend(self) -> str:
        """Name of the backend that serves the socket."""
        return self._backend.name

    @property
    def duties(self) -> Mapping[Duty, Performer]:
        """Who does which of the four duties now; it may change with bind, connect and socket options."""
        attachment = self._current()
        return dict(attachment.duties) if attachment is not None else {}

    @property
    def leaks(self) -> frozenset[str]:
        """Rows of `natcompat.contract.TABLE` that the process drops though the kernel has the duty.

        `select` may wake for them. Empty where a duty is somebody's as a whole.
        """
        return _leaks_of(self._current())

    @property
    def mode(self) -> str:
        """How the socket is served now; ``off`` once it is not.

        ``kernel``, ``filter`` and ``steering`` are exact: `select` wakes for IKE alone. ``in line`` is
        exact on sockets with a timeout and on non-blocking ones; there `select` may wake for what is then
        dropped, a receive on a blocking socket then waits, and IKE shares its queue with ESP.
        ``unbound``: nothing to do before bind.
        """
        attachment = self._current()
        return attachment.mode if attachment is not None else "off"

    @property
    def reason(self) -> str:
        """Why the mode is not a stronger one; empty for the strongest."""
        attachment = self._current()
        return attachment.reason if attachment is not None else ""

    @property
    def closed(self) -> bool:
        """Whether the option is off again."""
        self._current()
        return self._closed

    def stats(self) -> Stats:
        """Return the counters."""
        counters = self._half.counters
        attachment = self._current()
        sock = self._aliases.any()
        drops = _drops(sock) if sock is not None else None
        if drops is not None and self._drops_before is not None:
            drops -= self._drops_before
        known = attachment.counters() if attachment is not None else {}
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
            esp_dropped_in_kernel=known.get("engine_drops"),
            bypassed=bool(known["bypassed"]) if "bypassed" in known else None,
            handed_back=counters.handed_back,
            datapath=getattr(self._half.diversion.consumer, "datapath", None),
            errors=counters.errors,
            system_wide={name: value for name, value in known.items() if ":" in name},
        )

    def send_keepalive(self, address: Any = None) -> None:
        """Send one NAT-keepalive (RFC 3948, 2.3: one byte 0xFF, no marker) to `address`, or to the peer.

        Raises OSError like any send: EDESTADDRREQ without an address on an unconnected socket, EBADF
        once the socket is closed; BlockingIOError on a non-blocking socket whose buffer is full. With the
        backend ``solaris``, whose kernel puts a marker in front of everything, it takes a raw socket, and
        so a privilege: EPERM.
        """
        self._current()
        sock = self._aliases.any()
        if sock is None:
            raise NatCompatError(errno.EBADF, "the endpoint's socket is closed")
        root = self._half.root
        attachment = self._attachment
        if self._half.unbound:
            bind_implicitly(sock, self._half)
        if self._left_alone and isinstance(attachment, WholeAttachment):
            attachment.send_keepalive(SystemCalls(sock, root), address)
        elif address is None:
            root.send(sock, NAT_KEEPALIVE)
        else:
            root.sendto(sock, NAT_KEEPALIVE, address)
        self._keepalives_sent += 1

    def observe_sends(self, observer: Callable[[Any], object]) -> Callable[[], None]:
        """Call `observer` with the destination of everything that is sent; None: the connected peer.

        Keepalives are not told. It runs in the sending thread, after the send, and must not raise.
        Returns a function that ends it, which may be called anywhere, in finalizers too.
        """
        key = object()
        half = self._half

        def end() -> None:
            self._observers.pop(key, None)
            half.note_sent = None
            if self._observers:  # asked last: another thread may have added one
                half.note_sent = self._tell

        self._observers[key] = observer
        half.note_sent = self._tell
        return end

    def close(self) -> None:
        """Switch the option off; the socket stays open and is what it was before. May be repeated."""
        with self._control():
            self._current()
            sock = self._aliases.any()
            if sock is None or self._closed:
                return
            self._closed = True
            self._half.on = False
            try:
                self._detach(sock)
            finally:  # what the kernel does not let go of it keeps; the process lets go of it all
                for other in self._aliases.living():
                    self._aliases.forget(other)

    def __repr__(self) -> str:
        return f"<NatTEndpoint backend={self.backend!r} mode={self.mode!r}>"

    # --- for set_nat_t_endpoint and the socket's methods -------------------------------------------

    def _set_again(self, backend: Backend | None, esp: EspConsumer | None) -> None:
        """Set the option on a socket that has it: with other arguments, or in a forked child."""
        with self._control():
            sock = self._aliases.any()
            if sock is None or self._attachment is None or self._closed:
                raise NatCompatError(errno.EBADF, "the endpoint's socket is closed")
            same_backend = backend is None or backend is self._backend
            if self._served_in != os.getpid() and (esp is not None or self._consumer() is not None):
                self._attachment.adopt()
                self._served_in = os.getpid()
            if same_backend and (esp is None or esp is self._esp):
                return
            if not self._owned() and self.mode == "steering":
                if same_backend:
                    self._esp = esp
                    self._change_consumer(sock)
                    return
                raise NatCompatError(
                    errno.EBUSY,
                    f"process {self._pid}, which made the endpoint, goes on steering",
                    "Choose the backend there",
                )
            self._pid = os.getpid()
            chosen = backend or self._backend
            if (esp is not None or self._esp is not None) and not chosen.hands_over_esp:
                chosen = backends.select(backend, hands_over_esp=True)  # or the reason why not
            before = self._backend, self._esp
            own_esp = _own_esp(chosen)
            if own_esp is not None:
                own_esp.follow(self._take_up)
            try:
                self._detach(sock)
                self._backend = chosen
                if esp is not None:
                    self._esp = esp
                self._attach(sock)
                for alias in self._aliases.living():
                    self._dress(alias)
            except BaseException:
                self._backend, self._esp = before
                self._attach_somehow(sock)
                raise

    def _take_up(self) -> None:
        """The ESP of the backend's own has begun or ended."""
        with self._control():
            sock = self._aliases.any()
            if sock is None or self._closed or self._consumer() is self._half.diversion.consumer:
                return
            if not self._owned() and self.mode == "steering":  # the parent goes on; both get a part of it
                if self._served_in != os.getpid() and self._attachment is not None:
                    self._attachment.adopt()
                    self._served_in = os.getpid()
                self._change_consumer(sock)
                return
            self._pid = os.getpid()
            try:
                self._detach(sock)
            except OSError as error:
                self._half.diversion.error(f"detaching failed: {error}")
            self._attach_somehow(sock)

    def _consumer(self) -> EspConsumer | None:
        """Return who is to take ESP now."""
        own_esp = _own_esp(self._backend)
        return self._esp if self._esp is not None or own_esp is None else own_esp.consumer

    def _tell(self, destination: Any) -> None:
        for observer in list(self._observers.values()):
            observer(destination)

    def _change_consumer(self, sock: socket.socket) -> None:
        """Exchange who takes ESP, and tell him where ESP may leave."""
        half = self._half
        self._end_outlet()
        half.diversion.consumer = consumer = self._consumer()
        if hasattr(consumer, "attached") and not half.unbound:
            self._outlet = Outlet(self, half.root, getattr(self._attachment, "esp_socket", None), consumer)
            self._outlet.begin()

    def _end_outlet(self) -> None:
        outlet, self._outlet = self._outlet, None
        if outlet is not None:
            outlet.end()

    def _attach(self, sock: socket.socket) -> None:
        half = self._half
        half.diversion.consumer = self._consumer()  # the backend asks whether there is one
        attachment = self._backend.attach(SystemCalls(sock, half.root), half.diversion)
        self._attachment = attachment
        self._left_alone = isinstance(attachment, WholeAttachment)
        half.sensitive, half.hidden = attachment.sensitive, attachment.hidden
        half.unbound = attachment.mode == "unbound"
        kept = {attachment.duties[duty] for duty in (Duty.DROP_RUNTS, Duty.DIVERT_ESP)}
        exact = not _leaks_of(attachment) and Performer.PROCESS not in kept
        # until the queue has been empty once it may hold what came before
        half.room, half.draining = LARGEST_DATAGRAM, exact
        self._change_consumer(sock)

    def _dress(self, sock: socket.socket) -> None:
        """Give `sock` the class of an endpoint's, unless the kernel does all there is to do."""
        self._aliases.dress(sock, self._half.original if self._left_alone else self._class)

    def _current(self) -> Attachment | None:
        """Return the hold on the socket; find out first what happened to one whose methods are not ours."""
        attachment = self._attachment
        if self._left_alone and isinstance(attachment, WholeAttachment):
            sock = self._aliases.any()
            if sock is None or sock.fileno() < 0 or not attachment.is_on(SystemCalls(sock, self._half.root)):
                for alias in self._aliases.living():
                    self._aliases.forget(alias)
                self._release()
                return None
        return attachment

    def _detach(self, sock: socket.socket) -> None:
        half = self._half
        self._end_outlet()
        half.room, half.draining, half.unbound = LARGEST_DATAGRAM, False, False
        attachment, self._attachment = self._attachment, None
        if attachment is None:
            return
        if self._owned():
            attachment.detach(SystemCalls(sock, half.root))
        else:
            attachment.release()  # the kernel's part is the parent's

    def _owned(self) -> bool:
        """Whether this process changes the kernel's socket: it made the endpoint, or outlived who did."""
        if self._pid != os.getpid() and not _lives(self._pid):
            self._pid = os.getpid()
        return self._pid == os.getpid()

    def _rearrange(self, sock: socket.socket, operation: Callable[[], Any]) -> Any:
        """Do `operation`, which the attachment would be in the way of, without it."""
        with self._control():
            if self._closed or not self._owned():
                return operation()
            try:
                self._detach(sock)
                return operation()
            finally:
                self._attach_somehow(sock)

    def _attach_somehow(self, sock: socket.socket) -> None:
        """Attach again, in line where the backend now refuses."""
        try:
            self._attach(sock)
        except OSError as error:
            from natcompat.backends.userspace import InLineAttachment

            self._half.diversion.error(f"attaching again failed: {error}")
            self._attachment = InLineAttachment(f"attaching again failed: {error}")
            self._left_alone = False
            self._half.sensitive, self._half.hidden = frozenset(), {}
            self._change_consumer(sock)
        for alias in self._aliases.living():
            self._dress(alias)

    def _set_option(self, sock: socket.socket, enable: bool) -> None:
        if not enable:
            self.close()

    def _add_alias(self, sock: socket.socket) -> None:
        with self._control():
            if self._closed:  # by another thread, while `sock` was made
                change_class(sock, self._half.original)
                return
            self._aliases.add(sock)

    def _alias_closed(self, sock: socket.socket) -> None:
        """The application closes `sock` or gives up its descriptor."""
        with self._control():
            self._aliases.forget(sock)
            if not self._aliases:
                self._release()

    def _release(self) -> None:
        self._closed = True
        self._half.on = False
        self._end_outlet()
        attachment, self._attachment = self._attachment, None
        if attachment is not None:
            attachment.release()

    @contextlib.contextmanager
    def _control(self) -> Iterator[None]:
        """Hold the lock under which the endpoint changes.

        Whoever switches off waits for the thread that runs the consumer of ESP, so the consumer must
        not wait for him.
        """
        in_consumer = threading.get_ident() in self._half.diversion.calling or is_reading_thread()
        lock = self._lock  # a fork in between makes another
        if not lock.acquire(timeout=1.0 if in_consumer else -1):
            raise NatCompatError(
                errno.EDEADLK,
                "another thread is switching this endpoint and waits for the consumer of ESP",
                "Let the consumer of ESP leave the endpoint's switching to other threads",
            )
        try:
            yield
        finally:
            lock.release()


def _leaks_of(attachment: Attachment | None) -> frozenset[str]:
    return attachment.leaks if isinstance(attachment, LeakingAttachment) else frozenset()


def _own_esp(backend: Backend) -> OwnEsp | None:
    found: OwnEsp | None = getattr(backend, "own_esp", None)
    return found


def _drops(sock: socket.socket) -> int | None:
    if sys.platform != "linux":
        return None
    from natcompat.backends.linux_sockets.filters import drops

    return drops(sock)


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        pass
    return True


_endpoints: weakref.WeakSet[NatTEndpoint] = weakref.WeakSet()


def _after_fork() -> None:
    for endpoint in list(_endpoints):
        endpoint._lock = threading.RLock()
        endpoint._half.diversion.calling.clear()  # of threads that are not here


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
