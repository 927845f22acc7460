"""`endpoint.stats()`: counters of datagrams, drops of the kernel, mode and reason."""

from __future__ import annotations

import dataclasses
import socket
import threading
from typing import Any

import pytest

from natcompat import NON_ESP_MARKER, set_nat_t_endpoint
from natcompat.contract import TABLE, Verdict
from tests.support.linux import (
    ESP,
    FAMILIES,
    KEEPALIVE,
    LINUX,
    Collector,
    at,
    ike,
    queued,
    send_ike,
    udp,
    wait_until,
)

COUNTED = {
    verdict: sum(row.verdict is verdict and len(row.payload) < 2000 for row in TABLE) for verdict in Verdict
}


def send_table(peer: socket.socket, address: Any) -> None:
    for row in TABLE:
        if len(row.payload) < 2000:
            peer.sendto(row.payload, address)


@FAMILIES
@pytest.mark.parametrize(
    ("backend", "mode"),
    [
        pytest.param("userspace", "steering", marks=LINUX, id="steering"),
        pytest.param("userspace:in-line", "in line", id="in line"),
    ],
)
def test_every_datagram_is_counted_once_by_its_verdict(
    family: socket.AddressFamily, backend: str, mode: str
) -> None:
    with udp(family) as sock, udp(family) as peer:
        endpoint = set_nat_t_endpoint(sock, backend=backend, esp=Collector())
        send_table(peer, at(sock))
        for _ in range(COUNTED[Verdict.IKE]):
            sock.recv(2048)
        sock.settimeout(0.05)
        with pytest.raises(TimeoutError):  # in line, this receive sees the datagrams after the last IKE
            sock.recv(2048)
        wait_until(lambda: endpoint.stats().esp == COUNTED[Verdict.ESP])
        stats = endpoint.stats()
        assert (stats.mode, stats.backend) == (mode, backend)
        assert (stats.ike, stats.keepalives, stats.runts) == (
            COUNTED[Verdict.IKE],
            COUNTED[Verdict.KEEPALIVE],
            COUNTED[Verdict.RUNT],
        )
        assert (stats.errors, stats.handed_back, stats.markers_inserted) == (0, 0, 0)


@LINUX
@FAMILIES
def test_the_drops_of_the_filter_are_in_the_counter_of_the_kernel(family: socket.AddressFamily) -> None:
    with udp(family) as sock, udp(family) as peer:
        endpoint = set_nat_t_endpoint(sock, backend="userspace")
        assert (endpoint.mode, endpoint.stats().dropped_in_kernel) == ("filter", 0)
        send_table(peer, at(sock))
        dropped = sum(COUNTED.values()) - COUNTED[Verdict.IKE]
        wait_until(lambda: endpoint.stats().dropped_in_kernel == dropped)
        assert endpoint.stats().esp == 0  # this process has not seen any
        assert endpoint.stats().esp_dropped_in_kernel is None


@LINUX
def test_drops_before_the_option_do_not_count() -> None:
    with udp() as sock, udp() as peer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        for _ in range(100):
            peer.sendto(bytes(1000), at(sock))
        assert set_nat_t_endpoint(sock, backend="userspace").stats().dropped_in_kernel == 0


@LINUX
def test_the_drops_of_a_full_queue_are_in_the_same_counter() -> None:
    with udp() as sock, udp() as peer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        endpoint = set_nat_t_endpoint(sock, backend="userspace")
        send_ike(peer, at(sock), *range(50), size=1000)
        received = len(queued(sock))
        assert 0 < received < 50
        assert endpoint.stats().dropped_in_kernel == 50 - received


@LINUX
def test_esp_dropped_by_a_full_queue_has_a_counter_of_its_own() -> None:
    with udp() as sock, udp() as peer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        leave = threading.Event()
        endpoint = set_nat_t_endpoint(sock, backend="userspace", esp=lambda *_: leave.wait(10))
        try:
            for _ in range(200):
                peer.sendto(ESP.ljust(1000, b"e"), at(sock))
            stats = endpoint.stats()
            assert stats.esp_dropped_in_kernel is not None
            assert 0 < stats.esp_dropped_in_kernel <= 200
            assert stats.dropped_in_kernel == 0
        finally:
            leave.set()


@LINUX
def test_mode_and_reason_follow_the_socket() -> None:
    with udp() as sock:
        endpoint = set_nat_t_endpoint(sock, backend="userspace", esp=Collector())
        assert (endpoint.stats().mode, endpoint.stats().reason) == ("steering", "")
        assert endpoint.stats().esp_dropped_in_kernel == 0
        sock.connect(("127.0.0.1", 9))
        assert endpoint.stats().mode == "in line"
        assert endpoint.stats().reason.startswith("the socket is connected")
        assert endpoint.stats().esp_dropped_in_kernel is None
        endpoint.close()
        assert (endpoint.stats().mode, endpoint.stats().reason) == ("off", "")


def test_messages_and_keepalives_sent_are_counted_apart() -> None:
    with udp() as sock, udp() as peer:
        endpoint = set_nat_t_endpoint(sock, backend="userspace")
        for _ in range(3):
            sock.sendto(b"message", at(peer))
        endpoint.send_keepalive(at(peer))
        assert [peer.recv(64) for _ in range(4)] == [NON_ESP_MARKER + b"message"] * 3 + [KEEPALIVE]
        assert (endpoint.stats().markers_inserted, endpoint.stats().keepalives_sent) == (3, 1)


def test_a_failed_send_counts_nothing() -> None:
    with udp() as sock:
        endpoint = set_nat_t_endpoint(sock, backend="userspace")
        with pytest.raises(OSError, match="Message too long"):
            sock.sendto(bytes(65504), ("127.0.0.1", 9))
        assert endpoint.stats().markers_inserted == 0


def test_counters_outlive_a_change_of_the_consumer() -> None:
    with udp() as sock, udp() as peer:
        first, second = Collector(), Collector()
        endpoint = set_nat_t_endpoint(sock, backend="userspace", esp=first)
        for number, consumer in enumerate((first, second)):
            set_nat_t_endpoint(sock, esp=consumer)
            peer.sendto(ESP, at(sock))
            send_ike(peer, at(sock), number)
            assert sock.recv(64) == ike(number)
            consumer.wait_for(1)
        assert (len(first.packets), len(second.packets)) == (1, 1)
        assert (endpoint.stats().esp, endpoint.stats().ike) == (2, 2)


def test_stats_do_not_change_afterwards() -> None:
    with udp() as sock, udp() as peer:
        endpoint = set_nat_t_endpoint(sock, backend="userspace")
        before = endpoint.stats()
        sock.sendto(b"message", at(peer))
        assert before.markers_inserted == 0
        with pytest.raises(dataclasses.FrozenInstanceError):
            before.ike = 5  # type: ignore[misc]


def test_stats_of_a_closed_socket_keep_the_counts() -> None:
    with udp() as peer:
        sock = udp()
        endpoint = set_nat_t_endpoint(sock, backend="userspace")
        send_ike(peer, at(sock), 1)
        sock.recv(64)
        sock.close()
        stats = endpoint.stats()
        assert (stats.ike, stats.mode, stats.dropped_in_kernel) == (1, "off", None)
