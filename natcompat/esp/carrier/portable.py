"""Moves packets in Python: ESP from the endpoints to the packet device, inner packets from there to ESP."""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from typing import Final, Protocol, TypeAlias

from natcompat.backends.base import Address, EspOutlet, SocketReader, TakeBurst
from natcompat.backends.diversion import Diversion
from natcompat.backends.linux_sockets.reading import POLLERR, POLLHUP, ReadingThread, SocketsOfThread
from natcompat.errors import NatCompatError, get_logger
from natcompat.esp.carrier.mtu import PathMtus, TooBigReplies, may_fragment
from natcompat.esp.carrier.path_mtu import kernel_path_mtu
from natcompat.esp.carrier.sending import PATIENCE, Outcome, Way, Ways
from natcompat.esp.engine.data_path import Sealed
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.results import Destination, Dropped, Opened, Reason
from natcompat.ipsec import SecurityAssociation
from natcompat.ipsec.device import PacketDevice, SaDevice
from natcompat.kernel.requests import SO_RCVBUFFORCE

_log = get_logger()

BURST: Final = 64
"""Inner packets that are sealed and sent before something else has its turn."""


QUEUE: Final = 1 << 20
"""Bytes of each queue of a socket of ESP's: some hundred packets, so that a burst finds room."""

_SO_SNDBUFFORCE: Final = 32  # include/uapi/asm-generic/socket.h


HandBack: TypeAlias = Callable[[Sequence[bytes], Sequence[object]], object]


class Carrier(Protocol):
    """Moves packets: ESP sockets -> engine -> device, device -> engine -> ESP sockets, until closed."""

    last_error: OSError | None
    """Why the system did not send a packet, the last time it did not."""
    paths: PathMtus
    """What is known of path MTUs."""
    hand_back: HandBack | None
    """Called with inner packets and what sealing them gave, to send those that no policy protects."""

    def start(self) -> None:
        """Begin."""
        ...

    def inbound(
        self, burst: list[tuple[memoryview, Address]], traffic_classes: list[int] | None = None
    ) -> None:
        """Take ESP that an endpoint diverted, as an `EspInbound`."""
        ...

    def read_sockets(
        self, sockets: Sequence[socket.socket], diversion: Diversion, take: TakeBurst
    ) -> SocketReader | None:
        """Return what reads `sockets`, as an `EspInbound`."""
        ...

    def attached(self, outlet: EspOutlet) -> None:
        """An endpoint hands its ESP to this carrier, and ESP may leave by it."""
        ...

    def detached(self, outlet: EspOutlet) -> None:
        """End the use of an outlet. Runs in finalizers, too."""
        ...

    def transmit(self, packets: list[Sealed]) -> None:
        """Send what the engine sends of its own accord: NAT-keepalives."""
        ...

    def close(self) -> None:
        """End, and wait until nothing moves any more. May be repeated."""
        ...


def widen(sock: socket.socket) -> None:
    """Give a socket of ESP's queues for the bursts that go through them, as far as the system permits."""
    for option, forced in ((socket.SO_RCVBUF, SO_RCVBUFFORCE), (socket.SO_SNDBUF, _SO_SNDBUFFORCE)):
        with contextlib.suppress(OSError):
            if sock.getsockopt(socket.SOL_SOCKET, option) >= 2 * QUEUE:  # Linux tells the double
                continue
            try:
                sock.setsockopt(socket.SOL_SOCKET, forced, QUEUE)
            except OSError:  # without CAP_NET_ADMIN, or elsewhere than on Linux
                sock.setsockopt(socket.SOL_SOCKET, option, QUEUE)


