"""Setting and clearing the option at any time: queued datagrams, waiting threads, other arguments."""

from __future__ import annotations

import contextlib
import errno
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from natcompat import NatCompatError, get_nat_t_endpoint, set_nat_t_endpoint
from tests.support.pairs import ESP, IN_LINE, MARKER, NOISE, Pair, in_thread, of_kinds, ready, sleeping, until

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
ESP_OF_NOISE = [payload for payload in NOISE if len(payload) >= 4]


def assert_on(pair: Pair, app: socket.socket) -> None:
    """Assert that `app` is served in both directions."""
    for payload in (*NOISE, MARKER + b"in"):
        pair.peer.sendto(payload, app.getsockname())
    assert app.recvfrom(100) == (b"in", pair.peer.getsockname())
    app.sendto(b"out", pair.peer.getsockname())
    assert pair.peer.recvfrom(100) == (MARKER + b"out", app.getsockname())


def assert_off(pair: Pair, app: socket.socket) -> None:
    """Assert that `app` is a plain socket in both directions."""
    assert type(app) is socket.socket
    assert get_nat_t_endpoint(app) is None
    for payload in (*NOISE, MARKER + b"in", MARKER):
        pair.peer.sendto(payload, app.getsockname())
        assert app.recvfrom(10000) == (payload, pair.peer.getsockname())
    app.sendto(b"out", pair.peer.getsockname())
    assert pair.peer.recvfrom(100) == (b"out", app.getsockname())


OFF: dict[str, Callable[[socket.socket], Any]] = {
    "by-the-call": lambda sock: set_nat_t_endpoint(sock, False),
    "by-the-endpoint": lambda sock: get_nat_t_endpoint(sock).close(),  # type: ignore[union-attr]
    "by-the-option": lambda sock: sock.setsockopt(socket.IPPROTO_UDP, 0x0103, 0),
}


@pytest.mark.parametrize("off", OFF.values(), ids=OFF.keys())
@pytest.mark.parametrize("connected", [False, True], ids=["unconnected", "connected"])
def test_the_option_can_be_set_and_cleared_repeatedly(
    pair: Pair, off: Callable[[socket.socket], Any], connected: bool
) -> None:
    app = pair.app
    if connected:
        app.connect(pair.peer.getsockname())
    for _ in range(3):
        assert_on(pair, app)
        off(app)
        off_again = set_nat_t_endpoint(app, False)
        assert off_again is None
        assert_off(pair, app)
        pair.switch_on(app)


def test_the_option_can_be_set_before_bind(pair: Pair) -> None:
    app = pair.plain(bound=False)
    endpoint = pair.switch_on(app)
    assert app.getsockopt(17, 0x103) == 1
    app.bind((pair.host, 0))
    assert_on(pair, app)
    assert (endpoint.mode, endpoint.duties) == (pair.endpoint.mode, pair.endpoint.duties)


def test_the_option_can_be_cleared_before_bind(pair: Pair) -> None:
    app = pair.plain(bound=False)
    pair.switch_on(app)
    set_nat_t_endpoint(app, False)
    app.bind((pair.host, 0))
    assert_off(pair, app)


@pytest.mark.parametrize("bound", [False, True], ids=["unbound", "bound"])
@pytest.mark.parametrize("method", ["connect", "connect_ex"])
def test_the_option_can_be_set_before_connect(pair: Pair, bound: bool, method: str) -> None:
    app = pair.plain(bound=bound)
    pair.switch_on(app)
    assert not getattr(app, method)(pair.peer.getsockname())
    assert_on(pair, app)
    assert app.send(b"message") == 7
    assert pair.peer.recv(100) == MARKER + b"message"


def test_the_option_can_be_set_after_connect(pair: Pair) -> None:
    app = pair.plain(bound=False)
    app.connect(pair.peer.getsockname())
    pair.switch_on(app)
    assert_on(pair, app)


def test_a_socket_can_be_connected_to_another_peer(pair: Pair) -> None:
    pair.app.connect(pair.peer.getsockname())
    other = pair.plain()
    pair.app.connect(other.getsockname())
    pair.ike(b"not from the peer")
    other.sendto(MARKER + b"from the peer", pair.address)
    assert pair.app.recv(100) == b"from the peer"


def test_setting_the_option_again_returns_the_same_endpoint(pair: Pair) -> None:
    cls = type(pair.app)
    assert set_nat_t_endpoint(pair.app) is pair.endpoint
    assert pair.switch_on(pair.app) is pair.endpoint
    assert type(pair.app) is cls
    assert_on(pair, pair.app)


# --- queued datagrams -----------------------------------------------------------------------------


def test_datagrams_queued_before_the_option_are_treated_like_new_ones(pair: Pair) -> None:
    app = pair.plain()
    for payload in (*NOISE, MARKER + b"one", *NOISE, MARKER + b"two"):
        pair.peer.sendto(payload, app.getsockname())
    endpoint = pair.switch_on(app)
    assert [app.recvfrom(100)[0], app.recv(100)] == [b"one", b"two"]
    app.setblocking(False)
    for flags in (0, socket.MSG_PEEK):
        with pytest.raises(BlockingIOError):
            app.recv(100, flags)
    stats = endpoint.stats()
    assert (stats.ike, stats.keepalives, stats.runts, stats.esp) == (2, 2, 4, 2 * len(ESP_OF_NOISE))
    pair.expect_esp(ESP_OF_NOISE * 2)


