"""The conformance suite over PF_KEY of the systems that cannot run here: against models of their kernels."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace as with_changes
from ipaddress import ip_address
from typing import Any, ClassVar

import pytest

from natcompat.ipsec import Action, Encr, Integ, IPsec, Mode, Policy, UDPEncapsulation
from natcompat.kernel import pfkey
from natcompat.kernel.pfkey import transport
from natcompat.kernel.pfkey.dialects import DIALECTS
from natcompat.kernel.pfkey.kernel import PfKeyIPsec
from natcompat.testing.ipsec import IPsecConformance
from natcompat.testing.ipsec.harness import keys
from tests.kernel.pfkey import layouts
from tests.kernel.pfkey.model import ModelKernel

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the sockets of the models are Linux's")

GCM = (Encr.AES_GCM_16, Integ.NONE)
CBC = (Encr.AES_CBC, Integ.HMAC_SHA2_256_128)
NULL = (Encr.NULL, Integ.HMAC_SHA2_512_256)


class OverModel(IPsecConformance):
    """What the models have in common."""

    system: ClassVar[layouts.System]
    transforms: ClassVar[Sequence[tuple[Encr, Integ]]] = (GCM, CBC, NULL)
    sequences: ClassVar[Sequence[bool]] = (False,)
    versions: ClassVar[Sequence[int]] = (4,)
    moves_ports = False
    moves = False
    counts = False

    test_bypass = None  # type: ignore[assignment]  # on sockets of the OS; the calls are in test_golden

    @pytest.fixture(autouse=True)
    def model(self, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelKernel]:
        kernel = ModelKernel(self.system)
        monkeypatch.setattr(transport, "open_socket", kernel.open)
        yield kernel
        kernel.close()

    def open_ipsec(self) -> IPsec:
        return pfkey.open_ipsec(self.system.name)


class TestFreeBSD(OverModel):
    system = layouts.FREEBSD
    sequences = (False, True)
    moves_ports = moves = True

    test_a_move_to_a_name_that_is_taken = None  # type: ignore[assignment]  # an SPI is taken once in the system


class TestNetBSD(OverModel):
    system = layouts.NETBSD


class TestMacOS(OverModel):
    system = layouts.MACOS
    versions = (4, 6)


class TestOpenBSD(OverModel):
    system = layouts.OPENBSD
    sequences = (False, True)
    versions = (4, 6)
    moves_ports = moves = True


class OnTunnelInterface(PfKeyIPsec):
    """Solaris has tunnel policies for tunnel interfaces only."""

    def add_policy(self, policy: Policy, *, replace: bool = False) -> None:
        if policy.mode is Mode.TUNNEL and policy.action is not Action.BYPASS:
            policy = with_changes(policy, interface_id=3)
        super().add_policy(policy, replace=replace)

    def delete_policy(self, policy: Policy) -> None:
        super().delete_policy(with_changes(policy, interface_id=3))


class TestSolaris(OverModel):
    system = layouts.SOLARIS
    refuses_a_second_policy = False
    common: ClassVar[Mapping[str, Any]] = {
        **keys(*GCM, length=20),
        "encapsulation": UDPEncapsulation(
            local_port=4500, remote_port=4500, original_address=ip_address("10.9.9.9")
        ),
    }

    def open_ipsec(self) -> IPsec:
        return OnTunnelInterface(DIALECTS["solaris"])
