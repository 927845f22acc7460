"""Endpoints on gevent's sockets, and in a process that gevent has patched."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

gevent = pytest.importorskip("gevent", reason="gevent is not installed for this Python")
from gevent import socket  # noqa: E402

from natcompat import (  # noqa: E402
    NAT_KEEPALIVE,
    NON_ESP_MARKER,
    Keepalive,
    NatTEndpoint,
    Verdict,
    get_nat_t_endpoint,
    set_nat_t_endpoint,
)
from natcompat.contract import OUTBOUND_TABLE, TABLE  # noqa: E402

PATIENCE = 10.0
ESP = b"\xc0\xde\x00\x01\0\0\0\x01" + bytes(100)
IKE = NON_ESP_MARKER + b"IKE"

_FLOOD = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(5_000_000):  # should the test not end it
    for payload in (bytes.fromhex(sys.argv[2]), b"\\xff"):
        sock.sendto(payload, ("127.0.0.1", int(sys.argv[1])))
"""


@contextlib.contextmanager
def flooded(port: int) -> Iterator[None]:
    """Another process floods `port` with ESP and keepalives."""
    flooder = subprocess.Popen([sys.executable, "-c", _FLOOD, str(port), ESP.hex()])
    try:
        yield
        assert flooder.poll() is None, "the flood ended before the test"
    finally:
        flooder.kill()
        flooder.wait()


class Pair:
    """A gevent socket with the option, its peer, and the diverted ESP."""

    def __init__(self, family: int, backend: str) -> None:
        host = "::1" if family == socket.AF_INET6 else "127.0.0.1"
        self.sock = socket.socket(family, socket.SOCK_DGRAM)
        self.peer = socket.socket(family, socket.SOCK_DGRAM)
        for sock in (self.sock, self.peer):
            sock.bind((host, 0))
            sock.settimeout(PATIENCE)
        self.address = self.sock.getsockname()
        self.diverted: list[bytes] = []
        self.endpoint: NatTEndpoint = set_nat_t_endpoint(self.sock, backend=backend, esp=self.take)

    def take(self, packet: memoryview, source: Any) -> None:
        self.diverted.append(bytes(packet))


