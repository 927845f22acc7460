"""Awaitable sockets: `open_nat_t_endpoint` on every asyncio loop and on trio."""

from __future__ import annotations

import asyncio
import errno
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from natcompat import NAT_KEEPALIVE, NON_ESP_MARKER, Verdict, get_nat_t_endpoint, set_nat_t_endpoint
from natcompat.backends.system_calls import in_trio_task
from natcompat.contract import OUTBOUND_TABLE, TABLE
from natcompat.endpoint.loops import AsyncNatTSocket, open_nat_t_endpoint
from tests.support.loops import ESP, PATIENCE, NewSocket, Run, send_table

trio = pytest.importorskip("trio")
pytest.importorskip("trio.testing")


class TestAwaitableSocket:
    def test_contract(self, run_anywhere: Run, new_socket: NewSocket, family: int, backend: str) -> None:
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

        run_anywhere(main)
        wanted = sorted(row.payload for row in TABLE if row.verdict is Verdict.ESP)
        assert sorted(diverted) == wanted

    def test_tells_and_uses_the_local_address(self, run_anywhere: Run, new_socket: NewSocket) -> None:
        peer = new_socket()

        async def main() -> None:
            with socket.socket(type=socket.SOCK_DGRAM) as sock:
                sock.bind(("0.0.0.0", 0))
                port = sock.getsockname()[1]
                async with open_nat_t_endpoint(sock, esp=lambda *_: None) as ike:
                    for host in ("127.0.0.1", "127.0.0.7"):
                        for payload in (NAT_KEEPALIVE, ESP, NON_ESP_MARKER + b"IKE"):
                            peer.sendto(payload, (host, port))
                        message, source, local = await ike.receive()
                        assert (message, source, str(local)) == (b"IKE", peer.getsockname(), host)
                        assert await ike.sendto(b"answer", source, local_address=local) == 6
                        assert peer.recvfrom(100) == (NON_ESP_MARKER + b"answer", (host, port))

        run_anywhere(main)

    def test_waits_while_others_run(self, run_anywhere: Run, new_socket: NewSocket, backend: str) -> None:
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

        run_anywhere(main)

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

        run(main)

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

        run(main)

    def test_a_socket_of_trio_is_refused_with_a_remedy(self) -> None:
        async def main() -> None:
            with (
                trio.socket.socket(trio.socket.AF_INET, trio.socket.SOCK_DGRAM) as sock,
                pytest.raises(TypeError, match=r"open_nat_t_endpoint\(\)"),
            ):
                set_nat_t_endpoint(sock)

        trio.run(main)

    def test_flood_starves_no_task(self, run_anywhere: Run, new_socket: NewSocket) -> None:
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

        run_anywhere(main)
