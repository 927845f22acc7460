"""The ESP of this process passes the suite that the kernel's has to pass."""

from __future__ import annotations

import pytest

pytest.register_assert_rewrite("natcompat.testing_ipsec")

from natcompat.esp.engine import EspEngine  # noqa: E402
from natcompat.esp.results import Dropped, Opened  # noqa: E402
from natcompat.ipsec import IPsec  # noqa: E402
from natcompat.testing_ipsec import IPsecConformance, IPsecTrafficConformance  # noqa: E402
from tests.esp.making import TRANSFORMS  # noqa: E402

pytestmark = pytest.mark.usefixtures("datapath")


class TestEspEngine(IPsecConformance):
    transforms = TRANSFORMS

    def open_ipsec(self) -> IPsec:
        return EspEngine()


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
