"""The state file of a tunnel: the sequence numbers that may have been used under each key.

A number is written, and on the disk, before it is used; so a restart, whatever came before it, goes on
behind all that was. The file says that for keys, not for SAs, since it is under one key that nothing may
repeat. It holds no keys: each is known by a BLAKE2 digest, keyed with a random number of the file's own.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import stat
import sys
import threading
from collections.abc import Mapping
from hashlib import blake2b
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

from natcompat.commands.tunnel.files import open_directory_of
from natcompat.commands.tunnel.form import hide_keys
from natcompat.errors import NatCompatError
from natcompat.ipsec import Direction, IPAddress, SecurityAssociation
from natcompat.ipsec.transforms import Encr

COUNTING: Final = frozenset(encr for encr in Encr if encr.is_aead or encr is Encr.AES_CTR)
"""Transforms that fail altogether when a key meets an IV twice (RFC 3686, 4106, 4309, 4543, 7634)."""

_VERSION: Final = 1
_WARNING: Final = (
    "Do not edit this, copy it, or put back an older one: keys would be used with the same IVs again. "
    "When it is lost, replace the keys."
)
_LARGEST_FILE: Final = 1 << 20
_ATTEMPTS: Final = 16
_REMEDIES: Final = {
    errno.ENOENT: "Make its directory first",
    errno.EACCES: "Choose a directory that this user may write to",
    errno.EROFS: "Choose a directory on a disk that can be written to",
    errno.ELOOP: "Name the file itself, and no link to it",
    errno.ENOSPC: "Make space on its disk",
}
_OTHER_REMEDY: Final = "Choose another path, or another disk"
_LAST: Final = (1 << 64) - 1


class Identity(NamedTuple):
    """The name of a key in the file."""

    digest: str
    direction: Direction


class LearntPeer(NamedTuple):
    """The address of the peer as it was learnt from authentic packets."""

    configured: tuple[str, int]
    """Address and port in the tunnel's file at that time."""
    address: IPAddress
    port: int


