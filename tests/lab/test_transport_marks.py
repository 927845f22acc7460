"""Two clients behind one NAT, in transport mode, with the same selector (RFC 3948, 5.2), told apart by marks.

To the responder both have the address of the NAT. What an inbound SA has opened carries the `output_mark` of
the SA; the policies and SAs of the way back have it as `mark`, and sockets answer with it.
"""

from __future__ import annotations

import dataclasses
import socket
import struct
from collections.abc import Iterator
from contextlib import ExitStack

import pytest

from natcompat.ipsec import Direction, Mark, Mode, Policy, TrafficSelector
from tests.lab.connection import NAT_ADDRESS, Connection, connect
from tests.lab.topology import Host, Network

pytestmark = pytest.mark.kernel_esp

PORT = 1701
"""Of L2TP, at both ends, as every client has it."""
SO_RCVMARK = 75  # asm-generic/socket.h, Linux 5.19
TCP, UDP = 6, 17


def add_transport_policies(connection: Connection, protocol: int) -> None:
    """Protect what a client and the server's PORT say to each other, with a mark at the server."""
    near, far = connection.initiator, connection.responder
    for host, client, server, mark in (
        (near, near.address, far.address, None),
        (far, NAT_ADDRESS, far.address, Mark(value=connection.reqid)),
    ):
        to_server = TrafficSelector(
            source=client, destination=server, protocol=protocol, destination_port=PORT
        )
        to_client = TrafficSelector(source=server, destination=client, protocol=protocol, source_port=PORT)
        for direction in Direction:
            toward_server = (host is near) == (direction is Direction.OUT)
            host.ipsec.add_policy(
                Policy(
                    direction=direction,
                    selector=to_server if toward_server else to_client,
                    mode=Mode.TRANSPORT,
                    reqid=connection.reqid,
                    mark=mark,
                )
            )


@pytest.fixture
def connections(network: Network) -> Iterator[list[Connection]]:
    """Two clients and their SAs, marked at the responder."""
    with ExitStack() as stack:
        made = []
        for reqid, host in ((1, network.initiator), (2, network.second)):
            connection = stack.enter_context(connect(network, host, reqid, Mode.TRANSPORT))
            for name, end, sa in connection.associations():
                if end is network.responder:
                    mark = Mark(value=reqid)
                    inbound = sa.direction is Direction.IN
                    sa = (
                        dataclasses.replace(sa, output_mark=mark)
                        if inbound
                        else dataclasses.replace(sa, mark=mark)
                    )
                connection.ids[name] = end.ipsec.add_sa(sa)
            made.append(connection)
        yield made


def assert_each_had_its_own(connections: list[Connection]) -> None:
    for connection in connections:
        for name, other in (("initiator out", "responder in"), ("responder out", "initiator in")):
            assert connection.packets(name) == connection.packets(other) > 0


def test_tcp(network: Network, connections: list[Connection]) -> None:
    """A server that knows nothing of marks: the kernel answers with the mark of the SYN."""
    network.responder.run("sysctl", "-qw", "net.ipv4.tcp_fwmark_accept=1")
    for connection in connections:
        add_transport_policies(connection, TCP)
    with network.responder.tcp() as listener, ExitStack() as stack:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((network.responder.address, PORT))
        listener.listen()
        clients = []
        for number, connection in enumerate(connections):
            client = stack.enter_context(connection.initiator.tcp())
            client.bind((connection.initiator.address, 40001 + number))
            client.connect((network.responder.address, PORT))
            accepted = stack.enter_context(listener.accept()[0])
            accepted.settimeout(10)
            clients.append((client, accepted, b"client %d" % number))
        for client, accepted, name in clients:
            client.sendall(name)
            assert accepted.recv(100) == name
            accepted.sendall(b"hello " + name)
        for client, _, name in clients:
            assert client.recv(100) == b"hello " + name
    assert_each_had_its_own(connections)


def test_l2tp(network: Network, connections: list[Connection]) -> None:
    """The same ports at both clients: addresses and ports are all the same, only the mark is not."""
    for connection in connections:
        add_transport_policies(connection, UDP)
    with network.responder.udp(port=PORT, encap=False) as server, ExitStack() as stack:
        server.setsockopt(socket.SOL_SOCKET, SO_RCVMARK, 1)
        sockets = []
        for connection in connections:
            client = stack.enter_context(connection.initiator.udp(port=PORT, encap=False))
            client.sendto(connection.initiator.name.encode(), (network.responder.address, PORT))
            sockets.append(client)
        for _ in connections:
            text, ancillary, _, peer = server.recvmsg(100, 100)
            assert peer == (NAT_ADDRESS, PORT)
            ((_, _, mark),) = ancillary
            expected = next(each for each in connections if each.initiator.name.encode() == text)
            assert struct.unpack("=I", mark) == (expected.reqid,)
            server.sendmsg([b"to " + text], [(socket.SOL_SOCKET, socket.SO_MARK, mark)], 0, peer)
        for client, connection in zip(sockets, connections, strict=True):
            assert client.recv(100) == b"to " + connection.initiator.name.encode()
    assert_each_had_its_own(connections)


def test_without_its_mark_an_answer_waits_for_nobody(network: Network, connections: list[Connection]) -> None:
    """A socket without the mark meets none of their policies: one for the rest keeps it off the wire."""
    for connection in connections:
        add_transport_policies(connection, UDP)
    host: Host = network.responder
    host.ipsec.add_policy(
        Policy(
            direction=Direction.OUT,
            selector=TrafficSelector(
                source=host.address, destination=NAT_ADDRESS, protocol=UDP, source_port=PORT
            ),
            mode=Mode.TRANSPORT,
            reqid=99,
        )
    )
    with host.udp(port=PORT, encap=False) as server:
        server.setblocking(False)
        server.sendto(b"to nobody", (NAT_ADDRESS, PORT))
    assert [connection.packets("responder out") for connection in connections] == [0, 0]
