"""`QueueWatch`: keeps the queue of an ESP socket from overflowing when more ESP comes than is opened.

UDP_GRO coalesces IKE with the ESP around it, and a coalesced datagram that finds the queue full is dropped
whole, with the IKE in it. So while datagrams come coalesced, ESP is dropped as soon as it is read, which is
quick. Reading datagrams that came alone takes longer, so a filter drops those of the length that they last
had. The data path in C does the same without the filter (`ffi/loop/receive.c`).
"""

from __future__ import annotations

import contextlib
import socket
from typing import Final

from natcompat.backends.linux_sockets import filters
from natcompat.kernel.requests import SO_RCVBUFFORCE

_MOST_QUEUED: Final = 6 << 20  # bytes as the kernel counts them: about half are packets
_LARGE_QUEUE: Final = 64 << 20
_WATCHED: Final = 256  # bursts after one with coalesced datagrams


class QueueWatch:
    """Decides when ESP of a socket is dropped unopened. Only the thread that reads the socket may call it."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._usual = 0
        self._watched = 0
        self._shedding = False
        self._single = 0

    def shedding(self) -> bool:
        """Return whether to drop the ESP of the next burst. Call it before and after each burst."""
        if self._watched:
            queue = filters.queue(self._sock)
            if queue is None:
                self._shed(False)
            else:
                queued, size = queue
                limit = min(size // 4 * 3, _MOST_QUEUED)
                self._shed(queued > (limit // 3 * 2 if self._shedding else limit))
        return self._shedding

    def note(self, single: int, coalesced: bool) -> None:
        """Note a burst.

        `single`: length in bytes of a datagram that came alone, 0 if none; `coalesced`: some did not.
        """
        self._single = single or self._single
        if coalesced and not self._watched:
            # a larger queue holds what comes while other threads have the processor
            self._usual = self._sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
            if self._usual < _LARGE_QUEUE:
                self._resize(_LARGE_QUEUE)
        elif not coalesced and self._watched == 1:
            self._shed(False)
            self._resize(self._usual)
        self._watched = _WATCHED if coalesced else max(0, self._watched - 1)

    def _shed(self, on: bool) -> None:
        if on is self._shedding:
            return
        self._shedding = on
        with contextlib.suppress(OSError):  # a sandbox without filters
            if not on:
                filters.detach_filter(self._sock)
            elif self._single:
                filters.attach_filter(self._sock, filters.other_than(self._single))

    def _resize(self, size: int) -> None:
        with contextlib.suppress(OSError):  # without CAP_NET_ADMIN the size stays
            self._sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size // 2)  # the kernel doubles it
