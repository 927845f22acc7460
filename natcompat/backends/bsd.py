"""FreeBSD, NetBSD, OpenBSD and macOS: the kernel takes ESP, the process does the rest in line.

`HALVES` is what the four kernels do on a UDP socket, as data. FreeBSD and NetBSD have an option for one
socket; OpenBSD and macOS have one port for the whole system, by sysctl. Sources: udpencap.c and
udp_usrreq.c of FreeBSD, udp_usrreq.c of NetBSD, OpenBSD and XNU, ipsec.c of XNU. Only models of these kernels
have been run (docs/backends.md).
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final

from natcompat.backends import sysctl
from natcompat.backends.base import Attachment, Viability
from natcompat.backends.bsd_kernels import HALVES, INET, INET6, SocketHalf
from natcompat.backends.diversion import Diversion
from natcompat.backends.sysctl import Sysctl
from natcompat.contract import NON_ESP_MARKER, Duty, Performer
from natcompat.errors import NatCompatError

if TYPE_CHECKING:
    from natcompat.ipsec import IPsec
    from natcompat.kernel.pfkey.dialects import Dialect

_IN_PROCESS: Final[Mapping[Duty, Performer]] = dict.fromkeys(Duty, Performer.PROCESS)
_PERMISSION: Final = (errno.EPERM, errno.EACCES)
_PATIENCE: Final = 1.0  # seconds for a datagram over loopback


class BsdBackend:
    """One of the four; `half` is the kernel's part."""

    hands_over_esp = False

    def __init__(self, *, name: str) -> None:
        self.name: str = name
        self.half: SocketHalf = HALVES[name]

    @property
    def port(self) -> int | None:
        """The port of the whole system; None where each socket has the option, 0 while it is free."""
        if self.half.port is None:
            return None
        return self.half.port.read() or 0

    def viability(self) -> Viability:
        """Ask for PF_KEY, and for the option or the sysctl; loopback tells whether an option takes ESP."""
        half = self.half
        duties = _duties(half, half.duties)
        can_install, no_ipsec = _asks_pf_key(self.name)
        if no_ipsec:
            return Viability(
                self.name, False, duties, f"the kernel has no IPsec: {no_ipsec}", half.without_ipsec
            )
        try:
            refusal = _try_option(half) if half.option else _try_port(half)
        except NatCompatError as error:
            reason = error.strerror or ""
            return Viability(
                self.name, False, duties, reason, error.remedy, code=error.errno or errno.ENOTSUP
            )
        except OSError as error:
            return Viability(self.name, False, duties, f"it could not be tried: {error}", "Try again")
        if refusal:
            return Viability(self.name, False, duties, refusal, half.without_ipsec)
        reason = "; ".join(_limits(half))
        if can_install:
            return Viability(self.name, True, duties, reason)
        return Viability(
            self.name,
            True,
            duties,
            f"{reason}; this process may install no SA",
            "Ask for it by name where another process installs the SAs, or run as root.",
            automatic=False,
        )

    def attach(self, sock: socket.socket, diversion: Diversion) -> Attachment:
        """Make the kernel take ESP, and exempt the socket from IPsec policies if that may be done."""
        if self.half.option:
            return _OptionAttachment(self.half, sock)
        return _PortAttachment(self.half, sock)

    def open_ipsec(self) -> IPsec:
        """Open the kernel's SAD and SPD over PF_KEY."""
        from natcompat.kernel.pfkey import open_ipsec

        return open_ipsec(self.name)


