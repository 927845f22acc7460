"""The whole: one call on the socket, SAs in the kernel, and a NAT between."""

from __future__ import annotations

import socket
import time

import pytest

from natcompat import set_nat_t_endpoint
from natcompat.ipsec import Mode
from tests.lab.connection import Connection
from tests.lab.topology import Host, Network, inside

pytestmark = pytest.mark.kernel_esp


def endpoint_socket(host: Host) -> socket.socket:
    with inside(host.name):
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        sock.bind((host.address, 4500))
        sock.settimeout(5)
        set_nat_t_endpoint(sock, backend="linux")
    return sock


def test_ike_and_kernel_esp_on_one_socket_through_the_nat(network: Network) -> None:
    near, far = network.initiator, network.responder
    with endpoint_socket(near) as ike, endpoint_socket(far) as peer_ike:
        ike.sendto(b"IKE_SA_INIT", ("203.0.113.2", 4500))
        message, peer = peer_ike.recvfrom(2048)
        assert message == b"IKE_SA_INIT"
        assert peer[0] == "203.0.113.1"
        connection = Connection(near, far, (ike, peer_ike), (peer[0], peer[1]), Mode.TUNNEL, 1)
        connection.add_sas()
        connection.add_policies()
        for number in range(5):
            peer_ike.sendto(b"request %d" % number, peer)
            assert near.ping("10.2.0.1", count=2) == 2
            assert ike.recv(2048) == b"request %d" % number
            with near.udp(port=4600, encap=False) as stranger:
                for runt in (b"", b"\xff", b"\0\0", b"\xc0\xde\0\1\0"):
                    stranger.sendto(runt, ("203.0.113.2", 4500))
        assert {name: connection.packets(name) for name in connection.ids} == dict.fromkeys(
            connection.ids, 10
        )
        peer_ike.settimeout(0.3)
        start = time.monotonic()
        with pytest.raises(TimeoutError):
            peer_ike.recv(2048)
        assert time.monotonic() - start < 5
