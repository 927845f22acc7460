"""The conformance suite of a backend: the contract, tested on real sockets over loopback.

Who writes a backend subclasses `EndpointConformance` in a test module, and pytest does the rest::

    from natcompat.testing import EndpointConformance

    class TestMyBackend(EndpointConformance):
        backends = (MyBackend(),)      # instances, or registered names

Every test runs for every backend, address family and destination of ESP. natcompat's own backends
are held to the same tests. This module needs pytest only where pytest runs it; to see the values
in a failed assertion, put ``pytest.register_assert_rewrite("natcompat.testing")`` before the import.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from natcompat.backends.base import port_of
from natcompat.contract import (
    LARGEST_PAYLOAD,
    NAT_KEEPALIVE,
    NON_ESP_MARKER,
    OUTBOUND_TABLE,
    TABLE,
    Duty,
    OutboundRow,
    Performer,
    Row,
    Verdict,
)
from natcompat.endpoint import get_nat_t_endpoint
from natcompat.testing.harness import PATIENCE, RECEIVES, SENDS, SPACE, Bench, EndpointHarness, Service

if TYPE_CHECKING:
    pass


_IKE = [row for row in TABLE if row.verdict is Verdict.IKE]
_NOT_IKE = [row for row in TABLE if row.verdict is not Verdict.IKE]
_ESP = [row for row in TABLE if row.verdict is Verdict.ESP]
_RUNTS = [row for row in _NOT_IKE if row.verdict is not Verdict.ESP]


class EndpointConformance(EndpointHarness):
    """The contract as tests: a subclass names the backends."""

    # --- inbound -------------------------------------------------------------------------------

    def test_inbound(self, service: Service, family: int, row: Row) -> None:
        """Each row of the table: delivered, dropped or diverted, with its source."""
        with self.bench(service, family) as bench:
            bench.switch_on()
            bench.send(row.payload)
            if row.delivered is not None:
                assert bench.sock.recvfrom(SPACE) == (row.delivered, bench.peer.getsockname())
            assert bench.delivered() == []
            if service.consumed:
                expected = [(row.payload, bench.peer.getsockname())] * (row.verdict is Verdict.ESP)
                assert bench.esp.wait_for(len(expected)) == expected

    def test_every_receive_method(self, service: Service, family: int, receive: str) -> None:
        """The whole table through each method: IKE in order, and nothing else."""
        with self.bench(service, family) as bench:
            bench.switch_on()
            bench.send(*(row.payload for row in TABLE))
            assert bench.delivered(RECEIVES[receive]) == [row.delivered for row in _IKE]
            if service.consumed:
                assert [packet for packet, _ in bench.esp.wait_for(len(_ESP))] == [
                    row.payload for row in _ESP
                ]

    def test_queued_datagrams_are_treated_like_later_ones(self, service: Service, family: int) -> None:
        """The table, sent before the option is set.

        A kernel that has all the duties knows what comes alone: there it is as it came, as on Solaris.
        """
        with self.bench(service, family) as bench:
            bench.send(*(row.payload for row in TABLE))
            duties = bench.switch_on().duties
            if set(duties.values()) != {Performer.KERNEL}:
                assert bench.delivered() == [row.delivered for row in _IKE]

    def test_select_does_not_wake_for_dropped_datagrams(self, service: Service, family: int) -> None:
        """Runts and ESP that are dropped or diverted outside of the process do not wake `select`."""
        with self.bench(service, family) as bench:
            endpoint = bench.switch_on()
            for duty, rows in ((Duty.DROP_RUNTS, _RUNTS), (Duty.DIVERT_ESP, _ESP)):
                if endpoint.duties[duty] is not Performer.PROCESS:
                    bench.send(*(row.payload for row in rows if row.name not in endpoint.leaks))
            assert select.select([bench.sock], [], [], 0.05)[0] == []
            bench.send(NON_ESP_MARKER)
            assert select.select([bench.sock], [], [], PATIENCE)[0] == [bench.sock]

    def test_a_timeout_is_a_deadline(self, service: Service, family: int) -> None:
        """Dropped datagrams do not extend a receive's deadline."""
        with self.bench(service, family) as bench:
            bench.switch_on()
            bench.sock.settimeout(0.1)
            bench.send(*(row.payload for row in _NOT_IKE))
            begun = time.monotonic()
            _raises(TimeoutError, bench.sock.recv, SPACE)
            assert 0.05 < time.monotonic() - begun < PATIENCE

    def test_a_non_blocking_socket_does_not_wait(self, service: Service, family: int) -> None:
        """A non-blocking receive does not wait for IKE behind dropped datagrams."""
        with self.bench(service, family) as bench:
            bench.switch_on()
            bench.sock.setblocking(False)
            bench.send(*(row.payload for row in _NOT_IKE))
            _raises(BlockingIOError, bench.sock.recvfrom, SPACE)

    def test_peeking_takes_no_message(self, service: Service, family: int) -> None:
        """MSG_PEEK shows what the next receive returns."""
        with self.bench(service, family) as bench:
            bench.switch_on()
            bench.send(*(row.payload for row in _NOT_IKE), NON_ESP_MARKER + b"IKE")
            assert bench.sock.recv(SPACE, socket.MSG_PEEK) == b"IKE"
            assert bench.delivered() == [b"IKE"]

    # --- outbound ------------------------------------------------------------------------------

    def test_outbound(self, service: Service, family: int, outbound: OutboundRow) -> None:
        """Each row of the outbound table, on the wire."""
        with self.bench(service, family) as bench:
            bench.switch_on()
            sent = bench.sock.sendto(outbound.message, bench.peer.getsockname())
            assert sent == len(outbound.message)
            assert bench.peer.recvfrom(SPACE) == (outbound.wire, bench.sock.getsockname())

    def test_every_send_method(self, service: Service, family: int, send: str) -> None:
        """The outbound table through each method, connected where it takes no address."""
        with self.bench(service, family) as bench:
            bench.switch_on()
            for row in OUTBOUND_TABLE:
                SENDS[send](bench.sock, row.message, bench.peer.getsockname())
                assert bench.peer.recv(SPACE) == row.wire

    def test_the_largest_message(self, service: Service, family: int) -> None:
        """One byte more than fits behind the marker is EMSGSIZE, and harms nothing."""
        largest = LARGEST_PAYLOAD[6 if family == socket.AF_INET6 else 4]
        with self.bench(service, family) as bench:
            bench.switch_on()
            peer = bench.peer.getsockname()
            error = _raises(OSError, bench.sock.sendto, bytes(largest + 1), peer)
            assert error.errno == errno.EMSGSIZE
            message = b"\xa5" * largest
            assert bench.sock.sendto(message, peer) == largest
            assert bench.peer.recv(SPACE) == NON_ESP_MARKER + message
            bench.send(NON_ESP_MARKER + message)
            assert bench.delivered() == [message]

    def test_keepalives(self, service: Service, family: int) -> None:
        """One byte FF without a marker, to an address or to the connected peer."""
        with self.bench(service, family) as bench:
            endpoint = bench.switch_on()
            endpoint.send_keepalive(bench.peer.getsockname())
            assert bench.peer.recvfrom(SPACE) == (NAT_KEEPALIVE, bench.sock.getsockname())
            bench.sock.connect(bench.peer.getsockname())
            endpoint.send_keepalive()
            assert bench.peer.recv(SPACE) == NAT_KEEPALIVE
            assert endpoint.stats().keepalives_sent == 2

    # --- at any time -----------------------------------------------------------------------------

    def test_off_and_on_again(self, service: Service, family: int) -> None:
        """Switched off, the socket is as it was, options included; switched on, it has the option again."""
        with self.bench(service, family) as bench:
            cls, options = type(bench.sock), options_of(bench.sock)
            plain = bench.received_plain()
            if port_of(service.backend) is None:  # else the kernel may take from any socket of the port
                assert plain == [(row.payload, bench.peer.getsockname()) for row in TABLE]
            for _ in range(2):
                endpoint = bench.switch_on()
                assert get_nat_t_endpoint(bench.sock) is endpoint
                bench.send(*(row.payload for row in TABLE))
                assert bench.delivered() == [row.delivered for row in _IKE]
                endpoint.close()
                assert get_nat_t_endpoint(bench.sock) is None
                assert endpoint.mode == "off"
                assert type(bench.sock) is cls
                assert options_of(bench.sock) == options
                assert bench.received_plain() == plain
                bench.sock.sendto(b"plain", bench.peer.getsockname())
                assert bench.peer.recv(SPACE) == b"plain"

    def test_before_bind(self, service: Service, family: int) -> None:
        """Set on a socket that is not bound, the option holds from bind on."""
        with self.bench(service, family, bound=False) as bench:
            bench.switch_on()
            bench.sock.bind(self.address(service, family))
            bench.send(*(row.payload for row in TABLE))
            assert bench.delivered() == [row.delivered for row in _IKE]

    def test_the_bind_that_a_send_implies(self, service: Service, family: int) -> None:
        """The first datagram has the marker, and the answers are treated as the table says."""
        with self.bench(service, family, bound=False) as bench:
            bench.switch_on()
            bench.sock.sendto(b"first", bench.peer.getsockname())
            data, source = bench.peer.recvfrom(SPACE)
            assert data == NON_ESP_MARKER + b"first"
            for row in TABLE:
                bench.peer.sendto(row.payload, source)
            received = [bench.sock.recv(SPACE) for _ in _IKE]
            assert received == [row.delivered for row in _IKE]

    def test_a_connected_socket_takes_the_option(self, service: Service, family: int) -> None:
        """A connected socket takes the option."""
        with self.bench(service, family) as bench:
            bench.sock.connect(bench.peer.getsockname())
            bench.switch_on()
            self._exchange(bench)

    def test_a_socket_with_the_option_can_be_connected(self, service: Service, family: int) -> None:
        """A socket with the option can be connected."""
        with self.bench(service, family) as bench:
            bench.switch_on()
            bench.sock.connect(bench.peer.getsockname())
            assert bench.sock.getpeername() == bench.peer.getsockname()
            self._exchange(bench)

    def _exchange(self, bench: Bench) -> None:
        bench.send(*(row.payload for row in TABLE))
        assert bench.delivered() == [row.delivered for row in _IKE]
        if bench.service.consumed:
            assert [packet for packet, _ in bench.esp.wait_for(len(_ESP))] == [row.payload for row in _ESP]
        assert bench.sock.send(b"IKE") == 3
        assert bench.peer.recv(SPACE) == NON_ESP_MARKER + b"IKE"

    def test_nothing_is_left_behind(self, service: Service, family: int) -> None:
        """After close no thread and no descriptor is left, and the port is free."""
        before = threading.active_count(), open_descriptors()
        with self.bench(service, family) as bench:
            endpoint = bench.switch_on()
            address = bench.sock.getsockname()
        assert (threading.active_count(), open_descriptors()) == before
        assert endpoint.mode == "off"
        with socket.socket(family, socket.SOCK_DGRAM) as again:
            again.bind(address)

    # --- what the endpoint says --------------------------------------------------------------------

    def test_every_duty_has_a_performer(self, service: Service, family: int) -> None:
        """All four duties are performed, and the endpoint names the performers and the mode."""
        with self.bench(service, family) as bench:
            endpoint = bench.switch_on()
            assert set(endpoint.duties) == set(Duty)
            assert endpoint.backend == endpoint.stats().backend == service.backend.name
            assert endpoint.mode == endpoint.stats().mode != "off"

    def test_the_counters_add_up(self, service: Service, family: int) -> None:
        """Each datagram that this process handles is counted once, and none that the kernel handled."""
        with self.bench(service, family) as bench:
            endpoint = bench.switch_on()
            duties = endpoint.duties
            bench.send(*(row.payload for row in TABLE))
            assert len(bench.delivered()) == len(_IKE)
            for row in OUTBOUND_TABLE:
                bench.sock.sendto(row.message, bench.peer.getsockname())
            if service.consumed:
                bench.esp.wait_for(len(_ESP))
            stats = endpoint.stats()
            if duties[Duty.STRIP_MARKER] is Performer.PROCESS:
                assert stats.ike == len(_IKE) + 1
            if duties[Duty.INSERT_MARKER] is Performer.PROCESS:
                assert stats.markers_inserted == len(OUTBOUND_TABLE)
            if service.consumed:
                assert stats.esp == len(_ESP)
            gone = stats.esp + stats.keepalives + stats.runts + (stats.dropped_in_kernel or 0)
            if Performer.KERNEL in duties.values():
                assert gone <= len(_NOT_IKE)
            else:
                assert gone == len(_NOT_IKE)
            assert (stats.errors, stats.handed_back) == (0, 0)
            assert not stats.esp_dropped_in_kernel


def _raises(kind: type[OSError], function: Callable[..., object], *arguments: object) -> OSError:
    try:
        result = function(*arguments)
    except kind as error:
        return error
    raise AssertionError(f"{kind.__name__} was expected, and it returned {result!r:.200}")


def options_of(sock: socket.socket) -> dict[str, int]:
    """Return the options of `sock` that an application may read."""
    names = ("SO_REUSEADDR", "SO_REUSEPORT", "SO_BROADCAST", "SO_RCVBUF", "SO_SNDBUF")
    return {
        name: sock.getsockopt(socket.SOL_SOCKET, getattr(socket, name))
        for name in names
        if hasattr(socket, name)
    }


def open_descriptors() -> int:
    """Return how many descriptors this process has open, 0 where the system does not list them."""
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:  # Windows, or a system that does not list them
        return 0
