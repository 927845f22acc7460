"""Which sockets are steered, and that each datagram then goes where the contract says."""

from __future__ import annotations

import os
import socket

import pytest

from natcompat import NON_ESP_MARKER, set_nat_t_endpoint
from natcompat.contract import LARGEST_PAYLOAD
from tests.support.linux import (
    ESP,
    FAMILIES,
    LINUX,
    Collector,
    at,
    check_demultiplexing,
    ike,
    isolated,
    nothing_left,
    send_ike,
    set_up,
    udp,
)
from tests.support.steering import (
    V6ONLY,
    peer_behind_veth,
    steered,
    veth_pair,
)

pytestmark = LINUX


@FAMILIES
def test_a_bound_socket(family: socket.AddressFamily) -> None:
    consumer = Collector()
    with nothing_left(), udp(family) as sock, udp(family) as peer:
        steered(sock, consumer)
        check_demultiplexing(sock, consumer, peer, at(sock))
        assert consumer.threads == {"natcompat-esp"}


@FAMILIES
@pytest.mark.parametrize("implicitly", [False, True], ids=["by bind", "by a send"])
def test_a_socket_that_is_bound_later(family: socket.AddressFamily, implicitly: bool) -> None:
    consumer = Collector()
    with socket.socket(family, socket.SOCK_DGRAM) as sock, udp(family) as peer:
        sock.settimeout(5)
        endpoint = set_nat_t_endpoint(sock, backend="userspace", esp=consumer)
        assert (endpoint.mode, endpoint.reason) == ("unbound", "the socket is not bound yet")
        if implicitly:
            sock.sendto(b"first", at(peer))
            assert peer.recv(64) == NON_ESP_MARKER + b"first"
        else:
            sock.bind((at(peer)[0], 0))
        assert endpoint.mode == "steering"
        check_demultiplexing(sock, consumer, peer, at(sock))


@pytest.mark.parametrize("peer_family", [socket.AF_INET, socket.AF_INET6], ids=["v4-mapped", "v6"])
def test_a_dual_stack_socket(peer_family: socket.AddressFamily) -> None:
    consumer = Collector()
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock, udp(peer_family) as peer:
        sock.setsockopt(*V6ONLY, 0)
        sock.bind(("::", 0))
        sock.settimeout(5)
        steered(sock, consumer)
        check_demultiplexing(sock, consumer, peer, at(sock, at(peer)[0]))


def test_v6_only_and_v4_wildcards_on_one_port() -> None:
    consumers = Collector(), Collector()
    with (
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as six,
        udp(host="0.0.0.0") as four,
        udp() as peer4,
        udp(socket.AF_INET6) as peer6,
    ):
        six.setsockopt(*V6ONLY, 1)
        six.settimeout(5)
        six.bind(("::", four.getsockname()[1]))
        for sock, consumer in zip((four, six), consumers, strict=True):
            steered(sock, consumer)
        check_demultiplexing(four, consumers[0], peer4, at(four))
        check_demultiplexing(six, consumers[1], peer6, at(six))


def test_wildcard_and_addresses_on_one_port_are_groups_of_their_own() -> None:
    """Every one with SO_REUSEADDR, as a daemon does that binds each address: the engine copies it."""
    hosts = ["0.0.0.0", "127.0.0.1", "127.0.0.2"]
    reached_at = ["127.0.0.3", "127.0.0.1", "127.0.0.2"]
    made: list[tuple[socket.socket, Collector]] = []
    port = 0
    with udp() as peer:
        try:
            for host in hosts:
                sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
                made.append((sock, Collector()))
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                sock.bind((host, port))
                sock.settimeout(5)
                port = sock.getsockname()[1]
            for count in range(1, len(made) + 1):  # steering one leaves the others alone
                steered(*made[count - 1])
                for (sock, consumer), host in zip(made[:count], reached_at, strict=False):
                    check_demultiplexing(sock, consumer, peer, (host, port))
                for (sock, _), host in zip(made[count:], reached_at[count:], strict=True):
                    peer.sendto(ESP, (host, port))
                    assert sock.recv(64) == ESP
        finally:
            for sock, _ in made:
                sock.close()


@FAMILIES
@pytest.mark.parametrize("size", [9000, 65000, None], ids=["9000 bytes", "65000 bytes", "the largest"])
def test_large_and_fragmented_datagrams(family: socket.AddressFamily, size: int | None) -> None:
    consumer = Collector()
    size = size or LARGEST_PAYLOAD[6 if family == socket.AF_INET6 else 4]
    with udp(family) as sock, udp(family) as peer:
        steered(sock, consumer)
        send_ike(peer, at(sock), 1, size=size)
        assert sock.recv(65535) == ike(1, size)
        esp = ESP.ljust(size, b"e")
        peer.sendto(esp, at(sock))
        assert consumer.wait_for(1)[0][0] == esp


@isolated(network=True)
def test_fragments_through_a_device() -> None:
    veth_pair()
    consumer = Collector()
    with udp(host="192.0.2.1") as sock, peer_behind_veth() as peer:
        steered(sock, consumer)
        peer.setsockopt(socket.IPPROTO_IP, 10, 0)  # IP_MTU_DISCOVER, IP_PMTUDISC_DONT: fragments
        for size in (9000, 60000):
            send_ike(peer, at(sock, "192.0.2.1"), 1, size=size)
            assert sock.recv(65535) == ike(1, size)
            peer.sendto(ESP.ljust(size, b"e"), at(sock, "192.0.2.1"))
        assert [len(packet) for packet, _ in consumer.wait_for(2)] == [9000, 60000]


@isolated(network=True)
def test_ports_500_and_4500_at_once() -> None:
    set_up("lo")
    ports = {500: Collector(), 4500: Collector()}
    socks = {port: udp(port=port) for port in ports}
    with udp() as peer, socks[500], socks[4500]:
        for port, sock in socks.items():
            steered(sock, ports[port])
        for port, sock in socks.items():
            check_demultiplexing(sock, ports[port], peer, ("127.0.0.1", port))


@isolated(ordinary_user=True)
def test_an_ordinary_user() -> None:
    """No privilege is needed, whatever kernel.unprivileged_bpf_disabled says."""
    assert os.geteuid() != 0
    consumer = Collector()
    with udp() as sock, udp() as peer:
        steered(sock, consumer)
        check_demultiplexing(sock, consumer, peer, at(sock))
