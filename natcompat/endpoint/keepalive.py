"""NAT-keepalives to any number of peers, by one timer (RFC 3948, sections 2.3 and 4)."""

from __future__ import annotations

import errno
import heapq
import itertools
import os
import queue
import random
import socket
import threading
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol

from natcompat.errors import NatCompatError

if TYPE_CHECKING:
    import asyncio
    from typing import Self

    from natcompat.endpoint.endpoint import NatTEndpoint

DEFAULT_INTERVAL: Final = 20.0
"""Seconds without traffic to a peer after which a keepalive is due (RFC 3948, section 4)."""

_JITTER: Final = 0.1  # share of the interval by which a keepalive may be early, never late
_RETRY: Final = 0.1  # share of the interval after which a keepalive that could not be sent is tried again
_BURST: Final = 64  # keepalives sent before a loop's other callbacks have their turn


class KernelKeepalive(Protocol):
    """A kernel that sends keepalives by itself, such as for an SA that was installed with an interval."""

    def take_over(self, address: Any, interval: float) -> bool:
        """Make the kernel send keepalives to `address` every `interval` seconds; False: it does not.

        An OSError is counted and means False.
        """

    def release(self, address: Any) -> None:
        """End what `take_over` began. Called once, when the peer is removed or the `Keepalive` ends."""


@dataclass(frozen=True, slots=True)
class KeepaliveStats:
    """What a `Keepalive` has done."""

    peers: int
    """Peers that there are now, those of the kernel included."""
    by_kernel: int
    """Peers whose keepalives the kernel sends."""
    sent: int
    skipped: int
    """Not sent when they were due, since traffic had flowed within the interval."""
    errors: int
    """Attempts that failed. The next follows after a tenth of the interval."""
    last_error: Exception | None


