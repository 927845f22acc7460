"""SAs that move, are rekeyed and expire, under traffic."""

from __future__ import annotations

import contextlib
import dataclasses
import select
import socket
import threading
import time

import pytest

from natcompat.ipsec import (
    Expire,
    Lifetime,
    MappingChange,
    UDPEncapsulation,
)
from tests.lab.connection import NAT_ADDRESS, connect, exchange_ike
from tests.lab.topology import Network, inside, wait_for

pytestmark = pytest.mark.kernel_esp


def test_the_nat_mapping_changes_under_traffic(network: Network) -> None:
    with connect(network, network.initiator, 1) as connection, network.responder.events() as events:
        connection.add_sas()
        connection.add_policies()
        assert network.initiator.ping("10.2.0.1", count=1) == 1
        assert events.read() == []
        network.nat("30000-30999")
        try:
            assert (
                network.initiator.ping("10.2.0.1", "-W", "1", count=1) == 0
            )  # the answer goes to the old port
            assert select.select([events], [], [], 5)[0]
            (change,) = events.read()
            assert isinstance(change, MappingChange)
            assert change.sa_id == connection.ids["responder in"]
            assert (change.old_port, str(change.old_address)) == (connection.peer[1], NAT_ADDRESS)
            assert 30000 <= change.new_port <= 30999
            assert str(change.new_address) == NAT_ADDRESS
            network.initiator.ping("10.2.0.1", "-W", "1", count=1)
            assert events.read() == []  # not for every packet (MAPPING_INTERVAL)
            # The daemon decides, and says so for both SAs.
            sequence = network.responder.ipsec.get_sa(connection.ids["responder out"]).sequence
            for name in ("responder in", "responder out"):
                network.responder.ipsec.update_sa(
                    connection.ids[name],
                    encapsulation=UDPEncapsulation(local_port=4500, remote_port=change.new_port),
                )
            assert network.initiator.ping("10.2.0.1", count=5) == 5
            usage = network.responder.ipsec.get_sa(connection.ids["responder out"])
            assert usage.sequence == (sequence or 0) + 5
            assert events.read() == []
        finally:
            network.nat("20000-20999")


def test_a_move_to_another_address(network: Network) -> None:
    """The initiator gets another address: delete and add, and neither end sees a sequence number twice."""
    network.initiator.run("ip", "addr", "add", "192.168.1.7/24", "dev", "lan")
    try:
        with connect(network, network.initiator, 1) as connection:
            connection.add_sas()
            connection.add_policies()
            assert network.initiator.ping("10.2.0.1") == 3
            with network.initiator.udp("192.168.1.7") as moved:
                peer = exchange_ike(moved, connection.sockets[1], b"UPDATE_SA_ADDRESSES")
                new_in = network.initiator.ipsec.update_sa(
                    connection.ids["initiator in"], destination="192.168.1.7"
                )
                network.initiator.ipsec.update_sa(connection.ids["initiator out"], source="192.168.1.7")
                ports = UDPEncapsulation(local_port=4500, remote_port=peer[1])
                for name in ("responder in", "responder out"):
                    network.responder.ipsec.update_sa(connection.ids[name], encapsulation=ports)
                network.initiator.ipsec.flush_policies()
                network.responder.ipsec.flush_policies()
                connection.initiator = dataclasses.replace(network.initiator, address="192.168.1.7")
                connection.initiator.ipsec = network.initiator.ipsec
                connection.add_policies()
                assert network.initiator.ping("10.2.0.1") == 3
                assert network.initiator.ipsec.get_sa(new_in).sequence == 6
                usage = network.responder.ipsec.get_sa(connection.ids["responder in"])
                assert (usage.sequence, usage.replay_drops, usage.packets) == (6, 0, 6)
    finally:
        network.initiator.run("ip", "addr", "del", "192.168.1.7/24", "dev", "lan")


