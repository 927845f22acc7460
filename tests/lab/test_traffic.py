"""IKE and ESP through the NAT, between machines, with XFRM doing the work."""

from __future__ import annotations

import dataclasses
import select
import socket
import threading
import time
from contextlib import ExitStack
from typing import Any

import pytest

from natcompat.ipsec import (
    Acquire,
    Action,
    Direction,
    Encr,
    Mark,
    Mode,
    Policy,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)
from natcompat.kernel.xfrm.bypass import bypass, undo_bypass
from natcompat.kernel.xfrm.kernel import XfrmIPsec
from tests.lab.connection import MARKER, NAT_ADDRESS, Connection, connect, exchange_ike, key, transfer
from tests.lab.topology import Network, inside, wait_for

pytestmark = pytest.mark.kernel_esp


def test_ike_and_esp_at_once_through_the_nat(network: Network) -> None:
    with connect(network, network.initiator, 1) as connection:
        connection.add_sas()
        connection.add_policies()
        near, far = connection.sockets
        for number in range(5):
            exchange_ike(near, far, b"before %d" % number)
            assert network.initiator.ping("10.2.0.1", count=2) == 2
            exchange_ike(near, far, b"after %d" % number)
        # Not only that the pings came back: that they went through the SAs.
        assert {name: connection.packets(name) for name in connection.ids} == dict.fromkeys(
            connection.ids, 10
        )
        usage = network.responder.ipsec.get_sa(connection.ids["responder in"])
        assert usage.sequence == 10
        assert usage.first_used is not None
        policy = network.initiator.ipsec.list_policies()[0]
        assert policy.last_used is not None


def test_tcp_through_the_tunnel(network: Network) -> None:
    with connect(network, network.initiator, 1) as connection:
        connection.add_sas()
        connection.add_policies()
        assert transfer(network.initiator, network.responder, 300_000) == 300_000
        usage = network.responder.ipsec.get_sa(connection.ids["responder in"])
        assert usage.octets > 300_000
        assert usage.integrity_drops == usage.replay_drops == 0


@pytest.mark.parametrize("outer", [4, 6], ids=["over IPv4", "over IPv6"])
@pytest.mark.parametrize("inner", [4, 6], ids=["IPv4", "IPv6"])
def test_families_in_each_other(network: Network, outer: int, inner: int) -> None:
    near, far = network.initiator, network.responder
    here, there = (near.address, far.address) if outer == 4 else (near.address6, far.address6)
    inside_near, inside_far = (near.inner, far.inner) if inner == 4 else (near.inner6, far.inner6)
    with near.udp(here) as first, far.udp(there) as second:
        first.sendto(MARKER + b"IKE", (there, 4500))
        peer = second.recvfrom(100)[1]
        second.sendto(MARKER, peer)
        connection = Connection(
            dataclasses.replace(near, address=here),
            dataclasses.replace(far, address=there),
            (first, second),
            (peer[0], peer[1]),
            Mode.TUNNEL,
            3,
        )
        connection.initiator.ipsec, connection.responder.ipsec = near.ipsec, far.ipsec
        connection.add_sas(esn=inner == 6)
        connection.add_policies(inside_near, inside_far)
        assert near.ping(inside_far, "-I", inside_near) == 3
        # or more: TCP of the test before may still be saying goodbye between the same addresses
        assert all(connection.packets(name) >= 3 for name in connection.ids)


def test_two_initiators_behind_one_nat(network: Network) -> None:
    with (
        connect(network, network.initiator, 1) as one,
        connect(network, network.second, 2) as two,
    ):
        assert one.peer[0] == two.peer[0]
        assert one.peer[1] != two.peer[1]
        for connection in (one, two):
            connection.add_sas()
            connection.add_policies()
        assert network.initiator.ping("10.2.0.1") == 3
        assert network.second.ping("10.2.0.1") == 3
        for connection in (one, two):
            counts = {name: connection.packets(name) for name in connection.ids}
            assert counts == dict.fromkeys(connection.ids, 3)


