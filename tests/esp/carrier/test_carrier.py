"""ESP of this process on real sockets: what comes in, what goes out, and from where."""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from natcompat import NatCompatError, get_nat_t_endpoint, open_ipsec, set_nat_t_endpoint
from natcompat.backends.process_esp import PROCESS_ESP
from natcompat.contract import NAT_KEEPALIVE
from natcompat.esp import choice as datapaths
from natcompat.esp.device.queue import CallbackDevice, QueueDevice
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.results import Reason
from natcompat.esp.userspace import UserspaceIPsec
from natcompat.ipsec import Acquire, Direction, Policy, TrafficSelector, UDPEncapsulation
from tests.support.esp import INNER, ip_packet, native_providers, udp
from tests.support.linux import nothing_left
from tests.support.pairs import until
from tests.support.tunnel_ends import End, install, question, two_ends, udp_socket

MARKER = bytes(4)


@pytest.fixture(autouse=True, scope="module", params=["python", "c"])
def carried(request: pytest.FixtureRequest) -> Iterator[None]:
    """Run all of it with each data path."""
    if request.param == "c" and not native_providers():
        pytest.skip("the C data path is not built: python ffi/build_datapath.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(datapaths.ENVIRONMENT_VARIABLE, request.param)
        yield


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def answer(version: int = 4, payload: bytes | None = None) -> bytes:
    return ip_packet(*INNER[version][::-1], udp() if payload is None else payload)


def passes(near: End, far: End, version: int = 4) -> bool:
    """Tell whether a packet goes there, and one comes back."""
    near.device.put(question(version))
    there = far.device.get(10)
    far.device.put(answer(version))
    return (there, near.device.get(10)) == (question(version), answer(version))


@pytest.mark.parametrize("inner_version", [4, 6])
@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("backends", [("userspace", "userspace"), ("userspace:in-line", "userspace")])
def test_packets_go_both_ways(
    version: int, inner_version: int, backends: tuple[str, str], stack: contextlib.ExitStack
) -> None:
    near, far = two_ends(stack, version=version, inner_version=inner_version, backends=backends)
    if backends[0] == "userspace:in-line":
        near.sock.setblocking(False)  # its ESP is taken by receives of the application
        far.device.put(answer(inner_version))
        assert select.select([near.sock], [], [], 10)[0]
        with pytest.raises(BlockingIOError):
            near.sock.recv(100)
        assert near.device.get(10) == answer(inner_version)
        near.device.put(question(inner_version))
        assert far.device.get(10) == question(inner_version)
    else:
        assert passes(near, far, inner_version)
    assert not near.ipsec.counters()
    assert not far.ipsec.counters()
    assert near.endpoint.stats().datapath == near.ipsec.datapath


def test_ike_inside_an_sa_is_dropped(stack: contextlib.ExitStack) -> None:
    """As on Solaris: neither IKE nor ESP-in-UDP for a socket with the option travels inside ESP."""
    near, far = two_ends(stack)
    host, port = near.sock.getsockname()
    far_host = far.sock.getsockname()[0]
    for end, direction in ((near, Direction.IN), (far, Direction.OUT)):
        end.ipsec.add_policy(
            Policy(
                direction=direction,
                selector=TrafficSelector(source="10.2.0.0/16", destination=host),
                source=far_host,
                destination=host,
                reqid=7,
            )
        )
    inside = ip_packet("10.2.0.1", host, udp(bytes(4) + b"IKE", destination_port=port))
    other = ip_packet("10.2.0.1", host, udp(destination_port=port + 1 & 0xFFFF))
    far.device.put(inside)
    far.device.put(other)
    assert near.device.get(10) == other
    assert near.ipsec.counters()[Reason.ENDPOINT] == 1


def test_ike_goes_on_beside_it(stack: contextlib.ExitStack) -> None:
    near, far = two_ends(stack)
    assert passes(near, far)
    near.sock.sendto(b"IKE", far.sock.getsockname())
    assert far.sock.recvfrom(100) == (b"IKE", near.sock.getsockname())
    assert far.endpoint.stats().ike == 1


@pytest.mark.parametrize(
    "sizes", [[1000] * 50, [200, 200, 1300, 1300, 64, 64, 1300] * 7, [60]], ids=["one", "several", "single"]
)
def test_bursts_arrive_whole_and_in_order(sizes: list[int], stack: contextlib.ExitStack) -> None:
    near, far = two_ends(stack)
    packets = [question(payload=udp(bytes((index,)) * size)) for index, size in enumerate(sizes)]
    for packet in packets:
        assert near.device.put(packet)
    assert [far.device.get(10) for _ in packets] == packets


def test_a_dual_stack_socket_sends_from_the_address_of_the_sa(stack: contextlib.ExitStack) -> None:
    """A wildcard socket has all addresses; the SA names one, and not the one that routing prefers."""
    near, far = two_ends(stack, bind=("127.0.0.1", "::"))
    with open_events(near) as events:
        assert passes(near, far)  # the far end is 127.0.0.2
        assert not events.read(), "the near end saw it come from elsewhere"


def open_events(end: End) -> Any:
    return end.ipsec.events()


def test_of_several_sockets_on_a_port_the_one_with_the_address_sends(stack: contextlib.ExitStack) -> None:
    near, far = two_ends(stack)
    port = near.sock.getsockname()[1]
    other = udp_socket(stack, "127.0.0.3", port)
    set_nat_t_endpoint(other, backend="userspace", esp=near.ipsec)
    with open_events(far) as events:
        assert passes(near, far)
        assert not events.read()


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("backend", ["userspace", "userspace:in-line"])
@pytest.mark.skipif(not hasattr(socket, "IP_RECVTOS"), reason="reads the header that arrives")
def test_the_outer_header_says_what_the_sa_wants(
    version: int, backend: str, stack: contextlib.ExitStack
) -> None:
    near, far = two_ends(stack, version=version, backends=(backend, "userspace"))
    far.endpoint.close()
    level, ask, tell = (
        (socket.IPPROTO_IP, socket.IP_RECVTOS, socket.IP_TOS)
        if version == 4
        else (socket.IPPROTO_IPV6, socket.IPV6_RECVTCLASS, socket.IPV6_TCLASS)
    )
    far.sock.setsockopt(level, ask, 1)
    for traffic_class in (0xB8, 0x02, 0):
        near.device.put(question(traffic_class=traffic_class))
        payload, ancillary, _, source = far.sock.recvmsg(2000, 100)
        assert payload[:4] != MARKER
        assert source == near.sock.getsockname()
        assert [(at, kind, data[0]) for at, kind, data in ancillary] == [(level, tell, traffic_class)]


def test_congestion_met_on_the_way_is_seen_inside(stack: contextlib.ExitStack) -> None:
    near, far = two_ends(stack)
    near.endpoint.close()
    sealed = near.ipsec.seal(question(traffic_class=2))
    assert isinstance(sealed, list)
    near.sock.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, 3)
    near.sock.sendto(sealed[0][0], far.sock.getsockname())
    packet = far.device.get(10)
    assert packet is not None
    assert packet[1] == 3


