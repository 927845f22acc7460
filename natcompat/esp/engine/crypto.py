"""The transforms of ESP, on the `cryptography` package. None of them goes without integrity.

One cipher object per SA, made once, since the key schedule is expensive. An object belongs to one
direction of one SA and is used under that SA's lock; it keeps no nonce from one packet to the next.
"""

from __future__ import annotations

import contextlib
import errno
import functools
from collections.abc import Callable
from hmac import compare_digest
from typing import Any, Final, Protocol

from natcompat.errors import NatCompatError
from natcompat.ipsec import Encr, Integ, Key, Transforms

try:
    from cryptography.exceptions import InvalidTag, UnsupportedAlgorithm
    from cryptography.hazmat.primitives import ciphers, cmac, hashes, hmac
    from cryptography.hazmat.primitives.ciphers import aead, algorithms, modes
except ImportError as _error:
    raise NatCompatError(
        errno.ENOSYS,
        f"ESP in this process needs the cryptography package: {_error}",
        "pip install 'natcompat[userspace]'",
    ) from None

HEADER_LENGTH: Final = 8
"""SPI and sequence number."""


class Cipher(Protocol):
    """One SA's transform. An ESP packet is header, IV, ciphertext, integrity check value."""

    iv_length: int
    """Bytes behind the header that are the IV; whole packets begin with a `prefix` of both."""
    icv_length: int
    block_length: int
    """Plaintexts are multiples of it."""

    def seal(self, prefix: bytes, plaintext: bytes, high: bytes) -> bytes:
        """Return the ESP packet. `prefix`: header and IV; `high`: the upper half of an ESN, or nothing."""
        ...

    def open(self, packet: bytes, high: bytes) -> bytes | None:
        """Return the plaintext of a packet of sufficient length, or None if it is not authentic."""
        ...


class _Aead:
    """Any AEAD whose tag is as long as the integrity check value: RFC 4106, 4309, 7634."""

    __slots__ = ("_aead", "_salt", "icv_length")
    block_length = 1
    iv_length = 8

    def __init__(self, cipher: Any, salt: bytes, icv_length: int) -> None:
        self._aead = cipher
        self._salt = salt
        self.icv_length = icv_length

    def seal(self, prefix: bytes, plaintext: bytes, high: bytes) -> bytes:
        """Encrypt; the header is authenticated with it."""
        associated = prefix[:4] + high + prefix[4:8] if high else prefix[:8]
        return prefix + self._aead.encrypt(self._salt + prefix[8:16], plaintext, associated)  # type: ignore[no-any-return]

    def open(self, packet: bytes, high: bytes) -> bytes | None:
        """Decrypt and check in one."""
        associated = packet[:4] + high + packet[4:8] if high else packet[:8]
        try:
            return self._aead.decrypt(self._salt + packet[8:16], packet[16:], associated)  # type: ignore[no-any-return]
        except InvalidTag:
            return None


class _ShortGcm(_Aead):
    """AES-GCM with 8 or 12 bytes of tag, which the AEAD object of `cryptography` does not know.

    Sealing cuts the tag. Opening gives OpenSSL the short tag, which compares it in constant time.
    """

    __slots__ = ("_algorithm", "_cut")

    def __init__(self, key: bytes, salt: bytes, icv_length: int) -> None:
        super().__init__(aead.AESGCM(key), salt, icv_length)
        self._cut = icv_length - 16
        self._algorithm = algorithms.AES(key)

    def seal(self, prefix: bytes, plaintext: bytes, high: bytes) -> bytes:
        """Encrypt, and leave the end of the tag away."""
        return super().seal(prefix, plaintext, high)[: self._cut]

    def open(self, packet: bytes, high: bytes) -> bytes | None:
        """Decrypt; nothing is returned before the tag has been checked."""
        prefix, end = packet[:16], len(packet) - self.icv_length
        mode = modes.GCM(self._salt + prefix[8:], packet[end:], min_tag_length=self.icv_length)
        context = ciphers.Cipher(self._algorithm, mode).decryptor()
        context.authenticate_additional_data(prefix[:4] + high + prefix[4:8])
        plaintext = context.update(packet[16:end])
        try:
            return plaintext + context.finalize()
        except InvalidTag:
            return None


