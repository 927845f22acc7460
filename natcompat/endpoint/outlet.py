"""The outlet of an endpoint: the socket from which ESP leaves by the endpoint's port."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from natcompat.backends.base import Address
from natcompat.backends.system_calls import SystemCalls, send_now

if TYPE_CHECKING:
    from natcompat.endpoint.state import EndpointState


class Outlet:
    """A `natcompat.backends.base.EspOutlet`; valid while an endpoint is attached.

    ESP leaves from the backend's own socket on the port, if there is one, else from the application's.
    The outlet does not keep the application's socket alive.
    """

    def __init__(
        self,
        state: EndpointState,
        any_socket: Callable[[], socket.socket | None],
        esp_socket: socket.socket | None,
        consumer: Any,
    ) -> None:
        """`any_socket` returns one of the endpoint's sockets, None if all are gone."""
        self._state = state
        self._any_socket = any_socket
        self._esp_socket = esp_socket
        self._consumer = consumer
        self._address: Address = ("", 0)
        self.own: bool = esp_socket is not None

    def begin(self) -> None:
        """Announce the outlet to the consumer of ESP."""
        self._consumer.attached(self)

    def end(self) -> None:
        """Withdraw the outlet from the consumer of ESP. Runs in finalizers, too."""
        with contextlib.suppress(AttributeError):
            self._consumer.detached(self)

    @property
    def address(self) -> Address:
        """Address of the endpoint's socket; port 0 until it is bound."""
        if not self._address[1]:
            with contextlib.suppress(OSError):
                self._address = self.sock.getsockname()
        return self._address

    @property
    def sock(self) -> socket.socket:
        """The socket that sends, as it is without the option."""
        return self.application if self._esp_socket is None else self._esp_socket

    @property
    def application(self) -> socket.socket:
        """The application's socket, as it is without the option. Raises EBADF once it is closed."""
        return SystemCalls(self._living_socket(), self._state.root)

    def sendmsg(
        self, buffers: Sequence[bytes], ancillary: Sequence[tuple[int, int, bytes]], address: Address
    ) -> int:
        """Send one datagram without the marker; never waits."""
        if self._esp_socket is not None:
            return self._esp_socket.sendmsg(buffers, ancillary, 0, address)
        sock = self._living_socket()
        if self._state.message_open:  # ESP would become a part of the datagram that MSG_MORE has begun
            raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        return send_now(self._state.root, sock, buffers, ancillary, address)

    def _living_socket(self) -> socket.socket:
        sock = self._any_socket()
        if sock is None:
            raise OSError(errno.EBADF, os.strerror(errno.EBADF))
        return sock
