"""The carrier in C: threads between the sockets that ESP is steered to and a TUN, without the GIL.

Python decides what C hands up (`ffi/loop/loop.h`), and carries by itself what the loop cannot serve:
endpoints in line, devices that are no TUN.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import weakref
from collections.abc import Mapping, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from itertools import repeat
from typing import Any, Final

from natcompat.backends.base import SocketReader, TakeBurst
from natcompat.backends.diversion import Diversion
from natcompat.backends.hand_back import HandBack
from natcompat.backends.linux_sockets.reading import SocketsOfThread
from natcompat.errors import NatCompatError, get_logger
from natcompat.esp.carrier.portable import PortableCarrier
from natcompat.esp.datapath.compiled import ffi, lib
from natcompat.esp.datapath.native import NativeDataPath
from natcompat.esp.datapath.native_association import ENDPOINT
from natcompat.esp.device.queue import LARGEST_PACKET
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.results import Opened, Reason
from natcompat.ipsec.device import PacketDevice
from natcompat.kernel.requests import SO_RCVBUFFORCE

_log = get_logger()

# linux/if_tun.h
_CHECKSUMS_AND_TSO: Final = 0x01 | 0x02 | 0x04 | 0x08  # TUN_F_CSUM, _TSO4, _TSO6, _TSO_ECN
_USO: Final = 0x20 | 0x40  # TUN_F_USO4, _USO6: Linux 6.2

_RECEIVE_BUFFER: Final = 4 << 20
"""Bytes for each socket that ESP is steered to: a flight of a few milliseconds at full speed."""

_AT_ONCE: Final = 256
"""Events that are collected before Python works on them."""

_KINDS: Final = {
    lib.MERGE_TCP4: "TCP over IPv4",
    lib.MERGE_TCP6: "TCP over IPv6",
    lib.MERGE_UDP4: "UDP over IPv4",
    lib.MERGE_UDP6: "UDP over IPv6",
}
_REASONS: Final = {"unwritten": Reason.DEVICE, "malformed": Reason.MALFORMED, "events_lost": Reason.QUEUE}
_SOCKET_REASONS: Final = {"unsent": Reason.SEND, "shed": Reason.QUEUE}
_COUNTED: Final = ("esp", "keepalives", "runts", "handed_back", "errors")
"""What of a socket's counters is in `natcompat.backends.diversion.Counters`, under the same name."""


