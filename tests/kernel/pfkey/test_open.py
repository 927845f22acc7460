"""Who opens IPsec over PF_KEY, and what is said where that cannot be."""

from __future__ import annotations

import errno
import socket
import sys

import pytest

from natcompat.backends.linux import MAPPING_VARIABLE, LinuxBackend
from natcompat.errors import NatCompatError
from natcompat.kernel import pfkey
from natcompat.kernel.pfkey.dialects import DIALECTS


def refused(dialect: str) -> NatCompatError:
    with pytest.raises(NatCompatError) as caught:
        pfkey.open_ipsec(dialect)
    return caught.value


def test_dialects_are_asked_for_by_name() -> None:
    error = refused("plan9")
    assert error.errno == errno.EINVAL
    assert all(name in error.remedy for name in DIALECTS)


@pytest.mark.parametrize("name", DIALECTS)
def test_the_remedy_names_the_privilege(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def without_privilege(family: int, kind: int, protocol: int) -> socket.socket:
        assert (family, kind, protocol) == (DIALECTS[name].family, socket.SOCK_RAW, 2)
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(socket, "socket", without_privilege)
    error = refused(name)
    assert error.errno == errno.EPERM
    assert error.remedy == DIALECTS[name].privilege
    wanted = {"linux": "CAP_NET_ADMIN", "solaris": "sys_ip_config"}.get(name, "root")
    assert wanted in error.remedy


@pytest.mark.parametrize("name", DIALECTS)
def test_a_kernel_without_it(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: int) -> socket.socket:
        raise OSError(errno.EAFNOSUPPORT, "Address family not supported by protocol")

    monkeypatch.setattr(socket, "socket", unknown)
    error = refused(name)
    assert error.errno == errno.EAFNOSUPPORT
    assert ("af_key" in error.remedy) == (name == "linux")


@pytest.mark.skipif(sys.platform != "linux", reason="the choice is Linux's")
def test_the_environment_chooses_the_mapping(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(pfkey, "open_ipsec", asked.append)
    monkeypatch.setenv(MAPPING_VARIABLE, "pfkey")
    LinuxBackend().open_ipsec()
    assert asked == ["linux"]
    monkeypatch.setenv(MAPPING_VARIABLE, "carrier pigeon")
    with pytest.raises(NatCompatError, match="carrier pigeon") as caught:
        LinuxBackend().open_ipsec()
    assert caught.value.errno == errno.EINVAL
    assert "auto, xfrm, pfkey" in caught.value.remedy


@pytest.mark.skipif(sys.platform != "linux", reason="the choice is Linux's")
@pytest.mark.parametrize("value", ["", "auto", "xfrm"])
def test_xfrm_is_what_linux_has(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from natcompat.kernel.xfrm import kernel

    monkeypatch.setenv(MAPPING_VARIABLE, value)
    monkeypatch.setattr(kernel, "XfrmIPsec", lambda: "XFRM")
    assert LinuxBackend().open_ipsec() == "XFRM"  # type: ignore[comparison-overlap]