def test_datagrams_still_queued_at_the_end_are_delivered_unchanged(pair: Pair) -> None:
    pair.ike(b"one")
    pair.ike(b"")
    pair.endpoint.close()
    pair.peer.sendto(ESP, pair.address)
    assert [pair.app.recv(100) for _ in range(3)] == [MARKER + b"one", MARKER, ESP]


@of_kinds(IN_LINE)
def test_in_line_esp_still_queued_at_the_end_is_delivered_unchanged(pair: Pair) -> None:
    pair.noise()
    pair.endpoint.close()
    assert [pair.app.recv(10000) for _ in NOISE] == list(NOISE)


# --- waiting threads ------------------------------------------------------------------------------

WAITS: dict[str, tuple[Callable[[socket.socket, int], bytes], int]] = {
    "recv": (lambda sock, size: sock.recv(size), 100),
    "recvfrom": (lambda sock, size: sock.recvfrom(size)[0], 100),
    "recvmsg": (lambda sock, size: sock.recvmsg(size)[0], 100),
    "recv_into": (lambda sock, size: into(sock.recv_into, size), 100),
    "recvfrom_into": (lambda sock, size: into(lambda buffer: sock.recvfrom_into(buffer)[0], size), 100),
    "recvmsg_into": (lambda sock, size: into(lambda buffer: sock.recvmsg_into([buffer])[0], size), 100),
    "recv-little": (lambda sock, size: sock.recv(size), 6),
    "recvfrom-little": (lambda sock, size: sock.recvfrom(size)[0], 6),
    "peek": (lambda sock, size: sock.recv(size, socket.MSG_PEEK), 100),
}
every_wait = pytest.mark.parametrize(("receive", "size"), WAITS.values(), ids=WAITS.keys())


def into(receive: Callable[[bytearray], int], size: int) -> bytes:
    buffer = bytearray(size)
    return bytes(buffer[: receive(buffer)])


@LINUX
@every_wait
@pytest.mark.parametrize("timeout", [None, 15], ids=["blocking", "with-timeout"])
def test_a_receive_that_waits_while_the_option_is_cleared_is_unfiltered(
    pair: Pair, receive: Callable[[socket.socket, int], bytes], size: int, timeout: float | None
) -> None:
    pair.app.settimeout(timeout)
    wait = in_thread(lambda: receive(pair.app, size))
    until(lambda: sleeping(wait))
    pair.endpoint.close()
    pair.peer.sendto(ESP, pair.address)
    assert wait() == ESP[:size]


@LINUX
@every_wait
def test_a_receive_that_has_dropped_datagrams_is_unfiltered_once_the_option_is_cleared(
    pair: Pair, receive: Callable[[socket.socket, int], bytes], size: int
) -> None:
    wait = in_thread(lambda: receive(pair.app, size))
    pair.noise()
    until(lambda: sleeping(wait) and not ready(pair.app))
    pair.endpoint.close()
    pair.peer.sendto(ESP, pair.address)
    assert wait() == ESP[:size]


@LINUX
@every_wait
def test_a_receive_that_waits_while_the_option_is_cleared_and_set_gets_ike(
    pair: Pair, receive: Callable[[socket.socket, int], bytes], size: int
) -> None:
    wait = in_thread(lambda: receive(pair.app, size))
    until(lambda: sleeping(wait))
    pair.endpoint.close()
    endpoint = pair.switch_on(pair.app)
    pair.noise()
    pair.ike(b"a message")
    assert wait() == b"a message"[:size]
    assert pair.endpoint.stats().ike == 0
    if receive is not WAITS["peek"][0]:
        assert endpoint.stats().ike == 1


@LINUX
@every_wait
def test_a_receive_that_waits_while_the_option_is_set_gets_one_datagram_unfiltered(
    pair: Pair, receive: Callable[[socket.socket, int], bytes], size: int
) -> None:
    pair.endpoint.close()
    wait = in_thread(lambda: receive(pair.app, size))
    until(lambda: sleeping(wait))
    pair.switch_on(pair.app)
    pair.ike(b"one")
    assert wait() == (MARKER + b"one")[:size]
    pair.ike(b"two")
    expected = b"one" if receive is WAITS["peek"][0] else b"two"
    assert pair.app.recv(100) == expected


@LINUX
@every_wait
def test_a_receive_that_waits_while_the_mode_changes_gets_ike(
    pair: Pair, receive: Callable[[socket.socket, int], bytes], size: int
) -> None:
    wait = in_thread(lambda: receive(pair.app, size))
    until(lambda: sleeping(wait))
    pair.app.connect(pair.peer.getsockname())
    pair.noise()
    pair.ike(b"a message")
    assert wait() == b"a message"[:size]