class NativeCarrier(PortableCarrier):
    """A `Carrier` in C where the device is a TUN with `vnet_header`; with others the portable one.

    `engines` sockets of an endpoint share its ESP, by SPI, and the threads share these.
    """

    name = "c"
    last_error: OSError | None

    def __init__(self, engine: EspEngine, device: PacketDevice) -> None:
        """ENOMEM, EMFILE: the system has not what the loop needs."""
        super().__init__(engine, device)
        if not isinstance(engine.path, NativeDataPath):
            raise TypeError("the carrier in C takes an engine with the data path in C")
        self.threads: int = receiving_threads()
        self.engines: int = max(self.engines, self.threads)
        self._path = engine.path
        self.readers: set[_LoopReader] = set()
        self._finished = {**dict.fromkeys(_REASONS, 0), **dict.fromkeys(_SOCKET_REASONS, 0)}
        self.in_use: threading.RLock = threading.RLock()
        """Held by who calls the loop, so that it is not freed meanwhile; not by the reading thread."""
        self.refused_offloads: dict[str, str] = {}
        """Kinds of coalesced packets that the TUN has refused, with the kernel's reason."""
        self.loop: Any = None
        if getattr(device, "vnet_header", False):
            self.loop = lib.loop_new(self._path.path, 1 + self.threads)
            if not self.loop:
                raise NatCompatError(ffi.errno, f"the loop in C cannot be made: {os.strerror(ffi.errno)}")
            self._path.count_also(self._drops)
            _alive.add(self)

    def start(self) -> None:
        """Start the threads. Raises what `TunDevice.set_offload` raises, EAGAIN: too many threads."""
        if self.loop is not None:
            try:
                self._start_loop()
            except BaseException:
                self.close()
                raise
        super().start()

    def _start_loop(self) -> None:
        device: Any = self._device
        failed = lib.loop_set_tun(self.loop, device.fileno(), _take_over_offload(device))
        failed = failed or lib.loop_start(self.loop)
        if failed:
            raise NatCompatError(failed, f"the loop in C cannot be started: {os.strerror(failed)}")

    def close(self) -> None:
        """End the threads and wait for them; sockets that are still read are left to Python."""
        with self.in_use:
            if self.loop is not None:
                self._ended = True
                for reader in list(self.readers):
                    reader.leave_to_python()
                lib.loop_stop(self.loop)
        super().close()
        with self.in_use:
            loop, self.loop = self.loop, None
            if loop is not None:
                self._note(loop)
                lib.loop_free(loop)
                with contextlib.suppress(OSError, AttributeError):
                    self._device.set_offload(0)  # type: ignore[attr-defined]

    def read_sockets(
        self, sockets: Sequence[socket.socket], diversion: Diversion, take: TakeBurst
    ) -> SocketReader | None:
        """Read `sockets`, to which ESP is steered, in C, or where there is no loop, as the portable one."""
        with self.in_use:
            if self.loop is None or self._ended:
                return super().read_sockets(sockets, diversion, take)
            return _LoopReader(self, sockets, diversion, take)

    # --- what C hands up

    def _watch(self) -> None:
        if self.loop is None:
            super()._watch()
            return
        event, packet = ffi.new("struct loop_event *"), ffi.new("uint8_t[]", LARGEST_PACKET + 64)

        def see_to(_: int) -> None:
            self._take_events(event, packet)
            # behind what makes the descriptor unreadable: what becomes due later wakes again
            with contextlib.suppress(NatCompatError):  # the engine was closed meanwhile
                self._path.see_to_due()

        self._thread.add(lib.loop_event_descriptor(self.loop), see_to)

    def _take_events(self, event: Any, packet: Any) -> None:
        """See to what C has handed up, a part of it if it is much."""
        sealed, inner, esp, sources, classes = [], [], [], [], []
        opened: list[bytes] = []
        now = time.time()
        for _ in range(_AT_ONCE):
            if not lib.loop_next_event(self.loop, event, packet, len(packet)):
                break
            if event.kind == lib.LOOP_TUN_GONE:
                reason = os.strerror(event.length)
                _log.error("the TUN device is gone, nothing passes it any more: %s", reason)
                self.last_error = OSError(event.length, reason)
                continue
            if event.kind == lib.LOOP_REFUSED:
                self._note_refusal(event.length, event.sa)
                continue
            octets = bytes(ffi.buffer(packet, event.length))
            match event.kind:
                case lib.LOOP_SEAL | lib.LOOP_TOO_BIG:
                    inner.append(octets)
                case lib.LOOP_OPEN:
                    esp.append(memoryview(octets))
                    sources.append(_address(event.peer))
                    classes.append(event.traffic_class)
                case lib.LOOP_ADMIT:
                    result = self._path.admit(event.sa, octets, now)
                    if isinstance(result, Opened):
                        opened.append(result.inner)
                case lib.LOOP_SEND:
                    destination = self._path.destination_of(
                        event.sa, event.traffic_class, bool(event.dont_fragment)
                    )
                    if destination is not None:
                        sealed.append((octets, destination))
        if opened:
            self._engine.count(Reason.DEVICE, len(opened) - self._device.write_burst(opened))
        if esp:
            self.inbound(list(zip(esp, sources, strict=True)), classes)
        if inner:
            self._carry(inner)
        if sealed:
            self._send(zip(sealed, repeat(None)))

    def _note_refusal(self, kind: int, error: int) -> None:
        name = _KINDS.get(kind, str(kind))
        self.refused_offloads[name] = os.strerror(error)
        _log.warning(
            "the TUN device refuses coalesced packets (%s: %s): they are written one by one from now on",
            name,
            os.strerror(error),
        )

    # --- counters

    def _drops(self) -> Mapping[Reason, int]:
        """Return what the loop had to drop."""
        with self.in_use:
            counted = dict(self._finished)
            if self.loop is not None:
                whole = ffi.new("struct loop_counters *")
                lib.loop_read_counters(self.loop, whole)
                for name in _REASONS:
                    counted[name] += getattr(whole, name)
                for reader in list(self.readers):
                    for name, count in reader.counters().items():
                        if name in _SOCKET_REASONS:
                            counted[name] += count
        result: dict[Reason, int] = {}
        for name, reason in {**_REASONS, **_SOCKET_REASONS}.items():
            result[reason] = result.get(reason, 0) + counted[name]
        return result

    def _note(self, loop: Any) -> None:
        whole = ffi.new("struct loop_counters *")
        lib.loop_read_counters(loop, whole)
        for name in _REASONS:
            self._finished[name] += getattr(whole, name)

    def reader_ended(self, reader: _LoopReader, counters: Mapping[str, int]) -> None:
        """Keep the counters of a reader that has left the loop."""
        self.readers.discard(reader)
        for name in _SOCKET_REASONS:
            self._finished[name] += counters[name]

    def after_fork(self) -> None:
        """In a forked child: the threads are the parent's, and so is what they share."""
        self.in_use = threading.RLock()
        loop, self.loop = self.loop, None
        if loop is not None:
            lib.loop_abandon(loop)


