"""A kernel without ESP, or without XFRM, refuses in one clear sentence and keeps nothing."""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import itertools
import os
import socket
import sys
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("XFRM is the IPsec of Linux", allow_module_level=True)

from natcompat.errors import NatCompatError
from natcompat.ipsec import Direction, Encr, Integ, Key, Mode, SecurityAssociation, UDPEncapsulation
from natcompat.kernel.xfrm.esp_support import EspSupport
from natcompat.kernel.xfrm.kernel import XfrmIPsec
from natcompat.kernel.xfrm.probe import probe_esp

CLONE_NEWNET = 0x40000000  # linux/sched.h

PORTS = UDPEncapsulation(local_port=4500, remote_port=34567)

SA = SecurityAssociation(
    spi=0xC0DE0001,
    source="192.0.2.1",
    destination="192.0.2.2",
    direction=Direction.OUT,
    encryption=Encr.AES_GCM_16,
    encryption_key=bytes(range(20)),
)


def in_a_namespace(function: Any) -> Any:
    """Run `function` in a forked child with a network of its own; return the text that it returned."""
    readable, writable = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "unshare")
            os.write(writable, str(function()).encode())
        finally:
            os._exit(0)
    os.close(writable)
    with os.fdopen(readable, encoding="utf-8") as stream:
        answer = stream.read()
    os.waitpid(child, 0)
    return answer


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a network namespace, which takes root")
def test_missing_esp_names_the_module() -> None:
    if probe_esp("rfc4106(gcm(aes))", "").support not in (EspSupport.NO_ESP, EspSupport.NO_ALGORITHM):
        pytest.skip("this kernel has ESP")

    def attempt() -> list[Any]:
        with XfrmIPsec() as ipsec:
            try:
                ipsec.add_sa(SA)
            except NatCompatError as error:
                return [error.errno, error.remedy, ipsec.list_sas()]
        return []

    answer = in_a_namespace(attempt)
    assert answer.endswith(", []]")
    assert any(f"[{code}, " in answer for code in (errno.EPROTONOSUPPORT, errno.ENOSYS))
    assert "esp4" in answer or "gcm" in answer


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a network namespace, which takes root")
def test_a_larval_sa_needs_no_esp() -> None:
    if probe_esp().support is EspSupport.NO_XFRM:
        pytest.skip("this kernel has no XFRM")

    def attempt() -> list[Any]:
        with XfrmIPsec() as ipsec:
            spi = ipsec.allocate_spi("192.0.2.1", "192.0.2.2", reqid=3, minimum=4096, maximum=8191)
            (larval,) = ipsec.list_sas()
            return [4096 <= spi <= 8191, larval.larval, larval.sa_id.spi == spi]

    assert in_a_namespace(attempt) == "[True, True, True]"


@pytest.mark.skipif(os.geteuid() != 0, reason="makes a network namespace, which takes root")
def test_the_kernel_finds_nothing_wrong_but_that_it_has_no_esp() -> None:
    """Also with the attributes of newer kernels: direction, keepalive. What they forbid is not sent."""
    if probe_esp().support is not EspSupport.NO_ESP:
        pytest.skip("this kernel is not without ESP")

    def attempt() -> set[Any]:
        answers: set[Any] = set()
        with XfrmIPsec() as ipsec:
            for direction, esn, window, ports, mode, copy in itertools.product(
                Direction, (False, True), (1, 32, 64, 1024), (None, PORTS), Mode, (False, True)
            ):
                sa = dataclasses.replace(
                    SA,
                    direction=direction,
                    mode=mode,
                    esn=esn,
                    replay_window=window,
                    encapsulation=ports,
                    encryption=Encr.AES_CBC,
                    encryption_key=Key(bytes(16)),
                    integrity=Integ.HMAC_SHA2_256_128,
                    integrity_key=Key(bytes(32)),
                    nat_keepalive=20 if ports and direction is Direction.OUT else None,
                    tfc=1000 if mode is Mode.TUNNEL else 0,
                    copy_dscp=copy,
                    copy_ecn=copy,
                    copy_df=copy,
                )
                try:
                    ipsec.add_sa(sa)
                except NatCompatError as error:
                    answers.add((error.errno, (error.strerror or "").split(": ")[1]))
        return answers

    assert in_a_namespace(attempt) == str({(errno.EPROTONOSUPPORT, "Requested type not found")})


def test_a_kernel_without_xfrm(monkeypatch: pytest.MonkeyPatch) -> None:
    real = socket.socket

    def refuse(family: int = -1, *arguments: Any, **options: Any) -> socket.socket:
        if family == socket.AF_NETLINK:
            raise OSError(errno.EPROTONOSUPPORT, "Protocol not supported")
        return real(family, *arguments, **options)

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(NatCompatError) as caught:
        XfrmIPsec()
    assert caught.value.errno == errno.EPROTONOSUPPORT
    assert "xfrm_user" in caught.value.remedy