class _Attachment:
    """What both ways have in common: the exemption from policies."""

    sensitive: frozenset[str | tuple[int, int]] = frozenset()

    def __init__(self, half: SocketHalf, sock: socket.socket) -> None:
        self._half = half
        self._served = sock.family in half.families
        self.hidden: dict[tuple[int, int], int] = {}
        self.leaks: frozenset[str] = half.leaks if self._served else frozenset()
        self._exemption = _exempt(half, sock)

    @property
    def mode(self) -> str:
        """In line, unless the kernel delivers nothing but IKE."""
        return "in line" if Performer.PROCESS in self._keepers() else "kernel"

    @property
    def reason(self) -> str:
        """Why it is in line."""
        if not self._served:
            return f"{self._half.system} takes ESP over IPv4 alone"
        return f"the kernel delivers {self._half.comes}" if self._half.comes else ""

    @property
    def duties(self) -> Mapping[Duty, Performer]:
        """Who does what now."""
        return _duties(self._half, self._half.duties if self._served else frozenset())

    def _keepers(self) -> list[Performer]:
        """Return who keeps runts and ESP from the application."""
        duties = self.duties
        return [duties[Duty.DROP_RUNTS], duties[Duty.DIVERT_ESP]]

    def counters(self) -> Mapping[str, int]:
        """Return whether policies leave the socket alone; the kernel counts ESP by SA."""
        return {"bypassed": int(self._exemption is not None)}

    def _end_exemption(self, sock: socket.socket) -> None:
        for level, option, value in self._exemption or ():
            with contextlib.suppress(OSError):  # the privilege is gone
                sock.setsockopt(level, option, value)

    def adopt(self) -> None:
        """There is nothing to carry on: the kernel does it."""


class _OptionAttachment(_Attachment):
    """FreeBSD, NetBSD: UDP_ENCAP on this socket."""

    def __init__(self, half: SocketHalf, sock: socket.socket) -> None:
        self._option = (socket.IPPROTO_UDP, half.option)
        self.sensitive = frozenset({self._option})
        with contextlib.ExitStack() as undo:
            try:
                # an application that set it itself shall find it again, where it can be asked
                self._before = sock.getsockopt(*self._option) if half.readable else 0
                sock.setsockopt(*self._option, half.value)
            except OSError as error:
                raise NatCompatError(
                    error.errno or 0, f"UDP_ENCAP was refused: {error.strerror}", half.without_ipsec
                ) from error
            undo.callback(sock.setsockopt, socket.IPPROTO_UDP, half.option, self._before)
            super().__init__(half, sock)
            undo.pop_all()

    def detach(self, sock: socket.socket) -> None:
        """Give UDP_ENCAP back."""
        self._end_exemption(sock)
        sock.setsockopt(*self._option, self._before)

    def release(self) -> None:
        """There is nothing besides the socket."""


class _PortAttachment(_Attachment):
    """OpenBSD, macOS: the port of this socket is the one of the system, as long as nobody changes that."""

    def __init__(self, half: SocketHalf, sock: socket.socket) -> None:
        self._claimed: list[Sysctl] = []
        self._port = sock.getsockname()[1]
        with contextlib.ExitStack() as undo:
            undo.callback(self.release)
            if self._port:
                self._claim(half, self._port)
            else:
                self.sensitive = frozenset({"bind", "connect"})
            super().__init__(half, sock)
            undo.pop_all()

    @property
    def mode(self) -> str:
        """It may change with the system's settings."""
        return super().mode if self._port else "unbound"

    @property
    def reason(self) -> str:
        """Why it is not the kernel alone."""
        return self._asleep() or super().reason

    @property
    def duties(self) -> Mapping[Duty, Performer]:
        """Who does what now: a kernel that sleeps takes nothing."""
        return _IN_PROCESS if self._asleep() else super().duties

    def _asleep(self) -> str:
        """Return why the kernel takes nothing from this socket now."""
        half = self._half
        assert half.port is not None, "a kernel has an option or a port"  # noqa: S101
        if not self._port:
            return "the socket is not bound yet"
        port = half.port.read()
        if port != self._port:
            return f"{half.port.name} is {port}, and this is port {self._port}"
        if half.enabled is not None and not half.enabled.read():
            return f"{half.enabled.name} is 0"
        if half.asleep is not None and half.asleep.read():
            return "the kernel takes ESP once there is an SA or a policy"
        return ""

    def _claim(self, half: SocketHalf, port: int) -> None:
        assert half.port is not None, "a kernel has an option or a port"  # noqa: S101
        if half.enabled is not None and sysctl.claim(half.enabled, 1, free=0, remedy="Run as root"):
            self._claimed.append(half.enabled)
        if half.port_is_ours:
            if sysctl.claim(half.port, port, free=0, remedy="Run as root"):
                self._claimed.append(half.port)
            return
        only = half.port.read()
        if only != port:
            raise NatCompatError(
                errno.EADDRNOTAVAIL,
                f"{half.system} takes ESP of UDP port {only} alone ({half.port.name}), and this is {port}",
                f"Bind port {only}, or choose NATCOMPAT_BACKEND=userspace",
            )

    def detach(self, sock: socket.socket) -> None:
        """Give the port of the system back."""
        self._end_exemption(sock)
        self.release()

    def release(self) -> None:
        """Give the port of the system back."""
        while self._claimed:
            sysctl.release(self._claimed.pop())


