"""Threads that wait for descriptors, and the reading of sockets that ESP is steered to by one of them."""

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
"""Takes a bounded burst from a descriptor; the argument is what `select.poll` said of it."""

POLLIN, POLLERR, POLLHUP, POLLNVAL = 0x01, 0x08, 0x10, 0x20  # poll.h; Windows has no poll, and needs one
_ABANDONING: Final = 1.0  # seconds that a finalizer waits for whoever takes the bursts
_LOOK: Final = 0.05  # seconds after which who waits for a pass looks whether the thread is still there


_reading: set[int] = set()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reading.clear)


def is_reading_thread() -> bool:
    """Tell whether this thread is one for whose pass others wait, so that it may not wait for them."""
    return threading.get_ident() in _reading


class ReadingThread:
    """Waits for descriptors, and has a burst taken from each that is readable, in turn.

    One thread for all that one process moves: two would take the interpreter's lock from each other at
    every system call. Any thread may call the methods; the one that reads may, too. What a `Take` raises is
    logged, and the thread goes on.
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
        """Begin. RuntimeError: there can be no more threads; nothing is left of this one."""
        try:
            self._thread.start()
        except BaseException:
            self._close()
            raise

    def add(self, descriptor: int, take: Take) -> None:
        """Have `take` called whenever `descriptor` is readable."""
        self._takes[descriptor] = take
        self._interrupt()

    def remove(
        self,
        descriptors: Iterable[int],
        then: Callable[[], object] | None = None,
        patience: float | None = None,
    ) -> None:
        """Wait for `descriptors` no more. When this returns no thread touches them; then `then` is called.

        With `patience`, in seconds, it returns after that in any case, and `then` is called when it may
        be; so it is where the reading thread itself calls, once that has come through what it is doing. A
        socket in which a thread still waits would stay in its SO_REUSEPORT group.
        """
        for each in descriptors:
            self._takes.pop(each, None)
        passed = threading.Event()
        if os.getpid() == self._pid and self._thread.is_alive():
            self._left.append((passed, then))
            self._interrupt()
            if self._thread is threading.current_thread():
                return  # when it has come through what it is doing
            until = None if patience is None else time.monotonic() + patience
            while not passed.wait(_LOOK) and self._thread.is_alive():
                if until is not None and time.monotonic() > until:
                    return
        if then is not None and not passed.is_set():
            then()

    def end(self, patience: float | None = None) -> None:
        """End the thread and wait for it, for so many seconds; in a forked child there is none.

        It may be the one that calls, and then ends when it has come through what it is doing.
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
        with contextlib.suppress(OSError):  # full: it is awake; closed: it has ended
            self._wake.send(b"x")

    def _close(self) -> None:
        self._wake.close()
        self._awake.close()

    @property
    def alive(self) -> bool:
        """Whether it reads, or is about to."""
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
                if events & POLLNVAL:  # somebody closed it behind our back
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
        except BaseException:  # noqa: BLE001 - SystemExit, too, would end what others rely on
            _log.exception("what reads ESP failed")


def _poll(descriptors: Sequence[int]) -> Callable[[], list[tuple[int, int]]]:
    """Return what waits until one of `descriptors` is readable, and tells which."""
    if not hasattr(select, "poll"):  # looked up each time, since gevent exchanges it
        return lambda: [(each, POLLIN) for each in select.select(descriptors, [], [])[0]]
    poller = select.poll()
    for each in descriptors:
        poller.register(each, POLLIN)
    return poller.poll


class SocketsOfThread:
    """Sockets that a `ReadingThread` reads; a `natcompat.backends.base.SocketReader`."""

    def __init__(
        self,
        sockets: Sequence[socket.socket],
        take: TakeBurst,
        thread: ReadingThread | None = None,
    ) -> None:
        """`take` takes a burst from one of `sockets`. `thread` None: one of their own."""
        self._sockets = {each.fileno(): each for each in sockets}
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
        """The thread has ended: go on with one of their own, if these are still to be read."""
        with self._lock:
            if not self._closed:
                self._join(None)

    def count(self) -> None:
        """They are: who takes bursts counts."""

    def close(self) -> None:
        """Read no more. When it returns no thread touches the sockets, which stay open."""
        with self._lock:
            self._closed = True
        self._thread.remove(self._sockets)
        if self._own:
            self._thread.end()

    def abandon(self) -> None:
        """Likewise, and close them, whatever the consumer of ESP is doing.

        A finalizer may run while its thread holds a lock that the consumer waits for, so it waits
        for a while only; the reading thread closes the sockets when it is through.
        """
        with self._lock:
            self._closed = True
        self._thread.remove(self._sockets, self._close_all, _ABANDONING)
        if self._own:
            self._thread.end(_ABANDONING)

    def _close_all(self) -> None:
        for each in self._sockets.values():
            each.close()
