"""Checks whether a socket can take the option."""

from __future__ import annotations

import errno
import socket
import sys
from typing import Any, Final

from natcompat.backends.system_calls import root_class
from natcompat.errors import NatCompatError

# include/uapi/linux/udp.h: options that make one send several datagrams, or several sends one
_UDP_CORK: Final = 1
_UDP_SEGMENT: Final = 103
REFUSED_OPTIONS: Final = (
    {(socket.IPPROTO_UDP, _UDP_CORK): "UDP_CORK", (socket.IPPROTO_UDP, _UDP_SEGMENT): "UDP_SEGMENT"}
    if sys.platform == "linux"
    else {}
)


def unwrap(sock: Any) -> Any:
    """Return the socket inside asyncio's ``TransportSocket`` (``get_extra_info("socket")``), else `sock`."""
    cls = type(sock)
    if cls.__name__ == "TransportSocket" and cls.__module__ == "asyncio.trsock":
        return sock._sock  # noqa: SLF001 - asyncio has no public way
    return sock


def admit(sock: Any) -> type[socket.socket]:
    """Return the library's socket class from which that of `sock` derives.

    Raises the errors of `natcompat.set_nat_t_endpoint` for an object that cannot take the option.
    """
    cls = type(sock)
    if any(ancestor.__module__.partition(".")[0] == "trio" for ancestor in cls.__mro__):
        raise TypeError(
            "trio's sockets cannot be NAT-T endpoints: set the option on a socket.socket and read it "
            "with natcompat.endpoint.loops.open_nat_t_endpoint(), which works on trio"
        )
    if cls.__module__.partition(".")[0] == "uvloop":
        raise TypeError(
            "uvloop's transports read the descriptor themselves: set the option on a socket.socket and give "
            "it to natcompat.endpoint.loops.create_nat_t_endpoint()"
        )
    if any((ancestor.__module__, ancestor.__name__) == ("ssl", "SSLSocket") for ancestor in cls.__mro__):
        raise TypeError("an SSL socket cannot be a NAT-T endpoint: the option is for plain UDP sockets")
    root = root_class(cls)
    if root is None:
        hint = "; wrap the descriptor: socket.socket(fileno=os.dup(fd))" if isinstance(sock, int) else ""
        raise TypeError(f"expected a UDP socket.socket, not {cls.__name__}{hint}")
    if sock.fileno() < 0:
        raise NatCompatError(errno.EBADF, "the socket is closed")
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        raise NatCompatError(
            errno.EAFNOSUPPORT, f"the option is for AF_INET and AF_INET6, not {_name(sock.family)}"
        )
    if sock.type & 0xF != socket.SOCK_DGRAM or sock.proto not in (0, socket.IPPROTO_UDP):
        raise NatCompatError(
            errno.ENOPROTOOPT,
            f"the option is for UDP sockets, not {_name(sock.type)} of protocol {sock.proto}",
            "Make the socket with socket.socket(family, socket.SOCK_DGRAM)",
        )
    return root


def refuse_set_options(root: type[socket.socket], sock: Any) -> None:
    """Raise `NatCompatError` (EOPNOTSUPP) if `sock` has an option that excludes UDP_NAT_T_ENDPOINT."""
    for option in REFUSED_OPTIONS:
        if _is_set(root, sock, *option):
            refuse_option(*option)


def refuse_option(level: int, option: int) -> None:
    """Raise `NatCompatError` (EOPNOTSUPP) if the option excludes UDP_NAT_T_ENDPOINT."""
    name = REFUSED_OPTIONS.get((level, option))
    if name is not None:
        raise NatCompatError(
            errno.EOPNOTSUPP,
            f"{name} excludes UDP_NAT_T_ENDPOINT: one send would not be one datagram with one marker",
            "Send the messages one by one",
        )


def _is_set(root: type[socket.socket], sock: Any, level: int, option: int) -> bool:
    try:
        return bool(root.getsockopt(sock, level, option))
    except OSError:  # unknown to this system
        return False


def _name(value: Any) -> str:
    return str(getattr(value, "name", value))