class _Gmac(_Aead):
    """ENCR_NULL_AUTH_AES_GMAC (RFC 4543): nothing is encrypted, all is authenticated."""

    __slots__ = ()

    def seal(self, prefix: bytes, plaintext: bytes, high: bytes) -> bytes:
        """Append the tag."""
        associated = prefix[:4] + high + prefix[4:] + plaintext
        return prefix + plaintext + self._aead.encrypt(self._salt + prefix[8:16], b"", associated)  # type: ignore[no-any-return]

    def open(self, packet: bytes, high: bytes) -> bytes | None:
        """Check the tag."""
        prefix, plaintext, tag = packet[:16], packet[16:-16], packet[-16:]
        try:
            self._aead.decrypt(self._salt + prefix[8:], tag, prefix[:4] + high + prefix[4:] + plaintext)
        except InvalidTag:
            return None
        return plaintext


class _EncryptThenMac:
    """An encryption transform and an integrity transform over it (RFC 4303, 3.3.2)."""

    __slots__ = ("_mac", "icv_length")
    iv_length = 0
    block_length = 1

    def __init__(self, integrity: Integ, key: bytes) -> None:
        self._mac = _mac(integrity, key)
        self.icv_length = integrity.icv_length

    def _icv(self, covered: bytes, high: bytes) -> bytes:
        mac = self._mac.copy()
        mac.update(covered)
        if high:
            mac.update(high)
        return mac.finalize()[: self.icv_length]  # type: ignore[no-any-return]

    def seal(self, prefix: bytes, plaintext: bytes, high: bytes) -> bytes:
        """Encrypt, then append the integrity check value."""
        covered = self._encrypt(prefix, plaintext)
        return covered + self._icv(covered, high)

    def open(self, packet: bytes, high: bytes) -> bytes | None:
        """Check, then decrypt."""
        end = len(packet) - self.icv_length
        covered = packet[:end]
        if not compare_digest(self._icv(covered, high), packet[end:]):
            return None
        return self._decrypt(covered)

    def _encrypt(self, prefix: bytes, plaintext: bytes) -> bytes:
        return prefix + plaintext

    def _decrypt(self, covered: bytes) -> bytes:
        return covered[HEADER_LENGTH:]


class _Cbc(_EncryptThenMac):
    """AES-CBC (RFC 3602) with one context for the whole life of the SA.

    CBC goes on from block to block, so a context need not be made anew for every IV. Sealing: the
    16 random bytes of `prefix` are encrypted as a block of their own; the result, random and
    unpredictable, is the IV. Opening: the block that an IV decrypts to is thrown away, the next block
    needs nothing but the IV.
    """

    __slots__ = ("_decryptor", "_encryptor")
    iv_length = 16
    block_length = 16

    def __init__(self, key: bytes, integrity: Integ, integrity_key: bytes) -> None:
        super().__init__(integrity, integrity_key)
        cipher = ciphers.Cipher(algorithms.AES(key), modes.CBC(bytes(16)))
        self._encryptor = cipher.encryptor()
        self._decryptor = cipher.decryptor()

    def _encrypt(self, prefix: bytes, plaintext: bytes) -> bytes:
        return prefix[:HEADER_LENGTH] + self._encryptor.update(prefix[HEADER_LENGTH:] + plaintext)

    def _decrypt(self, covered: bytes) -> bytes:
        return self._decryptor.update(covered[HEADER_LENGTH:])[16:]


class _Ctr(_EncryptThenMac):
    """AES-CTR (RFC 3686): nonce, IV, and a block counter that begins with 1."""

    __slots__ = ("_salt", "_stream")
    iv_length = 8

    def __init__(self, key: bytes, salt: bytes, integrity: Integ, integrity_key: bytes) -> None:
        super().__init__(integrity, integrity_key)
        self._salt = salt
        self._stream = ciphers.Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()

    def _crypt(self, iv: bytes, data: bytes) -> bytes:
        self._stream.reset_nonce(self._salt + iv + b"\0\0\0\1")
        return self._stream.update(data)

    def _encrypt(self, prefix: bytes, plaintext: bytes) -> bytes:
        return prefix + self._crypt(prefix[HEADER_LENGTH:], plaintext)

    def _decrypt(self, covered: bytes) -> bytes:
        return self._crypt(covered[HEADER_LENGTH:16], covered[16:])