def test_switching_under_threads_loses_and_mixes_no_datagrams(pair: Pair) -> None:
    """Every datagram arrives once, with or without the marker, and no thread sees an exception."""
    app, peer, address = pair.app, pair.peer, pair.address
    app.settimeout(0.05)
    over = threading.Event()

    def receive() -> list[bytes]:
        received = []
        while True:
            try:
                received.append(app.recvfrom(100)[0])
            except TimeoutError:
                if over.is_set():
                    return received

    def send() -> int:
        sent = 0
        while not over.is_set():
            assert app.sendto(b"out", peer.getsockname()) == 3
            assert peer.recv(100) in (b"out", MARKER + b"out")
            sent += 1
        return sent

    receivers, sender = [in_thread(receive) for _ in range(2)], in_thread(send)
    expected: list[bytes] = []
    deadline = time.monotonic() + 0.7
    with socket.socket(pair.family, socket.SOCK_DGRAM) as source:
        while time.monotonic() < deadline:
            for _ in range(5):
                expected.append(b"%d" % len(expected))
                source.sendto(MARKER + expected[-1], address)
            set_nat_t_endpoint(app, False)
            expected.append(b"%d" % len(expected))
            source.sendto(MARKER + expected[-1], address)
            pair.switch_on(app)
            time.sleep(0.002)
    over.set()
    received = [message for wait in receivers for message in wait()]
    assert sorted(message.removeprefix(MARKER) for message in received) == sorted(expected)
    assert sender() > 0
    assert_on(pair, app)


# --- other arguments ------------------------------------------------------------------------------


def test_the_consumer_can_be_exchanged(pair: Pair) -> None:
    if pair.kind.backend == "linux":
        with pytest.raises(NatCompatError, match="ESP goes to the kernel") as caught:
            set_nat_t_endpoint(pair.app, esp=lambda packet, source: None, backend=pair.kind.take())
        assert caught.value.errno == errno.ENOTSUP
        assert_on(pair, pair.app)
        return
    taken: list[bytes] = []
    again = set_nat_t_endpoint(pair.app, esp=lambda packet, source: taken.append(bytes(packet)))
    assert again is pair.endpoint
    pair.noise()
    pair.ike(b"message")
    assert pair.app.recv(100) == b"message"
    until(lambda: len(taken) >= len(ESP_OF_NOISE))
    assert taken == ESP_OF_NOISE
    assert pair.esp == []


@pytest.mark.parametrize("backend", ["userspace", "userspace:in-line"])
def test_the_backend_can_be_exchanged(pair: Pair, backend: str) -> None:
    for name in (backend, "userspace:in-line", "userspace"):
        assert set_nat_t_endpoint(pair.app, backend=name) is pair.endpoint
        assert pair.endpoint.backend == name
        assert_on(pair, pair.app)
    assert type(pair.app).__name__ == "socket"


def test_the_counters_go_on_while_the_backend_is_exchanged(pair: Pair) -> None:
    assert_on(pair, pair.app)
    set_nat_t_endpoint(pair.app, backend="userspace:in-line")
    assert_on(pair, pair.app)
    assert (pair.endpoint.stats().ike, pair.endpoint.stats().markers_inserted) == (2, 2)


class Burst:
    """A consumer of bursts of ESP."""

    def __init__(self) -> None:
        self.packets: list[bytes] = []

    def inbound(self, burst: list[tuple[memoryview, Any]]) -> None:
        self.packets += [bytes(packet) for packet, _ in burst]


def test_a_consumer_may_take_bursts(pair: Pair) -> None:
    pair.endpoint.close()
    burst = Burst()
    with contextlib.suppress(NatCompatError):
        set_nat_t_endpoint(
            pair.app, esp=burst, backend="userspace:in-line" if not pair.kind.exact else "userspace"
        )
    pair.noise()
    pair.ike(b"message")
    assert pair.app.recv(100) == b"message"
    until(lambda: len(burst.packets) >= len(ESP_OF_NOISE))
    assert burst.packets == ESP_OF_NOISE


def test_a_consumer_that_raises_is_logged_and_counted(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    def raises(packet: memoryview, source: Any) -> None:
        raise RuntimeError("the fault of the consumer")

    endpoint = set_nat_t_endpoint(
        pair.app, esp=raises, backend="userspace:in-line" if not pair.kind.exact else "userspace"
    )
    pair.noise()
    pair.ike(b"message")
    assert pair.app.recv(100) == b"message"
    until(lambda: endpoint.stats().errors == len(ESP_OF_NOISE))
    assert "the fault of the consumer" in caplog.text


@of_kinds(IN_LINE)
def test_a_consumer_can_clear_the_option(pair: Pair) -> None:
    pair.endpoint.close()
    set_nat_t_endpoint(
        pair.app, backend="userspace:in-line", esp=lambda packet, source: set_nat_t_endpoint(pair.app, False)
    )
    pair.peer.sendto(ESP, pair.address)
    pair.peer.sendto(ESP, pair.address)
    assert pair.app.recv(10000) == ESP  # the second packet, which came to a plain socket
    assert type(pair.app) is socket.socket
