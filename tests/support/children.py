"""Forked children of a test: by Python, and by a clone() of which Python does not know."""

from __future__ import annotations

import ctypes
import os
import platform
import traceback
from collections.abc import Callable

import pytest


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
    pid = ctypes.CDLL(None, use_errno=True).syscall(number, 17, 0, 0, 0, 0)  # SIGCHLD
    if pid:
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    _finish(check)
    raise AssertionError("a child does not get here")
