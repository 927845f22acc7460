"""The test of a backend: its author has to write no more than this."""

import socket

from roomy_backend import RoomyBackend

from natcompat import set_nat_t_endpoint
from natcompat.testing import EndpointConformance


class TestRoomyBackend(EndpointConformance):
    """Every row of the contract, both directions, both families, on real sockets."""

    backends = (RoomyBackend(),)


def test_the_application_can_still_set_its_queue() -> None:
    """An option that the backend uses too still belongs to the application."""
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        endpoint = set_nat_t_endpoint(sock, backend=RoomyBackend())
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 30_000)
        endpoint.close()
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 60_000