def test_moves_under_load_send_nothing_in_the_clear_and_no_number_twice(network: Network) -> None:
    network.initiator.run("ip", "addr", "add", "192.168.1.7/24", "dev", "lan")
    with inside("router"):
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0800))
    tap.bind(("one", 0x0800))
    tap.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
    try:
        with (
            tap,
            connect(network, network.initiator, 1) as connection,
            network.initiator.udp("10.1.0.1", 5000, encap=False) as sender,
        ):
            connection.add_sas()
            connection.add_policies()
            stop = threading.Event()
            sent = 0

            def stream() -> None:
                nonlocal sent
                while not stop.is_set():
                    with contextlib.suppress(OSError):  # EAGAIN while there is no SA
                        sender.sendto(b"secret", socket.MSG_DONTWAIT, ("10.2.0.1", 5000))
                        sent += 1

            thread = threading.Thread(target=stream)
            thread.start()
            ipsec, sa_id = network.initiator.ipsec, connection.ids["initiator out"]
            try:
                for number in range(20):
                    before = sent
                    wait_for("traffic", lambda: sent > before + 20)  # noqa: B023
                    sa_id = ipsec.update_sa(sa_id, source=("192.168.1.7", "192.168.1.2")[number % 2])
            finally:
                stop.set()
                thread.join()
            tap.setblocking(False)
            seen = {"clear": 0, "ESP": 0}
            with contextlib.suppress(BlockingIOError):
                while True:
                    packet, _ = tap.recvfrom(2048)
                    if packet[9] == 17:
                        seen["clear" if b"secret" in packet else "ESP"] += 1
            assert (
                seen["ESP"] > 200
            )  # of 400 and more that were sent; some were dropped between deletion and addition
            assert seen["clear"] == 0
            usage = network.responder.ipsec.get_sa(connection.ids["responder in"])
            assert usage.replay_drops == usage.window_drops == usage.integrity_drops == 0
            assert usage.sequence == usage.packets == ipsec.get_sa(sa_id).sequence
    finally:
        network.initiator.run("ip", "addr", "del", "192.168.1.7/24", "dev", "lan")


def test_rekey_under_load_loses_nothing(network: Network) -> None:
    """Make before break: new SAs in, new SAs out, old SAs gone, all under a stream of datagrams."""
    with (
        connect(network, network.initiator, 1) as connection,
        network.initiator.udp("10.1.0.1", 5000, encap=False) as sender,
        network.responder.udp("10.2.0.1", 5000, encap=False) as receiver,
    ):
        connection.add_sas()
        connection.add_policies()
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        stop = threading.Event()
        sent = 0

        def stream() -> None:
            nonlocal sent
            while not stop.is_set():
                sender.sendto(sent.to_bytes(4, "big"), ("10.2.0.1", 5000))
                sent += 1
                time.sleep(0.001)

        thread = threading.Thread(target=stream)
        thread.start()
        try:
            for generation in range(1, 6):
                before = sent
                wait_for("traffic", lambda: sent > before + 20)  # noqa: B023
                connection.add_sas(generation)
                name = f"responder in {generation}"
                wait_for("traffic in the new SA", lambda: connection.packets(name) > 0)  # noqa: B023
                old = f" {generation - 1}" if generation > 1 else ""
                for side, host in (("initiator", network.initiator), ("responder", network.responder)):
                    for way in ("out", "in"):
                        host.ipsec.delete_sa(connection.ids.pop(f"{side} {way}{old}"))
        finally:
            stop.set()
            thread.join()
        receiver.settimeout(2)
        numbers = [int.from_bytes(receiver.recv(100), "big") for _ in range(sent)]
        assert sorted(numbers) == list(range(sent))
        assert sent > 100


def test_hard_expiry_stops_traffic(network: Network) -> None:
    with connect(network, network.initiator, 1) as connection, network.initiator.events() as events:
        connection.add_policies()
        connection.add_sas(lifetime=Lifetime(soft_packets=3, hard_packets=6))
        assert network.initiator.ping("10.2.0.1", "-W", "1", count=4) == 4
        soft = {each.sa_id for each in events.read() if isinstance(each, Expire) and not each.hard}
        assert soft == {connection.ids["initiator in"], connection.ids["initiator out"]}
        assert network.initiator.ping("10.2.0.1", "-W", "1", count=4) < 4
        hard = {each.sa_id for each in events.read() if isinstance(each, Expire) and each.hard}
        assert connection.ids["initiator out"] in hard
        assert network.initiator.ping("10.2.0.1", "-W", "1", count=1) == 0
