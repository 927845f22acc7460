"""ESP packets on their way out: by which socket, from which address, with which header, many at once."""

from __future__ import annotations

import errno
import select
import socket
import struct
import sys
import threading
import time
from collections.abc import Sequence
from ipaddress import IPv6Address, ip_address
from typing import Final, NamedTuple, TypeAlias

from natcompat.backends.base import EspOutlet
from natcompat.esp.carrier.path_mtu import set_dont_fragment
from natcompat.esp.engine.results import Destination
from natcompat.ipsec import IPAddress

_Ancillary: TypeAlias = list[tuple[int, int, bytes]]

# linux/in.h, linux/in6.h, linux/udp.h; Python does not name them all
_IP_PKTINFO: Final = 8
_IPV6_PKTINFO: Final = 50
_IPV6_TCLASS: Final = 67
_UDP_SEGMENT: Final = 103
_MOST_SEGMENTS: Final = 64  # UDP_MAX_SEGMENTS
_LARGEST_RUN: Final = 65000  # bytes, so that it fits in one datagram of either IP version

PATIENCE: Final = 0.005
"""Seconds that a burst waits for room in the queues of sockets: ESP that comes waits as long to be read."""
_RECONSIDER: Final = 10.0  # seconds after which an address that this host does not have may be here

_LINUX: Final = sys.platform == "linux"


class Outcome(NamedTuple):
    """The outcome of sending packets."""

    too_long: list[int]
    """Which of them the path does not take; the others were sent, but for `lost`."""
    lost: int
    error: OSError | None
    """Why some are lost: the last reason."""


class Ways:
    """The endpoints by which ESP leaves. Any thread may call it."""

    def __init__(self) -> None:
        self._outlets: dict[EspOutlet, None] = {}
        self._ways: dict[tuple[int, str, int], Way] = {}

    def add(self, outlet: EspOutlet) -> None:
        """ESP may leave by `outlet`."""
        self._outlets[outlet] = None
        self._ways = {}  # who is finding a way now keeps it to himself

    def remove(self, outlet: EspOutlet) -> None:
        """End the use of an outlet. Takes no lock, since finalizers call it."""
        self._outlets.pop(outlet, None)
        self._ways = {}

    def forget(self) -> None:
        """Find all ways again."""
        self._ways = {}

    def find(self, destination: Destination) -> Way | None:
        """Return how packets to `destination` leave; None: no endpoint has their local port."""
        ways = self._ways
        version = 6 if ":" in destination[0] else 4
        key = destination.local_port, destination.source, version
        way = ways.get(key)
        if way is None or (way.until is not None and way.until < time.monotonic()):
            way = self._find(destination, version)
            if way is not None:
                ways[key] = way
        return way

    def socket(self, version: int) -> socket.socket | None:
        """Return some socket from which ESP over that version of IP leaves, None: there is none."""
        for outlet in list(self._outlets):
            try:
                sock = outlet.sock
                if sock.family == (socket.AF_INET6 if version == 6 else socket.AF_INET):
                    return sock
            except OSError:  # it was just closed
                continue
        return None

    def _find(self, destination: Destination, version: int) -> Way | None:
        fitting: list[tuple[int, EspOutlet]] = []
        for outlet in list(self._outlets):
            try:
                fitness = _fitness(outlet, destination, version)
            except OSError:  # it was just closed
                continue
            if fitness:
                fitting.append((fitness, outlet))
        if not fitting:
            return None
        best = max(fitting, key=lambda each: each[0])[1]
        try:
            return Way(best, destination.source, version)
        except OSError:
            return None


def _fitness(outlet: EspOutlet, destination: Destination, version: int) -> int:
    """Return how well `outlet` serves: 0, not at all; most, it has the address that the SA names."""
    host, port = outlet.address[:2]
    if port != destination.local_port:
        return 0
    address = ip_address(host.partition("%")[0])
    wildcard = address.is_unspecified
    if isinstance(address, IPv6Address):
        mapped: IPAddress | None = address.ipv4_mapped
        if mapped is not None:
            address = mapped
        elif version == 4 and (
            not wildcard or outlet.sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
        ):
            return 0
        elif version == 4:
            return 2
    if address.version != version:
        return 0
    if destination.source and address == ip_address(destination.source.partition("%")[0]):
        return 4
    return 3 if wildcard else 1


