"""`FaultLog`: errors that a packet caused, logged at most once a minute for each kind."""

from __future__ import annotations

import logging
import time
from typing import Final

from natcompat.errors import get_logger, printable

INTERVAL: Final = 60.0
"""Seconds between two log lines of one kind."""

_MOST_KINDS: Final = 256

_log = get_logger()


class FaultLog:
    """Logs errors by kind. A packet from the network must not fill the log, and must not raise."""

    def __init__(self) -> None:
        self._logged: dict[str, float] = {}
        self._silent: dict[str, int] = {}

    def note(
        self, kind: str, detail: object, *, level: int = logging.WARNING, error: BaseException | None = None
    ) -> None:
        """Log `kind` and `detail`, unless one of this kind was logged within a minute.

        `error` adds its traceback, which shows source lines and no values.
        """
        now = time.monotonic()
        if now - self._logged.get(kind, -INTERVAL) < INTERVAL:
            self._silent[kind] = self._silent.get(kind, 0) + 1
            return
        if len(self._logged) >= _MOST_KINDS:
            self._logged.clear()
            self._silent.clear()
        self._logged[kind] = now
        more = self._silent.pop(kind, 0)
        _log.log(
            level,
            "%s: %s%s",
            kind,
            printable(detail),
            f" ({more} more since the last message)" if more else "",
            exc_info=error,
        )


FAULTS: Final = FaultLog()
"""The one of this process."""
