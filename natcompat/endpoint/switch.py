"""Attaches the sockets of an endpoint to a backend, and detaches them. Nothing else knows the backend."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from natcompat import backends
from natcompat.backends.base import (
    Attachment,
    Backend,
    EspConsumer,
    WholeAttachment,
    leaks_of,
    own_esp_of,
)
from natcompat.backends.linux_sockets.reading import is_reading_thread
from natcompat.backends.system_calls import SystemCalls
from natcompat.contract import Duty, Performer
from natcompat.endpoint.aliases import Aliases
from natcompat.endpoint.exemption import Exemption
from natcompat.endpoint.outlet import Outlet
from natcompat.endpoint.ownership import Ownership, works_here
from natcompat.endpoint.socket_class import change_class, make_class
from natcompat.endpoint.state import LARGEST_DATAGRAM, EndpointState
from natcompat.errors import NatCompatError


class Switch:
    """Switches the option of one endpoint on and off, and its backend and ESP consumer over.

    Every change holds one lock per endpoint. In a forked child the kernel's part belongs to the parent as
    long as the parent lives.
    """

    def __init__(
        self,
        state: EndpointState,
        sock: socket.socket,
        backend: Backend,
        esp: EspConsumer | None,
    ) -> None:
        """Attach `sock`. On an error the socket is what it was before.

        `esp`: the consumer of ESP; None: the backend's own.
        """
        self.backend: Backend = backend
        self.closed: bool = False
        """Whether the option is off again; see `attachment` for a kernel that has all duties."""
        self._esp = esp
        self._outlet: Outlet | None = None
        self._exemption = Exemption(state)
        self._undo_at_close: list[Callable[[socket.socket], object]] = []
        self._ownership = Ownership()
        self._lock = threading.RLock()
        self._attachment: Attachment | None = None  # None also while it is being exchanged
        self._kernel_has_all = False  # the class of the socket then stays the original
        self.state = state
        state.reattach_around = self._reattach_around
        state.set_option = self._set_option
        state.add_alias = self._add_alias
        state.remove_alias = self._remove_alias
        self.aliases: Aliases = Aliases(state, self._release)
        self._class = make_class(state)
        own_esp = own_esp_of(backend)
        if own_esp is not None:
            own_esp.follow(self._follow_own_esp)
        with self._lock:  # a change of the backend's own ESP comes before or after, not in between
            self.aliases.add(sock)
            try:
                self._attach(sock)
                self._dress(sock)
            except BaseException:
                try:
                    self._detach(sock)
                finally:
                    self._exemption.end(sock, owned=self._ownership.is_ours())
                    self.aliases.forget(sock)
                raise
        _switches.add(self)

    # --- for the endpoint -------------------------------------------------------------------------

    def attachment(self) -> Attachment | None:
        """Return the attachment, None once the option is off.

        Where the kernel has all duties the application may close the socket or clear the option by system
        calls that natcompat does not see, so the kernel is asked first.
        """
        attachment = self._attachment
        if self._kernel_has_all and isinstance(attachment, WholeAttachment):
            sock = self.aliases.any()
            if sock is None or sock.fileno() < 0 or not attachment.is_on(SystemCalls(sock, self.state.root)):
                for alias in self.aliases.living():
                    self.aliases.forget(alias)
                self._release()
                return None
        return attachment

    def sender_of_keepalives(self) -> WholeAttachment | None:
        """Return the attachment that has to send keepalives, None where the socket can send them."""
        attachment = self._attachment
        if self._kernel_has_all and isinstance(attachment, WholeAttachment):
            return attachment
        return None

    def set_again(self, backend: Backend | None, esp: EspConsumer | None) -> None:
        """Set the option on a socket that has it: with other arguments, or in a forked child.

        None leaves the backend or the consumer of ESP as it is.
        """
        with self._locked():
            sock = self.aliases.any()
            if sock is None or self._attachment is None or self.closed:
                raise NatCompatError(errno.EBADF, "the endpoint's socket is closed")
            same_backend = backend is None or backend is self.backend
            if not self._ownership.runs_esp() and (esp is not None or self._consumer() is not None):
                self._adopt(self._attachment)
            if same_backend and esp is None and self.state.in_child is not None:
                self._succeed()
            if same_backend and (esp is None or esp is self._esp):
                return
            if not self._ownership.is_ours() and self._attachment.mode == "steering":
                if same_backend:
                    self._esp = esp
                    self._change_consumer(sock)
                    return
                raise NatCompatError(
                    errno.EBUSY,
                    f"the backend cannot be changed here while process {self._ownership.maker}, which made "
                    "the endpoint, steers its ESP",
                    "Choose the backend in that process",
                )
            self._ownership.take()
            chosen = backend or self.backend
            if (esp is not None or self._esp is not None) and not chosen.hands_over_esp:
                chosen = backends.select(backend, hands_over_esp=True)  # or the reason why there is none
            before = self.backend, self._esp
            own_esp = own_esp_of(chosen)
            if own_esp is not None:
                own_esp.follow(self._follow_own_esp)
            try:
                self._detach(sock)
                self.backend = chosen
                if esp is not None:
                    self._esp = esp
                self._attach(sock)
                for alias in self.aliases.living():
                    self._dress(alias)
            except BaseException:
                self.backend, self._esp = before
                self._attach_or_serve_in_line(sock)
                raise

    def undo_at_close(self, undo: Callable[[socket.socket], object]) -> None:
        """Call `undo` with the socket when the option is switched off, if this process then owns it."""
        with self._locked():
            self._undo_at_close.append(undo)

    def close(self) -> None:
        """Switch the option off; may be repeated."""
        with self._locked():
            self.attachment()
            sock = self.aliases.any()
            if sock is None or self.closed:
                return
            self.closed = True
            self.state.enabled = False
            try:
                self._detach(sock)
            finally:  # where the kernel refuses to undo its part, the process ends its own
                self._exemption.end(sock, owned=self._ownership.is_ours())
                for undo in self._undo_at_close if self._ownership.is_ours() else ():
                    with contextlib.suppress(OSError):
                        undo(SystemCalls(sock, self.state.root))
                for alias in self.aliases.living():
                    self.aliases.forget(alias)

    # --- for the sockets' methods, through the state ----------------------------------------------

    def _reattach_around(self, sock: socket.socket, operation: Callable[[], Any]) -> Any:
        with self._locked():
            if self.closed or not self._ownership.is_ours():
                return operation()
            try:
                self._detach(sock)
                return operation()
            finally:
                self._attach_or_serve_in_line(sock)

    def _set_option(self, enable: bool) -> None:
        if not enable:
            self.close()

    def _add_alias(self, sock: socket.socket) -> None:
        with self._locked():
            if self.closed:  # by another thread, while `sock` was made
                change_class(sock, self.state.original)
                return
            self.aliases.add(sock)

    def _remove_alias(self, sock: socket.socket) -> None:
        with self._locked():
            self.aliases.forget(sock)
            if not self.aliases:
                self._release()

    # --- attaching and detaching ------------------------------------------------------------------

    def _attach(self, sock: socket.socket) -> None:
        state = self.state
        self._exempt(sock)
        state.diversion.consumer = self._consumer()  # the backend asks whether there is one
        attachment = self.backend.attach(SystemCalls(sock, state.root), state.diversion)
        self._attachment = attachment
        self._kernel_has_all = isinstance(attachment, WholeAttachment)
        state.sensitive, state.hidden = attachment.sensitive, attachment.hidden
        state.unbound = attachment.mode == "unbound"
        performers = {attachment.duties[duty] for duty in (Duty.DROP_RUNTS, Duty.DIVERT_ESP)}
        exact = not leaks_of(attachment) and Performer.PROCESS not in performers
        # until the queue has been empty once, it may hold datagrams from before
        state.receive_size, state.draining = LARGEST_DATAGRAM, exact
        if self._consumer() is not None and works_here(self._consumer()):
            self._run_esp_here()
        state.unprepared = state.unbound or state.in_child is not None
        self._change_consumer(sock)

    def _detach(self, sock: socket.socket) -> None:
        state = self.state
        self._end_outlet()
        state.receive_size, state.draining, state.unbound = LARGEST_DATAGRAM, False, False
        state.unprepared = state.in_child is not None
        attachment, self._attachment = self._attachment, None
        if attachment is None:
            return
        if self._ownership.is_ours():
            attachment.detach(SystemCalls(sock, state.root))
        else:
            attachment.release()  # the kernel's part is the parent's

    def _attach_or_serve_in_line(self, sock: socket.socket) -> None:
        """Attach again; where the backend now refuses, classify in the process."""
        try:
            self._attach(sock)
        except OSError as error:
            from natcompat.backends.userspace import InLineAttachment

            reason = f"attaching again failed: {error}"
            self.state.diversion.error(reason)
            self._attachment = InLineAttachment(reason)
            self._kernel_has_all = False
            self.state.sensitive, self.state.hidden = frozenset(), {}
            self._change_consumer(sock)
        for alias in self.aliases.living():
            self._dress(alias)

    def _dress(self, sock: socket.socket) -> None:
        """Give `sock` the endpoint's class, or the original one where the kernel has all duties."""
        self.aliases.dress(sock, self.state.original if self._kernel_has_all else self._class)

    def _release(self) -> None:
        """End without touching the socket, which is closed or about to be. Runs in finalizers, too."""
        self.closed = True
        self.state.enabled = False
        self._end_outlet()
        attachment, self._attachment = self._attachment, None
        if attachment is not None:
            attachment.release()

    # --- who takes ESP ----------------------------------------------------------------------------

    def _consumer(self) -> EspConsumer | None:
        """Return the consumer of ESP: the application's, else the one of the backend's own ESP."""
        own_esp = own_esp_of(self.backend)
        return self._esp if self._esp is not None or own_esp is None else own_esp.consumer

    def _change_consumer(self, sock: socket.socket) -> None:
        """Give ESP to the consumer that there is now, and tell it where ESP may leave."""
        state = self.state
        self._end_outlet()
        state.diversion.consumer = consumer = self._consumer()
        if hasattr(consumer, "attached") and not state.unbound:
            esp_socket = getattr(self._attachment, "esp_socket", None)
            self._outlet = Outlet(state, self.aliases.any, esp_socket, consumer)
            self._outlet.begin()

    def _exempt(self, sock: socket.socket) -> None:
        own_esp = own_esp_of(self.backend)
        consumers = self._esp, own_esp.consumer if own_esp is not None else None
        self._exemption.renew(sock, consumers, owned=self._ownership.is_ours())

    def _end_outlet(self) -> None:
        outlet, self._outlet = self._outlet, None
        if outlet is not None:
            outlet.end()

    def _follow_own_esp(self) -> None:
        """Attach anew since the backend's own ESP was opened or closed."""
        with self._locked():
            sock = self.aliases.any()
            if sock is None or self.closed:
                return
            self._exempt(sock)  # the socket of an endpoint with a consumer of its own, too
            if self._consumer() is self.state.diversion.consumer:
                return
            steering = self._attachment is not None and self._attachment.mode == "steering"
            if self._attachment is not None and not self._ownership.is_ours() and steering:
                # the parent goes on; each process gets a part of the ESP
                if not self._ownership.runs_esp():
                    self._adopt(self._attachment)
                self._change_consumer(sock)
                return
            self._ownership.take()
            try:
                self._detach(sock)
            except OSError as error:
                self.state.diversion.error(f"detaching failed: {error}")
            self._attach_or_serve_in_line(sock)

    # --- processes and threads --------------------------------------------------------------------

    def _adopt(self, attachment: Attachment) -> None:
        attachment.adopt()
        self._run_esp_here()

    def _run_esp_here(self) -> None:
        self._ownership.run_esp()
        self.state.in_child = None
        self.state.unprepared = self.state.unbound

    def _succeed(self) -> None:
        """Take over ESP in a forked child whose parent has ended, or raise that ESP has ended, too."""
        if not self._ownership.is_ours():
            return  # the parent runs ESP
        with self._locked():
            attachment = self._attachment
            if self.state.in_child is None or attachment is None:
                return
            consumer = self.state.diversion.consumer
            if consumer is None or not works_here(consumer):
                raise self._ownership.lost_esp()
            self._adopt(attachment)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the endpoint's lock.

        A holder may wait for the thread that calls the ESP consumer. So that thread waits for the lock one
        second at most, and then gets EDEADLK.
        """
        in_consumer = threading.get_ident() in self.state.diversion.calling or is_reading_thread()
        lock = self._lock  # a forked child makes another
        if not lock.acquire(timeout=1.0 if in_consumer else -1):
            raise NatCompatError(
                errno.EDEADLK,
                "another thread is switching this endpoint and waits for the consumer of ESP",
                "Switch endpoints in another thread than the one that calls the consumer of ESP",
            )
        try:
            yield
        finally:
            lock.release()

    def forked(self) -> None:
        """Forget the locks and calls of threads that do not exist in this child, which runs no ESP yet."""
        self._lock = threading.RLock()
        self.state.diversion.calling.clear()
        if self.state.diversion.consumer is not None and not self.closed:
            self.state.in_child = self._succeed
            self.state.unprepared = True
            self.state.receive_size, self.state.draining = LARGEST_DATAGRAM, True


_switches: weakref.WeakSet[Switch] = weakref.WeakSet()


def _after_fork() -> None:
    for switch in list(_switches):
        switch.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
