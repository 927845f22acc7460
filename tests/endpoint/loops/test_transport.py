"""Transports: `create_nat_t_endpoint` on every asyncio loop, and those of asyncio's selector loop."""

from __future__ import annotations

import asyncio
import errno
import socket
import time
from typing import Any

import pytest

from natcompat import NON_ESP_MARKER, BackendUnavailableError, Verdict, get_nat_t_endpoint, set_nat_t_endpoint
from natcompat.contract import OUTBOUND_TABLE, TABLE
from natcompat.endpoint.loops import create_nat_t_endpoint
from tests.support.loops import (
    LOOPS,
    PATIENCE,
    NewSocket,
    Receiver,
    Run,
    flooded,
    ignore,
    run_on,
    send_table,
    until,
)


class TestSelectorLoopOfAsyncio:
    """Its ``create_datagram_endpoint`` reads through the socket object."""

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
                reported = transport.get_extra_info("socket") if "get_extra_info" in when else sock
                assert set_nat_t_endpoint(reported, backend=backend, esp=take) is get_nat_t_endpoint(sock)
            expected = send_table(peer, sock.getsockname())
            await until(lambda: len(protocol.received) >= len(expected), "all IKE has come")
            assert protocol.received == [(message, peer.getsockname()) for message in expected]
            wanted = sorted(row.payload for row in TABLE if row.verdict is Verdict.ESP)
            await until(lambda: len(diverted) >= len(wanted), "all ESP has come")
            assert sorted(diverted) == wanted
            for message, wire in ((b"\xff", NON_ESP_MARKER + b"\xff"), (b"IKE", NON_ESP_MARKER + b"IKE")):
                transport.sendto(message, peer.getsockname())
                assert peer.recv(100) == wire
            transport.close()
            await until(lambda: protocol.lost, "connection_lost")
            assert protocol.errors == []

        asyncio.run(main())

    def test_setblocking_does_not_warn(self, new_socket: NewSocket) -> None:
        async def main() -> None:
            sock = new_socket()
            sock.setblocking(False)
            set_nat_t_endpoint(sock)
            sock.setblocking(False)  # warnings are errors here

        asyncio.run(main())


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
            wanted = sorted(row.payload for row in TABLE if row.verdict is Verdict.ESP)
            await until(lambda: len(diverted) >= len(wanted), "all ESP has come")
            assert sorted(diverted) == wanted
            transport.close()
            await until(lambda: protocol.lost, "connection_lost")
            assert (protocol.lost, protocol.errors) == ([None], [])

        run(main)

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

        run(main)

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

        run(main)

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

        run(main)

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

        run(main)

    def test_a_burst_of_ike_lets_other_callbacks_run(self, run: Run, new_socket: NewSocket) -> None:
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

        run(main)

    @pytest.mark.parametrize("end", ["close", "abort"])
    def test_can_end_within_a_callback(self, run: Run, new_socket: NewSocket, end: str) -> None:
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

        run(main)

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
            run_on(new_loop, main)
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

        run(main)

    def test_refusal_leaves_the_socket_as_it_was(self, run: Run, new_socket: NewSocket) -> None:
        sock = new_socket()

        async def main() -> None:
            with pytest.raises(BackendUnavailableError):
                await create_nat_t_endpoint(Receiver, sock, backend="nonsense")
            with pytest.raises(RuntimeError, match="a fault"):
                await create_nat_t_endpoint(faulty, sock)

        def faulty() -> Receiver:
            raise RuntimeError("a fault of the factory's")

        run(main)
        assert type(sock) is socket.socket
        assert sock.gettimeout() == PATIENCE

    def test_a_collected_transport_closes_its_socket_and_warns(self, new_socket: NewSocket) -> None:
        sock = new_socket()

        async def main() -> None:
            transport = (await create_nat_t_endpoint(Receiver, sock))[0]
            asyncio.get_running_loop().remove_reader(sock.fileno())  # as the end of the loop does
            with pytest.warns(ResourceWarning, match="unclosed transport"):
                del transport

        asyncio.run(main())
        assert sock.fileno() < 0

    def test_sendto_refuses_data_that_is_no_bytes(self, run: Run, new_socket: NewSocket) -> None:
        async def main() -> None:
            transport, protocol = await create_nat_t_endpoint(Receiver, new_socket())
            with pytest.raises(TypeError, match="bytes-like"):
                transport.sendto("text", ("127.0.0.1", 4500))  # type: ignore[arg-type]
            transport.sendto(b"nowhere")
            assert [getattr(error, "errno", 0) for error in protocol.errors] == [errno.EDESTADDRREQ]
            transport.close()
            transport.sendto(b"too late", ("127.0.0.1", 4500))
            await until(lambda: protocol.lost, "connection_lost")

        run(main)