def test_keepalives_leave_by_the_port_of_the_sa(stack: contextlib.ExitStack) -> None:
    near, far = two_ends(stack, nat_keepalive=1)
    far.endpoint.close()
    assert far.sock.recvfrom(100) == (NAT_KEEPALIVE, near.sock.getsockname())


def test_what_no_endpoint_can_send_is_counted(stack: contextlib.ExitStack) -> None:
    near, _ = two_ends(stack)
    near.endpoint.close()
    near.device.put(question())
    until(lambda: near.ipsec.counters().get(Reason.NO_ENDPOINT) == 1)


def test_what_the_device_does_not_take_is_counted(stack: contextlib.ExitStack) -> None:
    near, far = two_ends(stack, devices=(QueueDevice(), QueueDevice(limit=1)))
    for _ in range(3):
        near.device.put(question())
    until(lambda: far.ipsec.counters().get(Reason.DEVICE) == 2)
    assert far.device.get() == question()


def test_what_the_system_does_not_send_is_counted(stack: contextlib.ExitStack) -> None:
    near, _ = two_ends(stack)
    near.ipsec.flush_sas()
    near.ipsec.flush_policies()
    addresses = ("127.0.0.1", "192.0.2.1")  # nothing leaves from a loopback address to another host
    install(near.ipsec, near=True, addresses=addresses, local_port=near.sock.getsockname()[1], remote_port=9)
    near.device.put(question())
    until(lambda: near.ipsec.counters().get(Reason.SEND) == 1)
    assert isinstance(near.ipsec.carrier.last_error, OSError)


