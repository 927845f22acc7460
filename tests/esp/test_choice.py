"""The choice of the data path: NATCOMPAT_DATAPATH, and what is viable here."""

from __future__ import annotations

import errno
import sys
from types import ModuleType

import pytest

from natcompat import NatCompatError
from natcompat.esp import choice as datapaths
from natcompat.esp.device.queue import QueueDevice
from natcompat.esp.userspace import UserspaceIPsec


class TestDataPaths:
    """NATCOMPAT_DATAPATH."""

    def test_python_is_always_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(datapaths.ENVIRONMENT_VARIABLE, "python")
        with UserspaceIPsec(QueueDevice()) as ipsec:
            assert ipsec.datapath == "python"
        last = datapaths.probe()[-1]
        assert (last.name, last.viable) == ("python", True)

    def test_an_unknown_name_is_refused(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(datapaths.ENVIRONMENT_VARIABLE, "fast")
        with pytest.raises(NatCompatError) as caught:
            UserspaceIPsec(QueueDevice())
        assert caught.value.errno == errno.EINVAL
        assert "python" in caught.value.remedy

    def test_the_one_in_c_says_whose_ciphers_it_has(self) -> None:
        (c,) = (each for each in datapaths.probe() if each.name == "c")
        if not c.viable:
            pytest.skip(c.reason)
        with UserspaceIPsec(QueueDevice(), datapath="c") as ipsec:
            assert ipsec.datapath == f"c ({c.ciphers})"
        assert c.ciphers in ("ipsec-mb", "libcrypto")
        assert c.reason.endswith(c.ciphers)

    def test_one_that_cannot_be_loaded_says_so(self, monkeypatch: pytest.MonkeyPatch) -> None:
        gone = ModuleType("natcompat.esp.datapath.native")  # as where a library was removed: its import fails
        monkeypatch.setitem(sys.modules, "natcompat.esp.datapath.native", gone)
        (c,) = (each for each in datapaths.probe() if each.name == "c")
        assert not c.viable
        assert c.reason.startswith("it cannot be loaded: ")

    def test_one_that_does_not_work_here_is_not_replaced(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "natcompat.esp.datapath.native", None)  # as where nothing was built
        with pytest.raises(NatCompatError) as caught:
            UserspaceIPsec(QueueDevice(), datapath="c")
        assert caught.value.errno == errno.ENOTSUP
        assert "`natcompat doctor` tells" in caught.value.remedy
        assert "not built; install natcompat anew where there are a C compiler" in str(caught.value)
        with UserspaceIPsec(QueueDevice(), datapath="auto") as ipsec:
            assert ipsec.datapath == "python"
