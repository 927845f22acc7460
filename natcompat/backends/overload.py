"""The queue of a socket that ESP is steered to, when more comes than is taken (Linux).

Where the kernel coalesces datagrams (UDP_GRO), it glues IKE to the ESP around it, and one that finds the
queue full is dropped as a whole. So while they come coalesced the queue is kept from getting full: what is
in one piece, and so is ESP alone, is dropped by a filter, and of the others ESP is dropped as they are read,
which is quick. The data path in C sheds likewise (`ffi/loop_receive.c`), without the filter.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Final

from natcompat import filters

_SO_RCVBUFFORCE: Final = 33  # include/uapi/asm-generic/socket.h
_SO_MEMINFO: Final = 55
_MEMINFO: Final = struct.Struct("=9I")
"""What SO_MEMINFO tells, as linux/sock_diag.h numbers it: bytes in the queue and its size come first."""

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
        self._longest = 0

    def shedding(self) -> bool:
        """Tell whether the next burst's ESP is too much."""
        if self._watched:
            try:
                meminfo = self._sock.getsockopt(socket.SOL_SOCKET, _SO_MEMINFO, _MEMINFO.size)
                queued, size = _MEMINFO.unpack(meminfo)[:2]
            except (OSError, struct.error):  # before Linux 4.12 nothing tells
                return False
            limit = min(size // 4 * 3, _MOST_QUEUED)
            self._shed(queued > (limit // 3 * 2 if self._shedding else limit))
        return self._shedding

    def note(self, longest: int, coalesced: bool) -> None:
        """Note a burst: bytes of its `longest` datagram in one piece, and whether others were several."""
        self._longest = max(self._longest, longest)
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
            elif self._longest:
                filters.attach_filter(self._sock, filters.longer_than(self._longest))

    def _resize(self, size: int) -> None:
        with contextlib.suppress(OSError):  # without CAP_NET_ADMIN it stays what it is
            self._sock.setsockopt(socket.SOL_SOCKET, _SO_RCVBUFFORCE, size // 2)  # which the kernel doubles
