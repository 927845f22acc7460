"""Steering: ESP goes to a socket of natcompat's, IKE to the application's, whatever sockets these are."""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any

import pytest

from natcompat import NON_ESP_MARKER, NatTEndpoint, get_nat_t_endpoint, set_nat_t_endpoint
from natcompat.backends.diversion import Diversion, HandBack
from natcompat.backends.linux_sockets import features, steering
from natcompat.backends.linux_sockets import filters as bpf
from natcompat.contract import LARGEST_PAYLOAD
from tests.support.linux import (
    ESP,
    FAMILIES,
    KEEPALIVE,
    LINUX,
    Collector,
    at,
    check_demultiplexing,
    closed,
    descriptors,
    has_program,
    ike,
    ip,
    isolated,
    nothing_left,
    queued,
    readable,
    send_ike,
    set_up,
    state,
    udp,
    wait_until,
)
from tests.support.running import becomes_nobody

pytestmark = LINUX

V6ONLY = socket.IPPROTO_IPV6, socket.IPV6_V6ONLY
REUSEPORT = socket.SOL_SOCKET, socket.SO_REUSEPORT
RECVERR = socket.IPPROTO_IP, steering.IP_RECVERR
GRO = socket.IPPROTO_UDP, steering.UDP_GRO
ENCAP = socket.IPPROTO_UDP, steering.UDP_ENCAP
UDP_SEGMENT = 103  # include/uapi/linux/udp.h


def steered(sock: socket.socket, consumer: Any = None) -> NatTEndpoint:
    """Set the option and assert that it is steering that serves it."""
    endpoint = set_nat_t_endpoint(
        sock, backend="userspace", esp=consumer if consumer is not None else Collector()
    )
    assert (endpoint.mode, endpoint.reason) == ("steering", "")
    return endpoint


# --- which sockets ----------------------------------------------------------------------------------


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


# --- devices ----------------------------------------------------------------------------------------


def veth_pair() -> None:
    """Make the device ``here`` with 192.0.2.1 and its other end ``there``; the interface lo is up."""
    set_up("lo")
    ip("link", "add", "here", "type", "veth", "peer", "there")
    ip("address", "add", "192.0.2.1/24", "broadcast", "192.0.2.255", "dev", "here")
    ip("address", "add", "198.51.100.1/24", "dev", "there")
    ip("link", "set", "here", "up")
    ip("link", "set", "there", "up")


def peer_behind_veth() -> socket.socket:
    """Return a socket in a new network namespace, to which the device ``there`` goes as 192.0.2.2."""
    ours = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        unshare_network()
        set_up("lo")
        theirs = os.open("/proc/self/ns/net", os.O_RDONLY)
        set_network(ours)
        ip("link", "set", "there", "netns", f"/proc/{os.getpid()}/fd/{theirs}")
        set_network(theirs)
        ip("address", "add", "192.0.2.2/24", "broadcast", "192.0.2.255", "dev", "there")
        ip("link", "set", "there", "up")
        peer = udp(host="0.0.0.0")
        os.close(theirs)
        return peer
    finally:
        set_network(ours)
        os.close(ours)


def unshare_network() -> None:
    assert ctypes.CDLL(None, use_errno=True).unshare(0x40000000) == 0  # CLONE_NEWNET, linux/sched.h


def set_network(descriptor: int) -> None:
    assert ctypes.CDLL(None, use_errno=True).setns(descriptor, 0x40000000) == 0


@isolated(network=True)
@pytest.mark.parametrize("when", ["before bind", "before the option", "after the option"])
def test_a_socket_bound_to_a_device(when: str) -> None:
    veth_pair()
    consumer = Collector()
    to_device = (socket.SOL_SOCKET, steering.SO_BINDTODEVICE, b"here")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, peer_behind_veth() as peer:
        sock.settimeout(5)
        if when == "before bind":
            sock.setsockopt(*to_device)
        sock.bind(("0.0.0.0", 0))
        if when == "before the option":
            sock.setsockopt(*to_device)
        endpoint = steered(sock, consumer)
        if when == "after the option":
            sock.setsockopt(*to_device)
            assert endpoint.mode == "steering"
        address = at(sock, "192.0.2.1")
        check_demultiplexing(sock, consumer, peer, address)
        closed(endpoint)
        peer.sendto(ESP, address)
        assert sock.recv(64) == ESP