def test_garbage_is_counted_by_reason(stack: contextlib.ExitStack) -> None:
    _, far = two_ends(stack)
    wire = udp_socket(stack, "127.0.0.1")
    for payload in (b"\1\2\3\4", b"\1\2\3\4" * 8, far.ids[Direction.IN].spi.to_bytes(4) + bytes(60)):
        wire.sendto(payload, far.sock.getsockname())
    until(lambda: sum(far.ipsec.counters().values()) == 3)
    reasons = {Reason.SHORT, Reason.NO_SA, Reason.INTEGRITY, Reason.REPLAYED}
    assert set(far.ipsec.counters()) <= reasons
    assert len(far.device.inbound) == 0


class TestTheEspOfTheProcess:
    """`open_ipsec("userspace")`, and endpoints that were given no `esp`."""

    @pytest.mark.parametrize("when", ["before", "after"])
    def test_endpoints_use_it(self, when: str, stack: contextlib.ExitStack) -> None:
        sock = udp_socket(stack, "127.0.0.1")
        if when == "before":
            ipsec = stack.enter_context(open_ipsec("userspace", device=QueueDevice()))
        endpoint = set_nat_t_endpoint(sock, backend="userspace")
        if when == "after":
            assert endpoint.mode == "filter"
            assert endpoint.stats().datapath is None
            ipsec = stack.enter_context(open_ipsec("userspace", device=QueueDevice()))
        assert endpoint.mode == "steering"
        assert endpoint.stats().datapath == ipsec.datapath
        _, far = two_ends(stack)
        port = far.sock.getsockname()[1]
        addresses = ("127.0.0.1", "127.0.0.2")
        install(ipsec, near=True, addresses=addresses, local_port=sock.getsockname()[1], remote_port=port)
        assert isinstance(ipsec.device, QueueDevice)
        ipsec.device.put(question())
        assert far.device.get(10) == question()
        ipsec.close()
        assert endpoint.mode == "filter"
        assert endpoint.stats().datapath is None

    def test_a_socket_that_is_bound_later(self, stack: contextlib.ExitStack) -> None:
        ipsec = stack.enter_context(open_ipsec("userspace", device=QueueDevice()))
        sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        endpoint = set_nat_t_endpoint(sock, backend="userspace")
        sock.bind(("127.0.0.1", 0))
        assert endpoint.mode == "steering"
        peer = udp_socket(stack, "127.0.0.2")
        ports = {"local_port": sock.getsockname()[1], "remote_port": peer.getsockname()[1]}
        install(ipsec, near=True, addresses=("127.0.0.1", "127.0.0.2"), **ports)
        assert isinstance(ipsec.device, QueueDevice)
        ipsec.device.put(question())
        assert peer.recvfrom(2000)[1] == sock.getsockname()

    def test_who_was_given_a_consumer_keeps_it(self, stack: contextlib.ExitStack) -> None:
        sock, wire = udp_socket(stack, "127.0.0.1"), udp_socket(stack, "127.0.0.1")
        seen: list[bytes] = []
        endpoint = set_nat_t_endpoint(
            sock, backend="userspace", esp=lambda packet, _: seen.append(bytes(packet))
        )
        with open_ipsec("userspace", device=QueueDevice()):
            wire.sendto(b"\1\2\3\4" * 8, sock.getsockname())
            until(lambda: seen)
        assert endpoint.mode == "steering"

    def test_there_is_one(self) -> None:
        with open_ipsec("userspace", device=QueueDevice()) as ipsec:
            with pytest.raises(NatCompatError) as caught:
                open_ipsec("userspace:in-line")
            assert caught.value.errno == errno.EBUSY
            assert "close" in caught.value.remedy
            assert PROCESS_ESP.consumer is ipsec
        with open_ipsec("userspace", device=QueueDevice()):
            pass
        assert PROCESS_ESP.consumer is None

    def test_it_leaves_nothing(self, stack: contextlib.ExitStack) -> None:
        sock = udp_socket(stack, "127.0.0.1")
        set_nat_t_endpoint(sock, backend="userspace")
        with open_ipsec("userspace", device=QueueDevice()):  # whatever is made once
            pass
        with nothing_left(), open_ipsec("userspace", device=QueueDevice()):
            pass

    def test_a_device_of_ones_own_is_closed_with_it(self) -> None:
        delivered: list[list[bytes]] = []
        device = CallbackDevice(delivered.append)
        with open_ipsec("userspace", device=device) as ipsec:
            assert ipsec.device is device
        assert device.outbound.closed

    def test_the_kernels_takes_no_device(self) -> None:
        from tests.support.pairs import LinuxSocketsOnly

        with pytest.raises(NatCompatError) as caught:
            open_ipsec(LinuxSocketsOnly(), device=QueueDevice())
        assert caught.value.errno == errno.EINVAL
        assert "userspace" in caught.value.remedy

    def test_a_collected_socket_is_no_way_out(self, stack: contextlib.ExitStack) -> None:
        ipsec = stack.enter_context(open_ipsec("userspace", device=QueueDevice()))
        for index, backend in enumerate(("userspace", "userspace:in-line"), start=1):
            sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            sock.bind(("127.0.0.1", 0))
            set_nat_t_endpoint(sock, backend=backend)
            port = sock.getsockname()[1]
            with pytest.warns(ResourceWarning):
                del sock
            install(ipsec, near=True, addresses=("127.0.0.1", "127.0.0.2"), local_port=port, remote_port=9)
            assert isinstance(ipsec.device, QueueDevice)
            ipsec.device.put(question())
            until(functools.partial(_has_counted, ipsec, Reason.NO_ENDPOINT, index))
            ipsec.flush_sas()
            ipsec.flush_policies()


