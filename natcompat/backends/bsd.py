"""FreeBSD, NetBSD, OpenBSD and macOS: the kernel takes ESP, the process performs the other duties in line.

FreeBSD and NetBSD have an option per socket; OpenBSD and macOS have one port for the whole system, set by
sysctl. Sources: udpencap.c and udp_usrreq.c of FreeBSD, udp_usrreq.c of NetBSD, OpenBSD and XNU, ipsec.c of
XNU. Only models of these kernels have been run (docs/backends.md).
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
from natcompat.backends.bsd_kernels import INET, INET6, KERNEL_SUPPORT, KernelSupport
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
    """The backend of one of the four kernels; `support` describes the kernel."""

    hands_over_esp = False

    def __init__(self, *, name: str) -> None:
        self.name: str = name
        self.support: KernelSupport = KERNEL_SUPPORT[name]

    @property
    def port(self) -> int | None:
        """The kernel's ESP port for the whole system, 0 while free; None where sockets have the option."""
        if self.support.port is None:
            return None
        return self.support.port.read() or 0

    def viability(self) -> Viability:
        """Try PF_KEY, and the option (over loopback) or the sysctl."""
        support = self.support
        duties = _duties(support, support.duties)
        can_install, no_ipsec = _try_pf_key(self.name)
        if no_ipsec:
            return Viability(
                self.name, False, duties, f"the kernel has no IPsec: {no_ipsec}", support.without_ipsec
            )
        try:
            refusal = _try_option(support) if support.option else _try_port(support)
        except NatCompatError as error:
            reason = error.strerror or ""
            return Viability(
                self.name, False, duties, reason, error.remedy, code=error.errno or errno.ENOTSUP
            )
        except OSError as error:
            return Viability(
                self.name,
                False,
                duties,
                f"it could not be tried: {error}",
                "Raise the limit that the error names, and try again",
            )
        if refusal:
            return Viability(self.name, False, duties, refusal, support.without_ipsec)
        reason = "; ".join(_limits(support))
        if can_install:
            return Viability(self.name, True, duties, reason)
        return Viability(
            self.name,
            True,
            duties,
            f"{reason}; this process is not permitted to install SAs",
            "Request it by name if another process installs the SAs, or run as root.",
            automatic=False,
        )

    def attach(self, sock: socket.socket, diversion: Diversion) -> Attachment:
        """Make the kernel take ESP, and exempt the socket from IPsec policies where permitted."""
        if self.support.option:
            return _OptionAttachment(self.support, sock)
        return _PortAttachment(self.support, sock)

    def open_ipsec(self) -> IPsec:
        """Open the kernel's SAD and SPD over PF_KEY."""
        from natcompat.kernel.pfkey import open_ipsec

        return open_ipsec(self.name)


class _Attachment:
    """The part that both kinds of kernel share: the exemption from IPsec policies."""

    sensitive: frozenset[str | tuple[int, int]] = frozenset()

    def __init__(self, support: KernelSupport, sock: socket.socket) -> None:
        self._support = support
        self._served = sock.family in support.families
        self.hidden: dict[tuple[int, int], int] = {}
        self.leaks: frozenset[str] = support.leaks if self._served else frozenset()
        self._exemption = _exempt(support, sock)

    @property
    def mode(self) -> str:
        """``kernel`` if the kernel delivers nothing but IKE, else ``in line``."""
        return "in line" if Performer.PROCESS in self._performers_of_drops() else "kernel"

    @property
    def reason(self) -> str:
        """Why the mode is ``in line``."""
        if not self._served:
            return f"{self._support.system} takes ESP over IPv4 alone"
        return f"the kernel delivers {self._support.comes}" if self._support.comes else ""

    @property
    def duties(self) -> Mapping[Duty, Performer]:
        """Who performs each duty now."""
        return _duties(self._support, self._support.duties if self._served else frozenset())

    def _performers_of_drops(self) -> list[Performer]:
        """Return who keeps runts and who keeps ESP from the application."""
        duties = self.duties
        return [duties[Duty.DROP_RUNTS], duties[Duty.DIVERT_ESP]]

    def counters(self) -> Mapping[str, int]:
        """Return whether IPsec policies exempt the socket; the kernel counts ESP by SA."""
        return {"bypassed": int(self._exemption is not None)}

    def _end_exemption(self, sock: socket.socket) -> None:
        for level, option, value in self._exemption or ():
            with contextlib.suppress(OSError):  # the privilege is gone
                sock.setsockopt(level, option, value)

    def adopt(self) -> None:
        """Do nothing: the kernel goes on in the child."""


