"""The identity of this process: a random number that no other process has, not even a copy of this one.

A process number is not enough: in another PID namespace a forked child may have the number of its parent.
"""

from __future__ import annotations

import mmap
import os
import sys
from typing import Final

_MADV_WIPEONFORK: Final = 18
"""linux/mman.h, from Linux 4.14 on; Python has no name for it."""


def _wiped_page() -> memoryview | None:
    """Return a word that reads as 0 in every forked child, also after a clone() in C; None: not here."""
    if sys.platform != "linux":
        return None
    page = mmap.mmap(-1, mmap.PAGESIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    try:
        page.madvise(_MADV_WIPEONFORK)
    except OSError:
        page.close()
        return None
    return memoryview(page).cast("Q")


_wiped: Final = _wiped_page()
WORD: Final = memoryview(bytearray(8)).cast("Q") if _wiped is None else _wiped
"""`WORD[0]` is the identity; 0: none has been drawn yet. The cheapest way to compare it for every burst."""

WIPES: Final = _wiped is not None
"""Whether `WORD` changes in every forked child. False: only where Python's own handlers run (`os.fork`)."""


def identity() -> int:
    """Return the identity of this process."""
    if not WORD[0]:  # a child of which Python does not know
        _after_fork()
    return WORD[0]


def renew() -> None:
    """Draw another identity: what was opened under the last one cannot be used any more."""
    WORD[0] = int.from_bytes(os.urandom(8)) | 1  # 0 says that there is none


def is_copy(opened_by: int, pid: int) -> bool:
    """Tell whether this process is another one than that with the identity `opened_by` and number `pid`."""
    return WORD[0] != opened_by or (not WIPES and os.getpid() != pid)


def _birth() -> tuple[bytes, bytes] | None:
    """Return the identifier of this boot and when this process started; None: it cannot be known.

    What restores a process from a checkpoint (CRIU) starts another one, which has another start.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", "rb") as boot, open("/proc/self/stat", "rb") as stat:
            return boot.read(), stat.read().rpartition(b")")[2].split()[19]
    except (OSError, IndexError):
        return None


_born = _birth()


def notice_restore() -> None:
    """Draw another identity if this process has been restored from a checkpoint.

    A copy of a whole virtual machine does not show: no process in it can tell.
    """
    global _born  # noqa: PLW0603
    identity()
    birth = _birth()
    if birth is None or birth == _born:
        return
    if _born is not None:
        renew()
    _born = birth


def _after_fork() -> None:
    global _born  # noqa: PLW0603
    renew()
    _born = _birth()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
