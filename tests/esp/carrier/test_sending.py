"""How ESP leaves: which endpoint, and what is done about what the system refuses."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from natcompat.backends.base import Address
from natcompat.esp.carrier.portable import PortableCarrier
from natcompat.esp.carrier.sending import Way, Ways
from natcompat.esp.device.queue import QueueDevice
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.results import Destination, Reason
from natcompat.ipsec import Direction, UDPEncapsulation
from tests.support.esp import OUTER, inner, policy, sa, udp
from tests.support.linux import LINUX
from tests.support.pairs import until
from tests.support.tunnel_ends import udp_socket

pytestmark = LINUX


class Scripted:
    """An outlet on a real socket, whose system answers first what the script says."""

    own = True

    def __init__(self, sock: socket.socket, *script: int, own: bool = True) -> None:
        self.sock, self.application, self.own = sock, sock, own
        self.script = list(script)
        self.sent: list[list[bytes]] = []
        self.options: list[list[tuple[int, int, bytes]]] = []
        self.to: list[Address] = []

    @property
    def address(self) -> Address:
        """Of the socket."""
        address: Address = self.sock.getsockname()
        return address

    def sendmsg(
        self, buffers: Sequence[bytes], ancillary: Sequence[tuple[int, int, bytes]], address: Address
    ) -> int:
        """Fail as the script says, else keep what was sent."""
        answer = self.script.pop(0) if self.script else 0
        if answer:
            raise OSError(answer, os.strerror(answer))
        self.sent.append(list(buffers))
        self.options.append(list(ancillary))
        self.to.append(address)
        return sum(map(len, buffers))


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as stack:
        yield stack


def destination(sock: socket.socket, host: str = "127.0.0.9", **changes: Any) -> Destination:
    return Destination(host, 4500, local_port=sock.getsockname()[1], **changes)


PACKETS = [bytes(100)] * 3


def test_packets_of_one_size_go_together(stack: contextlib.ExitStack) -> None:
    outlet = Scripted(udp_socket(stack, "127.0.0.1"))
    packets = [bytes(9), *[bytes(100)] * 70, bytes(50), bytes(100)]
    assert Way(outlet, "", 4).send(packets, destination(outlet.sock)) == ([], 0, None)
    assert [len(each) for each in outlet.sent] == [1, 64, 7, 1]
    assert [packet for each in outlet.sent for packet in each] == packets


def test_no_run_is_longer_than_a_datagram(stack: contextlib.ExitStack) -> None:
    outlet = Scripted(udp_socket(stack, "127.0.0.1"))
    Way(outlet, "", 4).send([bytes(20000)] * 7 + [bytes(65507)] * 2, destination(outlet.sock))
    assert [len(each) for each in outlet.sent] == [3, 3, 1, 1, 1]


@pytest.mark.parametrize(
    ("refusal", "later"), [(errno.EMSGSIZE, 1), (errno.EINVAL, 1), (errno.EIO, 3), (errno.ENOPROTOOPT, 3)]
)
def test_what_refuses_segments_gets_them_one_by_one(
    refusal: int, later: int, stack: contextlib.ExitStack
) -> None:
    """And is asked again the next time, unless it cannot at all."""
    outlet = Scripted(udp_socket(stack, "127.0.0.1"), refusal)
    way = Way(outlet, "", 4)
    assert way.send(PACKETS, destination(outlet.sock)) == ([], 0, None)
    assert outlet.sent == [[each] for each in PACKETS]
    way.send(PACKETS, destination(outlet.sock))
    assert len(outlet.sent) == 3 + later


def test_what_is_too_long_is_named_and_the_rest_is_sent(stack: contextlib.ExitStack) -> None:
    outlet = Scripted(udp_socket(stack, "127.0.0.1"), errno.EMSGSIZE, 0, errno.EMSGSIZE)
    assert Way(outlet, "", 4).send(PACKETS, destination(outlet.sock)).too_long == [1]
    assert len(outlet.sent) == 2


def test_a_full_queue_is_waited_for_once_in_a_burst(stack: contextlib.ExitStack) -> None:
    outlet = Scripted(udp_socket(stack, "127.0.0.1"), errno.EAGAIN, 0, errno.ENOBUFS)
    packets = [bytes(100), bytes(200), bytes(300)]  # each by itself
    outcome = Way(outlet, "", 4).send(packets, destination(outlet.sock))
    assert (outcome.too_long, outcome.lost) == ([], 1)
    assert outcome.error is not None
    assert outcome.error.errno == errno.ENOBUFS
    assert outlet.sent == [[packets[0]], [packets[2]]]


def test_the_sockets_of_applications_keep_their_options(stack: contextlib.ExitStack) -> None:
    """They get no segments and no DF; their own traffic class is overridden packet by packet."""
    sock = udp_socket(stack, "127.0.0.1")
    outlet = Scripted(sock, own=False)
    before = sock.getsockopt(socket.IPPROTO_IP, 10)  # IP_MTU_DISCOVER
    Way(outlet, "", 4).send(PACKETS, destination(sock, dont_fragment=True))
    assert outlet.sent == [[each] for each in PACKETS]
    assert sock.getsockopt(socket.IPPROTO_IP, 10) == before
    assert [each[:2] for options in outlet.options for each in options] == [
        (socket.IPPROTO_IP, socket.IP_TOS)
    ] * 3


def test_an_ipv6_socket_sends_to_ipv4(stack: contextlib.ExitStack) -> None:
    outlet = Scripted(udp_socket(stack, "::"))
    ways = Ways()
    ways.add(outlet)
    to = destination(outlet.sock, source="127.0.0.1", traffic_class=8)
    way = ways.find(to)
    assert way is not None
    way.send(PACKETS[:1], to)
    assert outlet.to == [("::ffff:127.0.0.9", 4500)]
    assert [(level, option) for level, option, _ in outlet.options[0]] == [
        (socket.IPPROTO_IPV6, 50),  # IPV6_PKTINFO
        (socket.IPPROTO_IP, socket.IP_TOS),
    ]


def test_an_address_that_is_not_here_is_left_to_the_system_and_looked_for_again(
    stack: contextlib.ExitStack,
) -> None:
    outlet = Scripted(udp_socket(stack, "0.0.0.0"))
    for source in ("192.0.2.77", "0.0.0.0"):
        way = Way(outlet, source, 4)
        assert way.until is not None
        way.send(PACKETS[:1], destination(outlet.sock))
        assert outlet.options[-1] == []


class TestWhichEndpoint:
    """`Ways.find`."""

    def test_the_one_with_the_address_then_wildcards_then_any(self, stack: contextlib.ExitStack) -> None:
        ways = Ways()
        wildcard = Scripted(udp_socket(stack, "::"))
        port = wildcard.sock.getsockname()[1]

        def sender(source: str, host: str = "127.0.0.9") -> object:
            way = ways.find(Destination(host, 4500, local_port=port, source=source))
            return None if way is None else way._outlet

        assert sender("127.0.0.1") is None
        ways.add(wildcard)
        assert sender("127.0.0.1") is sender("::1", "::1") is wildcard
        wildcard.sock.close()
        assert sender("127.0.0.1") is not None  # as it was found
        ways.forget()
        assert sender("127.0.0.1") is None
        ways.remove(wildcard)
        exact = Scripted(udp_socket(stack, "127.0.0.1", port))
        ways.add(exact)
        assert sender("127.0.0.1") is sender("192.0.2.1") is exact
        assert sender("::1", "::1") is None
        ways.add(Scripted(udp_socket(stack, "127.0.0.2", port)))
        assert sender("127.0.0.1") is exact

    def test_no_ipv4_from_sockets_for_ipv6_alone(self, stack: contextlib.ExitStack) -> None:
        sock = stack.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(("::", 0))
        other = udp_socket(stack, "::1")
        ways = Ways()
        ways.add(Scripted(sock))
        ways.add(Scripted(other))
        assert ways.find(destination(sock)) is None
        assert ways.find(destination(other)) is None
        assert ways.find(destination(other, "::1")) is not None
        assert ways.socket(6) is sock
        assert ways.socket(4) is None

    def test_a_mapped_address_is_an_ipv4_address(self, stack: contextlib.ExitStack) -> None:
        outlet = Scripted(udp_socket(stack, "::ffff:127.0.0.1"))
        ways = Ways()
        ways.add(outlet)
        assert ways.find(destination(outlet.sock, source="127.0.0.1")) is not None
        assert ways.find(destination(outlet.sock, "::1")) is None


class TestWhatIsTooLong:
    """`PortableCarrier`, where the system says EMSGSIZE."""

    @pytest.fixture
    def carried(self, stack: contextlib.ExitStack) -> tuple[EspEngine, QueueDevice, Scripted]:
        engine = stack.enter_context(EspEngine())
        device = stack.enter_context(QueueDevice())
        outlet = Scripted(udp_socket(stack, "127.0.0.1"), errno.EMSGSIZE)
        carrier = PortableCarrier(engine, device)
        stack.callback(carrier.close)
        carrier.paths._ask = lambda _: 1000
        carrier.attached(outlet)
        carrier.start()
        port = outlet.sock.getsockname()[1]
        engine.add_sa(sa(Direction.OUT, encapsulation=UDPEncapsulation(local_port=port, remote_port=4500)))
        engine.add_policy(policy(Direction.OUT))
        return engine, device, outlet

    def test_its_sender_is_told(self, carried: tuple[EspEngine, QueueDevice, Scripted]) -> None:
        engine, device, outlet = carried
        device.put(inner(payload=udp(bytes(1200)), dont_fragment=True))
        message = device.get(10)
        assert message is not None
        assert message[20:22] == b"\x03\x04"  # fragmentation needed
        until(lambda: engine.counters() == {Reason.PATH_MTU: 1})
        assert outlet.sent == []

    def test_without_df_it_is_left_to_be_fragmented(
        self, carried: tuple[EspEngine, QueueDevice, Scripted]
    ) -> None:
        engine, device, outlet = carried
        device.put(inner(payload=udp(bytes(1200))))
        until(lambda: outlet.sent)
        assert outlet.to == [(OUTER[4][1], 4500)]
        assert not engine.counters()

    def test_an_sa_that_has_gone_meanwhile_is_nobodys(
        self, carried: tuple[EspEngine, QueueDevice, Scripted]
    ) -> None:
        engine, _, outlet = carried
        sealed = engine.seal(inner(payload=udp(bytes(1200))))
        assert isinstance(sealed, list)
        engine.flush_sas()
        carrier = PortableCarrier(engine, QueueDevice())
        carrier.attached(outlet)
        carrier.transmit(sealed)
        carrier.close()
        carrier.transmit(sealed)  # which is ignored
        carrier.inbound([(memoryview(bytes(60)), ("192.0.2.2", 4500))])
        assert engine.counters() == {Reason.PATH_MTU: 1, Reason.CLOSED: 1}


class Broken(QueueDevice):
    """A device of somebody else's."""

    def read_burst(self, most: int = 64) -> list[bytes]:
        """Fail."""
        raise RuntimeError("broken")


