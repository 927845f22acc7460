"""Solaris and illumos: the kernel has the option and performs all four duties.

`attach` is a setsockopt and nothing else; the socket object keeps its class. Sources: udp(4P), ip(4P) and
ipsec(4P); udp.c, ip.c and sadb.c of illumos. Only models of this kernel have been run (docs/backends.md).
"""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Final

from natcompat.backends import sunos
from natcompat.backends.base import Attachment, Viability
from natcompat.backends.diversion import Diversion
from natcompat.contract import NAT_KEEPALIVE, Duty, Performer
from natcompat.errors import NatCompatError

if TYPE_CHECKING:
    from natcompat.ipsec import IPsec

DUTIES: Final[Mapping[Duty, Performer]] = dict.fromkeys(Duty, Performer.KERNEL)

PRIVILEGE_REMEDY: Final = (
    "Run as root, or grant PRIV_SYS_IP_CONFIG (usermod -K defaultpriv=basic,sys_ip_config USER; ppriv -s "
    "A+sys_ip_config PID); a zone has it if its ip-type is exclusive"
)
RAW_REMEDY: Final = (
    "Grant PRIV_NET_RAWACCESS (ppriv -s A+net_rawaccess PID), or let ESP send them: give the SA "
    "nat_keepalive (flag SADB_X_SAFLAGS_NATT_LOC)"
)
IPV6_REMEDY: Final = "Choose NATCOMPAT_BACKEND=userspace for this socket, or use AF_INET"

_REMEDIES: Final = {
    errno.EPERM: PRIVILEGE_REMEDY,
    errno.EACCES: PRIVILEGE_REMEDY,
    errno.EAFNOSUPPORT: IPV6_REMEDY,
}


class SolarisBackend:
    """All four duties in the kernel. Errors are the kernel's: EPERM first, then EAFNOSUPPORT."""

    name = "solaris"
    hands_over_esp = False
    families: tuple[int, ...] = (socket.AF_INET,)

    def viability(self) -> Viability:
        """Set the option on a private socket, and read it back."""
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
                _switch_on(sock)
        except NatCompatError as error:
            reason = error.strerror or ""
            return Viability(
                self.name, False, DUTIES, reason, error.remedy, code=error.errno or errno.ENOTSUP
            )
        except OSError as error:
            return Viability(
                self.name,
                False,
                DUTIES,
                f"a socket could not be made: {error}",
                "Raise the limit that the error names, and try again.",
            )
        if sunos.in_effect(sunos.NET_RAWACCESS) is False:
            return Viability(
                self.name,
                True,
                DUTIES,
                "the kernel performs all duties; without PRIV_NET_RAWACCESS only ESP sends NAT-keepalives",
                RAW_REMEDY,
            )
        return Viability(self.name, True, DUTIES, "the kernel performs all duties")

    def attach(self, sock: socket.socket, diversion: Diversion) -> Attachment:
        """Set the option, and exempt the socket from IPsec policies unless it is connected already."""
        return _Attachment(sock)

    def open_ipsec(self) -> IPsec:
        """Open the kernel's SAD over PF_KEY."""
        from natcompat.kernel.pfkey import open_ipsec

        return open_ipsec(self.name)


class _Attachment:
    mode = "kernel"
    reason = ""
    duties = DUTIES
    sensitive: frozenset[str | tuple[int, int]] = frozenset()

    def __init__(self, sock: socket.socket) -> None:
        self.hidden: dict[tuple[int, int], int] = {}
        _switch_on(sock)
        self._exempted = _exempt(sock)

    def is_on(self, sock: socket.socket) -> bool:
        """Read the option; reading needs no privilege."""
        try:
            return bool(sock.getsockopt(socket.IPPROTO_UDP, sunos.numbers().udp_nat_t_endpoint))
        except OSError:
            return False

    def counters(self) -> Mapping[str, int]:
        """Return whether IPsec policies exempt the socket, and the kernel's statistics."""
        return {"bypassed": int(self._exempted), **sunos.statistics()}

    def detach(self, sock: socket.socket) -> None:
        """Clear the option, and end the exemption unless a connect() has made it final."""
        try:
            sock.setsockopt(socket.IPPROTO_UDP, sunos.numbers().udp_nat_t_endpoint, 0)
        except OSError as error:
            raise _refused(error) from error
        if self._exempted:
            with contextlib.suppress(OSError):  # EINVAL once the socket is connected
                sock.setsockopt(*_security_option(sock), sunos.security_request(0))

    def release(self) -> None:
        """Do nothing: the attachment has no resources of its own."""

    def adopt(self) -> None:
        """Do nothing: the kernel goes on in the child."""

    def send_keepalive(self, sock: socket.socket, address: Any, local_address: Any = None) -> None:
        """Send by a raw socket, since the kernel puts a marker in front of every send of the endpoint."""
        peer = (sock.getpeername() if address is None else address)[:2]
        if not sock.getsockname()[1]:
            sock.bind(("", 0))
        host, port = sock.getsockname()[:2]
        send_raw_keepalive((host if local_address is None else str(local_address), port), peer)