def _has_counted(ipsec: UserspaceIPsec, reason: Reason, packets: int) -> bool:
    return ipsec.counters().get(reason) == packets


def test_traffic_without_an_sa_asks_for_one(stack: contextlib.ExitStack) -> None:
    near, _ = two_ends(stack)
    near.ipsec.flush_sas()
    with open_events(near) as events:
        near.device.put(question())
        assert select.select([events], [], [], 10)[0]
        (event,) = events.read()
    assert isinstance(event, Acquire)
    assert event.reqid == 7


@pytest.mark.parametrize("follow_mapping", [False, True])
def test_a_mapping_that_changes_is_followed_when_asked(
    follow_mapping: bool, stack: contextlib.ExitStack
) -> None:
    """The near end goes on from another port, as behind a NAT that forgot it."""
    near, far = two_ends(stack, follow_mapping=follow_mapping)
    assert passes(near, far)
    moved = udp_socket(stack, "127.0.0.1")
    set_nat_t_endpoint(moved, backend="userspace", esp=near.ipsec)
    port = moved.getsockname()[1]
    encapsulation = UDPEncapsulation(local_port=port, remote_port=far.sock.getsockname()[1])
    for direction in Direction:
        near.ipsec.update_sa(near.ids[direction], encapsulation=encapsulation)
    with open_events(far) as events:
        near.device.put(question())
        assert far.device.get(10) == question()
        (event,) = events.read()
        assert (event.old_port, event.new_port) == (near.sock.getsockname()[1], port)
    far.device.put(answer())
    assert near.device.get(10) == answer()
    endpoint = get_nat_t_endpoint(moved if follow_mapping else near.sock)
    assert endpoint is not None
    assert endpoint.stats().esp == (1 if follow_mapping else 2)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_forked_child_seals_nothing_and_takes_nothing(stack: contextlib.ExitStack) -> None:
    near, far = two_ends(stack)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            near.device.put(question())
            dropped = near.ipsec.seal(question())
            near.ipsec.close()
            if dropped == (Reason.FORKED,) and PROCESS_ESP.consumer is None:
                code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert passes(near, far)
    assert far.ipsec.get_sa(far.ids[Direction.IN]).packets == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")
