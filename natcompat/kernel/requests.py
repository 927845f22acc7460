"""Requests to a kernel: whose socket they go by, and errors with what helps."""

from __future__ import annotations

import errno
import os
from collections.abc import Mapping

from natcompat.errors import NatCompatError

SO_RCVBUFFORCE = 33  # asm-generic/socket.h

REMEDIES: Mapping[int, str] = {
    errno.ESRCH: "It was never there, has expired, or somebody deleted it",
    errno.ENOBUFS: "Try again; the kernel is short of memory or its queue is full",
}
"""What helps against each errno, where nobody knows anything better."""
NOTHING_BETTER: Mapping[int, str] = {}

_forks = 0


def _count_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_count_fork)


class Owner:
    """The process that opened a socket: its child would read its answers, and it the child's."""

    def __init__(self) -> None:
        self._forks = _forks

    def check(self, what: str) -> None:
        """Raise EINVAL for `what` in a forked child."""
        if self._forks != _forks:
            raise NatCompatError(
                errno.EINVAL,
                f"{what}: this socket belongs to the parent process",
                "Open IPsec anew after fork",
            )


def failure(what: str, code: int, text: str, *remedies: Mapping[int, str]) -> NatCompatError:
    """Return the error for `what`, with errno `code` and the kernel's `text`; the first remedy counts."""
    remedy = next(filter(None, (each.get(code) for each in (*remedies, REMEDIES))), "")
    return NatCompatError(code, f"{what}: {text or os.strerror(code)}", remedy)
