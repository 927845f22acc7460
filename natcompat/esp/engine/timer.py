"""Deadlines of SAs, and a thread that waits for them where nobody else does."""

from __future__ import annotations

import heapq
import threading
import time
import weakref
from collections.abc import Callable
from itertools import count
from typing import Any, Final

_LONGEST_WAIT: Final = 3600.0


class Deadlines:
    """Items by the time at which they are due, on the monotonic clock. The caller holds a lock.

    Nothing is taken out early: an item that is no longer meant is recognised when it is due. Where
    most items are such, `prune` lets go of them.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, Any]] = []
        self._numbers = count()

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, deadline: float, item: Any) -> None:
        """Add `item`."""
        heapq.heappush(self._heap, (deadline, next(self._numbers), item))

    def take(self, now: float) -> Any:
        """Return an item that is due and no longer listed, or None."""
        if self._heap and self._heap[0][0] <= now:
            return heapq.heappop(self._heap)[2]
        return None

    @property
    def next(self) -> float | None:
        """When the next item is due."""
        return self._heap[0][0] if self._heap else None

    def prune(self, meant: Callable[[Any], bool]) -> None:
        """Keep only what is still `meant`."""
        self._heap = [entry for entry in self._heap if meant(entry[2])]
        heapq.heapify(self._heap)


class Timer:
    """A daemon thread that calls `tick` at the times that `tick` returns, started when first needed.

    It holds the owner of `tick` weakly, and ends with it.
    """

    def __init__(self, tick: Callable[[], float | None]) -> None:
        self._condition = threading.Condition()  # reentrant: the garbage collector runs anywhere
        self._tick = weakref.WeakMethod(tick, lambda _: self._end())
        self._wanted: float | None = None
        self._thread: threading.Thread | None = None
        self._closed = False

    def wake_at(self, deadline: float | None) -> None:
        """Have `tick` called at `deadline` or before, on the monotonic clock."""
        if deadline is None:
            return
        with self._condition:
            if self._closed or (self._wanted is not None and self._wanted <= deadline):
                return
            self._wanted = deadline
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="natcompat-esp-timer", daemon=True)
                self._thread.start()
            self._condition.notify()

    def close(self) -> None:
        """End the thread, and wait for it."""
        self._end()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _end(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify()

    def _run(self) -> None:
        while True:
            with self._condition:
                while not self._closed:
                    wait = _LONGEST_WAIT if self._wanted is None else self._wanted - time.monotonic()
                    if wait <= 0:
                        break
                    self._condition.wait(min(wait, _LONGEST_WAIT))
                if self._closed:
                    return
                self._wanted = None
            tick = self._tick()
            if tick is None:
                return
            deadline = tick()
            del tick
            self.wake_at(deadline)