def _mac(integrity: Integ, key: bytes) -> Any:
    """Return an object whose copies are the MACs of packets."""
    if integrity is Integ.AES_CMAC_96:
        return cmac.CMAC(algorithms.AES(key))
    hash_of: dict[Integ, Callable[[], hashes.HashAlgorithm]] = {
        Integ.HMAC_SHA1_96: hashes.SHA1,  # noqa: S303 - within HMAC
        Integ.HMAC_SHA2_256_128: hashes.SHA256,
        Integ.HMAC_SHA2_384_192: hashes.SHA384,
        Integ.HMAC_SHA2_512_256: hashes.SHA512,
    }
    return hmac.HMAC(key, hash_of[integrity]())


def counts(encryption: Encr) -> bool:
    """Tell whether the IV must never repeat under one key, and may be a counter; else it is random."""
    return encryption.is_aead or encryption is Encr.AES_CTR


SUPPORTED_INTEGRITY: Final = frozenset(
    integrity
    for integrity in Integ
    if integrity not in (Integ.NONE, Integ.AES_XCBC_96) and not integrity.is_legacy
)
"""AES-XCBC-96 is in no library that this package rests on, and no IKE daemon prefers it."""


def make_cipher(encryption: Encr, encryption_key: Key, integrity: Integ, integrity_key: Key) -> Cipher:
    """Return the cipher object of one SA.

    EPROTONOSUPPORT: this engine, or the OpenSSL of this host, lacks the transform.
    """
    if not encryption.is_aead and integrity not in SUPPORTED_INTEGRITY:
        raise NatCompatError(
            errno.EPROTONOSUPPORT,
            f"the ESP of this process has no {integrity.name}",
            "Negotiate HMAC_SHA2_256_128, or an AEAD",
        )
    if encryption.is_legacy:
        raise NatCompatError(
            errno.EPROTONOSUPPORT,
            f"the ESP of this process has no {encryption.name}",
            "Negotiate AES_GCM_16, or use the linux backend where the kernel has ESP",
        )
    size = len(encryption_key) - encryption.salt_length
    material = memoryview(encryption_key)  # a slice of bytes would be a copy that nobody overwrites
    key, salt = Key(material[:size]), bytes(material[size:])
    try:
        return _make(encryption, key, salt, integrity, integrity_key)
    except UnsupportedAlgorithm as error:
        raise NatCompatError(
            errno.EPROTONOSUPPORT,
            f"the OpenSSL of this host has no {encryption.name} or {integrity.name}: {error}",
            "Negotiate AES_GCM_16",
        ) from None


@functools.cache
def supported_transforms() -> Transforms:
    """Return the transforms that `make_cipher` makes on this host, found out by trying each."""
    encryption = {}
    for transform in Encr:
        lengths = []
        for length in transform.key_lengths:
            with contextlib.suppress(NatCompatError):
                integrity = Integ.NONE if transform.is_aead else Integ.HMAC_SHA2_256_128
                make_cipher(transform, Key(bytes(range(length))), integrity, Key(bytes(integrity.key_length)))
                lengths.append((length - transform.salt_length) * 8)
        if lengths:
            encryption[transform] = tuple(lengths)
    return Transforms(encryption=encryption, integrity=SUPPORTED_INTEGRITY, esn=True)


def _make(encryption: Encr, key: bytes, salt: bytes, integrity: Integ, mac_key: bytes) -> Cipher:
    match encryption:
        case Encr.AES_GCM_16:
            return _Aead(aead.AESGCM(key), salt, 16)
        case Encr.AES_GCM_8 | Encr.AES_GCM_12:
            return _ShortGcm(key, salt, encryption.icv_length)
        case Encr.CHACHA20_POLY1305:
            return _Aead(aead.ChaCha20Poly1305(key), salt, 16)
        case Encr.AES_CCM_8 | Encr.AES_CCM_12 | Encr.AES_CCM_16:
            length = encryption.icv_length
            return _Aead(aead.AESCCM(key, tag_length=length), salt, length)
        case Encr.NULL_AUTH_AES_GMAC:
            return _Gmac(aead.AESGCM(key), salt, 16)
        case Encr.AES_CBC:
            return _Cbc(key, integrity, mac_key)
        case Encr.AES_CTR:
            return _Ctr(key, salt, integrity, mac_key)
    return _EncryptThenMac(integrity, mac_key)  # and NULL
