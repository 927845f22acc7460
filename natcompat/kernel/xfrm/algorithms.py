"""The transforms of ESP by the kernel's names (net/xfrm/xfrm_algo.c), and which of them this kernel has."""

from __future__ import annotations

from natcompat.ipsec import (
    Encr,
    Integ,
    SecurityAssociation,
    Transforms,
)
from natcompat.kernel.xfrm.probe import MODULES, probe_esp

ENCRYPTION_NAMES = {
    Encr.TRIPLE_DES_CBC: "cbc(des3_ede)",
    Encr.NULL: "ecb(cipher_null)",
    Encr.AES_CBC: "cbc(aes)",
    Encr.AES_CTR: "rfc3686(ctr(aes))",
    Encr.AES_CCM_8: "rfc4309(ccm(aes))",
    Encr.AES_CCM_12: "rfc4309(ccm(aes))",
    Encr.AES_CCM_16: "rfc4309(ccm(aes))",
    Encr.AES_GCM_8: "rfc4106(gcm(aes))",
    Encr.AES_GCM_12: "rfc4106(gcm(aes))",
    Encr.AES_GCM_16: "rfc4106(gcm(aes))",
    Encr.NULL_AUTH_AES_GMAC: "rfc4543(gcm(aes))",
    Encr.CAMELLIA_CBC: "cbc(camellia)",
    Encr.CHACHA20_POLY1305: "rfc7539esp(chacha20,poly1305)",
}
"""The names of net/xfrm/xfrm_algo.c."""

INTEGRITY_NAMES = {
    Integ.HMAC_MD5_96: "hmac(md5)",
    Integ.HMAC_SHA1_96: "hmac(sha1)",
    Integ.AES_XCBC_96: "xcbc(aes)",
    Integ.AES_CMAC_96: "cmac(aes)",
    Integ.HMAC_SHA2_256_128: "hmac(sha256)",
    Integ.HMAC_SHA2_384_192: "hmac(sha384)",
    Integ.HMAC_SHA2_512_256: "hmac(sha512)",
    Integ.HMAC_SHA2_256_96: "hmac(sha256)",
}


def supported_transforms() -> Transforms:
    """Ask the kernel by a dry run for each transform; see `natcompat.kernel.xfrm.probe.probe_esp`.

    Without those that are legacy: nobody should propose them unasked.
    """
    encryption = {}
    for transform, name in ENCRYPTION_NAMES.items():
        if transform.is_legacy:
            continue
        integrity = "" if transform.is_aead else "hmac(sha256)"
        icv_bits = transform.icv_length * 8 if transform.is_aead else None
        lengths = tuple(
            (length - transform.salt_length) * 8
            for length in transform.key_lengths
            if probe_esp(name, integrity, key_bits=length * 8, icv_bits=icv_bits)
        )
        if lengths:
            encryption[transform] = lengths
    integrities = (
        transform
        for transform, name in INTEGRITY_NAMES.items()
        if not transform.is_legacy and probe_esp("ecb(cipher_null)", name)
    )
    return Transforms(encryption=encryption, integrity=frozenset(integrities), esn=True)


def modules_of(sa: SecurityAssociation) -> str:
    """Return the sentence that says which modules bring the algorithms of `sa`."""
    names = [ENCRYPTION_NAMES[sa.encryption]]
    if sa.integrity is not Integ.NONE:
        names.append(INTEGRITY_NAMES[sa.integrity])
    wanted = " and ".join(MODULES[name] for name in names)
    return f"Load the modules {wanted} (and drbg, seqiv and echainiv), or negotiate another transform"
