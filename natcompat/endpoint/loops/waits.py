"""Tasks that wait for a descriptor: the protocol `Waits`, and its implementation on asyncio loops."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
from collections.abc import Callable
from typing import Protocol

from natcompat.endpoint.loops.readiness import READ, WRITE, readiness


class Waits(Protocol):
    """Suspends tasks until a descriptor is ready."""

    async def wait(self, event: int) -> None:
        """Wait for `event`, READ or WRITE. Raises OSError: EBADF after `close`."""

    async def checkpoint(self) -> None:
        """Let other tasks run."""

    def close(self) -> None:
        """End every wait with EBADF. Call it before the descriptor is closed."""


def closed_error() -> OSError:
    """Return the error that a wait raises once its descriptor is closed."""
    return OSError(errno.EBADF, os.strerror(errno.EBADF))


class AsyncioWaits:
    """`Waits` of an asyncio loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop, sock: socket.socket) -> None:
        self._loop = loop
        self._readiness = readiness(loop, sock)
        self._futures: dict[int, list[asyncio.Future[None]]] = {READ: [], WRITE: []}

    async def wait(self, event: int) -> None:
        """Wait for `event`; any number of tasks may wait."""
        futures = self._futures[event]
        future = self._loop.create_future()
        futures.append(future)
        if len(futures) == 1:
            self._readiness.watch(event, lambda: self._ready(event))
        try:
            await future
        finally:
            if future in futures:  # cancelled
                futures.remove(future)
                if not futures:
                    self._readiness.watch(event, None)

    async def checkpoint(self) -> None:
        """Let other tasks run."""
        await asyncio.sleep(0)

    def close(self) -> None:
        """End every wait with EBADF."""
        self._readiness.close()
        for futures in self._futures.values():
            _finish_all(futures, lambda future: future.set_exception(closed_error()))

    def _ready(self, event: int) -> None:
        self._readiness.watch(event, None)
        _finish_all(self._futures[event], lambda future: future.set_result(None))


def _finish_all(
    futures: list[asyncio.Future[None]], finish: Callable[[asyncio.Future[None]], object]
) -> None:
    pending = [future for future in futures if not future.done()]
    futures.clear()
    for future in pending:
        finish(future)
