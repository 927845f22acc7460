"""Steering of a socket whose application sets options, connects it, or has filters of its own."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from typing import Any

import pytest

from natcompat import NON_ESP_MARKER, get_nat_t_endpoint, set_nat_t_endpoint
from natcompat.backends.linux_sockets import filters as bpf
from natcompat.backends.linux_sockets import options
from tests.support.linux import (
    ESP,
    FAMILIES,
    KEEPALIVE,
    LINUX,
    Collector,
    at,
    check_demultiplexing,
    closed,
    has_program,
    ike,
    isolated,
    readable,
    send_ike,
    state,
    udp,
)
from tests.support.running import becomes_nobody
from tests.support.steering import (
    ENCAP,
    GRO,
    RECVERR,
    REUSEPORT,
    steered,
)

pytestmark = LINUX


REFUSALS: list[Any] = [
    pytest.param(
        lambda sock: sock.setsockopt(*REUSEPORT, 1), "the application set SO_REUSEPORT", id="reuseport"
    ),
    pytest.param(lambda sock: sock.connect(("127.0.0.1", 9)), "the socket is connected", id="connected"),
    pytest.param(lambda sock: sock.setsockopt(*RECVERR, 1), "the application set IP_RECVERR", id="recverr"),
    pytest.param(lambda sock: sock.setsockopt(*ENCAP, 2), "the application set UDP_ENCAP", id="encap"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSALS)
def test_a_socket_that_cannot_be_steered_is_served_in_line_with_the_reason(
    change: Callable[[socket.socket], None], reason: str
) -> None:
    with udp() as sock:
        change(sock)
        before = state(sock)
        endpoint = set_nat_t_endpoint(sock, backend="userspace", esp=Collector())
        assert endpoint.mode == endpoint.stats().mode == "in line"
        assert endpoint.reason.startswith(reason)
        assert endpoint.stats().reason == endpoint.reason
        closed(endpoint)
        assert state(sock) == before


@pytest.mark.parametrize(("change", "reason"), REFUSALS)
def test_a_socket_that_can_no_longer_be_steered_is_served_in_line(
    change: Callable[[socket.socket], None], reason: str
) -> None:
    with udp() as sock:
        endpoint = steered(sock)
        change(sock)
        assert endpoint.mode == "in line"
        assert endpoint.reason.startswith(reason)
        assert not has_program(sock)


@pytest.mark.parametrize("kind", ["in line", "encapsulating"])
def test_a_socket_is_steered_again_when_the_application_clears_the_option(kind: str) -> None:
    option = RECVERR if kind == "in line" else ENCAP
    consumer = Collector()
    with udp() as sock, udp() as peer:
        endpoint = steered(sock, consumer)
        sock.setsockopt(*option, 1 if option == RECVERR else 2)
        assert endpoint.mode == "in line"
        sock.setsockopt(*option, 0)
        assert endpoint.mode == "steering"
        check_demultiplexing(sock, consumer, peer, at(sock))


@pytest.mark.parametrize("level", ["IP_RECVERR", "IPV6_RECVERR"])
def test_an_ipv6_socket_may_ask_for_errors_by_either_option(level: str) -> None:
    option = RECVERR if level == "IP_RECVERR" else (socket.IPPROTO_IPV6, options.IPV6_RECVERR)
    with udp(socket.AF_INET6, "::") as sock:
        endpoint = steered(sock)
        sock.setsockopt(*option, 1)
        assert (endpoint.mode, endpoint.reason[:24]) == ("in line", "the application set IP_R")


@FAMILIES
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_connected_socket_gets_its_peers_ike_and_diverts_its_esp(
    family: socket.AddressFamily, when: str
) -> None:
    consumer = Collector()
    with udp(family) as sock, udp(family) as peer:
        if when == "before":
            sock.connect(at(peer))
        endpoint = set_nat_t_endpoint(sock, backend="userspace", esp=consumer)
        if when == "after":
            sock.connect(at(peer))
        assert endpoint.mode == "in line"
        for payload in (KEEPALIVE, ESP, NON_ESP_MARKER + ike(1)):
            peer.sendto(payload, at(sock))
        assert sock.recv(64) == ike(1)
        assert consumer.wait_for(1) == [(ESP, peer.getsockname())]
        # runts do not wake: a filter without ESP in it is still there
        peer.sendto(KEEPALIVE, at(sock))
        assert not readable(sock, 0.05)


def test_the_application_does_not_see_that_its_port_is_shared() -> None:
    with udp() as sock:
        endpoint = steered(sock)
        assert sock.getsockopt(*REUSEPORT) == 0
        assert socket.socket.getsockopt(sock, *REUSEPORT) == 1
        closed(endpoint)
        assert sock.getsockopt(*REUSEPORT) == 0
        assert not has_program(sock)


@pytest.mark.parametrize("when", ["before", "after"])
def test_udp_gro_of_the_application_is_kept_for_it(when: str) -> None:
    with udp() as sock:
        if when == "before":
            sock.setsockopt(*GRO, 1)
        endpoint = steered(sock)
        if when == "after":
            sock.setsockopt(*GRO, 1)
        assert sock.getsockopt(*GRO) == 1
        assert socket.socket.getsockopt(sock, *GRO) == 0
        closed(endpoint)
        assert sock.getsockopt(*GRO) == 1


class TestOwnFilter:
    """A socket filter of the application's own stays in place."""

    OWN = ((0x06, 0, 0, 0xFFFFFFFF),)  # passes everything
    NOTHING = ((0x06, 0, 0, 0),)

    def put(self, sock: socket.socket, program: bpf.Program) -> None:
        import array

        code = array.array("B", b"".join(struct.pack("=HBBI", *line) for line in program))
        fprog = struct.pack("@HP", len(program), code.buffer_info()[0])
        sock.setsockopt(socket.SOL_SOCKET, bpf.SO_ATTACH_FILTER, fprog)

    @pytest.mark.parametrize("consumer", [None, Collector()], ids=["nobody takes ESP", "somebody takes ESP"])
    def test_before_the_option(self, consumer: Collector | None) -> None:
        with udp() as sock, udp() as peer:
            self.put(sock, self.NOTHING)
            endpoint = set_nat_t_endpoint(sock, backend="userspace", esp=consumer)
            if consumer is None:
                assert endpoint.mode == "in line"
                assert endpoint.reason == "the application has a socket filter of its own"
            send_ike(peer, at(sock), 1)
            assert not readable(sock, 0.05)  # it still does what it did
            closed(endpoint)
            assert bpf.has_filter(sock)

    def test_after_the_option(self) -> None:
        with udp() as sock, udp() as peer:
            endpoint = set_nat_t_endpoint(sock, backend="userspace")
            assert endpoint.mode == "filter"
            self.put(sock, self.OWN)
            assert endpoint.mode == "in line"
            assert endpoint.reason == "the application has a socket filter of its own"
            for payload in (ESP, NON_ESP_MARKER + ike(1)):
                peer.sendto(payload, at(sock))
            assert sock.recv(64) == ike(1)
            assert endpoint.stats().esp == 1
            sock.setsockopt(socket.SOL_SOCKET, bpf.SO_DETACH_FILTER, 0)
            assert endpoint.mode == "filter"
            closed(endpoint)
            assert not bpf.has_filter(sock)

    def test_there_is_none_of_the_applications_to_take_off(self) -> None:
        with udp() as sock:
            endpoint = set_nat_t_endpoint(sock, backend="userspace")
            with pytest.raises(FileNotFoundError):
                sock.setsockopt(socket.SOL_SOCKET, bpf.SO_DETACH_FILTER, 0)
            assert endpoint.mode == "filter"

    def test_locked(self) -> None:
        """With SO_LOCK_FILTER nothing can be put on any more: in line, and nothing is left behind."""
        with udp() as sock:
            endpoint = set_nat_t_endpoint(sock, backend="userspace")
            sock.setsockopt(socket.SOL_SOCKET, bpf.SO_LOCK_FILTER, 1)
            assert endpoint.mode == "in line"
            assert "Operation not permitted" in endpoint.reason
            closed(endpoint)
            assert not bpf.has_filter(sock)

    def test_locked_by_another_object_of_the_socket(self) -> None:
        """Our filter cannot be taken off then: close says so, and the object is plain all the same."""
        with udp() as sock:
            endpoint = set_nat_t_endpoint(sock, backend="userspace")
            with socket.socket(fileno=os.dup(sock.fileno())) as other:
                other.setsockopt(socket.SOL_SOCKET, bpf.SO_LOCK_FILTER, 1)
            with pytest.raises(PermissionError):
                endpoint.close()
            assert endpoint.closed
            assert type(sock) is socket.socket
            assert get_nat_t_endpoint(sock) is None

    def test_taken_off_by_another_object_of_the_socket(self) -> None:
        with udp() as sock:
            endpoint = set_nat_t_endpoint(sock, backend="userspace")
            with socket.socket(fileno=os.dup(sock.fileno())) as other:
                bpf.detach_filter(other)
            closed(endpoint)
            assert type(sock) is socket.socket


@becomes_nobody
@isolated()
def test_a_socket_whose_user_has_changed_is_served_in_line() -> None:
    """The kernel lets only sockets of one user share a port, and a socket keeps its maker's."""
    consumer = Collector()
    with udp() as sock, udp() as peer:
        os.setresuid(65534, 65534, 65534)
        endpoint = set_nat_t_endpoint(sock, backend="userspace", esp=consumer)
        assert endpoint.mode == "in line"
        assert "the user id has changed" in endpoint.reason
        for payload in (ESP, NON_ESP_MARKER + ike(1)):
            peer.sendto(payload, at(sock))
        assert sock.recv(64) == ike(1)
        assert consumer.packets == [(ESP, peer.getsockname())]
