"""Endpoints on asyncio, uvloop, a model of the Proactor, and trio."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import select
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import pytest

pytest.importorskip("trio")
pytest.importorskip("uvloop")

import trio  # noqa: E402
import trio.testing  # noqa: E402
import uvloop  # noqa: E402

import natcompat  # noqa: E402
from natcompat import NAT_KEEPALIVE, NON_ESP_MARKER, get_nat_t_endpoint, set_nat_t_endpoint  # noqa: E402
from natcompat.backends.system_calls import in_trio_task  # noqa: E402
from natcompat.contract import OUTBOUND_TABLE, TABLE  # noqa: E402
from natcompat.endpoint.loops import AsyncNatTSocket, create_nat_t_endpoint, open_nat_t_endpoint  # noqa: E402
from natcompat.errors import NatCompatError  # noqa: E402

PATIENCE = 10.0
ESP = b"\xc0\xde\x00\x01\0\0\0\x01" + bytes(100)
LAST = b"the last message"


def refuse(*_: Any) -> Any:
    raise NotImplementedError


class ProactorModel(asyncio.SelectorEventLoop):
    """A model of the Proactor of Windows: a loop that cannot watch descriptors for others."""


for method in ("add_reader", "add_writer", "remove_reader", "remove_writer"):
    setattr(ProactorModel, method, refuse)
ProactorModel.__module__ = "asyncio.proactor_events"

LOOPS: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {
    "asyncio": asyncio.SelectorEventLoop,
    "uvloop": uvloop.new_event_loop,
    "model of the Proactor": ProactorModel,
}
Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=list(LOOPS))
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Runs a coroutine on one of the loops; what the loop reports as an error fails the test."""
    reported: list[dict[str, Any]] = []
    before = threading.enumerate()

    def run_on_it(main: Coroutine[Any, Any, None]) -> None:
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            runner.get_loop().set_exception_handler(lambda _, context: reported.append(context))
            runner.run(main)

    yield run_on_it
    assert reported == []
    left = set(threading.enumerate()).difference(before)
    assert [thread for thread in left if thread.name == "natcompat-readiness"] == []


