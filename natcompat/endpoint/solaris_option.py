"""``setsockopt(IPPROTO_UDP, UDP_NAT_T_ENDPOINT)`` on plain sockets: `install`.

A daemon written for Solaris makes this call. ``python -m natcompat.commands.run`` runs a whole program with
the option installed.
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
    """Give every ``socket.socket`` of this process the option UDP_NAT_T_ENDPOINT; may be repeated.

    ``setsockopt`` with the option raises what `set_nat_t_endpoint` raises, with the errno of Solaris.
    ``socket.UDP_NAT_T_ENDPOINT`` is defined afterwards. Other options do not change. Does nothing on
    Solaris and illumos, whose kernel has the option. Not thread-safe: call it before threads start.
    """
    if _originals or sys.platform == "sunos5":
        return
    cls = socket.socket
    for name in _METHODS:
        _originals[name] = cls.__dict__.get(name)  # None: an inherited method
    plain_setsockopt, plain_getsockopt = cls.setsockopt, cls.getsockopt

    @functools.wraps(plain_setsockopt)
    def setsockopt(self: socket.socket, level: int, option: int, *value: Any) -> None:
        if (level, option) == _OPTION and value:
            set_nat_t_endpoint(self, option_value(*value))
        else:
            plain_setsockopt(self, level, option, *value)

    @functools.wraps(plain_getsockopt)
    def getsockopt(self: socket.socket, level: int, option: int, *length: int) -> int | bytes:
        # the class of an endpoint's socket has its own getsockopt, which returns 1
        if (level, option) == _OPTION and _has_option(self):
            return option_answer(0, *length)
        return plain_getsockopt(self, level, option, *length)

    cls.setsockopt, cls.getsockopt = setsockopt, getsockopt  # type: ignore[method-assign, assignment]
    if not hasattr(socket, "UDP_NAT_T_ENDPOINT"):
        socket.UDP_NAT_T_ENDPOINT = UDP_NAT_T_ENDPOINT  # type: ignore[attr-defined]
        _originals["UDP_NAT_T_ENDPOINT"] = None


def uninstall() -> None:
    """Undo `install`. Sockets with the option keep it."""
    for name, original in _originals.items():
        owner: Any = socket if name == "UDP_NAT_T_ENDPOINT" else socket.socket
        if original is None:
            delattr(owner, name)
        else:
            setattr(owner, name, original)
    _originals.clear()


def _has_option(sock: socket.socket) -> bool:
    """Tell whether Solaris has the option on sockets of this kind."""
    return (
        sock.fileno() >= 0
        and sock.family in (socket.AF_INET, socket.AF_INET6)
        and sock.type & 0xF == socket.SOCK_DGRAM
        and sock.proto in (0, socket.IPPROTO_UDP)
    )
