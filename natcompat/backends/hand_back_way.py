"""`open_way`: chooses how an envelope reaches the application's socket on this system."""

from __future__ import annotations

import errno
import socket
import sys

from natcompat.backends.consumer import Address
from natcompat.backends.hand_back import HandBackWay
from natcompat.backends.system_calls import is_connected, own_address


def open_way(sock: socket.socket) -> HandBackWay:
    """Return a new way to `sock`, which the caller closes.

    Raises OSError where an envelope could not reach `sock`, or could leave this host: see
    `natcompat.backends.linux_sockets.loopback.LoopbackWay`.
    """
    if sys.platform != "linux":
        return _OwnAddressWay(sock)
    from natcompat.backends.linux_sockets.loopback import LoopbackWay

    return LoopbackWay(sock)


class _OwnAddressWay:
    """Sends from the application's socket to its own address, to which other systems route by loopback."""

    def __init__(self, sock: socket.socket) -> None:
        if is_connected(sock):
            raise OSError(errno.EISCONN, "a connected socket receives nothing from itself")
        self.sock = sock
        self.address: Address = own_address(sock)

    def send(self, envelope: bytes) -> None:
        self.sock.sendto(envelope, self.address)

    def close(self) -> None:
        """Do nothing: the socket is the application's."""
