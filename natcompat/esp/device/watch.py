"""Notices within a moment that somebody changed links, addresses, routes or rules (rtnetlink(7))."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import struct
import sys
import threading
import time
from collections.abc import Callable
from typing import Final

from natcompat.errors import get_logger
from natcompat.esp.device.rtnetlink import PROTOCOL
from natcompat.kernel.xfrm.netlink import (
    HEADER,
    NETLINK_ROUTE,
    Netlink,
    attributes,
    messages_in,
    receive,
)

_log = get_logger()

# linux/rtnetlink.h, linux/fib_rules.h
_GROUPS: Final = 1 | 0x10 | 0x40 | 0x100 | 0x400 | 1 << 7 | 1 << 18
"""RTNLGRP_LINK, _IPV4_IFADDR, _IPV4_ROUTE, _IPV6_IFADDR, _IPV6_ROUTE, _IPV4_RULE, _IPV6_RULE."""
_NEWLINK, _DELLINK, _NEWADDR, _DELADDR, _DELROUTE, _DELRULE = 16, 17, 20, 21, 25, 33
_FRA_PROTOCOL: Final = 21
_RTA_TABLE: Final = 15
_IFF_UP: Final = 1
_RECEIVE_BUFFER: Final = 1 << 20

_SETTLING: Final = 0.02
"""Seconds from the first message to the look at what is there: changes come in groups."""
_BETWEEN: Final = 0.2
"""Seconds between two looks while changes go on, so that a contest with another program costs little."""


class RouteWatch:
    """A thread that calls `check` after changes, in the network namespace of the thread that makes this.

    `check` runs in that thread, also every `idle` seconds that it returned last (None: never).
    """

    def __init__(self, index: int, table: int, check: Callable[[], float | None]) -> None:
        """`index`, `table`: the interface and the routing table whose changes matter."""
        self._index, self._table = index, table
        self._check = check
        self._netlink = Netlink(protocol=NETLINK_ROUTE, groups=_GROUPS, receive_buffer=_RECEIVE_BUFFER)
        self._netlink.socket.setblocking(False)
        self._waking, self._wake = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self._ended = threading.Event()
        self._again: float | None = None
        self._thread = threading.Thread(target=self._run, name="natcompat-route-watch", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def wake(self) -> None:
        """Have `check` called now."""
        with contextlib.suppress(OSError):  # the pipe is full: it is awake
            os.write(self._wake, b"\0")

    def close(self) -> None:
        """End the thread, which may not call this, and wait for it. May be repeated."""
        if self._ended.is_set():
            return
        self._ended.set()
        self.wake()
        if self._thread.is_alive():
            self._thread.join()
        self._close_descriptors()

    def abandon(self) -> None:
        """Close a forked child's descriptors; there is no thread in it."""
        if not self._ended.is_set():
            self._ended.set()
            self._close_descriptors()

    def _close_descriptors(self) -> None:
        self._netlink.close()
        os.close(self._waking)
        os.close(self._wake)

    def _run(self) -> None:
        while not self._ended.is_set():
            if not self._wait():
                continue
            time.sleep(_SETTLING)
            self._drain()
            if self._ended.is_set():
                return
            try:
                self._again = self._check()
            except Exception:  # noqa: BLE001 - protection is looked after as long as the process lives
                _log.exception("looking after routes and rules failed")
                self._again = None
            self._ended.wait(_BETWEEN - _SETTLING)

    def _wait(self) -> bool:
        """Wait for changes; tell whether any matters."""
        readable, _, _ = select.select([self._netlink.socket.fileno(), self._waking], [], [], self._again)
        if self._waking in readable:
            os.read(self._waking, 4096)
            return True
        return not readable or self._drain()

    def _drain(self) -> bool:
        """Read all messages there are; tell whether any matters."""
        matters = False
        while True:
            try:
                data = receive(self._netlink.socket, 1 << 17)
            except BlockingIOError:
                return matters
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    return matters
                matters = True  # some were lost: look
                continue
            for kind, _, _, message in messages_in(data):
                matters = matters or self._concerns(kind, message)

    def _concerns(self, kind: int, message: bytes) -> bool:
        """Tell whether a message may mean that something is missing."""
        if kind in (_NEWADDR, _DELADDR):
            return True
        if kind in (_NEWLINK, _DELLINK):
            index, flags = struct.unpack_from("=iI", message, HEADER.size + 4)
            return bool(index == self._index and (kind == _DELLINK or not flags & _IFF_UP))
        if kind in (_DELROUTE, _DELRULE):
            values = {key: message[start:end] for key, start, end in attributes(message, HEADER.size + 12)}
            if kind == _DELRULE:
                return values.get(_FRA_PROTOCOL) == bytes([PROTOCOL])
            return int.from_bytes(values.get(_RTA_TABLE, b""), sys.byteorder) == self._table
        return False
