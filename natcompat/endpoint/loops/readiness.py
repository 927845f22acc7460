"""Waiting for a descriptor on an event loop, on every kind of loop."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import select
import selectors
import socket
import sys
import threading
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Final, Protocol

from natcompat.backends.system_calls import in_trio_task

if TYPE_CHECKING:
    from types import ModuleType

READ: Final = selectors.EVENT_READ
WRITE: Final = selectors.EVENT_WRITE


class Readiness(Protocol):
    """Calls back while a descriptor is ready."""

    def watch(self, event: int, callback: Callable[[], object] | None) -> None:
        """Call `callback` whenever there is `event`, READ or WRITE; None: no more."""

    def close(self) -> None:
        """Watch nothing any more. To be called before the descriptor is closed."""


class Waits(Protocol):
    """Suspends tasks until a descriptor is ready."""

    async def wait(self, event: int) -> None:
        """Wait for `event`, READ or WRITE. Raises OSError: EBADF after `close`."""

    async def checkpoint(self) -> None:
        """Let other tasks run."""

    def close(self) -> None:
        """End the waits that there are. To be called before the descriptor is closed."""


def running_loop() -> ModuleType | asyncio.AbstractEventLoop:
    """Return the module trio in a task of trio's, else asyncio's loop. Raises RuntimeError if none runs."""
    return sys.modules["trio"] if in_trio_task() else asyncio.get_running_loop()


def waits_on(sock: socket.socket) -> Waits:
    """Return the waits for `sock` on the running loop."""
    loop = running_loop()
    return _LoopWaits(loop, sock) if isinstance(loop, asyncio.AbstractEventLoop) else _TrioWaits(loop, sock)


def _closed() -> OSError:
    return OSError(errno.EBADF, os.strerror(errno.EBADF))


class _LoopWaits:
    """Waits of tasks on an asyncio loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        self._loop = loop
        self._readiness = readiness(loop, sock)
        self._futures: dict[int, list[asyncio.Future[None]]] = {READ: [], WRITE: []}

    async def wait(self, event: int) -> None:
        futures = self._futures[event]
        future = self._loop.create_future()
        futures.append(future)
        if len(futures) == 1:
            self._readiness.watch(event, lambda: self._ready(event))
        try:
            await future
        finally:
            if future in futures:  # cancelled
                futures.remove(future)
                if not futures:
                    self._readiness.watch(event, None)

    async def checkpoint(self) -> None:
        await asyncio.sleep(0)

    def close(self) -> None:
        self._readiness.close()
        for futures in self._futures.values():
            _finish_all(futures, lambda future: future.set_exception(_closed()))

    def _ready(self, event: int) -> None:
        self._readiness.watch(event, None)
        _finish_all(self._futures[event], lambda future: future.set_result(None))


def _finish_all(
    futures: list[asyncio.Future[None]], finish: Callable[[asyncio.Future[None]], object]
) -> None:
    pending = [future for future in futures if not future.done()]
    futures.clear()
    for future in pending:
        finish(future)


class _TrioWaits:
    """Waits of tasks on trio."""

    def __init__(self, trio: ModuleType, sock: socket.socket) -> None:
        self._trio, self._sock = trio, sock
        wait = {READ: trio.lowlevel.wait_readable, WRITE: trio.lowlevel.wait_writable}
        # trio lets one task wait for a descriptor
        self._waits = {event: (function, trio.Lock()) for event, function in wait.items()}

    async def wait(self, event: int) -> None:
        function, lock = self._waits[event]
        async with lock:
            if self._sock.fileno() < 0:
                raise _closed()
            try:
                await function(self._sock)
            except self._trio.ClosedResourceError:
                raise _closed() from None

    async def checkpoint(self) -> None:
        await self._trio.lowlevel.checkpoint()

    def close(self) -> None:
        self._trio.lowlevel.notify_closing(self._sock)


def readiness(loop: asyncio.AbstractEventLoop, sock: socket.socket) -> Readiness:
    """Return what the loop offers, or a thread where it offers nothing."""
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
    """A descriptor that is readable when the socket is ready, for uvloop.

    libuv ends a watch for good at the first POLLERR, which is what a pending ICMP error gives
    (``uv__poll_io()`` in src/unix/poll.c); a descriptor of epoll has none.
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
    """A thread that waits and does nothing else: the callbacks run on the loop, which then arms it again."""

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
        with contextlib.suppress(BlockingIOError):  # then it is awake
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
                ready = self._take(selector.select())
                if watched:
                    selector.unregister(self._descriptor)
                if ready:
                    self._armed = 0  # until the loop has seen to it
                    try:
                        self._loop.call_soon_threadsafe(self._ready, ready)
                    except RuntimeError:  # the loop is closed
                        return

    def _take(self, found: Iterable[tuple[selectors.SelectorKey, int]]) -> int:
        """Return the events of the socket among those `found`; swallow the waker's."""
        ready = 0
        for key, events in found:
            if key.fileobj is self._woken:
                self._woken.recv(4096)
            else:
                ready |= events
        return ready
