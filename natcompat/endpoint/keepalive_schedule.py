"""When keepalives are due, and the timers that send them."""

from __future__ import annotations

import heapq
import itertools
import os
import queue
import random
import threading
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Protocol

if TYPE_CHECKING:
    import asyncio

_JITTER: Final = 0.1  # share of the interval by which a keepalive may be early, never late
_RETRY: Final = 0.1  # share of the interval after which a keepalive that could not be sent is tried again
_BURST: Final = 64  # keepalives sent before a loop's other callbacks run


class Sender(Protocol):
    """The methods of an endpoint that a schedule calls."""

    @property
    def closed(self) -> bool:
        """Whether the option is off."""

    @property
    def peer(self) -> Any:
        """Address of the connected peer, or None."""

    def send_keepalive(self, address: Any = None, *, local_address: Any = None) -> None:
        """Send one keepalive to `address`, None: to the connected peer; from `local_address`, None: any."""


class KernelKeepalive(Protocol):
    """A kernel that sends keepalives by itself, such as for an SA that was installed with an interval."""

    def take_over(self, address: Any, interval: float) -> bool:
        """Make the kernel send keepalives to `address` every `interval` seconds; False: it does not.

        An OSError is counted and means False.
        """

    def release(self, address: Any) -> None:
        """End what `take_over` began. Called once, when the peer is removed or the `Keepalive` ends."""


class Peer:
    """One peer, with the time of the last traffic to it; `active` until it is removed."""

    __slots__ = ("active", "address", "by_kernel", "interval", "kernel", "last_traffic", "local_address")

    def __init__(
        self, address: Any, interval: float, kernel: KernelKeepalive | None, local_address: Any = None
    ) -> None:
        self.address: Any = address
        self.interval: float = interval
        self.kernel: KernelKeepalive | None = kernel
        self.local_address: Any = local_address
        self.last_traffic: float = time.monotonic()
        self.active: bool = True
        self.by_kernel: bool = False

    def shortly_before(self, seconds: float) -> float:
        """Return `seconds`, less a random part of a tenth."""
        return seconds * (1 - _JITTER * random.random())  # noqa: S311 - no secret


