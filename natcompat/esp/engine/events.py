"""Events for whoever listens, on a descriptor that select, asyncio and trio can wait on."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import Final, Self

from natcompat.ipsec import Event, EventsLost

LONGEST_QUEUE: Final = 1024
"""Events that wait for one listener; more, and it is told that some are lost."""


class EspEvents:
    """One listener. A socket pair, because every event loop on every system can wait on a socket."""

    def __init__(self, forget: Callable[[EspEvents], None], catch_up: Callable[[], list[Event]]) -> None:
        """`forget` is called on close; `catch_up` returns the events that are still due."""
        self._forget = forget
        self._catch_up = catch_up
        self._queue: deque[Event] = deque()
        self._lost = False
        self._lock = threading.Lock()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def put(self, event: Event) -> None:
        """Add `event`, and wake who waits; never waits itself."""
        with self._lock:
            if self._lost:
                return
            if len(self._queue) >= LONGEST_QUEUE:
                self._queue.clear()
                self._lost = True
                return
            self._queue.append(event)
            if len(self._queue) == 1:
                with contextlib.suppress(OSError):  # closed meanwhile
                    self._writer.send(b"\0")

    def fileno(self) -> int:
        """Return the descriptor to wait on; -1 after `close`."""
        return self._reader.fileno()

    def read(self) -> Sequence[Event]:
        """Return what has happened since the last call, oldest first; never waits."""
        with self._lock:
            with contextlib.suppress(OSError):
                self._reader.recv(16)
            events = list(self._queue)
            self._queue.clear()
            lost, self._lost = self._lost, False
        return [EventsLost(), *self._catch_up()] if lost else events

    def close(self) -> None:
        """Stop listening."""
        self._forget(self)
        self._reader.close()
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
