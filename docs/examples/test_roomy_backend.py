"""The backend keeps the contract: this is all that its author has to write."""

import socket

from roomy_backend import RoomyBackend

from natcompat import set_nat_t_endpoint
from natcompat.testing import EndpointConformance


class TestRoomyBackend(EndpointConformance):
    """Every row of the contract, both directions, both families, on real sockets."""

    backends = (RoomyBackend(),)


def test_the_room_is_the_applications_when_it_asks() -> None:
    """An option that the backend uses, too, stays the application's."""
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        endpoint = set_nat_t_endpoint(sock, backend=RoomyBackend())
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 30_000)
        endpoint.close()
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF) == 60_000
