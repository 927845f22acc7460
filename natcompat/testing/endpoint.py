"""The conformance suite: whether a backend keeps the contract, asked on real sockets over loopback.

Who writes a backend subclasses `EndpointConformance` in a test module, and pytest does the rest::

    from natcompat.testing import EndpointConformance

    class TestMyBackend(EndpointConformance):
        backends = (MyBackend(),)      # instances, or registered names

Every test runs for every backend, address family and destination of ESP. natcompat's own backends
are held to the same tests. This module needs pytest only where pytest runs it; to see the values
in a failed assertion, put ``pytest.register_assert_rewrite("natcompat.testing")`` before the import.
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from natcompat import backends as registry
from natcompat.backends.base import Address, Backend, families_of, port_of
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
from natcompat.endpoint import get_nat_t_endpoint, set_nat_t_endpoint
from natcompat.endpoint.endpoint import NatTEndpoint

if TYPE_CHECKING:
    import pytest

PATIENCE = 5.0
"""Seconds after which what has not come is lost."""

LAST = b"the last datagram of the test"
_IKE = [row for row in TABLE if row.verdict is Verdict.IKE]
_NOT_IKE = [row for row in TABLE if row.verdict is not Verdict.IKE]
_ESP = [row for row in TABLE if row.verdict is Verdict.ESP]
_RUNTS = [row for row in _NOT_IKE if row.verdict is not Verdict.ESP]
_SPACE = 65535


def _into(receive: Callable[[bytearray], Any]) -> bytes:
    buffer = bytearray(_SPACE)
    count = receive(buffer)
    return bytes(buffer[: count[0] if isinstance(count, tuple) else count])


def _connected(sock: socket.socket, peer: Any) -> socket.socket:
    sock.connect(peer)
    return sock


RECEIVES: Mapping[str, Callable[[socket.socket], bytes]] = {
    "recv": lambda sock: sock.recv(_SPACE),
    "recvfrom": lambda sock: sock.recvfrom(_SPACE)[0],
    "recv_into": lambda sock: _into(sock.recv_into),
    "recvfrom_into": lambda sock: _into(sock.recvfrom_into),
    "recvmsg": lambda sock: sock.recvmsg(_SPACE)[0],
    "recvmsg_into": lambda sock: _into(lambda buffer: sock.recvmsg_into([buffer])),
}
"""Every way to receive a datagram from a socket object."""

SENDS: Mapping[str, Callable[[socket.socket, bytes, Any], object]] = {
    "send": lambda sock, data, peer: _connected(sock, peer).send(data),
    "sendall": lambda sock, data, peer: _connected(sock, peer).sendall(data),
    "sendto": lambda sock, data, peer: sock.sendto(data, peer),
    "sendto with flags": lambda sock, data, peer: sock.sendto(data, 0, peer),
    "sendmsg": lambda sock, data, peer: sock.sendmsg([data[:3], data[3:]], [], 0, peer),
}
"""Every way to send a datagram from a socket object to a peer."""


class EspCollector:
    """A consumer of ESP that keeps what it gets."""

    def __init__(self) -> None:
        self.packets: list[tuple[bytes, Address]] = []
        self._changed = threading.Condition()

    def __call__(self, packet: memoryview, source: Address) -> None:
        """Take one packet; runs in whatever thread diverts."""
        with self._changed:
            self.packets.append((bytes(packet), source))
            self._changed.notify_all()

    def wait_for(self, count: int) -> list[tuple[bytes, Address]]:
        """Return all packets once there are `count`, or what there is when patience ends."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.packets) >= count, PATIENCE)
            return list(self.packets)


@dataclass(frozen=True, slots=True)
class Service:
    """A backend and what becomes of ESP: one way in which a socket can be served."""

    backend: Backend
    consumed: bool
    """Whether a consumer in this process takes ESP."""

    def __str__(self) -> str:
        return f"{self.backend.name}, ESP consumed" if self.consumed else self.backend.name


