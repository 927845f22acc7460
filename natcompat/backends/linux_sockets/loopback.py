"""`LoopbackWay`: a way to a UDP socket of this host that no packet can leave (Linux).

The sender is bound to the interface lo (SO_BINDTODEVICE). The kernel then looks for routes by lo alone, and
sends by lo where there is none, also after netfilter has changed address or mark (``ip_route_output_key()``,
``ip_route_me_harder()``, ``ip6_route_output()``). Over IPv6 it finds no route by lo to an address of another
interface.
"""

from __future__ import annotations

import contextlib
import errno
import secrets
import select
import socket
import struct
from typing import Final

from natcompat.backends.consumer import Address
from natcompat.backends.linux_sockets.options import IP_FREEBIND, IPV6_FREEBIND, SO_BINDTODEVICE
from natcompat.backends.system_calls import is_connected

LOOPBACK: Final = b"lo"
_SIOCGIFFLAGS: Final = 0x8913  # include/uapi/linux/sockios.h
_IFF_LOOPBACK: Final = 0x8  # include/uapi/linux/if.h
_PATIENCE: Final = 200  # milliseconds for a datagram over lo; it takes 0.01
_LOCALHOSTS: Final = {"0.0.0.0": ("127.0.0.1",), "::": ("::1", "::ffff:127.0.0.1")}  # noqa: S104
"""Addresses at which a socket bound to a wildcard can be reached by lo, the best one first."""


class LoopbackWay:
    """Sends to the application's socket `sock` by the interface lo; a `HandBackWay`.

    Raises OSError from the constructor, whose message says why, where no datagram reaches the address of
    `sock` by lo: EISCONN, ENODEV for a socket bound to a device, ENETUNREACH for an IPv6 address of
    another interface, EPERM before Linux 5.7 without CAP_NET_RAW, ETIMEDOUT if a firewall drops it.
    """

    def __init__(self, sock: socket.socket) -> None:
        host, port, *_ = sock.getsockname()
        if is_connected(sock):
            raise OSError(errno.EISCONN, "a connected socket receives nothing from lo")
        if bound_device(sock):
            raise OSError(errno.ENODEV, "a socket bound to a device receives nothing from lo")
        self.sock: socket.socket = socket.socket(sock.family, socket.SOCK_DGRAM)
        try:
            self.sock.settimeout(0)
            self.sock.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, LOOPBACK)
            self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)  # it only sends
            if not self._is_loopback():
                raise OSError(errno.ENODEV, "the interface lo is not the loopback interface")
            self.address: Address = (self._reach(host, _v6_only(sock)), port)
        except BaseException:
            self.sock.close()
            raise

    def send(self, envelope: bytes) -> None:
        """Send `envelope`. Never waits. Raises OSError: EMSGSIZE above 65507 bytes."""
        self.sock.sendto(envelope, self.address)

    def close(self) -> None:
        """Close the sending socket."""
        self.sock.close()

    def _is_loopback(self) -> bool:
        import fcntl  # Windows has none, and imports this module

        answer = fcntl.ioctl(self.sock, _SIOCGIFFLAGS, struct.pack("16s24x", LOOPBACK))
        return bool(struct.unpack_from("=H", answer, 16)[0] & _IFF_LOOPBACK)

    def _reach(self, host: str, v6_only: bool) -> str:
        """Return the address at which a socket bound to `host` is reached by lo. Raises OSError."""
        candidates = _LOCALHOSTS.get(host, (host,))
        for candidate in candidates[:1] if v6_only else candidates:
            try:
                self._prove(host, candidate)
            except OSError as error:
                failure = OSError(error.errno, f"{candidate} is not reached by lo: {error.strerror}")
            else:
                return candidate
        raise failure

    def _prove(self, host: str, reached_at: str) -> None:
        """Send a datagram to a private socket bound to `host`. Raises OSError if it does not arrive."""
        with socket.socket(self.sock.family, socket.SOCK_DGRAM) as receiver:
            receiver.settimeout(0)
            level, option = (
                (socket.IPPROTO_IPV6, IPV6_FREEBIND)
                if receiver.family == socket.AF_INET6
                else (socket.IPPROTO_IP, IP_FREEBIND)
            )
            with contextlib.suppress(OSError):  # before Linux 4.15 for IPv6
                receiver.setsockopt(level, option, 1)
            receiver.bind((host, 0))
            token = secrets.token_bytes(16)
            self.sock.sendto(token, (reached_at, receiver.getsockname()[1]))
            poller = select.poll()
            poller.register(receiver, select.POLLIN)
            if not poller.poll(_PATIENCE) or receiver.recv(32) != token:
                raise OSError(errno.ETIMEDOUT, "a datagram did not arrive")


def _v6_only(sock: socket.socket) -> bool:
    return sock.family == socket.AF_INET6 and bool(sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY))


def bound_device(sock: socket.socket) -> bytes:
    """Return the name of the device to which `sock` is bound; empty if it is bound to none."""
    try:
        return sock.getsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, 16).rstrip(b"\0")
    except OSError:
        return b""
