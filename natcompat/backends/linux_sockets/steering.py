"""Steering (Linux): a second socket on the application's port receives every datagram that is not IKE.

The application's socket and the ESP sockets form one SO_REUSEPORT group, whose classic BPF program decides
by the first word. ESP has its own queue and thread, so that a flood of ESP costs no IKE. Needs no privilege;
see ``reuseport_select_sock()`` in net/core/sock_reuseport.c.
"""

from __future__ import annotations

import contextlib
import socket
import struct
from typing import Any, Final, TypeAlias

from natcompat.backends.consumer import Address, SocketReader
from natcompat.backends.diversion import Diversion
from natcompat.backends.hand_back import Destination
from natcompat.backends.linux_sockets import filters
from natcompat.backends.linux_sockets.loopback import LoopbackWay, bound_device
from natcompat.backends.linux_sockets.options import (
    IP_FREEBIND,
    IP_PKTINFO,
    IP_RECVERR,
    IP_RECVTOS,
    IP_TRANSPARENT,
    IPV6_FREEBIND,
    IPV6_RECVERR,
    IPV6_RECVTCLASS,
    IPV6_TCLASS,
    IPV6_TRANSPARENT,
    SO_BINDTODEVICE,
    SO_MARK,
    UDP_ENCAP,
    UDP_GRO,
    UDP_NO_CHECK6_RX,
)
from natcompat.backends.linux_sockets.overload import QueueWatch
from natcompat.backends.linux_sockets.reading import SocketsOfThread
from natcompat.backends.system_calls import is_connected
from natcompat.contract import MARKER_LENGTH, NON_ESP_MARKER

_COPIED_BEFORE_BIND: Final[tuple[tuple[int, int], ...]] = (
    (socket.SOL_SOCKET, socket.SO_REUSEADDR),  # else EADDRINUSE when the port is used on several addresses
    (socket.IPPROTO_IP, IP_FREEBIND),  # addresses that the host does not have yet
)
_COPIED_BEFORE_BIND_6: Final[tuple[tuple[int, int], ...]] = (
    (socket.IPPROTO_IPV6, socket.IPV6_V6ONLY),
    (socket.IPPROTO_IPV6, IPV6_FREEBIND),
    (socket.IPPROTO_UDP, UDP_NO_CHECK6_RX),
)

_StrayIke: TypeAlias = tuple[memoryview, Address, Destination | None]
"""IKE that came to an ESP socket: datagram, source, destination (None: multicast or broadcast)."""
_Diverted: TypeAlias = tuple[list[tuple[memoryview, Address]], list[int]]
"""Datagrams that are not IKE, with their sources, and the outer traffic class of each."""

_BURST: Final = 64  # datagrams read from one socket before the next has its turn; a few more if coalesced
_LARGEST: Final = 65535
_ANCILLARY: Final = 3 * socket.CMSG_SPACE(4) + socket.CMSG_SPACE(20) + socket.CMSG_SPACE(12)
_TRAFFIC_CLASS: Final = ((socket.IPPROTO_IP, socket.IP_TOS), (socket.IPPROTO_IPV6, IPV6_TCLASS))