@isolated(network=True)
@pytest.mark.parametrize("on_device", [False, True], ids=["any device", "bound to a device"])
def test_broadcast_reaches_each_side_once(on_device: bool) -> None:
    """The kernel gives a copy to every socket of the port; only one of them counts."""
    veth_pair()
    consumer = Collector()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, peer_behind_veth() as peer:
        sock.settimeout(5)
        if on_device:
            sock.setsockopt(socket.SOL_SOCKET, steering.SO_BINDTODEVICE, b"here")
        sock.bind(("0.0.0.0", 0))
        endpoint = steered(sock, consumer)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        address = at(sock, "192.0.2.255")
        for payload in (NON_ESP_MARKER + ike(1), ESP, NON_ESP_MARKER + ike(2), ESP):
            peer.sendto(payload, address)
        assert [sock.recv(64), sock.recv(64)] == [ike(1), ike(2)]
        consumer.wait_for(2)
        # the engine has had its copies of all four when a last packet has come through its queue
        peer.sendto(ESP, at(sock, "192.0.2.1"))
        consumer.wait_for(3)
        assert not readable(sock)
        assert (endpoint.stats().handed_back, endpoint.stats().errors) == (0, 0)


@isolated(network=True)
@FAMILIES
def test_multicast_reaches_each_side_once(family: socket.AddressFamily) -> None:
    veth_pair()
    ip("address", "add", "2001:db8::1/64", "dev", "here", "nodad")
    here = socket.if_nametoindex("here")
    consumer = Collector()
    with (
        udp(family, "::" if family == socket.AF_INET6 else "0.0.0.0") as sock,
        socket.socket(family, socket.SOCK_DGRAM) as peer,
    ):
        if family == socket.AF_INET6:
            group = socket.inet_pton(family, "ff02::4500")
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group + struct.pack("@I", here))
            address: Any = ("ff02::4500", sock.getsockname()[1], 0, here)
        else:
            member = socket.inet_aton("224.0.0.250") + struct.pack(
                "@4si", socket.inet_aton("192.0.2.1"), here
            )
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
            peer.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, member)
            address = ("224.0.0.250", sock.getsockname()[1])
        endpoint = steered(sock, consumer)
        for payload in (NON_ESP_MARKER + ike(1), ESP):
            peer.sendto(payload, address)
        assert sock.recv(64) == ike(1)
        consumer.wait_for(1)
        peer.sendto(ESP, at(sock))
        consumer.wait_for(2)
        assert not readable(sock)
        assert (endpoint.stats().handed_back, endpoint.stats().errors) == (0, 0)


@isolated(network=True)
def test_a_socket_of_another_network_namespace_is_served_in_line() -> None:
    """The engine would be made in this one and join nothing."""
    set_up("lo")
    consumer = Collector()
    with udp() as sock, udp() as peer:
        before = state(sock)
        unshare_network()
        set_up("lo")
        endpoint = set_nat_t_endpoint(sock, backend="userspace", esp=consumer)
        assert endpoint.mode == "in line"
        assert "joining the application's port was refused" in endpoint.reason
        peer.sendto(ESP, at(sock))
        send_ike(peer, at(sock), 1)
        assert sock.recv(64) == ike(1)
        assert [packet for packet, _ in consumer.packets] == [ESP]
        closed(endpoint)
        assert {**state(sock), "alone": True} == before  # /proc/net is of the other namespace


@isolated(network=True)
def test_without_loopback_steering_is_believed_and_works() -> None:
    """Nothing can be proven while lo is down; between network namespaces it works all the same."""
    ip("link", "add", "here", "type", "veth", "peer", "there")
    ip("address", "add", "192.0.2.1/24", "dev", "here")
    ip("link", "set", "here", "up")
    assert features.steering_refused() == ""
    assert features.filter_refused() == ""
    consumer = Collector()
    with udp(host="192.0.2.1") as sock, peer_behind_veth() as peer:
        steered(sock, consumer)
        check_demultiplexing(sock, consumer, peer, at(sock, "192.0.2.1"))


def glued_or_early(
    endpoint: NatTEndpoint, sock: socket.socket, address: Any, peer: socket.socket, number: int = 7
) -> None:
    """Have the kernel give one IKE message to the engine, by a program that sends `ike` there."""
    seen = endpoint.stats().handed_back + endpoint.stats().errors
    with socket.socket(fileno=os.dup(sock.fileno())) as plain:
        first_word = int.from_bytes(ike()[:4], "big")
        program = ((0x20, 0, 0, 4), (0x15, 0, 1, first_word), (0x06, 0, 0, 1), (0x06, 0, 0, 0))
        bpf._attach(plain, bpf.SO_ATTACH_REUSEPORT_CBPF, program)
        send_ike(peer, address, number)
        wait_until(lambda: endpoint.stats().handed_back + endpoint.stats().errors > seen)
        bpf.attach_steering(plain, 1)