class Way:
    """Sends the ESP of one local port, one source address and one IP version. Thread-safe."""

    def __init__(self, outlet: EspOutlet, source: str, version: int) -> None:
        """`source`: where to send from if the socket has not one address; empty: the system chooses."""
        self.until: float | None = None
        """When to look for a better one (monotonic clock); None: this one is as the SA wants it."""
        self._outlet = outlet
        self._version = version
        self._mapped = version == 4 and outlet.sock.family == socket.AF_INET6
        self._source: _Ancillary = []
        self._lock = threading.Lock()
        self._dont_fragment: bool | None = None
        self._segments = _LINUX and outlet.own
        if _LINUX and source and ip_address(outlet.address[0].partition("%")[0]).is_unspecified:
            if _is_local(source):
                self._source = [_source_option(source, mapped=self._mapped)]
            else:
                self.until = time.monotonic() + _RECONSIDER

    def send(self, packets: Sequence[bytes], destination: Destination, patience: float = PATIENCE) -> Outcome:
        """Send `packets` in order, each by itself in the end, with the header that `destination` says.

        `patience`: seconds that it may wait for room, once.
        """
        address = (f"::ffff:{destination[0]}", destination[1]) if self._mapped else destination
        ancillary = self._header(destination.traffic_class)
        too_long: list[int] = []
        lost, error = 0, None
        patient = patience > 0
        start, one_by_one = 0, 0  # up to which packet segmentation was refused
        lengths = list(map(len, packets))
        with self._lock:
            self._set_dont_fragment(destination.dont_fragment)
            while start < len(packets):
                end = _run(lengths, start) if self._segments and start >= one_by_one else start + 1
                try:
                    if end - start == 1:
                        self._outlet.sendmsg([packets[start]], ancillary, address)
                    else:
                        size = struct.pack("=H", lengths[start])
                        segments = [*ancillary, (socket.IPPROTO_UDP, _UDP_SEGMENT, size)]
                        self._outlet.sendmsg(packets[start:end], segments, address)
                except OSError as failure:
                    if end - start > 1 and failure.errno in _SEGMENTS_REFUSED:
                        one_by_one = end
                        self._segments = _SEGMENTS_REFUSED[failure.errno]
                        continue
                    if failure.errno in _NO_ROOM and patient:
                        patient = False
                        _wait_writable(self._outlet.sock, patience)
                        continue
                    if failure.errno == errno.EMSGSIZE:
                        too_long.append(start)
                    else:
                        lost, error = lost + end - start, failure
                start = end
        return Outcome(too_long, lost, error)

    def _header(self, traffic_class: int) -> _Ancillary:
        """Return what says which traffic class and source the header is to have."""
        # a socket of the application's may have a class of its own
        if not _LINUX or (not traffic_class and self._outlet.own):
            return self._source
        option = (socket.IPPROTO_IP, socket.IP_TOS) if self._version == 4 else _TRAFFIC_CLASS
        return [*self._source, (*option, struct.pack("=i", traffic_class))]

    def _set_dont_fragment(self, on: bool) -> None:
        if self._outlet.own and on is not self._dont_fragment:
            set_dont_fragment(self._outlet.sock, on)
            self._dont_fragment = on


_TRAFFIC_CLASS: Final = (socket.IPPROTO_IPV6, _IPV6_TCLASS)

_SEGMENTS_REFUSED: Final[dict[int | None, bool]] = {
    errno.EMSGSIZE: True,
    errno.EINVAL: True,  # as EMSGSIZE on older kernels
    errno.EIO: False,  # this way cannot, such as through the kernel's own IPsec
    errno.EOPNOTSUPP: False,
    errno.ENOPROTOOPT: False,
}
"""What the system answers that would send a single packet; whether it is worth another try."""

_NO_ROOM: Final = (errno.EAGAIN, errno.EWOULDBLOCK, errno.ENOBUFS)


def _run(lengths: list[int], start: int) -> int:
    """Return the end of the run from `start` on that one send takes: only the last may be shorter."""
    size = lengths[start]
    most = min(start + max(1, min(_MOST_SEGMENTS, _LARGEST_RUN // size)), len(lengths))
    run = lengths[start:most]
    if run.count(size) == len(run):
        return most
    end = start + next(index for index, length in enumerate(run) if length != size)
    return end + 1 if lengths[end] < size else end


def _is_local(host: str) -> bool:
    """Tell whether `host` is an address of this host, so that a packet may leave from it."""
    if ip_address(host.partition("%")[0]).is_unspecified:
        return False
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind((host, 0))
    except OSError:
        return False
    return True


def _source_option(source: str, *, mapped: bool) -> tuple[int, int, bytes]:
    host, _, interface = source.partition("%")
    address = ip_address(host)
    if address.version == 4 and not mapped:
        return socket.IPPROTO_IP, _IP_PKTINFO, struct.pack("=i4s4s", 0, address.packed, bytes(4))
    packed = bytes(10) + b"\xff\xff" + address.packed if mapped else address.packed
    index = socket.if_nametoindex(interface) if interface else 0
    return socket.IPPROTO_IPV6, _IPV6_PKTINFO, struct.pack("=16si", packed, index)


def _wait_writable(sock: socket.socket, seconds: float) -> None:
    if hasattr(select, "poll"):
        poller = select.poll()
        poller.register(sock.fileno(), select.POLLOUT)
        poller.poll(seconds * 1000)
    else:
        select.select([], [sock], [], seconds)
