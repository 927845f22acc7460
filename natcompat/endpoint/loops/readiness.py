"""Callbacks for a descriptor that is ready, on every kind of asyncio loop."""

from __future__ import annotations

import asyncio
import contextlib
import select
import selectors
import socket
import threading
from collections.abc import Callable, Iterable
from typing import Final, Protocol

READ: Final = selectors.EVENT_READ
WRITE: Final = selectors.EVENT_WRITE


class Readiness(Protocol):
    """Calls back while a descriptor is ready."""

    def watch(self, event: int, callback: Callable[[], object] | None) -> None:
        """Call `callback` whenever `event`, READ or WRITE, is possible; None ends the calls."""

    def close(self) -> None:
        """End all calls. Call it before the descriptor is closed."""


def readiness(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> Readiness:
    """Return the readiness of `sock` on `loop`: by the loop's own calls, or by a thread where it has none."""
    descriptor = sock.fileno()
    try:
        loop.add_reader(descriptor, lambda: None)
    except NotImplementedError:
        return _ThreadReadiness(loop, descriptor)
    loop.remove_reader(descriptor)
    if type(loop).__module__.partition(".")[0] == "uvloop" and hasattr(select, "epoll"):
        return _EpollReadiness(loop, descriptor)
    return _LoopReadiness(loop, descriptor)


class _LoopReadiness:
    """``add_reader`` and ``add_writer``."""

    def __init__(self, loop: asyncio.AbstractEventLoop, descriptor: int) -> None:
        self._descriptor = descriptor
        self._functions: dict[int, tuple[Callable[..., object], Callable[[int], object]]] = {
            READ: (loop.add_reader, loop.remove_reader),
            WRITE: (loop.add_writer, loop.remove_writer),
        }

    def watch(self, event: int, callback: Callable[[], object] | None) -> None:
        add, remove = self._functions[event]
        if callback is None:
            remove(self._descriptor)
        else:
            add(self._descriptor, callback)

    def close(self) -> None:
        for event in self._functions:
            self.watch(event, None)


class _EpollReadiness:
    """An epoll descriptor, which is readable when the socket is ready, for uvloop.

    libuv ends a watch for good at the first POLLERR, which a pending ICMP error gives (``uv__poll_io()``
    in src/unix/poll.c). An epoll descriptor gives none.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, descriptor: int) -> None:
        self._loop, self._descriptor = loop, descriptor
        self._epolls: dict[int, select.epoll] = {}

    def watch(self, event: int, callback: Callable[[], object] | None) -> None:
        epoll = self._epolls.pop(event, None)
        if epoll is not None:
            self._loop.remove_reader(epoll.fileno())
            epoll.close()
        if callback is not None:
            epoll = self._epolls[event] = select.epoll()
            epoll.register(self._descriptor, select.EPOLLIN if event == READ else select.EPOLLOUT)
            self._loop.add_reader(epoll.fileno(), callback)

    def close(self) -> None:
        for event in (READ, WRITE):
            self.watch(event, None)


class _ThreadReadiness:
    """A thread that waits. The callbacks run on the loop, which makes the thread wait again after them."""

    def __init__(self, loop: asyncio.AbstractEventLoop, descriptor: int) -> None:
        self._loop, self._descriptor = loop, descriptor
        self._callbacks: dict[int, Callable[[], object]] = {}
        self._armed = 0
        self._ended = False
        self._waker, self._woken = socket.socketpair()
        for end in (self._waker, self._woken):
            end.setblocking(False)
        self._thread = threading.Thread(target=self._run, name="natcompat-readiness", daemon=True)
        self._thread.start()

    def watch(self, event: int, callback: Callable[[], object] | None) -> None:
        if callback is None:
            self._callbacks.pop(event, None)
        else:
            self._callbacks[event] = callback
        self._arm()

    def close(self) -> None:
        if not self._ended:
            self._ended = True
            self._wake()
            self._thread.join()
            self._waker.close()
            self._woken.close()

    def _arm(self) -> None:
        self._armed = sum(self._callbacks)
        self._wake()

    def _wake(self) -> None:
        with contextlib.suppress(BlockingIOError):  # full: the thread is awake
            self._waker.send(b"\0")

    def _ready(self, events: int) -> None:
        try:
            for event in (READ, WRITE):
                callback = self._callbacks.get(event) if event & events else None
                if callback is not None:
                    callback()
        finally:
            if not self._ended:
                self._arm()

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            selector.register(self._woken, READ)
            while not self._ended:
                watched = self._armed
                if watched:
                    selector.register(self._descriptor, watched)
                ready = self._events_of_socket(selector.select())
                if watched:
                    selector.unregister(self._descriptor)
                if ready:
                    self._armed = 0  # until the callbacks have run
                    try:
                        self._loop.call_soon_threadsafe(self._ready, ready)
                    except RuntimeError:  # the loop is closed
                        return

    def _events_of_socket(self, selected: Iterable[tuple[selectors.SelectorKey, int]]) -> int:
        """Return the events of the socket among those `selected`; consume those of the waker."""
        ready = 0
        for key, events in selected:
            if key.fileobj is self._woken:
                self._woken.recv(4096)
            else:
                ready |= events
        return ready
