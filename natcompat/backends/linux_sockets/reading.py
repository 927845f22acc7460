"""`ReadingThread`, which waits for descriptors, and `SocketsOfThread`: ESP sockets that it reads."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Final, TypeAlias

from natcompat.backends.base import TakeBurst
from natcompat.errors import get_logger

_log = get_logger()

Take: TypeAlias = Callable[[int], object]
"""Takes a bounded burst from a descriptor; the argument is its event mask from `select.poll`."""

POLLIN, POLLERR, POLLHUP, POLLNVAL = 0x01, 0x08, 0x10, 0x20  # poll.h; Windows has no poll, and needs one
_ABANDONING: Final = 1.0  # seconds that a finalizer waits for the consumer of ESP
_LOOK: Final = 0.05  # seconds between two looks whether the thread still lives


_reading: set[int] = set()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reading.clear)


def is_reading_thread() -> bool:
    """Return whether the caller is a `ReadingThread`: other threads wait for it, so it must not wait."""
    return threading.get_ident() in _reading


class ReadingThread:
    """A thread that waits for descriptors and takes a burst from each readable one, in turn.

    One thread reads all descriptors of a consumer: two would take the interpreter's lock from each other at
    every system call. Any thread may call the methods, the reading thread included. An exception of a `Take`
    is logged, and the thread goes on.
    """

    def __init__(self, name: str) -> None:
        self._takes: dict[int, Take] = {}
        self._left: list[tuple[threading.Event, Callable[[], object] | None]] = []
        self._pid = os.getpid()
        self._changed = True
        self._ended = False
        self._awake, self._wake = socket.socketpair()
        for end in (self._awake, self._wake):
            end.setblocking(False)
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> None:
        """Start the thread. Raises RuntimeError if no thread can be made; its descriptors are closed then."""
        try:
            self._thread.start()
        except BaseException:
            self._close()
            raise

    def add(self, descriptor: int, take: Take) -> None:
        """Call `take` whenever `descriptor` is readable."""
        self._takes[descriptor] = take
        self._interrupt()

    def remove(
        self,
        descriptors: Iterable[int],
        then: Callable[[], object] | None = None,
        patience: float | None = None,
    ) -> None:
        """Stop waiting for `descriptors`; call `then` once no thread touches them, and return.

        With `patience`, in seconds, it returns after that time in any case, and the reading thread calls
        `then` as soon as it can. The same holds where the reading thread itself is the caller. A socket in
        which a thread still waits would stay in its SO_REUSEPORT group.
        """
        for descriptor in descriptors:
            self._takes.pop(descriptor, None)
        passed = threading.Event()
        if os.getpid() == self._pid and self._thread.is_alive():
            self._left.append((passed, then))
            self._interrupt()
            if self._thread is threading.current_thread():
                return  # _report_pass() calls `then`
            until = None if patience is None else time.monotonic() + patience
            while not passed.wait(_LOOK) and self._thread.is_alive():
                if until is not None and time.monotonic() > until:
                    return
        if then is not None and not passed.is_set():
            then()

    def end(self, patience: float | None = None) -> None:
        """End the thread and wait for it, at most `patience` seconds; a forked child has no thread.

        If the thread itself is the caller, it ends after its current pass.
        """
        self._ended = True
        if os.getpid() == self._pid and self._thread.ident is not None:
            self._interrupt()
            if self._thread is not threading.current_thread():
                self._thread.join(patience)
        else:
            self._close()

    def _interrupt(self) -> None:
        self._changed = True
        with contextlib.suppress(OSError):  # a full socket: the thread is awake; a closed one: it has ended
            self._wake.send(b"x")

    def _close(self) -> None:
        self._wake.close()
        self._awake.close()

    @property
    def alive(self) -> bool:
        """Whether the thread runs or has not started yet."""
        return not self._ended and (self._thread.ident is None or self._thread.is_alive())

    def _run(self) -> None:
        _reading.add(threading.get_ident())
        try:
            self._read()
        finally:
            self._ended = True
            self._report_pass()
            self._close()
            _reading.discard(threading.get_ident())

    def _read(self) -> None:
        waiting: Callable[[], list[tuple[int, int]]] = list
        while not self._ended:
            if self._changed:
                self._changed = False
                waiting = _poll([self._awake.fileno(), *self._takes])
            for descriptor, events in waiting():
                take = self._takes.get(descriptor)
                if events & POLLNVAL:  # the application closed the descriptor
                    self._takes.pop(descriptor, None)
                    self._changed = True
                elif take is not None:
                    if not self._ended:
                        self._call(take, events)
                else:
                    with contextlib.suppress(OSError):
                        self._awake.recv(4096)
            self._report_pass()

    def _report_pass(self) -> None:
        while self._left:
            passed, then = self._left.pop()
            if then is not None:
                self._call(then)
            passed.set()

    @staticmethod
    def _call(function: Callable[..., object], *arguments: object) -> None:
        try:
            function(*arguments)
        except BaseException:  # noqa: BLE001 - even SystemExit must not end the thread
            _log.exception("a callback of the thread that reads ESP failed")


def _poll(descriptors: Sequence[int]) -> Callable[[], list[tuple[int, int]]]:
    """Return a function that waits until some of `descriptors` are readable and returns them with events."""
    if not hasattr(select, "poll"):  # looked up at each call, since gevent replaces the module's functions
        return lambda: [(descriptor, POLLIN) for descriptor in select.select(descriptors, [], [])[0]]
    poller = select.poll()
    for descriptor in descriptors:
        poller.register(descriptor, POLLIN)
    return poller.poll


class SocketsOfThread:
    """ESP sockets that a `ReadingThread` reads; a `natcompat.backends.base.SocketReader`."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        take: TakeBurst,
        thread: ReadingThread | None = None,
    ) -> None:
        """`take` takes a burst from one of `sockets`. `thread`: None for a new one."""
        self._sockets = {sock.fileno(): sock for sock in sockets}
        self._take = take
        self._lock = threading.RLock()
        self._closed = False
        self._join(thread)

    def _join(self, thread: ReadingThread | None) -> None:
        self._own = thread is None
        self._thread = thread or ReadingThread("natcompat-esp")
        for descriptor, sock in self._sockets.items():
            self._thread.add(descriptor, lambda _, sock=sock: self._take(sock))  # type: ignore[misc]
        if self._own:
            self._thread.start()

    def leave(self) -> None:
        """The thread has ended: go on with a new one, unless the sockets are closed."""
        with self._lock:
            if not self._closed:
                self._join(None)

    def count(self) -> None:
        """Do nothing: `take` counts."""

    def close(self) -> None:
        """Stop reading. On return no thread touches the sockets, which stay open."""
        with self._lock:
            self._closed = True
        self._thread.remove(self._sockets)
        if self._own:
            self._thread.end()

    def abandon(self) -> None:
        """Stop reading and close the sockets, even while the consumer of ESP is busy.

        A finalizer may run in a thread that holds a lock for which the consumer waits, so this waits a
        limited time; after that the reading thread closes the sockets at the end of its pass.
        """
        with self._lock:
            self._closed = True
        self._thread.remove(self._sockets, self._close_all, _ABANDONING)
        if self._own:
            self._thread.end(_ABANDONING)

    def _close_all(self) -> None:
        for sock in self._sockets.values():
            sock.close()
