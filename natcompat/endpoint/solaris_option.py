"""The option under its own name: ``sock.setsockopt(IPPROTO_UDP, UDP_NAT_T_ENDPOINT, 1)``.

A daemon that was written for Solaris knows nothing else. `install` teaches it to every plain socket
of the process; ``python -m natcompat.commands.run`` does that for a whole program.
"""

from __future__ import annotations

import functools
import socket
import sys
from typing import Any

from natcompat.backends.system_calls import option_answer, option_value
from natcompat.contract import UDP_NAT_T_ENDPOINT
from natcompat.endpoint import set_nat_t_endpoint

_OPTION = (socket.IPPROTO_UDP, UDP_NAT_T_ENDPOINT)
_METHODS = ("setsockopt", "getsockopt")
_originals: dict[str, Any] = {}


def install() -> None:
    """Make every ``socket.socket`` of this process answer the option; may be repeated.

    ``setsockopt`` with it raises what `set_nat_t_endpoint` raises, with the errno that Solaris
    gives. ``socket.UDP_NAT_T_ENDPOINT`` exists afterwards. All other options stay what they are.
    Does nothing on Solaris and illumos, where the kernel answers. Not thread-safe: call it first.
    """
    if _originals or sys.platform == "sunos5":
        return
    cls = socket.socket
    for name in _METHODS:
        _originals[name] = cls.__dict__.get(name)  # None: inherited
    plain_setsockopt, plain_getsockopt = cls.setsockopt, cls.getsockopt

    @functools.wraps(plain_setsockopt)
    def setsockopt(self: socket.socket, level: int, option: int, *value: Any) -> None:
        if (level, option) == _OPTION and value:
            set_nat_t_endpoint(self, option_value(*value))
        else:
            plain_setsockopt(self, level, option, *value)

    @functools.wraps(plain_getsockopt)
    def getsockopt(self: socket.socket, level: int, option: int, *length: int) -> int | bytes:
        # an endpoint's socket has a getsockopt of its own, which answers 1
        if (level, option) == _OPTION and _has_option(self):
            return option_answer(0, *length)
        return plain_getsockopt(self, level, option, *length)

    cls.setsockopt, cls.getsockopt = setsockopt, getsockopt  # type: ignore[method-assign, assignment]
    if not hasattr(socket, "UDP_NAT_T_ENDPOINT"):
        socket.UDP_NAT_T_ENDPOINT = UDP_NAT_T_ENDPOINT  # type: ignore[attr-defined]
        _originals["UDP_NAT_T_ENDPOINT"] = None


def uninstall() -> None:
    """Undo `install`. Sockets on which the option is set keep it."""
    for name, original in _originals.items():
        owner: Any = socket if name == "UDP_NAT_T_ENDPOINT" else socket.socket
        if original is None:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
    _originals.clear()


def _has_option(sock: socket.socket) -> bool:
    """Tell whether Solaris knows the option on such a socket."""
    return (
        sock.fileno() >= 0
        and sock.family in (socket.AF_INET, socket.AF_INET6)
        and sock.type & 0xF == socket.SOCK_DGRAM
        and sock.proto in (0, socket.IPPROTO_UDP)
    )
