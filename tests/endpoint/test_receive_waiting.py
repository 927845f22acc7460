"""Receives that wait for IKE: timeouts, floods and selectors."""

from __future__ import annotations

import contextlib
import errno
import selectors
import socket
import threading
import time
from collections.abc import Iterator

import pytest

from natcompat import set_nat_t_endpoint
from tests.support.pairs import (
    DONTWAIT,
    ESP,
    EXACT,
    IN_LINE,
    LINUX,
    MARKER,
    MESSAGE,
    PEEK,
    RECEIVES,
    Kind,
    Operation,
    Pair,
    each_receive,
    eagain,
    flood,
    in_thread,
    of_kinds,
    outcome,
    ready,
    sleeping,
    until,
)


@each_receive
def test_a_timeout_is_a_deadline_while_a_flood_goes_on(pair: Pair, receive: Operation) -> None:
    pair.app.settimeout(0.3)
    with flood(pair):
        begun = time.monotonic()
        with pytest.raises(TimeoutError, match="timed out"):
            receive(pair.app)
        elapsed = time.monotonic() - begun
    assert 0.29 <= elapsed < 10  # a prolonged timeout would last as long as the flood


@pytest.mark.parametrize(
    "receive", [RECEIVES["recvfrom"], RECEIVES["recvmsg"]], ids=["short-way", "long-way"]
)
def test_datagrams_dropped_now_and_then_do_not_prolong_a_timeout(pair: Pair, receive: Operation) -> None:
    pair.app.settimeout(0.3)
    enough = threading.Event()

    def trickle() -> None:
        for _ in range(100):
            pair.peer.sendto(ESP, pair.address)
            if enough.wait(0.1):
                break

    wait = in_thread(trickle)
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        receive(pair.app)
    elapsed = time.monotonic() - begun
    enough.set()
    wait()
    assert 0.29 <= elapsed < 5  # a prolonged timeout would last 10 s


@each_receive
def test_a_non_blocking_receive_is_exact(pair: Pair, receive: Operation) -> None:
    pair.app.setblocking(False)
    assert outcome(lambda: receive(pair.app)) == eagain()
    pair.noise()
    assert outcome(lambda: receive(pair.app)) == eagain()
    pair.noise()
    pair.ike(MESSAGE)
    assert receive(pair.app) in (MESSAGE, len(MESSAGE))


@each_receive
def test_a_non_blocking_receive_returns_while_a_flood_goes_on(pair: Pair, receive: Operation) -> None:
    """A flood is as fast as the receiver, which would go on for ever; the limit of the test would end it."""
    pair.app.setblocking(False)
    with flood(pair):
        for _ in range(20):
            with pytest.raises(BlockingIOError):
                receive(pair.app)


@of_kinds(IN_LINE)
def test_a_non_blocking_receive_finds_ike_behind_a_full_queue(pair: Pair) -> None:
    """An edge-triggered loop would never be told of IKE behind a queue full of ESP."""
    pair.app.setblocking(False)
    while True:  # until the queue is full and drops
        pair.peer.sendto(b"\xff", pair.address)
        before = pair.endpoint.stats().dropped_in_kernel
        if before:
            break
    assert outcome(lambda: pair.app.recv(100, PEEK)) == eagain()
    room = pair.endpoint.stats().keepalives
    assert room > 64
    for _ in range(room - 1):
        pair.peer.sendto(b"\xff", pair.address)
    pair.ike(MESSAGE)
    assert pair.app.recv(100) == MESSAGE


@pytest.mark.parametrize("flags", [0, PEEK], ids=["recv", "peek"])
def test_dontwait_on_a_blocking_socket_does_not_wait(pair: Pair, flags: int) -> None:
    pair.app.settimeout(None)
    pair.noise()
    with pytest.raises(BlockingIOError):
        pair.app.recv(100, DONTWAIT | flags)
    with flood(pair), pytest.raises(BlockingIOError):
        pair.app.recv(100, DONTWAIT | flags)


@each_receive
@pytest.mark.parametrize("timeout", [None, 15], ids=["blocking", "with-timeout"])
def test_a_receive_behind_a_flood_gets_ike(pair: Pair, receive: Operation, timeout: float | None) -> None:
    if receive is RECEIVES["recv-dontwait"] and timeout is None:
        receive = RECEIVES["recv"]
    pair.app.settimeout(timeout)
    wait = in_thread(lambda: receive(pair.app))
    pair.noise(10)
    pair.ike(MESSAGE)
    assert wait() in (MESSAGE, len(MESSAGE))


