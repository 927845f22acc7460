"""The kernel's ESP passes the suite that the one of this process has to pass."""

from __future__ import annotations

import subprocess

import pytest

pytest.register_assert_rewrite("natcompat.testing_ipsec")

from natcompat.ipsec import IPsec  # noqa: E402
from natcompat.testing_ipsec import IPsecConformance  # noqa: E402
from natcompat.xfrm.kernel import XfrmIPsec  # noqa: E402

pytestmark = pytest.mark.kernel_esp


class TestXfrmIPsec(IPsecConformance):
    def open_ipsec(self) -> IPsec:
        subprocess.run(["ip", "xfrm", "state", "flush"], check=True)
        ipsec = XfrmIPsec()
        ipsec.flush_policies()
        ipsec.flush_sas()
        return ipsec