# --- what the application does to its socket --------------------------------------------------------

REFUSALS: list[Any] = [
    pytest.param(
        lambda sock: sock.setsockopt(*REUSEPORT, 1), "the application set SO_REUSEPORT", id="reuseport"
    ),
    pytest.param(lambda sock: sock.connect(("127.0.0.1", 9)), "the socket is connected", id="connected"),
    pytest.param(lambda sock: sock.setsockopt(*RECVERR, 1), "the application set IP_RECVERR", id="recverr"),
    pytest.param(lambda sock: sock.setsockopt(*ENCAP, 2), "the application set UDP_ENCAP", id="encap"),
]


@pytest.mark.parametrize(("change", "reason"), REFUSALS)
def test_what_cannot_be_steered_is_served_in_line_and_says_why(
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
def test_what_can_no_longer_be_steered_goes_in_line(
    change: Callable[[socket.socket], None], reason: str
) -> None:
    with udp() as sock:
        endpoint = steered(sock)
        change(sock)
        assert endpoint.mode == "in line"
        assert endpoint.reason.startswith(reason)
        assert not has_program(sock)


@pytest.mark.parametrize("kind", ["in line", "encapsulating"])
def test_the_application_may_take_it_back(kind: str) -> None:
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
    option = RECVERR if level == "IP_RECVERR" else (socket.IPPROTO_IPV6, steering.IPV6_RECVERR)
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


# --- IKE that comes to the engine -------------------------------------------------------------------


def segments(peer: socket.socket, address: Any, payloads: list[bytes]) -> None:
    """Send `payloads`, all of one size, so that they stay glued: UDP_SEGMENT over loopback."""
    size = len(payloads[0])
    ancillary = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", size))]
    peer.sendmsg([b"".join(payloads)], ancillary, 0, address)


@FAMILIES
@pytest.mark.parametrize("wildcard", [False, True], ids=["address", "wildcard"])
def test_ike_glued_behind_esp_is_handed_back(family: socket.AddressFamily, wildcard: bool) -> None:
    """The program sees a coalesced packet once, so IKE inside goes where its first segment goes."""
    consumer = Collector(coalesce=True)
    host = {socket.AF_INET: "0.0.0.0", socket.AF_INET6: "::"}[family] if wildcard else None
    batches, size = 20, 200
    with udp(family, host) as sock, udp(family) as peer:
        endpoint = steered(sock, consumer)
        expected = []
        for batch in range(batches):
            first, second = 2 * batch, 2 * batch + 1
            esp = [ESP.ljust(size - 4, b"%d" % part) + b"%04d" % batch for part in range(3)]
            glued = [esp[0], NON_ESP_MARKER + ike(first, size - 4), esp[1], esp[2]]
            glued.append(NON_ESP_MARKER + ike(second, size - 4))
            segments(peer, at(sock), glued)
            expected += [ike(first, size - 4), ike(second, size - 4)]
        received = [sock.recvfrom(65535) for _ in expected]
        assert sorted(message for message, _ in received) == expected
        assert {source[:2] for _, source in received} == {peer.getsockname()[:2]}
        consumer.wait_for(3 * batches)
        assert not readable(sock, 0.05)
        assert len({packet for packet, _ in consumer.packets}) == 3 * batches
        stats = endpoint.stats()
        assert (stats.ike, stats.handed_back, stats.errors) == (2 * batches, 2 * batches, 0)


@pytest.mark.parametrize(
    ("coalesce", "device", "gro"),
    [(True, b"", 1), (False, b"", 0), (True, b"lo", 0)],
    ids=["asked for", "not asked for", "bound to a device"],
)
def test_gro_is_on_where_it_is_asked_for_and_ike_can_be_handed_back(
    coalesce: bool, device: bytes, gro: int
) -> None:
    with udp() as sock:
        sock.setsockopt(socket.SOL_SOCKET, steering.SO_BINDTODEVICE, device)
        group = steering.Steering(sock, Diversion(Collector(coalesce=coalesce), socket.AF_INET))
        assert [engine.getsockopt(*GRO) for engine in group._engines] == [gro]
        group.detach(sock)


def test_esp_glued_behind_ike_is_taken_from_the_application() -> None:
    """Such a packet goes to the application; its socket has no UDP_GRO, so the kernel cuts it first."""
    consumer = Collector(coalesce=True)
    with udp() as sock, udp() as peer:
        steered(sock, consumer)
        segments(peer, at(sock), [NON_ESP_MARKER + ike(1, 28), ESP, NON_ESP_MARKER + ike(2, 28), ESP])
        assert [sock.recv(64), sock.recv(64)] == [ike(1, 28), ike(2, 28)]
        assert not readable(sock)


@FAMILIES
def test_ike_that_came_before_the_program_is_handed_back(
    family: socket.AddressFamily, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the join and the program the kernel spreads by hash: about half falls to the engine."""
    consumer = Collector()
    count = 40
    with udp(family) as sock:
        peers = [udp(family) for _ in range(count)]
        attach = bpf.attach_steering

        def late(steered_sock: socket.socket, engines: int) -> None:
            if steered_sock.getsockname() == sock.getsockname():
                for number, peer in enumerate(peers):
                    send_ike(peer, at(sock), number)
            attach(steered_sock, engines)

        monkeypatch.setattr(bpf, "attach_steering", late)
        endpoint = steered(sock, consumer)
        received = dict(sock.recvfrom(64) for _ in range(count))
        assert received == {ike(number): peer.getsockname() for number, peer in enumerate(peers)}
        assert 0 < endpoint.stats().handed_back < count
        for peer in peers:
            peer.close()


def test_what_a_peer_sends_is_never_taken_for_handed_back() -> None:
    """Only the secret makes an envelope, and it is another one for every endpoint."""
    with udp() as sock, udp() as peer:
        steered(sock)
        forged = HandBack(socket.AF_INET).wrap(b"message", ("192.0.2.99", 4500))
        peer.sendto(forged, at(sock))
        assert sock.recvfrom(2048) == (forged[4:], peer.getsockname())


def test_secrets_are_not_shown_and_not_repeated() -> None:
    made = [HandBack(socket.AF_INET) for _ in range(64)]
    assert len({hand_back.prefix for hand_back in made}) == 64
    assert made[0].prefix[4:].hex() not in repr(made[0]) + str(vars(Diversion(None, socket.AF_INET)))


def test_a_handed_back_datagram_never_loops(caplog: pytest.LogCaptureFixture) -> None:
    """If it comes again, another program steers the port: that is counted and said, once."""
    with udp() as sock, udp() as peer:
        endpoint = steered(sock)
        plain = socket.socket(fileno=os.dup(sock.fileno()))
        with plain:
            bpf._attach(plain, bpf.SO_ATTACH_REUSEPORT_CBPF, ((0x06, 0, 0, 1),))
            send_ike(peer, at(sock), 1)
            wait_until(lambda: endpoint.stats().errors)
            bpf.attach_steering(plain, 1)
        assert not readable(sock, 0.05)
        assert (endpoint.stats().handed_back, endpoint.stats().errors) == (1, 1)
        assert "another program steers this port" in caplog.text
        send_ike(peer, at(sock), 2)
        assert sock.recv(64) == ike(2)


def test_ike_to_a_device_that_cannot_be_handed_back_is_counted(caplog: pytest.LogCaptureFixture) -> None:
    diversion = Diversion(lambda *_: None, socket.AF_INET)
    with udp() as sock, udp() as peer:
        sock.setsockopt(socket.SOL_SOCKET, steering.SO_BINDTODEVICE, b"lo")
        group = steering.Steering(sock, diversion)
        bpf._attach(sock, bpf.SO_ATTACH_REUSEPORT_CBPF, ((0x06, 0, 0, 1),))
        send_ike(peer, at(sock), 1)
        wait_until(lambda: diversion.counters.errors == 1)
        group.detach(sock)
        assert "bound to a device" in caplog.text


@FAMILIES
def test_what_is_handed_back_is_known_across_a_change_of_consumer(
    family: socket.AddressFamily,
) -> None:
    with udp(family) as sock, udp(family) as peer:
        endpoint = steered(sock)
        glued_or_early(endpoint, sock, at(sock), peer)
        assert endpoint.stats().handed_back == 1
        set_nat_t_endpoint(sock, esp=Collector())
        glued_or_early(endpoint, sock, at(sock), peer, 8)
        assert [sock.recvfrom(64) for _ in range(2)] == [(ike(n), peer.getsockname()) for n in (7, 8)]


# --- on, off and the end ----------------------------------------------------------------------------


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
def test_the_consumer_may_end_it(how: str) -> None:
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


def test_two_that_would_wait_for_each_other_get_an_error() -> None:
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
    assert "other threads" in str(raised[0])


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


# --- fork -------------------------------------------------------------------------------------------


def in_child(body: Callable[[], object]) -> int:
    """Run `body` in a forked child and return its exit status: 0 if it raised nothing."""
    child = os.fork()
    if not child:
        status = 1
        try:
            body()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_what_a_child_does_leaves_the_parent_alone() -> None:
    consumer = Collector()
    with udp() as sock, udp() as peer:
        endpoint = steered(sock, consumer)

        def switch_off() -> None:
            endpoint.close()
            assert endpoint.closed
            assert type(sock) is socket.socket

        def reconnect() -> None:
            sock.setsockopt(*GRO, 1)

        def take_part_and_switch_off() -> None:
            assert set_nat_t_endpoint(sock) is endpoint
            endpoint.close()

        for body in (
            lambda: None,
            sock.close,
            switch_off,
            reconnect,
            take_part_and_switch_off,
            collect(sock),
        ):
            assert in_child(body) == 0
            assert endpoint.mode == "steering"
            check_demultiplexing(sock, consumer, peer, at(sock))


def collect(sock: socket.socket) -> Callable[[], None]:
    def body() -> None:
        endpoint = get_nat_t_endpoint(sock)
        assert endpoint is not None
        endpoint._switch.aliases._collected(id(sock))  # what the finalizer of the last object does
        assert endpoint.closed

    return body


def test_a_child_strips_and_inserts() -> None:
    with udp() as sock, udp() as peer:
        steered(sock)

        def body() -> None:
            send_ike(peer, at(sock), 1)
            assert sock.recv(64) == ike(1)
            sock.sendto(b"from the child", at(peer))

        assert in_child(body) == 0
        assert peer.recv(64) == NON_ESP_MARKER + b"from the child"


def test_a_child_that_sets_the_option_again_gets_esp() -> None:
    """Each packet comes to the one or the other; so the parent's thread is kept busy here."""
    entered, leave = threading.Event(), threading.Event()

    def busy(packet: memoryview, source: Any) -> None:
        entered.set()
        leave.wait(20)

    with udp() as sock, udp() as peer:
        endpoint = steered(sock, busy)
        peer.sendto(ESP, at(sock))
        assert entered.wait(5)

        def body() -> None:
            consumer = Collector()
            count = len(descriptors())
            assert set_nat_t_endpoint(sock, esp=consumer) is endpoint
            assert len(descriptors()) == count  # the parent's are closed
            assert endpoint.mode == "steering"
            check_demultiplexing(sock, consumer, peer, at(sock))
            with pytest.raises(OSError, match="goes on steering"):
                set_nat_t_endpoint(sock, backend="userspace:in-line")
            threads = [thread.name for thread in threading.enumerate()]
            assert threads.count("natcompat-esp") == 1

        try:
            assert in_child(body) == 0
        finally:
            leave.set()
        send_ike(peer, at(sock), 3)
        assert sock.recv(64) == ike(3)


def test_a_daemon_that_outlives_its_parent_has_the_endpoint_to_itself() -> None:
    """Set the option, fork, let the parent end: the way of every daemon."""
    reader, writer = os.pipe()
    middle = os.fork()
    if not middle:
        daemonize_and_report(writer)
    os.close(writer)
    os.waitpid(middle, 0)
    with open(reader) as report:
        assert report.read() == "done"


def daemonize_and_report(writer: int) -> None:
    """Run in a process whose child reports by `writer` when all held; never returns."""
    outcome = "nothing"
    try:
        consumer = Collector()
        sock, peer = udp(), udp()
        before = {**state(sock), "descriptors": None, "threads": None}
        endpoint = steered(sock, consumer)
        parent = os.getpid()
        if os.fork():
            os._exit(0)
        wait_until(lambda: not alive(parent))
        assert set_nat_t_endpoint(sock) is endpoint
        check_demultiplexing(sock, consumer, peer, at(sock))
        sock.setsockopt(*RECVERR, 1)
        assert endpoint.mode == "in line"
        sock.setsockopt(*RECVERR, 0)
        assert endpoint.mode == "steering"
        endpoint.close()
        assert {**state(sock), "descriptors": None, "threads": None} == before
        for payload in (ESP, KEEPALIVE):
            peer.sendto(payload, at(sock))
        assert queued(sock) == [ESP, KEEPALIVE]
        outcome = "done"
    except BaseException:
        outcome = traceback.format_exc()
    finally:
        os.write(writer, outcome.encode())
        os._exit(0)


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
