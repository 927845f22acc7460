"""Packet lengths: overhead per SA, path MTUs, and ICMP "too big" messages. No I/O.

A device's MTU keeps most packets short enough: the system in front of it tells senders, and TCP takes its
MSS from it, on this host and behind it::

    paths = PathMtus(lambda host: kernel_path_mtu(host, sock))  # natcompat.esp.carrier.path_mtu
    device.mtu = device_mtu(outbound_sas, paths.of)

What is still too long is noticed when it is sent: for an outer packet with DF (`Destination.dont_fragment`)
`sendto` fails with EMSGSIZE. `inner` is then the packet that was sealed, `sa` its SA::

    largest = paths.refused(sa, len(inner))
    if may_fragment(inner, largest):
        ...  # send the outer packet again without DF; the kernel fragments it (RFC 4301, 8.1)
    elif (message := replies.too_big(inner, largest)) is not None:
        device.write_burst([message])

Path MTUs are learnt from the kernel alone, and only when it refuses to send: a packet that says "too big" and
comes from the network is not authentic (RFC 4301, 8.2.1). Linux looks whether what the ICMP message quotes
is of a socket of this host before it believes it, and who knows the ports of both ends can forge that; so
nothing below `SMALLEST_MTU` is believed here, and the harm ends at packets of that size, which are then sent
without DF. A lower path MTU is forgotten after ten minutes (RFC 1191, 6.3).
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable
from ipaddress import ip_address
from typing import Final, NamedTuple

from natcompat.esp.engine.packet import checksum, flow_of, inner_length
from natcompat.ipsec import Direction, Encr, Integ, Mode, SecurityAssociation

ETHERNET_MTU: Final = 1500

SMALLEST_MTU: Final = {4: 576, 6: 1280}
"""By IP version: what every host has to take (RFC 1122, 3.3.3), what every link carries (RFC 8200, 5)."""

SMALLEST_DEVICE_MTU: Final = 1280
"""A device with less has no IPv6 (RFC 8200, 5)."""

PLATEAUS: Final = (65535, 32000, 17914, 8166, 4352, 2002, 1492, 1400, 1280, 1006, 576)
"""What to try next where the system does not tell the path MTU (RFC 1191, 7.1; 1400 and 1280 for tunnels)."""

_UDP_HEADER: Final = 8
_IP_HEADER: Final = {4: 20, 6: 40}
_ESP_HEADER: Final = 8  # SPI and sequence number
_TRAILER: Final = 2  # pad length and next header


class Overhead(NamedTuple):
    """The bytes that an SA adds to a packet."""

    headers: int
    """Bytes of the outer IP header, UDP and ESP headers, IV and integrity check value."""
    block: int
    """Payload and trailer are padded to a multiple of it."""
    replaced: int
    """Bytes of the inner IP header (without options), which transport mode does not carry."""

    def largest_inner(self, path_mtu: int) -> int:
        """Return the length of the largest inner packet that fits in `path_mtu` bytes; 0: none does."""
        room = path_mtu - self.headers
        largest = room - room % self.block - _TRAILER
        return largest + self.replaced if largest > 0 else 0

    def outer_length(self, inner: int) -> int:
        """Return the length of the outer packet that carries `inner` bytes (without TFC padding)."""
        length = inner - self.replaced + _TRAILER
        return self.headers + length + -length % self.block


def overhead_of(sa: SecurityAssociation) -> Overhead:
    """Return what `sa` adds to a packet."""
    version = sa.destination.version
    return _overhead(
        sa.encryption, sa.integrity, sa.mode is Mode.TUNNEL, sa.encapsulation is not None, version
    )


@functools.cache
def _overhead(encryption: Encr, integrity: Integ, tunnel: bool, encapsulated: bool, version: int) -> Overhead:
    iv, block = {Encr.NULL: (0, 4), Encr.AES_CBC: (16, 16)}.get(encryption, (8, 4))
    icv = encryption.icv_length + (0 if encryption.is_aead else integrity.icv_length)
    outer = _IP_HEADER[version] + (_UDP_HEADER if encapsulated else 0)
    return Overhead(outer + _ESP_HEADER + iv + icv, block, 0 if tunnel else _IP_HEADER[version])


def device_mtu(sas: Iterable[SecurityAssociation], path_mtu: Callable[[str], int]) -> int:
    """Return the MTU for the device in front of `sas`, of which the outbound ones count.

    What the one with the least room carries, but not less than IPv6 takes; what is longer than some
    other SA can carry is answered packet by packet. `path_mtu` tells it by destination.
    """
    rooms = [
        overhead_of(sa).largest_inner(path_mtu(str(sa.destination)))
        for sa in sas
        if sa.direction is Direction.OUT
    ]
    return max(min(rooms, default=SMALLEST_DEVICE_MTU), SMALLEST_DEVICE_MTU)


class PathMtus:
    """The path MTU by destination address. Any thread may call it; what it holds is bounded."""

    def __init__(
        self,
        ask: Callable[[str], int | None],
        *,
        default: int = ETHERNET_MTU,
        lifetime: float = 600.0,
        limit: int = 4096,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`ask` returns what the system knows of a destination, None: nothing; it must not wait."""
        self._ask = ask
        self._default = default
        self.lifetime: float = lifetime
        """Seconds for which a path MTU is believed."""
        self._limit = limit
        self._clock = clock
        self._known: dict[str, tuple[int, float]] = {}
        self._lock = threading.Lock()

    def of(self, host: str) -> int:
        """Return the path MTU to `host`, an address, in bytes with all headers."""
        mtu, until = self._known.get(host, (0, 0.0))
        if until > self._clock():
            return mtu
        return self._note(host, self._ask(host) or self._default)

    def refused(self, sa: SecurityAssociation, inner: int) -> int:
        """The system would not send what carries `inner` bytes by `sa`: return the largest that will fit.

        Less than `inner`, unless nothing smaller is believed, or it is TFC padding that is too long.
        """
        host, overhead = str(sa.destination), overhead_of(sa)
        outer = overhead.outer_length(max(inner, sa.tfc + overhead.replaced))
        mtu = self.of(host)
        if mtu >= outer:  # what was known is no longer true
            mtu = self._ask(host) or outer
            if mtu >= outer:
                mtu = next((each for each in PLATEAUS if each < outer), 0)
            mtu = self._note(host, mtu)
        return overhead.largest_inner(mtu)

    def _note(self, host: str, mtu: int) -> int:
        mtu = max(mtu, SMALLEST_MTU[ip_address(host).version])
        with self._lock:
            self._known.pop(host, None)
            if len(self._known) >= self._limit:
                del self._known[next(iter(self._known))]
            self._known[host] = mtu, self._clock() + self.lifetime
        return mtu