def test_a_daemon_opens_its_own_after_the_fork(stack: contextlib.ExitStack) -> None:
    """The option before the fork, IPsec behind it: how daemons start."""
    sock = udp_socket(stack, "127.0.0.1")
    set_nat_t_endpoint(sock, backend="userspace")
    peer = udp_socket(stack, "127.0.0.2")
    port = sock.getsockname()[1]
    child = os.fork()
    if child == 0:
        code = 1
        try:
            ipsec = open_ipsec("userspace", device=QueueDevice())
            ports = {"local_port": port, "remote_port": peer.getsockname()[1]}
            install(ipsec, near=True, addresses=("127.0.0.1", "127.0.0.2"), **ports)
            device = ipsec.device
            assert isinstance(device, QueueDevice)
            device.put(question())
            until(lambda: not len(device.outbound))
            ipsec.close()
            code = 0
        finally:
            os._exit(code)
    assert peer.recvfrom(2000)[1][1] == port
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_whoever_takes_packets_may_close_it(stack: contextlib.ExitStack) -> None:
    """In the thread that opened them."""
    closed = threading.Event()

    def deliver(packets: list[bytes]) -> None:
        ipsec.close()
        closed.set()

    ipsec = stack.enter_context(open_ipsec("userspace", device=CallbackDevice(deliver)))
    sock, peer = udp_socket(stack, "127.0.0.2"), udp_socket(stack, "127.0.0.1")
    endpoint = set_nat_t_endpoint(sock, backend="userspace")
    ports = sock.getsockname()[1], peer.getsockname()[1]
    addresses = ("127.0.0.2", "127.0.0.1")
    install(ipsec, near=False, addresses=addresses, local_port=ports[0], remote_port=ports[1])
    near = stack.enter_context(EspEngine())
    install(near, near=True, addresses=addresses[::-1], local_port=ports[1], remote_port=ports[0])
    sealed = near.seal(question())
    assert isinstance(sealed, list)
    peer.sendto(sealed[0][0], sock.getsockname())
    assert closed.wait(10)
    until(lambda: endpoint.mode == "filter")
    peer.sendto(MARKER + b"IKE", sock.getsockname())
    assert sock.recv(100) == b"IKE"


def test_two_that_close_an_endpoint_do_not_wait_for_each_other(stack: contextlib.ExitStack) -> None:
    """One of them in the thread that reads for all endpoints, and on behalf of another."""
    inside, go = threading.Event(), threading.Event()
    raised: list[NatCompatError] = []

    def deliver(packets: list[bytes]) -> None:
        inside.set()
        go.wait(10)
        try:
            other.close()
        except NatCompatError as error:
            raised.append(error)

    near, far = two_ends(stack, devices=(QueueDevice(), CallbackDevice(deliver)))
    other = set_nat_t_endpoint(udp_socket(stack, "127.0.0.1"), backend="userspace", esp=far.ipsec)
    near.device.put(question())
    assert inside.wait(10)
    closer = threading.Thread(target=other.close, daemon=True)
    closer.start()
    until(lambda: other.closed)  # it has the lock, and waits for the thread that reads
    go.set()
    closer.join(10)
    assert not closer.is_alive()
    assert {error.errno for error in raised} <= {errno.EDEADLK}


def test_what_a_consumer_raises_does_not_end_reading(
    stack: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    taken: list[bytes] = []

    def deliver(packets: list[bytes]) -> None:
        taken.extend(packets)
        if len(taken) == 1:
            sys.exit("this is no way to end a program")

    near, far = two_ends(stack, devices=(QueueDevice(), CallbackDevice(deliver)))
    for number in range(1, 4):
        near.device.put(question())
        until(lambda: len(taken) == number)  # noqa: B023
    assert far.endpoint.stats().esp == 3
    assert "no way to end" in caplog.text


def test_a_device_that_was_closed_costs_nothing(stack: contextlib.ExitStack) -> None:
    near, _ = two_ends(stack)
    thread: Any = near.ipsec.carrier._thread._thread  # type: ignore[attr-defined]
    clock = time.pthread_getcpuclockid(thread.ident)
    near.device.close()
    start = time.clock_gettime_ns(clock)
    time.sleep(0.1)
    assert time.clock_gettime_ns(clock) - start < 50_000_000
    assert thread.is_alive(), "it still has ESP to read"
    near.ipsec.close()
    assert not thread.is_alive()
    with pytest.raises(NatCompatError):
        near.ipsec.list_sas()
