"""Sends packets that no policy protects past the packet device, as if they had never been in it.

Routes lead traffic into the device by addresses; policies know protocols and ports, too. The engine hands
the packets back that no policy protects. They leave by a raw socket whose mark keeps them out of the device.
The guard checks them like any other packet.
"""

from __future__ import annotations

import contextlib
import socket
from collections import Counter
from collections.abc import Iterable, Sequence
from ipaddress import IPv6Address
from typing import Final

from natcompat.errors import NatCompatError
from natcompat.esp.engine.results import DROPPED, Reason

HANDED_BACK: Final = (Reason.NO_POLICY, Reason.BYPASS)
"""Why packets are handed back: no policy is for them, or one says so."""

_QUEUE: Final = 1 << 20  # bytes


class ClearPath:
    """Raw sockets for IPv4 and IPv6 in the network namespace of the thread that makes this. Thread-safe.

    EPERM without CAP_NET_RAW.
    """

    def __init__(self, mark: int) -> None:
        """`mark`: the mark of packets that are sent."""
        self.sent: Counter[Reason] = Counter()
        """Packets that left, by why."""
        self.failed: int = 0
        """Packets that the system did not send: no route, the guard, no room."""
        self._sockets: dict[int, socket.socket] = {}
        try:
            for version, family in ((4, socket.AF_INET), (6, socket.AF_INET6)):
                with contextlib.ExitStack() as undo:
                    try:  # IPPROTO_RAW: packets come with their IP header
                        sock = undo.enter_context(socket.socket(family, socket.SOCK_RAW, socket.IPPROTO_RAW))
                    except OSError as error:
                        if version == 6:  # a kernel without IPv6
                            continue
                        raise NatCompatError(
                            error.errno or 0,
                            f"no raw socket for packets that no policy protects: {error.strerror}",
                            "Run as root, or grant CAP_NET_RAW and CAP_NET_ADMIN",
                        ) from None
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _QUEUE)
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 0)
                    sock.setblocking(False)
                    self._sockets[version] = sock
                    undo.pop_all()
        except BaseException:
            self.close()
            raise

    def send(self, packets: Sequence[bytes], outcomes: Iterable[object]) -> None:
        """Send those of `packets` whose outcome of sealing is that no policy protects them."""
        for packet, outcome in zip(packets, outcomes, strict=True):
            for reason in HANDED_BACK:
                if outcome is DROPPED[reason]:
                    self._send(packet, reason)

    def _send(self, packet: bytes, reason: Reason) -> None:
        version = packet[0] >> 4
        if version == 4:
            address: tuple[object, ...] = socket.inet_ntoa(packet[16:20]), 0
        elif _is_link_local(packet):
            return
        else:
            address = str(IPv6Address(packet[24:40])), 0, 0, 0
        try:
            self._sockets[version].sendto(packet, address)
        except (OSError, KeyError):
            self.failed += 1
        else:
            self.sent[reason] += 1

    def close(self) -> None:
        """Close the sockets. May be repeated."""
        for sock in self._sockets.values():
            sock.close()


def _is_link_local(packet: bytes) -> bool:
    """Tell whether an IPv6 packet is for the link of the device alone, such as its neighbour discovery."""
    source, destination = IPv6Address(packet[8:24]), IPv6Address(packet[24:40])
    if destination.is_multicast and packet[25] & 0xF <= 2:  # RFC 4291, 2.7: interface-local, link-local
        return True
    return source.is_link_local or source.is_unspecified or destination.is_link_local