class StateFile:
    """The state file at `path`, locked against every other process until `close`.

    With `create` it is made, and must not be there; else it must be. Raises `NatCompatError`: ENOENT,
    EEXIST, EACCES (others may touch it, or make files in its directory), EBUSY (another tunnel has it),
    EMLINK (it has several names), EINVAL (it is no state file), or the error of the disk.
    """

    def __init__(self, path: Path, *, create: bool = False) -> None:
        if sys.platform == "win32":
            raise NatCompatError(
                errno.ENOTSUP, "state files are not had on Windows: it cannot sync a directory"
            )
        self.path: Path = path
        self._name = path.name
        self._file = self._directory = -1
        self._salt = b""
        self._numbers: dict[Identity, int] = {}
        self._peer: LearntPeer | None = None
        self._writing = threading.Lock()
        try:
            self._directory = open_directory_of(path, "the state file")
            if create:
                self._create()
            else:
                self._open()
        except NatCompatError:
            self.close()
            raise
        except OSError as error:
            self.close()
            raise self._disk_error(error) from None

    def close(self) -> None:
        """Close the file, and so release its lock."""
        for descriptor in (self._file, self._directory):
            if descriptor >= 0:
                os.close(descriptor)
        self._file = self._directory = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def discard(self) -> None:
        """Remove the file: no number of it was used."""
        os.unlink(self._name, dir_fd=self._directory)

    def identity(self, sa: SecurityAssociation) -> Identity:
        """Return the name of the key of `sa` in the file."""
        # Counter modes repeat themselves with their own key, whatever SPI, transform and MAC go with it.
        key = sa.encryption_key if sa.encryption in COUNTING else sa.integrity_key
        return Identity(blake2b(key, key=self._salt, digest_size=16).hexdigest(), sa.direction)

    def last(self, identity: Identity) -> int:
        """Return the last sequence number that may have been used, or for inbound SAs the highest received.

        EINVAL: it was the peer who used the key, with numbers that are not known here.
        """
        if identity.direction is Direction.OUT and identity._replace(direction=Direction.IN) in self._numbers:
            raise self._error(
                errno.EINVAL,
                "it says that the peer has sealed packets with a key that is for an outbound SA now",
                "Give every SA a key of its own",
            )
        return self._numbers.get(identity, 0)

    def record(self, numbers: Mapping[Identity, int]) -> None:
        """Write `numbers`, and return when they are on the disk. A NatCompatError: they may not be used."""
        with self._writing:
            changed = {**self._numbers, **numbers}
            try:
                self._write(changed, self._peer)
            except OSError as error:
                raise self._disk_error(error) from None
            self._numbers = changed

    def peer(self, configured: tuple[str, int]) -> LearntPeer | None:
        """Return the learnt address of the peer, if the tunnel's file says what it said then."""
        return self._peer if self._peer is not None and self._peer.configured == configured else None

    def record_peer(self, peer: LearntPeer) -> None:
        """Keep a learnt address for the next start. Raises `NatCompatError` if it cannot be written."""
        with self._writing:
            try:
                self._write(self._numbers, peer)
            except OSError as error:
                raise self._disk_error(error) from None
            self._peer = peer

    # -- the file

    def _error(self, number: int, problem: str, remedy: str) -> NatCompatError:
        return NatCompatError(number, f"the state file {hide_keys(str(self.path))}: {problem}", remedy)

    def _disk_error(self, error: OSError) -> NatCompatError:
        number = error.errno or errno.EIO
        return self._error(number, os.strerror(number), _REMEDIES.get(number, _OTHER_REMEDY))

    def _create(self) -> None:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        try:
            self._file = os.open(self._name, flags, 0o600, dir_fd=self._directory)
        except FileExistsError:
            raise self._error(
                errno.EEXIST, "it is there already", "Leave --create-state out; it is for new keys only"
            ) from None
        self._lock()
        self._salt = secrets.token_bytes(32)
        try:
            self._write({}, None)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(self._name, dir_fd=self._directory)
            raise

    def _open(self) -> None:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        for _ in range(_ATTEMPTS):
            try:
                mode = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False).st_mode
                self._refuse_unless_regular(mode)  # before it is opened, which a device may notice
                self._file = os.open(self._name, flags, dir_fd=self._directory)
            except FileNotFoundError:
                raise self._error(
                    errno.ENOENT,
                    "it is not there, so which IVs were used is not known",
                    "If the keys have never been used, make it with --create-state; else replace the keys",
                ) from None
            self._refuse_if_shared()
            self._lock()
            if self._is_current():
                self._parse(os.read(self._file, _LARGEST_FILE))
                return
            os.close(self._file)  # whoever held it has just written another
            self._file = -1
        raise self._error(errno.EBUSY, "it is being replaced all the time", "End the other tunnel")

    def _refuse_if_shared(self) -> None:
        status = os.fstat(self._file)
        mode = stat.S_IMODE(status.st_mode)
        self._refuse_unless_regular(status.st_mode)
        if status.st_uid not in (0, os.geteuid()) or mode & 0o077:
            raise self._error(
                errno.EACCES,
                f"mode {mode:04o}, owner {status.st_uid}: others may touch it, so what it says cannot be "
                "relied on",
                "Replace the keys, and make a new one; if nobody has touched it, chmod 600 will do",
            )
        if status.st_nlink > 1:
            raise self._error(
                errno.EMLINK,
                f"it has {status.st_nlink} names (hard links), and only one of them would go on",
                "Remove the other names; if an older copy may have been put back, replace the keys",
            )

    def _refuse_unless_regular(self, mode: int) -> None:
        if not stat.S_ISREG(mode) and not stat.S_ISLNK(mode):  # a link is refused when it is opened
            raise self._error(errno.EINVAL, "it is no regular file", "Name one that --create-state has made")

    def _lock(self) -> None:
        import fcntl

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._error(
                errno.EBUSY,
                "another tunnel has it",
                "End that one first, or give each keys and state of its own",
            ) from None

    def _is_current(self) -> bool:
        try:
            current = os.stat(self._name, dir_fd=self._directory, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return os.path.samestat(current, os.fstat(self._file))

    def _parse(self, content: bytes) -> None:
        try:
            document: Any = json.loads(content)
            if document["natcompat tunnel state"] != _VERSION:
                raise ValueError
            self._salt = bytes.fromhex(document["salt"])
            if len(self._salt) != 32:
                raise ValueError
            for name, number in document["last"].items():
                direction, _, digest = name.partition(" ")
                if type(number) is not int or not 0 <= number <= _LAST or len(bytes.fromhex(digest)) != 16:
                    raise ValueError
                self._numbers[Identity(digest, Direction(direction))] = number
            self._peer = _peer_of(document.get("peer"))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            raise self._error(
                errno.EINVAL, "it is not what natcompat wrote", "Replace the keys, and make a new one"
            ) from None

    def _write(self, numbers: Mapping[Identity, int], peer: LearntPeer | None) -> None:
        """Put a new file in the place of the old one, whole or not at all, and on the disk."""
        import fcntl

        document: dict[str, Any] = {
            "natcompat tunnel state": _VERSION,
            "warning": _WARNING,
            "salt": self._salt.hex(),
            "last": {
                f"{identity.direction.value} {identity.digest}": number
                for identity, number in numbers.items()
            },
        }
        if peer is not None:
            document["peer"] = {
                "configured": list(peer.configured),
                "address": str(peer.address),
                "port": peer.port,
            }
        temporary = f".{self._name}.new"
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary, dir_fd=self._directory)  # of one that was killed: we have the lock
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
        descriptor = os.open(temporary, flags, 0o600, dir_fd=self._directory)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)  # before anybody can find it
            with os.fdopen(descriptor, "wb", closefd=False) as file:
                file.write(json.dumps(document, indent=1).encode() + b"\n")
            os.fsync(descriptor)
            os.rename(temporary, self._name, src_dir_fd=self._directory, dst_dir_fd=self._directory)
        except BaseException:
            os.close(descriptor)
            with contextlib.suppress(OSError):
                os.unlink(temporary, dir_fd=self._directory)
            raise
        os.close(self._file)
        self._file = descriptor
        os.fsync(self._directory)


def _peer_of(value: Any) -> LearntPeer | None:
    """Return the learnt peer of a state file; ValueError, KeyError or TypeError: it is none."""
    if value is None:
        return None
    configured, configured_port = value["configured"]
    address, port = ip_address(value["address"]), value["port"]
    if not isinstance(configured, str) or type(configured_port) is not int or type(port) is not int:
        raise TypeError
    unusable = address.is_unspecified or address.is_multicast or address.is_loopback
    if (
        not isinstance(value["address"], str)
        or not 0 < port < 1 << 16
        or (unusable and configured != str(address))
    ):
        raise ValueError
    return LearntPeer((configured, configured_port), address, port)
