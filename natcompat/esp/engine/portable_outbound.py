"""One outbound SA in Python: sequence numbers, encapsulation, sealing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from itertools import count

from natcompat.esp.engine import packet as packets
from natcompat.esp.engine.association import (
    Link,
    Outbound,
)
from natcompat.esp.engine.portable_association import (
    HEADER,
    HEADER_AND_IV,
    IV_MASK,
    LARGEST_UDP_PAYLOAD,
    PortableAssociation,
)
from natcompat.esp.engine.results import DROPPED, Destination, Dropped, Reason
from natcompat.ipsec import SecurityAssociation


class PortableOutbound(PortableAssociation, Outbound):
    """An SA that seals packets.

    `permitted` is the highest sequence number that may be used now: the last one of all, unless the owner
    reserves them bit by bit (`permit`).
    """

    __slots__ = ("_destination", "_last", "_longest", "highest", "ivs", "permitted")

    highest: int
    permitted: int

    def __init__(
        self, sa: SecurityAssociation, link: Link, sequence: int, permitted: int | None = None
    ) -> None:
        """`sequence`: the last number that must not be used. `permitted` None: all numbers."""
        self.ivs: Iterator[int] | None = None
        """The IVs of ciphers that count, modulo 2**64; None for other ciphers."""
        self.highest = sequence
        self._last = 0xFFFF_FFFF_FFFF_FFFF if sa.esn else 0xFFFF_FFFF
        self.permitted = self._last if permitted is None else min(permitted, self._last)
        super().__init__(sa, link)

    def _placed(self) -> None:
        self._destination: Destination | None = None
        room = LARGEST_UDP_PAYLOAD[self.sa.destination.version] - self._fixed
        self._longest = room - (room & self._padded) - 2
        """Bytes of the longest payload: with padding and trailer it fits in a UDP datagram."""

    @property
    def _padded(self) -> int:
        """The block size of plaintexts, a power of two, less 1."""
        return self._remainder | 3

    def draw_ivs(self, first: int) -> None:
        """Count IVs from `first` on, modulo 2**64."""
        self.ivs = count(first)

    def permit(self, number: int) -> None:
        """Allow sequence numbers up to `number`; numbers that are allowed already stay so."""
        with self.lock:
            self.permitted = max(self.permitted, min(number, self._last, self.largest_number))

    def seal_run(self, run: Sequence[bytes], now: float) -> list[tuple[bytes, Destination] | Dropped]:
        """Return the ESP packets for `run`; near a limit, for its first packet only."""
        first, payloads, left_out = run[0], run, 0
        if self._tunnel:
            next_header = packets.IPV4 if first[0] >> 4 == 4 else packets.IPV6
        else:
            split = packets.split_for_transport(first)
            if isinstance(split, Reason):
                return [DROPPED[split]]
            next_header, payload = split
            left_out = len(first) - len(payload)
            payloads = [packet[left_out:] for packet in run]
        with self.lock:
            if self.gone:
                return [DROPPED[Reason.NO_SA]]
            if not self._ample(payloads) or self.highest + len(run) > self.permitted:
                payloads = payloads[:1]
            octets = sum(map(len, payloads))
            if self.sa.tfc:
                payloads = [payload.ljust(self.sa.tfc, b"\0") for payload in payloads]
            if max(map(len, payloads)) > self._longest:
                payloads, octets = payloads[:1], len(first) - left_out
            dropped = self._refused(len(payloads[0]))
            if dropped is not None:
                return [dropped]
            destination = self._destination_of(first)
            sealed = self._seal(payloads, next_header)
            self._use(len(payloads), octets, now)
        return [(packet, destination) for packet in sealed]

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

    def _last_packet(self) -> dict[str, float | None]:
        return {"last_sent": self.last_used}

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
                prefix = HEADER_AND_IV.pack(spi, low, next(ivs) & IV_MASK)
            else:
                prefix = HEADER.pack(spi, low) + os.urandom(cipher.iv_length)
            sealed.append(cipher.seal(prefix, payload + trailers[-(len(payload) + 2) & mask], high))
        return sealed

    def _destination_of(self, inner: bytes) -> Destination:
        """Return the destination with outer DSCP, ECN and DF (RFC 4301, 5.1.2; RFC 6040, 4.1)."""
        sa = self.sa
        traffic_class, dont_fragment = packets.outer_fields(inner)
        if self._tunnel:
            mask = (0xFC if sa.copy_dscp else 0) | (3 if sa.copy_ecn else 0)
            traffic_class &= mask
            dont_fragment = dont_fragment and sa.copy_df
        return self.destination(traffic_class, dont_fragment)

    def destination(self, traffic_class: int, dont_fragment: bool) -> Destination:
        """Return the destination of packets with these outer fields."""
        last = self._destination
        if last is None or last.traffic_class != traffic_class or last.dont_fragment is not dont_fragment:
            last = self._destination = super().destination(traffic_class, dont_fragment)
        return last