def test_two_initiators_behind_one_nat_in_transport_mode(network: Network) -> None:
    """To the responder both have the address of the NAT: distinct selectors tell them apart."""
    with ExitStack() as stack:
        connections = []
        for host, reqid, port in ((network.initiator, 1, 6001), (network.second, 2, 6002)):
            connection = stack.enter_context(connect(network, host, reqid, Mode.TRANSPORT))
            connection.add_sas()
            for end, local, remote in (
                (host, host.address, "203.0.113.2"),
                (network.responder, "203.0.113.2", NAT_ADDRESS),
            ):
                ours = end is host
                for direction, source, destination in (
                    (Direction.OUT, local, remote),
                    (Direction.IN, remote, local),
                ):
                    service_is_source = ours == (direction is Direction.IN)
                    end.ipsec.add_policy(
                        Policy(
                            direction=direction,
                            selector=TrafficSelector(
                                source=source,
                                destination=destination,
                                protocol=17,
                                source_port=port if service_is_source else 0,
                                destination_port=0 if service_is_source else port,
                            ),
                            mode=Mode.TRANSPORT,
                            reqid=reqid,
                        )
                    )
            connections.append((connection, host, port))
        for connection, host, port in connections:
            with (
                host.udp(port=port + 1000, encap=False) as client,
                network.responder.udp(port=port, encap=False) as server,
            ):
                client.sendto(b"hello %d" % port, ("203.0.113.2", port))
                data, peer = server.recvfrom(100)
                assert data == b"hello %d" % port
                server.sendto(b"welcome", peer)
                assert client.recv(100) == b"welcome"
            counts = {name: connection.packets(name) for name in connection.ids}
            assert counts == dict.fromkeys(connection.ids, 1)


def test_marks_tell_two_transport_mode_clients_apart(network: Network) -> None:
    """The same selectors twice: EEXIST without marks, traffic to the right client with them."""
    with (
        connect(network, network.initiator, 1, Mode.TRANSPORT) as one,
        connect(network, network.second, 2, Mode.TRANSPORT) as two,
    ):
        selector = TrafficSelector(
            source="203.0.113.2", destination=NAT_ADDRESS, protocol=17, source_port=6000
        )
        for connection in (one, two):
            for _, host, sa in connection.associations():
                marked = host is network.responder and sa.direction is Direction.OUT
                mark = Mark(value=connection.reqid) if marked else None
                host.ipsec.add_sa(dataclasses.replace(sa, mark=mark))
            network.responder.ipsec.add_policy(
                Policy(
                    direction=Direction.OUT,
                    selector=selector,
                    mode=Mode.TRANSPORT,
                    reqid=connection.reqid,
                    mark=connection.reqid,
                )
            )
        for connection in (one, two):
            host = connection.initiator
            with network.responder.udp(port=6000, encap=False) as server:
                server.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, connection.reqid)
                server.sendto(b"for you", (NAT_ADDRESS, 7000))
                spi = connection.associations()[0][2].sa_id
                wait_for("the packet", lambda: host.ipsec.get_sa(spi).packets == 1)  # noqa: B023


def test_acquire(network: Network) -> None:
    with connect(network, network.initiator, 42) as connection, network.initiator.events() as events:
        connection.add_policies()
        with network.initiator.udp("10.1.0.1", 5001, encap=False) as sender:
            sender.setblocking(False)
            sender.sendto(b"x", ("10.2.0.1", 5002))
            assert select.select([events], [], [], 5)[0]
        (acquire,) = events.read()
        assert isinstance(acquire, Acquire)
        assert (acquire.reqid, str(acquire.source), str(acquire.destination)) == (
            42,
            "192.168.1.2",
            "203.0.113.2",
        )
        assert acquire.selector == TrafficSelector(
            source="10.1.0.1", destination="10.2.0.1", protocol=17, source_port=5001, destination_port=5002
        )
        spi = network.initiator.ipsec.allocate_spi(
            acquire.destination, acquire.source, reqid=acquire.reqid, sequence=acquire.sequence
        )
        assert spi
        connection.add_sas()
        assert network.initiator.ping("10.2.0.1") == 3