@pytest.fixture(params=["userspace", "userspace:in-line"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def pair(request: pytest.FixtureRequest, backend: str) -> Iterator[Pair]:
    before = threading.enumerate()
    made = Pair(request.param, backend)
    yield made
    made.sock.close()
    made.peer.close()
    assert set(threading.enumerate()) <= set(before), "a thread is left"


@contextlib.contextmanager
def others() -> Iterator[list[int]]:
    """Count in a list how often another greenlet runs."""
    turns = [0]

    def count() -> None:
        while True:
            turns[0] += 1
            gevent.sleep(0.001)

    greenlet = gevent.spawn(count)
    try:
        yield turns
    finally:
        greenlet.kill()


def by_recv_into(sock: socket.socket) -> bytes:
    buffer = bytearray(10000)
    return bytes(buffer[: sock.recv_into(buffer)])


def by_recvfrom_into(sock: socket.socket) -> bytes:
    buffer = bytearray(10000)
    return bytes(buffer[: sock.recvfrom_into(buffer)[0]])


RECEIVES: dict[str, Callable[[Any], bytes]] = {
    "recv": lambda sock: bytes(sock.recv(10000)),
    "recvfrom": lambda sock: bytes(sock.recvfrom(10000)[0]),
    "recv_into": by_recv_into,
    "recvfrom_into": by_recvfrom_into,
    "recvmsg": lambda sock: bytes(sock.recvmsg(10000)[0]),
}

SENDS: dict[str, Callable[[Any, bytes, Any], object]] = {
    "sendto": lambda sock, data, address: sock.sendto(data, address),
    "sendto with flags": lambda sock, data, address: sock.sendto(data, 0, address),
    "sendmsg": lambda sock, data, address: sock.sendmsg([data], [], 0, address),
}

CONNECTED_SENDS: dict[str, Callable[[Any, bytes], object]] = {
    "send": lambda sock, data: sock.send(data),
    "sendall": lambda sock, data: sock.sendall(data),
    "sendmsg": lambda sock, data: sock.sendmsg([data]),
}


class TestContract:
    @pytest.mark.parametrize("receive", RECEIVES.values(), ids=list(RECEIVES))
    def test_inbound_rows_of_the_contract(self, pair: Pair, receive: Callable[[Any], bytes]) -> None:
        for row in TABLE:
            pair.peer.sendto(row.payload, pair.address)
        delivered = [row.delivered for row in TABLE if row.delivered is not None]
        assert [receive(pair.sock) for _ in delivered] == delivered
        pair.peer.sendto(IKE, pair.address)
        assert receive(pair.sock) == b"IKE", "and all that was between them is gone"
        wanted = sorted(row.payload for row in TABLE if row.verdict is Verdict.ESP)
        with gevent.Timeout(PATIENCE):
            while len(pair.diverted) < len(wanted):
                gevent.sleep(0.002)
        assert sorted(pair.diverted) == wanted

    @pytest.mark.parametrize("send", SENDS.values(), ids=list(SENDS))
    def test_outbound_rows_of_the_contract(
        self, pair: Pair, send: Callable[[Any, bytes, Any], object]
    ) -> None:
        for row in OUTBOUND_TABLE:
            assert send(pair.sock, row.message, pair.peer.getsockname()) == len(row.message)
            assert pair.peer.recv(10000) == row.wire

    @pytest.mark.parametrize("send", CONNECTED_SENDS.values(), ids=list(CONNECTED_SENDS))
    def test_a_send_on_a_connected_socket_has_one_marker(
        self, pair: Pair, send: Callable[[Any, bytes], object]
    ) -> None:
        pair.sock.connect(pair.peer.getsockname())
        for row in OUTBOUND_TABLE:
            send(pair.sock, row.message)
            assert pair.peer.recv(10000) == row.wire
        pair.peer.settimeout(0.01)
        with pytest.raises(TimeoutError):
            pair.peer.recv(1)


class TestCooperation:
    @pytest.mark.parametrize("timeout", [None, PATIENCE], ids=["blocking", "with a timeout"])
    @pytest.mark.parametrize("receive", RECEIVES.values(), ids=list(RECEIVES))
    def test_a_receive_lets_other_greenlets_run(
        self, pair: Pair, receive: Callable[[Any], bytes], timeout: float | None
    ) -> None:
        pair.sock.settimeout(timeout)

        def send_later() -> None:
            for payload in (NAT_KEEPALIVE, ESP, b"", IKE):
                gevent.sleep(0.01)
                pair.peer.sendto(payload, pair.address)

        with others() as turns, gevent.Timeout(PATIENCE):
            greenlet = gevent.spawn(send_later)
            assert receive(pair.sock) == b"IKE"
            greenlet.get()
        assert turns[0] > 5

    @pytest.mark.parametrize("receive", RECEIVES.values(), ids=list(RECEIVES))
    def test_a_timeout_is_a_deadline_while_datagrams_are_dropped(
        self, pair: Pair, receive: Callable[[Any], bytes]
    ) -> None:
        pair.sock.settimeout(0.2)

        def keep_alive() -> None:
            while True:
                pair.peer.sendto(NAT_KEEPALIVE, pair.address)
                pair.peer.sendto(ESP, pair.address)
                gevent.sleep(0.02)

        greenlet = gevent.spawn(keep_alive)
        begin = time.monotonic()
        try:
            with pytest.raises(TimeoutError), gevent.Timeout(PATIENCE):
                receive(pair.sock)
        finally:
            greenlet.kill()
        assert 0.2 <= time.monotonic() - begin < PATIENCE

    @pytest.mark.parametrize("timeout", [None, PATIENCE], ids=["blocking", "with a timeout"])
    def test_a_flood_lets_other_greenlets_run(self, backend: str, timeout: float | None) -> None:
        pair = Pair(socket.AF_INET, backend)
        pair.sock.settimeout(timeout)
        with flooded(pair.address[1]), others() as turns, gevent.Timeout(PATIENCE):
            while not pair.endpoint.stats().keepalives:  # the flood has begun
                with contextlib.suppress(gevent.Timeout, TimeoutError), gevent.Timeout(0.05):
                    pair.sock.recv(100)
            turns[0] = 0
            receiving = gevent.spawn(pair.sock.recv, 100)
            while turns[0] < 5:
                gevent.sleep(0)
            assert not receiving.ready(), "one receive, all the time"
            receiving.kill()
            received = b""
            while not received:  # in line the flood may take the place of one
                pair.peer.sendto(IKE, pair.address)
                with contextlib.suppress(gevent.Timeout, TimeoutError), gevent.Timeout(0.05):
                    received = pair.sock.recv(100)
        assert received == b"IKE"
        pair.sock.close()
        pair.peer.close()

    @pytest.mark.parametrize("timeout", [None, PATIENCE], ids=["blocking", "with a timeout"])
    def test_dropping_a_full_queue_lets_other_greenlets_run(self, timeout: float | None) -> None:
        pair = Pair(socket.AF_INET, "userspace:in-line")
        pair.sock.settimeout(timeout)
        turns = 0

        def count() -> None:
            nonlocal turns
            while True:
                turns += 1
                gevent.sleep(0)

        for _ in range(200):  # fits into the smallest default queue
            pair.peer.sendto(NAT_KEEPALIVE, pair.address)
        pair.peer.sendto(IKE, pair.address)
        greenlet = gevent.spawn(count)
        try:
            assert pair.sock.recv(100) == b"IKE"
            assert turns >= 3, "other greenlets did not run while each receive found a datagram"
        finally:
            greenlet.kill()
            pair.sock.close()
            pair.peer.close()

    def test_an_empty_non_blocking_socket_raises_eagain(self, pair: Pair) -> None:
        pair.sock.setblocking(False)
        for payload in (NAT_KEEPALIVE, ESP):
            pair.peer.sendto(payload, pair.address)
        with pytest.raises(BlockingIOError):
            pair.sock.recv(100)
        with pytest.raises(BlockingIOError):
            pair.sock.recvfrom(100)


def test_receive_tells_the_local_address_and_send_uses_it(pair: Pair) -> None:
    def send() -> None:
        gevent.sleep(0.01)
        for payload in (ESP, NAT_KEEPALIVE, NON_ESP_MARKER + b"IKE"):
            pair.peer.sendto(payload, pair.address)

    with others() as turns:
        gevent.spawn(send)
        message, source, local = pair.endpoint.receive()
        assert turns[0] > 2, "other greenlets did not run"
    assert (message, source, str(local)) == (b"IKE", pair.peer.getsockname(), pair.address[0])
    assert pair.endpoint.send(b"answer", source, local_address=local) == 6
    pair.endpoint.send_keepalive(source, local_address=local)
    assert [pair.peer.recv(100), pair.peer.recv(100)] == [NON_ESP_MARKER + b"answer", NAT_KEEPALIVE]


class TestLife:
    def test_a_duplicate_is_served(self, pair: Pair) -> None:
        with contextlib.closing(pair.sock.dup()) as alias:
            assert get_nat_t_endpoint(alias) is pair.endpoint
            alias.settimeout(PATIENCE)
            pair.peer.sendto(IKE, pair.address)
            assert alias.recv(100) == b"IKE"
            alias.sendto(b"IKE", pair.peer.getsockname())
            assert pair.peer.recv(100) == IKE
            pair.sock.close()
            pair.peer.sendto(IKE, pair.address)
            assert alias.recv(100) == b"IKE", "it goes on with the other"

    def test_close_ends_the_endpoint(self, pair: Pair) -> None:
        pair.sock.close()
        assert pair.endpoint.closed
        assert type(pair.sock) is socket.socket

    def test_clearing_the_option_restores_the_socket(self, pair: Pair) -> None:
        set_nat_t_endpoint(pair.sock, False)
        assert type(pair.sock) is socket.socket
        pair.peer.sendto(NAT_KEEPALIVE, pair.address)
        assert pair.sock.recv(100) == NAT_KEEPALIVE
        pair.sock.sendto(b"bare", pair.peer.getsockname())
        assert pair.peer.recv(100) == b"bare"

    def test_closing_ends_the_receive_of_a_greenlet(self, pair: Pair) -> None:
        pair.sock.settimeout(None)
        greenlet = gevent.spawn(pair.sock.recv, 100)
        gevent.sleep(0.01)
        pair.sock.close()
        with gevent.Timeout(PATIENCE), pytest.raises(OSError):  # noqa: PT011 - gevent's own, EBADF
            greenlet.get()

    def test_keepalives_of_a_loop(self, pair: Pair) -> None:
        with Keepalive(pair.endpoint, interval=0.05) as keepalive:
            keepalive.add(pair.peer.getsockname())
            assert [pair.peer.recv(100) for _ in range(2)] == [NAT_KEEPALIVE] * 2


PATCHED = Path(__file__).parents[1] / "support" / "gevent_patched.py"


def test_a_process_patched_by_gevent(backend: str) -> None:
    """``monkey.patch_all()`` before the import makes natcompat's threads greenlets."""
    root = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")])),
    }
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", str(PATCHED), backend],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "all is well\n", "")
