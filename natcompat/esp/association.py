"""The state of one SA in Python, and what it does with a packet.

Everything that changes does so under the lock of the SA. What concerns others (expiries, a new
mapping) is noted in `due`, for the engine to act on when the lock is free.
"""

from __future__ import annotations

import os
import threading
import time
from abc import abstractmethod
from collections.abc import Iterator
from ipaddress import IPv6Address, ip_address
from struct import Struct
from typing import Final

from natcompat.esp import packet as packets
from natcompat.esp.base import HARD, MOVED, SOFT, UNLIMITED, Address, Association, Inbound, Link, Outbound
from natcompat.esp.crypto import HEADER_LENGTH, Cipher, make_cipher
from natcompat.esp.replay import ReplayWindow
from natcompat.esp.results import DROPPED, Destination, Dropped, Reason
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

    def _use(self, octets: int, now: float) -> None:
        """Count a packet, and note the limits that it reaches."""
        self.packets += 1
        self.octets += octets
        self.last_used = now
        if self.first_used is None:
            self.first_used = now
        if self.packets >= self.next_packets or self.octets >= self.next_bytes:
            lifetime = self.sa.lifetime
            packets, octets = lifetime.hard_packets or UNLIMITED, lifetime.hard_bytes or UNLIMITED
            self._expire(hard=self.packets >= packets or self.octets >= octets)

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

    def open(
        self, packet: bytes, low: int, source: Address, traffic_class: int, now: float
    ) -> bytes | Dropped:
        """Return the inner packet. `low`: the sequence number that `packet` shows; it has 8 bytes or more."""
        with self.lock:
            if self.gone:
                return DROPPED[Reason.NO_SA]
            window, sequence, high = self.window, low, b""
            if self._esn:
                sequence = window.infer(low)
                high = (sequence >> 32 & 0xFFFF_FFFF).to_bytes(4)
            newest = sequence > window.top
            if not newest:
                reason = window.check(sequence)
                if reason is not None:
                    return self._refuse(reason)
            length = len(packet) - self._fixed
            if length < 2 or length & self._remainder:
                return self._refuse_length(length)
            plaintext = self.cipher.open(packet, high)
            if plaintext is None:
                self.integrity_drops += 1
                return DROPPED[Reason.INTEGRITY]

            # authentic from here on
            window.commit(sequence)
            if newest and source != self._home:
                self._notice(source)
            length = packets.payload_length(plaintext)
            self._use(length if length > 0 else 0, now)
        if length < 0:
            return DROPPED[Reason.PADDING]
        next_header = plaintext[-1]
        if next_header == packets.DUMMY:
            return DROPPED[Reason.DUMMY]
        if self._tunnel:
            return self._leave_tunnel(plaintext[:length], next_header, traffic_class)
        return self._leave_transport(plaintext[:length], next_header, traffic_class)

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

    __slots__ = ("_destination", "_last", "highest", "ivs", "permitted")

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

    def draw_ivs(self, counter: Iterator[int]) -> None:
        """Take IVs from `counter` from now on."""
        self.ivs = counter

    def permit(self, number: int) -> None:
        """Allow sequence numbers up to `number`; what is allowed already stays so."""
        with self.lock:
            self.permitted = max(self.permitted, min(number, self._last))

    def seal(self, inner: bytes, now: float) -> tuple[bytes, Destination] | Dropped:
        """Return the ESP packet that carries `inner`, an IP packet whose lengths are right."""
        if self._tunnel:
            payload, next_header = inner, packets.IPV4 if inner[0] >> 4 == 4 else packets.IPV6
        else:
            split = packets.split_for_transport(inner)
            if isinstance(split, Reason):
                return DROPPED[split]
            next_header, payload = split
        octets = len(payload)
        if octets < self.sa.tfc:
            payload = payload.ljust(self.sa.tfc, b"\0")
        with self.lock:
            if self.gone:
                return DROPPED[Reason.NO_SA]
            sealed = self._seal(payload, next_header)
            if isinstance(sealed, Dropped):
                return sealed
            self._use(octets, now)
            return sealed, self._destination_of(inner)

    def seal_dummy(self, length: int, now: float) -> tuple[bytes, Destination] | Dropped:
        """Return a dummy packet with `length` bytes of payload (RFC 4303, 2.6)."""
        with self.lock:
            if self.gone:
                return DROPPED[Reason.NO_SA]
            sealed = self._seal(os.urandom(length), packets.DUMMY)
            if isinstance(sealed, Dropped):
                return sealed
            self._use(length, now)
            return sealed, self.destination(0, False)

    def _seal(self, payload: bytes, next_header: int) -> bytes | Dropped:
        cipher = self.cipher
        block = cipher.block_length if cipher.block_length > 4 else 4
        pad = -(len(payload) + 2) % block
        if len(payload) + 2 + pad + self._fixed > _LARGEST_UDP[self.sa.destination.version]:
            return DROPPED[Reason.TOO_BIG]
        sequence = self.highest + 1
        if sequence > self.permitted:
            if sequence <= self._last:
                return DROPPED[Reason.UNRESERVED]
            self._expire(hard=True)
            return DROPPED[Reason.SEQUENCE]
        self.highest = sequence  # from here on it is used, whatever happens
        high = b""
        if self._esn:
            high = (sequence >> 32).to_bytes(4)
            sequence &= 0xFFFF_FFFF
        if self.ivs is not None:
            prefix = _HEADER_AND_IV.pack(self.sa.spi, sequence, next(self.ivs) & _IV_MASK)
        else:
            prefix = _HEADER.pack(self.sa.spi, sequence)
            if cipher.iv_length:
                prefix += os.urandom(cipher.iv_length)
        return cipher.seal(prefix, payload + packets.trailers(next_header)[pad], high)

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