class Steering:
    """The ESP sockets of one application socket, and their reader.

    `engines`: the number of ESP sockets, which share the load by SPI. Raises OSError from the constructor,
    with the application's socket as it was, when the kernel refuses a step: EADDRINUSE when the user id has
    changed since the socket was made or another program holds the port, EPERM by a seccomp profile.
    """

    def __init__(self, sock: socket.socket, diversion: Diversion, engines: int = 1) -> None:
        self._diversion = diversion
        self._queues: dict[socket.socket, QueueWatch] = {}
        self._engines: list[socket.socket] = []
        self._way: LoopbackWay | None = None
        self.no_hand_back: str = ""
        """Why IKE that comes to an ESP socket cannot go back to the application; empty if it can."""
        with contextlib.ExitStack() as undo:
            try:
                self._way = diversion.hand_back.way = LoopbackWay(sock)
                undo.callback(self._close_way)
            except OSError as error:
                self.no_hand_back = error.strerror or str(error)
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            undo.callback(self._leave, sock)
            for _ in range(engines):
                self._engines.append(self._join(sock))
            filters.attach_steering(sock, engines)
            self._reader = self._read()
            undo.pop_all()

    def detach(self, sock: socket.socket) -> None:
        """Leave `sock` alone on its port, as it was, and close the ESP sockets."""
        self._reader.close()
        try:
            self._leave(sock)
        finally:
            self._close_way()

    def release(self) -> None:
        """Close the ESP sockets. In a forked child only the child's descriptors are closed."""
        self._reader.abandon()
        self._close_way()

    def adopt(self) -> None:
        """Read the inherited ESP sockets in this process, a forked child."""
        self._reader.close()
        self._reader = self._read()

    def _read(self) -> SocketReader:
        """Start reading: by the consumer of ESP if it wants to, else by a thread of natcompat."""
        read_sockets: Any = getattr(self._diversion.consumer, "read_sockets", None)
        reader: SocketReader | None = None
        if read_sockets is not None:
            reader = read_sockets(self._engines, self._diversion, self._take)
        return reader or SocketsOfThread(self._engines, self._take)

    def _close_way(self) -> None:
        if self._way is not None:
            self._diversion.hand_back.way = None
            self._way.close()

    @property
    def esp_socket(self) -> socket.socket:
        """One of the ESP sockets, for sends without the marker."""
        return self._engines[0]

    def count(self) -> None:
        """Bring the counters of the endpoint up to date."""
        self._reader.count()

    def drops(self) -> int:
        """Return the number of datagrams that the kernel dropped because the queues of ESP were full."""
        return sum(filters.drops(engine) or 0 for engine in self._engines)

    def _leave(self, sock: socket.socket) -> None:
        # The program goes last: until then it keeps IKE out of the ESP sockets. Once these are closed it
        # selects an index that does not exist, and the kernel takes the only socket of the group.
        with contextlib.ExitStack() as steps:
            steps.callback(sock.setsockopt, socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
            steps.callback(_detach_program, sock)
            for engine in self._engines:
                steps.callback(self._drain, engine)

    def _join(self, sock: socket.socket) -> socket.socket:
        """Return a new ESP socket that shares the address and port of `sock`."""
        engine = socket.socket(sock.family, sock.type, sock.proto)
        try:
            engine.settimeout(0)
            options = _COPIED_BEFORE_BIND
            if sock.family == socket.AF_INET6:
                options += _COPIED_BEFORE_BIND_6
            for level, option in options:
                with contextlib.suppress(OSError):  # an option that this kernel does not know is not set
                    value = sock.getsockopt(level, option)
                    if value != engine.getsockopt(level, option):
                        engine.setsockopt(level, option, value)
            device = bound_device(sock)
            if device:
                engine.setsockopt(socket.SOL_SOCKET, SO_BINDTODEVICE, device)
            mark = sock.getsockopt(socket.SOL_SOCKET, SO_MARK)
            if mark:  # ESP leaves by the same routes as IKE
                engine.setsockopt(socket.SOL_SOCKET, SO_MARK, mark)
            # the queue of ESP is as large as the application's (the kernel reports the size doubled)
            engine.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVBUF, sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) // 2
            )
            # the local address of a datagram, which IKE that goes back brings along
            if sock.family == socket.AF_INET6:
                engine.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO, 1)
            else:
                engine.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
            if self._diversion.wants_traffic_classes:
                engine.setsockopt(socket.IPPROTO_IP, IP_RECVTOS, 1)  # an IPv6 socket has IPv4 peers, too
                if sock.family == socket.AF_INET6:
                    engine.setsockopt(socket.IPPROTO_IPV6, IPV6_RECVTCLASS, 1)
            # GRO coalesces IKE with ESP, so it takes a way back
            if self._diversion.coalesce and self._way is not None:
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
            self._hand_back(*stray)
        self._diversion.take(*diverted)

    def _receive(self, engine: socket.socket) -> tuple[list[_StrayIke], _Diverted, bool]:
        """Return one burst from `engine`: IKE, everything else, and whether more may be queued."""
        strays: list[_StrayIke] = []
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
            except OSError as error:  # an ICMP error of an earlier send by this socket
                self._diversion.error(f"receive of ESP: {error}")
                break
            destination, segment_size, traffic_class = _read_ancillary(ancillary)
            whole, size = memoryview(data), segment_size or len(data) or 1
            segments = [(whole[start : start + size], source) for start in range(0, len(data) or 1, size)]
            if b"\0" in data[::size]:  # some may be IKE
                strays += [(datagram, source, destination) for datagram, _ in segments if _is_ike(datagram)]
                segments = [segment for segment in segments if not _is_ike(segment[0])]
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
            queue.shedding()  # again: once the filter drops everything, no datagram would bring us here
        return strays, (diverted, traffic_classes), more

    def _hand_back(self, datagram: memoryview, source: Address, destination: Destination | None) -> None:
        """Return IKE that came to an ESP socket to the application.

        It comes there coalesced with ESP by GRO, and between the join of the ESP socket and the program.
        """
        diversion = self._diversion
        if bytes(datagram[: len(diversion.hand_back.prefix)]) == diversion.hand_back.prefix:
            diversion.error("an envelope came to the socket of ESP: another program steers this port")
        elif destination is None:
            pass  # multicast or broadcast: the application has its own copy
        elif self._way is None:
            diversion.error(f"IKE that came to the socket of ESP was lost: {self.no_hand_back}")
        else:
            try:
                self._way.send(diversion.hand_back.wrap(datagram[MARKER_LENGTH:], source, destination))
            except OSError as error:
                diversion.error(f"IKE could not be handed back: {error}")
            else:
                diversion.counters.handed_back += 1

    def _drain(self, engine: socket.socket) -> None:
        """Close `engine`, and take what is queued: it came while the option was on."""
        strays: list[_StrayIke] = []
        with engine:
            more, bursts = True, 0
            while more and bursts < 64:  # a peer may send ESP without end
                ike, diverted, more = self._receive(engine)
                strays += ike
                self._diversion.take(*diverted)
                bursts += 1
        for stray in strays:  # the application's socket is now the only one that can receive them
            self._hand_back(*stray)


def refusal(sock: socket.socket) -> str:
    """Return why the bound `sock` must not be steered; empty if it may."""
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
    if sock.getsockopt(socket.IPPROTO_IP, IP_TRANSPARENT) or (
        v6 and sock.getsockopt(socket.IPPROTO_IPV6, IPV6_TRANSPARENT)
    ):
        # nf_tproxy_get_sock_v4() looks the socket up without the packet, so no program decides
        return "the application set IP_TRANSPARENT, and TPROXY gives ESP to any socket of a group"
    return ""


def _detach_program(sock: socket.socket) -> None:
    # before Linux 5.3 it stays; alone in its group a socket ignores it
    with contextlib.suppress(OSError):
        filters.detach_steering(sock)


def _is_ike(datagram: memoryview) -> bool:
    return datagram[:MARKER_LENGTH] == NON_ESP_MARKER


def _read_ancillary(ancillary: list[tuple[int, int, bytes]]) -> tuple[Destination | None, int, int]:
    """Return the destination of a datagram, the size of its segments in bytes, and its traffic class.

    The destination of multicast and broadcast is None; the size of a datagram in one piece is 0.
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
