"""The transport of an IKE daemon on asyncio: set the option on the socket, and asyncio works as usual.

``python asyncio_daemon.py [PORT]``
"""

import asyncio
import socket
import sys

from natcompat import set_nat_t_endpoint


class Responder(asyncio.DatagramProtocol):
    """Echoes every message, and stops at an empty one."""

    def __init__(self) -> None:
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.DatagramTransport) -> None:  # type: ignore[override]
        """Remember the transport."""
        self.transport = transport

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        """Handle one IKE message, without the marker."""
        if data:
            self.transport.sendto(data, addr)
        elif not self.done.done():
            self.done.set_result(None)


async def main() -> None:
    """Serve until told to stop."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", int(sys.argv[1]) if len(sys.argv) > 1 else 0))
    set_nat_t_endpoint(sock)
    transport, protocol = await asyncio.get_running_loop().create_datagram_endpoint(Responder, sock=sock)
    print(f"listening on port {sock.getsockname()[1]}", flush=True)
    await protocol.done
    transport.close()


if __name__ == "__main__":
    asyncio.run(main())
