"""Run the programs in docs/examples as a reader would."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"
MARKER = bytes(4)
IKE_HEADER = struct.Struct("!8s8sBBBBII")


@contextlib.contextmanager
def running(*command: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def first_line(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    assert line, process.communicate()[1]
    return line


def ports(process: subprocess.Popen[str]) -> list[int]:
    return [int(number) for number in re.findall(r"\b\d+\b", first_line(process))]


@pytest.fixture
def peer() -> Iterator[socket.socket]:
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(20)
        yield sock


def ike(exchange: int) -> bytes:
    return IKE_HEADER.pack(b"INITIATE", bytes(8), 33, 0x20, exchange, 0x08, 7, IKE_HEADER.size)


def test_a_daemon_for_solaris_runs_unmodified(peer: socket.socket) -> None:
    with running("-m", "natcompat.commands.run", str(EXAMPLES / "solaris_daemon.py"), "0") as daemon:
        (port,) = ports(daemon)
        address = ("127.0.0.1", port)
        for noise in (b"\xff", b"", b"\1\2\3\4ESP", b"\1" * 100):
            peer.sendto(noise, address)
        peer.sendto(MARKER + ike(34), address)
        reply = peer.recv(1500)
        assert reply[:4] == MARKER
        assert IKE_HEADER.unpack(reply[4:])[:5] == (b"INITIATE", b"RESPONSE", 33, 0x20, 34)
        peer.sendto(MARKER + ike(0), address)
        assert daemon.wait(20) == 0


def test_a_daemon_for_solaris_needs_the_option(peer: socket.socket) -> None:
    """The counter-test: without natcompat the option is unknown here."""
    if sys.platform == "sunos5":
        pytest.skip("Solaris knows the option")
    run = subprocess.run(
        [sys.executable, str(EXAMPLES / "solaris_daemon.py"), "0"], capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1
    assert "Protocol not available" in run.stderr


def test_the_select_loop_sees_ike_and_the_callable_sees_esp(peer: socket.socket) -> None:
    with running(str(EXAMPLES / "select_loop.py")) as daemon:
        _, port = ports(daemon)
        peer.sendto(b"\xff", ("127.0.0.1", port))
        peer.sendto(b"\1\2\3\4" + bytes(28), ("127.0.0.1", port))
        assert first_line(daemon).startswith("ESP of 32 bytes with SPI 01020304 from")
        peer.sendto(MARKER + b"message", ("127.0.0.1", port))
        assert first_line(daemon).startswith("IKE of 7 bytes from")
        peer.sendto(MARKER, ("127.0.0.1", port))
        assert first_line(daemon).startswith("IKE of 0 bytes from")
        assert "ike=2, esp=1, keepalives=1" in first_line(daemon)
        assert daemon.wait(20) == 0


def test_the_asyncio_daemon_answers(peer: socket.socket) -> None:
    with running(str(EXAMPLES / "asyncio_daemon.py")) as daemon:
        (port,) = ports(daemon)
        peer.sendto(b"\xff", ("127.0.0.1", port))
        peer.sendto(MARKER + b"message", ("127.0.0.1", port))
        assert peer.recv(1500) == MARKER + b"message"
        peer.sendto(MARKER, ("127.0.0.1", port))
        assert daemon.wait(20) == 0