@dataclass(frozen=True, slots=True)
class Bench:
    """A socket with the option and a plain peer on loopback."""

    service: Service
    sock: socket.socket
    peer: socket.socket
    esp: EspCollector = field(default_factory=EspCollector)

    def switch_on(self) -> NatTEndpoint:
        """Set the option on the socket."""
        return set_nat_t_endpoint(
            self.sock, backend=self.service.backend, esp=self.esp if self.service.consumed else None
        )

    def send(self, *payloads: bytes) -> None:
        """Send UDP payloads as they are from the peer to the socket."""
        for payload in payloads:
            self.peer.sendto(payload, self.sock.getsockname())

    def delivered(self, receive: Callable[[socket.socket], bytes] = RECEIVES["recv"]) -> list[bytes]:
        """Send one last message; return all that the application receives before it."""
        self.send(NON_ESP_MARKER + LAST)
        messages = []
        while (message := receive(self.sock)) != LAST:
            messages.append(message)
        return messages

    def received_plain(self) -> list[tuple[bytes, Any]]:
        """Send the table and one last message; return all that comes without the option before that."""
        last = NON_ESP_MARKER + LAST
        self.send(*(row.payload for row in TABLE), last)
        received = []
        while (datagram := self.sock.recvfrom(_SPACE))[0] != last:
            received.append(datagram)
        return received


