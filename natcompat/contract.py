"""The contract: what a socket with the option delivers, drops, diverts and sends.

This module holds the contract as data: the classifier, the four duties that implement it, and `TABLE`,
the rows against which every backend and `natcompat verify` are tested.

Sources: RFC 3948 (sections 2.1 to 2.4, 3.3); udp(4P) and ``zero_spi_check()`` in ip.c of illumos.
"""

from __future__ import annotations

import enum
from typing import NamedTuple

UDP_NAT_T_ENDPOINT = 0x0103
"""Option name at level ``IPPROTO_UDP``; ``netinet/udp.h`` of Solaris and illumos."""

NON_ESP_MARKER = bytes(4)
"""The four zero bytes in front of every IKE message on the NAT-T port (RFC 3948, 2.2)."""

NAT_KEEPALIVE = b"\xff"
"""The payload of a NAT-keepalive (RFC 3948, 2.3)."""

IKE_PORT = 500
"""The UDP port of IKE without a NAT (RFC 7296, 2; host byte order)."""

NAT_T_PORT = 4500
"""The UDP port of IKE and ESP behind a NAT (RFC 7296, 2.23; host byte order)."""

MARKER_LENGTH = len(NON_ESP_MARKER)


class Verdict(enum.Enum):
    """The fate of an inbound UDP payload."""

    KEEPALIVE = "keepalive"
    """One byte 0xFF: dropped."""
    RUNT = "runt"
    """Fewer than four bytes, but not a keepalive; an empty payload, too: dropped."""
    IKE = "ike"
    """Begins with the non-ESP marker: delivered without it."""
    ESP = "esp"
    """Four bytes or more with a first word that is not zero: to ESP, never to the application."""


class Duty(enum.Flag):
    """The four parts of the option. The kernel performs some of them, depending on the backend."""

    DROP_RUNTS = enum.auto()
    DIVERT_ESP = enum.auto()
    STRIP_MARKER = enum.auto()
    INSERT_MARKER = enum.auto()


class Performer(enum.Enum):
    """The part of the system that performs a duty."""

    KERNEL = "kernel"
    """The operating system's own NAT-T support."""
    FILTER = "filter"
    """The kernel, by a classic BPF program that natcompat attached to the socket."""
    STEERING = "steering"
    """The kernel, by a SO_REUSEPORT program that sends the datagram to natcompat's own socket."""
    PROCESS = "process"
    """This process, in the application's receives and sends."""


def classify(payload: bytes | bytearray | memoryview) -> Verdict:
    """Return the verdict on an inbound UDP `payload` of a socket with the option.

    Takes any payload and raises nothing. Only the first four bytes count, as on Solaris: a payload of
    four bytes that are not all zero is ESP.
    """
    if type(payload) is memoryview and payload.format != "B":
        payload = payload.cast("B")  # a view of another format is unequal to the same bytes
    if payload[:MARKER_LENGTH] == NON_ESP_MARKER:
        return Verdict.IKE
    if len(payload) >= MARKER_LENGTH:
        return Verdict.ESP
    return Verdict.KEEPALIVE if payload == NAT_KEEPALIVE else Verdict.RUNT


class Row(NamedTuple):
    """One inbound row of the contract."""

    name: str
    """Name of the case."""
    payload: bytes
    """The UDP payload on the wire."""
    verdict: Verdict
    """The verdict on it."""
    delivered: bytes | None
    """What the application receives; None: nothing, and `select` does not wake."""


class OutboundRow(NamedTuple):
    """One outbound row of the contract."""

    name: str
    message: bytes
    """The message of the application."""
    wire: bytes
    """The UDP payload on the wire."""


_SPI = b"\xc0\xde\x00\x01"
_IKE_HEADER = bytes.fromhex("1122334455667788 0000000000000000 21202208 00000000 0000001c")
_DROP_KEEPALIVE, _DROP, _ESP, _IKE = Verdict.KEEPALIVE, Verdict.RUNT, Verdict.ESP, Verdict.IKE

TABLE: tuple[Row, ...] = (
    Row("empty", b"", _DROP, None),
    Row("keepalive", NAT_KEEPALIVE, _DROP_KEEPALIVE, None),
    Row("one zero byte", b"\0", _DROP, None),
    Row("one other byte", b"\x7f", _DROP, None),
    Row("two bytes", b"\xff\xff", _DROP, None),
    Row("two zero bytes", b"\0\0", _DROP, None),
    Row("three bytes", b"\xff\xff\xff", _DROP, None),
    Row("three zero bytes", b"\0\0\0", _DROP, None),
    Row("bare marker", NON_ESP_MARKER, _IKE, b""),
    Row("marker and one byte", NON_ESP_MARKER + b"\x01", _IKE, b"\x01"),
    Row("marker and keepalive", NON_ESP_MARKER + NAT_KEEPALIVE, _IKE, NAT_KEEPALIVE),
    Row("marker twice", NON_ESP_MARKER * 2, _IKE, NON_ESP_MARKER),
    Row("marker and IKE header", NON_ESP_MARKER + _IKE_HEADER, _IKE, _IKE_HEADER),
    Row("marker and 1400 bytes", NON_ESP_MARKER + b"\xa5" * 1400, _IKE, b"\xa5" * 1400),
    Row("marker and 9000 bytes", NON_ESP_MARKER + b"\x5a" * 9000, _IKE, b"\x5a" * 9000),
    Row("SPI alone", _SPI, _ESP, None),
    Row("only the last bit of the SPI", b"\0\0\0\x01", _ESP, None),
    Row("only the first bit of the SPI", b"\x80\0\0\0", _ESP, None),
    Row("four bytes FF", b"\xff" * 4, _ESP, None),
    Row("SPI and one byte", _SPI + b"\0", _ESP, None),
    Row("SPI and sequence number", _SPI + b"\0\0\0\x01", _ESP, None),
    Row("nine bytes", _SPI + b"\0\0\0\x01\0", _ESP, None),
    Row("nineteen bytes", _SPI + bytes(15), _ESP, None),
    Row("twenty bytes", _SPI + bytes(16), _ESP, None),
    Row("ESP packet of 132 bytes", _SPI + b"\0\0\0\x01" + b"\x3c" * 124, _ESP, None),
    Row("ESP packet of 1400 bytes", _SPI + b"\0\0\0\x02" + b"\xc3" * 1392, _ESP, None),
    Row("IKE without a marker", _IKE_HEADER, _ESP, None),
)
"""Inbound payloads; every backend keeps every row, on IPv4 and IPv6."""

OUTBOUND_TABLE: tuple[OutboundRow, ...] = tuple(
    OutboundRow(name, message, NON_ESP_MARKER + message)
    for name, message in (
        ("empty", b""),
        ("one byte", b"\x01"),
        ("one byte FF", NAT_KEEPALIVE),
        ("four zero bytes", bytes(4)),
        ("IKE header", _IKE_HEADER),
        ("1400 bytes", b"\xa5" * 1400),
        ("9000 bytes", b"\x5a" * 9000),
    )
)
"""Outbound messages; every send gets the marker, to every destination."""

LARGEST_PAYLOAD = {4: 65535 - 20 - 8 - MARKER_LENGTH, 6: 65535 - 8 - MARKER_LENGTH}
"""Largest message that can be sent, by IP version: 65503 and 65523 bytes; one more is EMSGSIZE.

An IPv6 payload length counts no IPv6 header (RFC 8200, 3), an IPv4 total length counts all.
"""
