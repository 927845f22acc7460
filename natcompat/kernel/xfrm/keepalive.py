"""NAT-keepalives for SAs of a kernel that sends none itself (Linux before 6.11).

As the kernel does it where it does (net/xfrm/xfrm_nat_keepalive.c): one byte 0xFF (RFC 3948, 2.3)
from the SA's own address and port, if the SA has sent nothing for as long as its interval.
"""

from __future__ import annotations

import errno
import logging
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from natcompat.contract import NAT_KEEPALIVE
from natcompat.errors import NatCompatError, get_logger
from natcompat.ipsec import IPAddress, SaId, SecurityAssociation, Usage
from natcompat.kernel.xfrm.bypass import bypass

logger: logging.Logger = get_logger("natcompat.kernel.xfrm")

HOP_LIMIT = 64
CHECKS_PER_INTERVAL = 4
"""How often an SA is looked at: a keepalive is late by a quarter of its interval at most."""


@dataclass(slots=True)
class _Watched:
    source: IPAddress
    destination: IPAddress
    source_port: int
    destination_port: int
    interval: float
    packets: int = 0
    active: float = 0.0
    due: float = 0.0


class KeepaliveSender:
    """Watches SAs and sends their keepalives, in a thread that starts with the first of them.

    The thread is a daemon: it ends with the process, and with `close`. A forked child has none.
    """

    def __init__(self, usage: Callable[[SaId], Usage]) -> None:
        """Open the sockets, which stay in the present network namespace; `usage` is `IPsec.get_sa`."""
        self._usage = usage
        self._sockets: dict[int, socket.socket] = {}
        self._problem: OSError | None = None
        try:
            for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
                self._sockets[version] = socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW)
        except OSError as error:
            self._problem = error
        self._watched: dict[SaId, _Watched] = {}
        self._condition = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False

    def check(self) -> None:
        """Make ready for the first SA; raise where this process cannot send keepalives."""
        if self._problem is not None and self._problem.errno in (errno.EPERM, errno.EACCES):
            raise NatCompatError(
                self._problem.errno or errno.EPERM,
                f"This kernel sends no keepalives, and this process cannot: {self._problem.strerror}",
                "Grant CAP_NET_RAW, or leave nat_keepalive out and send keepalives on the socket of IKE",
            )
        for sock in self._sockets.values():
            bypass(sock)

    def watch(self, sa: SecurityAssociation) -> None:
        """Send keepalives for `sa`, an outbound SA with encapsulation and `nat_keepalive`."""
        if sa.encapsulation is None or sa.nat_keepalive is None:
            return
        with self._condition:
            now = time.monotonic()
            self._watched[sa.sa_id] = _Watched(
                sa.source,
                sa.destination,
                sa.encapsulation.local_port,
                sa.encapsulation.remote_port,
                sa.nat_keepalive,
                active=now,
                due=now + sa.nat_keepalive / CHECKS_PER_INTERVAL,
            )
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="natcompat-keepalive", daemon=True)
                self._thread.start()
            self._condition.notify()

    def move(self, old: SaId, new: SaId, source: IPAddress, ports: tuple[int, int] | None) -> None:
        """Follow an SA to other addresses and `ports` (source, destination); None: no encapsulation."""
        with self._condition:
            watched = self._watched.pop(old, None)
            if watched is not None and ports is not None:
                watched.source, watched.destination = source, new.destination
                watched.source_port, watched.destination_port = ports
                self._watched[new] = watched

    def forget(self, sa_id: SaId | None = None) -> None:
        """Send no more for `sa_id`; None: for any."""
        with self._condition:
            if sa_id is None:
                self._watched.clear()
            else:
                self._watched.pop(sa_id, None)

    def close(self) -> None:
        """End the thread and wait for it."""
        with self._condition:
            self._closed = True
            self._condition.notify()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        for sock in self._sockets.values():
            sock.close()

    def _run(self) -> None:
        while True:
            with self._condition:
                if self._closed:
                    return
                now = time.monotonic()
                due = [(sa_id, each) for sa_id, each in self._watched.items() if each.due <= now]
                if not due:
                    next_due = min((each.due for each in self._watched.values()), default=None)
                    self._condition.wait(None if next_due is None else next_due - now)
                    continue
            for sa_id, watched in due:
                try:
                    self._check(sa_id, watched, now)
                except NatCompatError as error:
                    if error.errno == errno.ESRCH:
                        self.forget(sa_id)
                        continue
                    logger.warning("no keepalive for %s: %s", sa_id, error)
                except OSError as error:
                    logger.warning("no keepalive for %s: %s", sa_id, error)
                watched.due = now + watched.interval / CHECKS_PER_INTERVAL

    def _check(self, sa_id: SaId, watched: _Watched, now: float) -> None:
        packets = self._usage(sa_id).packets
        if packets != watched.packets:
            watched.packets = packets
            watched.active = now
        elif now - watched.active >= watched.interval:
            version = watched.source.version
            if version not in self._sockets:
                raise OSError(errno.EAFNOSUPPORT, f"this kernel has no IPv{version}")
            packet = keepalive_packet(
                watched.source, watched.destination, watched.source_port, watched.destination_port
            )
            self._sockets[version].sendto(packet, (str(watched.destination), 0))
            watched.active = now


def keepalive_packet(
    source: IPAddress, destination: IPAddress, source_port: int, destination_port: int
) -> bytes:
    """Return a keepalive with its IP header, as from a port that another socket, or ESP, is using.

    To be sent on an IPPROTO_RAW socket, which receives nothing.
    """
    udp = struct.pack(">HHHH", source_port, destination_port, 8 + len(NAT_KEEPALIVE), 0) + NAT_KEEPALIVE
    if source.version == 4:
        # The kernel fills in length, identification and checksum (raw(7)); UDP goes without (RFC 3948, 2.3).
        header = struct.pack(">BBHHHBBH", 0x45, 0, 0, 0, 0, HOP_LIMIT, socket.IPPROTO_UDP, 0)
    else:
        header = struct.pack(">IHBB", 6 << 28, len(udp), socket.IPPROTO_UDP, HOP_LIMIT)
        checksum = _checksum(source.packed + destination.packed + struct.pack(">II", len(udp), 17) + udp)
        udp = udp[:6] + struct.pack(">H", checksum or 0xFFFF) + udp[8:]
    return header + source.packed + destination.packed + udp


def _checksum(data: bytes) -> int:
    """The Internet checksum (RFC 1071)."""
    data += bytes(len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF
