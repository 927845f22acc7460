"""Events for listeners, on a descriptor that select, asyncio and trio can wait on."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Final, Self

from natcompat.ipsec import Event, EventsLost, Expire, MappingChange, SaId

LONGEST_QUEUE: Final = 1024
"""Events that wait for one listener. When there are more, they are dropped, and it reads `EventsLost`."""

MOST_EXPIRED: Final = 1 << 16
"""SAs that are gone, for one listener that has not read since it lost events."""


class EspEvents:
    """One listener. A socket pair, because every event loop on every system can wait on a socket.

    A newer mapping change takes the place of an older one of the same SA that has not been read, so a peer
    that moves often does not push out what concerns others.
    """

    def __init__(
        self, forget: Callable[[EspEvents], None], catch_up: Callable[[list[Expire]], list[Event]]
    ) -> None:
        """`forget` is called on close.

        `catch_up` returns the events that still hold; it is given the hard expiries that were lost.
        """
        self._forget = forget
        self._catch_up = catch_up
        self._queue: dict[Hashable, Event] = {}
        self._number = 0
        self._lost = False
        self._expired: dict[SaId, Expire] = {}
        self._lock = threading.Lock()
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)

    def put(self, event: Event) -> None:
        """Add `event`, and make the descriptor readable; never waits."""
        with self._lock:
            if self._lost:
                self._keep_expired(event)
                return
            was_empty = not self._queue
            self._number += 1
            key: Hashable = event.sa_id if isinstance(event, MappingChange) else self._number
            self._queue.pop(key, None)  # the newer one goes to the end
            if len(self._queue) >= LONGEST_QUEUE:
                for lost in (*self._queue.values(), event):
                    self._keep_expired(lost)
                self._queue.clear()
                self._lost = True
                return
            self._queue[key] = event
            if was_empty:
                with contextlib.suppress(OSError):  # closed meanwhile
                    self._writer.send(b"\0")

    def _keep_expired(self, event: Event) -> None:
        if isinstance(event, Expire) and event.hard:
            if len(self._expired) >= MOST_EXPIRED:
                del self._expired[next(iter(self._expired))]
            self._expired[event.sa_id] = event

    def fileno(self) -> int:
        """Return the descriptor to wait on; -1 after `close`."""
        return self._reader.fileno()

    def read(self) -> Sequence[Event]:
        """Return what has happened since the last call, oldest first; never waits.

        After `EventsLost` come the events that still hold: SAs that are gone, SAs to be rekeyed, and the
        newest mapping of each SA whose peer is elsewhere.
        """
        with self._lock:
            with contextlib.suppress(OSError):
                self._reader.recv(16)
            events = list(self._queue.values())
            self._queue.clear()
            lost, self._lost = self._lost, False
            expired, self._expired = list(self._expired.values()), {}
        return [EventsLost(), *self._catch_up(expired)] if lost else events

    def close(self) -> None:
        """Stop listening."""
        self._forget(self)
        self._reader.close()
        self._writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