class PortableCarrier:
    """A `Carrier` in Python: one thread reads the sockets that ESP is steered to, and the device.

    Each has one burst moved in its turn, so that nothing waits long for its own. ESP of endpoints in line
    is opened in the thread that received it. What finds no room is dropped and counted: see
    `EspEngine.counters`.
    """

    engines: int = 4
    """Sockets of an endpoint that share its ESP by SPI. One burst is taken from each in its turn, so a peer
    whose flood fills the queue of one delays those with SPIs of the same socket only."""

    def __init__(self, engine: EspEngine, device: PacketDevice) -> None:
        self.last_error: OSError | None = None
        self.hand_back: HandBack | None = None
        self.paths: PathMtus = PathMtus(self._ask_path_mtu)
        self._engine = engine
        self._device = device
        self._sa_device: SaDevice | None = device if isinstance(device, SaDevice) else None
        self._ways = Ways()
        self._replies = TooBigReplies()
        self._ended = False
        self._pid = os.getpid()
        self._inside: set[int] = set()  # the threads that are opening packets
        self._thread = ReadingThread("natcompat-esp-path")
        self._joined: weakref.WeakSet[SocketsOfThread] = weakref.WeakSet()
        self._joining = threading.RLock()

    def start(self) -> None:
        """Start the thread."""
        self._watch()
        self._thread.start()

    def _watch(self) -> None:
        """Have it wait for what is to be sealed."""
        descriptor = self._device.fileno()
        if descriptor >= 0:  # else it was closed: nothing comes any more
            self._thread.add(descriptor, lambda events: self._take_inner(descriptor, events))

    def read_sockets(
        self, sockets: Sequence[socket.socket], diversion: Diversion, take: TakeBurst
    ) -> SocketReader | None:
        """Read `sockets`, to which ESP is steered, in the thread that also seals; None when it has ended."""
        with self._joining:
            if self._ended or os.getpid() != self._pid or not self._thread.alive:
                return None
            reader = SocketsOfThread(sockets, take, self._thread)
            self._joined.add(reader)
            return reader

    def attached(self, outlet: EspOutlet) -> None:
        """Let ESP leave by `outlet`."""
        if outlet.own:
            widen(outlet.sock)
        self._ways.add(outlet)

    def detached(self, outlet: EspOutlet) -> None:
        """Let it leave there no longer."""
        self._ways.remove(outlet)

    def inbound(
        self, burst: list[tuple[memoryview, Address]], traffic_classes: list[int] | None = None
    ) -> None:
        """Open a burst and give it to the device."""
        thread = threading.get_ident()
        self._inside.add(thread)
        try:
            if self._ended:
                self._engine.count(Reason.CLOSED, len(burst))
                return
            results = self._engine.open_burst(burst, traffic_classes)
            opened = [result for result in results if isinstance(result, Opened)]
            if opened:
                self._engine.count(Reason.DEVICE, len(opened) - self._deliver(opened))
        finally:
            self._inside.discard(thread)

    def _deliver(self, opened: list[Opened]) -> int:
        """Give opened packets to the device; return how many it took."""
        if self._sa_device is None:
            return self._device.write_burst([packet.inner for packet in opened])
        return sum(bool(self._sa_device.deliver(packet.inner, packet.sa)) for packet in opened)

    def transmit(self, packets: list[Sealed]) -> None:
        """Send keepalives."""
        if not self._ended:
            self._send(zip(packets, repeat(None)))

    def close(self) -> None:
        """End the thread and wait for it."""
        with self._joining:
            self._ended = True
            readers = list(self._joined)
            self._joined.clear()
        self._thread.end()
        if os.getpid() != self._pid:
            return  # the sockets are its parent's
        with contextlib.ExitStack() as each:  # whatever one of them raises
            for reader in readers:
                each.callback(self._thread.remove, (), reader.leave)
        while self._inside - {threading.get_ident()}:
            time.sleep(0.001)  # bursts are short

    # --- outbound

    def _take_inner(self, descriptor: int, events: int) -> None:
        """Seal and send what the device has, up to a burst."""
        try:
            burst = self._device.read_burst(BURST)
            if burst:
                self._carry(burst)
            elif events & (POLLERR | POLLHUP) or self._device.fileno() != descriptor:
                # it is gone, or closed, and would never be silent again
                self._thread.remove([descriptor])
        except Exception:  # noqa: BLE001 - somebody else's device
            self._thread.remove([descriptor])
            if not self._ended:
                _log.exception("the packet device failed; nothing is sealed any more")

    def _carry(self, burst: list[bytes]) -> None:
        sealed = self._engine.seal_burst(burst)
        if self.hand_back is not None:
            self.hand_back(burst, sealed)
        self._send(zip(sealed, burst, strict=True))

    def _send(self, packets: Iterable[tuple[Sealed | Dropped, bytes | None]]) -> None:
        """Send ESP packets, each with the inner packet that it carries: those to one destination together."""
        groups: dict[int, tuple[Destination, list[bytes], list[bytes | None]]] = {}
        for sealed, inner in packets:
            if len(sealed) == 2:  # else it was dropped, and counted
                octets, destination = sealed
                group = groups.get(id(destination))  # which the group keeps alive
                if group is None:
                    group = groups[id(destination)] = destination, [], []
                group[1].append(octets)
                group[2].append(inner)
        until = time.monotonic() + PATIENCE  # not for each destination anew
        for destination, outer, inners in groups.values():
            way = self._ways.find(destination)
            if way is None:
                self._engine.count(Reason.NO_ENDPOINT, len(outer))
                continue
            patience = until - time.monotonic()
            for each in self._try(way, outer, destination, patience).too_long:
                self._too_long(way, (outer[each], destination), inners[each])

    def _try(self, way: Way, packets: Sequence[bytes], destination: Destination, patience: float) -> Outcome:
        try:
            outcome = way.send(packets, destination, patience)
        except OSError as error:  # the socket was just closed
            outcome = Outcome([], len(packets), error)
        if outcome.error is not None:
            self.last_error = outcome.error
            self._engine.count(Reason.SEND, outcome.lost)
            self._ways.forget()  # addresses and endpoints may have changed
        return outcome

    # --- path MTU

    def _too_long(self, way: Way, packet: Sealed, inner: bytes | None) -> None:
        """The path does not take `packet`: have it fragmented, or tell who sent what is in it."""
        octets, destination = packet
        sa = self._association(octets, destination)
        if sa is not None and inner is not None:
            largest = self.paths.refused(sa, len(inner))
            if may_fragment(inner, largest):
                outcome = self._try(way, [octets], _fragmentable(destination), 0)
                if not outcome.too_long:
                    return
            else:
                message = self._replies.too_big(inner, largest)
                if message is not None:
                    self._device.write_burst([message])
        self._engine.count(Reason.PATH_MTU, 1)

    def _association(self, packet: bytes, destination: Destination) -> SecurityAssociation | None:
        try:
            return self._engine.outbound_sa(int.from_bytes(packet[:4]), destination)
        except NatCompatError:
            return None

    def _ask_path_mtu(self, host: str) -> int | None:
        return kernel_path_mtu(host, self._ways.socket(6 if ":" in host else 4))


def _fragmentable(destination: Destination) -> Destination:
    return Destination(
        *destination,
        local_port=destination.local_port,
        source=destination.source,
        traffic_class=destination.traffic_class,
    )
