"""Packet devices that need neither privilege nor a TUN: `QueueDevice` and `CallbackDevice`.

`QueueDevice` is for programs that carry inner packets themselves and wait for them, in threads or on
an event loop; `CallbackDevice` for those that want to be called. `natcompat.esp.device.tun.TunDevice` is the
operating system's.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
from collections import deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final, Self, TypeAlias

if TYPE_CHECKING:
    from asyncio import AbstractEventLoop

from natcompat.errors import get_logger

DEFAULT_MTU: Final = 1400
"""Bytes. Fits in ESP over UDP on Ethernet with every transform (see `natcompat.esp.carrier.mtu`)."""

LARGEST_PACKET: Final = 65535

Buffer: TypeAlias = bytes | bytearray | memoryview
"""What programs hand in; it is copied if it could change. What comes out is bytes."""

_log = get_logger()


class PacketQueue:
    """A bounded, thread-safe queue of packets with a descriptor to wait on.

    The descriptor is made when it is first asked for: an eventfd on Linux, else a socket.
    """

    def __init__(self, limit: int = 1024) -> None:
        """Hold `limit` packets at most."""
        if limit < 1:
            raise ValueError(f"limit: {limit} is not 1 or more")
        self.limit: int = limit
        self.drops: int = 0
        """Packets that were not taken, since the queue was full or closed."""
        self.closed: bool = False
        self._packets: deque[bytes] = deque()
        self._lock = threading.Lock()
        self._arrival = threading.Condition(self._lock)
        self._waiting = 0
        self._signal: _Signal | None = None

    def __len__(self) -> int:
        return len(self._packets)

    def fileno(self) -> int:
        """Return a descriptor that is readable while there are packets, and once it is closed.

        -1 when the close has been noticed, which is when `take_burst` is called after it.
        """
        with self._lock:
            if self._signal is None:
                if self.closed:
                    return -1
                self._signal = _Signal()
                if self._packets:
                    self._signal.set()
            return self._signal.fileno()

    def put_burst(self, packets: Sequence[bytes]) -> int:
        """Append as many of `packets` as there is room for; return how many. Never waits."""
        with self._lock:
            room = 0 if self.closed else self.limit - len(self._packets)
            taken = packets if len(packets) <= room else packets[:room]
            count = len(taken)
            self.drops += len(packets) - count
            if count:
                if self._signal is not None and not self._packets:
                    self._signal.set()
                self._packets.extend(taken)
                if self._waiting:
                    self._arrival.notify(count)
        return count

    def take_burst(self, most: int = 64) -> list[bytes]:
        """Return up to `most` packets, oldest first; never waits."""
        with self._lock:
            return self._take(most)

    def get(self, timeout: float | None = None) -> bytes | None:
        """Wait for a packet, `timeout` seconds at most; None: none came, or the queue is closed and empty."""
        with self._lock:
            self._waiting += 1
            try:
                self._arrival.wait_for(lambda: self._packets or self.closed, timeout)
            finally:
                self._waiting -= 1
            taken = self._take(1)
            return taken[0] if taken else None

    def _take(self, most: int) -> list[bytes]:
        packets = self._packets
        if len(packets) <= most:
            taken = list(packets)
            packets.clear()
        else:
            taken = [packets.popleft() for _ in range(most)]
        if not packets and self._signal is not None:
            if self.closed:
                self._signal.close()
            elif taken:
                self._signal.clear()
        return taken

    def close(self) -> None:
        """Take no more packets, and wake who waits; what is in the queue can still be taken.

        The descriptor becomes readable and stays open until `take_burst` finds nothing, or this
        object goes: who waits on it in another thread would not notice that it is closed.
        """
        with self._lock:
            if self.closed:
                return
            self.closed = True
            self._arrival.notify_all()
            if self._signal is not None and not self._packets:
                self._signal.set()


class QueueDevice:
    """Two queues, for a program that takes opened packets and hands in those to be sealed.

    `put` goes to ESP, `get` and `receive` return what came from there::

        device = QueueDevice()
        device.put(packet)  # an IP packet, to be sealed
        packet = device.get(timeout=5)  # one that was opened

    What is full drops, and never holds up the other side: see `outbound.drops` and `inbound.drops`.
    """

    def __init__(self, mtu: int = DEFAULT_MTU, limit: int = 1024) -> None:
        """Hold `limit` packets at most in each direction."""
        self.mtu: int = mtu
        self.outbound: PacketQueue = PacketQueue(limit)
        """What waits to be sealed."""
        self.inbound: PacketQueue = PacketQueue(limit)
        """What has been opened; its `fileno()` can be waited on."""

    # --- the program's side

    def put(self, packet: Buffer) -> bool:
        """Hand in an IP packet to be sealed; False: it was dropped, since too many wait or this is closed."""
        return self.outbound.put_burst((_checked(packet),)) == 1

    def get(self, timeout: float | None = None) -> bytes | None:
        """Wait for an opened packet, `timeout` seconds at most; None: none came, or this is closed."""
        return self.inbound.get(timeout)

    def receive(self, most: int = 64) -> list[bytes]:
        """Return opened packets that are there, oldest first; never waits. See `inbound.fileno()`."""
        return self.inbound.take_burst(most)

    # --- the side of ESP

    def fileno(self) -> int:
        """Return a descriptor that is readable while `read_burst` has something."""
        return self.outbound.fileno()

    def read_burst(self, most: int = 64) -> list[bytes]:
        """Return packets to be sealed."""
        return self.outbound.take_burst(most)

    def write_burst(self, packets: Sequence[bytes]) -> int:
        """Take opened packets."""
        return self.inbound.put_burst(packets)

    def close(self) -> None:
        """Take no more packets, and wake who waits for some. What waits can still be taken."""
        self.outbound.close()
        self.inbound.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class CallbackDevice:
    """Calls `deliver` with every burst of opened packets; `send` hands in those to be sealed.

    `deliver` runs in the thread that opens packets, and holds it up: it should not wait. With `loop`, an
    asyncio event loop, it runs there (`loop.call_soon_threadsafe`), in the order of the packets. What it
    raises is logged and counted, and goes no further.
    """

    def __init__(
        self,
        deliver: Callable[[list[bytes]], object],
        mtu: int = DEFAULT_MTU,
        limit: int = 1024,
        *,
        loop: AbstractEventLoop | None = None,
    ) -> None:
        """Hold `limit` packets at most that are to be sealed, and with `loop` as many that wait for it."""
        self.mtu: int = mtu
        self.outbound: PacketQueue = PacketQueue(limit)
        """What waits to be sealed."""
        self.errors: int = 0
        """How often `deliver` raised."""
        self._deliver = deliver
        self._loop = loop
        self._inbound: PacketQueue | None = None if loop is None else PacketQueue(limit)
        """Opened packets that wait for the loop."""

    def send(self, packets: Sequence[Buffer]) -> int:
        """Hand in IP packets to be sealed; return how many were taken. The rest is dropped."""
        return self.outbound.put_burst([_checked(packet) for packet in packets])

    def fileno(self) -> int:
        """Return a descriptor that is readable while `read_burst` has something."""
        return self.outbound.fileno()

    def read_burst(self, most: int = 64) -> list[bytes]:
        """Return packets to be sealed."""
        return self.outbound.take_burst(most)

    def write_burst(self, packets: Sequence[bytes]) -> int:
        """Deliver opened packets."""
        if self.outbound.closed:
            return 0
        if not packets:
            return 0
        if self._loop is None or self._inbound is None:
            return len(packets) if self._call(list(packets)) else 0
        taken = self._inbound.put_burst(packets)
        if taken:
            try:
                self._loop.call_soon_threadsafe(self._deliver_waiting)
            except RuntimeError:  # the loop is closed
                self._inbound.take_burst(taken)
                return 0
        return taken

    def _deliver_waiting(self) -> None:
        """Deliver, in the loop, what has been opened since it was called last."""
        if self._inbound is not None and not self.outbound.closed:
            packets = self._inbound.take_burst(self._inbound.limit)
            if packets:
                self._call(packets)

    def _call(self, packets: list[bytes]) -> bool:
        try:
            self._deliver(packets)
        except Exception:  # noqa: BLE001 - the program's fault must not stop the flow of packets
            self.errors += 1
            _log.exception("the function that opened packets are delivered to raised")
            return False
        return True

    def close(self) -> None:
        """Deliver no more, take no more, and wake who waits."""
        self.outbound.close()
        if self._inbound is not None:
            self._inbound.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _checked(packet: Buffer) -> bytes:
    """Return `packet` as bytes of our own; what it holds is judged where it is sealed."""
    if len(packet) > LARGEST_PACKET:
        raise ValueError(f"no IP packet has {len(packet)} bytes")
    return packet if isinstance(packet, bytes) else bytes(packet)


class _Signal:
    """A descriptor that is readable while it is set. Not thread-safe."""

    def __init__(self) -> None:
        self._is_set = False
        self._pair: tuple[socket.socket, socket.socket] | None = None
        self._descriptor = -1
        if hasattr(os, "eventfd"):
            self._descriptor = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        else:
            self._pair = reader, writer = socket.socketpair()
            reader.setblocking(False)
            writer.setblocking(False)

    def fileno(self) -> int:
        return self._pair[0].fileno() if self._pair else self._descriptor

    def set(self) -> None:
        if self._is_set or self.fileno() < 0:
            return
        self._is_set = True
        if self._pair:
            self._pair[1].send(b"\0")
        else:
            os.eventfd_write(self._descriptor, 1)

    def clear(self) -> None:
        if not self._is_set:
            return
        self._is_set = False
        if self._pair:
            self._pair[0].recv(1)
        else:
            os.eventfd_read(self._descriptor)

    def close(self) -> None:
        if self._pair:
            for each in self._pair:
                each.close()
        elif self._descriptor >= 0:
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # it was never made
            self.close()
