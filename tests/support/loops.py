"""Event loops to run endpoints on, and a protocol that records its calls."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

from natcompat import NON_ESP_MARKER
from natcompat.contract import TABLE

pytest.importorskip("trio")
uvloop = pytest.importorskip("uvloop")

PATIENCE = 10.0
ESP = b"\xc0\xde\x00\x01\0\0\0\x01" + bytes(100)
LAST = b"the last message"

Main = Callable[[], Coroutine[Any, Any, None]]
Run = Callable[[Main], None]
"""Runs a coroutine function on one event loop."""
NewSocket = Callable[..., socket.socket]


def _not_implemented(*_: Any) -> Any:
    raise NotImplementedError


class ProactorModel(asyncio.SelectorEventLoop):
    """A model of the Proactor of Windows: a loop that watches no descriptors for others."""


for method in ("add_reader", "add_writer", "remove_reader", "remove_writer"):
    setattr(ProactorModel, method, _not_implemented)
ProactorModel.__module__ = "asyncio.proactor_events"

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
    "model of the Proactor": ProactorModel,
}


def run_on(new_loop: Callable[[], asyncio.AbstractEventLoop], main: Main) -> None:
    """Run `main` on a new loop."""
    with asyncio.Runner(loop_factory=new_loop) as runner:
        runner.run(main())


class Receiver(asyncio.DatagramProtocol):
    """A protocol that records its calls."""

    def __init__(self) -> None:
        self.received: list[tuple[bytes, Any]] = []
        self.errors: list[Exception] = []
        self.calls: list[str] = []
        self.lost: list[Exception | None] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.calls.append("connection_made")

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.received.append((data, addr))

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)

    def pause_writing(self) -> None:
        self.calls.append("pause_writing")

    def resume_writing(self) -> None:
        self.calls.append("resume_writing")

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)


def ignore(packet: memoryview, source: Any) -> None:
    """Take ESP and do nothing with it."""


async def until(condition: Callable[[], object], what: str) -> None:
    """Wait on the loop until `condition`."""
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited in vain until {what}"
        await asyncio.sleep(0.002)


_FLOOD = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(5_000_000):  # should the test not end it
    for payload in (bytes.fromhex(sys.argv[2]), b"\\xff"):
        sock.sendto(payload, ("127.0.0.1", int(sys.argv[1])))
"""


@contextlib.contextmanager
def flooded(sock: socket.socket) -> Iterator[None]:
    """Another process floods `sock` with ESP and keepalives."""
    flooder = subprocess.Popen([sys.executable, "-c", _FLOOD, str(sock.getsockname()[1]), ESP.hex()])
    try:
        yield
        assert flooder.poll() is None, "the flood ended before the test"
    finally:
        flooder.kill()
        flooder.wait()


def send_table(peer: socket.socket, address: Any) -> list[bytes]:
    """Send every row of the contract and one message more; return what the application must receive."""
    for row in TABLE:
        peer.sendto(row.payload, address)
    peer.sendto(NON_ESP_MARKER + LAST, address)
    return [row.delivered for row in TABLE if row.delivered is not None] + [LAST]
