"""Inner packets, the trailer of ESP, ECN and checksums: pure functions on bytes.

Sources: RFC 4303 (2.4 to 2.7), RFC 4301 (5.1.2), RFC 6040, RFC 3948 (3.1.2), RFC 1624.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator
from ipaddress import IPv4Address, IPv6Address
from struct import Struct
from typing import Final, NamedTuple, TypeAlias

from natcompat.esp.engine.results import Packet, Reason
from natcompat.ipsec import AddressRange, IPAddress, TrafficSelector

IPV4, IPV6, DUMMY = 4, 41, 59
"""Next headers of ESP (IANA protocol numbers): those of tunnel mode, and that of dummy packets."""

_TCP, _UDP = 6, 17
_PLAIN: Final = (_TCP, _UDP)
_PORTS: Final = frozenset({_TCP, _UDP, 33, 132, 136})
_ICMP, _ICMPV6, _MOBILITY = 1, 58, 135
_HOP_BY_HOP, _ROUTING, _FRAGMENT, _DESTINATION, _AH = 0, 43, 44, 60, 51
_EXTENSIONS: Final = frozenset({_HOP_BY_HOP, _ROUTING, _FRAGMENT, _DESTINATION, _AH})
_MOST_EXTENSIONS: Final = 8
"""Extension headers that are walked. More of them would be an attempt to cost time."""

PADDINGS: Final = tuple(bytes(range(1, length + 1)) for length in range(256))
"""1, 2, 3... of every length (RFC 4303, 2.4)."""


class Flow(NamedTuple):
    """The fields that selectors compare. Ports are 0 where a packet has none, and in later fragments."""

    version: int
    protocol: int
    source: int
    destination: int
    source_port: int
    destination_port: int


FlowKey: TypeAlias = bytes | Flow
"""Equal keys, equal flows; for TCP and UDP cheaper than a `Flow`."""


def address_of(version: int, value: int) -> IPAddress:
    """Return an address of a flow."""
    return IPv4Address(value) if version == 4 else IPv6Address(value)


@functools.cache
def trailers(next_header: int) -> tuple[bytes, ...]:
    """Return padding, pad length and next header for every pad length up to 15."""
    return tuple(PADDINGS[length] + bytes((length, next_header)) for length in range(16))


def payload_length(plaintext: bytes) -> int:
    """Return how long the payload in front of the trailer is; -1 if the padding is not as it has to be."""
    padding = plaintext[-2]
    length = len(plaintext) - 2 - padding
    if padding and (length < 0 or plaintext[length:-2] != PADDINGS[padding]):
        return -1
    return length


def inner_length(packet: bytes) -> int:
    """Return how long the IP packet at the start of `packet` says it is; 0 if it is none or is cut short."""
    size = len(packet)
    if size >= 20 and packet[0] >> 4 == 4:
        total = packet[2] << 8 | packet[3]
        header = (packet[0] & 15) * 4
        return total if 20 <= header <= total <= size else 0
    if size >= 40 and packet[0] >> 4 == 6:
        total = 40 + (packet[4] << 8 | packet[5])
        return total if total <= size else 0
    return 0


def flow_key(packet: bytes) -> FlowKey | None:
    """Return a key for the flow of `packet`, whose `inner_length` is good; None if it is malformed."""
    first = packet[0]
    if first == 0x45:
        if packet[9] in (_TCP, _UDP) and not (packet[6] & 0x3F or packet[7]) and len(packet) >= 24:
            return packet[9:10] + packet[12:24]
    elif first >> 4 == 6 and packet[6] in (_TCP, _UDP) and len(packet) >= 44:
        return packet[6:7] + packet[8:44]
    return flow_of(packet)


_IPV4_START: Final = Struct("!BBH2xHxBxx12s")
"""Version and length, class, total length, flags and fragment offset, protocol; addresses and ports."""
_IPV6_START: Final = Struct("!IHBx36s")
"""Version, class and flow label, payload length, next header; addresses and ports."""


LONGEST_RUN: Final = 256
"""Packets; more at once would not be faster."""


def runs(packets: Iterable[Packet]) -> Iterator[tuple[FlowKey | None, list[bytes]]]:
    """Cut `packets` into runs of one flow, with equal `outer_fields`; key None: malformed.

    A packet that looks like the one before it costs a look at its first bytes, no more.
    """
    run: list[bytes] = []
    key: FlowKey | None = None
    like: tuple[object, ...] | None = None
    for item in packets:
        packet = item if isinstance(item, bytes) else bytes(item)
        size = len(packet)
        first = packet[0] if size >= 24 else 0
        if first == 0x45:
            _, traffic_class, total, fragment, protocol, ends = _IPV4_START.unpack_from(packet)
            start: tuple[object, ...] = traffic_class, fragment, protocol, ends
        elif first >> 4 == 6 and size >= 44:
            word, total, protocol, ends = _IPV6_START.unpack_from(packet)
            total += 40
            start = word, protocol, ends
        else:
            start, total = (), 0
        if start != like or total != size or len(run) == LONGEST_RUN:
            if run:
                yield key, run
                run = []
            if first == 0x45 and total == size and protocol in _PLAIN and not fragment & 0x3FFF:
                key = packet[9:10] + packet[12:24]  # as flow_key says
            else:
                key = flow_key(packet) if inner_length(packet) == size > 0 else None
            like = start if isinstance(key, bytes) else None  # else there is more to look at
        run.append(packet)
    if run:
        yield key, run


def expand(key: FlowKey) -> Flow:
    """Return the flow that `key` stands for."""
    if isinstance(key, Flow):
        return key
    size = 4 if len(key) == 13 else 16
    return Flow(
        4 if size == 4 else 6,
        key[0],
        int.from_bytes(key[1 : 1 + size]),
        int.from_bytes(key[1 + size : 1 + 2 * size]),
        int.from_bytes(key[-4:-2]),
        int.from_bytes(key[-2:]),
    )


def flow_of(packet: bytes) -> Flow | None:
    """Return the flow of `packet`, whose `inner_length` is good; None if its headers are malformed."""
    if packet[0] >> 4 == 4:
        offset = (packet[0] & 15) * 4
        later = bool(packet[6] & 0x1F or packet[7])
        protocol = packet[9]
        source, destination = int.from_bytes(packet[12:16]), int.from_bytes(packet[16:20])
        version = 4
    else:
        version, source, destination = 6, int.from_bytes(packet[8:24]), int.from_bytes(packet[24:40])
        transport = _walk(packet)
        if transport is None:
            return None
        protocol, offset, later = transport
    ports = (0, 0) if later else _ports(packet, protocol, offset)
    return Flow(version, protocol, source, destination, *ports)


def _walk(packet: bytes) -> tuple[int, int, bool] | None:
    """Return protocol, offset of the transport header, and whether this is a later fragment."""
    protocol, offset = packet[6], 40
    for _ in range(_MOST_EXTENSIONS):
        if protocol not in _EXTENSIONS:
            return protocol, offset, False
        if offset + 8 > len(packet):
            return None
        following, length = packet[offset], packet[offset + 1]
        if protocol == _FRAGMENT:
            if packet[offset + 2] or packet[offset + 3] & 0xF8:
                return following, offset, True
            length = 0
        offset += (length + 2) * 4 if protocol == _AH else (length + 1) * 8
        protocol = following
    return None


def _ports(packet: bytes, protocol: int, offset: int) -> tuple[int, int]:
    """Return the ports, or the fields that RFC 4301, 4.4.1.1, puts in their place."""
    start = packet[offset : offset + 4]
    if len(start) == 4:
        if protocol in _PORTS:
            return start[0] << 8 | start[1], start[2] << 8 | start[3]
        if protocol in (_ICMP, _ICMPV6):
            return start[0], start[1]
        if protocol == _MOBILITY:
            return start[2], 0
    return 0, 0


def matches(selector: TrafficSelector, flow: Flow) -> bool:
    """Tell whether `selector` covers `flow`."""
    source, destination = selector.source, selector.destination
    return (
        source.version == flow.version
        and selector.protocol in (0, flow.protocol)
        and flow.source_port in selector.source_ports
        and flow.destination_port in selector.destination_ports
        and flow.source & int(source.netmask) == int(source.network_address)
        and flow.destination & int(destination.netmask) == int(destination.network_address)
        and _within(selector.source_range, flow.source)
        and _within(selector.destination_range, flow.destination)
    )


def _within(addresses: AddressRange | None, address: int) -> bool:
    return addresses is None or int(addresses.first) <= address <= int(addresses.last)


def outer_fields(packet: bytes) -> tuple[int, bool]:
    """Return traffic class and DF of a packet; IPv6 is never fragmented on its way."""
    if packet[0] >> 4 == 4:
        return packet[1], bool(packet[6] & 0x40)
    return (packet[0] & 15) << 4 | packet[1] >> 4, True


_CE, _ECT_1 = 3, 1


def decapsulate_ecn(inner: bytes, outer: int) -> bytes | None:
    """Return `inner` with the ECN field that it has after a tunnel (RFC 6040, 4.2); None: drop it.

    `outer` is the traffic class of the outer header.
    """
    outer &= 3
    traffic_class, _ = outer_fields(inner)
    mine = traffic_class & 3
    if outer not in (_CE, _ECT_1) or mine in (outer, _CE):
        return inner
    if not mine:
        return None if outer == _CE else inner
    return _with_ecn(inner, traffic_class, outer)


def _with_ecn(packet: bytes, traffic_class: int, ecn: int) -> bytes:
    changed = bytearray(packet)
    new = traffic_class & ~3 | ecn
    if packet[0] >> 4 == 6:
        changed[1] = (new & 15) << 4 | packet[1] & 15
        return bytes(changed)
    changed[1] = new
    old_word, new_word = int.from_bytes(packet[:2]), int.from_bytes(changed[:2])
    changed[10:12] = update_checksum(packet[10:12], ~old_word & 0xFFFF, new_word)
    return bytes(changed)


def split_for_transport(packet: bytes) -> tuple[int, bytes] | Reason:
    """Return next header and payload for transport mode, or the reason why it cannot carry the packet.

    The outer header is the socket's, so IPv4 options are left behind, and IPv6 extension headers
    that have to stand in front of ESP cannot be sent.
    """
    if packet[0] >> 4 == 4:
        if packet[6] & 0x3F or packet[7]:
            return Reason.FRAGMENT
        return packet[9], packet[(packet[0] & 15) * 4 :]
    if packet[6] == _FRAGMENT:
        return Reason.FRAGMENT
    if packet[6] in (_HOP_BY_HOP, _ROUTING):
        return Reason.HEADERS
    return packet[6], packet[40:]


def join_for_transport(
    source: IPAddress, destination: IPAddress, next_header: int, payload: bytes, traffic_class: int
) -> bytes:
    """Return the IP packet that transport mode brought: the header that the socket took, made again."""
    if source.version == 6:
        start = (0x6000_0000 | traffic_class << 20).to_bytes(4) + len(payload).to_bytes(2)
        return start + bytes((next_header, 64)) + source.packed + destination.packed + payload
    length = (20 + len(payload)).to_bytes(2)
    start = bytes((0x45, traffic_class)) + length + bytes((0, 0, 0, 0, 64, next_header))
    addresses = source.packed + destination.packed
    return start + checksum(start + addresses).to_bytes(2) + addresses + payload


def checksum(data: bytes) -> int:
    """Return the Internet checksum of `data` (RFC 1071): the complement of the sum modulo 65535."""
    total = int.from_bytes(data + b"\0" if len(data) & 1 else data)
    return 0xFFFF - (total % 0xFFFF or (0xFFFF if total else 0))


def update_checksum(field: bytes, *changes: int) -> bytes:
    """Return the checksum `field` after words have changed (RFC 1624, equation 3).

    `changes` are the complements of the old words, and the new words, in any order.
    """
    total = (int.from_bytes(field) ^ 0xFFFF) + sum(changes)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return (total ^ 0xFFFF).to_bytes(2)


def _words(address: IPAddress) -> list[int]:
    packed = address.packed
    return [int.from_bytes(packed[at : at + 2]) for at in range(0, len(packed), 2)]


def fix_transport_checksum(
    next_header: int, payload: bytes, source: IPAddress, destination: IPAddress, original: IPAddress | None
) -> bytes:
    """Return `payload` with the TCP or UDP checksum that fits the addresses after a NAT (RFC 3948, 3.1.2).

    With the `original` source address: incrementally (procedure a), so a packet that was corrupt
    before it was protected stays so. Without it: anew, and none for UDP over IPv4 (procedure b).
    """
    offset = {_TCP: 16, _UDP: 6}.get(next_header)
    if offset is None or len(payload) < (20 if next_header == _TCP else 8):
        return payload
    old = payload[offset : offset + 2]
    if next_header == _UDP and source.version == 4 and (old == b"\0\0" or original is None):
        return payload[:offset] + b"\0\0" + payload[offset + 2 :]
    if original is not None:
        complements = [word ^ 0xFFFF for word in _words(original)]
        new = update_checksum(old, *complements, *_words(source))
    else:
        pseudo = source.packed + destination.packed + len(payload).to_bytes(4) + next_header.to_bytes(4)
        new = checksum(pseudo + payload[:offset] + b"\0\0" + payload[offset + 2 :]).to_bytes(2)
    if next_header == _UDP and new == b"\0\0":
        new = b"\xff\xff"  # zero would say that there is none (RFC 768)
    return payload[:offset] + new + payload[offset + 2 :]
