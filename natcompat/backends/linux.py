"""Linux: UDP_ENCAP_ESPINUDP gives ESP to XFRM; a socket filter drops everything else that is not IKE."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Mapping
from typing import TYPE_CHECKING, Final

from natcompat.backends.base import Attachment, Viability
from natcompat.backends.diversion import Diversion
from natcompat.backends.linux_sockets import features, filters
from natcompat.backends.linux_sockets.options import UDP_ENCAP
from natcompat.contract import TABLE, Duty, Performer, Verdict
from natcompat.errors import NatCompatError
from natcompat.kernel.xfrm.bypass import bypass, undo_bypass

if TYPE_CHECKING:
    from natcompat.ipsec import IPsec

UDP_ENCAP_ESPINUDP: Final = 2  # include/uapi/linux/udp.h
MAPPING_VARIABLE: Final = "NATCOMPAT_IPSEC"
_MAPPINGS: Final = ("auto", "xfrm", "pfkey")

_UNFILTERED: Final[Mapping[Duty, Performer]] = {
    Duty.DROP_RUNTS: Performer.PROCESS,
    Duty.DIVERT_ESP: Performer.KERNEL,
    Duty.STRIP_MARKER: Performer.PROCESS,
    Duty.INSERT_MARKER: Performer.PROCESS,
}
_RESIDUE: Final = frozenset(row.name for row in TABLE if row.verdict is Verdict.ESP and len(row.payload) <= 8)
"""The kernel does not take payloads up to the size of struct ip_esp_hdr for ESP (__xfrm4_udp_encap_rcv())."""
_FILTERED: Final[Mapping[Duty, Performer]] = {**_UNFILTERED, Duty.DROP_RUNTS: Performer.FILTER}

_SENSITIVE: Final[frozenset[str | tuple[int, int]]] = frozenset(
    {*features.FILTER_OPTIONS, (socket.IPPROTO_UDP, UDP_ENCAP)}
)


class LinuxBackend:
    """ESP in the kernel: this process or another installs the SAs by XFRM.

    The kernel does not report ICMP errors on a socket with UDP_ENCAP, neither as ECONNREFUSED nor in the
    error queue, because it treats the socket as a tunnel's (``__udp4_lib_err()``, since Linux 5.0).
    """

    name = "linux"
    hands_over_esp = False

    def viability(self) -> Viability:
        """Ask XFRM by a dry run; without CAP_NET_ADMIN, send ESP over loopback."""
        return _viability()

    def attach(self, sock: socket.socket, diversion: Diversion) -> Attachment:
        """Set UDP_ENCAP, attach the filter, and exempt the socket from IPsec policies where permitted."""
        return _Attachment(sock)

    def open_ipsec(self) -> IPsec:
        """Open the kernel's SAD and SPD by XFRM, or by PF_KEY if NATCOMPAT_IPSEC is ``pfkey``.

        The values of NATCOMPAT_IPSEC are ``auto``, ``xfrm`` and ``pfkey``; any other one is EINVAL. PF_KEY
        (af_key) has fewer features (see `natcompat.kernel.pfkey.dialects`), and shows keys to every PF_KEY
        socket.
        """
        if requested_mapping() == "pfkey":
            from natcompat.kernel.pfkey import open_ipsec

            return open_ipsec("linux")
        from natcompat.kernel.xfrm.kernel import XfrmIPsec

        return XfrmIPsec()


def requested_mapping() -> str:
    """Return the value of NATCOMPAT_IPSEC. Raises EINVAL if it is unknown."""
    mapping = os.environ.get(MAPPING_VARIABLE) or _MAPPINGS[0]
    if mapping not in _MAPPINGS:
        raise NatCompatError(
            errno.EINVAL,
            f"there is no mapping of IPsec called {mapping!r} ({MAPPING_VARIABLE})",
            f"Choose among {', '.join(_MAPPINGS)}",
        )
    return mapping


class _Attachment:
    def __init__(self, sock: socket.socket) -> None:
        self.sensitive = _SENSITIVE
        self._filtered = False
        with contextlib.ExitStack() as undo:
            try:
                # restored by detach: the application may have set UDP_ENCAP itself
                self._encapsulation = sock.getsockopt(socket.IPPROTO_UDP, UDP_ENCAP)
                sock.setsockopt(socket.IPPROTO_UDP, UDP_ENCAP, UDP_ENCAP_ESPINUDP)
            except OSError as error:
                raise NatCompatError(
                    error.errno or 0,
                    f"UDP_ENCAP was refused: {error.strerror}",
                    "Run a kernel with CONFIG_XFRM, or choose NATCOMPAT_BACKEND=userspace",
                ) from error
            undo.callback(sock.setsockopt, socket.IPPROTO_UDP, UDP_ENCAP, self._encapsulation)
            self._bypassed = _bypass(sock)
            if self._bypassed:
                undo.callback(undo_bypass, sock)
            self.reason = features.put_filter(sock, filters.IKE_OUTSIDE_ESP)
            if not self.reason:
                self._filtered = True
                undo.callback(features.take_filter_off, sock)
            # kernels whose GRO does not know ESP would coalesce IKE with ESP
            self.hidden = features.switch_gro_off(sock)
            self.mode = "filter" if self._filtered else "in line"
            self.duties = _FILTERED if self._filtered else _UNFILTERED
            self.leaks = frozenset() if self._filtered else _RESIDUE
            undo.pop_all()

    def counters(self) -> Mapping[str, int]:
        """Return whether IPsec policies exempt the socket; the kernel counts ESP by SA."""
        return {"bypassed": int(self._bypassed)}

    def detach(self, sock: socket.socket) -> None:
        """Restore UDP_ENCAP and UDP_GRO, and detach the filter."""
        with contextlib.ExitStack() as steps:
            steps.callback(features.restore_gro, sock, self.hidden)
            if self._filtered:
                steps.callback(features.take_filter_off, sock)
            if self._bypassed:
                steps.callback(undo_bypass, sock)
            steps.callback(sock.setsockopt, socket.IPPROTO_UDP, UDP_ENCAP, self._encapsulation)

    def release(self) -> None:
        """Do nothing: the attachment has no resources of its own."""

    def adopt(self) -> None:
        """Do nothing: the kernel goes on in the child."""


def _bypass(sock: socket.socket) -> bool:
    try:
        bypass(sock)
    except NatCompatError:  # no privilege; without policies that cover the socket it is not needed
        return False
    return True


def _viability() -> Viability:
    from natcompat.kernel.xfrm.esp_support import EspSupport
    from natcompat.kernel.xfrm.probe import probe_esp, probe_esp_unprivileged

    no_filter = features.filter_refused()
    duties = _UNFILTERED if no_filter else _FILTERED
    found = probe_esp()
    weaker = f" No filter: {no_filter}." if no_filter else ""
    if found.support is not EspSupport.NO_PRIVILEGE:
        return Viability("linux", bool(found), duties, found.reason + weaker, found.remedy)
    unprivileged = probe_esp_unprivileged()
    if unprivileged.support is EspSupport.NO_ESP:
        return Viability(
            "linux", False, duties, unprivileged.reason + weaker, unprivileged.remedy, automatic=False
        )
    return Viability(
        "linux",
        True,
        duties,
        f"{found.reason} {unprivileged.reason}{weaker}",
        "Request it by name if another process installs the SAs, or grant CAP_NET_ADMIN.",
        automatic=False,
    )
