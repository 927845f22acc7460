"""Servers on several addresses: `endpoint.receive()` tells the local one, sends and keepalives use it."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
import threading
import time
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import pytest

from natcompat import Datagram, Keepalive, NatTEndpoint, open_ipsec, set_nat_t_endpoint
from natcompat.backends import local_address as module
from natcompat.backends.local_address import is_bound_to, local_address, source_address
from natcompat.endpoint.receive import discard_peeked
from natcompat.endpoint.state import state_of
from natcompat.esp.device.queue import QueueDevice
from tests.support.linux import LINUX, ip, isolated, set_up, wait_until
from tests.support.pairs import ESP, MARKER, NOISE, PEEK, Kind, eagain, outcome, ready
from tests.support.steering import glued_or_early
from tests.support.tunnel_ends import SPIS, install, question

pytestmark = LINUX  # whose loopback interface has all addresses of 127.0.0.0/8

HOSTS = ("127.0.0.1", "127.0.0.7", "127.9.8.7")
PKTINFO = socket.IPPROTO_IP, 8


class Server:
    """An endpoint that is bound to any address, and a peer at 127.0.0.1."""

    def __init__(self, stack: contextlib.ExitStack, kind: Kind, *, dual_stack: bool = False) -> None:
        family = socket.AF_INET6 if dual_stack else socket.AF_INET
        self.sock = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
        if dual_stack:
            self.sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        self.sock.bind(("::" if dual_stack else "0.0.0.0", 0))
        self.sock.settimeout(5)
        self.port = self.sock.getsockname()[1]
        self.endpoint: NatTEndpoint = set_nat_t_endpoint(
            self.sock, backend=kind.take(), esp=(lambda *_: None) if kind.consumes else None
        )
        self.peer = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        self.peer.settimeout(5)
        self.peer.bind(("127.0.0.1", 0))

    def send(self, host: str, message: bytes = b"IKE") -> None:
        """Send an IKE message from the peer to the server's address `host`, behind noise."""
        for payload in (*NOISE, MARKER + message):
            self.peer.sendto(payload, (host, self.port))


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as opened:
        yield opened


@pytest.fixture
def server(stack: contextlib.ExitStack, kind: Kind) -> Server:
    return Server(stack, kind)


def test_receive_tells_the_local_address(server: Server) -> None:
    source = server.peer.getsockname()
    for host in HOSTS:
        server.send(host)
        assert server.endpoint.receive() == Datagram(b"IKE", source, ip_address(host))


def test_datagrams_queued_before_the_first_receive_have_it(server: Server) -> None:
    for host in HOSTS:
        server.send(host)
    assert [server.endpoint.receive().local_address for _ in HOSTS] == [ip_address(host) for host in HOSTS]


def test_answers_and_keepalives_leave_from_the_local_address(server: Server) -> None:
    for host in HOSTS:
        server.send(host)
        _, source, local = server.endpoint.receive()
        assert server.endpoint.send(b"answer", source, local_address=local) == len(b"answer")
        assert server.peer.recvfrom(100) == (MARKER + b"answer", (host, server.port))
        server.endpoint.send_keepalive(source, local_address=str(local))
        assert server.peer.recvfrom(100) == (b"\xff", (host, server.port))
    assert server.endpoint.stats().markers_inserted == len(HOSTS)
    assert server.endpoint.stats().keepalives_sent == len(HOSTS)


@pytest.mark.parametrize("host", HOSTS)
def test_esp_of_an_sa_leaves_from_the_local_address(stack: contextlib.ExitStack, host: str) -> None:
    ipsec = stack.enter_context(open_ipsec("userspace", device="queue"))
    assert isinstance(ipsec.device, QueueDevice)
    server = Server(stack, Kind("userspace", "userspace"))
    server.send(host)
    _, source, local = server.endpoint.receive()
    ports = {"local_port": server.port, "remote_port": source[1]}
    install(ipsec, near=True, addresses=(str(local), source[0]), **ports)
    ipsec.device.put(question())
    packet, sender = server.peer.recvfrom(2000)
    assert packet.startswith(SPIS[0].to_bytes(4, "big"))
    assert sender == (host, server.port)


def test_repeated_keepalives_leave_from_the_local_address(server: Server) -> None:
    with Keepalive(server.endpoint, interval=0.05) as keepalive:
        keepalive.add(server.peer.getsockname(), local_address=HOSTS[1])
        for _ in range(2):
            assert server.peer.recvfrom(100) == (b"\xff", (HOSTS[1], server.port))
        assert keepalive.stats().errors == 0