class Schedule:
    """The peers of one `Keepalive`, by when they are due. A timer calls `run`; `timer.wake` tells it to."""

    timer: ThreadTimer | LoopTimer

    def __init__(self, endpoint: Sender) -> None:
        self.endpoint: Sender = endpoint
        self.peers: dict[Any, Peer] = {}
        self.ended: bool = False
        self.sent_count: int = 0
        self.skipped_count: int = 0
        self.error_count: int = 0
        self.last_error: Exception | None = None
        self.unobserve: Callable[[], None] = lambda: None
        self.lock: threading.Lock = threading.Lock()
        self._heap: list[tuple[float, int, Peer]] = []
        self._order = itertools.count()
        self._to_connected = float("-inf")  # when something was last sent without an address
        _schedules.add(self)

    def add(self, peer: Peer) -> None:
        """Add `peer`; its kernel is asked first."""
        if peer.kernel is not None:
            try:
                peer.by_kernel = peer.kernel.take_over(peer.address, peer.interval)
            except OSError as error:
                self._failed(error)
        with self.lock:
            self.peers[peer_key(peer.address)] = peer
            if peer.by_kernel:
                return
            self._push(peer, peer.last_traffic + peer.shortly_before(peer.interval))
            first = self._heap[0][2] is peer
        if first:
            self.timer.wake()

    def remove(self, address: Any) -> None:
        """Remove the peer at `address`, if there is one."""
        with self.lock:
            peer = self.peers.pop(peer_key(address), None)
            if peer is None:
                return
            peer.active = False
            if len(self._heap) > 2 * len(self.peers) + _BURST:  # most of them removed
                self._heap = [entry for entry in self._heap if entry[2].active]
                heapq.heapify(self._heap)
        self._release(peer)

    def sent(self, address: Any) -> None:
        """Note traffic to `address`. Takes no lock, since every send calls it."""
        now = time.monotonic()
        peer = self.peers.get(peer_key(address))
        if peer is not None:
            peer.last_traffic = now
        if address is None:
            self._to_connected = now

    def run(self, most: int) -> float | None:
        """Send up to `most` keepalives that are due; return the seconds to the next, None: there is none."""
        connected = peer_key(self.endpoint.peer)
        for _ in range(most):
            with self.lock:
                while self._heap and not self._heap[0][2].active:
                    heapq.heappop(self._heap)
                if not self._heap or self.ended:
                    return None
                now = time.monotonic()
                if self._heap[0][0] > now:
                    return self._heap[0][0] - now
                peer = heapq.heappop(self._heap)[2]
            if self.endpoint.closed:
                self.end()
                return None
            due = self._serve(peer, now, connected)
            with self.lock:
                self._push(peer, due)
        return 0.0

    def end(self) -> None:
        """End every keepalive, without waiting and without a lock: finalizers call this, too."""
        if self.ended:
            return
        self.ended = True
        self.unobserve()
        for peer in list(self.peers.values()):
            self._release(peer)
        self.peers.clear()
        self.timer.wake()

    def _serve(self, peer: Peer, now: float, connected: Any) -> float:
        """Send a keepalive to `peer` unless it had traffic; return when it is due next."""
        last = peer.last_traffic
        if peer.address is not None and peer_key(peer.address) == connected:
            last = max(last, self._to_connected)
        if last + peer.interval * (1 - _JITTER) > now:
            self.skipped_count += 1
            return last + peer.shortly_before(peer.interval)
        try:
            self.endpoint.send_keepalive(peer.address, local_address=peer.local_address)
        except Exception as error:  # noqa: BLE001 - the other peers get theirs
            self._failed(error)
            return now + peer.shortly_before(peer.interval * _RETRY)
        self.sent_count += 1
        return now + peer.shortly_before(peer.interval)

    def _failed(self, error: Exception) -> None:
        self.error_count += 1
        self.last_error = error

    def _push(self, peer: Peer, due: float) -> None:
        heapq.heappush(self._heap, (due, next(self._order), peer))

    def _release(self, peer: Peer) -> None:
        if peer.by_kernel and peer.kernel is not None:
            peer.by_kernel = False
            try:
                peer.kernel.release(peer.address)
            except OSError as error:
                self._failed(error)


class ThreadTimer:
    """Runs a schedule in a thread, which the first `wake` starts."""

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._thread: threading.Thread | None = None
        # a SimpleQueue, since a finalizer may put into it while its thread holds any lock
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()

    def wake(self) -> None:
        """Have the schedule looked at now."""
        self._wakes.put(None)
        if self._thread is None and not self._schedule.ended:
            with self._schedule.lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="natcompat-keepalive", daemon=True)
                    self._thread.start()

    def join(self) -> None:
        """Wait until the thread has ended; the thread itself does not wait."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while not self._schedule.ended:
            seconds = self._schedule.run(_BURST)
            try:
                self._wakes.get(timeout=seconds)
            except queue.Empty:
                continue


class LoopTimer:
    """Runs a schedule on an asyncio loop."""

    def __init__(self, schedule: Schedule, loop: asyncio.AbstractEventLoop) -> None:
        self._schedule = schedule
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    def wake(self) -> None:
        """Have the schedule looked at now. From any thread."""
        try:
            self._loop.call_soon_threadsafe(self._run)
        except RuntimeError:  # the loop is closed
            self._schedule.end()

    def join(self) -> None:
        """There is no thread."""

    def _run(self) -> None:
        if self._handle is not None:
            self._handle.cancel()
            self._handle = None
        if not self._schedule.ended:
            seconds = self._schedule.run(_BURST)
            if seconds is not None:
                self._handle = self._loop.call_later(seconds, self._run)


def peer_key(address: Any) -> Any:
    """Return the same key for every form of a peer's address: one of IPv6 has two to four elements."""
    return address if address is None or len(address) == 2 else (*address[:2], *filter(None, address[3:]))


_schedules: weakref.WeakSet[Schedule] = weakref.WeakSet()


def _after_fork() -> None:
    for schedule in list(_schedules):
        # the parent goes on with the timer, and owns the kernel's keepalives
        schedule.ended = True
        schedule.unobserve()
        schedule.peers.clear()
        schedule.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
