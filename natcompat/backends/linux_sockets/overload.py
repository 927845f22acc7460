"""The queue of a socket that ESP is steered to, when more comes than is taken (Linux).

Where the kernel coalesces datagrams (UDP_GRO), it glues IKE to the ESP around it, and one that finds the
queue full is dropped as a whole. So while they come coalesced the queue is kept from getting full: ESP is
dropped as it is read, which is quick; and since datagrams that come by themselves take long to be read, a
filter drops those of the length that they had last. The data path in C sheds likewise
(`ffi/loop/receive.c`), without the filter.
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
    """Tells when ESP of a socket is to be dropped unopened. One thread reads the socket, and calls this."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._usual = 0
        self._watched = 0
        self._shedding = False
        self._single = 0

    def shedding(self) -> bool:
        """Tell whether the next burst's ESP is too much. To be asked before and after a burst."""
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
        """Note a burst: bytes of a datagram that came by itself, 0: none; whether some came as one."""
        self._single = single or self._single
        if coalesced and not self._watched:
            # larger, for what comes while others have the processor; else the kernel drops for less
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
        with contextlib.suppress(OSError):  # without CAP_NET_ADMIN it stays what it is
            self._sock.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, size // 2)  # which the kernel doubles