class _OptionAttachment(_Attachment):
    """FreeBSD and NetBSD: UDP_ENCAP on this socket."""

    def __init__(self, support: KernelSupport, sock: socket.socket) -> None:
        self._option = (socket.IPPROTO_UDP, support.option)
        self.sensitive = frozenset({self._option})
        with contextlib.ExitStack() as undo:
            try:
                # restored by detach, where the option is readable: the application may have set it
                self._before = sock.getsockopt(*self._option) if support.readable else 0
                sock.setsockopt(*self._option, support.value)
            except OSError as error:
                raise NatCompatError(
                    error.errno or 0, f"UDP_ENCAP was refused: {error.strerror}", support.without_ipsec
                ) from error
            undo.callback(sock.setsockopt, socket.IPPROTO_UDP, support.option, self._before)
            super().__init__(support, sock)
            undo.pop_all()

    def detach(self, sock: socket.socket) -> None:
        """Restore UDP_ENCAP."""
        self._end_exemption(sock)
        sock.setsockopt(*self._option, self._before)

    def release(self) -> None:
        """Do nothing: the attachment has no resources of its own."""


class _PortAttachment(_Attachment):
    """OpenBSD and macOS: the kernel takes ESP of this socket's port, until the sysctl changes."""

    def __init__(self, support: KernelSupport, sock: socket.socket) -> None:
        self._claimed: list[Sysctl] = []
        self._port = sock.getsockname()[1]
        with contextlib.ExitStack() as undo:
            undo.callback(self.release)
            if self._port:
                self._claim(support, self._port)
            else:
                self.sensitive = frozenset({"bind", "connect"})
            super().__init__(support, sock)
            undo.pop_all()

    @property
    def mode(self) -> str:
        """Like `_Attachment.mode`; it changes with the sysctls. ``unbound`` until the socket is bound."""
        return super().mode if self._port else "unbound"

    @property
    def reason(self) -> str:
        """Why the kernel does not perform all duties."""
        return self._asleep() or super().reason

    @property
    def duties(self) -> Mapping[Duty, Performer]:
        """Who performs each duty now; the process all of them while the kernel takes nothing."""
        return _IN_PROCESS if self._asleep() else super().duties

    def _asleep(self) -> str:
        """Return why the kernel takes no ESP from this socket now; empty if it does."""
        support = self._support
        assert support.port is not None, "a kernel has an option or a port"  # noqa: S101
        if not self._port:
            return "the socket is not bound yet"
        port = support.port.read()
        if port != self._port:
            return f"{support.port.name} is {port}, and this is port {self._port}"
        if support.enabled is not None and not support.enabled.read():
            return f"{support.enabled.name} is 0"
        if support.asleep is not None and support.asleep.read():
            return "the kernel takes ESP once there is an SA or a policy"
        return ""

    def _claim(self, support: KernelSupport, port: int) -> None:
        assert support.port is not None, "a kernel has an option or a port"  # noqa: S101
        if support.enabled is not None and sysctl.claim(support.enabled, 1, free=0, remedy="Run as root"):
            self._claimed.append(support.enabled)
        if support.port_is_ours:
            if sysctl.claim(support.port, port, free=0, remedy="Run as root"):
                self._claimed.append(support.port)
            return
        only = support.port.read()
        if only != port:
            raise NatCompatError(
                errno.EADDRNOTAVAIL,
                f"{support.system} takes ESP of UDP port {only} alone ({support.port.name}), not of {port}",
                f"Bind port {only}, or choose NATCOMPAT_BACKEND=userspace",
            )

    def detach(self, sock: socket.socket) -> None:
        """Release the sysctls that this attachment claimed."""
        self._end_exemption(sock)
        self.release()

    def release(self) -> None:
        """Release the sysctls that this attachment claimed."""
        while self._claimed:
            sysctl.release(self._claimed.pop())


