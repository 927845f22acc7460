"""The transforms of a kernel, as SADB_REGISTER lists them (RFC 2367, 3.1.6)."""

from __future__ import annotations

import errno

from natcompat.ipsec import Encr, Integ, Transforms
from natcompat.ipsec.associations import SecurityAssociation
from natcompat.kernel.pfkey import numbers as n
from natcompat.kernel.pfkey.dialects import Dialect
from natcompat.kernel.pfkey.messages import Message, read_algorithms
from natcompat.kernel.pfkey.translate import refusal
from natcompat.kernel.pfkey.transport import PfKeySocket


def check_algorithms(dialect: Dialect, sa: SecurityAssociation) -> None:
    """Raise ENOSYS if the kernel does not list a transform of `sa`.

    Asked when it has refused the SA, not before: to make the list, Linux tries to load every cipher.
    """
    asked = [(n.SADB_EXT_SUPPORTED_ENCRYPT, dialect.encryption[sa.encryption], sa.encryption.name)]
    if sa.integrity is not Integ.NONE:
        asked.append((n.SADB_EXT_SUPPORTED_AUTH, dialect.integrity[sa.integrity], sa.integrity.name))
    answer = _register(dialect)
    for kind, number, name in asked:
        listed = answer.find(kind)
        if listed is not None and number not in [each for each, _, _ in read_algorithms(listed)]:
            raise refusal(
                dialect,
                f"has a number for {name}, but this kernel does not have it",
                "Load its module, or negotiate another transform",
                errno.ENOSYS,
            )


def supported_transforms(dialect: Dialect) -> Transforms:
    """Return the transforms that the kernel lists, as far as the dialect has them. EPERM: no privilege."""
    answer = _register(dialect)
    ciphers = _listed(answer, n.SADB_EXT_SUPPORTED_ENCRYPT)
    macs = _listed(answer, n.SADB_EXT_SUPPORTED_AUTH)
    encryption = {}
    for transform, number in dialect.encryption.items():
        if number in ciphers:
            least, most = ciphers[number]
            sizes = (length - transform.salt_length for length in transform.key_lengths)
            encryption[transform] = tuple(size * 8 for size in sizes if _fits(size, transform, least, most))
    return Transforms(
        encryption={transform: sizes for transform, sizes in encryption.items() if sizes},
        integrity=frozenset(transform for transform, number in dialect.integrity.items() if number in macs),
        esn=bool(dialect.esn),
    )


def _fits(size: int, transform: Encr, least: int, most: int) -> bool:
    """Tell whether a key of `size` bytes is in the kernel's range; some kernels count the salt."""
    salted = size + transform.salt_length
    return not most or least <= size * 8 <= most or least <= salted * 8 <= most


def _register(dialect: Dialect) -> Message:
    # Not on the socket of other requests: it would be sent acquires from then on.
    sock = PfKeySocket(dialect)
    try:
        return sock.request("Listing algorithms", Message(n.SADB_REGISTER, dialect.esp))
    finally:
        sock.close()


def _listed(answer: Message, kind: int) -> dict[int, tuple[int, int]]:
    """Return least and most bits of the key by the kernel's number."""
    extension = answer.find(kind)
    if extension is None:
        return {}
    return {number: (least, most) for number, least, most in read_algorithms(extension)}