def may_fragment(inner: bytes, largest: int) -> bool:
    """Tell whether what carries `inner` may be fragmented where only `largest` bytes fit.

    An IPv4 packet without DF may; an IPv6 packet has to, as long as no link need carry less (RFC 2473, 7.1);
    any packet that fits, too: then what the system believes of the path is less than we do.
    """
    if len(inner) <= largest:
        return True
    if inner[0] >> 4 == 4:
        return not inner[6] & 0x40
    return len(inner) <= SMALLEST_MTU[6]


# --- ICMP ----------------------------------------------------------------------------------------

_ICMP, _ICMPV6 = 1, 58
_QUOTED: Final = {4: 576, 6: 1280}
"""The length of an ICMP message at most, IP header included (RFC 1812, 4.3.2.3; RFC 4443, 3.2)."""
_ICMP_ERRORS: Final = frozenset({3, 4, 5, 11, 12})
_ICMPV6_REDIRECT: Final = 137
_INTERNETWORK_CONTROL: Final = 0xC0  # the precedence of ICMP errors (RFC 1812, 4.3.2.5)


def too_big(inner: bytes, largest: int) -> bytes | None:
    """Return the ICMP packet that tells the sender of `inner` that only `largest` bytes fit.

    "Fragmentation needed" (RFC 792, RFC 1191), or "packet too big" (RFC 4443, 3.2) with 1280 at least.
    It comes from where `inner` is going: the only address behind the device that is known to be one.
    None: no message may answer such a packet (RFC 1122, 3.2.2; RFC 4443, 2.4), or it is none.
    """
    length = inner_length(inner)
    flow = flow_of(inner) if length else None
    if flow is None:
        return None
    packet = inner[:length]
    version = flow.version
    source, destination = (packet[12:16], packet[16:20]) if version == 4 else (packet[8:24], packet[24:40])
    if not _is_host(source) or not _is_host(destination):
        return None
    if version == 4:
        if packet[6] & 0x1F or packet[7]:  # a later fragment
            return None
        if flow.protocol == _ICMP and flow.source_port in _ICMP_ERRORS:
            return None
        body = bytes((3, 4, 0, 0, 0, 0)) + min(largest, 0xFFFF).to_bytes(2) + packet[: _QUOTED[4] - 28]
        body = body[:2] + checksum(body).to_bytes(2) + body[4:]
        start = bytes((0x45, _INTERNETWORK_CONTROL)) + (20 + len(body)).to_bytes(2)
        start += bytes((0, 0, 0, 0, 64, _ICMP))
        return start + checksum(start + destination + source).to_bytes(2) + destination + source + body
    if flow.protocol == _ICMPV6 and (flow.source_port < 128 or flow.source_port == _ICMPV6_REDIRECT):
        return None
    body = bytes((2, 0, 0, 0)) + max(largest, SMALLEST_MTU[6]).to_bytes(4) + packet[: _QUOTED[6] - 48]
    pseudo = destination + source + len(body).to_bytes(4) + _ICMPV6.to_bytes(4)
    body = body[:2] + checksum(pseudo + body).to_bytes(2) + body[4:]
    start = (0x6000_0000 | _INTERNETWORK_CONTROL << 20).to_bytes(4) + len(body).to_bytes(2)
    return start + bytes((_ICMPV6, 64)) + destination + source + body


def _is_host(address: bytes) -> bool:
    """Tell whether `address` is of one host, and not of this one alone."""
    parsed = ip_address(address)
    if parsed.version == 4 and address[0] in (0, 255):
        return False
    return not (parsed.is_multicast or parsed.is_unspecified or parsed.is_loopback)


class TooBigReplies:
    """`too_big`, not too often: a flood of long packets is not answered with a flood.

    The bounds are those of Linux (sysctl net.ipv4.icmp_msgs_per_sec and icmp_msgs_burst).
    """

    def __init__(
        self, per_second: float = 1000, burst: float = 50, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Allow `burst` messages at once."""
        self.suppressed: int = 0
        """How many messages were not made, since there were too many."""
        self._per_second, self._burst, self._clock = per_second, burst, clock
        self._tokens, self._filled = burst, clock()
        self._lock = threading.Lock()

    def too_big(self, inner: bytes, largest: int) -> bytes | None:
        """Return the ICMP packet that answers `inner`, or None."""
        with self._lock:
            now = self._clock()
            self._tokens = min(self._burst, self._tokens + (now - self._filled) * self._per_second)
            self._filled = now
            if self._tokens < 1:
                self.suppressed += 1
                return None
            message = too_big(inner, largest)
            if message is not None:
                self._tokens -= 1
            return message
