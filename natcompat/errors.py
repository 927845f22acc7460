"""The exceptions that natcompat raises of its own accord."""

from __future__ import annotations

import os


class NatCompatError(OSError):
    """An operation could not be done; carries the errno that Solaris would give, and the way out.

    `remedy` is one sentence that says what to do about it (a module to load, a capability to
    grant, another call to make); it is part of ``str(error)``. Nothing secret is ever in either.
    """

    remedy: str

    def __init__(self, errno: int, reason: str, remedy: str = "") -> None:
        super().__init__(errno, reason or os.strerror(errno))
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{super().__str__()}. {self.remedy}" if self.remedy else super().__str__()

    def __reduce__(self) -> tuple[type[NatCompatError], tuple[int, str, str]]:
        return type(self), (self.errno or 0, self.strerror or "", self.remedy)


class BackendUnavailableError(NatCompatError):
    """The backend that was asked for is unknown here or cannot work here; the message says why."""
