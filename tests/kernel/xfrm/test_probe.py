"""The dry run tells the truth about this kernel, and leaves no trace."""

import errno
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest

from natcompat.kernel.xfrm import probe
from natcompat.kernel.xfrm.esp_support import EspSupport, XfrmAttributes
from natcompat.kernel.xfrm.probe import probe_esp, probe_esp_unprivileged
from tests.support.running import becomes_nobody

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="XFRM is the IPsec of Linux")

FAMILIES = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
ALGORITHMS = pytest.mark.parametrize(
    ("encryption", "integrity"),
    [("cbc(aes)", "hmac(sha256)"), ("rfc4106(gcm(aes))", ""), ("ecb(cipher_null)", "hmac(sha1)")],
)


def as_nobody(function: Callable[[], Any]) -> Any:
    """Run `function` in a forked child without any privilege; return what it returned, through JSON."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
            os.write(writable, json.dumps(function()).encode())
        finally:
            os._exit(0)
    os.close(writable)
    with os.fdopen(readable, "rb") as stream:
        answer = stream.read()
    os.waitpid(child, 0)
    return json.loads(answer)


def has_privilege() -> bool:
    return probe_esp().support is not EspSupport.NO_PRIVILEGE


@FAMILIES
@ALGORITHMS
def test_answers_with_a_sentence(family: int, encryption: str, integrity: str) -> None:
    found = probe_esp(encryption, integrity, family=family)
    assert found.support is not EspSupport.UNKNOWN, found
    assert found.reason.endswith(".")
    assert bool(found) == (found.support is EspSupport.AVAILABLE) == (not found.remedy)


@FAMILIES
def test_both_probes_agree(family: int) -> None:
    if not has_privilege():
        pytest.skip("the dry run needs CAP_NET_ADMIN")
    assert bool(probe_esp(family=family)) == bool(probe_esp_unprivileged(family))


@becomes_nobody
def test_attributes_are_known_from_the_kernels_that_brought_them_on() -> None:
    found = probe.probe_attributes()
    assert found.errno == 0
    release = tuple(map(int, os.uname().release.split("-")[0].split("+")[0].split(".")[:2]))
    assert found.sa_direction or release < (6, 10)
    assert found.keepalive or release < (6, 11)
    assert found.output_mark or release < (4, 19)
    assert found.hw_offload or release < (4, 11)
    assert found.cpu or release < (6, 13)


@becomes_nobody
def test_an_attribute_that_no_kernel_knows_is_not_known(monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(
        ("SA_DIR", "NAT_KEEPALIVE_INTERVAL", "SET_MARK_MASK", "OFFLOAD_DEV", "SA_PCPU"), 1000
    ):
        monkeypatch.setattr(probe, f"XFRMA_{name}", number)
    assert probe.probe_attributes() == XfrmAttributes(
        sa_direction=False, keepalive=False, output_mark=False, hw_offload=False, cpu=False
    )


@becomes_nobody
def test_attributes_are_not_told_without_privilege() -> None:
    found = as_nobody(lambda: [getattr(probe.probe_attributes(), name) for name in ("keepalive", "errno")])
    assert found == [None, errno.EPERM]


def test_says_which_module_is_missing() -> None:
    found = probe_esp(family=socket.AF_INET6)
    if found.support is not EspSupport.NO_ESP:
        pytest.skip(f"this kernel is not without ESP: {found.reason}")
    assert found.kernel_text == "Requested type not found"
    assert "esp6" in found.remedy


def test_an_algorithm_that_nobody_has() -> None:
    if not has_privilege():
        pytest.skip("the dry run needs CAP_NET_ADMIN")
    expected = EspSupport.NO_ALGORITHM if probe_esp() else probe_esp().support
    assert probe_esp("rot13(caesar)", "").support is expected


@becomes_nobody
def test_without_privilege() -> None:
    found = as_nobody(lambda: [probe_esp().support.value, probe_esp().remedy, probe_esp().errno])
    assert found[0] == "no privilege"
    assert "CAP_NET_ADMIN" in found[1]
    assert found[2] == 1


@becomes_nobody
@FAMILIES
def test_the_unprivileged_probe_needs_no_privilege(family: int) -> None:
    assert as_nobody(lambda: probe_esp_unprivileged(family).support.value) == (
        probe_esp_unprivileged(family).support.value
    )


def test_nothing_is_installed_and_nobody_notified() -> None:
    if not has_privilege():
        pytest.skip("the dry run needs CAP_NET_ADMIN")
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, probe.NETLINK_XFRM) as listener:
        listener.bind((0, 0x7FFF_FFFF & ~0x40))  # every group
        listener.setblocking(False)
        probe_esp()
        probe_esp("rfc4106(gcm(aes))", "", family=socket.AF_INET6)
        with pytest.raises(BlockingIOError):
            listener.recv(4096)


@pytest.mark.parametrize("error", [1, 13, 93, 97], ids=["EPERM", "EACCES", "EPROTONOSUPPORT", "EAFNOSUPPORT"])
def test_a_kernel_without_xfrm(monkeypatch: pytest.MonkeyPatch, error: int) -> None:
    def refuse(*_: object) -> socket.socket:
        raise OSError(error, os.strerror(error))

    monkeypatch.setattr(socket, "socket", refuse)
    found = probe_esp()
    assert found.support is EspSupport.NO_XFRM
    assert found.errno == error
    assert found.remedy


@pytest.mark.parametrize("key_bits", [-1, 1 << 40], ids=["negative", "huge"])
def test_never_raises(key_bits: int) -> None:
    assert probe_esp(key_bits=key_bits).support is not EspSupport.AVAILABLE


def test_imports_no_pyroute2() -> None:
    script = "import natcompat.kernel.xfrm.probe, sys; assert not [m for m in sys.modules if 'pyroute2' in m]"
    subprocess.run([sys.executable, "-c", script], check=True)
