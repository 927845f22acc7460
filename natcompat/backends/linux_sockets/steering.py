"""Steering (Linux): a second socket on the application's port takes all that is not IKE.

The application's socket and ours are one SO_REUSEPORT group; a classic BPF program of the group
decides by the first word. ESP has its own queue and thread, so that no flood of it costs IKE.
Unprivileged; ``reuseport_select_sock()`` in net/core/sock_reuseport.c.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Any, Final, TypeAlias

from natcompat.backends.base import Address, SocketReader
from natcompat.backends.diversion import Diversion, HandBack
from natcompat.backends.linux_sockets import filters
from natcompat.backends.linux_sockets.overload import QueueWatch
from natcompat.backends.linux_sockets.reading import SocketsOfThread
from natcompat.backends.system_calls import is_connected
from natcompat.contract import MARKER_LENGTH, NON_ESP_MARKER

# Option numbers of Linux that Python does not name in every version
IP_PKTINFO: Final = 8  # include/uapi/linux/in.h
IP_RECVERR: Final = 11
_IP_RECVTOS: Final = 13
_IP_FREEBIND: Final = 15
_IP_TRANSPARENT: Final = 19
IPV6_RECVERR: Final = 25  # include/uapi/linux/in6.h
_IPV6_RECVTCLASS: Final = 66
_IPV6_TCLASS: Final = 67
_IPV6_TRANSPARENT: Final = 75
_IPV6_FREEBIND: Final = 78
SO_BINDTODEVICE: Final = 25  # include/uapi/asm-generic/socket.h
SO_MARK: Final = 36
UDP_ENCAP: Final = 100  # include/uapi/linux/udp.h
_UDP_NO_CHECK6_RX: Final = 102
UDP_GRO: Final = 104

_COPIED_BEFORE_BIND: Final[tuple[tuple[int, int], ...]] = (
    (socket.SOL_SOCKET, socket.SO_REUSEADDR),  # else EADDRINUSE when the port is used on several addresses
    (socket.IPPROTO_IP, _IP_FREEBIND),  # addresses that are not there yet
    (socket.IPPROTO_IP, _IP_TRANSPARENT),
)
_COPIED_BEFORE_BIND_6: Final[tuple[tuple[int, int], ...]] = (
    (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY),
    (socket.IPPROTO_IPV6, _IPV6_FREEBIND),
    (socket.IPPROTO_IPV6, _IPV6_TRANSPARENT),
    (socket.IPPROTO_UDP, _UDP_NO_CHECK6_RX),
)

_Destination: TypeAlias = tuple[str, int] | None
"""Local address and interface that a datagram was sent to; None: to several hosts."""
_Stray: TypeAlias = tuple[memoryview, Address, _Destination]
"""IKE that came to the engine: datagram, source, destination."""
_Diverted: TypeAlias = tuple[list[tuple[memoryview, Address]], list[int]]
"""What is not IKE, with its sources, and the outer traffic class of each."""

_BURST: Final = 64  # datagrams taken from one socket before the next has its turn; a few more if coalesced
_LARGEST: Final = 65535
_ANCILLARY: Final = 3 * socket.CMSG_SPACE(4) + socket.CMSG_SPACE(20) + socket.CMSG_SPACE(12)
_TRAFFIC_CLASS: Final = ((socket.IPPROTO_IP, socket.IP_TOS), (socket.IPPROTO_IPV6, _IPV6_TCLASS))
_ENVELOPE: Final = HandBack.HEADROOM


class Steering:
    """The engine's sockets of one application socket, and the thread that reads them.

    `engines` sockets share the load by SPI. Raises OSError from the constructor, with the
    application's socket as it was, when the kernel refuses a step: EADDRINUSE when the user id has
    changed since the socket was made or somebody else holds the port, EPERM by a seccomp profile.
    """

    def __init__(self, sock: socket.socket, diversion: Diversion, engines: int = 1) -> None:
        self._diversion = diversion
        self._port: int = sock.getsockname()[1]
        self._on_device = bool(_device(sock))
        self._queues: dict[socket.socket, QueueWatch] = {}
        self._engines: list[socket.socket] = []
        with contextlib.ExitStack() as undo:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            undo.callback(self._leave, sock)
            for _ in range(engines):
                self._engines.append(self._join(sock))
            filters.attach_steering(sock, engines)
            self._reader = self._read()
            undo.pop_all()

    def detach(self, sock: socket.socket) -> None:
        """Leave `sock` alone on its port, as it was, with nothing of ours left."""
        self._reader.close()
        self._leave(sock)

    def release(self) -> None:
        """Close what is ours. In a forked child nothing but the child's descriptors is touched."""
        self._reader.abandon()

    def adopt(self) -> None:
        """Read the inherited sockets in this process, a forked child, too."""
        self._reader.close()
        self._reader = self._read()

    def _read(self) -> SocketReader:
        """Have the sockets read by whoever takes ESP, if he wants to, else by a thread of ours."""
        own: Any = getattr(self._diversion.consumer, "read_sockets", None)
        reader: SocketReader | None = None
        if own is not None and not self._on_device:  # which cannot be handed anything back
            reader = own(self._engines, self._diversion, self._take)
        return reader or SocketsOfThread(self._engines, self._take)

    @property
    def esp_socket(self) -> socket.socket:
        """One of the engine's sockets, for what leaves without the marker."""
        return self._engines[0]

    def count(self) -> None:
        """Bring the counters of the endpoint up to date."""
        self._reader.count()

    def drops(self) -> int:
        """Return how many datagrams the kernel dropped because the queues of ours were full."""
        return sum(filters.drops(engine) or 0 for engine in self._engines)

    def _leave(self, sock: socket.socket) -> None:
        # The program goes last: until then it keeps IKE out of our sockets, and when these are gone
        # it names one that is not there, for which the kernel takes the only one that is.
        with contextlib.ExitStack() as each:
            each.callback(sock.setsockopt, socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
            each.callback(_take_off_program, sock)
            for engine in self._engines:
                each.callback(self._empty, engine, sock)

    def _join(self, sock: socket.socket) -> socket.socket:
        """Return a socket of ours that shares the address and port of `sock`."""
        engine = socket.socket(sock.family, sock.type, sock.proto)
        try:
            engine.settimeout(0)
            options = _COPIED_BEFORE_BIND
            if sock.family == socket.AF_INET6:
                options += _COPIED_BEFORE_BIND_6
            for level, option in options:
                with contextlib.suppress(
                    OSError
                ):  # an option that this kernel does not know is not set either
                    value = sock.getsockopt(level, option)
                    if value != engine.getsockopt(level, option):
                        engine.setsockopt(level, option, value)
            device = _device(sock)
            if device:
                engine.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, device)
            mark = sock.getsockopt(socket.SOL_SOCKET, SO_MARK)
            if mark:  # ESP that leaves here shall go the way of IKE
                engine.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
            # what the application gave its own queue, ESP shall have too (the kernel reports it doubled)
            engine.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVBUF, sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
            )
            # where a datagram was sent to, so that IKE among it can go there again
            if sock.family == socket.AF_INET6:
                engine.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            else:
                engine.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
            if self._diversion.wants_traffic_classes:
                engine.setsockopt(socket.IPPROTO_IP, _IP_RECVTOS, 1)  # an IPv6 socket has IPv4 peers, too
                if sock.family == socket.AF_INET6:
                    engine.setsockopt(socket.IPPROTO_IPV6, _IPV6_RECVTCLASS, 1)
            # GRO glues IKE behind ESP, and a socket bound to a device cannot be handed anything back
            if self._diversion.coalesce and not device:
                with contextlib.suppress(OSError):
                    engine.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
            engine.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            engine.bind(sock.getsockname())
        except BaseException:
            engine.close()
            raise
        self._queues[engine] = QueueWatch(engine)
        return engine

    def _take(self, engine: socket.socket) -> None:
        """Take one burst from `engine`."""
        strays, diverted, _ = self._receive(engine)
        for stray in strays:
            self._hand_back(engine, *stray)
        self._diversion.take(*diverted)

    def _receive(self, engine: socket.socket) -> tuple[list[_Stray], _Diverted, bool]:
        """Return one burst from `engine`: IKE, everything else, and whether there may be more."""
        strays: list[_Stray] = []
        diverted: list[tuple[memoryview, Address]] = []
        traffic_classes: list[int] = []
        shed: list[tuple[memoryview, Address]] = []
        more, coalesced, longest = True, False, 0
        queue = self._queues[engine]
        shedding = queue.shedding()
        for _ in range(_BURST):
            if len(diverted) >= _BURST:
                break
            try:
                data, ancillary, _, source = engine.recvmsg(_LARGEST, _ANCILLARY)
            except BlockingIOError:
                more = False
                break
            except OSError as error:  # an ICMP error of something sent by this socket
                self._diversion.error(f"receive of ESP: {error}")
                break
            destination, segment_size, traffic_class = _read_ancillary(ancillary)
            whole, size = memoryview(data), segment_size or len(data) or 1
            segments = [(whole[start : start + size], source) for start in range(0, len(data) or 1, size)]
            if b"\0" in data[::size]:  # some begin as IKE does
                strays += [(each, source, destination) for each, _ in segments if _is_ike(each)]
                segments = [each for each in segments if not _is_ike(each[0])]
            if size < len(data):
                coalesced = True
            elif len(data) > longest:
                longest = len(data)
            if shedding:
                shed += segments
                continue
            diverted += segments
            traffic_classes += [traffic_class] * len(segments)
        queue.note(longest, coalesced)
        if shedding:
            self._diversion.shed(shed)
            queue.shedding()  # again: when nothing is left that is let through, nobody would ask any more
        return strays, (diverted, traffic_classes), more

    def _hand_back(
        self, sender: socket.socket, datagram: memoryview, source: Address, destination: _Destination
    ) -> None:
        """Send IKE that came here to the application's socket.

        It comes here behind ESP, glued to it by GRO, and between the join and the program.
        """
        diversion = self._diversion
        if bytes(datagram[: len(diversion.hand_back.prefix)]) == diversion.hand_back.prefix:
            diversion.error(
                "a datagram that had been handed back came again: another program steers this port"
            )
            return
        if destination is None:
            return  # multicast or broadcast: the application has a copy of its own
        if self._on_device:
            diversion.error("IKE was lost: a socket bound to a device takes nothing from loopback")
            return
        host, interface = destination
        address: Address = (host, self._port)
        if sender.family == socket.AF_INET6:
            address += (0, interface if host.startswith("fe80:") else 0)
        try:
            sender.sendto(diversion.hand_back.wrap(datagram[MARKER_LENGTH:], source), address)
        except OSError as error:
            diversion.error(f"IKE could not be handed back: {error}")
        else:
            diversion.counters.handed_back += 1

    def _empty(self, engine: socket.socket, sock: socket.socket) -> None:
        """Close `engine`. What is queued came while the option was on: ESP is taken, IKE handed back."""
        kept: list[_Stray] = []
        with engine:
            more, bursts = True, 0
            while more and bursts < 64:  # for ESP may come without end
                strays, diverted, more = self._receive(engine)
                kept += strays
                self._diversion.take(*diverted)
                bursts += 1
        for stray in kept:  # now that the application's socket is the only one that it can come to
            self._hand_back(sock, *stray)


