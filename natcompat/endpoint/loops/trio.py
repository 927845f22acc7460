"""Tasks that wait for a descriptor on trio."""

from __future__ import annotations

import socket
from types import ModuleType

from natcompat.endpoint.loops.readiness import READ, WRITE
from natcompat.endpoint.loops.waits import closed_error


class TrioWaits:
    """`natcompat.endpoint.loops.waits.Waits` of the running trio loop."""

    def __init__(self, trio: ModuleType, sock: socket.socket) -> None:
        """`trio` is the module, which natcompat does not import by itself."""
        self._trio, self._sock = trio, sock
        wait_for = {READ: trio.lowlevel.wait_readable, WRITE: trio.lowlevel.wait_writable}
        # trio lets one task wait for each event of a descriptor
        self._waits = {event: (function, trio.Lock()) for event, function in wait_for.items()}

    async def wait(self, event: int) -> None:
        """Wait for `event`; any number of tasks may wait."""
        function, lock = self._waits[event]
        async with lock:
            if self._sock.fileno() < 0:
                raise closed_error()
            try:
                await function(self._sock)
            except self._trio.ClosedResourceError:
                raise closed_error() from None

    async def checkpoint(self) -> None:
        """Let other tasks run."""
        await self._trio.lowlevel.checkpoint()

    def close(self) -> None:
        """End every wait with EBADF."""
        self._trio.lowlevel.notify_closing(self._sock)
