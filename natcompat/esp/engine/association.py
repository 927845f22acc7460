"""The state of one SA in Python, and what it does with a packet.

Everything that changes does so under the lock of the SA. What concerns others (expiries, a new
mapping) is noted in `due`, for the engine to act on when the lock is free.
"""

from __future__ import annotations

import os
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from ipaddress import IPv6Address, ip_address
from struct import Struct
from typing import Final

from natcompat.esp.engine import packet as packets
from natcompat.esp.engine.base import (
    HARD,
    MOVED,
    SOFT,
    UNLIMITED,
    Address,
    Association,
    Inbound,
    Link,
    Outbound,
)
from natcompat.esp.engine.crypto import HEADER_LENGTH, Cipher, make_cipher
from natcompat.esp.engine.replay import ReplayWindow
from natcompat.esp.engine.results import DROPPED, Destination, Dropped, Reason
from natcompat.ipsec import IPAddress, Mode, SecurityAssociation, Usage

_IV_MASK: Final = (1 << 64) - 1
_HEADER: Final = Struct("!II")
_HEADER_AND_IV: Final = Struct("!IIQ")
_TUNNELLED: Final = {packets.IPV4: 4, packets.IPV6: 6}
"""IP version by next header."""
_LARGEST_UDP: Final = {4: 65535 - 20 - 8, 6: 65535 - 8}


class PortableAssociation(Association):
    """What both directions have in common."""

    __slots__ = (
        "_esn",
        "_fixed",
        "_remainder",
        "_tunnel",
        "added",
        "cipher",
        "due",
        "first_used",
        "gone",
        "integrity_drops",
        "last_used",
        "lock",
        "moved_to",
        "next_bytes",
        "next_packets",
        "octets",
        "packets",
        "replay_drops",
        "soft",
        "window_drops",
    )
    highest: int
    """The sequence number of the last packet sent, or the highest received."""
    gone: bool
    soft: bool
    due: int
    packets: int
    octets: int
    replay_drops: int
    window_drops: int
    integrity_drops: int
    next_packets: int
    next_bytes: int

    def __init__(self, sa: SecurityAssociation, link: Link) -> None:
        self.cipher: Cipher = make_cipher(sa.encryption, sa.encryption_key, sa.integrity, sa.integrity_key)
        self.lock: threading.Lock = threading.Lock()
        self._fixed = HEADER_LENGTH + self.cipher.iv_length + self.cipher.icv_length
        self._remainder = self.cipher.block_length - 1  # blocks are powers of two
        self._esn, self._tunnel = sa.esn, sa.mode is Mode.TUNNEL
        self.gone = self.soft = False
        self.moved_to: Address = ()
        """Where the newest authentic packet came from, if not from where it should."""
        self.due = 0
        self.packets = self.octets = 0
        self.replay_drops = self.window_drops = self.integrity_drops = 0
        self.added: float = time.time()
        self.first_used: float | None = None
        self.last_used: float | None = None
        super().__init__(sa, link)

    def place(self, sa: SecurityAssociation, link: Link) -> None:
        """Take the addresses and ports of `sa`."""
        with self.lock:
            super().place(sa, link)
            self._set_limits()
            self._placed()

    @abstractmethod
    def _placed(self) -> None:
        """Forget what was derived from the old place. The lock is held."""

    def _set_limits(self) -> None:
        """Set the limits that come next: the soft ones, or when they are behind the hard ones."""
        lifetime = self.sa.lifetime
        packets, octets = lifetime.hard_packets or UNLIMITED, lifetime.hard_bytes or UNLIMITED
        if not self.soft:
            packets = min(packets, lifetime.soft_packets or UNLIMITED)
            octets = min(octets, lifetime.soft_bytes or UNLIMITED)
        self.next_packets, self.next_bytes = packets, octets

    def _ample(self, run: Sequence[bytes]) -> bool:
        """Tell whether so much more reaches no limit."""
        if self.packets + len(run) >= self.next_packets:
            return False
        return self.next_bytes == UNLIMITED or self.octets + sum(map(len, run)) < self.next_bytes

    def _use(self, packets: int, octets: int, now: float) -> None:
        """Count packets, and note the limits that they reach."""
        self.packets += packets
        self.octets += octets
        self.last_used = now
        if self.first_used is None:
            self.first_used = now
        if self.packets >= self.next_packets or self.octets >= self.next_bytes:
            lifetime = self.sa.lifetime
            most, largest = lifetime.hard_packets or UNLIMITED, lifetime.hard_bytes or UNLIMITED
            self._expire(hard=self.packets >= most or self.octets >= largest)

    def expire(self, *, hard: bool) -> None:
        """Note that a limit is reached; at the hard one this SA is over."""
        with self.lock:
            self._expire(hard=hard)

    def _expire(self, *, hard: bool) -> None:
        if hard:
            self.gone = True
            self.due |= HARD
        elif not self.soft:
            self.soft = True
            self.due |= SOFT
            self._set_limits()

    def take_due(self) -> tuple[int, Address]:
        """Return what is due and, with MOVED, the new (address, port); leave nothing."""
        with self.lock:
            due, self.due = self.due, 0
            return due, self.moved_to

    def retire(self) -> None:
        """End this SA."""
        with self.lock:
            self.gone = True

    def usage(self) -> Usage:
        """Return the counters."""
        with self.lock:
            return Usage(
                packets=self.packets,
                octets=self.octets,
                added=self.added,
                first_used=self.first_used,
                last_used=self.last_used,
                replay_drops=self.replay_drops,
                window_drops=self.window_drops,
                integrity_drops=self.integrity_drops,
                sequence=self.highest,
            )


