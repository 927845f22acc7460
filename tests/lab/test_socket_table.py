"""What a UDP socket with UDP_ENCAP_ESPINUDP delivers, on this kernel and the lab's.

This is what the kernel does by itself, before natcompat adds its part.
"""

from __future__ import annotations

import select
import socket
import sys

import pytest

from natcompat.kernel.xfrm.probe import UDP_ENCAP, UDP_ENCAP_ESPINUDP

if sys.platform != "linux":
    pytest.skip("the socket option of Linux", allow_module_level=True)

SPI = b"\xc0\xde\x00\x01"

ROWS: list[tuple[str, bytes, bool]] = [
    ("empty", b"", True),
    ("keepalive", b"\xff", False),
    ("one zero byte", b"\0", True),
    ("one other byte", b"\x7f", True),
    ("two bytes", b"\xff\xff", True),
    ("three bytes", b"\xff\xff\xff", True),
    ("bare marker", bytes(4), True),
    ("marker and one byte", bytes(4) + b"\1", True),
    ("marker and four zeros", bytes(8), True),
    ("marker and 1400 bytes", bytes(4) + b"\xa5" * 1400, True),
    ("SPI alone", SPI, True),
    ("SPI and one byte", SPI + b"\0", True),
    ("SPI and sequence number", SPI + b"\0\0\0\1", True),
    ("nine bytes", SPI + b"\0\0\0\1\0", False),
    ("nineteen bytes", SPI + bytes(15), False),
    ("twenty bytes", SPI + bytes(16), False),
    ("132 bytes", SPI + b"\0\0\0\1" + bytes(124), False),
]
"""Name, UDP payload, whether it is delivered (always as it was sent, marker included)."""

TABLE = pytest.mark.parametrize(
    ("payload", "delivered"), [row[1:] for row in ROWS], ids=[row[0] for row in ROWS]
)
LOOPBACKS = pytest.mark.parametrize("loopback", ["127.0.0.1", "::1"], ids=["IPv4", "IPv6"])


def check(loopback: str, payload: bytes, delivered: bool) -> None:
    family = socket.AF_INET6 if ":" in loopback else socket.AF_INET
    with (
        socket.socket(family, socket.SOCK_DGRAM) as receiver,
        socket.socket(family, socket.SOCK_DGRAM) as sender,
    ):
        try:
            receiver.setsockopt(socket.IPPROTO_UDP, UDP_ENCAP, UDP_ENCAP_ESPINUDP)
        except OSError as error:
            pytest.skip(f"this kernel has no UDP_ENCAP: {error}")
        assert receiver.getsockopt(socket.IPPROTO_UDP, UDP_ENCAP) == UDP_ENCAP_ESPINUDP
        receiver.bind((loopback, 0))
        receiver.settimeout(5)
        sender.sendto(payload, receiver.getsockname())
        # What comes behind it tells that it was dropped, without waiting for nothing.
        sender.sendto(bytes(4) + b"next", receiver.getsockname())
        assert select.select([receiver], [], [], 5)[0]
        if delivered:
            assert receiver.recv(2048) == payload
        assert receiver.recv(2048) == bytes(4) + b"next"
        receiver.setblocking(False)
        with pytest.raises(BlockingIOError):
            receiver.recv(2048)


@LOOPBACKS
@TABLE
def test_on_this_kernel(loopback: str, payload: bytes, delivered: bool) -> None:
    check(loopback, payload, delivered)


@pytest.mark.kernel_esp
@LOOPBACKS
@TABLE
def test_on_a_kernel_with_esp(loopback: str, payload: bytes, delivered: bool) -> None:
    check(loopback, payload, delivered)


@pytest.mark.kernel_esp
@LOOPBACKS
@pytest.mark.parametrize(
    ("length", "counted"), [(9, {4: 0, 6: 0}), (19, {4: 0, 6: 0}), (20, {4: 1, 6: 0}), (40, {4: 1, 6: 1})]
)
def test_esp_of_nobody_is_counted(loopback: str, length: int, counted: dict[int, int]) -> None:
    def without_state() -> int:
        with open("/proc/net/xfrm_stat", encoding="ascii") as stream:
            return next(int(line.split()[1]) for line in stream if line.startswith("XfrmInNoStates"))

    before = without_state()
    check(loopback, (SPI + b"\0\0\0\1" + bytes(64))[:length], False)
    assert without_state() - before == counted[6 if ":" in loopback else 4]