def test_replayed_and_tampered_packets_are_dropped_and_counted(network: Network) -> None:
    """Between machines that see each other's packets: the responder gets copies from the initiator's port."""
    with connect(network, network.initiator, 1) as connection:
        connection.add_sas()
        connection.add_policies()
        inbound = connection.ids["responder in"]
        with inside("responder"):
            tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
        tap.bind(("wan", 0x0800))
        with tap:
            tap.settimeout(5)
            assert network.initiator.ping("10.2.0.1", count=1) == 1
            while (captured := esp_of(tap.recvfrom(2048))) is None:
                pass
        with inside("router"):
            raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_RAW)
        with raw:
            for _ in range(3):
                raw.sendto(captured, ("203.0.113.2", 0))
            wait_for(
                "the replays to be counted",
                lambda: network.responder.ipsec.get_sa(inbound).replay_drops == 3,
            )
            spoiled = bytearray(captured)
            spoiled[35] = 9  # a sequence number that has not been: only the check value tells
            spoiled[-1] ^= 1
            for _ in range(2):
                raw.sendto(bytes(spoiled), ("203.0.113.2", 0))
            wait_for(
                "the forgeries to be counted",
                lambda: network.responder.ipsec.get_sa(inbound).integrity_drops == 2,
            )
        usage = network.responder.ipsec.get_sa(inbound)
        assert (usage.packets, usage.sequence) == (1, 1)
        assert network.initiator.ping("10.2.0.1") == 3


def esp_of(received: tuple[bytes, Any]) -> bytes | None:
    """Return the IP packet if it is ESP in UDP that came in (not out)."""
    packet, address = received
    is_esp = packet[9] == 17 and packet[22:24] == b"\x11\x94" and packet[28:32] not in (MARKER, b"\xff")
    return packet if is_esp and address[2] == 0 else None


def test_a_policy_that_blocks_everything(network: Network) -> None:
    """Without a bypass it also kills IKE and ESP in UDP; with it, both live."""
    with connect(network, network.initiator, 1) as connection:
        near, far = connection.sockets
        connection.add_sas()
        connection.add_policies()
        everything = TrafficSelector(source="0.0.0.0/0", destination="0.0.0.0/0", protocol=17)
        for direction in Direction:
            network.responder.ipsec.add_policy(
                Policy(direction=direction, selector=everything, action=Action.DISCARD)
            )
        before = network.responder.statistic("XfrmInPolBlock")
        assert network.initiator.ping("10.2.0.1", "-W", "1", count=1) == 0
        near.sendto(MARKER + b"lost", ("203.0.113.2", 4500))
        with pytest.raises(PermissionError):
            far.sendto(MARKER + b"refused", connection.peer)
        assert network.responder.statistic("XfrmInPolBlock") == before + 2
        with inside("initiator"):
            network.responder.ipsec.bypass(far)
        exchange_ike(near, far, b"through")
        assert network.initiator.ping("10.2.0.1") == 3
        undo_bypass(far)
        assert network.initiator.ping("10.2.0.1", "-W", "1", count=1) == 0


def test_bypass_over_ipv6(network: Network) -> None:
    near, far = network.initiator, network.responder
    everything = TrafficSelector(source="::/0", destination="::/0", protocol=17)
    with near.udp(near.address6) as first, far.udp(far.address6) as second:
        for direction in Direction:
            far.ipsec.add_policy(Policy(direction=direction, selector=everything, action=Action.DISCARD))
        with pytest.raises(PermissionError):
            second.sendto(MARKER + b"refused", (near.address6, 4500))
        bypass(second)
        first.sendto(MARKER + b"IKE", (far.address6, 4500))
        data, peer = second.recvfrom(100)
        assert data == MARKER + b"IKE"
        second.sendto(MARKER + b"answer", peer)
        assert first.recv(100) == MARKER + b"answer"


@pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
def test_keepalives_go_out_while_nothing_else_does(network: Network, version: int) -> None:
    near, far = network.initiator, network.responder
    here, there = (near.address, far.address) if version == 4 else (near.address6, far.address6)
    with far.udp(there, encap=False) as listener:
        sa = SecurityAssociation(
            spi=0x4000,
            source=here,
            destination=there,
            direction=Direction.OUT,
            encryption=Encr.AES_GCM_16,
            encryption_key=key(1),
            encapsulation=UDPEncapsulation(local_port=4500, remote_port=4500),
            nat_keepalive=1,
        )
        sa_id = near.ipsec.add_sa(sa)
        for _ in range(2):
            data, peer = listener.recvfrom(100)
            assert data == b"\xff"
            assert peer[0] == (NAT_ADDRESS if version == 4 else here)
        near.ipsec.delete_sa(sa_id)
        while select.select([listener], [], [], 0)[0]:
            listener.recvfrom(100)
        assert not select.select([listener], [], [], 1.6)[0]


def test_keepalives_outlive_the_process_where_the_kernel_sends_them(network: Network) -> None:
    near, far = network.initiator, network.responder
    with far.udp(encap=False) as listener:
        with inside(near.name):
            opened = XfrmIPsec()
        with opened:
            by_kernel = opened.features.kernel_keepalive
            opened.add_sa(
                SecurityAssociation(
                    spi=0x4001,
                    source=near.address,
                    destination=far.address,
                    direction=Direction.OUT,
                    encryption=Encr.AES_GCM_16,
                    encryption_key=key(1),
                    encapsulation=UDPEncapsulation(local_port=4500, remote_port=4500),
                    nat_keepalive=1,
                )
            )
            helpers = [each for each in threading.enumerate() if each.name == "natcompat-keepalive"]
            assert bool(helpers) != by_kernel
            assert listener.recv(100) == b"\xff"
        while select.select([listener], [], [], 0)[0]:
            listener.recv(100)
        assert bool(select.select([listener], [], [], 3)[0]) == by_kernel
        assert not by_kernel or listener.recv(100) == b"\xff"


def test_an_outbound_sa_takes_nothing_in_where_the_kernel_knows_directions(network: Network) -> None:
    near, far = network.initiator, network.responder
    sa = SecurityAssociation(
        spi=0x4002,
        source=near.address,
        destination=far.address,
        direction=Direction.OUT,
        encryption=Encr.AES_GCM_16,
        encryption_key=key(1),
    )
    sa_id = far.ipsec.add_sa(sa)
    with inside(near.name):
        raw = socket.socket(socket.AF_INET, socket.SOCK_RAW, socket.IPPROTO_ESP)
    with raw:
        raw.sendto((0x4002).to_bytes(4, "big") + bytes([0, 0, 0, 1]) + bytes(64), (far.address, 0))
    if far.ipsec.features.sa_direction:
        wait_for("the refusal", lambda: far.statistic("XfrmInStateDirError") == 1)
        assert far.ipsec.get_sa(sa_id).integrity_drops == 0
    else:
        wait_for("the check", lambda: far.ipsec.get_sa(sa_id).integrity_drops == 1)


def test_keepalives_follow_the_sa_and_wait_while_it_sends(network: Network) -> None:
    with connect(network, network.initiator, 1) as connection, ExitStack() as stack:
        near, far = network.initiator, network.responder
        listener = stack.enter_context(far.udp(port=4600, encap=False))
        for name, host, sa in connection.associations():
            keepalive = 1 if name == "initiator out" else None
            connection.ids[name] = host.ipsec.add_sa(dataclasses.replace(sa, nat_keepalive=keepalive))
        connection.add_policies()
        near.ipsec.update_sa(
            connection.ids["initiator out"], encapsulation=UDPEncapsulation(local_port=4500, remote_port=4600)
        )
        assert listener.recv(100) == b"\xff"
        # Traffic instead (its ESP goes to the same port, and nobody answers): no keepalive is due.
        seen = set()
        with near.udp("10.1.0.1", 5000, encap=False) as sender:
            end = time.monotonic() + 2.5
            while time.monotonic() < end:
                sender.sendto(b"x", ("10.2.0.1", 5000))
                if select.select([listener], [], [], 0.2)[0]:
                    seen.add(len(listener.recv(2048)))
        assert seen
        assert 1 not in seen
        assert listener.recv(2048)
