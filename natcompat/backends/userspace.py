"""Demultiplexing and ESP in this process: on every system, without privilege, with help of Linux kernels."""

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
    """Demultiplexing in line: the process classifies datagrams as it receives them."""

    def __init__(self, reason: str, mode: str = "in line") -> None:
        self.mode = mode
        self.reason = reason
        self.duties: Mapping[Duty, Performer] = _PROCESS
        self.sensitive: frozenset[str | tuple[int, int]] = frozenset()
        self.hidden: dict[tuple[int, int], int] = {}

    def counters(self) -> Mapping[str, int]:
        """Return nothing: the process counts everything."""
        return {}

    def detach(self, sock: socket.socket) -> None:
        """Do nothing: `attach` changed nothing."""

    def release(self) -> None:
        """Do nothing: the attachment has no resources."""

    def adopt(self) -> None:
        """Do nothing: there is no thread."""


class UserspaceBackend:
    """Demultiplexing in this process, and ESP in this process after `open_ipsec`.

    On Linux, ESP is steered to a socket of natcompat. With `in_line`, and wherever steering is impossible,
    the process classifies the datagrams that the application's receive calls return.
    """

    hands_over_esp = True
    own_esp = PROCESS_ESP

    def __init__(self, *, in_line: bool = False) -> None:
        self.name = "userspace:in-line" if in_line else "userspace"
        self._in_line = in_line

    def viability(self) -> Viability:
        """Return the duties that the kernel will perform; the process performs the others on every system."""
        if self._in_line:
            return Viability(
                self.name,
                True,
                _PROCESS,
                "requested by name: the kernel performs nothing",
                automatic=False,
            )
        if sys.platform != "linux":
            return Viability(self.name, True, _PROCESS, "demultiplexing in line: only Linux has steering")
        from natcompat.backends.linux_sockets import features

        steering, filtering = features.steering_refused(), features.filter_refused()
        no_filter = f"; no filter: {filtering}" if filtering else ""
        if not steering:
            reason = f"the kernel steers ESP to a socket of natcompat{no_filter}"
            return Viability(self.name, True, _STEERING, reason, features.SANDBOX_REMEDY if filtering else "")
        return Viability(
            self.name,
            True,
            _PROCESS if filtering else _NO_RUNTS,
            f"demultiplexing in line: {steering}{no_filter}",
            features.SANDBOX_REMEDY,
        )

    def attach(self, sock: socket.socket, diversion: Diversion) -> Attachment:
        """Steer where possible, else filter, else demultiplex in line."""
        if self._in_line:
            return InLineAttachment("requested by name")
        if sys.platform != "linux":
            return InLineAttachment("only Linux has steering")
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
    """Steering, filter and UDP_GRO of one socket on Linux, as far as each is possible."""

    def __init__(self, sock: socket.socket, diversion: Diversion) -> None:
        from natcompat.backends.linux_sockets import features, filters, options, steering

        super().__init__("")
        self._steering: steering.Steering | None = None
        self._filtered = False
        self.sensitive = frozenset(
            {
                "bind",
                "connect",
                (socket.SOL_SOCKET, socket.SO_REUSEPORT),
                (socket.SOL_SOCKET, options.SO_BINDTODEVICE),
                (socket.SOL_SOCKET, options.SO_MARK),
                *features.FILTER_OPTIONS,
                (socket.SOL_SOCKET, filters.SO_ATTACH_REUSEPORT_CBPF),
                (socket.SOL_SOCKET, filters.SO_ATTACH_REUSEPORT_EBPF),
                (socket.SOL_SOCKET, filters.SO_DETACH_REUSEPORT_BPF),
                (socket.IPPROTO_IP, options.IP_RECVERR),
                (socket.IPPROTO_IPV6, options.IPV6_RECVERR),
                (socket.IPPROTO_UDP, options.UDP_ENCAP),
                (socket.IPPROTO_IP, options.IP_TRANSPARENT),
                (socket.IPPROTO_IPV6, options.IPV6_TRANSPARENT),
            }
        )
        with contextlib.ExitStack() as undo:
            if not sock.getsockname()[1]:
                self.mode, self.reason = "unbound", "the socket is not bound yet"
            elif diversion.wanted:
                self.reason = self._steer(sock, diversion, undo)
            self._filter(sock, diversion, undo)
            # a filter would see several coalesced datagrams as one
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
        """Attach a filter that passes IKE alone; one that drops runts where ESP comes in line."""
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
    def hand_back(self) -> str:
        """How IKE that came to an ESP socket returns: ``loopback``, ``none``; empty without steering."""
        if self._steering is None:
            return ""
        return "none" if self._steering.no_hand_back else "loopback"

    @property
    def hand_back_reason(self) -> str:
        """Why `hand_back` is ``none``; else empty."""
        return self._steering.no_hand_back if self._steering is not None else ""

    @property
    def esp_socket(self) -> socket.socket | None:
        """The socket to which ESP is steered; None without steering."""
        return self._steering.esp_socket if self._steering is not None else None

    def counters(self) -> Mapping[str, int]:
        """Return the number of datagrams that the kernel dropped on the ESP sockets."""
        if self._steering is None:
            return {}
        self._steering.count()
        return {"engine_drops": self._steering.drops()}

    def detach(self, sock: socket.socket) -> None:
        """Leave the SO_REUSEPORT group, detach the filter, restore UDP_GRO."""
        from natcompat.backends.linux_sockets.features import restore_gro, take_filter_off

        with contextlib.ExitStack() as steps:  # runs every step, even if one raises
            steps.callback(restore_gro, sock, self.hidden)
            if self._filtered:
                steps.callback(take_filter_off, sock)
            if self._steering is not None:
                steps.callback(self._steering.detach, sock)

    def release(self) -> None:
        """Close the ESP sockets and end their thread."""
        if self._steering is not None:
            self._steering.release()

    def adopt(self) -> None:
        """Start the reading thread again in a forked child."""
        if self._steering is not None:
            self._steering.adopt()