class Keepalive:
    """Sends NAT-keepalives from an endpoint to the peers to which no traffic has flowed for `interval`.

    By a daemon thread of its own, which the first peer starts, or with `loop` on that asyncio loop and
    by no thread. It ends with `close`, with the ``with`` block, when nobody holds it any more, and at
    the first keepalive that is due after the endpoint was closed. In a forked child it is closed. Methods
    may be called from any thread.

    Each keepalive is up to a tenth of the interval early, by chance, so that many peers do not fall
    into step. IKE that the endpoint's sockets send counts as traffic; say `sent` for ESP that leaves
    elsewhere. What sending raises ends nothing: see `KeepaliveStats.errors`.
    """

    def __init__(
        self,
        endpoint: NatTEndpoint,
        *,
        interval: float = DEFAULT_INTERVAL,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._interval = _positive(interval)
        schedule = _Schedule(endpoint)
        self._schedule = schedule
        schedule.timer = _ThreadTimer(schedule) if loop is None else _LoopTimer(schedule, loop)
        schedule.unobserve = endpoint.observe_sends(schedule.sent)
        # the timer and the endpoint know the schedule alone, so that this object can be collected
        self._finalizer = weakref.finalize(self, schedule.end)
        self._finalizer.atexit = False
        _schedules.add(schedule)

    @property
    def closed(self) -> bool:
        """Whether it has ended."""
        return self._schedule.ended

    def add(
        self, address: Any = None, *, interval: float | None = None, kernel: KernelKeepalive | None = None
    ) -> None:
        """Keep the mapping to `address` alive; None: to the peer that the socket is connected to.

        The address is numeric, as `socket.socket.recvfrom` returns it. A peer that is there already
        gets the new `interval`, counted from now. A `kernel` is asked first; what it takes over is
        not sent from here. Raises OSError: EBADF once this or the endpoint is closed, `socket.gaierror`
        for a host name and for an address of another family.
        """
        schedule = self._schedule
        interval = self._interval if interval is None else _positive(interval)
        if schedule.endpoint.closed:
            schedule.end()
        if schedule.ended:
            raise NatCompatError(
                errno.EBADF, "the keepalives have ended", "Make a Keepalive of an open endpoint"
            )
        if address is not None:
            address = _numeric(address, schedule.family)
        schedule.remove(address)
        schedule.add(_Peer(address, interval, kernel))

    def remove(self, address: Any = None) -> None:
        """Send no more keepalives to `address`; no error if none were sent."""
        self._schedule.remove(None if address is None else _numeric(address, self._schedule.family))

    def sent(self, address: Any = None) -> None:
        """Take note that something left for `address` just now, such as ESP. Costs a look-up."""
        self._schedule.sent(address)

    def stats(self) -> KeepaliveStats:
        """Return the counters."""
        schedule = self._schedule
        peers = list(schedule.peers.values())
        return KeepaliveStats(
            peers=len(peers),
            by_kernel=sum(peer.by_kernel for peer in peers),
            sent=schedule.sent_count,
            skipped=schedule.skipped_count,
            errors=schedule.error_count,
            last_error=schedule.last_error,
        )

    def close(self) -> None:
        """End it; returns when the thread is gone. May be repeated."""
        self._finalizer.detach()
        self._schedule.end()
        self._schedule.timer.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Peer:
    """One peer; `active` until it is removed."""

    __slots__ = ("active", "address", "by_kernel", "interval", "kernel", "last_traffic")

    def __init__(self, address: Any, interval: float, kernel: KernelKeepalive | None) -> None:
        self.address, self.interval, self.kernel = address, interval, kernel
        self.last_traffic = time.monotonic()
        self.active = True
        self.by_kernel = False

    def early(self, seconds: float) -> float:
        return seconds * (1 - _JITTER * random.random())  # noqa: S311 - nobody gains by guessing it


class _Schedule:
    """Who is due when. Knows no timer but to wake it; `run` does what is due now."""

    timer: _ThreadTimer | _LoopTimer

    def __init__(self, endpoint: NatTEndpoint) -> None:
        self.endpoint = endpoint
        self.family = endpoint._half.diversion.hand_back.family
        self.peers: dict[Any, _Peer] = {}
        self.ended = False
        self.sent_count = self.skipped_count = self.error_count = 0
        self.last_error: Exception | None = None
        self.unobserve: Callable[[], None] = lambda: None
        self.lock = threading.Lock()
        self._heap: list[tuple[float, int, _Peer]] = []
        self._order = itertools.count()
        self._to_connected = float("-inf")  # when something was sent without an address

    def add(self, peer: _Peer) -> None:
        if peer.kernel is not None:
            try:
                peer.by_kernel = peer.kernel.take_over(peer.address, peer.interval)
            except OSError as error:
                self._failed(error)
        with self.lock:
            self.peers[_key(peer.address)] = peer
            if peer.by_kernel:
                return
            self._push(peer, peer.last_traffic + peer.early(peer.interval))
            first = self._heap[0][2] is peer
        if first:
            self.timer.wake()

    def remove(self, address: Any) -> None:
        with self.lock:
            peer = self.peers.pop(_key(address), None)
            if peer is None:
                return
            peer.active = False
            if len(self._heap) > 2 * len(self.peers) + _BURST:  # mostly of peers that were removed
                self._heap = [entry for entry in self._heap if entry[2].active]
                heapq.heapify(self._heap)
        self._release(peer)

    def sent(self, address: Any) -> None:
        """Take note of traffic: without a lock, since it is on the way of every send."""
        now = time.monotonic()
        peer = self.peers.get(_key(address))
        if peer is not None:
            peer.last_traffic = now
        if address is None:
            self._to_connected = now

    def run(self, most: int) -> float | None:
        """Send up to `most` keepalives that are due; return the seconds to the next, None: there is none."""
        connected = self._connected()
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
        """End all of it, without waiting and without a lock: a finalizer calls this too."""
        if self.ended:
            return
        self.ended = True
        self.unobserve()
        for peer in list(self.peers.values()):
            self._release(peer)
        self.peers.clear()
        self.timer.wake()

    def _serve(self, peer: _Peer, now: float, connected: Any) -> float:
        """Send a keepalive to `peer` unless traffic has flowed; return when to look again."""
        last = peer.last_traffic
        if peer.address is not None and _key(peer.address) == connected:
            last = max(last, self._to_connected)
        if last + peer.interval * (1 - _JITTER) > now:
            self.skipped_count += 1
            return last + peer.early(peer.interval)
        try:
            self.endpoint.send_keepalive(peer.address)
        except Exception as error:  # noqa: BLE001 - nothing ends the timer; the others get theirs
            self._failed(error)
            return now + peer.early(peer.interval * _RETRY)
        self.sent_count += 1
        return now + peer.early(peer.interval)

    def _connected(self) -> Any:
        """Return the key of the peer that the socket is connected to now."""
        sock = self.endpoint._aliases.any()
        try:
            return None if sock is None else _key(sock.getpeername())
        except OSError:
            return None

    def _failed(self, error: Exception) -> None:
        self.error_count += 1
        self.last_error = error

    def _push(self, peer: _Peer, due: float) -> None:
        heapq.heappush(self._heap, (due, next(self._order), peer))

    def _release(self, peer: _Peer) -> None:
        if peer.by_kernel and peer.kernel is not None:
            peer.by_kernel = False
            try:
                peer.kernel.release(peer.address)
            except OSError as error:
                self._failed(error)


class _ThreadTimer:
    """Runs a schedule in a thread, which the first `wake` starts."""

    def __init__(self, schedule: _Schedule) -> None:
        self._schedule = schedule
        self._thread: threading.Thread | None = None
        # a SimpleQueue, since a finalizer may put into it whatever lock its thread holds
        self._wakes: queue.SimpleQueue[None] = queue.SimpleQueue()

    def wake(self) -> None:
        self._wakes.put(None)
        if self._thread is None and not self._schedule.ended:
            with self._schedule.lock:
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name="natcompat-keepalive", daemon=True)
                    self._thread.start()

    def join(self) -> None:
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()

    def _run(self) -> None:
        while not self._schedule.ended:
            seconds = self._schedule.run(_BURST)
            try:
                self._wakes.get(timeout=seconds)
            except queue.Empty:
                continue


class _LoopTimer:
    """Runs a schedule on an asyncio loop."""

    def __init__(self, schedule: _Schedule, loop: asyncio.AbstractEventLoop) -> None:
        self._schedule = schedule
        self._loop = loop
        self._handle: asyncio.TimerHandle | None = None

    def wake(self) -> None:
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


def _positive(interval: float) -> float:
    if not 0 < interval < threading.TIMEOUT_MAX:
        raise ValueError(f"the interval is to be a positive number of seconds, not {interval!r}")
    return float(interval)


def _numeric(address: Any, family: int) -> Any:
    """Return the numeric `address` as sockets of `family` write it."""
    host, port, *rest = address
    if not 0 <= port < 65536:
        raise OverflowError(f"port must be 0-65535, not {port}")
    found: Any = socket.getaddrinfo(host, port, family, socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)[0][4]
    return (*found[:2], *rest) if rest else found


def _key(address: Any) -> Any:
    """Return what addresses of one peer have in common: an IPv6 address may come with 2 to 4 elements."""
    return address if address is None or len(address) == 2 else (*address[:2], *filter(None, address[3:]))


_schedules: weakref.WeakSet[_Schedule] = weakref.WeakSet()


def _after_fork() -> None:
    for schedule in list(_schedules):
        # the kernel's keepalives are the parent's, and so is the timer
        schedule.ended = True
        schedule.unobserve()
        schedule.peers.clear()
        schedule.lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
