"""What Linux will do on a socket: filter, steering, UDP_GRO; asked by trying, put on and taken off."""

from __future__ import annotations

import errno
import functools
import socket
from collections.abc import Callable, Mapping
from typing import Final

from natcompat.backends.diversion import Diversion
from natcompat.backends.linux_sockets import filters
from natcompat.backends.linux_sockets.steering import UDP_GRO, Steering
from natcompat.contract import NON_ESP_MARKER

FILTER_OPTIONS: Final[frozenset[tuple[int, int]]] = frozenset(
    (socket.SOL_SOCKET, option)
    for option in (
        filters.SO_ATTACH_FILTER,
        filters.SO_DETACH_FILTER,
        filters.SO_LOCK_FILTER,
        filters.SO_ATTACH_BPF,
    )
)
"""What an application may do with filters, so that one of ours has to get out of its way."""

SANDBOX_REMEDY: Final = (
    "Allow setsockopt of SO_ATTACH_FILTER and SO_ATTACH_REUSEPORT_CBPF in the sandbox's policy"
)

_GRO: Final = (socket.IPPROTO_UDP, UDP_GRO)
# what a machine without a loopback interface, or with one that is down, answers
_NO_LOOPBACK: Final = (errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.ENETDOWN)


def put_filter(sock: socket.socket, program: filters.Program) -> str:
    """Put `program` on `sock` unless the application has a filter there; return why it was not done."""
    refused = filter_refused()
    if refused:
        return refused
    if filters.has_filter(sock):
        return "the application has a socket filter of its own"
    try:
        filters.attach_filter(sock, program)
    except OSError as error:
        return f"a socket filter was refused: {error}"
    return ""


def take_filter_off(sock: socket.socket) -> None:
    """Take off what `put_filter` put on. Raises OSError: EPERM if somebody locked it (SO_LOCK_FILTER)."""
    try:
        filters.detach_filter(sock)
    except OSError as error:
        if error.errno != errno.ENOENT:  # another object of this socket took it off already
            raise


def switch_gro_off(sock: socket.socket) -> dict[tuple[int, int], int]:
    """Switch UDP_GRO off on `sock`; return what the application shall read of it."""
    try:
        wanted = sock.getsockopt(*_GRO)
    except OSError:  # before Linux 5.0
        return {}
    if wanted:
        sock.setsockopt(*_GRO, 0)
    return {_GRO: wanted}


def restore_gro(sock: socket.socket, hidden: Mapping[tuple[int, int], int]) -> None:
    """Put UDP_GRO on `sock` as the application wants it."""
    if hidden.get(_GRO):
        sock.setsockopt(*_GRO, 1)


def filter_refused() -> str:
    """Return why no socket filter works here; empty if one has been seen to work."""
    return _answer(_filter_proof)


def steering_refused() -> str:
    """Return why steering does not work here; empty if it has been seen to work."""
    return _answer(_steering_proof)


def _answer(proof: Callable[[], str]) -> str:
    try:
        return proof()
    except OSError as error:
        # nothing can be proven without loopback; that the kernel accepted it has to do
        return "" if error.errno in _NO_LOOPBACK else f"it could not be tried: {error}"


# An exception is not cached: a want of descriptors or memory, or of a loopback interface, may pass.


@functools.cache
def _filter_proof() -> str:
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        try:
            filters.attach_filter(sock, filters.IKE_ONLY)
        except OSError as error:
            return f"the kernel or a sandbox refuses socket filters: {error}"
        sock.bind(("127.0.0.1", 0))
        return _only_ike_arrives(sock)


@functools.cache
def _steering_proof() -> str:
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        try:
            sock.bind(("127.0.0.1", 0))
        except OSError as error:
            if error.errno not in _NO_LOOPBACK:
                raise
            sock.bind(("", 0))
        try:
            group = Steering(sock, Diversion(None, socket.AF_INET))
        except OSError as error:
            return f"the kernel or a sandbox refuses SO_REUSEPORT programs: {error}"
        try:
            return _only_ike_arrives(sock)
        finally:
            group.detach(sock)


def _only_ike_arrives(sock: socket.socket) -> str:
    """Send a runt, ESP and IKE to `sock` by loopback; return what was wrong with what arrived."""
    ike = NON_ESP_MARKER + b"IKE"
    sock.settimeout(1)
    with socket.socket(type=socket.SOCK_DGRAM) as peer:
        for payload in (b"\xff", b"\1" * 32, ike):
            peer.sendto(payload, ("127.0.0.1", sock.getsockname()[1]))
    try:
        first = sock.recv(64)
    except TimeoutError:
        return "it was accepted, and a datagram that should pass did not arrive"
    return "" if first == ike else "it was accepted and has no effect"
