"""A backend of a third party: demultiplexing in line, with more room in the socket's queue.

Where the kernel does nothing of the four duties, IKE waits behind ESP in one queue; a larger one
loses less. It shows all that a backend has to do; docs/backends.md explains it.
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
    """One socket in this backend's hands."""

    mode = "in line"
    reason = "the roomy backend asks the kernel for room alone"
    duties: Mapping[Duty, Performer] = _DUTIES
    # when the application chooses the room itself, natcompat detaches, lets it, and attaches again
    sensitive: frozenset[str | tuple[int, int]] = frozenset({_QUEUE})

    def __init__(self, sock: socket.socket) -> None:
        self.hidden: dict[tuple[int, int], int] = {}
        self._before = sock.getsockopt(*_QUEUE)
        if self._before < ROOM:
            sock.setsockopt(*_QUEUE, ROOM)

    def counters(self) -> Mapping[str, int]:
        """Return nothing: this backend has no sockets of its own."""
        return {}

    def detach(self, sock: socket.socket) -> None:
        """Give the socket back as it was."""
        if self._before < ROOM:
            sock.setsockopt(*_QUEUE, self._before // 2)  # Linux returns twice what it was given

    def release(self) -> None:
        """The socket is closed: there is nothing besides it."""

    def adopt(self) -> None:
        """A forked child carries on: there is no thread to start again."""


class RoomyBackend:
    """Registered in pyproject.toml: [project.entry-points."natcompat.backends"] roomy = "..."."""

    name = "roomy"
    hands_over_esp = True  # ESP comes to this process, so that `esp=` can have it

    def viability(self) -> Viability:
        """It works everywhere, and is chosen by name only."""
        return Viability(self.name, True, _DUTIES, "it asks the kernel for nothing but room", automatic=False)

    def attach(self, sock: socket.socket, diversion: Diversion) -> Attachment:
        """Take hold of `sock`; had the backend sockets of its own, what they get would go to `diversion`."""
        return RoomyAttachment(sock)
