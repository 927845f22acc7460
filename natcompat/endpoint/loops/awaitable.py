"""Sockets with the option that receive and send by ``await``, on asyncio and trio."""

from __future__ import annotations

import asyncio
import socket
import sys
from typing import TYPE_CHECKING, Any

from natcompat.backends.system_calls import in_trio_task
from natcompat.endpoint.loops.nonblocking import make_nonblocking_endpoint
from natcompat.endpoint.loops.readiness import READ, WRITE
from natcompat.endpoint.loops.trio import TrioWaits
from natcompat.endpoint.loops.waits import AsyncioWaits

if TYPE_CHECKING:
    from types import ModuleType
    from typing import Self

    from natcompat.backends.base import Backend, EspConsumer
    from natcompat.endpoint.datagram import Datagram
    from natcompat.endpoint.endpoint import NatTEndpoint
    from natcompat.endpoint.loops.waits import Waits
    from natcompat.ipsec import IPAddress


def open_nat_t_endpoint(
    sock: socket.socket, *, backend: str | Backend | None = None, esp: EspConsumer | None = None
) -> AsyncNatTSocket:
    """Return an object that receives and sends by ``await``, on the running asyncio or trio loop.

    `sock` gets the option if it does not have it, and belongs to the object; `backend`, `esp` and the
    errors are those of `natcompat.set_nat_t_endpoint`::

        async with open_nat_t_endpoint(sock) as ike:
            message, source = await ike.recvfrom(65535)

    Raises RuntimeError outside of a running loop, before `sock` gets the option.
    """
    loop = _running_loop()
    endpoint = make_nonblocking_endpoint(sock, backend, esp)
    waits: Waits
    waits = AsyncioWaits(loop, sock) if isinstance(loop, asyncio.AbstractEventLoop) else TrioWaits(loop, sock)
    return AsyncNatTSocket(sock, endpoint, waits)


def _running_loop() -> ModuleType | asyncio.AbstractEventLoop:
    """Return the module trio in a trio task, else the running asyncio loop; RuntimeError: none runs."""
    return sys.modules["trio"] if in_trio_task() else asyncio.get_running_loop()


class AsyncNatTSocket:
    """A socket with the option on an event loop; `open_nat_t_endpoint` makes it.

    Any number of tasks of that loop may receive and send. Every call lets other tasks run, so that a flood
    does not starve them.
    """

    def __init__(self, sock: socket.socket, endpoint: NatTEndpoint, waits: Waits) -> None:
        self._sock, self._endpoint, self._waits = sock, endpoint, waits

    @property
    def endpoint(self) -> NatTEndpoint:
        """The endpoint, for its counters and keepalives."""
        return self._endpoint

    async def recvfrom(self, bufsize: int) -> tuple[bytes, Any]:
        """Receive one message, without the marker, and its source.

        Raises OSError: ICMP errors of a connected socket; EBADF when the socket is closed, also while it
        waits.
        """
        await self._waits.checkpoint()
        while True:
            try:
                return self._sock.recvfrom(bufsize)
            except (BlockingIOError, InterruptedError):
                await self._waits.wait(READ)

    async def receive(self, bufsize: int = 65535) -> Datagram:
        """Receive one message, its source and the local address to which it came.

        See `NatTEndpoint.receive`; the errors are those of `recvfrom`.
        """
        await self._waits.checkpoint()
        while True:
            try:
                return self._endpoint.receive(bufsize)
            except (BlockingIOError, InterruptedError):
                await self._waits.wait(READ)

    async def sendto(
        self,
        data: bytes | bytearray | memoryview,
        address: Any = None,
        *,
        local_address: IPAddress | str | None = None,
    ) -> int:
        """Send `data` behind the marker to `address`, or to the peer; return the length of `data`.

        The datagram leaves from `local_address`; None leaves the choice to the system.
        """
        await self._waits.checkpoint()
        while True:
            try:
                if local_address is not None:
                    return self._endpoint.send(data, address, local_address=local_address)
                return self._sock.send(data) if address is None else self._sock.sendto(data, address)
            except (BlockingIOError, InterruptedError):
                await self._waits.wait(WRITE)

    def close(self) -> None:
        """Close the socket, and with it the endpoint. Tasks that wait get EBADF. May be repeated."""
        if self._sock.fileno() >= 0:
            self._waits.close()
            self._sock.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()
