"""KEYMAT in the order of RFC 7296, 2.17, for every transform, both roles, and without a trace of keys."""

from __future__ import annotations

import pickle
import traceback
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from natcompat.esp.engine import EspEngine
from natcompat.ike import keymat_length, split_keymat
from natcompat.ipsec import Encr, Integ
from tests.ike.children import Negotiated

INTEGRITIES = [integrity for integrity in Integ if integrity is not Integ.NONE]
TRANSFORMS = [
    (encryption, integrity, (length - encryption.salt_length) * 8)
    for encryption in Encr
    for length in encryption.key_lengths
    for integrity in ([Integ.NONE] if encryption.is_aead else INTEGRITIES)
]


@pytest.mark.parametrize(("encryption", "integrity", "bits"), TRANSFORMS)
def test_each_role_has_the_keys_of_the_other(encryption: Encr, integrity: Integ, bits: int) -> None:
    keymat = bytes(index & 0xFF for index in range(keymat_length(encryption, integrity, bits)))
    initiator = split_keymat(keymat, encryption, integrity, initiator=True, key_bits=bits)
    responder = split_keymat(keymat, encryption, integrity, initiator=False, key_bits=bits)
    assert initiator.outbound_encryption == responder.inbound_encryption
    assert initiator.outbound_integrity == responder.inbound_integrity
    assert initiator.inbound_encryption == responder.outbound_encryption
    assert initiator.inbound_integrity == responder.outbound_integrity
    # SK_ei | SK_ai | SK_er | SK_ar
    assert keymat == (
        initiator.outbound_encryption
        + initiator.outbound_integrity
        + initiator.inbound_encryption
        + initiator.inbound_integrity
    )
    assert len(initiator.outbound_encryption) == bits // 8 + encryption.salt_length
    assert len(initiator.outbound_integrity) == integrity.key_length


@pytest.mark.parametrize(("encryption", "integrity", "bits"), TRANSFORMS)
def test_the_length_says_which_key_length_was_negotiated(
    encryption: Encr, integrity: Integ, bits: int
) -> None:
    keymat = bytes(keymat_length(encryption, integrity, bits))
    keys = split_keymat(keymat, encryption, integrity, initiator=True)
    assert len(keys.inbound_encryption) == bits // 8 + encryption.salt_length


def test_aes_gcm_with_128_bits() -> None:
    """RFC 4106, 8.1: 16 bytes of key and behind them 4 of salt, for each SA."""
    keys = split_keymat(bytes(range(40)), 20, initiator=True, key_bits=128)
    assert keys.outbound_encryption == bytes(range(20))
    assert keys.inbound_encryption == bytes(range(20, 40))
    assert keys.inbound_integrity == b""


def test_aes_cbc_with_hmac_sha1() -> None:
    keys = split_keymat(bytes(range(72)), 12, 2, initiator=False)
    assert keys.inbound_encryption == bytes(range(16))
    assert keys.inbound_integrity == bytes(range(16, 36))
    assert keys.outbound_encryption == bytes(range(36, 52))
    assert keys.outbound_integrity == bytes(range(52, 72))


@pytest.mark.parametrize("length", [0, 39, 41, 80])
def test_another_length_is_refused_and_no_key_is_told(length: int) -> None:
    secret = b"\xa5" * length
    with pytest.raises(ValueError, match=f"{length} bytes; AES_GCM_16 with NONE takes 40") as caught:
        split_keymat(secret, Encr.AES_GCM_16, initiator=True, key_bits=128)
    frames = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    inside = [frame for frame in frames.stack if frame.filename.endswith("natcompat/ike/keymat.py")]
    assert inside
    assert "\\xa5" not in str([frame.locals for frame in inside])


@pytest.mark.parametrize(
    ("encryption", "bits", "words"),
    [
        (Encr.AES_GCM_16, 160, "of 128, 192, 256"),
        (Encr.AES_CBC, 100, "no key of 100 bits"),
        (Encr.AES_CBC, None, "several key lengths"),
        (Encr.CHACHA20_POLY1305, 128, "of 256"),
    ],
)
def test_a_key_length_that_the_transform_does_not_have_is_refused(
    encryption: Encr, bits: int | None, words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        keymat_length(encryption, Integ.NONE, bits)


def test_keys_are_neither_shown_nor_pickled() -> None:
    keys = split_keymat(b"\xa5" * 40, Encr.AES_GCM_16, initiator=True)
    assert "a5" not in repr(keys)
    with pytest.raises(TypeError, match="pickled"):
        pickle.dumps(keys)


@pytest.mark.parametrize("install", [False, True], ids=["split_keymat", "ChildSa.install"])
def test_a_key_of_the_wrong_type_is_not_told(install: bool) -> None:
    """A traceback with local variables, as debuggers and error reporters make it, has no key in it."""
    wrong: Any = "5ec2e7" * 12
    with EspEngine(timer=False) as engine:
        call: Callable[[], object] = partial(split_keymat, wrong, Encr.AES_GCM_16, initiator=True)
        if install:
            call = partial(Negotiated(keymat=wrong).install, engine, near=True)
        with pytest.raises(TypeError, match="bytes are wanted, not str") as caught:
            call()
    frames = traceback.TracebackException.from_exception(caught.value, capture_locals=True)
    inside = [frame for frame in frames.stack if "/natcompat/ike/" in frame.filename]
    assert len(inside) >= 2
    assert "5ec2e7" not in str([frame.locals for frame in inside])
    assert "5ec2e7" not in str(caught.value)
