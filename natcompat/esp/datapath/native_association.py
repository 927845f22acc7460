"""SAs whose state is in C. Each object owns its C structure."""

from __future__ import annotations

import os
import threading
from array import array
from collections.abc import Callable, Sequence
from ipaddress import IPv4Address, IPv6Address, ip_address
from struct import Struct, error
from typing import Any, Final

from natcompat.esp.datapath.compiled import ffi, lib
from natcompat.esp.engine.association import (
    MOVED,
    UNLIMITED,
    Address,
    Association,
    Inbound,
    Link,
    Outbound,
    ports_of,
)
from natcompat.esp.engine.packet import Flow
from natcompat.esp.engine.results import DROPPED, Destination, Dropped
from natcompat.ipsec import Direction, IPAddress, SecurityAssociation, Usage

ENDPOINT: Final = Struct("=16sHBx")
"""struct esp_endpoint"""

_FLOW: Final = Struct("=16s16sHHBBxx")
"""struct esp_flow"""

NOWHERE: Final = ENDPOINT.pack(b"", 0, 0)

RESULTS: Final = dict(enumerate(DROPPED.values(), 1))
"""Reasons by their numbers in C."""

unzeroed: Final = ffi.new_allocator(should_clear_after_alloc=False)


def _endpoint(address: IPAddress, port: int) -> bytes:
    return ENDPOINT.pack(address.packed, port, address.version)


def endpoint_of(source: Address) -> bytes:
    """Return a socket address as C has it; `NOWHERE` if it is none."""
    try:
        address: IPAddress = ip_address(str(source[0]).partition("%")[0])
        if isinstance(address, IPv6Address):
            address = address.ipv4_mapped or address
        return _endpoint(address, int(source[1]))
    except (ValueError, IndexError, TypeError, error):
        return NOWHERE


class NativeAssociation(Association):
    """An SA whose state is in C; this object owns it."""

    __slots__ = ("_state",)

    _state: Any

    def __init__(self, state: Any, sa: SecurityAssociation, link: Link) -> None:
        self._state = state
        super().__init__(sa, link)

    def __del__(self, free: Callable[[Any], None] = lib.esp_sa_free) -> None:
        free(self._state)

    @property
    def state(self) -> Any:
        """The C structure (`struct esp_sa *`), valid as long as this object."""
        return self._state

    def _usage(self) -> Any:
        usage = unzeroed("struct esp_usage *")
        lib.esp_sa_usage(self._state, usage)
        return usage

    @property
    def due(self) -> int:
        """Return what the engine has to act on: bits SOFT, HARD, MOVED."""
        return int(self._usage().due)

    @property
    def moved(self) -> bool:
        """Whether the newest authentic packet came from another address than that of the SA."""
        return bool(self._usage().moved)

    @property
    def gone(self) -> bool:
        """Whether this SA is over."""
        return bool(self._usage().gone)

    @property
    def soft(self) -> bool:
        """Whether this SA has reached a soft limit."""
        return bool(self._usage().soft)

    @property
    def serial(self) -> int:
        """The number with which C marks packets of this SA."""
        return int(self._usage().serial)

    @property
    def highest(self) -> int:
        """The sequence number of the last packet sent, or the highest received."""
        return int(self._usage().sequence)

    def place(self, sa: SecurityAssociation, link: Link) -> None:
        """Take the addresses and ports of `sa`."""
        super().place(sa, link)
        peer, own = sa.source, sa.destination
        if sa.direction is Direction.OUT:
            peer, own = own, peer
        local_port, remote_port = ports_of(sa)
        places = _endpoint(peer, remote_port), _endpoint(own, local_port)
        lib.esp_sa_place(self._state, *(ffi.from_buffer("struct esp_endpoint *", each) for each in places))

    def expire(self, *, hard: bool) -> None:
        """Note that a limit is reached."""
        lib.esp_sa_expire(self._state, hard)

    def take_due(self) -> tuple[int, Address]:
        """Return the bits of `due`, and with MOVED the new (address, port); clear them."""
        moved_to = ffi.new("struct esp_endpoint *")
        due = lib.esp_sa_take_due(self._state, moved_to)
        if not due & MOVED:
            return due, ()
        packed = bytes(moved_to.address)
        address = IPv4Address(packed[:4]) if moved_to.version == 4 else IPv6Address(packed)
        return due, (address, int(moved_to.port))

    def retire(self) -> None:
        """End this SA."""
        lib.esp_sa_retire(self._state)

    def usage(self) -> Usage:
        """Return the counters."""
        now = self._usage()
        last = now.last_used if now.packets else None
        name = "last_sent" if self.sa.direction is Direction.OUT else "last_received"
        return Usage(
            packets=now.packets,
            octets=now.octets,
            added=now.added,
            first_used=now.first_used if now.packets else None,
            last_used=last,
            replay_drops=now.replay_drops,
            window_drops=now.window_drops,
            integrity_drops=now.integrity_drops,
            sequence=now.sequence,
            **{name: last},
        )


