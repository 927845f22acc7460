"""Sysctls of OpenBSD and macOS, which hold for the whole system, and the values that this process set.

An endpoint claims the value that it needs. This process restores the former value when the last of its
endpoints releases it, and at exit; after SIGKILL the value stays.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import errno
import os
import threading
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

from natcompat.errors import NatCompatError


class Sysctl(NamedTuple):
    """An integer setting of the kernel."""

    name: str
    mib: tuple[int, ...] = ()
    """Its number, for kernels that know no names."""

    def read(self) -> int | None:
        """Return its value; None if the kernel does not have it."""
        value, size = ctypes.c_int(), ctypes.c_size_t(ctypes.sizeof(ctypes.c_int))
        try:
            self._call(ctypes.byref(value), ctypes.byref(size), None, 0)
        except OSError:
            return None
        return value.value

    def write(self, value: int) -> None:
        """Set its value. Raises OSError: EPERM without the privilege."""
        self._call(None, None, ctypes.byref(ctypes.c_int(value)), ctypes.sizeof(ctypes.c_int))

    def _call(self, old: Any, old_size: Any, new: Any, new_size: int) -> None:
        try:
            library = ctypes.CDLL(None, use_errno=True)
            if self.mib:
                numbers = (ctypes.c_int * len(self.mib))(*self.mib)
                name: tuple[Any, ...] = numbers, ctypes.c_uint(len(self.mib))
                function = library.sysctl
            else:
                name, function = (self.name.encode(),), library.sysctlbyname
        except (AttributeError, TypeError):
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
        if function(*name, old, old_size, new, ctypes.c_size_t(new_size)) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"{self.name}: {os.strerror(code)}")


@dataclass(slots=True)
class _Claim:
    value: int
    before: int
    count: int


_claims: Final[dict[Sysctl, _Claim]] = {}
_lock = threading.RLock()  # reentrant: a finalizer may release while its thread claims


def claim(sysctl: Sysctl, value: int, *, free: int, remedy: str) -> bool:
    """Set `sysctl` to `value`; return whether this process holds it and has to `release` it.

    `free` is the value that the setting has while nobody uses it. Raises `NatCompatError`: EBUSY if it has a
    third value, which another program needs; EPERM without the privilege, with `remedy`.
    """
    with _lock:
        held, now = _claims.get(sysctl), sysctl.read()
        if now == value:
            if held is not None:
                held.count += 1
            return held is not None
        if now != free:
            raise NatCompatError(
                errno.EBUSY,
                f"{sysctl.name} is {now} for the whole system, and this endpoint needs {value}",
                f"Let {'this process' if held else 'another daemon'} release it, or set it to {value}",
            )
        try:
            sysctl.write(value)
        except OSError as error:
            code = errno.EPERM if error.errno in (errno.EPERM, errno.EACCES) else error.errno
            raise NatCompatError(
                code or errno.EPERM, f"{sysctl.name} cannot be set to {value}: {error}", remedy
            ) from error
        _claims[sysctl] = _Claim(value, free, 1)
        return True


def release(sysctl: Sysctl) -> None:
    """Release one claim; the last one restores the value, unless another program has changed it since."""
    with _lock:
        held = _claims.get(sysctl)
        if held is None:  # a forked child has none
            return
        held.count -= 1
        if held.count <= 0:
            del _claims[sysctl]
            if sysctl.read() == held.value:
                with contextlib.suppress(OSError):  # the privilege is gone
                    sysctl.write(held.before)


def _release_all() -> None:
    for sysctl, held in list(_claims.items()):
        held.count = 1
        release(sysctl)


atexit.register(_release_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_claims.clear)  # they are the parent's
