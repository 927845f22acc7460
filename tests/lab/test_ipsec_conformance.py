"""The kernel's ESP passes the suite that the one of this process has to pass."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from typing import ClassVar

import pytest

from natcompat.ipsec import IPsec, Mode
from natcompat.kernel.xfrm.kernel import XfrmIPsec
from natcompat.testing.ipsec import IPsecConformance, IPsecTrafficConformance
from tests.lab.kernel_esp import KernelEsp
from tests.lab.topology import inside
from tests.support.esp import IN_C, TRANSFORMS

pytestmark = pytest.mark.kernel_esp


def opened() -> XfrmIPsec:
    """Return IPsec of this namespace, empty."""
    subprocess.run(["ip", "xfrm", "state", "flush"], check=True)
    ipsec = XfrmIPsec()
    ipsec.flush_policies()
    ipsec.flush_sas()
    return ipsec


class TestXfrmIPsec(IPsecConformance):
    def open_ipsec(self) -> IPsec:
        return opened()


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelEsp]:
    made = KernelEsp()
    yield made
    made.close()


class TestXfrmTraffic(IPsecTrafficConformance):
    transforms = TRANSFORMS
    shortest: ClassVar = {4: 20, 6: 40}  # the length of an IP header: see tests/lab/test_socket_table.py
    kernel: KernelEsp

    @pytest.fixture(autouse=True)
    def placed(self, kernel: KernelEsp) -> Iterator[None]:
        self.kernel = kernel
        with inside("here"):
            yield

    def open_ipsec(self) -> IPsec:
        return opened()

    def seal(self, ipsec: IPsec, inner: bytes) -> list[bytes]:
        return self.kernel.seal(inner)

    def deliver(self, ipsec: IPsec, packet: bytes, source: tuple[str, int]) -> list[bytes]:
        return self.kernel.deliver(packet, source)


@pytest.mark.parametrize("datapath", ["c"], indirect=True)
@pytest.mark.usefixtures("datapath")
class TestXfrmTrafficWithTheDataPathInC(TestXfrmTraffic):
    """The peer is the engine with the C data path. 32 bits: see tests/lab/test_engine_through_nat.py."""

    transforms = IN_C
    modes = (Mode.TUNNEL,)
    sequences = (True,)
