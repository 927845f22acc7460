"""The kernel's ESP passes the suite over af_key, too, as far as af_key can say what the suite asks for."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest

from natcompat.backends.linux import MAPPING_VARIABLE, LinuxBackend
from natcompat.ipsec import Encr, Integ, IPsec
from natcompat.pfkey.kernel import PfKeyIPsec
from natcompat.testing_ipsec import IPsecConformance
from natcompat.testing_ipsec.harness import keys

pytestmark = pytest.mark.kernel_esp

COMMON = {**keys(Encr.AES_CBC, Integ.HMAC_SHA2_384_192), "replay_window": 32}


class TestPfKeyIPsec(IPsecConformance):
    transforms = (
        (Encr.AES_CBC, Integ.HMAC_SHA1_96),
        (Encr.AES_CBC, Integ.AES_XCBC_96),
        (Encr.AES_CTR, Integ.HMAC_SHA2_384_192),
        (Encr.NULL, Integ.HMAC_SHA2_512_256),
    )
    common: ClassVar[Mapping[str, Any]] = COMMON
    sequences = (False,)
    moves = False
    cross_family = False
    counts = False

    @pytest.fixture(autouse=True)
    def _by_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(MAPPING_VARIABLE, "pfkey")

    def open_ipsec(self) -> IPsec:
        subprocess.run(["ip", "xfrm", "state", "flush"], check=True)
        ipsec = LinuxBackend().open_ipsec()
        assert isinstance(ipsec, PfKeyIPsec)
        ipsec.flush_policies()
        ipsec.flush_sas()
        return ipsec
