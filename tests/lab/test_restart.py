"""SAs with keys that outlive the kernel's SA: what goes on, and what nobody can make go on."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any

import pytest

from natcompat.ipsec import (
    Direction,
    Encr,
    Integ,
    Policy,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)
from tests.lab.topology import Host, Network

pytestmark = pytest.mark.kernel_esp

GCM: dict[str, Any] = {"encryption": Encr.AES_GCM_16, "encryption_key": bytes(range(20))}
CBC: dict[str, Any] = {
    "encryption": Encr.AES_CBC,
    "encryption_key": bytes(range(16)),
    "integrity": Integ.HMAC_SHA2_256_128,
    "integrity_key": bytes(range(32)),
}


def association(near: Host, far: Host, direction: Direction, **changes: Any) -> SecurityAssociation:
    return SecurityAssociation(
        **{
            "spi": 0x1001,
            "source": near.address,
            "destination": far.address,
            "direction": direction,
            "encapsulation": UDPEncapsulation(local_port=4500, remote_port=4500),
            **changes,
        }
    )


def add_policy(host: Host, near: Host, far: Host, direction: Direction) -> None:
    selector = TrafficSelector(source=near.inner, destination=far.inner)
    host.ipsec.add_policy(
        Policy(direction=direction, selector=selector, source=near.address, destination=far.address)
    )


@pytest.fixture
def wire(network: Network) -> Iterator[socket.socket]:
    """A plain socket at the responder, which sees ESP in UDP as it is."""
    with network.initiator.udp(), network.responder.udp(encap=False) as sock:
        yield sock


def first_packets(network: Network, wire: socket.socket, count: int) -> list[bytes]:
    network.initiator.ping(network.responder.inner, "-W", "1", count=count)
    return [wire.recv(2048) for _ in range(count)]


def test_sequence_numbers_go_on(network: Network, wire: socket.socket) -> None:
    near, far = network.initiator, network.responder
    add_policy(near, near, far, Direction.OUT)
    near.ipsec.add_sa(association(near, far, Direction.OUT, **CBC), sequence=1000)
    packets = first_packets(network, wire, 2)
    assert [int.from_bytes(packet[4:8]) for packet in packets] == [1001, 1002]


def test_what_was_received_before_is_a_replay(network: Network, wire: socket.socket) -> None:
    near, far = network.initiator, network.responder
    add_policy(near, near, far, Direction.OUT)
    add_policy(far, near, far, Direction.IN)
    near.ipsec.add_sa(association(near, far, Direction.OUT, **CBC))
    old = first_packets(network, wire, 2)
    wire.close()
    inbound = far.ipsec.add_sa(association(near, far, Direction.IN, **CBC, replay_window=64), sequence=2)
    with far.udp(), near.udp(port=4501, encap=False) as replayer:
        for packet in old:
            replayer.sendto(packet, (far.address, 4500))
        assert near.ping(far.inner, "-W", "1", count=1) == 0, "there is no way back"
        usage = far.ipsec.get_sa(inbound)
        assert (usage.packets, (usage.replay_drops or 0) + (usage.window_drops or 0)) == (1, 2)


def test_nobody_chooses_the_ivs(network: Network, wire: socket.socket) -> None:
    """Why `natcompat tunnel` refuses static keys of counter modes with the backend linux.

    IVs do not follow the sequence numbers, and begin elsewhere whenever the SA is installed.
    """
    near, far = network.initiator, network.responder
    add_policy(near, near, far, Direction.OUT)
    sa = association(near, far, Direction.OUT, **GCM)
    beginnings = []
    for round_ in range(2):
        near.ipsec.add_sa(sa, sequence=1000 * round_)
        (packet,) = first_packets(network, wire, 1)
        assert int.from_bytes(packet[4:8]) == 1000 * round_ + 1
        beginnings.append(int.from_bytes(packet[8:16]) ^ (1000 * round_ + 1))
        near.ipsec.delete_sa(sa.sa_id)
    assert beginnings[0] != beginnings[1]
    assert 0 not in beginnings
