"""`PROCESS_ESP`: the default consumer of ESP in this process, for endpoints that were given no `esp`."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import Final

from natcompat.backends.base import EspConsumer
from natcompat.errors import get_logger

_log = get_logger()


class ProcessEsp:
    """Holds the default consumer of ESP, and tells endpoints when it changes."""

    def __init__(self) -> None:
        self._consumer: EspConsumer | None = None
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._followers: set[weakref.WeakMethod[Callable[[], None]]] = set()

    @property
    def consumer(self) -> EspConsumer | None:
        """The default consumer; a forked child has none, since two processes must not use one nonce."""
        return self._consumer if self._pid == os.getpid() else None

    @property
    def inherited(self) -> EspConsumer | None:
        """The default consumer of the parent, in a forked child that has not set its own."""
        return self._consumer if self._pid != os.getpid() else None

    def follow(self, changed: Callable[[], None]) -> None:
        """Call the method `changed` whenever the consumer changes, as long as its object lives."""
        with self._lock:
            self._followers = {method for method in self._followers if method() is not None}
            self._followers.add(weakref.WeakMethod(changed))

    def change(self, consumer: EspConsumer | None) -> None:
        """Make `consumer` the default consumer; returns when all endpoints use it."""
        with self._lock:
            self._consumer, self._pid = consumer, os.getpid()
            followers = list(self._followers)
        for follower in followers:
            changed = follower()
            try:
                if changed is not None:
                    changed()
            except OSError as error:  # the failure of one endpoint must not affect the others
                _log.warning("an endpoint keeps its consumer of ESP, since the change failed: %s", error)

    def after_fork(self) -> None:
        """Make a new lock in a forked child, where no thread holds it."""
        self._lock = threading.Lock()


PROCESS_ESP: Final = ProcessEsp()
"""One per process, since a port hands its ESP to one consumer."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=PROCESS_ESP.after_fork)