def test_a_send_without_a_local_address_is_that_of_the_socket(server: Server) -> None:
    server.endpoint.send(b"message", server.peer.getsockname())
    assert server.peer.recv(100) == MARKER + b"message"
    server.sock.connect(server.peer.getsockname())
    server.endpoint.send(bytearray(b"message"))
    assert server.peer.recv(100) == MARKER + b"message"
    server.send(server.sock.getsockname()[0])
    assert server.endpoint.receive() == (b"IKE", server.peer.getsockname(), ip_address("127.0.0.1"))
    assert server.endpoint.peer == server.peer.getsockname()


def test_a_dual_stack_server_tells_addresses_of_both_families(
    stack: contextlib.ExitStack, kind: Kind
) -> None:
    server = Server(stack, kind, dual_stack=True)
    for host in HOSTS:
        server.send(host)
        _, source, local = server.endpoint.receive()
        assert (source[0], local) == ("::ffff:127.0.0.1", ip_address(host))
        server.endpoint.send(b"answer", source, local_address=local)
        assert server.peer.recvfrom(100) == (MARKER + b"answer", (host, server.port))
        server.endpoint.send_keepalive(source, local_address=local)
        assert server.peer.recvfrom(100) == (b"\xff", (host, server.port))
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as peer:
        peer.bind(("::1", 0))
        peer.sendto(MARKER + b"six", ("::1", server.port))
        assert server.endpoint.receive() == (b"six", peer.getsockname(), ip_address("::1"))


@isolated(network=True)
def test_an_ipv6_server_tells_its_addresses() -> None:
    set_up("lo")
    hosts = ["fd00:1::1", "fd00:1::2", "::1", "fe80::5"]
    for host in hosts:
        if host != "::1":
            ip("address", "add", f"{host}/64", "dev", "lo", "nodad")
    index = socket.if_nametoindex("lo")
    with (
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock,
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as peer,
    ):
        for end in (sock, peer):
            end.bind(("::", 0))
            end.settimeout(5)
        port = sock.getsockname()[1]
        endpoint = set_nat_t_endpoint(sock, backend="userspace", esp=lambda *_: None)
        for host in hosts:
            scope = index if host.startswith("fe80") else 0
            peer.sendto(MARKER + b"IKE", (host, port, 0, scope))
            payload, source, local = endpoint.receive()
            assert payload == b"IKE"
            assert local == ip_address(f"{host}%{index}" if scope else host)
            endpoint.send(b"answer", source, local_address=local)
            data, address = peer.recvfrom(100)
            assert (data, address[:2]) == (MARKER + b"answer", (host, port))


def test_ike_that_was_handed_back_has_its_local_address(stack: contextlib.ExitStack) -> None:
    server = Server(stack, Kind("steering", "userspace", consumes=True))
    assert server.endpoint.mode == "steering"
    for host in HOSTS:
        glued_or_early(server.endpoint, server.sock, (host, server.port), server.peer)
        _, source, local = server.endpoint.receive()
        assert (source, local) == (server.peer.getsockname(), ip_address(host))
    assert server.endpoint.stats().handed_back == len(HOSTS)


def test_ike_displaced_by_a_peek_has_its_local_address(stack: contextlib.ExitStack) -> None:
    server = Server(stack, Kind("in-line", "userspace:in-line"))
    state = state_of(server.sock)
    assert state is not None
    server.send(HOSTS[0])
    server.endpoint.receive()
    for host in HOSTS:
        server.peer.sendto(MARKER + b"IKE", (host, server.port))
        discard_peeked(server.sock, socket.socket, state)
        discard_peeked(server.sock, socket.socket, state)  # the envelope, too
        assert server.endpoint.receive() == (b"IKE", server.peer.getsockname(), ip_address(host))


def test_an_envelope_without_a_destination_tells_none(stack: contextlib.ExitStack) -> None:
    """And not that of the envelope, which is an address of loopback."""
    server = Server(stack, Kind("in-line", "userspace:in-line"))
    state = state_of(server.sock)
    assert state is not None
    source = ("192.0.2.7", 500)
    server.peer.sendto(state.diversion.hand_back.wrap(b"IKE", source), ("127.0.0.1", server.port))
    assert server.endpoint.receive() == (b"IKE", source, None)


def test_receive_keeps_size_flags_and_timeout(server: Server) -> None:
    server.send(HOSTS[1], b"message")
    assert server.endpoint.receive(4, PEEK)[::2] == (b"mess", ip_address(HOSTS[1]))
    assert server.endpoint.receive(4)[::2] == (b"mess", ip_address(HOSTS[1]))
    server.sock.setblocking(False)
    assert outcome(server.endpoint.receive) == eagain()
    server.sock.settimeout(0.2)
    begun = time.monotonic()
    with pytest.raises(TimeoutError):
        server.endpoint.receive()
    assert time.monotonic() - begun >= 0.19


def test_receive_on_a_closed_socket_is_a_bad_descriptor(server: Server) -> None:
    server.sock.close()
    for operation in (server.endpoint.receive, lambda: server.endpoint.send(b"", ("127.0.0.1", 9))):
        assert outcome(operation) == (OSError, errno.EBADF)