class PortableInbound(PortableAssociation, Inbound):
    """An SA that opens packets."""

    __slots__ = ("_home", "window")

    moved_to: Address
    due: int
    replay_drops: int
    window_drops: int
    integrity_drops: int

    def __init__(self, sa: SecurityAssociation, link: Link, sequence: int = 0) -> None:
        """`sequence`: all numbers up to this one have been received."""
        self.window: ReplayWindow = ReplayWindow(sa.replay_window, sequence)
        super().__init__(sa, link)

    def _placed(self) -> None:
        self._home: Address = (str(self.sa.source), self.encapsulation.remote_port)
        self.moved_to = ()
        self.due &= ~MOVED

    @property
    def highest(self) -> int:  # type: ignore[override]
        """The highest sequence number received."""
        return self.window.top

    def open_run(
        self, run: Sequence[bytes], source: Address, traffic_class: int, now: float
    ) -> list[bytes | Dropped]:
        """Return the inner packets of `run`, near a limit of its first alone, up to one that moves the SA."""
        results: list[bytes | Dropped] = []
        put = results.append
        with self.lock:
            if self.gone:
                return [DROPPED[Reason.NO_SA]]
            if not self._ample(run):
                run = run[:1]
            window, esn, high = self.window, self._esn, b""
            used = octets = 0
            # one loop, not a function per packet: calls are what a packet costs most
            for packet in run:
                if self.due and results:
                    break  # what the owner does about it may concern the next ones
                _, sequence = _HEADER.unpack_from(packet)
                if esn:
                    sequence = window.infer(sequence)
                    high = (sequence >> 32 & 0xFFFF_FFFF).to_bytes(4)
                newest = sequence > window.top
                if not newest:
                    reason = window.check(sequence)
                    if reason is not None:
                        put(self._refuse(reason))
                        continue
                length = len(packet) - self._fixed
                if length < 2 or length & self._remainder:
                    put(self._refuse_length(length))
                    continue
                plaintext = self.cipher.open(packet, high)
                if plaintext is None:
                    self.integrity_drops += 1
                    put(DROPPED[Reason.INTEGRITY])
                    continue

                # authentic from here on
                window.commit(sequence)
                if newest and source != self._home:
                    self._notice(source)
                used += 1
                length = packets.payload_length(plaintext)
                if length < 0:
                    put(DROPPED[Reason.PADDING])
                    continue
                octets += length
                next_header = plaintext[-1]
                if next_header == packets.DUMMY:
                    put(DROPPED[Reason.DUMMY])
                elif self._tunnel:
                    put(self._leave_tunnel(plaintext[:length], next_header, traffic_class))
                else:
                    put(self._leave_transport(plaintext[:length], next_header, traffic_class))
            if used:
                self._use(used, octets, now)
        return results

    def _refuse(self, reason: Reason) -> Dropped:
        if reason is Reason.REPLAYED:
            self.replay_drops += 1
        else:
            self.window_drops += 1
        return DROPPED[reason]

    def _refuse_length(self, length: int) -> Dropped:
        """Judge by the length alone as the kernel does by the check value, which is there, but wrong."""
        if length < 0:
            return DROPPED[Reason.SHORT]
        self.integrity_drops += 1
        return DROPPED[Reason.INTEGRITY]

    def _leave_transport(self, payload: bytes, next_header: int, traffic_class: int) -> bytes:
        sa, original = self.sa, self.encapsulation.original_address
        source, destination = sa.source, sa.destination
        payload = packets.fix_transport_checksum(next_header, payload, source, destination, original)
        return packets.join_for_transport(source, destination, next_header, payload, traffic_class)

    def _leave_tunnel(self, inner: bytes, next_header: int, traffic_class: int) -> bytes | Dropped:
        if next_header not in _TUNNELLED:
            return DROPPED[Reason.NEXT_HEADER]
        total = packets.inner_length(inner)
        if not total or inner[0] >> 4 != _TUNNELLED[next_header]:
            return DROPPED[Reason.MALFORMED]
        if total != len(inner):
            inner = inner[:total]  # the rest is TFC padding (RFC 4303, 2.7)
        if traffic_class & 3 and self.sa.copy_ecn:
            return packets.decapsulate_ecn(inner, traffic_class) or DROPPED[Reason.ECN]
        return inner

    def _notice(self, source: Address) -> None:
        """Note a source that is not the SA's; `_home` becomes what is quick to compare with."""
        try:
            address: IPAddress = ip_address(str(source[0]).partition("%")[0])
            port = int(source[1])
        except (ValueError, IndexError, TypeError):
            return  # not a socket address: the caller does not want to know
        if isinstance(address, IPv6Address):
            address = address.ipv4_mapped or address
        self._home = source
        moved = (address, port)
        if moved == (self.sa.source, self.encapsulation.remote_port):
            self.moved_to = ()
            self.due &= ~MOVED
        elif moved != self.moved_to:
            self.moved_to = moved
            self.due |= MOVED


