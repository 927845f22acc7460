"""The directory of the control sockets: who may use it, which sockets are alive, and how one is added."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path
from typing import Final

from natcompat.errors import NatCompatError

ENVIRONMENT_VARIABLE: Final = "NATCOMPAT_CONTROL"


def directory() -> Path | None:
    """Return the directory of this user's control sockets; None: there are none.

    Raises `NatCompatError` (EINVAL) if NATCOMPAT_CONTROL is neither ``none`` nor an absolute path.
    """
    asked = os.environ.get(ENVIRONMENT_VARIABLE, "")
    if asked == "none" or not hasattr(socket, "AF_UNIX") or not hasattr(os, "geteuid"):
        return None
    if asked:
        if not os.path.isabs(asked):
            raise NatCompatError(
                errno.EINVAL,
                f"{ENVIRONMENT_VARIABLE}={asked} is neither none nor an absolute path",
                "Set it to none, to a directory, or not at all",
            )
        return Path(asked)
    if os.geteuid() == 0:
        return Path("/run/natcompat" if os.path.isdir("/run") else "/var/run/natcompat")
    runtime = os.environ.get("XDG_RUNTIME_DIR", "")
    return Path(runtime, "natcompat") if os.path.isabs(runtime) else None


def listen(where: Path, backlog: int) -> tuple[socket.socket, Path]:
    """Return a listening socket in the directory `where`, and its path."""
    import fcntl

    with contextlib.suppress(FileExistsError):
        os.mkdir(where, 0o700)
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(where, flags)
    try:
        status = os.fstat(descriptor)
        if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o077:
            raise PermissionError(errno.EACCES, f"{where} is not this user's alone")
        fcntl.flock(descriptor, fcntl.LOCK_EX)  # nobody takes for dead what does not listen yet
        remove_stale(where)
        for number in range(1000):
            path = where / f"{os.getpid()}-{number}.sock"
            listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                listener.bind(os.fspath(path))
                os.chmod(path, 0o600)
                listener.listen(backlog)
            except OSError as error:
                listener.close()
                if error.errno != errno.EADDRINUSE:
                    raise
            else:
                return listener, path
        raise OSError(errno.EADDRINUSE, f"{where} is full")
    finally:
        os.close(descriptor)


def remove_stale(where: Path) -> list[Path]:
    """Remove the control sockets in `where` that nobody listens on any more; return their paths."""
    return [path for path in stale(where) if _removed(path)]


def stale(where: Path) -> list[Path]:
    """Return the paths of control sockets in `where` that nobody listens on any more."""
    return [path for path in sorted(where.glob("[0-9]*-*.sock")) if _is_dead(path)]


def _removed(path: Path) -> bool:
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
        return True
    return False


def _is_dead(path: Path) -> bool:
    try:
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            return False
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.setblocking(False)
            sock.connect(os.fspath(path))
    except ConnectionRefusedError:
        return True
    except OSError:  # BlockingIOError: it listens, and is busy
        return False
    return False
