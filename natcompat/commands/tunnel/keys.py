"""Reads key material from a tunnel's file, from key files and from the environment.

A key is a row of hexadecimal digits; white space between them is ignored. Owner and mode of a file
are checked on the descriptor that is then read, so that no other file can take its place in between.
No error shows contents of a file.
"""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import Final

from natcompat.commands.tunnel.form import KEY, ConfigurationError, Place, hide_keys
from natcompat.errors import NatCompatError
from natcompat.ipsec import Key

_LARGEST_FILE: Final = 1 << 20
_RIGHT: Final = (
    "Write hexadecimal digits in quotes, two a byte (openssl rand -hex 36 makes some), "
    'or { key_file = "PATH" } or { key_environment = "NAME" }'
)


def open_file(path: Path, description: str) -> int:
    """Return a descriptor of the regular file `path`, to be closed by the caller."""
    try:
        # a FIFO would wait for its other end
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, ValueError) as error:
        number = getattr(error, "errno", None) or errno.EINVAL
        raise ConfigurationError(
            number,
            f"{description} {hide_keys(str(path))} cannot be read: {os.strerror(number)}",
            "Name a file that this user may read",
        ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ConfigurationError(
            errno.EINVAL, f"{description} {hide_keys(str(path))} is no regular file", "Name a regular file"
        )
    return descriptor


def refuse_if_shared(descriptor: int, path: Path, description: str, *, readable: bool = False) -> None:
    """Raise EACCES unless only this user and root may touch the file; with `readable`, others may read it."""
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


def read_all(descriptor: int) -> bytes:
    """Return what is in the file, up to one byte more than any file here may have."""
    with os.fdopen(descriptor, "rb", closefd=False) as file:
        return file.read(_LARGEST_FILE + 1)


def read_file(path: Path, description: str) -> bytes:
    """Return what is in a file of this user's that nobody else may touch."""
    descriptor = open_file(path, description)
    try:
        refuse_if_shared(descriptor, path, description)
        return read_all(descriptor)
    except NatCompatError:
        raise
    except OSError as error:
        raise ConfigurationError(
            error.errno or errno.EIO,
            f"{description} {hide_keys(str(path))} cannot be read: {error.strerror}",
            "",
        ) from None
    finally:
        os.close(descriptor)


class KeyReader:
    """Reads the keys of one file; remembers whether some stood in it."""

    def __init__(self, place: Place) -> None:
        self._directory = place.path.parent
        self.inline: bool = False
        """Whether the file itself holds keys."""

    def read(self, place: Place, name: str, value: object) -> Key:
        """Return the key that `value` is, or says where to find, as `name` of the table at `place`."""
        if isinstance(value, str):
            self.inline = True
            return self._decode(place, name, value, "this")
        if not isinstance(value, dict):
            raise place.error(name, "a key is wanted", _RIGHT)
        inner = Place(place.path, place.text, place.table, place.number, name)
        values = inner.read(value, KEY)
        if sum(value is not None for value in values.values()) != 1:
            raise inner.error("", "either key_file or key_environment is wanted", _RIGHT)
        if values["key_file"] is not None:
            path = self._directory / values["key_file"].expanduser()
            try:
                text = read_file(path, "the key file").decode("ascii", "replace")
            except ConfigurationError as error:
                where = inner.error("key_file", error.strerror or "", error.remedy)
                raise ConfigurationError(error.errno or 0, where.strerror or "", where.remedy) from None
            return self._decode(place, name, text, f"what {hide_keys(str(path))} holds")
        variable: str = values["key_environment"]
        if variable not in os.environ:
            raise inner.error(
                "key_environment",
                f"the environment has no {hide_keys(variable)}",
                "Set it, to hexadecimal digits",
            )
        return self._decode(place, name, os.environ[variable], f"what {hide_keys(variable)} holds")

    @staticmethod
    def _decode(place: Place, name: str, text: str, whose: str) -> Key:
        try:
            return Key(bytes.fromhex(text))
        except ValueError:
            pass  # its message shows nothing, but its traceback does
        raise place.error(name, f"{whose} is not a row of hexadecimal digits, two a byte", _RIGHT)
