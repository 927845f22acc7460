"""The client of the control sockets: SAs, policies and events of running user-space IPsec.

An answer is checked for its form and bounded in size and time, since for root it may come from another user's
process. `natcompat.esp.control_socket` describes the protocol.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

from natcompat.esp.control_directory import ENVIRONMENT_VARIABLE, directory
from natcompat.ipsec.describe import Row

PATIENCE: Final = 2.0
"""Seconds for an engine to answer each part."""
_LONGEST_LINE: Final = 1 << 16
_LONGEST_ANSWER: Final = 1 << 28
_MOST_SOCKETS: Final = 1000


def namespace() -> int | None:
    """Return the inode of this process's network namespace; None where there is none."""
    with contextlib.suppress(OSError):
        return os.stat("/proc/self/ns/net").st_ino
    return None


def directories() -> list[Path]:
    """Return the directories that may hold control sockets which this user may ask."""
    of_this_user = directory()
    if of_this_user is None:
        return []
    if os.environ.get(ENVIRONMENT_VARIABLE) or os.geteuid() != 0:
        return [of_this_user]
    return [of_this_user, *sorted(Path("/run/user").glob("*/natcompat"))]


class Engine:
    """A connection to one control socket, for one request.

    Raises OSError where nobody answers, and ValueError where the answer is none of the protocol.
    """

    def __init__(self, path: Path) -> None:
        self._data = bytearray()
        self._received = 0
        self.path: Path = path
        self._sock = _connect(path)
        try:
            greeting = self._line()
            self.pid: int = _of_type(greeting.get("pid"), int)
            self.netns: int | None = greeting.get("netns")
            self.requests: list[str] = _of_type(greeting.get("requests"), list)
        except BaseException:
            self._sock.close()
            raise

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def fileno(self) -> int:
        """Return the descriptor to wait on for events."""
        return self._sock.fileno()

    def ask(self, request: str) -> Iterator[Row]:
        """Send a request, and yield the objects of the answer."""
        self._send(request)
        while True:
            row = self._line()
            if "end" in row:
                return
            if "error" in row:
                raise ValueError(f"{self.path} answers: {row['error']}")
            yield row

    def listen(self) -> None:
        """Ask for events, which `read_events` returns from now on."""
        self._send("events")
        self._line()
        self._sock.setblocking(False)

    def read_events(self) -> list[Row] | None:
        """Return the events that have arrived; None: the engine is gone."""
        gone = False
        with contextlib.suppress(BlockingIOError):
            while True:
                more = self._sock.recv(1 << 16)
                self._data += more
                gone = not more
                if gone or len(self._data) > _LONGEST_LINE:
                    break
        *lines, rest = self._data.split(b"\n")
        self._data = bytearray(rest)
        if len(rest) > _LONGEST_LINE:
            raise ValueError(f"{self.path} sends lines without an end")
        events = [_object(bytes(line)) for line in lines]
        return None if gone and not events else events

    def _send(self, request: str) -> None:
        self._sock.sendall(json.dumps({"request": request}).encode() + b"\n")

    def _line(self) -> Row:
        deadline = time.monotonic() + PATIENCE
        while b"\n" not in self._data:
            if len(self._data) > _LONGEST_LINE or self._received > _LONGEST_ANSWER:
                raise ValueError(f"{self.path} answers with too much")
            self._sock.settimeout(max(deadline - time.monotonic(), 0.001))
            more = self._sock.recv(1 << 16)
            if not more:
                raise ConnectionResetError(f"{self.path} answers nothing")
            self._received += len(more)
            self._data += more
        line, _, rest = self._data.partition(b"\n")
        self._data = bytearray(rest)
        return _object(bytes(line))


def engines(request: str, *, everywhere: bool = False) -> Iterator[Engine]:
    """Yield a connection to each engine that knows `request`, to be closed by the caller.

    Engines of other network namespaces are left out, unless `everywhere`. So is whatever does not answer.
    """
    here = namespace()
    for where in directories():
        for path in sorted(where.glob("[0-9]*-*.sock"))[:_MOST_SOCKETS]:
            try:
                engine = Engine(path)
            except (OSError, ValueError):  # it has just ended, or is none
                continue
            if request in engine.requests and (everywhere or engine.netns in (None, here)):
                yield engine
            else:
                engine.close()


def _connect(path: Path) -> socket.socket:
    """Connect to a socket that belongs to the owner of its directory, and so does its server."""
    holder, status = os.lstat(path.parent), os.lstat(path)
    if not stat.S_ISDIR(holder.st_mode) or holder.st_mode & 0o077 or not stat.S_ISSOCK(status.st_mode):
        raise PermissionError(f"{path} is no control socket")
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(PATIENCE)
        sock.connect(os.fspath(path))
        if hasattr(socket, "SO_PEERCRED"):
            credentials = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
            if struct.unpack("3i", credentials)[1] != holder.st_uid:
                raise PermissionError(f"{path} is served by another user")
    except BaseException:
        sock.close()
        raise
    return sock


def _object(line: bytes) -> Row:
    try:
        value = json.loads(line, parse_constant=_refuse_constant)
    except RecursionError:
        raise ValueError("an answer is nested too deeply") from None
    row: Row = _of_type(value, dict)
    return row


def _refuse_constant(name: str) -> None:
    raise ValueError(f"an answer has {name} in place of a number")


def _of_type(value: Any, kind: type) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"an answer has {type(value).__name__} in place of {kind.__name__}")  # noqa: TRY004
    return value