def refusal(sock: socket.socket) -> str:
    """Return why the bound `sock` cannot be steered, in words; empty if it can be tried."""
    v6 = sock.family == socket.AF_INET6
    if sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT):
        return "the application set SO_REUSEPORT, so its group is its own"
    if is_connected(sock):
        return "the socket is connected, and a connected socket leaves its SO_REUSEPORT group"
    # an IPv6 socket has both: the errors of its IPv4 peers go by the other
    if sock.getsockopt(socket.IPPROTO_IP, IP_RECVERR) or (
        v6 and sock.getsockopt(socket.IPPROTO_IPV6, IPV6_RECVERR)
    ):
        return "the application set IP_RECVERR, and errors would reach either socket of the group"
    if sock.getsockopt(socket.IPPROTO_UDP, UDP_ENCAP):
        return "the application set UDP_ENCAP, so the kernel takes ESP itself"
    return ""


def _take_off_program(sock: socket.socket) -> None:
    with contextlib.suppress(
        OSError
    ):  # before Linux 5.3 it cannot be taken off; alone in its group a socket ignores it
        filters.detach_steering(sock)


def _device(sock: socket.socket) -> bytes:
    try:
        return sock.getsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, 16).rstrip(b"\0")
    except OSError:
        return b""


def _is_ike(datagram: memoryview) -> bool:
    return datagram[:MARKER_LENGTH] == NON_ESP_MARKER


