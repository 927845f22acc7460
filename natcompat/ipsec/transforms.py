"""The transforms that IKEv2 negotiates for ESP, and the keys that they take."""

from __future__ import annotations

import ctypes
import enum
import sys
from collections.abc import Callable
from typing import NoReturn, Self, SupportsIndex


class Encr(enum.IntEnum):
    """Encryption transforms, by their IANA numbers of IKEv2 (transform type 1)."""

    TRIPLE_DES_CBC = 3
    """RFC 2451. Old (`is_legacy`), as CAMELLIA_CBC (RFC 4312): for peers that have nothing better."""
    NULL = 11
    AES_CBC = 12
    AES_CTR = 13
    AES_CCM_8 = 14
    AES_CCM_12 = 15
    AES_CCM_16 = 16
    AES_GCM_8 = 18
    AES_GCM_12 = 19
    AES_GCM_16 = 20
    NULL_AUTH_AES_GMAC = 21
    CAMELLIA_CBC = 23
    CHACHA20_POLY1305 = 28

    @property
    def is_aead(self) -> bool:
        """Whether the transform protects the integrity, too, and so takes no `Integ`."""
        return self not in _NO_AEAD

    @property
    def is_legacy(self) -> bool:
        """Whether `IPsec.add_sa` installs the transform only with ``legacy=True`` (RFC 8221, 5)."""
        return self in (Encr.TRIPLE_DES_CBC, Encr.CAMELLIA_CBC)

    @property
    def salt_length(self) -> int:
        """Bytes of salt or nonce at the end of the key (RFC 3686, 4106, 4309, 4543, 7634)."""
        if self in (Encr.AES_CCM_8, Encr.AES_CCM_12, Encr.AES_CCM_16):
            return 3
        return 4 if self.is_aead or self is Encr.AES_CTR else 0

    @property
    def icv_length(self) -> int:
        """Bytes of integrity check value that an AEAD appends; 0 for the others."""
        lengths = {Encr.AES_CCM_8: 8, Encr.AES_CCM_12: 12, Encr.AES_GCM_8: 8, Encr.AES_GCM_12: 12}
        return lengths.get(self, 16) if self.is_aead else 0

    @property
    def key_lengths(self) -> tuple[int, ...]:
        """Bytes that a key may have, salt included."""
        if self is Encr.NULL:
            return (0,)
        if self is Encr.TRIPLE_DES_CBC:
            return (24,)
        sizes = (32,) if self is Encr.CHACHA20_POLY1305 else (16, 24, 32)
        return tuple(size + self.salt_length for size in sizes)


_NO_AEAD = frozenset({Encr.TRIPLE_DES_CBC, Encr.NULL, Encr.AES_CBC, Encr.AES_CTR, Encr.CAMELLIA_CBC})


class Integ(enum.IntEnum):
    """Integrity transforms, by their IANA numbers of IKEv2 (transform type 3)."""

    NONE = 0
    HMAC_MD5_96 = 1
    """RFC 2403. Old (`is_legacy`), as HMAC_SHA2_256_96."""
    HMAC_SHA1_96 = 2
    AES_XCBC_96 = 5
    AES_CMAC_96 = 8
    HMAC_SHA2_256_128 = 12
    HMAC_SHA2_384_192 = 13
    HMAC_SHA2_512_256 = 14
    HMAC_SHA2_256_96 = 1026
    """As draft-ietf-ipsec-ciph-sha-256-00 truncates it, and old Linux kernels. IANA has no number
    for it; this one is of the private range, as strongSwan has it."""

    @property
    def is_legacy(self) -> bool:
        """Whether `IPsec.add_sa` installs the transform only with ``legacy=True`` (RFC 8221, 6)."""
        return self in (Integ.HMAC_MD5_96, Integ.HMAC_SHA2_256_96)

    @property
    def key_length(self) -> int:
        """Bytes of the key."""
        lengths = {0: 0, 2: 20, 12: 32, 13: 48, 14: 64, 1026: 32}
        return lengths.get(self.value, 16)

    @property
    def icv_length(self) -> int:
        """Bytes of the integrity check value in each packet."""
        lengths = {0: 0, 12: 16, 13: 24, 14: 32}
        return lengths.get(self.value, 12)


class Key(bytes):
    """Key material: bytes whose text says only how many they are, and which refuse to be pickled.

    On CPython their memory is overwritten with the last reference. Copies (`bytes(key)`, slices) are not.
    """

    __slots__ = ()

    if sys.implementation.name == "cpython":

        def __del__(
            self,
            overwrite: Callable[[int, int, int], object] = ctypes.memset,
            header: int = bytes.__basicsize__ - 1,
        ) -> None:
            overwrite(id(self) + header, 0, len(self))

    def __repr__(self) -> str:
        return f"<key of {len(self)} bytes>"

    __str__ = __repr__

    def __format__(self, _: str) -> str:
        return repr(self)

    def __reduce_ex__(self, _: SupportsIndex) -> NoReturn:
        raise TypeError("keys are not pickled by accident; send bytes(key) where you must")

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _: object) -> Self:
        return self
