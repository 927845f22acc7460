"""The non-ESP marker, for programs that carry UDP payloads without a socket of natcompat's."""

from __future__ import annotations

from natcompat.contract import MARKER_LENGTH, NON_ESP_MARKER, Verdict, classify


def add_marker(message: bytes | bytearray | memoryview) -> bytes:
    """Return the UDP payload that carries an IKE message on port 4500 (RFC 3948, 2.2)."""
    return NON_ESP_MARKER + message


def split_marker(payload: bytes | bytearray | memoryview) -> tuple[Verdict, bytes]:
    """Return what a UDP payload from port 4500 is, and its content.

    For `Verdict.IKE` the content is the message without the marker. For the others it is the payload: an
    ESP packet, or what a socket with the option drops (a NAT-keepalive, a runt).
    """
    verdict = classify(payload)
    data = bytes(payload)
    return verdict, data[MARKER_LENGTH:] if verdict is Verdict.IKE else data