class _LoopReader:
    """The sockets of one endpoint in the loop; a `SocketReader`."""

    def __init__(
        self,
        carrier: NativeCarrier,
        sockets: Sequence[socket.socket],
        diversion: Diversion,
        take: TakeBurst,
    ) -> None:
        """`take` takes a burst in Python instead."""
        self._carrier = carrier
        self._sockets = list(sockets)
        self._diversion = diversion
        self._take = take
        self._pid = os.getpid()
        self._python: SocketReader | None = None
        self._numbers: list[int] = []
        self._told = dict.fromkeys(_COUNTED, 0)
        try:
            for index, sock in enumerate(self._sockets):
                self._numbers.append(self._add(sock, 1 + index % carrier.threads))
        except BaseException:
            self._leave()
            raise
        carrier.readers.add(self)

    def _add(self, sock: socket.socket, thread: int) -> int:
        for option in (
            SO_RCVBUFFORCE,
            socket.SO_RCVBUF,
        ):  # without CAP_NET_ADMIN net.core.rmem_max is the limit
            with contextlib.suppress(OSError):
                if sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) < 2 * _RECEIVE_BUFFER:
                    sock.setsockopt(socket.SOL_SOCKET, option, _RECEIVE_BUFFER)
        way = c_hand_back(self._diversion.hand_back)
        number = lib.loop_add_socket(self._carrier.loop, sock.fileno(), thread, _bound(sock), way)
        if number < 0:
            raise OSError(-number, os.strerror(-number))
        return int(number)

    def counters(self) -> dict[str, int]:
        """Return what C has counted of these sockets. They are in the loop, and its lock is held."""
        total: dict[str, int] = {}
        each = ffi.new("struct loop_socket_counters *")
        for number in self._numbers:
            lib.loop_read_socket_counters(self._carrier.loop, number, each)
            for name, _ in ffi.typeof(each).item.fields:
                total[name] = total.get(name, 0) + getattr(each, name)
        return total

    def count(self) -> None:
        """Bring the counters of the endpoint up to date."""
        with self._carrier.in_use:
            if self._python is None:
                if self._numbers and os.getpid() == self._pid:
                    self._tell(self.counters())
                return
        self._python.count()

    def _tell(self, counters: Mapping[str, int]) -> None:
        for name in _COUNTED:
            more, self._told[name] = counters[name] - self._told[name], counters[name]
            setattr(self._diversion.counters, name, getattr(self._diversion.counters, name) + more)

    def leave_to_python(self) -> None:
        """The loop ends, and these sockets are not closed yet. The carrier's lock is held."""
        self._leave()
        self._python = SocketsOfThread(self._sockets, self._take)

    def close(self) -> None:
        """Take the sockets out of the loop; no thread touches them any more."""
        with self._carrier.in_use:
            if self._python is None:
                self._leave()
                return
        self._python.close()

    def abandon(self) -> None:
        """Likewise, and close them. In a forked child nothing but the child's descriptors."""
        with self._carrier.in_use:
            if self._python is None:
                self._leave()
                for sock in self._sockets:
                    sock.close()
                return
        self._python.abandon()

    def _leave(self) -> None:
        if os.getpid() != self._pid or self._carrier.loop is None:
            return
        last = dict.fromkeys((*_COUNTED, *_SOCKET_REASONS), 0) | self.counters()
        for number in self._numbers:
            lib.loop_remove_socket(self._carrier.loop, number)
        self._numbers = []
        self._tell({name: max(last[name], self._told[name]) for name in _COUNTED})
        self._carrier.reader_ended(self, last)


