"""Packets that fail authentication, told from the kernel's counters: XFRM has no message for them.

`XfrmInStateProtoError` of /proc/net/xfrm_stat counts them for all SAs of the network namespace, and each SA
has a counter of its own. A timer (timerfd_create(2)) makes the watch readable; while the one counter stands
still, the SAs are not looked at.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
import time
from collections.abc import Callable, Iterator
from typing import Final

from natcompat.errors import NatCompatError
from natcompat.ipsec import IntegrityFailure, SaId
from natcompat.kernel.xfrm import messages
from natcompat.kernel.xfrm.readback import decode, sa_id_of, usage_of

INTERVAL: Final = 5.0
"""Seconds between two looks at the counter."""
SERIES: Final = 60.0
"""Seconds without a failure of an SA, after which the next is the first of a new series."""
_COUNTER: Final = "XfrmInStateProtoError"
_CLOCK_MONOTONIC: Final = 1  # linux/time.h
_FLAGS: Final = os.O_NONBLOCK | os.O_CLOEXEC  # TFD_NONBLOCK, TFD_CLOEXEC
_ITIMERSPEC: Final = struct.Struct("@4l")
_ESP: Final = 50


class IntegrityWatch:
    """The counters of one network namespace: that of the thread which makes the watch.

    Without /proc/net/xfrm_stat (CONFIG_XFRM_STATISTICS, a sandbox) it is never readable.
    """

    def __init__(self, dump: Callable[[], list[bytes]], *, interval: float = INTERVAL) -> None:
        """`dump` returns all SAs."""
        self._dump = dump
        self._failures: dict[SaId, tuple[int, float]] = {}
        with contextlib.ExitStack() as stack:
            self._timer = _timer(interval)
            stack.callback(os.close, self._timer)
            self._statistics: int | None = None
            with contextlib.suppress(OSError):
                self._statistics = os.open("/proc/thread-self/net/xfrm_stat", os.O_RDONLY | os.O_CLOEXEC)
                stack.callback(os.close, self._statistics)
            self._counter = self._count()
            self._stack = stack.pop_all()

    @property
    def works(self) -> bool:
        """Whether this kernel tells."""
        return self._statistics is not None

    def fileno(self) -> int:
        """Return the timer, readable when it is time for `read`."""
        return self._timer

    def read(self) -> list[IntegrityFailure]:
        """Return an event for each SA with a new series of failures, if it is time to look; never waits."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._timer, 8)
            counter = self._count()
            if counter != self._counter:
                found = list(self._new_series())
                self._counter = counter
                return found
        return []

    def close(self) -> None:
        """Close timer and counters."""
        self._stack.close()

    def _count(self) -> int:
        if self._statistics is None:
            return 0
        for line in os.pread(self._statistics, 65536, 0).decode("ascii", "replace").splitlines():
            name, _, value = line.partition(" ")
            if name.strip() == _COUNTER:
                return int(value)
        return 0

    def _new_series(self) -> Iterator[IntegrityFailure]:
        now = time.monotonic()
        before, self._failures = self._failures, {}
        for answer in self._dump():
            message = decode(messages.xfrm_usersa_info, answer)
            failures = usage_of(answer).integrity_drops or 0
            if not failures or message["id_proto"] != _ESP:
                continue
            sa_id = sa_id_of(message)
            count, latest = before.get(sa_id, (0, -SERIES))
            if failures == count:
                self._failures[sa_id] = count, latest
                continue
            self._failures[sa_id] = failures, now
            if now - latest >= SERIES:
                yield IntegrityFailure(
                    sa_id=sa_id, reqid=message["reqid"], address=None, port=0, count=failures
                )


def _timer(interval: float) -> int:
    """Return a timer that becomes readable every `interval` seconds."""
    libc = ctypes.CDLL(None, use_errno=True)
    timer = int(libc.timerfd_create(_CLOCK_MONOTONIC, _FLAGS))
    if timer >= 0:
        seconds, nanoseconds = int(interval), int(interval % 1 * 1e9)
        value = _ITIMERSPEC.pack(seconds, nanoseconds, seconds, nanoseconds)
        if libc.timerfd_settime(timer, 0, value, None) == 0:
            return timer
        os.close(timer)
    number = ctypes.get_errno() or errno.ENOSYS
    raise NatCompatError(
        number, f"No timer for events: {os.strerror(number)}", "Raise the limit of open files"
    )