def test_a_device_that_fails_is_told_of_and_stops_nothing_else(
    stack: contextlib.ExitStack, caplog: pytest.LogCaptureFixture
) -> None:
    engine, device = stack.enter_context(EspEngine()), stack.enter_context(Broken())
    carrier = PortableCarrier(engine, device)
    carrier.start()
    device.put(inner())
    until(lambda: "nothing is sealed any more" in caplog.text)
    carrier.close()
    carrier.close()


def test_a_closed_socket_is_counted(stack: contextlib.ExitStack) -> None:
    engine = stack.enter_context(EspEngine())
    carrier = PortableCarrier(engine, QueueDevice())
    stack.callback(carrier.close)
    outlet = Scripted(udp_socket(stack, "127.0.0.1"))
    carrier.attached(outlet)
    carrier.transmit([(bytes(60), destination(outlet.sock))])
    again = destination(outlet.sock, dont_fragment=True)
    outlet.sock.close()
    carrier.transmit([(bytes(60), again)])
    assert engine.counters() == {Reason.SEND: 1}
    assert carrier.last_error is not None
    assert carrier.last_error.errno == errno.EBADF
    carrier.transmit([(bytes(60), again)])  # another way is looked for, and there is none
    assert engine.counters() == {Reason.SEND: 1, Reason.NO_ENDPOINT: 1}
