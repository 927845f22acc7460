"""Makes this process a model of Python on Windows: what is not there is taken away, sockets are as strict.

Imported by a process of its own, before natcompat is: absent-on-windows.txt has the names. Not modelled are
the numbers of Winsock's errors, its descriptors, and its event loop.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import ctypes
import errno
import importlib
import multiprocessing
import os
import platform
import selectors
import socket
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

MODULES = ("fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty")
"""Modules of Python's that are not there."""
FOREIGN = ("pyroute2", "uvloop", "gevent")
"""Packages that nobody would have there."""

_recvmsg, _getsockname = socket.socket.recvmsg, socket.socket.getsockname
_READ = (asyncio, concurrent.futures, ctypes, multiprocessing, subprocess, tempfile)  # while it can be


class _Absent:
    """An attribute that a class seems not to have, though its base has it."""

    def __get__(self, instance: object, owner: type) -> Any:
        raise AttributeError("this attribute is not there on Windows")


def _recvfrom(sock: socket.socket, size: int, flags: int = 0) -> tuple[bytes, Any]:
    """Receive; what does not fit into the buffer is an error (WSAEMSGSIZE)."""
    data, _, message_flags, source = _recvmsg(sock, size, 0, flags)
    if message_flags & 0x20:  # MSG_TRUNC
        raise OSError(errno.EMSGSIZE, "A message sent on a datagram socket was larger than the buffer")
    return data, source


def _own_name(sock: socket.socket) -> Any:
    """Return the address; an unbound socket has none (WSAEINVAL)."""
    name = _getsockname(sock)
    if isinstance(name, tuple) and not name[1]:
        raise OSError(errno.EINVAL, "An invalid argument was supplied")
    return name


def _socketpair(*_: int) -> tuple[socket.socket, socket.socket]:
    """Return two sockets over loopback, as Python makes them there."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        return here, server.accept()[0]


def become() -> None:
    """Take away what is not there."""
    sysconfig.get_config_vars()
    platform.processor()  # of which the module remembers all that it would run a command for
    section: Any = None
    for line in (Path(__file__).parent / "absent-on-windows.txt").read_text().splitlines():
        if line.startswith("["):
            name = line.strip("[]")
            section = socket.socket if name == "socket.socket" else importlib.import_module(name)
            continue
        if line.startswith("#"):
            continue
        for name in line.split():
            if section is socket.socket:
                setattr(section, name, _Absent())
            elif hasattr(section, name):
                delattr(section, name)
    for name in (*MODULES, *FOREIGN):
        sys.modules[name] = None  # type: ignore[assignment]
    selectors.DefaultSelector = selectors.SelectSelector  # type: ignore[misc, assignment]
    cls: Any = socket.socket
    cls.recvfrom, cls.recv = _recvfrom, lambda sock, *arguments: _recvfrom(sock, *arguments)[0]
    cls.getsockname = _own_name
    socket.socketpair = _socketpair  # type: ignore[assignment]
    sys.platform = "win32"


assert os.name == "posix", "this is a model, for systems that are not Windows"