class PortableOutbound(PortableAssociation, Outbound):
    """An SA that seals packets.

    `permitted` is the highest sequence number that it may use now: the last one there is, unless the
    owner reserves them bit by bit (`permit`).
    """

    __slots__ = ("_destination", "_last", "_longest", "highest", "ivs", "permitted")

    highest: int
    permitted: int

    def __init__(
        self, sa: SecurityAssociation, link: Link, sequence: int, permitted: int | None = None
    ) -> None:
        """`sequence`: the last number that is not to be used again. `permitted` None: all."""
        self.ivs: Iterator[int] | None = None
        """The IVs for ciphers that count, modulo 2**64."""
        self.highest = sequence
        self._last = 0xFFFF_FFFF_FFFF_FFFF if sa.esn else 0xFFFF_FFFF
        self.permitted = self._last if permitted is None else min(permitted, self._last)
        super().__init__(sa, link)

    def _placed(self) -> None:
        self._destination: Destination | None = None
        room = _LARGEST_UDP[self.sa.destination.version] - self._fixed
        self._longest = room - (room & self._padded) - 2
        """Bytes of the longest payload: with padding and trailer it fits in a UDP datagram."""

    @property
    def _padded(self) -> int:
        """What the length of a plaintext is a multiple of, less 1: of a power of two."""
        return self._remainder | 3

    def draw_ivs(self, counter: Iterator[int]) -> None:
        """Take IVs from `counter` from now on."""
        self.ivs = counter

    def permit(self, number: int) -> None:
        """Allow sequence numbers up to `number`; what is allowed already stays so."""
        with self.lock:
            self.permitted = max(self.permitted, min(number, self._last))

    def seal_run(self, run: Sequence[bytes], now: float) -> list[tuple[bytes, Destination] | Dropped]:
        """Return the ESP packets for `run`; near a limit, for its first packet alone."""
        first, payloads, left_out = run[0], run, 0
        if self._tunnel:
            next_header = packets.IPV4 if first[0] >> 4 == 4 else packets.IPV6
        else:
            split = packets.split_for_transport(first)
            if isinstance(split, Reason):
                return [DROPPED[split]]
            next_header, payload = split
            left_out = len(first) - len(payload)
            payloads = [each[left_out:] for each in run]
        with self.lock:
            if self.gone:
                return [DROPPED[Reason.NO_SA]]
            if not self._ample(payloads) or self.highest + len(run) > self.permitted:
                payloads = payloads[:1]
            octets = sum(map(len, payloads))
            if self.sa.tfc:
                payloads = [each.ljust(self.sa.tfc, b"\0") for each in payloads]
            if max(map(len, payloads)) > self._longest:
                payloads, octets = payloads[:1], len(first) - left_out
            dropped = self._refused(len(payloads[0]))
            if dropped is not None:
                return [dropped]
            destination = self._destination_of(first)
            sealed = self._seal(payloads, next_header)
            self._use(len(payloads), octets, now)
        return [(each, destination) for each in sealed]

    def seal_dummy(self, length: int, now: float) -> tuple[bytes, Destination] | Dropped:
        """Return a dummy packet with `length` bytes of payload (RFC 4303, 2.6)."""
        with self.lock:
            if self.gone:
                return DROPPED[Reason.NO_SA]
            dropped = self._refused(length)
            if dropped is not None:
                return dropped
            (sealed,) = self._seal([os.urandom(length)], packets.DUMMY)
            self._use(1, length, now)
            return sealed, self.destination(0, False)

    def _refused(self, length: int) -> Dropped | None:
        """Return why not even one packet can be sealed; without a number left the SA is over."""
        if length > self._longest:
            return DROPPED[Reason.TOO_BIG]
        if self.highest < self.permitted:
            return None
        if self.highest < self._last:
            return DROPPED[Reason.UNRESERVED]
        self._expire(hard=True)
        return DROPPED[Reason.SEQUENCE]

    def _seal(self, payloads: Sequence[bytes], next_header: int) -> list[bytes]:
        cipher, ivs, spi = self.cipher, self.ivs, self.sa.spi
        trailers, mask = packets.trailers(next_header), self._padded
        sequence, high = self.highest, b""
        self.highest += len(payloads)  # from here on they are used, whatever happens
        sealed: list[bytes] = []
        for payload in payloads:
            sequence += 1
            low = sequence & 0xFFFF_FFFF
            if self._esn:
                high = (sequence >> 32).to_bytes(4)
            if ivs is not None:
                prefix = _HEADER_AND_IV.pack(spi, low, next(ivs) & _IV_MASK)
            else:
                prefix = _HEADER.pack(spi, low) + os.urandom(cipher.iv_length)
            sealed.append(cipher.seal(prefix, payload + trailers[-(len(payload) + 2) & mask], high))
        return sealed

    def _destination_of(self, inner: bytes) -> Destination:
        """Return where the packet goes, and its outer DSCP, ECN and DF (RFC 4301, 5.1.2; RFC 6040, 4.1)."""
        sa = self.sa
        traffic_class, dont_fragment = packets.outer_fields(inner)
        if self._tunnel:
            mask = (0xFC if sa.copy_dscp else 0) | (3 if sa.copy_ecn else 0)
            traffic_class &= mask
            dont_fragment = dont_fragment and sa.copy_df
        return self.destination(traffic_class, dont_fragment)

    def destination(self, traffic_class: int, dont_fragment: bool) -> Destination:
        """Return where packets with these outer fields go."""
        last = self._destination
        if last is None or last.traffic_class != traffic_class or last.dont_fragment is not dont_fragment:
            last = self._destination = super().destination(traffic_class, dont_fragment)
        return last
