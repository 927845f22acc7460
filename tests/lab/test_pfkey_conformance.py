"""The kernel's ESP passes the suites over af_key, too, as far as af_key can say what they ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import pytest

from natcompat.backends.linux import MAPPING_VARIABLE, LinuxBackend
from natcompat.ipsec import Encr, Integ, IPsec
from natcompat.kernel.pfkey.kernel import PfKeyIPsec
from natcompat.testing.ipsec import IPsecConformance, IPsecHarness, IPsecTrafficConformance
from natcompat.testing.ipsec.harness import keys
from tests.lab.kernel_esp import KernelEsp
from tests.lab.topology import inside

pytestmark = pytest.mark.kernel_esp


class OverAfKey(IPsecHarness):
    """What af_key can say."""

    transforms: ClassVar[Sequence[tuple[Encr, Integ]]] = (
        (Encr.AES_CBC, Integ.HMAC_SHA1_96),
        (Encr.AES_CTR, Integ.HMAC_SHA2_384_192),
        (Encr.NULL, Integ.HMAC_SHA2_512_256),
    )
    common: ClassVar[Mapping[str, Any]] = {
        **keys(Encr.AES_CBC, Integ.HMAC_SHA2_384_192),
        "replay_window": 32,
    }
    sequences = (False,)
    windows = (32,)
    moves = False
    cross_family = False
    pads = False
    counts = False

    @pytest.fixture(autouse=True)
    def by_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(MAPPING_VARIABLE, "pfkey")

    def open_ipsec(self) -> IPsec:
        ipsec = LinuxBackend().open_ipsec()
        assert isinstance(ipsec, PfKeyIPsec)
        ipsec.flush_policies()
        ipsec.flush_sas()
        return ipsec


class TestPfKeyIPsec(OverAfKey, IPsecConformance):
    transforms = (*OverAfKey.transforms, (Encr.AES_CBC, Integ.AES_XCBC_96))


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelEsp]:
    made = KernelEsp()
    yield made
    made.close()


class TestPfKeyTraffic(OverAfKey, IPsecTrafficConformance):
    shortest: ClassVar = {4: 20, 6: 40}  # the length of an IP header: see tests/lab/test_socket_table.py
    kernel: KernelEsp

    @pytest.fixture(autouse=True)
    def placed(self, kernel: KernelEsp) -> Iterator[None]:
        self.kernel = kernel
        with inside("here"):
            yield

    def seal(self, ipsec: IPsec, inner: bytes) -> list[bytes]:
        return self.kernel.seal(inner)

    def deliver(self, ipsec: IPsec, packet: bytes, source: tuple[str, int]) -> list[bytes]:
        return self.kernel.deliver(packet, source)
