"""Opens the files of a tunnel so that no other user can choose what is read.

A path is walked directory by directory (openat, O_NOFOLLOW). Each directory and symbolic link on the way has
to belong to this user or root, and nobody else may be able to put another entry in its place. Type, owner,
mode and number of links of a file are those of the descriptor that is then read. Every refusal is a
`ConfigurationError` with a remedy; no message shows contents of a file.

Windows has access lists in place of modes, and no openat: there files are opened by their paths.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

from natcompat.commands.tunnel.form import ConfigurationError, hide_keys

LARGEST_FILE: Final = 1 << 20
"""Bytes; no file of a tunnel is larger."""

_MOST_LINKS: Final = 40  # as in Linux's path walk (MAXSYMLINKS)
_REMEDIES: Final = {
    errno.ENOENT: "Name a file that is there, in a directory that is there",
    errno.ENOTDIR: "Correct the path: a part of it is no directory",
    errno.EACCES: "Name a file that this user may read",
    errno.ELOOP: "Name the file itself: its symbolic links lead nowhere",
    errno.ENAMETOOLONG: "Choose a shorter path",
}


def expand(path: Path, description: str) -> Path:
    """Return `path` with ``~`` and ``~user`` replaced by a home directory; EINVAL: there is no such user."""
    try:
        return path.expanduser()
    except RuntimeError:
        raise ConfigurationError(
            errno.EINVAL,
            f"{description} {hide_keys(str(path))} begins in a home directory that is not known",
            "Write the path without ~, or the name of a user of this host behind it",
        ) from None


def open_file(path: Path, description: str) -> int:
    """Return a read-only descriptor of the regular file `path`, to be closed by the caller.

    Symbolic links are followed. Raises `ConfigurationError`, with EINVAL for anything but a regular file and
    EACCES where others may replace a part of the path. Neither a FIFO nor a device is opened.
    """
    try:
        if os.open not in os.supports_dir_fd:
            return _regular(os.open(path, os.O_RDONLY), path, description)
        directory, name = _walk(path, path, description)
        try:
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            _refuse_unless_regular(status, path, description)
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
            return _regular(os.open(name, flags, dir_fd=directory), path, description)
        finally:
            os.close(directory)
    except (OSError, ValueError) as error:  # ValueError: NUL, or what the file system cannot encode
        raise _error_of(error, path, description) from None


def open_directory_of(path: Path, description: str) -> int:
    """Return a descriptor of the directory of `path`, where nobody but this user and root may write.

    The last part of `path` need not exist, and is not followed if it is a symbolic link. A sticky directory,
    as /tmp, is refused: others may make files there, if not replace them. To be closed by the caller.
    """
    try:
        if path.name in ("", "..") or "\0" in path.name:
            raise ConfigurationError(
                errno.EINVAL,
                f"{description} {hide_keys(str(path))} is no name of a file",
                "Name a file in a directory",
            )
        directory, _ = _walk(path.parent, path, description, whole=True)
        try:
            if stat.S_IMODE(os.fstat(directory).st_mode) & 0o022:
                raise _others_may_write(path, description)
            return os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=directory)
        finally:
            os.close(directory)
    except (OSError, ValueError) as error:
        raise _error_of(error, path, description) from None


def refuse_if_shared(descriptor: int, path: Path, description: str, *, readable: bool = False) -> None:
    """Raise EACCES unless only this user and root may touch the file; with `readable`, others may read it.

    A file that may not be read by others must have one name (hard link): another one may stand where others
    look.
    """
    if not hasattr(os, "geteuid"):
        return  # access lists instead of modes: there the owner's own folder has to do
    status = os.fstat(descriptor)
    mode, name = stat.S_IMODE(status.st_mode), hide_keys(str(path))
    if status.st_uid not in (0, os.geteuid()):
        raise ConfigurationError(
            errno.EACCES,
            f"{description} {name} belongs to user {status.st_uid}, who may read and change it",
            f"chown {os.geteuid()} {name}, and replace the keys that are in it, if any",
        )
    if mode & (0o022 if readable else 0o077):
        who = "others" if mode & (0o002 if readable else 0o007) else "its group"
        may = [word for bit, word in ((0o044, "read"), (0o022, "change"), (0o011, "run")) if mode & bit]
        remedy = f"chmod 600 {name}, and use other keys if somebody else may have read it"
        raise ConfigurationError(
            errno.EACCES,
            f"{description} {name} has mode {mode:04o}: {who} may {' and '.join(may)} it",
            f"chmod go-w {name}" if readable else remedy,
        )
    if status.st_nlink > 1 and not readable:
        raise ConfigurationError(
            errno.EMLINK,
            f"{description} {name} has {status.st_nlink} names (hard links), so it may stand elsewhere, too",
            f"Replace {name} by a copy of its own (cp {name} new && mv new {name})",
        )


def read_all(descriptor: int, path: Path, description: str) -> bytes:
    """Return the contents of an open file; EFBIG if they are larger than `LARGEST_FILE`."""
    try:
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise _error_of(error, path, description) from None
    if len(content) > LARGEST_FILE:
        raise ConfigurationError(
            errno.EFBIG,
            f"{description} {hide_keys(str(path))} is larger than {LARGEST_FILE} bytes",
            "Name another file",
        )
    return content


def read_file(path: Path, description: str) -> bytes:
    """Return the contents of a file that nobody but this user and root may touch."""
    descriptor = open_file(path, description)
    try:
        refuse_if_shared(descriptor, path, description)
        return read_all(descriptor, path, description)
    finally:
        os.close(descriptor)


# --- the walk --------------------------------------------------------------------------------------


def _walk(path: Path, file: Path, description: str, *, whole: bool = False) -> tuple[int, str]:
    """Return a descriptor of the directory where `path` ends, and the last name, which is no symbolic link.

    With `whole` every part is a directory to be entered, and the name is ".". Messages name `file`.
    """
    pending = [*reversed(Path(os.getcwd(), path).parts[1:])]
    directory, links = _enter("/", None), 0
    try:
        while pending:
            name = pending.pop()
            status = os.stat(name, dir_fd=directory, follow_symlinks=False)
            _refuse_if_replaceable(os.fstat(directory), status, file, description)
            if stat.S_ISLNK(status.st_mode):
                links += 1
                if links > _MOST_LINKS:
                    raise OSError(errno.ELOOP, os.strerror(errno.ELOOP))
                target = Path(os.readlink(name, dir_fd=directory))
                pending += reversed(target.parts[target.is_absolute() :])
                name = "/" if target.is_absolute() else "."
            elif not pending and not whole:
                return directory, name
            following = _enter(name, directory)
            os.close(directory)
            directory = following
        _refuse_if_replaceable(os.fstat(directory), None, file, description)
    except BaseException:
        os.close(directory)
        raise
    return directory, "."


def _enter(name: str, directory: int | None) -> int:
    flags = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
    return os.open(name, flags, dir_fd=directory)


def _refuse_if_replaceable(
    directory: os.stat_result, entry: os.stat_result | None, path: Path, description: str
) -> None:
    """Raise EACCES if others may put something else in the place of `entry` (None: not looked at)."""
    mode = directory.st_mode
    if not _trusted(directory.st_uid):
        raise _others_may_write(path, description)
    if mode & 0o022 and not (mode & stat.S_ISVTX and (entry is None or _trusted(entry.st_uid))):
        raise _others_may_write(path, description)


def _trusted(user: int) -> bool:
    return user in (0, os.geteuid()) or user == _unmapped_user()


def _unmapped_user() -> int:
    """Return the user that stands for root of the host in a user namespace; -1 outside of one."""
    try:
        ranges = [line.split() for line in Path("/proc/self/uid_map").read_text("ascii").splitlines()]
        if ranges and (int(ranges[0][2]) < 0xFFFF_FFFF or len(ranges) > 1):
            return int(Path("/proc/sys/kernel/overflowuid").read_text("ascii"))
    except (OSError, ValueError, IndexError):
        pass
    return -1


def _others_may_write(path: Path, description: str) -> ConfigurationError:
    return ConfigurationError(
        errno.EACCES,
        f"{description} {hide_keys(str(path))}: others may put another in its place, since they may write to "
        "its directory or to one above",
        "Choose a directory of this user's that neither its group nor others may write to (chmod go-w)",
    )


# --- types and errors ------------------------------------------------------------------------------


def _regular(descriptor: int, path: Path, description: str) -> int:
    """Return `descriptor`; close it, and raise EINVAL, if that is no regular file."""
    try:
        _refuse_unless_regular(os.fstat(descriptor), path, description)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _refuse_unless_regular(status: os.stat_result, path: Path, description: str) -> None:
    if not stat.S_ISREG(status.st_mode):
        raise ConfigurationError(
            errno.EINVAL,
            f"{description} {hide_keys(str(path))} is no regular file",
            "Name a regular file, neither a directory nor a device nor a FIFO",
        )


def _error_of(error: OSError | ValueError, path: Path, description: str) -> ConfigurationError:
    if isinstance(error, ConfigurationError):
        return error
    number = (error.errno if isinstance(error, OSError) else None) or errno.EINVAL
    return ConfigurationError(
        number,
        f"{description} {hide_keys(str(path))} cannot be read: {os.strerror(number)}",
        _REMEDIES.get(number, "Name a file that this user may read"),
    )
