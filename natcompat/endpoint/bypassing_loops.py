"""Refuses event loops whose datagram transports read a descriptor without its socket object.

The Proactor of Windows does so with every non-blocking socket that it is given; uvloop with the sockets
of its own transports. The module knows no endpoint.
"""

from __future__ import annotations

import contextlib
import contextvars
import errno
import socket
import sys
import warnings
from collections.abc import Iterator

from natcompat.errors import NatCompatError

_reads_through_object: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "natcompat.endpoint.loops reads through the socket object", default=False
)


def object_to_bypassing_loop(sock: socket.socket, *, has_option: bool) -> bool:
    """Refuse, or warn, if the running event loop reads `sock` without the object; return whether it warned.

    Call it for a socket that is about to get the option (`has_option` False), which a transport may be
    reading already, and for one that has it and becomes non-blocking, as these loops' transports make it.

    Raises `NatCompatError` (EOPNOTSUPP) on the Proactor. On uvloop, where other code than a transport may
    have made the socket non-blocking, it gives a RuntimeWarning.
    """
    asyncio = sys.modules.get("asyncio")
    loop = asyncio._get_running_loop() if asyncio is not None else None  # noqa: SLF001 - never raises
    if loop is None or _reads_through_object.get():
        return False
    problem = (
        f"datagram transports of {type(loop).__module__}.{type(loop).__name__} read the descriptor without "
        "this socket object, so the application would receive keepalives, ESP and the non-ESP marker"
    )
    remedy = "se natcompat.endpoint.loops.create_nat_t_endpoint() instead of create_datagram_endpoint()"
    if any(cls.__module__ == "asyncio.proactor_events" for cls in type(loop).__mro__):
        if has_option or sock.gettimeout() == 0:
            raise NatCompatError(errno.EOPNOTSUPP, problem, f"U{remedy}, or a SelectorEventLoop")
        return False
    if "uvloop" not in {cls.__module__.partition(".")[0] for cls in type(loop).__mro__}:
        return False
    if not has_option and not getattr(sock, "_io_refs", 0):  # a transport holds one, as makefile() does
        return False
    warnings.warn(f"{problem}: u{remedy}", RuntimeWarning, stacklevel=_stacklevel_of_application())
    return True


@contextlib.contextmanager
def reading_through_object() -> Iterator[None]:
    """Let `object_to_bypassing_loop` accept every loop: the caller reads through the socket object."""
    token = _reads_through_object.set(True)
    try:
        yield
    finally:
        _reads_through_object.reset(token)


def _stacklevel_of_application() -> int:
    """Return the stacklevel at which a warning of the caller names a line of the application."""
    level, frame = 1, sys._getframe(1)  # noqa: SLF001 - as warnings.py does
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] in (
        "natcompat",
        "asyncio",
        "uvloop",
    ):
        level, frame = level + 1, frame.f_back
    return level