def _duties(support: KernelSupport, kernel: frozenset[Duty]) -> Mapping[Duty, Performer]:
    return {duty: Performer.KERNEL if duty in kernel else Performer.PROCESS for duty in Duty}


def _limits(support: KernelSupport) -> Iterator[str]:
    """Yield the limits of this kernel, each in a few words."""
    if support.port is not None:
        which = "one UDP port" if support.port_is_ours else f"UDP port {support.port.read()}"
        yield f"ESP of {which} goes to the kernel, on every socket of the system"
    for setting in (support.port if support.port_is_ours else None, support.enabled):
        if setting is not None and not setting.read():
            yield f"endpoints set {setting.name}, which needs root"
    if support.asleep is not None:
        yield "the kernel takes ESP once there is an SA or a policy"
    if support.families != {INET, INET6}:
        yield "the kernel takes ESP over IPv4 alone"
    if support.comes:
        yield f"in line, since the kernel delivers {support.comes}"


def _try_option(support: KernelSupport) -> str:
    """Set the option on a private socket, send it ESP; return why ESP still arrives, or ''."""
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer,
    ):
        sock.settimeout(_PATIENCE)
        sock.setsockopt(socket.IPPROTO_UDP, support.option, support.value)
        sock.bind(("127.0.0.1", 0))
        peer.connect(sock.getsockname())
        for payload in (b"\xff" * 16, NON_ESP_MARKER + b"IKE"):
            peer.send(payload)
        came = sock.recv(64)
    return (
        ""
        if came.startswith(NON_ESP_MARKER)
        else "the kernel accepted UDP_ENCAP, and delivers ESP all the same"
    )


def _try_port(support: KernelSupport) -> str:
    """Read the sysctls; return why they cannot serve, or ''.

    Raises `NatCompatError`: EPERM if one has to be set and this process is not root.
    """
    assert support.port is not None, "a kernel has an option or a port"  # noqa: S101
    port = support.port.read()
    if port is None:
        return f"the kernel has no {support.port.name}"
    needed = support.port if support.port_is_ours and not port else support.enabled
    if needed is not None and not needed.read() and os.geteuid() != 0:
        raise NatCompatError(
            errno.EPERM,
            f"{needed.name} is 0, and only root may set it, since it holds for the whole system",
            "Run as root",
        )
    return ""


def _try_pf_key(name: str) -> tuple[bool, str]:
    """Return (whether this process may install SAs, why the kernel has no IPsec or '')."""
    from natcompat.kernel.pfkey import numbers

    try:
        socket.socket(_dialect(name).family, socket.SOCK_RAW, numbers.PF_KEY_V2).close()
    except OSError as error:
        return False, "" if error.errno in _PERMISSION else str(error)
    return True, ""


def _dialect(name: str) -> Dialect:
    from natcompat.kernel.pfkey.dialects import DIALECTS

    return DIALECTS[name]


def _exempt(support: KernelSupport, sock: socket.socket) -> list[tuple[int, int, bytes]] | None:
    """Exempt `sock` from IPsec policies; return the options that undo it, None without the privilege."""
    from natcompat.kernel.pfkey import bypass

    dialect = _dialect(support.name)
    try:
        before = bypass.ordinary(dialect, sock)
        bypass.bypass(dialect, sock)
    except OSError:
        return None
    return before
