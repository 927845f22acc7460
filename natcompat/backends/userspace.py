"""The process does it: everywhere, without privilege, with the kernel's help where it can be had."""

from __future__ import annotations

import contextlib
import functools
import socket
import sys
from collections.abc import Callable, Mapping
from typing import Final

from natcompat.backends.base import Attachment, Viability
from natcompat.contract import NON_ESP_MARKER, Duty, Performer
from natcompat.diversion import Diversion

_PROCESS: Final[Mapping[Duty, Performer]] = dict.fromkeys(Duty, Performer.PROCESS)
_FILTER: Final[Mapping[Duty, Performer]] = {
    **_PROCESS,
    Duty.DROP_RUNTS: Performer.FILTER,
    Duty.DIVERT_ESP: Performer.FILTER,
}
_NO_RUNTS: Final[Mapping[Duty, Performer]] = {**_PROCESS, Duty.DROP_RUNTS: Performer.FILTER}
_STEERING: Final[Mapping[Duty, Performer]] = {
    **_PROCESS,
    Duty.DROP_RUNTS: Performer.STEERING,
    Duty.DIVERT_ESP: Performer.STEERING,
}


class InLineAttachment:
    """Nothing is asked of the kernel: the process classifies as it receives."""

    def __init__(self, reason: str, mode: str = "in line") -> None:
        self.mode = mode
        self.reason = reason
        self.duties: Mapping[Duty, Performer] = _PROCESS
        self.sensitive: frozenset[str | tuple[int, int]] = frozenset()
        self.hidden: dict[tuple[int, int], int] = {}

    def counters(self) -> Mapping[str, int]:
        """Return nothing: all is counted in the process."""
        return {}

    def detach(self, sock: socket.socket) -> None:
        """There is nothing to take off."""

    def release(self) -> None:
        """There is nothing to free."""

    def adopt(self) -> None:
        """There is nothing to carry on."""


class UserspaceBackend:
    """Demultiplexing in this process.

    On Linux ESP is steered to a socket of natcompat's; with `in_line` (and wherever steering cannot
    be had) the process classifies what the application's own receive calls return.
    """

    hands_over_esp = True

    def __init__(self, *, in_line: bool = False) -> None:
        self.name = "userspace:in-line" if in_line else "userspace"
        self._in_line = in_line

    def viability(self) -> Viability:
        """Tell what the kernel will do; the rest always works."""
        if self._in_line:
            return Viability(
                self.name,
                True,
                _PROCESS,
                "chosen by name: the kernel is not asked for anything",
                automatic=False,
            )
        if sys.platform != "linux":
            return Viability(
                self.name, True, _PROCESS, "demultiplexing in line: steering is a feature of Linux"
            )
        steering, filtering = steering_refused(), filter_refused()
        if not steering:
            return Viability(self.name, True, _STEERING, "the kernel steers ESP to a socket of its own")
        duties = _PROCESS if filtering else _NO_RUNTS
        return Viability(
            self.name,
            True,
            duties,
            f"demultiplexing in line: {steering}",
            "Allow setsockopt of SO_ATTACH_REUSEPORT_CBPF and SO_ATTACH_FILTER in the sandbox's policy",
        )

    def attach(self, sock: socket.socket, diversion: Diversion) -> Attachment:
        """Steer if it can be done, filter if it cannot, else demultiplex in line."""
        if self._in_line:
            return InLineAttachment("chosen by name")
        if sys.platform != "linux":
            return InLineAttachment("steering is a feature of Linux")
        return _LinuxAttachment(sock, diversion)


