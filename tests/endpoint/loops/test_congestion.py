"""A socket whose buffer is full: transports and awaitable sockets wait, within bounds."""

from __future__ import annotations

import asyncio
import errno
import select
import socket
from typing import Any

import pytest

from natcompat import NON_ESP_MARKER
from natcompat.endpoint.loops import create_nat_t_endpoint, open_nat_t_endpoint
from tests.support.loops import PATIENCE, NewSocket, Receiver, Run, until


class Congested(socket.socket):
    """A model of a socket whose buffer is full, which that of a loopback socket never is."""

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

        run(main)

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

        run(main)

    def test_close_sends_buffered_datagrams(
        self, run: Run, new_socket: NewSocket, congested: socket.socket
    ) -> None:
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

        run(main)

    def test_limits_out_of_order_are_refused(self, run: Run, congested: socket.socket) -> None:
        async def main() -> None:
            transport, _ = await create_nat_t_endpoint(Receiver, congested)
            with pytest.raises(ValueError, match="high"):
                transport.set_write_buffer_limits(high=1, low=2)
            transport.set_write_buffer_limits(low=10)
            assert transport.get_write_buffer_limits() == (10, 40)
            transport.abort()
            await asyncio.sleep(0)

        run(main)

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

        run(main)