def _read_ancillary(ancillary: list[tuple[int, int, bytes]]) -> tuple[_Destination, int, int]:
    """Return (local address, interface) that a datagram was sent to, the size of its segments, its TOS.

    None for what went to several hosts, 0 for what is in one piece.
    """
    destination = None
    segment_size = traffic_class = 0
    for level, kind, data in ancillary:
        if (level, kind) == (socket.IPPROTO_IP, IP_PKTINFO):
            interface, local, sent_to = struct.unpack_from("=i4s4s", data)
            if local == sent_to:
                destination = socket.inet_ntop(socket.AF_INET, local), interface
        elif (level, kind) == (socket.IPPROTO_IPV6, socket.IPV6_PKTINFO):
            sent_to, interface = struct.unpack_from("=16si", data)
            mapped = sent_to.startswith(bytes(10) + b"\xff\xff")
            if sent_to[0] != 0xFF and not (mapped and sent_to[12] >= 0xE0):
                destination = socket.inet_ntop(socket.AF_INET6, sent_to), interface
        elif (level, kind) == (socket.IPPROTO_UDP, UDP_GRO):
            segment_size = struct.unpack_from("=i", data)[0]
        elif (level, kind) in _TRAFFIC_CLASS:
            # one octet for IPv4, an int for IPv6
            traffic_class = data[0] if len(data) == 1 else struct.unpack_from("=i", data)[0]
    return destination, segment_size, traffic_class
