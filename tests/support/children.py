"""Forked children of a test: by Python, and by a clone() of which Python does not know."""

from __future__ import annotations

import ctypes
import os
import platform
import signal
import sys
import time
import traceback
from collections.abc import Callable

import pytest

ATTEMPTS = 5
PATIENCE = 15.0
"""Seconds after which a child that has said nothing stands still."""


def _finish(check: Callable[[], object]) -> None:
    status = 1
    try:
        check()
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def in_a_child(check: Callable[[], object]) -> int:
    """Run `check` in a forked child; return 0 if it returned, and print what it raised."""
    pid = os.fork()
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    _finish(check)
    raise AssertionError("a child does not get here")


def in_a_raw_child(check: Callable[[], object]) -> int:
    """Run `check` in a child made by the system call itself: no handler of Python or of libc runs."""
    if platform.system() != "Linux":
        pytest.skip("a raw clone() is a thing of Linux")
    numbers = {"x86_64": 56, "aarch64": 220, "riscv64": 220, "ppc64le": 120, "s390x": 120}
    number = numbers.get(platform.machine())
    if number is None or number == 120:  # other orders of arguments
        pytest.skip("the arguments of clone() are not known here")
    for _ in range(ATTEMPTS):
        status = _raw_child(number, check)
        if status is not None:
            return status
    raise AssertionError(f"{ATTEMPTS} raw children waited for threads that they do not have")


def _raw_child(number: int, check: Callable[[], object]) -> int | None:
    """Return the exit status; None: the child stood still, and was ended.

    The call keeps the interpreter's lock, which another thread might hold in the child for ever. Where
    another thread has just asked for it, or holds a lock of libc, the child stands still all the same.
    """
    interval = sys.getswitchinterval()
    sys.setswitchinterval(60)
    try:
        pid = ctypes.PyDLL(None).syscall(number, int(signal.SIGCHLD), 0, 0, 0, 0)
        if not pid:
            _finish(check)
    finally:
        sys.setswitchinterval(interval)
    until = time.monotonic() + PATIENCE
    while time.monotonic() < until:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None
