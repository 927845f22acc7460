"""A complete backend of a third party: classification in line, and a larger receive queue.

Where the kernel does none of the four duties, IKE waits behind ESP in one queue, and a larger queue loses
less. docs/backends.md explains each part.
"""

from __future__ import annotations

import socket
from collections.abc import Mapping

from natcompat.backends.base import Attachment, Viability
from natcompat.backends.diversion import Diversion
from natcompat.contract import Duty, Performer

ROOM = 1 << 20  # bytes
_QUEUE = (socket.SOL_SOCKET, socket.SO_RCVBUF)
_DUTIES = dict.fromkeys(Duty, Performer.PROCESS)


class RoomyAttachment:
    """One socket that this backend serves."""

    mode = "in line"
    reason = "the roomy backend only asks the kernel for a larger queue"
    duties: Mapping[Duty, Performer] = _DUTIES
    # when the application sets the size itself, natcompat detaches, makes the call, and attaches again
    sensitive: frozenset[str | tuple[int, int]] = frozenset({_QUEUE})

    def __init__(self, sock: socket.socket) -> None:
        self.hidden: dict[tuple[int, int], int] = {}
        self._before = sock.getsockopt(*_QUEUE)
        if self._before < ROOM:
            sock.setsockopt(*_QUEUE, ROOM)

    def counters(self) -> Mapping[str, int]:
        """Return no counters: this backend has no sockets of its own."""
        return {}

    def detach(self, sock: socket.socket) -> None:
        """Restore the size of the queue."""
        if self._before < ROOM:
            sock.setsockopt(*_QUEUE, self._before // 2)  # Linux reports twice the size that was set

    def release(self) -> None:
        """Do nothing: the closed socket was the only resource."""

    def adopt(self) -> None:
        """Do nothing: a forked child has no thread to start."""


class RoomyBackend:
    """Registered in pyproject.toml: [project.entry-points."natcompat.backends"] roomy = "..."."""

    name = "roomy"
    hands_over_esp = True  # ESP comes to this process, so that `esp=` gets it

    def viability(self) -> Viability:
        """Say that it works everywhere, and only by name."""
        return Viability(
            self.name, True, _DUTIES, "it only asks the kernel for a larger queue", automatic=False
        )

    def attach(self, sock: socket.socket, diversion: Diversion) -> Attachment:
        """Attach to `sock`. A backend with sockets of its own would pass their datagrams to `diversion`."""
        return RoomyAttachment(sock)