def send_raw_keepalive(source: tuple[str, int], destination: tuple[str, int]) -> None:
    """Send one NAT-keepalive over IPv4 from the port of another socket, with UDP checksum 0 (RFC 3948, 2.3).

    `source` and `destination` are (host, port). Raises `NatCompatError`: EPERM without the privilege for raw
    sockets.
    """
    try:
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_UDP)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EACCES):
            raise
        raise NatCompatError(
            errno.EPERM,
            "a NAT-keepalive needs a raw socket on Solaris, and the kernel refused it",
            RAW_REMEDY,
        ) from error
    with raw:
        if source[0] not in ("", "0.0.0.0"):  # noqa: S104
            raw.bind((source[0], 0))
        header = struct.pack("!HHHH", source[1], destination[1], 8 + len(NAT_KEEPALIVE), 0)
        raw.sendto(header + NAT_KEEPALIVE, (destination[0], 0))


def _switch_on(sock: socket.socket) -> None:
    """Set the option unless it is set, and read it back. Raises `NatCompatError` with the kernel's errno."""
    option = sunos.numbers().udp_nat_t_endpoint
    try:
        if sock.getsockopt(socket.IPPROTO_UDP, option):
            return
        sock.setsockopt(socket.IPPROTO_UDP, option, 1)
        on = sock.getsockopt(socket.IPPROTO_UDP, option)
    except OSError as error:
        raise _refused(error) from error
    if not on:
        raise NatCompatError(
            errno.EOPNOTSUPP,
            "the kernel accepted UDP_NAT_T_ENDPOINT and does not have it",
            "Choose NATCOMPAT_BACKEND=userspace",
        )


def _refused(error: OSError) -> NatCompatError:
    """Return the `NatCompatError` for a kernel that does not let this process set or clear the option."""
    code = error.errno or errno.ENOPROTOOPT
    missing = code in (errno.EPERM, errno.EACCES)
    to_whom = " to a process without PRIV_SYS_IP_CONFIG" if missing and _privileged() is False else ""
    return NatCompatError(
        errno.EPERM if missing else code,
        f"the kernel refuses UDP_NAT_T_ENDPOINT{to_whom}: {error.strerror}",
        _REMEDIES.get(code, "Use Solaris 10 or later, or illumos, or choose NATCOMPAT_BACKEND=userspace"),
    )


def _privileged() -> bool | None:
    """Return whether this process has the privilege for the option; None if that is unknown."""
    answers = [sunos.in_effect(privilege) for privilege in (sunos.SYS_IP_CONFIG, sunos.SYS_NET_CONFIG)]
    return None if None in answers else any(answers)


def _exempt(sock: socket.socket) -> bool:
    """Exempt `sock` from IPsec policies; return False where that is impossible: connected, or no IPsec.

    A request of the application to IPsec for this socket is left as it is.
    """
    option, size = _security_option(sock), sunos.numbers().ipsec_request_size
    request = sunos.security_request(sunos.numbers().ipsec_pref_never)
    before = b""
    with contextlib.suppress(OSError):  # no answer: no request is set
        before = sock.getsockopt(*option, size)
    if any(before):
        return before == request
    try:
        sock.setsockopt(*option, request)
    except OSError:
        return False
    return True


def _security_option(sock: socket.socket) -> tuple[int, int]:
    numbers = sunos.numbers()
    if sock.family == socket.AF_INET6:
        return socket.IPPROTO_IPV6, numbers.ipv6_sec_opt
    return socket.IPPROTO_IP, numbers.ip_sec_opt
