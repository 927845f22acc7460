"""The MTU of a device follows SAs and paths down and up, and a narrow path is not for ever."""

from __future__ import annotations

from typing import Any

from natcompat.esp.carrier.device_mtu import DeviceMtu
from natcompat.esp.carrier.mtu import SMALLEST_DEVICE_MTU, PathMtus
from natcompat.esp.device import QueueDevice
from natcompat.ipsec import Direction, SecurityAssociation
from tests.support.esp import sa


class World:
    """Paths, a device with 1400 bytes, and a clock that goes when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.path_mtu: dict[str, int] = {}
        self.paths = PathMtus(self.path_mtu.get, clock=lambda: self.now)
        self.device = QueueDevice(mtu=1400)
        self.sas: list[SecurityAssociation] = []
        self.mtu = DeviceMtu(self.device, self.paths, lambda: self.sas, lambda: self.now)

    def add(self, destination: str, **changes: Any) -> int:
        added = sa(Direction.OUT, destination=destination, spi=0x1000 + len(self.sas), **changes)
        self.sas.append(added)
        self.mtu.take(added)
        return self.device.mtu

    def close(self) -> None:
        self.mtu.close()
        self.device.close()


def test_a_narrow_path_is_forgotten() -> None:
    """A forged ICMP message makes the device narrow for ten minutes, not for the life of the process."""
    world = World()
    world.path_mtu["192.0.2.2"] = 600
    assert world.add("192.0.2.2") == SMALLEST_DEVICE_MTU
    del world.path_mtu["192.0.2.2"]  # the kernel has forgotten it
    world.now += 5
    assert world.add("192.0.2.2") == SMALLEST_DEVICE_MTU, "the path MTU is believed for its lifetime"
    world.now += world.paths.lifetime
    world.mtu.recover()
    assert world.device.mtu == 1400
    world.close()


def test_a_new_sa_looks_at_the_others_again() -> None:
    world = World()
    world.path_mtu["192.0.2.2"] = 1000
    world.add("192.0.2.2")
    world.path_mtu.clear()
    world.now += world.paths.lifetime + 1
    assert world.add("192.0.2.3") == 1400
    world.close()


def test_a_path_that_is_narrow_stays_so_for_the_others() -> None:
    world = World()
    world.path_mtu["192.0.2.2"] = 1380
    narrow = world.add("192.0.2.2")
    assert SMALLEST_DEVICE_MTU < narrow < 1400
    world.now += 5
    assert world.add("192.0.2.3") == narrow
    world.sas.pop(0)
    world.mtu.recover()
    assert world.device.mtu == 1400
    world.close()


def test_nothing_is_looked_at_for_every_sa() -> None:
    """A thousand new SAs in a moment cost one look at all."""
    world = World()
    world.path_mtu["192.0.2.2"] = 1380
    world.add("192.0.2.2")
    looks = 0

    def count() -> list[SecurityAssociation]:
        nonlocal looks
        looks += 1
        return world.sas

    world.mtu = DeviceMtu(world.device, world.paths, count, lambda: world.now)
    world.device.mtu = 1400
    world.mtu = DeviceMtu(world.device, world.paths, count, lambda: world.now)
    for _ in range(1000):
        world.add("192.0.2.2")
    assert looks <= 1
    world.close()
