"""The numbers of IKEv1, against the registry of ISAKMP."""

from __future__ import annotations

import pytest

from natcompat.ike import Verdict, add_marker, ikev1, split_marker
from natcompat.ipsec import Encr, Integ, Lifetime, Mode


@pytest.mark.parametrize(
    ("number", "transform"),
    [
        (11, Encr.NULL),
        (12, Encr.AES_CBC),
        (13, Encr.AES_CTR),
        (14, Encr.AES_CCM_8),
        (16, Encr.AES_CCM_16),
        (18, Encr.AES_GCM_8),
        (20, Encr.AES_GCM_16),
        (23, Encr.NULL_AUTH_AES_GMAC),
    ],
)
def test_esp_transforms(number: int, transform: Encr) -> None:
    assert ikev1.encryption(number) is transform
    assert ikev1.transform_id(transform) == number


@pytest.mark.parametrize(
    ("number", "transform"),
    [
        (None, Integ.NONE),
        (2, Integ.HMAC_SHA1_96),
        (5, Integ.HMAC_SHA2_256_128),
        (6, Integ.HMAC_SHA2_384_192),
        (7, Integ.HMAC_SHA2_512_256),
        (9, Integ.AES_XCBC_96),
    ],
)
def test_authentication_algorithms(number: int | None, transform: Integ) -> None:
    assert ikev1.integrity(number) is transform
    assert ikev1.authentication_algorithm(transform) == number


@pytest.mark.parametrize("number", [0, 1, 2, 17, 21, 28, 255])
def test_transforms_that_are_not_supported_are_refused(number: int) -> None:
    with pytest.raises(ValueError, match=f"ESP transform {number} of IKEv1"):
        ikev1.encryption(number)


def test_what_ikev1_has_no_number_for_is_refused() -> None:
    with pytest.raises(ValueError, match="CHACHA20_POLY1305"):
        ikev1.transform_id(Encr.CHACHA20_POLY1305)
    with pytest.raises(ValueError, match="AES_CMAC_96"):
        ikev1.authentication_algorithm(Integ.AES_CMAC_96)
    with pytest.raises(ValueError, match="authentication algorithm 3"):
        ikev1.integrity(3)


@pytest.mark.parametrize(("mode", "udp"), [(mode, udp) for mode in Mode for udp in (False, True)])
def test_encapsulation_modes(mode: Mode, udp: bool) -> None:
    assert ikev1.encapsulation_mode(ikev1.encapsulation_mode_value(mode, udp)) == (mode, udp)


def test_the_modes_of_the_drafts() -> None:
    assert ikev1.encapsulation_mode(61443) == (Mode.TUNNEL, True)
    assert ikev1.encapsulation_mode(61444) == (Mode.TRANSPORT, True)
    with pytest.raises(ValueError, match="encapsulation mode 5"):
        ikev1.encapsulation_mode(5)


def test_lifetimes() -> None:
    assert ikev1.lifetime(seconds=3600, kilobytes=1000) == Lifetime(
        soft_seconds=3240, hard_seconds=3600, soft_bytes=921600, hard_bytes=1024000
    )
    assert ikev1.lifetime() == Lifetime()
    assert ikev1.lifetime(seconds=1) == Lifetime(soft_seconds=1, hard_seconds=1)
    with pytest.raises(ValueError, match="rekey_at"):
        ikev1.lifetime(seconds=1, rekey_at=1.5)


@pytest.mark.parametrize(
    ("payload", "verdict", "content"),
    [
        (bytes(4) + b"message", Verdict.IKE, b"message"),
        (bytes(4), Verdict.IKE, b""),
        (b"\1\2\3\4ESP", Verdict.ESP, b"\1\2\3\4ESP"),
        (b"\xff", Verdict.KEEPALIVE, b"\xff"),
        (b"", Verdict.RUNT, b""),
    ],
)
def test_the_marker(payload: bytes, verdict: Verdict, content: bytes) -> None:
    for form in (payload, bytearray(payload), memoryview(payload)):
        assert split_marker(form) == (verdict, content)
    if verdict is Verdict.IKE:
        assert add_marker(content) == payload
