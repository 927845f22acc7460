"""Signals that end a tunnel: noted on arrival, acted on between two steps."""

from __future__ import annotations

import contextlib
import signal
import socket
from collections.abc import Iterator
from types import FrameType
from typing import Any, Final, Self

ENDING: Final = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)

GRACE: Final = 0.5
"""Seconds that a write may still take when the tunnel is to end."""


class Ended(BaseException):
    """A write waited for a reader, and the tunnel is to end."""


class EndingSignals:
    """While it is entered, SIGINT, SIGTERM and SIGHUP do nothing but make `fileno` readable.

    For the main thread. Elsewhere signals are left alone.
    """

    def __init__(self) -> None:
        self.number: int = 0
        """Of the first signal that came; 0: none did."""
        self._writing = False

    def __enter__(self) -> Self:
        self._reader, self._writer = socket.socketpair()
        self._reader.setblocking(False)
        self._writer.setblocking(False)
        self._before: dict[int, Any] = {}
        with contextlib.suppress(ValueError):  # not the main thread
            for number in ENDING:
                self._before[number] = signal.signal(number, self._note)
            if hasattr(signal, "SIGALRM"):
                self._before[signal.SIGALRM] = signal.signal(signal.SIGALRM, self._stop_writing)
            # a handler in Python runs only when a system call is over, which may just have begun
            self._woken_before = signal.set_wakeup_fd(self._writer.fileno(), warn_on_full_buffer=False)
        return self

    def __exit__(self, *_: object) -> None:
        if self._before:
            signal.set_wakeup_fd(self._woken_before)
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._reader.close()
        self._writer.close()

    def fileno(self) -> int:
        """Return the descriptor to wait on."""
        return self._reader.fileno()

    def wake(self) -> None:
        """Make `fileno` readable, until `rest`. From any thread."""
        with contextlib.suppress(OSError):  # it is so already
            self._writer.send(b"\0")

    def rest(self) -> None:
        """Wait for the next `wake`, or signal."""
        with contextlib.suppress(OSError):
            self._reader.recv(4096)

    @contextlib.contextmanager
    def writing(self) -> Iterator[None]:
        """Raise `Ended` out of a write that waits while the tunnel is to end."""
        self._writing = True
        try:
            self._set_timer(GRACE)
            yield
        finally:
            self._writing = False
            self._set_timer(0)

    def _note(self, number: int, _: FrameType | None) -> None:
        self.number = self.number or number
        if self._writing:
            self._set_timer(GRACE)

    def _set_timer(self, seconds: float) -> None:
        """Have SIGALRM come again and again: one that comes just before a system call does not end it."""
        if hasattr(signal, "setitimer") and signal.SIGALRM in self._before:
            signal.setitimer(signal.ITIMER_REAL, seconds, seconds)

    def _stop_writing(self, *_: object) -> None:
        if self._writing and self.number:
            self._writing = False
            self._set_timer(0)
            raise Ended
