"""Socket features of Linux: filter, steering and UDP_GRO, proven on private sockets before use."""

from __future__ import annotations

import contextlib
import errno
import functools
import socket
from collections.abc import Callable, Mapping
from typing import Final

from natcompat.backends.diversion import Diversion
from natcompat.backends.linux_sockets import filters
from natcompat.backends.linux_sockets.loopback import LOOPBACK, LoopbackWay
from natcompat.backends.linux_sockets.options import SO_BINDTODEVICE, UDP_GRO
from natcompat.backends.linux_sockets.steering import Steering
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
"""Options with which an application handles filters, before which ours has to be detached."""

SANDBOX_REMEDY: Final = (
    "Allow setsockopt of SO_ATTACH_FILTER and SO_ATTACH_REUSEPORT_CBPF in the sandbox's policy"
)

_GRO: Final = (socket.IPPROTO_UDP, UDP_GRO)
# the errors of a machine whose loopback interface is missing or down
_NO_LOOPBACK: Final = (errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.ENETDOWN)


def put_filter(sock: socket.socket, program: filters.Program) -> str:
    """Attach `program` to `sock` unless the application has a filter there; return why not, or ''."""
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
    """Detach the filter of `put_filter`. Raises OSError: EPERM after SO_LOCK_FILTER."""
    try:
        filters.detach_filter(sock)
    except OSError as error:
        if error.errno != errno.ENOENT:  # another object of this socket has detached it already
            raise


def switch_gro_off(sock: socket.socket) -> dict[tuple[int, int], int]:
    """Switch UDP_GRO off on `sock`; return the value that the application reads, by option."""
    try:
        wanted = sock.getsockopt(*_GRO)
    except OSError:  # before Linux 5.0
        return {}
    if wanted:
        sock.setsockopt(*_GRO, 0)
    return {_GRO: wanted}


def restore_gro(sock: socket.socket, hidden: Mapping[tuple[int, int], int]) -> None:
    """Set UDP_GRO on `sock` as the application set it."""
    if hidden.get(_GRO):
        sock.setsockopt(*_GRO, 1)


def filter_refused() -> str:
    """Return why no socket filter works here; empty after a filter was proven to work."""
    return _answer(_filter_proof)


def steering_refused() -> str:
    """Return why steering does not work here; empty after it was proven to work."""
    return _answer(_steering_proof)


def hand_back_refused() -> str:
    """Return why IKE cannot return from an ESP socket to one bound to 0.0.0.0; empty if it can."""
    try:
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.bind(("", 0))
            LoopbackWay(sock).close()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _answer(proof: Callable[[], str]) -> str:
    try:
        return proof()
    except OSError as error:
        # without loopback nothing can be proven, and the kernel's acceptance has to do
        return "" if error.errno in _NO_LOOPBACK else f"it could not be tried: {error}"


# Exceptions are not cached: a lack of descriptors, memory or a loopback interface may pass.


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
    """Send a runt, ESP and IKE to `sock` over loopback; return what was wrong, or ''."""
    ike = NON_ESP_MARKER + b"IKE"
    sock.settimeout(1)
    with socket.socket(type=socket.SOCK_DGRAM) as peer:
        with contextlib.suppress(OSError):  # before Linux 5.7; then routes decide
            peer.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, LOOPBACK)
        for payload in (b"\xff", b"\1" * 32, ike):
            peer.sendto(payload, ("127.0.0.1", sock.getsockname()[1]))
    try:
        first = sock.recv(64)
    except TimeoutError:
        return "it was accepted, and a datagram that should pass did not arrive"
    return "" if first == ike else "it was accepted and has no effect"
