"""Reads recorded conversations: the UDP datagrams of a pcap file, by default the one in the package.

Enough to replay what an IKE responder saw on its NAT-T port; no general reader of captures.

Sources: draft-ietf-opsawg-pcap (file format and link types); RFC 791, RFC 8200, RFC 768.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from ipaddress import ip_address
from os import PathLike, fspath

from natcompat.contract import NAT_T_PORT

_MAGIC = {
    b"\xa1\xb2\xc3\xd4": (">", 1000),
    b"\xd4\xc3\xb2\xa1": ("<", 1000),
    b"\xa1\xb2\x3c\x4d": (">", 1),
    b"\x4d\x3c\xb2\xa1": ("<", 1),
}
"""First four bytes of a file: its byte order and the nanoseconds in a unit of its time stamps."""
_FILE_HEADER, _RECORD_HEADER, _ETHERNET_HEADER, _UDP_HEADER = 24, 16, 14, 8
_ETHERNET, _RAW_IP = 1, 101
_IP_VERSION = {0x0800: 4, 0x86DD: 6}
_IP_HEADER = {4: 20, 6: 40}
_UDP, _IPV6_FRAGMENT = 17, 44


@dataclass(frozen=True, slots=True)
class Datagram:
    """One UDP datagram as it was on the wire, the non-ESP marker and keepalives included."""

    time: int
    """Nanoseconds since 1970 (UTC), an integer so that nothing is rounded."""
    source: str
    """IP address as text, without a zone."""
    source_port: int
    destination: str
    destination_port: int
    payload: bytes


@dataclass(frozen=True, slots=True)
class Conversation:
    """The datagrams of one recording, in the order of the file."""

    datagrams: tuple[Datagram, ...]

    def received(self, port: int = NAT_T_PORT) -> tuple[Datagram, ...]:
        """Return the datagrams to `port` of the responder: the destination of the first datagram."""
        return tuple(
            datagram
            for datagram in self.datagrams
            if datagram.destination_port == port and datagram.destination == self.datagrams[0].destination
        )

    def sent(self, port: int = NAT_T_PORT) -> tuple[Datagram, ...]:
        """Return the datagrams from `port` of the responder: the destination of the first datagram."""
        return tuple(
            datagram
            for datagram in self.datagrams
            if datagram.source_port == port and datagram.source == self.datagrams[0].destination
        )


def load(path: str | PathLike[str] | None = None) -> Conversation:
    """Read the UDP datagrams of the pcap file `path`; None: of the conversation in the package.

    Reads pcap 2.4 (not pcapng) of either byte order, with time stamps in micro- or nanoseconds, of
    Ethernet or raw IP. Frames without UDP directly inside IPv4 or IPv6 are skipped: other
    protocols, VLAN tags, IPv6 extension headers. Checksums are not checked.

    Raises ValueError, with the file and the number of the packet (the first is 1), when the file is
    none of these, a length does not fit, or a datagram is fragmented; OSError when it cannot be read.
    """
    if path is None:
        file = resources.files("natcompat") / "data" / "ikev2-nat-t.pcap"
        return Conversation(tuple(_datagrams(file.read_bytes(), file.name)))
    with open(path, "rb") as stream:
        return Conversation(tuple(_datagrams(stream.read(), fspath(path))))


def _datagrams(data: bytes, name: str) -> Iterator[Datagram]:
    order, unit = _MAGIC.get(data[:4], ("", 0))
    if not order:
        raise ValueError(f"{name}: not a pcap file: it starts with {data[:4]!r}")
    if len(data) < _FILE_HEADER:
        raise ValueError(f"{name}: file header truncated to {len(data)} of {_FILE_HEADER} bytes")
    major, minor, link_type = struct.unpack_from(f"{order}HH12xI", data, 4)
    if (major, minor) != (2, 4):
        raise ValueError(f"{name}: pcap version {major}.{minor}, not 2.4")
    link_type &= 0xFFFF  # above it are the length of a frame check sequence and reserved bits
    if link_type not in (_ETHERNET, _RAW_IP):
        raise ValueError(f"{name}: link type {link_type}, neither Ethernet (1) nor raw IP (101)")
    number, offset = 0, _FILE_HEADER
    while offset < len(data):
        number += 1
        try:
            if len(data) - offset < _RECORD_HEADER:
                raise ValueError(f"header truncated to {len(data) - offset} of {_RECORD_HEADER} bytes")
            seconds, fraction, length = struct.unpack_from(f"{order}III", data, offset)
            offset += _RECORD_HEADER
            if len(data) - offset < length:
                raise ValueError(f"truncated to {len(data) - offset} of {length} bytes")
            packet = _ip_packet(data[offset : offset + length], link_type)
            datagram = packet and _datagram(packet, seconds * 1_000_000_000 + fraction * unit)
        except ValueError as error:
            raise ValueError(f"{name}: packet {number}: {error}") from None
        offset += length
        if datagram:
            yield datagram


def _ip_packet(frame: bytes, link_type: int) -> bytes | None:
    if link_type == _RAW_IP:
        version, packet = None, frame
    else:
        if len(frame) < _ETHERNET_HEADER:
            raise ValueError(f"Ethernet frame of only {len(frame)} bytes")
        version, packet = _IP_VERSION.get(int.from_bytes(frame[12:14])), frame[_ETHERNET_HEADER:]
        if version is None:
            return None
    if not packet or packet[0] >> 4 not in (4, 6) or version not in (None, packet[0] >> 4):
        raise ValueError(f"no IPv{version or '4 or IPv6'} packet: it starts with {packet[:1]!r}")
    return packet


def _datagram(packet: bytes, time: int) -> Datagram | None:
    version = packet[0] >> 4
    if len(packet) < _IP_HEADER[version]:
        raise ValueError(f"IPv{version} packet of only {len(packet)} bytes")
    if version == 4:
        header, length, protocol = (packet[0] & 15) * 4, int.from_bytes(packet[2:4]), packet[9]
        fragmented = bool(int.from_bytes(packet[6:8]) & 0x3FFF)  # more fragments, or an offset
        source, destination = packet[12:16], packet[16:20]
    else:
        header, length, protocol = 40, 40 + int.from_bytes(packet[4:6]), packet[6]
        fragmented = protocol == _IPV6_FRAGMENT
        source, destination = packet[8:24], packet[24:40]
    if protocol != _UDP and not (version == 6 and fragmented):
        return None
    if header < _IP_HEADER[version]:
        raise ValueError(f"IPv4 header length (IHL) of only {header} bytes")
    if not header <= length <= len(packet):
        raise ValueError(f"IP length of {length} bytes: header of {header}, {len(packet)} captured")
    if fragmented:
        raise ValueError("fragmented")
    udp = packet[header:length]  # what follows pads the Ethernet frame
    if len(udp) < _UDP_HEADER:
        raise ValueError(f"UDP header truncated to {len(udp)} of {_UDP_HEADER} bytes")
    source_port, destination_port, udp_length = struct.unpack_from("!HHH", udp)
    if not _UDP_HEADER <= udp_length <= len(udp):
        raise ValueError(f"UDP length of {udp_length} bytes in a packet with {len(udp)}")
    return Datagram(
        time,
        str(ip_address(source)),
        source_port,
        str(ip_address(destination)),
        destination_port,
        udp[_UDP_HEADER:udp_length],
    )