def receiving_threads() -> int:
    """Return how many threads should receive: with few processors the kernel's half needs the others."""
    return min(4, max(1, (os.cpu_count() or 1) // 4))


def _take_over_offload(device: Any) -> int:
    """Let the kernel leave segmentation and checksums to us; return the kinds of super-packets it takes."""
    tcp: int = lib.MERGE_TCP4 | lib.MERGE_TCP6
    with contextlib.suppress(NatCompatError):
        on = device.set_offload(_CHECKSUMS_AND_TSO | _USO)
        return tcp | int(lib.MERGE_UDP4 | lib.MERGE_UDP6) if on & _USO else tcp
    device.set_offload(_CHECKSUMS_AND_TSO)
    return tcp


def _bound(sock: socket.socket) -> Any:
    """Return the address of `sock` as C has it."""
    host, port = sock.getsockname()[:2]
    address = ip_address(host.partition("%")[0])
    mapped = getattr(address, "ipv4_mapped", None)
    bound = ffi.new("struct loop_address *")
    bound.family, bound.any = sock.family, address.is_unspecified
    if sock.family == socket.AF_INET6 and address.is_unspecified:
        bound.both = not sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)
    address = mapped or address
    packed = ENDPOINT.pack(address.packed, port, address.version)
    ffi.memmove(ffi.addressof(bound.address), packed, ENDPOINT.size)
    return bound


def c_hand_back(hand_back: HandBack) -> Any:
    """Return the way of IKE back to the application as C has it; NULL without one."""
    if hand_back.way is None:
        return ffi.NULL
    host, port = hand_back.way.address[:2]
    way = ffi.new("struct loop_hand_back *")
    way.descriptor, way.family, way.port = hand_back.way.sock.fileno(), hand_back.family, port
    ffi.memmove(way.address, packed := socket.inet_pton(hand_back.family, host), len(packed))
    tag, key, way.sender = hand_back.parameters()
    ffi.memmove(way.tag, tag, len(tag))
    ffi.memmove(way.key, key, len(key))
    return way


def _address(peer: Any) -> tuple[str, int]:
    packed = bytes(peer.address)
    return str(IPv4Address(packed[:4]) if peer.version == 4 else IPv6Address(packed)), peer.port


_alive: weakref.WeakSet[NativeCarrier] = weakref.WeakSet()


def _after_fork() -> None:
    for carrier in list(_alive):
        carrier.after_fork()


os.register_at_fork(after_in_child=_after_fork)
