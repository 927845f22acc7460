"""Devices that are told which SA brought a packet."""

from __future__ import annotations

from dataclasses import replace

import pytest

from natcompat.esp.device import QueueDevice, SaDevice
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.results import Reason
from natcompat.esp.userspace import UserspaceIPsec
from natcompat.ipsec import Direction, SecurityAssociation
from tests.support.esp import INNER, ip_packet, only, policy, sa, udp


class BySa(QueueDevice):
    """Keeps packets by the SPI that brought them, two of each."""

    def __init__(self) -> None:
        super().__init__()
        self.delivered: dict[int, list[bytes]] = {}

    def deliver(self, packet: bytes, sa: SecurityAssociation) -> bool:
        packets = self.delivered.setdefault(sa.spi, [])
        packets.append(packet)
        return len(packets) <= 2


@pytest.mark.parametrize("datapath", ["auto", "python"])
def test_a_device_is_told_the_sa_of_every_packet(datapath: str) -> None:
    """Two clients behind one NAT with the same inner address: only the SA tells them apart."""
    assert isinstance(BySa(), SaDevice)
    assert not isinstance(QueueDevice(), SaDevice)
    device = BySa()
    packet = ip_packet(*INNER[4][::-1], udp(b"from a client"))
    with UserspaceIPsec(device, datapath=datapath) as ipsec:
        ipsec.add_policy(policy(Direction.IN))
        for spi in (0x1001, 0x1002):
            inbound = sa(Direction.IN, spi=spi, encryption_key=spi.to_bytes(20))
            ipsec.add_sa(inbound)
            with EspEngine() as client:
                client.add_sa(replace(inbound, direction=Direction.OUT))
                client.add_policy(replace(policy(Direction.IN), direction=Direction.OUT))
                sealed = [only(client.seal(packet))[0] for _ in range(3)]
            ipsec.inbound([(memoryview(octets), ("198.51.100.1", 4500)) for octets in sealed])
        assert device.delivered == {0x1001: [packet] * 3, 0x1002: [packet] * 3}
        assert ipsec.counters() == {Reason.DEVICE: 2}, "what the device drops is counted"
    assert device.receive() == []
