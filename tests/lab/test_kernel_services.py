"""What the kernel does for SAs besides RFC 4301: marks, old transforms, and what this one refuses, whole."""

from __future__ import annotations

import dataclasses
import errno
import subprocess
from ipaddress import ip_address

import pytest

from natcompat.ipsec import (
    Direction,
    Encr,
    HardwareOffload,
    Integ,
    Mark,
    Policy,
    SecurityAssociation,
)
from natcompat.kernel.xfrm.kernel import XfrmIPsec
from natcompat.kernel.xfrm.probe import probe_attributes
from tests.lab.making import SELECTOR, make, refused

pytestmark = pytest.mark.kernel_esp


def only(ipsec: XfrmIPsec) -> SecurityAssociation:
    (found,) = ipsec.list_sas()
    assert found.association is not None
    return found.association


@pytest.mark.parametrize(
    "mark", [Mark(value=5), Mark(value=0x20, mask=0xF0), Mark(value=0, mask=0xFF)], ids=str
)
@pytest.mark.parametrize("direction", list(Direction), ids=lambda value: value.value)
def test_output_marks(ipsec: XfrmIPsec, direction: Direction, mark: Mark) -> None:
    assert probe_attributes().output_mark
    sa = make(direction=direction, output_mark=mark)
    ipsec.add_sa(sa)
    assert only(ipsec).output_mark == mark
    moved = ipsec.update_sa(sa.sa_id, source="192.0.2.7")
    assert only(ipsec) == dataclasses.replace(
        sa, source=ip_address("192.0.2.7"), replay_window=only(ipsec).replay_window
    )
    assert ipsec.get_sa(moved).packets == 0


@pytest.mark.parametrize("packet", [False, True], ids=["crypto", "packet"])
@pytest.mark.parametrize("direction", list(Direction), ids=lambda value: value.value)
def test_a_card_that_cannot(ipsec: XfrmIPsec, direction: Direction, packet: bool) -> None:
    """The kernel would do the work itself in silence, or refuse; here it is refused, and nothing stays."""
    subprocess.run(["modprobe", "-a", "esp4_offload", "esp6_offload"], check=False)
    offload = HardwareOffload(interface="lo", packet=packet)
    error = refused(ipsec.add_sa, make(direction=direction, hw_offload=offload))
    assert error.errno in (errno.EOPNOTSUPP, errno.EINVAL)
    assert error.remedy
    assert ipsec.list_sas() == []
    unknown = HardwareOffload(interface="nosuchcard", packet=packet)
    assert refused(ipsec.add_sa, make(direction=direction, hw_offload=unknown)).errno == errno.ENODEV
    spi = ipsec.allocate_spi("192.0.2.1", "192.0.2.2")
    assert refused(ipsec.add_sa, make(spi, direction=direction, hw_offload=offload)).errno == error.errno
    assert ipsec.add_sa(make(spi, direction=direction)).spi == spi


def test_policies_of_a_card_that_cannot(ipsec: XfrmIPsec) -> None:
    policy = Policy(
        direction=Direction.OUT,
        selector=SELECTOR,
        source="192.0.2.1",
        destination="192.0.2.2",
        hw_offload=HardwareOffload(interface="lo", packet=True),
    )
    assert refused(ipsec.add_policy, policy).errno in (errno.EOPNOTSUPP, errno.EINVAL)
    assert ipsec.list_policies() == []


def test_sas_of_processors(ipsec: XfrmIPsec) -> None:
    """Installed where the kernel has them (6.13), refused where it would ignore the attribute."""
    sa = make(cpu=0)
    if probe_attributes().cpu:
        ipsec.add_sa(sa)
        assert only(ipsec).cpu == 0
    else:
        error = refused(ipsec.add_sa, sa)
        assert (error.errno, ipsec.list_sas()) == (errno.EOPNOTSUPP, [])


@pytest.mark.parametrize(
    ("encryption", "integrity"),
    [
        (Encr.TRIPLE_DES_CBC, Integ.HMAC_SHA2_256_128),
        (Encr.CAMELLIA_CBC, Integ.HMAC_SHA2_256_128),
        (Encr.AES_CBC, Integ.HMAC_MD5_96),
        (Encr.AES_CBC, Integ.HMAC_SHA2_256_96),
    ],
    ids=lambda transform: transform.name,
)
def test_old_transforms(ipsec: XfrmIPsec, encryption: Encr, integrity: Integ) -> None:
    sa = make(
        encryption=encryption,
        encryption_key=bytes(range(1, encryption.key_lengths[0] + 1)),
        integrity=integrity,
        integrity_key=bytes(range(integrity.key_length)),
    )
    error = refused(ipsec.add_sa, sa)
    assert error.errno == errno.EPROTONOSUPPORT
    assert "legacy=True" in error.remedy
    assert ipsec.list_sas() == []
    ipsec.add_sa(sa, legacy=True)
    assert (only(ipsec).encryption, only(ipsec).integrity) == (encryption, integrity)
    transforms = ipsec.transforms()
    assert not any(transform.is_legacy for transform in transforms.encryption)
    assert not any(transform.is_legacy for transform in transforms.integrity)
