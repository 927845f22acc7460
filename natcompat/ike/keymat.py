"""KEYMAT, the key material of a CHILD_SA, divided into the keys of its two SAs."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NoReturn, SupportsIndex

from natcompat.ipsec import Encr, Integ, Key

_NO_KEY: Final = Key()


@dataclass(frozen=True, slots=True)
class ChildKeys:
    """The keys of the two SAs of a CHILD_SA, named as this host uses them. `repr()` shows none of them."""

    inbound_encryption: Key = field(repr=False)
    """Encryption key of the inbound SA, with its salt at the end."""
    inbound_integrity: Key = field(repr=False)
    """Integrity key of the inbound SA; empty for an AEAD."""
    outbound_encryption: Key = field(repr=False)
    outbound_integrity: Key = field(repr=False)

    def __reduce_ex__(self, _: SupportsIndex) -> NoReturn:
        raise TypeError("keys are not pickled by accident")


def keymat_length(
    encryption: Encr | int, integrity: Integ | int = Integ.NONE, key_bits: int | None = None
) -> int:
    """Return how many bytes of KEYMAT a CHILD_SA takes, for both directions.

    `key_bits` is the Key Length attribute of the encryption transform, which counts bits without the
    salt (RFC 7296, 3.3.5). None is for transforms with one key length. ValueError: the transform has no
    such key length.
    """
    return 2 * (_encryption_length(Encr(encryption), key_bits) + Integ(integrity).key_length)


def split_keymat(
    keymat: bytes | bytearray | memoryview,
    encryption: Encr | int,
    integrity: Integ | int = Integ.NONE,
    *,
    initiator: bool,
    key_bits: int | None = None,
) -> ChildKeys:
    """Divide `keymat` into the four keys of a CHILD_SA.

    The keys of the SA from the initiator to the responder come first, and in each SA the encryption key,
    salt included, comes before the integrity key (RFC 7296, 2.17; RFC 4106, 8.1). `initiator` says
    whether this host began the exchange that made this CHILD_SA: after a CREATE_CHILD_SA of the peer's
    it is False, whoever began the IKE SA. `key_bits`: as in `keymat_length`; None takes the key length
    that the length of `keymat` allows.

    IKEv1 derives one KEYMAT for each SPI. Pass that of the responder's SPI (which protects what the
    initiator sends) and behind it that of the initiator's (RFC 2409, 5.5).

    ValueError: `keymat` does not have exactly the length that the transforms take.
    """
    try:
        keymat = as_key(keymat)
    except TypeError:
        keymat = _NO_KEY  # a traceback may show the local variables of this frame
        raise
    encryption, integrity = Encr(encryption), Integ(integrity)
    if key_bits is None:
        lengths: tuple[int, ...] = encryption.key_lengths
    else:
        lengths = (_encryption_length(encryption, key_bits),)
    for length in lengths:
        if len(keymat) == 2 * (length + integrity.key_length):
            break
    else:
        expected = " or ".join(str(2 * (length + integrity.key_length)) for length in lengths)
        raise ValueError(
            f"keymat: {len(keymat)} bytes; {encryption.name} with {integrity.name} takes {expected}"
        )
    half = len(keymat) // 2
    parts = memoryview(keymat)  # slices of bytes would be copies that nothing overwrites
    forward = Key(parts[:length]), Key(parts[length:half])
    backward = Key(parts[half : half + length]), Key(parts[half + length :])
    inbound, outbound = (backward, forward) if initiator else (forward, backward)
    return ChildKeys(*inbound, *outbound)


def as_key(keymat: object) -> Key:
    """Return key material as a `Key`, which no traceback, log or pickle shows. TypeError: it is not bytes."""
    if not isinstance(keymat, (bytes, bytearray, memoryview)):
        kind = type(keymat).__name__
        del keymat  # a traceback may show the local variables of this frame
        raise TypeError(f"keymat: bytes are wanted, not {kind}")
    return Key(keymat)


def _encryption_length(encryption: Encr, key_bits: int | None) -> int:
    """Return the bytes of the encryption key, salt included."""
    lengths = encryption.key_lengths
    if key_bits is None:
        if len(lengths) == 1:
            return lengths[0]
        raise ValueError(f"key_bits: {encryption.name} has several key lengths; say which was negotiated")
    length = key_bits // 8 + encryption.salt_length
    if key_bits % 8 or length not in lengths:
        allowed = ", ".join(str((each - encryption.salt_length) * 8) for each in lengths)
        raise ValueError(f"key_bits: {encryption.name} has no key of {key_bits} bits, but of {allowed}")
    return length