@pytest.fixture(params=["userspace", "userspace:in-line"])
def backend(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def family(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture
def new_socket() -> Iterator[Callable[..., socket.socket]]:
    opened: list[socket.socket] = []

    def make(family: int = socket.AF_INET, cls: type[socket.socket] = socket.socket) -> socket.socket:
        sock = cls(family, socket.SOCK_DGRAM)
        opened.append(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        sock.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        sock.settimeout(PATIENCE)
        return sock

    yield make
    for sock in opened:
        sock.close()


NewSocket = Callable[..., socket.socket]


class Receiver(asyncio.DatagramProtocol):
    """Records what it is told."""

    def __init__(self) -> None:
        self.received: list[tuple[bytes, Any]] = []
        self.errors: list[Exception] = []
        self.calls: list[str] = []
        self.lost: list[Exception | None] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.calls.append("connection_made")

    def datagram_received(self, data: bytes, addr: Any) -> None:
        self.received.append((data, addr))

    def error_received(self, exc: Exception) -> None:
        self.errors.append(exc)

    def pause_writing(self) -> None:
        self.calls.append("pause_writing")

    def resume_writing(self) -> None:
        self.calls.append("resume_writing")

    def connection_lost(self, exc: Exception | None) -> None:
        self.lost.append(exc)


def ignore(packet: memoryview, source: Any) -> None:
    """Take ESP and do nothing with it."""


async def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited in vain until {what}"
        await asyncio.sleep(0.002)


_FLOOD = """
import socket, sys
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
for _ in range(5_000_000):  # it has an end of its own, too
    for payload in (bytes.fromhex(sys.argv[2]), b"\\xff"):
        sock.sendto(payload, ("127.0.0.1", int(sys.argv[1])))
"""


@contextlib.contextmanager
def flooded(sock: socket.socket) -> Iterator[None]:
    """Another process floods `sock` with ESP and keepalives."""
    enemy = subprocess.Popen([sys.executable, "-c", _FLOOD, str(sock.getsockname()[1]), ESP.hex()])
    try:
        yield
        assert enemy.poll() is None, "the flood ended before the test"
    finally:
        enemy.kill()
        enemy.wait()


def send_table(peer: socket.socket, address: Any) -> list[bytes]:
    """Send every row of the contract and one message more; return what the application shall receive."""
    for row in TABLE:
        peer.sendto(row.payload, address)
    peer.sendto(NON_ESP_MARKER + LAST, address)
    return [row.delivered for row in TABLE if row.delivered is not None] + [LAST]


class TestSelectorLoopOfAsyncio:
    """Its own create_datagram_endpoint reads through the socket object: no help is needed."""

    @pytest.mark.parametrize("when", ["before", "after", "after, by get_extra_info"])
    def test_contract(self, new_socket: NewSocket, family: int, backend: str, when: str) -> None:
        sock, peer = new_socket(family), new_socket(family)
        diverted: list[bytes] = []

        def take(packet: memoryview, source: Any) -> None:
            diverted.append(bytes(packet))

        async def main() -> None:
            if when == "before":
                set_nat_t_endpoint(sock, backend=backend, esp=take)
            transport, protocol = await asyncio.get_running_loop().create_datagram_endpoint(
                Receiver, sock=sock
            )
            if when != "before":
                found = transport.get_extra_info("socket") if "get_extra_info" in when else sock
                assert set_nat_t_endpoint(found, backend=backend, esp=take) is get_nat_t_endpoint(sock)
            expected = send_table(peer, sock.getsockname())
            await until(lambda: len(protocol.received) >= len(expected), "all IKE has come")
            assert protocol.received == [(message, peer.getsockname()) for message in expected]
            wanted = sorted(row.payload for row in TABLE if row.verdict is natcompat.Verdict.ESP)
            await until(lambda: len(diverted) >= len(wanted), "all ESP has come")
            assert sorted(diverted) == wanted
            for message, wire in ((b"\xff", NON_ESP_MARKER + b"\xff"), (b"IKE", NON_ESP_MARKER + b"IKE")):
                transport.sendto(message, peer.getsockname())
                assert peer.recv(100) == wire
            transport.close()
            await until(lambda: protocol.lost, "connection_lost")
            assert protocol.errors == []

        asyncio.run(main())

    def test_no_warning(self, new_socket: NewSocket) -> None:
        async def main() -> None:
            sock = new_socket()
            sock.setblocking(False)
            set_nat_t_endpoint(sock)
            sock.setblocking(False)  # warnings are errors here

        asyncio.run(main())


class TestWarning:
    """A loop that bypasses the socket object is warned of, with the way out, at the application's line."""

    @pytest.fixture(params=["uvloop"])
    def new_loop(self, request: pytest.FixtureRequest) -> Callable[[], asyncio.AbstractEventLoop]:
        return LOOPS[request.param]

    def test_transport_after_the_option(self, new_socket: NewSocket, new_loop: Any) -> None:
        sock = new_socket()
        set_nat_t_endpoint(sock)

        async def main() -> None:
            loop = asyncio.get_running_loop()
            with pytest.warns(RuntimeWarning, match=r"create_nat_t_endpoint\(\)") as caught:
                transport, _ = await loop.create_datagram_endpoint(Receiver, sock=sock)
            assert [warning.filename for warning in caught] == [__file__]
            transport.close()

        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(main())

    def test_option_after_the_transport(self, new_socket: NewSocket, new_loop: Any) -> None:
        async def main() -> None:
            sock = new_socket()
            transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Receiver, sock=sock)
            with pytest.warns(RuntimeWarning, match=r"create_nat_t_endpoint\(\)") as caught:
                set_nat_t_endpoint(sock)
            assert [warning.filename for warning in caught] == [__file__]
            transport.close()

        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(main())

    def test_as_an_error_it_changes_nothing(self, new_socket: NewSocket, new_loop: Any) -> None:
        async def main() -> None:
            sock = new_socket()
            transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Receiver, sock=sock)
            with pytest.raises(RuntimeWarning):
                set_nat_t_endpoint(sock)
            assert get_nat_t_endpoint(sock) is None
            transport.close()

        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(main())

    def test_once_for_a_socket(self, new_socket: NewSocket, new_loop: Any) -> None:
        async def main() -> None:
            sock = new_socket()
            set_nat_t_endpoint(sock)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                sock.setblocking(False)
                sock.setblocking(False)
            assert len(caught) == 1

        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(main())

    def test_not_for_natcompat_itself(self, new_socket: NewSocket, new_loop: Any) -> None:
        async def main() -> None:  # warnings are errors here
            transport, _ = await create_nat_t_endpoint(Receiver, new_socket())
            transport.close()
            open_nat_t_endpoint(new_socket()).close()
            sock = new_socket()
            set_nat_t_endpoint(sock)
            transport, _ = await create_nat_t_endpoint(Receiver, sock)
            transport.close()

        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(main())

    def test_not_outside_of_the_loop(self, new_socket: NewSocket) -> None:
        sock = new_socket()
        set_nat_t_endpoint(sock)
        sock.setblocking(False)

    def test_socket_that_uvloop_made(self) -> None:
        async def main() -> None:
            transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(
                Receiver, local_addr=("127.0.0.1", 0)
            )
            with pytest.raises(TypeError, match="create_nat_t_endpoint"):
                set_nat_t_endpoint(transport.get_extra_info("socket"))
            transport.close()

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(main())


class TestRefusal:
    """The Proactor of Windows is refused, with the way out; nothing has changed."""

    def test_transport_after_the_option(self, new_socket: NewSocket) -> None:
        sock = new_socket()
        set_nat_t_endpoint(sock)

        async def main() -> None:
            loop = asyncio.get_running_loop()
            with pytest.raises(NatCompatError, match=r"ProactorModel") as caught:
                await loop.create_datagram_endpoint(Receiver, sock=sock)
            assert caught.value.errno == errno.EOPNOTSUPP
            assert "create_nat_t_endpoint()" in caught.value.remedy
            assert sock.gettimeout() != 0
            assert get_nat_t_endpoint(sock) is not None
            transport, _ = await create_nat_t_endpoint(Receiver, sock)
            transport.close()

        with asyncio.Runner(loop_factory=ProactorModel) as runner:
            runner.run(main())

    def test_option_after_the_transport(self, new_socket: NewSocket) -> None:
        async def main() -> None:
            sock = new_socket()
            transport, _ = await asyncio.get_running_loop().create_datagram_endpoint(Receiver, sock=sock)
            with pytest.raises(NatCompatError, match=r"ProactorModel") as caught:
                set_nat_t_endpoint(sock)
            assert caught.value.errno == errno.EOPNOTSUPP
            assert get_nat_t_endpoint(sock) is None
            transport.close()

        with asyncio.Runner(loop_factory=ProactorModel) as runner:
            runner.run(main())

    def test_not_for_natcompat_itself_nor_for_blocking_sockets(self, new_socket: NewSocket) -> None:
        async def main() -> None:
            transport, _ = await create_nat_t_endpoint(Receiver, new_socket())
            transport.close()
            sock = new_socket()
            set_nat_t_endpoint(sock)
            sock.settimeout(5)

        with asyncio.Runner(loop_factory=ProactorModel) as runner:
            runner.run(main())


class TestTransport:
    def test_inbound_contract(self, run: Run, new_socket: NewSocket, family: int, backend: str) -> None:
        sock, peer = new_socket(family), new_socket(family)
        diverted: list[bytes] = []

        def take(packet: memoryview, source: Any) -> None:
            diverted.append(bytes(packet))

        async def main() -> None:
            transport, protocol = await create_nat_t_endpoint(Receiver, sock, backend=backend, esp=take)
            assert protocol.calls == ["connection_made"]
            expected = send_table(peer, sock.getsockname())
            await until(lambda: len(protocol.received) >= len(expected), "all IKE has come")
            assert protocol.received == [(message, peer.getsockname()) for message in expected]
            wanted = sorted(row.payload for row in TABLE if row.verdict is natcompat.Verdict.ESP)
            await until(lambda: len(diverted) >= len(wanted), "all ESP has come")
            assert sorted(diverted) == wanted
            transport.close()
            await until(lambda: protocol.lost, "connection_lost")
            assert (protocol.lost, protocol.errors) == ([None], [])

        run(main())

    @pytest.mark.parametrize("connected", [False, True], ids=["to an address", "connected"])
    def test_outbound_contract(
        self, run: Run, new_socket: NewSocket, family: int, backend: str, connected: bool
    ) -> None:
        sock, peer = new_socket(family), new_socket(family)
        if connected:
            sock.connect(peer.getsockname())

        async def main() -> None:
            transport, protocol = await create_nat_t_endpoint(Receiver, sock, backend=backend)
            for row in OUTBOUND_TABLE:
                transport.sendto(row.message, None if connected else peer.getsockname())
                assert peer.recv(10000) == row.wire, row.name
            transport.close()
            await until(lambda: protocol.lost, "connection_lost")
            assert protocol.errors == []

        run(main())

    def test_extra_information(self, run: Run, new_socket: NewSocket) -> None:
        sock, peer = new_socket(), new_socket()
        sock.connect(peer.getsockname())
        existing = set_nat_t_endpoint(sock)

        async def main() -> None:
            transport, protocol = await create_nat_t_endpoint(Receiver, sock)
            assert transport.get_extra_info("socket") is sock
            assert transport.get_extra_info("sockname") == sock.getsockname()
            assert transport.get_extra_info("peername") == peer.getsockname()
            assert transport.get_extra_info("nat_t_endpoint") is existing
            assert transport.get_protocol() is protocol
            other = Receiver()
            transport.set_protocol(other)
            peer.sendto(NON_ESP_MARKER + b"IKE", sock.getsockname())
            await until(lambda: other.received, "the other protocol has it")
            assert "open" in repr(transport)
            transport.close()
            assert transport.is_closing()
            transport.close()
            assert sock.fileno() >= 0, "the protocol hears of the end first"
            await until(lambda: other.lost, "connection_lost")
            assert sock.fileno() < 0
            assert "closed" in repr(transport)

        run(main())

    def test_icmp_errors_reach_the_protocol(self, run: Run, new_socket: NewSocket) -> None:
        sock, peer = new_socket(), new_socket()
        sock.connect(peer.getsockname())
        host, port = peer.getsockname()
        peer.close()

        async def main() -> None:
            transport, protocol = await create_nat_t_endpoint(Receiver, sock)
            for _ in range(2):  # and it goes on after one
                protocol.errors.clear()
                transport.sendto(b"IKE")
                await until(lambda: protocol.errors, "the error comes")
                assert {type(error) for error in protocol.errors} == {ConnectionRefusedError}
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as again:
                again.bind((host, port))
                again.sendto(NON_ESP_MARKER + b"IKE", sock.getsockname())
                await until(lambda: protocol.received, "what comes later")
            transport.close()
            await until(lambda: protocol.lost, "connection_lost")

        run(main())

    def test_flood_leaves_the_loop_responsive_and_loses_no_ike(
        self, run: Run, new_socket: NewSocket, backend: str
    ) -> None:
        sock, peer = new_socket(), new_socket()

        async def main() -> None:
            transport, protocol = await create_nat_t_endpoint(Receiver, sock, backend=backend, esp=ignore)
            endpoint = transport.get_extra_info("nat_t_endpoint")
            with flooded(sock):
                await until(lambda: endpoint.stats().keepalives, "the flood comes")
                end = time.monotonic() + 0.5
                most = before = 0
                while time.monotonic() < end:
                    await asyncio.sleep(0)
                    passed = endpoint.stats().esp + endpoint.stats().keepalives
                    most, before = max(most, passed - before) if before else 0, passed
                if "in-line" in backend:
                    assert most <= 256, "the loop's other callbacks had to wait for more"
                sent = 0
                while not protocol.received:  # in line the flood may take the place of one
                    peer.sendto(NON_ESP_MARKER + b"IKE", sock.getsockname())
                    sent += 1
                    await asyncio.sleep(0.005)
                    assert sent < 1000
                if backend == "userspace":
                    await until(lambda: len(protocol.received) == sent, "all IKE has come")
            assert endpoint.stats().esp > 100
            assert endpoint.stats().keepalives > 100
            assert {message for message, _ in protocol.received} == {b"IKE"}
            transport.close()
            await until(lambda: protocol.lost, "connection_lost")

        run(main())

    def test_a_burst_of_ike_is_read_in_turns(self, run: Run, new_socket: NewSocket) -> None:
        sock, peer = new_socket(), new_socket()

        async def main() -> None:
            transport, protocol = await create_nat_t_endpoint(Receiver, sock)
            for number in range(300):
                peer.sendto(NON_ESP_MARKER + b"%d" % number, sock.getsockname())
            longest, before = 0, 0
            while len(protocol.received) < 300:
                await asyncio.sleep(0)
                longest, before = max(longest, len(protocol.received) - before), len(protocol.received)
            assert longest <= 128, "the loop's other callbacks had to wait for more"
            assert [message for message, _ in protocol.received] == [b"%d" % n for n in range(300)]
            transport.close()
            await until(lambda: protocol.lost, "connection_lost")

        run(main())

    @pytest.mark.parametrize("end", ["close", "abort"])
    def test_ends_within_a_callback(self, run: Run, new_socket: NewSocket, end: str) -> None:
        sock, peer = new_socket(), new_socket()

        class Once(Receiver):
            transport: asyncio.DatagramTransport

            def datagram_received(self, data: bytes, addr: Any) -> None:
                super().datagram_received(data, addr)
                getattr(self.transport, end)()

        async def main() -> None:
            for _ in range(3):
                peer.sendto(NON_ESP_MARKER + b"IKE", sock.getsockname())
            transport, protocol = await create_nat_t_endpoint(Once, sock)
            protocol.transport = transport
            await until(lambda: protocol.lost, "connection_lost")
            assert len(protocol.received) == 1, "nothing comes after the end"
            assert protocol.lost == [None]
            transport.abort()
            await asyncio.sleep(0)
            assert protocol.lost == [None]

        run(main())

    def test_exception_of_the_protocol_is_reported_and_reading_goes_on(
        self, new_socket: NewSocket, request: pytest.FixtureRequest
    ) -> None:
        sock, peer = new_socket(), new_socket()

        class Faulty(Receiver):
            def datagram_received(self, data: bytes, addr: Any) -> None:
                super().datagram_received(data, addr)
                if data == b"bad":
                    raise RuntimeError("a fault of the protocol's")

        async def main() -> None:
            contexts: list[dict[str, Any]] = []
            asyncio.get_running_loop().set_exception_handler(lambda _, context: contexts.append(context))
            transport, protocol = await create_nat_t_endpoint(Faulty, sock)
            for message in (b"bad", b"good"):
                peer.sendto(NON_ESP_MARKER + message, sock.getsockname())
            await until(lambda: len(protocol.received) == 2, "both have come")
            assert [str(context["exception"]) for context in contexts] == ["a fault of the protocol's"]
            transport.close()
            await until(lambda: protocol.lost, "connection_lost")

        for new_loop in LOOPS.values():
            with asyncio.Runner(loop_factory=new_loop) as runner:
                runner.run(main())
            sock = new_socket()

    def test_connection_made_that_raises_leaves_nothing_open(self, run: Run, new_socket: NewSocket) -> None:
        class Faulty(Receiver):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                raise RuntimeError("a fault of the protocol's")

        sock = new_socket()

        async def main() -> None:
            with pytest.raises(RuntimeError, match="a fault"):
                await create_nat_t_endpoint(Faulty, sock)
            await until(lambda: sock.fileno() < 0, "the socket is closed")

        run(main())

    def test_refusal_leaves_the_socket_as_it_was(self, run: Run, new_socket: NewSocket) -> None:
        sock = new_socket()

        async def main() -> None:
            with pytest.raises(natcompat.BackendUnavailableError):
                await create_nat_t_endpoint(Receiver, sock, backend="nonsense")
            with pytest.raises(RuntimeError, match="a fault"):
                await create_nat_t_endpoint(faulty, sock)

        def faulty() -> Receiver:
            raise RuntimeError("a fault of the factory's")

        run(main())
        assert type(sock) is socket.socket
        assert sock.gettimeout() == PATIENCE

    def test_transport_that_is_forgotten(self, new_socket: NewSocket) -> None:
        sock = new_socket()

        async def main() -> None:
            transport = (await create_nat_t_endpoint(Receiver, sock))[0]
            asyncio.get_running_loop().remove_reader(sock.fileno())  # as the end of the loop does
            with pytest.warns(ResourceWarning, match="unclosed transport"):
                del transport

        asyncio.run(main())
        assert sock.fileno() < 0

    def test_data_that_is_none(self, run: Run, new_socket: NewSocket) -> None:
        async def main() -> None:
            transport, protocol = await create_nat_t_endpoint(Receiver, new_socket())
            with pytest.raises(TypeError, match="bytes-like"):
                transport.sendto("text", ("127.0.0.1", 4500))  # type: ignore[arg-type]
            transport.sendto(b"nowhere")
            assert [getattr(error, "errno", 0) for error in protocol.errors] == [errno.EDESTADDRREQ]
            transport.close()
            transport.sendto(b"too late", ("127.0.0.1", 4500))
            await until(lambda: protocol.lost, "connection_lost")

        run(main())


class Congested(socket.socket):
    """A model of a socket whose buffer is full, which loopback's never is."""

    full = False

    def sendto(self, *arguments: Any) -> int:
        if type(self).full:
            raise BlockingIOError(errno.EAGAIN, "the model is full")
        return super().sendto(*arguments)


class TestCongestion:
    @pytest.fixture
    def congested(self, new_socket: NewSocket, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
        monkeypatch.setattr(Congested, "full", True)
        return new_socket(socket.AF_INET, Congested)

    def test_pauses_buffers_and_resumes_in_order(
        self, run: Run, new_socket: NewSocket, congested: socket.socket
    ) -> None:
        peer = new_socket()

        async def main() -> None:
            transport, protocol = await create_nat_t_endpoint(Receiver, congested)
            transport.set_write_buffer_limits(high=1000)
            assert transport.get_write_buffer_limits() == (250, 1000)
            messages = [b"%03d" % number + bytes(97) for number in range(15)]
            for message in messages[:9]:
                transport.sendto(message, peer.getsockname())
            assert "pause_writing" not in protocol.calls
            for message in messages[9:]:
                transport.sendto(message, peer.getsockname())
            assert protocol.calls.count("pause_writing") == 1
            assert transport.get_write_buffer_size() == 15 * 108
            await asyncio.sleep(0.01)
            assert not select.select([peer], [], [], 0)[0]
            Congested.full = False
            await until(lambda: "resume_writing" in protocol.calls, "resume_writing")
            await until(lambda: transport.get_write_buffer_size() == 0, "all is sent")
            assert [peer.recv(200) for _ in messages] == [NON_ESP_MARKER + message for message in messages]
            assert protocol.errors == []
            transport.close()
            await until(lambda: protocol.lost, "connection_lost")

        run(main())

    def test_buffer_is_bounded(self, run: Run, new_socket: NewSocket, congested: socket.socket) -> None:
        async def main() -> None:
            transport, protocol = await create_nat_t_endpoint(Receiver, congested)
            transport.set_write_buffer_limits(high=0)
            for _ in range(3):
                transport.sendto(b"", ("127.0.0.1", 9))
            assert transport.get_write_buffer_size() == 8, "one may always wait"
            assert [getattr(error, "errno", 0) for error in protocol.errors] == [errno.ENOBUFS] * 2
            transport.abort()
            await until(lambda: protocol.lost, "connection_lost")
            assert transport.get_write_buffer_size() == 0

        run(main())

    def test_close_sends_what_waits(self, run: Run, new_socket: NewSocket, congested: socket.socket) -> None:
        peer = new_socket()

        async def main() -> None:
            transport, protocol = await create_nat_t_endpoint(Receiver, congested)
            transport.sendto(b"", peer.getsockname())
            transport.sendto(b"IKE", peer.getsockname())
            transport.close()
            await asyncio.sleep(0.01)
            assert protocol.lost == []
            Congested.full = False
            await until(lambda: protocol.lost, "connection_lost")
            assert [peer.recv(100), peer.recv(100)] == [NON_ESP_MARKER, NON_ESP_MARKER + b"IKE"]

        run(main())

    def test_senseless_limits(self, run: Run, congested: socket.socket) -> None:
        async def main() -> None:
            transport, _ = await create_nat_t_endpoint(Receiver, congested)
            with pytest.raises(ValueError, match="high"):
                transport.set_write_buffer_limits(high=1, low=2)
            transport.set_write_buffer_limits(low=10)
            assert transport.get_write_buffer_limits() == (10, 40)
            transport.abort()
            await asyncio.sleep(0)

        run(main())

    def test_awaitable_socket_waits(self, run: Run, new_socket: NewSocket, congested: socket.socket) -> None:
        peer = new_socket()

        async def main() -> None:
            async with open_nat_t_endpoint(congested) as ike:
                sending = asyncio.create_task(ike.sendto(b"IKE", peer.getsockname()))
                await asyncio.sleep(0.01)
                assert not sending.done()
                Congested.full = False
                assert await asyncio.wait_for(sending, PATIENCE) == 3
                assert peer.recv(100) == NON_ESP_MARKER + b"IKE"

        run(main())


Anywhere = Callable[[Callable[[], Coroutine[Any, Any, None]]], None]


@pytest.fixture(params=[*LOOPS, "trio"])
def anywhere(request: pytest.FixtureRequest) -> Anywhere:
    """Runs a coroutine on asyncio, uvloop, the model of the Proactor, or trio."""
    if request.param == "trio":
        return trio.run

    def run_on_it(main: Callable[[], Coroutine[Any, Any, None]]) -> None:
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            runner.run(main())

    return run_on_it


class TestAwaitableSocket:
    def test_contract(self, anywhere: Anywhere, new_socket: NewSocket, family: int, backend: str) -> None:
        sock, peer = new_socket(family), new_socket(family)
        diverted: list[bytes] = []

        def take(packet: memoryview, source: Any) -> None:
            diverted.append(bytes(packet))

        async def main() -> None:
            async with open_nat_t_endpoint(sock, backend=backend, esp=take) as ike:
                assert isinstance(ike, AsyncNatTSocket)
                assert ike.endpoint is get_nat_t_endpoint(sock)
                for expected in send_table(peer, sock.getsockname()):
                    assert await ike.recvfrom(65535) == (expected, peer.getsockname())
                for row in OUTBOUND_TABLE:
                    assert await ike.sendto(row.message, peer.getsockname()) == len(row.message)
                    assert peer.recv(10000) == row.wire
                sock.connect(peer.getsockname())
                await ike.sendto(b"IKE")
                assert peer.recv(100) == NON_ESP_MARKER + b"IKE"
            assert sock.fileno() < 0
            ike.close()

        anywhere(main)
        wanted = sorted(row.payload for row in TABLE if row.verdict is natcompat.Verdict.ESP)
        assert sorted(diverted) == wanted

    def test_waits_while_others_run(self, anywhere: Anywhere, new_socket: NewSocket, backend: str) -> None:
        sock, peer = new_socket(), new_socket()

        def later() -> None:
            for payload in (NAT_KEEPALIVE, ESP, b"", NON_ESP_MARKER + b"IKE"):
                time.sleep(0.01)
                peer.sendto(payload, sock.getsockname())

        async def main() -> None:
            async with open_nat_t_endpoint(sock, backend=backend) as ike:
                thread = threading.Thread(target=later)
                thread.start()
                assert await ike.recvfrom(100) == (b"IKE", peer.getsockname())
                thread.join()

        anywhere(main)

    def test_outside_of_a_loop(self, new_socket: NewSocket) -> None:
        sock = new_socket()
        with pytest.raises(RuntimeError):
            open_nat_t_endpoint(sock)
        assert get_nat_t_endpoint(sock) is None

    def test_closed_while_tasks_wait_on_asyncio(self, run: Run, new_socket: NewSocket) -> None:
        async def main() -> None:
            ike = open_nat_t_endpoint(new_socket())
            tasks = [asyncio.create_task(ike.recvfrom(100)) for _ in range(3)]
            await asyncio.sleep(0.01)
            tasks[0].cancel()
            await asyncio.sleep(0)
            ike.close()
            results = await asyncio.gather(*tasks, return_exceptions=True)
            assert isinstance(results[0], asyncio.CancelledError)
            assert [getattr(error, "errno", 0) for error in results[1:]] == [errno.EBADF] * 2
            with pytest.raises(OSError, match="Bad file descriptor"):
                await ike.recvfrom(100)

        run(main())

    def test_closed_while_tasks_wait_on_trio(self, new_socket: NewSocket) -> None:
        codes: list[int | None] = []

        async def wait(ike: AsyncNatTSocket) -> None:
            try:
                await ike.recvfrom(100)
            except OSError as error:
                codes.append(error.errno)

        async def main() -> None:
            ike = open_nat_t_endpoint(new_socket())
            async with trio.open_nursery() as nursery:
                for _ in range(3):
                    nursery.start_soon(wait, ike)
                await trio.testing.wait_all_tasks_blocked()
                ike.close()

        trio.run(main)
        assert codes == [errno.EBADF] * 3

    def test_cancelled_on_trio(self, new_socket: NewSocket) -> None:
        sock, peer = new_socket(), new_socket()

        async def main() -> None:
            async with open_nat_t_endpoint(sock) as ike:
                with trio.move_on_after(0.01) as scope:
                    await ike.recvfrom(100)
                assert scope.cancelled_caught
                peer.sendto(NON_ESP_MARKER + b"IKE", sock.getsockname())
                assert (await ike.recvfrom(100))[0] == b"IKE", "it can be used afterwards"

        trio.run(main)

    def test_several_tasks_receive(self, run: Run, new_socket: NewSocket) -> None:
        sock, peer = new_socket(), new_socket()

        async def main() -> None:
            async with open_nat_t_endpoint(sock) as ike:
                tasks = [asyncio.create_task(ike.recvfrom(100)) for _ in range(3)]
                await asyncio.sleep(0.01)
                for number in range(3):
                    peer.sendto(NON_ESP_MARKER + b"%d" % number, sock.getsockname())
                received = await asyncio.wait_for(asyncio.gather(*tasks), PATIENCE)
                assert sorted(message for message, _ in received) == [b"0", b"1", b"2"]

        run(main())

    def test_sockets_of_trio_are_refused_with_the_way(self) -> None:
        async def main() -> None:
            with (
                trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock,
                pytest.raises(TypeError, match=r"open_nat_t_endpoint\(\)"),
            ):
                set_nat_t_endpoint(sock)  # type: ignore[call-overload]

        trio.run(main)

    def test_flood_starves_no_task(self, anywhere: Anywhere, new_socket: NewSocket) -> None:
        sock, peer = new_socket(), new_socket()
        for number in range(200):
            peer.sendto(NON_ESP_MARKER + b"%d" % number, sock.getsockname())

        async def main() -> None:
            turns, done = 0, False

            async def other(ticks: Callable[[float], Any]) -> None:
                nonlocal turns
                while not done:
                    await ticks(0)
                    turns += 1

            async def receive() -> None:
                nonlocal done
                async with open_nat_t_endpoint(sock) as ike:
                    for number in range(200):
                        assert (await ike.recvfrom(100))[0] == b"%d" % number
                done = True

            if in_trio_task():
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(other, trio.sleep)
                    nursery.start_soon(receive)
            else:
                await asyncio.gather(other(asyncio.sleep), receive())
            assert turns >= 50

        anywhere(main)
