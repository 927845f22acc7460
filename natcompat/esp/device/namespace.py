"""Runs functions inside another network namespace: sockets and devices that they make belong there."""

from __future__ import annotations

import ctypes
import errno
import os
import threading
from collections.abc import Callable
from typing import Final, TypeVar

from natcompat.backends.base import NetworkNamespace
from natcompat.errors import NatCompatError

_T = TypeVar("_T")

_CLONE_NEWNET: Final = 0x4000_0000  # linux/sched.h
_DIRECTORY: Final = "/run/netns"  # ip-netns(8)

_REMEDIES: Final = {
    errno.ENOENT: "Create it first (ip netns add NAME), or give the path of a namespace, /proc/PID/ns/net",
    errno.EPERM: "Run as root, or grant CAP_SYS_ADMIN, which entering a namespace takes",
    errno.EINVAL: "Give the descriptor or the path of a network namespace",
}


class Namespace:
    """A network namespace that functions can be run in, or the one of the calling thread."""

    def __init__(self, netns: NetworkNamespace | None) -> None:
        """`netns`: a name of ``ip netns``, a path, or a descriptor, which is duplicated; None: stay here.

        ENOENT: there is none of this name. EPERM and EINVAL come from `call`.
        """
        self._descriptor = -1
        if netns is None:
            return
        try:
            if isinstance(netns, int):
                self._descriptor = os.dup(netns)
            else:
                path = os.fspath(netns)
                path = path if "/" in path else f"{_DIRECTORY}/{path}"
                self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise _failure(netns, error) from None

    @property
    def is_other(self) -> bool:
        """Whether it is another namespace than the caller's."""
        return self._descriptor >= 0

    def call(self, function: Callable[[], _T]) -> _T:
        """Return what `function` returns inside the namespace; it runs in a thread of its own there."""
        if not self.is_other:
            return function()
        results: list[_T] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                _enter(self._descriptor)
                results.append(function())
            except BaseException as error:  # noqa: BLE001 - the caller gets it
                errors.append(error)

        thread = threading.Thread(target=run, name="natcompat-netns", daemon=True)
        thread.start()
        thread.join()
        if errors:
            raise errors[0]
        return results[0]

    def close(self) -> None:
        """Close the descriptor of the namespace. May be repeated."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _enter(descriptor: int) -> None:
    """Move the calling thread into a namespace."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.setns(descriptor, _CLONE_NEWNET):
        code = ctypes.get_errno()
        raise _failure(descriptor, OSError(code, os.strerror(code)))


def _failure(netns: NetworkNamespace, error: OSError) -> NatCompatError:
    code = error.errno or errno.EIO
    text = f"the network namespace {netns!r} cannot be entered: {error.strerror}"
    return NatCompatError(code, text, _REMEDIES.get(code, ""))