def _duties(half: SocketHalf, kernel: frozenset[Duty]) -> Mapping[Duty, Performer]:
    return {duty: Performer.KERNEL if duty in kernel else Performer.PROCESS for duty in Duty}


def _limits(half: SocketHalf) -> Iterator[str]:
    """Yield what has to be known of this kernel, each in a few words."""
    if half.port is not None:
        which = "one UDP port" if half.port_is_ours else f"UDP port {half.port.read()}"
        yield f"ESP of {which} goes to the kernel, on every socket of the system"
    for setting in (half.port if half.port_is_ours else None, half.enabled):
        if setting is not None and not setting.read():
            yield f"endpoints set {setting.name} meanwhile, which takes root"
    if half.asleep is not None:
        yield "it takes ESP once there is an SA or a policy"
    if half.families != {INET, INET6}:
        yield "the kernel takes ESP over IPv4 alone"
    if half.comes:
        yield f"in line, since the kernel delivers {half.comes}"


def _try_option(half: SocketHalf) -> str:
    """Set the option on a socket over loopback, and see ESP vanish; return why that is not so."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer,
    ):
        sock.settimeout(_PATIENCE)
        sock.setsockopt(socket.IPPROTO_UDP, half.option, half.value)
        sock.bind(("127.0.0.1", 0))
        peer.connect(sock.getsockname())
        for payload in (b"\xff" * 16, NON_ESP_MARKER + b"IKE"):
            peer.send(payload)
        came = sock.recv(64)
    return (
        "" if came.startswith(NON_ESP_MARKER) else "the kernel took UDP_ENCAP, and delivers ESP all the same"
    )


def _try_port(half: SocketHalf) -> str:
    """Look at the sysctls; raise `NatCompatError` (EPERM) where this process may not set what it needs."""
    assert half.port is not None, "a kernel has an option or a port"  # noqa: S101
    port = half.port.read()
    if port is None:
        return f"the kernel has no {half.port.name}"
    needed = half.port if half.port_is_ours and not port else half.enabled
    if needed is not None and not needed.read() and os.geteuid() != 0:
        raise NatCompatError(
            errno.EPERM,
            f"{needed.name} is 0, and setting it takes root: it holds for the whole system",
            "Run as root",
        )
    return ""


def _asks_pf_key(name: str) -> tuple[bool, str]:
    """Return whether this process may install SAs, and why the kernel has none at all."""
    from natcompat.kernel.pfkey import numbers

    try:
        socket.socket(_dialect(name).family, socket.SOCK_RAW, numbers.PF_KEY_V2).close()
    except OSError as error:
        return False, "" if error.errno in _PERMISSION else str(error)
    return True, ""


def _dialect(name: str) -> Dialect:
    from natcompat.kernel.pfkey.dialects import DIALECTS

    return DIALECTS[name]


def _exempt(half: SocketHalf, sock: socket.socket) -> list[tuple[int, int, bytes]] | None:
    """Let IPsec policies leave `sock` alone; return what undoes it, None where this process may not."""
    from natcompat.kernel.pfkey import bypass

    dialect = _dialect(half.name)
    try:
        before = bypass.ordinary(dialect, sock)
        bypass.bypass(dialect, sock)
    except OSError:
        return None
    return before