class NativeInbound(NativeAssociation, Inbound):
    """An SA that opens packets."""

    __slots__ = ()

    def open_run(
        self, run: Sequence[bytes], source: Address, traffic_class: int, now: float
    ) -> list[bytes | Dropped]:
        """Return the inner packet of the first of `run`, as a burst would."""
        buffer = bytearray(run[0])
        one = ffi.new("struct esp_packet *")
        one.data, one.length, one.room = ffi.from_buffer(buffer), len(buffer), len(buffer)
        one.traffic_class = traffic_class
        ffi.memmove(ffi.addressof(one.peer), endpoint_of(source), ENDPOINT.size)
        result = lib.esp_sa_open(self._state, one, now)
        return [RESULTS[result] if result else bytes(ffi.buffer(one.data, one.length))]


class NativeOutbound(NativeAssociation, Outbound):
    """An SA that seals packets."""

    __slots__ = ("_ivs",)

    def draw_ivs(self, first: int) -> None:
        """Count IVs from `first` on, modulo 2**64."""
        self._ivs = ffi.new("uint64_t *", first % UNLIMITED)  # C counts it up as long as this SA lives
        lib.esp_sa_draw_ivs(self._state, self._ivs)

    def permit(self, number: int) -> None:
        """Allow sequence numbers up to `number`."""
        lib.esp_sa_permit(self._state, min(number, self.largest_number, UNLIMITED - 1))

    def seal_run(self, run: Sequence[bytes], now: float) -> list[tuple[bytes, Destination] | Dropped]:
        """Return the ESP packet for the first of `run`, as a burst would."""
        return [self._seal(lib.esp_sa_seal, run[0], now)]

    def seal_dummy(self, length: int, now: float) -> tuple[bytes, Destination] | Dropped:
        """Return a dummy packet with `length` bytes of payload."""
        return self._seal(lib.esp_sa_seal_dummy, os.urandom(length), now)

    def _seal(
        self, function: Callable[[Any, Any, float], int], payload: bytes, now: float
    ) -> tuple[bytes, Destination] | Dropped:
        room = max(len(payload), self.sa.tfc) + lib.ESP_TAILROOM
        buffer = unzeroed("uint8_t[]", lib.ESP_HEADROOM + room)
        one = ffi.new("struct esp_packet *")
        one.data, one.length, one.room = buffer + lib.ESP_HEADROOM, len(payload), room
        ffi.memmove(one.data, payload, len(payload))
        result = function(self._state, one, now)
        if result:
            return RESULTS[result]
        sealed = bytes(ffi.buffer(one.data, one.length))
        return sealed, self.destination(one.traffic_class, bool(one.dont_fragment))


class Register:
    """SAs by the serials that C marks packets with: a slot, and how often it has been taken."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._slots: list[Association | None] = []
        self._taken = array("I")
        self._free: list[int] = []

    def take(self) -> int:
        """Return a serial that nobody has."""
        with self._lock:
            if not self._free:
                self._free.append(len(self._slots))
                self._slots.append(None)
                self._taken.append(0)
            slot = self._free.pop()
            self._taken[slot] = (self._taken[slot] + 1) & 0x7FFF_FFFF
            return slot + 1 << 32 | self._taken[slot]

    def put(self, serial: int, association: Association) -> None:
        """Give `serial` to `association`."""
        self._slots[(serial >> 32) - 1] = association

    def give_back(self, serial: int) -> None:
        """The SA is over."""
        with self._lock:
            slot = (serial >> 32) - 1
            if self._taken[slot] == serial & 0xFFFF_FFFF:
                self._slots[slot] = None
                self._taken[slot] = (self._taken[slot] + 1) & 0x7FFF_FFFF
                self._free.append(slot)

    def get(self, serial: int) -> Association | None:
        """Return the SA with `serial`, if it is not over."""
        slot = (serial >> 32) - 1
        found = self._slots[slot]  # looked up first, else it might be the slot's next one
        return found if self._taken[slot] == serial & 0xFFFF_FFFF else None


def pack_flow(flow: Flow) -> Any:
    """Return a flow as C has it (`struct esp_flow *`)."""
    size = 4 if flow.version == 4 else 16
    packed = _FLOW.pack(
        flow.source.to_bytes(size),
        flow.destination.to_bytes(size),
        flow.source_port,
        flow.destination_port,
        flow.version,
        flow.protocol,
    )
    return ffi.from_buffer("struct esp_flow *", packed)
