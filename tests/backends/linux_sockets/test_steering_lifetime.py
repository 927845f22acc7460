"""Steering goes on and off, under load too, and ends with the socket."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from typing import Any

import pytest

from natcompat import NON_ESP_MARKER, set_nat_t_endpoint
from natcompat.backends.diversion import Diversion
from natcompat.backends.linux_sockets import steering
from tests.support.linux import (
    ESP,
    FAMILIES,
    KEEPALIVE,
    LINUX,
    Collector,
    at,
    closed,
    ike,
    nothing_left,
    queued,
    readable,
    send_ike,
    state,
    udp,
    wait_until,
)
from tests.support.steering import (
    REUSEPORT,
    steered,
)

pytestmark = LINUX


@FAMILIES
def test_off_leaves_a_plain_socket_that_gets_everything(family: socket.AddressFamily) -> None:
    with nothing_left(), udp(family) as sock:
        before = state(sock)
        for _ in range(3):
            endpoint = steered(sock)
            closed(endpoint)
            assert state(sock) == before
            peers = [udp(family) for _ in range(20)]  # many flows, which a hash would spread
            payloads = []
            for number, peer in enumerate(peers):
                payloads += [KEEPALIVE, b"", ESP + b"%d" % number, NON_ESP_MARKER + ike(number)]
                for payload in payloads[-4:]:
                    peer.sendto(payload, at(sock))
                peer.close()
            assert queued(sock) == payloads


def test_nobody_can_join_the_port_afterwards() -> None:
    with udp() as sock, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as other:
        other.setsockopt(*REUSEPORT, 1)
        closed(steered(sock))
        with pytest.raises(OSError, match=os.strerror(errno.EADDRINUSE)):
            other.bind(sock.getsockname())


@pytest.mark.parametrize("rounds", [200])
def test_on_and_off_under_traffic_loses_no_ike(rounds: int) -> None:
    """While a peer sends without a pause and never again what is lost."""
    consumer = Collector()
    received: list[bytes] = []
    with udp() as sock, udp() as peer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        sent = 0
        done = threading.Event()

        def send() -> None:
            nonlocal sent
            while not done.is_set():
                peer.sendto(ESP, at(sock))
                send_ike(peer, at(sock), sent)
                sent += 1
                time.sleep(0.0002)

        def take() -> None:
            while readable(sock):
                datagram = sock.recv(2048)
                if not datagram.startswith(ESP[:4]):  # on while it is off
                    received.append(datagram.removeprefix(NON_ESP_MARKER))

        sender = threading.Thread(target=send)
        sender.start()
        try:
            for _ in range(rounds):
                endpoint = steered(sock, consumer)
                take()
                closed(endpoint)
                # what was handed back is in an envelope that only the endpoint can open
                take()
        finally:
            done.set()
            sender.join()
        take()
    lost = {ike(number) for number in range(sent)} - set(received)
    assert sent > rounds
    enveloped = [datagram for datagram in received if not datagram.startswith(b"IKE ")]
    assert len(lost) == len(enveloped), f"{len(lost)} of {sent} lost, {len(enveloped)} came too late"
    assert len(received) == sent


def test_closing_the_socket_frees_the_port_while_a_consumer_is_busy() -> None:
    entered, leave = threading.Event(), threading.Event()

    def consumer(packet: memoryview, source: Any) -> None:
        entered.set()
        leave.wait(5)

    with udp() as peer:
        sock = udp()
        address = sock.getsockname()
        steered(sock, consumer)
        peer.sendto(ESP, address)
        assert entered.wait(5)
        threading.Timer(0.1, leave.set).start()
        sock.close()
        udp(port=address[1]).close()


def test_a_finalizer_does_not_wait_for_ever_for_a_consumer() -> None:
    """It may run in a thread that holds the lock that the consumer waits for."""
    lock = threading.Lock()
    entered = threading.Event()

    def consumer(packet: memoryview, source: Any) -> None:
        entered.set()
        with lock:
            pass

    with nothing_left(), udp() as peer:
        sock = udp()
        port = sock.getsockname()[1]
        steered(sock, consumer)
        with lock:
            peer.sendto(ESP, at(sock))
            assert entered.wait(5)
            with pytest.warns(ResourceWarning):
                del sock
        wait_until(lambda: not any(thread.name == "natcompat-esp" for thread in threading.enumerate()))
        udp(port=port).close()


@pytest.mark.parametrize("backend", ["userspace", "userspace:in-line"])
def test_garbage_collection_of_an_open_socket_leaves_nothing(backend: str) -> None:
    with nothing_left():
        sock = udp()
        port = sock.getsockname()[1]
        endpoint = set_nat_t_endpoint(sock, backend=backend, esp=Collector())
        with pytest.warns(ResourceWarning):
            del sock
        assert endpoint.closed
        udp(port=port).close()


def test_the_consumer_may_raise(caplog: pytest.LogCaptureFixture) -> None:
    taken: list[bytes] = []

    def consumer(packet: memoryview, source: Any) -> None:
        taken.append(bytes(packet))
        raise ValueError("a fault of the consumer")

    with udp() as sock, udp() as peer:
        endpoint = steered(sock, consumer)
        for _ in range(3):
            peer.sendto(ESP, at(sock))
        send_ike(peer, at(sock), 1)
        assert sock.recv(64) == ike(1)
        wait_until(lambda: endpoint.stats().errors == 3)
        assert taken == [ESP] * 3
        assert "a fault of the consumer" in caplog.text


@pytest.mark.parametrize("how", ["endpoint.close", "socket.close", "enable=False"])
def test_the_consumer_may_end_the_endpoint(how: str) -> None:
    with nothing_left(), udp() as peer:
        sock = udp()
        ended = threading.Event()

        def consumer(packet: memoryview, source: Any) -> None:
            match how:
                case "endpoint.close":
                    endpoint.close()
                case "socket.close":
                    sock.close()
                case _:
                    set_nat_t_endpoint(sock, enable=False)
            ended.set()

        endpoint = steered(sock, consumer)
        peer.sendto(ESP, at(sock))
        assert ended.wait(5)
        assert endpoint.closed
        wait_until(lambda: not any(thread.name == "natcompat-esp" for thread in threading.enumerate()))
        sock.close()


def test_two_threads_that_would_wait_for_each_other_get_an_error() -> None:
    """A thread switches off and waits for the consumer; the consumer wants to switch, too."""
    raised: list[OSError] = []
    entered, go = threading.Event(), threading.Event()

    def consumer(packet: memoryview, source: Any) -> None:
        entered.set()
        go.wait(5)
        try:
            endpoint.close()
        except OSError as error:
            raised.append(error)

    with udp() as sock, udp() as peer:
        endpoint = steered(sock, consumer)
        peer.sendto(ESP, at(sock))
        assert entered.wait(5)
        closer = threading.Thread(target=endpoint.close, daemon=True)
        closer.start()
        wait_until(lambda: endpoint.closed)  # it has the lock now
        go.set()
        closer.join(10)
        assert not closer.is_alive()
    assert [error.errno for error in raised] == [errno.EDEADLK]
    assert "in another thread" in str(raised[0])


def test_a_descriptor_closed_behind_our_back_does_not_spin() -> None:
    """As daemons do that close all descriptors they do not know."""
    with udp() as sock, udp() as peer:
        group = steering.Steering(sock, Diversion(lambda *_: None, socket.AF_INET))
        os.close(group._engines[0].fileno())
        reader: Any = group._reader
        clock = time.pthread_getcpuclockid(reader._thread._thread.ident)
        peer.sendto(ESP, at(sock))  # wakes the thread if it still waits for it
        start = time.clock_gettime_ns(clock)
        time.sleep(0.1)
        assert time.clock_gettime_ns(clock) - start < 50_000_000
        assert group._diversion.counters.errors <= 1
        with pytest.raises(OSError, match=os.strerror(errno.EBADF)):
            group.detach(sock)
        assert not socket.socket.getsockopt(sock, *REUSEPORT)


# --- under load -------------------------------------------------------------------------------------


def test_a_flood_of_esp_costs_no_ike() -> None:
    """The consumer of ESP is slow, so ESP is lost; IKE is not, for its queue is another."""
    stop = threading.Event()

    def slow(packet: memoryview, source: Any) -> None:
        time.sleep(0.0005)

    with udp() as sock, udp() as peer, udp() as flooder:
        endpoint = steered(sock, slow)

        def flood() -> None:
            while not stop.is_set():
                for _ in range(100):
                    flooder.sendto(ESP.ljust(1400, b"e"), at(sock))
                time.sleep(0.0005)

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            wait_until(lambda: endpoint.stats().esp_dropped_in_kernel)  # the engine's queue ran over
            for number in range(200):
                send_ike(peer, at(sock), number)
                assert sock.recv(2048) == ike(number)
        finally:
            stop.set()
            thread.join()
        assert endpoint.stats().ike == 200


def test_an_engine_can_be_closed_while_a_peer_floods_it() -> None:
    stop = threading.Event()
    with nothing_left(), udp() as peer:
        sock = udp()
        address = at(sock)
        endpoint = steered(sock)

        def run() -> None:
            while not stop.is_set():
                peer.sendto(ESP, address)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            wait_until(lambda: endpoint.stats().esp > 1000)
            begin = time.monotonic()
            closed(endpoint)
            assert time.monotonic() - begin < 2
            assert sock.recv(64) == ESP
        finally:
            stop.set()
            thread.join()
            sock.close()


# --- several engines --------------------------------------------------------------------------------


@FAMILIES
def test_several_engines_share_by_spi(family: socket.AddressFamily) -> None:
    consumer = Collector()
    with nothing_left(), udp(family) as sock, udp(family) as peer:
        before = state(sock)
        group = steering.Steering(sock, Diversion(consumer, family), engines=4)
        for spi in range(1000, 1040):
            peer.sendto(spi.to_bytes(4, "big") + bytes(20), at(sock))
        send_ike(peer, at(sock), 1)
        consumer.wait_for(40)
        assert queued(sock) == [NON_ESP_MARKER + ike(1)]
        assert group.drops() == 0
        group.detach(sock)
        assert state(sock) == before
