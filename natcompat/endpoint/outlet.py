"""Where ESP leaves by the port of an endpoint: a socket of the backend's there, else the application's."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from natcompat.backends.base import Address
from natcompat.backends.system_calls import SystemCalls, send_now

if TYPE_CHECKING:
    from natcompat.endpoint.endpoint import NatTEndpoint


class Outlet:
    """A `natcompat.backends.base.EspOutlet`, from when an endpoint is attached until it is detached.

    Holds the endpoint and not its socket, which may be collected meanwhile.
    """

    def __init__(
        self,
        endpoint: NatTEndpoint,
        root: type[socket.socket],
        esp_socket: socket.socket | None,
        consumer: Any,
    ) -> None:
        self._endpoint = endpoint
        self._root = root
        self._esp_socket = esp_socket
        self._consumer = consumer
        self._address: Address = ("", 0)
        self.own: bool = esp_socket is not None

    def begin(self) -> None:
        """Tell the consumer of ESP of it."""
        self._consumer.attached(self)

    def end(self) -> None:
        """Tell the consumer that it is no longer there. Runs in finalizers, too."""
        with contextlib.suppress(AttributeError):
            self._consumer.detached(self)

    @property
    def address(self) -> Address:
        """Of the socket; port 0 until it is bound."""
        if not self._address[1]:
            with contextlib.suppress(OSError):
                self._address = self.sock.getsockname()
        return self._address

    @property
    def sock(self) -> socket.socket:
        """What it sends from, as it would without the option."""
        return self.application if self._esp_socket is None else self._esp_socket

    @property
    def application(self) -> socket.socket:
        """The application's socket."""
        sock = self._endpoint._aliases.any()
        if sock is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return SystemCalls(sock, self._root)

    def sendmsg(
        self, buffers: Sequence[bytes], ancillary: Sequence[tuple[int, int, bytes]], address: Address
    ) -> int:
        """Send one datagram without the marker; never waits."""
        if self._esp_socket is not None:
            return self._esp_socket.sendmsg(buffers, ancillary, 0, address)
        sock = self._endpoint._aliases.any()
        if sock is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        if self._endpoint._half.in_piece:  # it would become a part of the application's datagram
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return send_now(self._root, sock, buffers, ancillary, address)
