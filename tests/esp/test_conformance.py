"""The ESP of this process passes the suite that the kernel's has to pass."""

from __future__ import annotations

import pytest

from natcompat import open_ipsec
from natcompat.esp.device.queue import QueueDevice
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.results import Dropped, Opened
from natcompat.esp.userspace import UserspaceIPsec
from natcompat.ipsec import IPsec
from natcompat.testing.ipsec import IPsecConformance, IPsecTrafficConformance
from tests.support.esp import TRANSFORMS

pytestmark = pytest.mark.usefixtures("datapath")


class TestEspEngine(IPsecConformance):
    transforms = TRANSFORMS

    def open_ipsec(self) -> IPsec:
        return EspEngine()


class TestTheEspOfTheProcess(TestEspEngine):
    """With a device and a carrier, as a daemon has it."""

    def open_ipsec(self) -> IPsec:
        return open_ipsec("userspace", device=QueueDevice())

    def test_its_data_path(self, datapath: str) -> None:
        with self.opened() as ipsec:
            assert isinstance(ipsec, UserspaceIPsec)
            assert ipsec.datapath.split()[0] == datapath


class TestEspEngineTraffic(IPsecTrafficConformance):
    def open_ipsec(self) -> IPsec:
        return EspEngine()

    def seal(self, ipsec: IPsec, inner: bytes) -> list[bytes]:
        assert isinstance(ipsec, EspEngine)
        sealed = ipsec.seal(inner)
        return [] if isinstance(sealed, Dropped) else [packet for packet, _ in sealed]

    def deliver(self, ipsec: IPsec, packet: bytes, source: tuple[str, int]) -> list[bytes]:
        assert isinstance(ipsec, EspEngine)
        opened = ipsec.open(packet, source)
        return [opened.inner] if isinstance(opened, Opened) else []


class TestTheTrafficOfTheProcess(TestEspEngineTraffic):
    def open_ipsec(self) -> IPsec:
        return open_ipsec("userspace", device=QueueDevice())