SELECTORS = ["SelectSelector", "PollSelector", "EpollSelector"]


@of_kinds(EXACT)
@pytest.mark.parametrize("selector", SELECTORS)
def test_noise_never_wakes_a_selector(pair: Pair, selector: str) -> None:
    pair.app.settimeout(None)
    with getattr(selectors, selector)() as waiting:
        waiting.register(pair.app, selectors.EVENT_READ)
        pair.noise(40)
        assert waiting.select(0.05) == []
        pair.ike(MESSAGE)
        assert [key.fileobj for key, _ in waiting.select(5)] == [pair.app]
        assert pair.app.recv(100) == MESSAGE
        assert waiting.select(0) == []


@of_kinds(EXACT)
def test_a_daemon_with_select_and_blocking_receives_never_hangs_and_loses_nothing(pair: Pair) -> None:
    """Many daemons have this loop."""
    pair.app.settimeout(None)
    expected = [b"message %d" % number for number in range(200)]

    def daemon() -> list[bytes]:
        received: list[bytes] = []
        while len(received) < len(expected):
            assert ready(pair.app, 10)
            received.append(pair.app.recvfrom(4096)[0])
            pair.app.sendto(b"answer", pair.peer.getsockname())
        return received

    wait = in_thread(daemon)
    with flood(pair):
        for message in expected:
            pair.ike(message)
            assert pair.peer.recv(100) == MARKER + b"answer"
    assert wait() == expected


@of_kinds(IN_LINE)
@pytest.mark.parametrize("selector", SELECTORS)
def test_in_line_a_selector_and_a_non_blocking_receive_find_every_ike(pair: Pair, selector: str) -> None:
    pair.app.setblocking(False)
    expected = [b"message %d" % number for number in range(50)]
    received: list[bytes] = []
    with getattr(selectors, selector)() as waiting:
        waiting.register(pair.app, selectors.EVENT_READ)
        for message in expected:
            pair.noise()
            pair.ike(message)
            while waiting.select(0):
                with contextlib.suppress(BlockingIOError):
                    while True:
                        received.append(pair.app.recv(100))
    assert received == expected


@pytest.fixture
def default_timeout() -> Iterator[None]:
    socket.setdefaulttimeout(3)
    yield
    socket.setdefaulttimeout(None)


@of_kinds(IN_LINE)
@pytest.mark.usefixtures("default_timeout")
def test_a_default_timeout_of_the_process_does_not_affect_a_blocking_socket(pair: Pair) -> None:
    pair.app.settimeout(None)
    pair.noise()
    pair.ike(MESSAGE)
    assert pair.app.recv(100, PEEK) == MESSAGE  # removed the noise
    assert pair.app.getblocking()
    assert pair.app.recv(100) == MESSAGE
    assert nonblock_flag(pair.app) == 0


def nonblock_flag(sock: socket.socket) -> int:
    """Return O_NONBLOCK if it is set."""
    import fcntl
    import os

    return fcntl.fcntl(sock, fcntl.F_GETFL) & os.O_NONBLOCK


@of_kinds(IN_LINE)
@pytest.mark.parametrize("timeout", [None, 0, 5], ids=["blocking", "non-blocking", "with-timeout"])
def test_a_consumer_may_close_the_socket(family: int, kind: Kind, timeout: float | None) -> None:
    host = "::1" if family == socket.AF_INET6 else "127.0.0.1"
    with socket.socket(family, socket.SOCK_DGRAM) as app, socket.socket(family, socket.SOCK_DGRAM) as peer:
        app.bind((host, 0))
        app.settimeout(timeout)
        set_nat_t_endpoint(app, backend=kind.backend, esp=lambda packet, source: app.close())
        peer.sendto(ESP, app.getsockname())
        with pytest.raises(OSError, match="Bad file descriptor") as caught:
            app.recv(100)
        assert caught.value.errno == errno.EBADF


@LINUX
@of_kinds(IN_LINE)
def test_an_in_line_receive_sleeps_in_the_kernel(pair: Pair) -> None:
    wait = in_thread(lambda: pair.app.recv(100))
    until(lambda: sleeping(wait))
    pair.noise()
    until(lambda: sleeping(wait))
    pair.ike(MESSAGE)
    assert wait() == MESSAGE