class _LinuxAttachment(InLineAttachment):
    """Steering, filter and UDP_GRO on one socket of Linux, as far as each can be had."""

    def __init__(self, sock: socket.socket, diversion: Diversion) -> None:
        from natcompat import filters
        from natcompat.backends import steering

        super().__init__("")
        self._steering: steering.Steering | None = None
        self._filtered = False
        self.sensitive = frozenset(
            {
                "bind",
                "connect",
                (socket.SOL_SOCKET, socket.SO_REUSEPORT),
                (socket.SOL_SOCKET, steering.SO_BINDTODEVICE),
                (socket.SOL_SOCKET, filters.SO_ATTACH_FILTER),
                (socket.SOL_SOCKET, filters.SO_DETACH_FILTER),
                (socket.SOL_SOCKET, filters.SO_LOCK_FILTER),
                (socket.SOL_SOCKET, filters.SO_ATTACH_BPF),
                (socket.SOL_SOCKET, filters.SO_ATTACH_REUSEPORT_CBPF),
                (socket.SOL_SOCKET, filters.SO_ATTACH_REUSEPORT_EBPF),
                (socket.SOL_SOCKET, filters.SO_DETACH_REUSEPORT_BPF),
                (socket.IPPROTO_IP, steering.IP_RECVERR),
                (socket.IPPROTO_IPV6, steering.IPV6_RECVERR),
                (socket.IPPROTO_UDP, steering.UDP_ENCAP),
            }
        )
        with contextlib.ExitStack() as undo:
            if not sock.getsockname()[1]:
                self.mode, self.reason = "unbound", "the socket is not bound yet"
            elif diversion.wanted:
                self.reason = self._steer(sock, diversion, undo)
            self._filter(sock, diversion, undo)
            # the kernel would show a program several datagrams as one
            self.hidden |= switch_gro_off(sock)
            undo.pop_all()

    def _steer(self, sock: socket.socket, diversion: Diversion, undo: contextlib.ExitStack) -> str:
        from natcompat.backends.steering import Steering, refusal

        reason = refusal(sock) or steering_refused()
        if reason:
            return reason
        try:
            self._steering = Steering(sock, diversion)
        except OSError as error:
            return f"joining the application's port was refused: {error}"
        undo.callback(self._steering.detach, sock)
        self.mode, self.duties = "steering", _STEERING
        self.hidden[socket.SOL_SOCKET, socket.SO_REUSEPORT] = 0
        return ""

    def _filter(self, sock: socket.socket, diversion: Diversion, undo: contextlib.ExitStack) -> None:
        """Put a filter on: against what may only be ESP for nobody, or at least against runts."""
        from natcompat import filters

        strict = self._steering is not None or not diversion.wanted
        refused = put_filter(sock, filters.IKE_ONLY if strict else filters.NO_RUNTS)
        if refused:
            self.reason = self.reason or (refused if self._steering is None else "")
            return
        self._filtered = True
        undo.callback(filters.detach_filter, sock)
        if self._steering is None:
            self.duties = _FILTER if strict else _NO_RUNTS
            if strict and self.mode == "in line":
                self.mode = "filter"

    def counters(self) -> Mapping[str, int]:
        """Return the drops of the engine's queues."""
        return {"engine_drops": self._steering.drops()} if self._steering is not None else {}

    def detach(self, sock: socket.socket) -> None:
        """Leave the group, take the filter off, give UDP_GRO back."""
        from natcompat import filters

        with contextlib.ExitStack() as each:  # all of them, whatever one of them raises
            each.callback(restore_gro, sock, self.hidden)
            if self._filtered:
                each.callback(filters.detach_filter, sock)
            if self._steering is not None:
                each.callback(self._steering.detach, sock)

    def release(self) -> None:
        """Close the sockets of the engine and end its thread."""
        if self._steering is not None:
            self._steering.release()

    def adopt(self) -> None:
        """Start the thread again in a forked child."""
        if self._steering is not None:
            self._steering.adopt()


def put_filter(sock: socket.socket, program: tuple[tuple[int, int, int, int], ...]) -> str:
    """Put `program` on `sock` unless the application has a filter there; return why it was not done."""
    from natcompat import filters

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


def switch_gro_off(sock: socket.socket) -> dict[tuple[int, int], int]:
    """Switch UDP_GRO off on `sock`; return what the application shall read of it."""
    from natcompat.backends.steering import UDP_GRO

    option = socket.IPPROTO_UDP, UDP_GRO
    try:
        wanted = sock.getsockopt(*option)
    except OSError:  # before Linux 5.0
        return {}
    if wanted:
        sock.setsockopt(*option, 0)
    return {option: wanted}


def restore_gro(sock: socket.socket, hidden: Mapping[tuple[int, int], int]) -> None:
    """Put UDP_GRO on `sock` as the application wants it."""
    from natcompat.backends.steering import UDP_GRO

    if hidden.get((socket.IPPROTO_UDP, UDP_GRO)):
        sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)


def _proof(prove: Callable[[socket.socket, socket.socket], str]) -> str:
    """Run `prove` on two private loopback sockets; return why the feature cannot be used, or nothing."""
    try:
        with socket.socket(type=socket.SOCK_DGRAM) as sock, socket.socket(type=socket.SOCK_DGRAM) as peer:
            sock.bind(("127.0.0.1", 0))
            sock.settimeout(1)
            return prove(sock, peer)
    except OSError as error:
        return str(error)


@functools.cache
def filter_refused() -> str:
    """Return why no socket filter works here; empty if one has been seen to work."""
    from natcompat import filters

    def prove(sock: socket.socket, peer: socket.socket) -> str:
        try:
            filters.attach_filter(sock, filters.IKE_ONLY)
        except OSError as error:
            return f"the kernel or a sandbox refuses socket filters: {error}"
        return _first_is_ike(sock, peer)

    return _proof(prove)


@functools.cache
def steering_refused() -> str:
    """Return why steering does not work here; empty if it has been seen to work."""
    from natcompat.backends.steering import Steering

    def prove(sock: socket.socket, peer: socket.socket) -> str:
        try:
            group = Steering(sock, Diversion(None, socket.AF_INET))
        except OSError as error:
            return f"the kernel or a sandbox refuses SO_REUSEPORT programs: {error}"
        try:
            return _first_is_ike(sock, peer)
        finally:
            group.detach(sock)

    return _proof(prove)


def _first_is_ike(sock: socket.socket, peer: socket.socket) -> str:
    """Send a runt, ESP and IKE to `sock`, on which only IKE may arrive."""
    try:
        for payload in (b"\xff", b"\1" * 32, NON_ESP_MARKER + b"IKE"):
            peer.sendto(payload, sock.getsockname())
        if sock.recv(64) == NON_ESP_MARKER + b"IKE":
            return ""
    except OSError as error:
        # without a loopback interface nothing can be proven; that it was accepted has to do
        import errno

        if error.errno in (errno.ENETUNREACH, errno.EADDRNOTAVAIL, errno.ENETDOWN):
            return ""
        return f"it was accepted, and a datagram that should pass did not arrive: {error}"
    return "it was accepted and has no effect"
