"""The process does it: everywhere, without privilege, with the kernel's help where it can be had."""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from natcompat.backends.base import Attachment, Viability
from natcompat.backends.diversion import Diversion
from natcompat.backends.process_esp import PROCESS_ESP
from natcompat.contract import Duty, Performer

if TYPE_CHECKING:
    from natcompat.backends.base import DeviceChoice, NetworkNamespace
    from natcompat.esp.userspace import UserspaceIPsec as UserspaceIPsec

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
    """Demultiplexing in this process, and ESP in it once `open_ipsec` was called.

    On Linux ESP is steered to a socket of natcompat's; with `in_line` (and wherever steering cannot
    be had) the process classifies what the application's own receive calls return.
    """

    hands_over_esp = True
    own_esp = PROCESS_ESP

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
        from natcompat.backends.linux_sockets import features

        steering, filtering = features.steering_refused(), features.filter_refused()
        no_filter = f"; no filter: {filtering}" if filtering else ""
        if not steering:
            reason = f"the kernel steers ESP to a socket of its own{no_filter}"
            return Viability(self.name, True, _STEERING, reason, features.SANDBOX_REMEDY if filtering else "")
        return Viability(
            self.name,
            True,
            _PROCESS if filtering else _NO_RUNTS,
            f"demultiplexing in line: {steering}{no_filter}",
            features.SANDBOX_REMEDY,
        )

    def attach(self, sock: socket.socket, diversion: Diversion) -> Attachment:
        """Steer if it can be done, filter if it cannot, else demultiplex in line."""
        if self._in_line:
            return InLineAttachment("chosen by name")
        if sys.platform != "linux":
            return InLineAttachment("steering is a feature of Linux")
        return _LinuxAttachment(sock, diversion)

    def open_ipsec(
        self,
        *,
        device: DeviceChoice = "auto",
        netns: NetworkNamespace | None = None,
        lockdown: bool = False,
        follow_mapping: bool = False,
    ) -> UserspaceIPsec:
        """Open the ESP of this process; see `natcompat.esp.userspace.open_process_ipsec`."""
        from natcompat.esp.userspace import open_process_ipsec

        return open_process_ipsec(
            device=device, netns=netns, lockdown=lockdown, follow_mapping=follow_mapping
        )


class _LinuxAttachment(InLineAttachment):
    """Steering, filter and UDP_GRO on one socket of Linux, as far as each can be had."""

    def __init__(self, sock: socket.socket, diversion: Diversion) -> None:
        from natcompat.backends.linux_sockets import features, filters, steering

        super().__init__("")
        self._steering: steering.Steering | None = None
        self._filtered = False
        self.sensitive = frozenset(
            {
                "bind",
                "connect",
                (socket.SOL_SOCKET, socket.SO_REUSEPORT),
                (socket.SOL_SOCKET, steering.SO_BINDTODEVICE),
                (socket.SOL_SOCKET, steering.SO_MARK),
                *features.FILTER_OPTIONS,
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
            self.hidden |= features.switch_gro_off(sock)
            undo.pop_all()

    def _steer(self, sock: socket.socket, diversion: Diversion, undo: contextlib.ExitStack) -> str:
        from natcompat.backends.linux_sockets.features import steering_refused
        from natcompat.backends.linux_sockets.steering import Steering, refusal

        reason = refusal(sock) or steering_refused()
        if reason:
            return reason
        try:
            self._steering = Steering(sock, diversion, getattr(diversion.consumer, "engines", 1))
        except OSError as error:
            hint = ", as when the user id has changed since the socket was made"
            hint = hint if error.errno == errno.EADDRINUSE else ""
            return f"joining the application's port was refused{hint}: {error}"
        undo.callback(self._steering.detach, sock)
        self.mode, self.duties = "steering", _STEERING
        self.hidden[socket.SOL_SOCKET, socket.SO_REUSEPORT] = 0
        return ""

    def _filter(self, sock: socket.socket, diversion: Diversion, undo: contextlib.ExitStack) -> None:
        """Put a filter on: against what may only be ESP for nobody, or at least against runts."""
        from natcompat.backends.linux_sockets import filters
        from natcompat.backends.linux_sockets.features import put_filter, take_filter_off

        strict = self._steering is not None or not diversion.wanted
        refused = put_filter(sock, filters.IKE_ONLY if strict else filters.NO_RUNTS)
        if refused:
            self.reason = self.reason or (refused if self._steering is None else "")
            return
        self._filtered = True
        undo.callback(take_filter_off, sock)
        if self._steering is None:
            self.duties = _FILTER if strict else _NO_RUNTS
            if strict and self.mode == "in line":
                self.mode = "filter"

    @property
    def esp_socket(self) -> socket.socket | None:
        """The engine's socket, if there is one."""
        return self._steering.esp_socket if self._steering is not None else None

    def counters(self) -> Mapping[str, int]:
        """Return the drops of the engine's queues."""
        if self._steering is None:
            return {}
        self._steering.count()
        return {"engine_drops": self._steering.drops()}

    def detach(self, sock: socket.socket) -> None:
        """Leave the group, take the filter off, give UDP_GRO back."""
        from natcompat.backends.linux_sockets.features import restore_gro, take_filter_off

        with contextlib.ExitStack() as each:  # all of them, whatever one of them raises
            each.callback(restore_gro, sock, self.hidden)
            if self._filtered:
                each.callback(take_filter_off, sock)
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
