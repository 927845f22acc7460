"""The ESP of this process: who takes what comes to endpoints that nobody gave an `esp`."""

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
    """The consumer there is now, if there is one, and the endpoints that want to know of another."""

    def __init__(self) -> None:
        self._consumer: EspConsumer | None = None
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._followers: set[weakref.WeakMethod[Callable[[], None]]] = set()

    @property
    def consumer(self) -> EspConsumer | None:
        """Who takes ESP in this process; a forked child has none, since two must not use one nonce."""
        return self._consumer if self._pid == os.getpid() else None

    @property
    def inherited(self) -> EspConsumer | None:
        """What the parent of this forked child had for one."""
        return self._consumer if self._pid != os.getpid() else None

    def follow(self, changed: Callable[[], None]) -> None:
        """Call the method `changed` whenever there is another consumer, as long as its object lives."""
        with self._lock:
            self._followers = {each for each in self._followers if each() is not None}
            self._followers.add(weakref.WeakMethod(changed))

    def change(self, consumer: EspConsumer | None) -> None:
        """Let `consumer` take ESP from now on; returns when all endpoints have taken note."""
        with self._lock:
            self._consumer, self._pid = consumer, os.getpid()
            followers = list(self._followers)
        for follower in followers:
            changed = follower()
            try:
                if changed is not None:
                    changed()
            except OSError as error:  # one endpoint in trouble must not keep the others from it
                _log.warning("an endpoint goes on as it was: %s", error)

    def after_fork(self) -> None:
        """Make a new lock in a forked child, where no thread holds it."""
        self._lock = threading.Lock()


PROCESS_ESP: Final = ProcessEsp()
"""One per process, since a port gives its ESP to one."""

if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=PROCESS_ESP.after_fork)
