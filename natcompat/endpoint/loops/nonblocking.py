"""Sets the option on a socket that an event loop is going to read through its object."""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING

from natcompat.endpoint import set_nat_t_endpoint
from natcompat.endpoint.bypassing_loops import reading_through_object

if TYPE_CHECKING:
    from natcompat.backends.base import Backend, EspConsumer
    from natcompat.endpoint.endpoint import NatTEndpoint


def make_nonblocking_endpoint(
    sock: socket.socket, backend: str | Backend | None, esp: EspConsumer | None
) -> NatTEndpoint:
    """Set the option on `sock`, and the non-blocking mode. The errors are `set_nat_t_endpoint`'s."""
    with reading_through_object():
        endpoint = set_nat_t_endpoint(sock, backend=backend, esp=esp)
        sock.setblocking(False)
    return endpoint