class EndpointHarness:
    """The parameters of the suite without its tests: for tests of one's own over the same backends.

    A test method that takes ``service`` (`Service`) and ``family`` runs for every one of them and
    opens a `bench` with them; ``row``, ``outbound``, ``receive`` and ``send`` are the rows and the
    methods. A backend that says that it is not viable is skipped, with its reason.
    """

    backends: ClassVar[tuple[str | Backend, ...]]
    """Registered names or instances."""
    families: ClassVar[tuple[socket.AddressFamily, ...]] = (socket.AF_INET, socket.AF_INET6)
    hosts: ClassVar[Mapping[int, str]] = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
    """Where a socket of each family is bound."""

    @classmethod
    def services(cls) -> list[Service]:
        """Return every way in which the backends can serve a socket, viable here or not."""
        made = [registry.get(backend) if isinstance(backend, str) else backend for backend in cls.backends]
        return [
            Service(backend, consumed)
            for backend in made
            for consumed in ((False, True) if backend.hands_over_esp else (False,))
        ]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Called by pytest: every test for every service, family, row and method that it names."""
        import pytest

        names = metafunc.fixturenames
        if "service" in names:
            parameters = []
            for service in self.services():
                found = service.backend.viability()
                reason = f"{service.backend.name}: {found.reason}"
                marks = [] if found.viable else [pytest.mark.skip(reason=reason)]
                families = [each for each in self.families if each in families_of(service.backend)]
                if "family" not in names:
                    parameters.append(pytest.param(service, id=str(service), marks=marks))
                    continue
                for family in families:
                    together = f"{service}-{_version(family)}"
                    parameters.append(pytest.param(service, family, id=together, marks=marks))
            metafunc.parametrize([each for each in ("service", "family") if each in names], parameters)
        elif "family" in names:
            metafunc.parametrize("family", list(self.families), ids=_version)
        for parameter, values, name in (
            ("row", TABLE, lambda row: row.name),
            ("outbound", OUTBOUND_TABLE, lambda row: row.name),
            ("receive", _there_are(RECEIVES), str),
            ("send", _there_are(SENDS), str),
        ):
            if parameter in names:
                metafunc.parametrize(parameter, list(values), ids=list(map(name, values)))

    def address(self, service: Service, family: int) -> Address:
        """Return where a socket is to be bound: at any port, unless the backend serves one alone."""
        return self.hosts[family], port_of(service.backend) or 0

    @contextlib.contextmanager
    def bench(self, service: Service, family: int, *, bound: bool = True) -> Iterator[Bench]:
        """Open a socket and its peer, both with a timeout; the option is still to be set."""
        host, port = self.address(service, family)
        with (
            socket.socket(family, socket.SOCK_DGRAM) as sock,
            socket.socket(family, socket.SOCK_DGRAM) as peer,
        ):
            for each in (sock, peer):
                each.settimeout(PATIENCE)
            peer.bind((host, 0))
            if bound:
                sock.bind((host, port))
            yield Bench(service, sock, peer)


class EndpointConformance(EndpointHarness):
    """The contract as tests; subclass it and name the backends."""

    # --- inbound -------------------------------------------------------------------------------

    def test_inbound(self, service: Service, family: int, row: Row) -> None:
        """Each row of the table: delivered, dropped or diverted, with its source."""
        with self.bench(service, family) as bench:
            bench.switch_on()
            bench.send(row.payload)
            if row.delivered is not None:
                assert bench.sock.recvfrom(_SPACE) == (row.delivered, bench.peer.getsockname())
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

    def test_what_is_queued_already_is_treated_like_what_comes(self, service: Service, family: int) -> None:
        """The table, sent before the option is set.

        A kernel that has all the duties knows what comes alone: there it is as it came, as on Solaris.
        """
        with self.bench(service, family) as bench:
            bench.send(*(row.payload for row in TABLE))
            duties = bench.switch_on().duties
            if set(duties.values()) != {Performer.KERNEL}:
                assert bench.delivered() == [row.delivered for row in _IKE]

    def test_select_does_not_wake_for_what_the_kernel_keeps(self, service: Service, family: int) -> None:
        """Whoever drops runts and diverts ESP outside the process does not wake it for them."""
        with self.bench(service, family) as bench:
            endpoint = bench.switch_on()
            for duty, rows in ((Duty.DROP_RUNTS, _RUNTS), (Duty.DIVERT_ESP, _ESP)):
                if endpoint.duties[duty] is not Performer.PROCESS:
                    bench.send(*(row.payload for row in rows if row.name not in endpoint.leaks))
            assert select.select([bench.sock], [], [], 0.05)[0] == []
            bench.send(NON_ESP_MARKER)
            assert select.select([bench.sock], [], [], PATIENCE)[0] == [bench.sock]

    def test_a_timeout_is_a_deadline(self, service: Service, family: int) -> None:
        """What is dropped does not put it off."""
        with self.bench(service, family) as bench:
            bench.switch_on()
            bench.sock.settimeout(0.1)
            bench.send(*(row.payload for row in _NOT_IKE))
            begun = time.monotonic()
            _raises(TimeoutError, bench.sock.recv, _SPACE)
            assert 0.05 < time.monotonic() - begun < PATIENCE

    def test_a_non_blocking_socket_does_not_wait(self, service: Service, family: int) -> None:
        """Not for IKE behind what is dropped, either."""
        with self.bench(service, family) as bench:
            bench.switch_on()
            bench.sock.setblocking(False)
            bench.send(*(row.payload for row in _NOT_IKE))
            _raises(BlockingIOError, bench.sock.recvfrom, _SPACE)

    def test_peeking_takes_no_message(self, service: Service, family: int) -> None:
        """MSG_PEEK shows what the next receive returns."""
        with self.bench(service, family) as bench:
            bench.switch_on()
            bench.send(*(row.payload for row in _NOT_IKE), NON_ESP_MARKER + b"IKE")
            assert bench.sock.recv(_SPACE, socket.MSG_PEEK) == b"IKE"
            assert bench.delivered() == [b"IKE"]

    # --- outbound ------------------------------------------------------------------------------

    def test_outbound(self, service: Service, family: int, outbound: OutboundRow) -> None:
        """Each row of the outbound table, on the wire."""
        with self.bench(service, family) as bench:
            bench.switch_on()
            sent = bench.sock.sendto(outbound.message, bench.peer.getsockname())
            assert sent == len(outbound.message)
            assert bench.peer.recvfrom(_SPACE) == (outbound.wire, bench.sock.getsockname())

    def test_every_send_method(self, service: Service, family: int, send: str) -> None:
        """The outbound table through each method, connected where it takes no address."""
        with self.bench(service, family) as bench:
            bench.switch_on()
            for row in OUTBOUND_TABLE:
                SENDS[send](bench.sock, row.message, bench.peer.getsockname())
                assert bench.peer.recv(_SPACE) == row.wire

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
            assert bench.peer.recv(_SPACE) == NON_ESP_MARKER + message
            bench.send(NON_ESP_MARKER + message)
            assert bench.delivered() == [message]

    def test_keepalives(self, service: Service, family: int) -> None:
        """One byte FF without a marker, to an address or to the connected peer."""
        with self.bench(service, family) as bench:
            endpoint = bench.switch_on()
            endpoint.send_keepalive(bench.peer.getsockname())
            assert bench.peer.recvfrom(_SPACE) == (NAT_KEEPALIVE, bench.sock.getsockname())
            bench.sock.connect(bench.peer.getsockname())
            endpoint.send_keepalive()
            assert bench.peer.recv(_SPACE) == NAT_KEEPALIVE
            assert endpoint.stats().keepalives_sent == 2

    # --- at any time -----------------------------------------------------------------------------

    def test_off_and_on_again(self, service: Service, family: int) -> None:
        """Off, the socket is what it was, options included; on, it has the option as before."""
        with self.bench(service, family) as bench:
            cls, options = type(bench.sock), _options(bench.sock)
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
                assert _options(bench.sock) == options
                assert bench.received_plain() == plain
                bench.sock.sendto(b"plain", bench.peer.getsockname())
                assert bench.peer.recv(_SPACE) == b"plain"

    def test_before_bind(self, service: Service, family: int) -> None:
        """Set on a socket that is not bound, the option holds from bind on."""
        with self.bench(service, family, bound=False) as bench:
            bench.switch_on()
            bench.sock.bind(self.address(service, family))
            bench.send(*(row.payload for row in TABLE))
            assert bench.delivered() == [row.delivered for row in _IKE]

    def test_the_bind_that_a_send_implies(self, service: Service, family: int) -> None:
        """The first datagram has the marker, and what comes back is treated as the table says."""
        with self.bench(service, family, bound=False) as bench:
            bench.switch_on()
            bench.sock.sendto(b"first", bench.peer.getsockname())
            data, source = bench.peer.recvfrom(_SPACE)
            assert data == NON_ESP_MARKER + b"first"
            for row in TABLE:
                bench.peer.sendto(row.payload, source)
            received = [bench.sock.recv(_SPACE) for _ in _IKE]
            assert received == [row.delivered for row in _IKE]

    def test_connected_before(self, service: Service, family: int) -> None:
        """A socket with a peer takes the option."""
        with self.bench(service, family) as bench:
            bench.sock.connect(bench.peer.getsockname())
            bench.switch_on()
            self._exchange(bench)

    def test_connected_after(self, service: Service, family: int) -> None:
        """A socket with the option takes a peer."""
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
        assert bench.peer.recv(_SPACE) == NON_ESP_MARKER + b"IKE"

    def test_nothing_is_left_behind(self, service: Service, family: int) -> None:
        """After close no thread and no descriptor is left, and the port is free."""
        before = threading.active_count(), _descriptors()
        with self.bench(service, family) as bench:
            endpoint = bench.switch_on()
            address = bench.sock.getsockname()
        assert (threading.active_count(), _descriptors()) == before
        assert endpoint.mode == "off"
        with socket.socket(family, socket.SOCK_DGRAM) as again:
            again.bind(address)

    # --- what the endpoint says --------------------------------------------------------------------

    def test_every_duty_is_somebodys(self, service: Service, family: int) -> None:
        """The four duties are always done, and the endpoint says by whom and how."""
        with self.bench(service, family) as bench:
            endpoint = bench.switch_on()
            assert set(endpoint.duties) == set(Duty)
            assert endpoint.backend == endpoint.stats().backend == service.backend.name
            assert endpoint.mode == endpoint.stats().mode != "off"

    def test_the_counters_add_up(self, service: Service, family: int) -> None:
        """What this process does it counts, once; what the kernel does is in no counter twice."""
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


def _there_are(methods: Mapping[str, object]) -> list[str]:
    """Return those names of `methods` whose method sockets have here: on Windows they lack some."""
    return [name for name in methods if hasattr(socket.socket, name.split()[0])]


def _version(family: int) -> str:
    return "IPv6" if family == socket.AF_INET6 else "IPv4"


def _options(sock: socket.socket) -> dict[str, int]:
    """Return what an application may read of the options of `sock`."""
    names = ("SO_REUSEADDR", "SO_REUSEPORT", "SO_BROADCAST", "SO_RCVBUF", "SO_SNDBUF")
    return {
        name: sock.getsockopt(socket.SOL_SOCKET, getattr(socket, name))
        for name in names
        if hasattr(socket, name)
    }


def _descriptors() -> int:
    try:
        return len(os.listdir("/dev/fd"))
    except OSError:  # Windows, or a system that does not list them
        return 0