def test_the_end_of_the_option_restores_the_socket(server: Server) -> None:
    assert server.sock.getsockopt(*PKTINFO) == 0
    server.send(HOSTS[1])
    server.endpoint.receive()
    assert server.sock.getsockopt(*PKTINFO) == 1
    server.endpoint.close()
    assert server.sock.getsockopt(*PKTINFO) == 0


def test_an_option_of_the_application_stays(server: Server) -> None:
    server.sock.setsockopt(*PKTINFO, 1)
    server.send(HOSTS[1])
    assert server.endpoint.receive().local_address == ip_address(HOSTS[1])
    server.endpoint.close()
    assert server.sock.getsockopt(*PKTINFO) == 1


def test_threads_receive_with_the_local_address(server: Server) -> None:
    received: list[Datagram] = []
    threads = [
        threading.Thread(target=lambda: received.extend(server.endpoint.receive() for _ in range(20)))
        for _ in range(3)
    ]
    for thread in threads:
        thread.start()
    for number in range(60):
        server.peer.sendto(ESP, (HOSTS[0], server.port))
        server.peer.sendto(MARKER + b"%d" % (number % 3), (HOSTS[number % 3], server.port))
        wait_until(lambda number=number: len(received) > number - 20)  # type: ignore[misc]
    for thread in threads:
        thread.join()
    assert len(received) == 60
    assert {(datagram.payload, str(datagram.local_address)) for datagram in received} == {
        (b"%d" % number, host) for number, host in enumerate(HOSTS)
    }
    assert not ready(server.peer)


# --- ancillary data ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preferred", "destination", "local"),
    [
        ("10.0.0.1", "10.0.0.1", "10.0.0.1"),
        ("10.0.0.1", "224.0.0.1", "10.0.0.1"),
        ("10.0.0.1", "10.0.0.255", "10.0.0.1"),
        ("0.0.0.0", "10.0.0.1", "10.0.0.1"),
        ("0.0.0.0", "224.0.0.1", None),
        ("0.0.0.0", "255.255.255.255", None),
    ],
)
def test_the_address_of_in_pktinfo(preferred: str, destination: str, local: str | None) -> None:
    data = struct.pack("=i4s4s", 2, socket.inet_aton(preferred), socket.inet_aton(destination))
    assert local_address([(0, 99, b""), (*PKTINFO, data)]) == (None if local is None else ip_address(local))


@pytest.mark.parametrize(
    ("destination", "local"),
    [
        ("2001:db8::1", "2001:db8::1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("::ffff:224.0.0.1", None),
        ("ff02::1", None),
        ("fe80::1", "fe80::1%2"),
    ],
)
def test_the_address_of_in6_pktinfo(destination: str, local: str | None) -> None:
    data = struct.pack("=16si", socket.inet_pton(socket.AF_INET6, destination), 2)
    ancillary = [(socket.IPPROTO_IPV6, socket.IPV6_PKTINFO, data)]
    assert local_address(ancillary) == (None if local is None else ip_address(local))


@pytest.mark.parametrize("ancillary", [[], [(*PKTINFO, b"\0" * 11)], [(41, 50, b"")], [(0, 12, b"\1")]])
def test_ancillary_data_without_an_address_tells_none(ancillary: list[tuple[int, int, bytes]]) -> None:
    assert local_address(ancillary) is None


def test_bsd_has_the_address_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """IP_RECVDSTADDR and IP_SENDSRCADDR: netinet/in.h of FreeBSD, NetBSD and OpenBSD."""
    monkeypatch.setattr(module, "_IP_PKTINFO", None)
    monkeypatch.setattr(module, "_IP_RECVDSTADDR", 7)
    ancillary = [(socket.IPPROTO_IP, 7, bytes([10, 0, 0, 1]))]
    assert local_address(ancillary) == ip_address("10.0.0.1")
    assert source_address(socket.AF_INET, ip_address("10.0.0.1")) == ancillary
    assert local_address([(*ancillary[0][:2], b"\xff" * 4)]) is None


@pytest.mark.parametrize(
    ("family", "address"),
    [(socket.AF_INET, "::1"), (socket.AF_INET6, "fe80::1%nonesuch"), (socket.AF_UNIX, "10.0.0.1")],
)
def test_an_address_from_which_the_socket_cannot_send_is_refused(family: int, address: str) -> None:
    with pytest.raises(ValueError, match=r"cannot send|no interface"):
        source_address(family, ip_address(address))


def test_a_socket_bound_to_the_address_needs_no_ancillary_data(udp: Any) -> None:
    sock = udp()
    host = sock.getsockname()[0]
    assert is_bound_to(sock, ip_address(host))
    assert not is_bound_to(sock, ip_address("192.0.2.1"))
