"""Which transforms a kernel has, by what it lists to who registers (RFC 2367, 3.1.6)."""

from __future__ import annotations

import errno

from natcompat.ipsec.associations import SecurityAssociation
from natcompat.ipsec.transforms import Integ
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
    # Not on the socket of other requests: it would be sent acquires from then on.
    sock = PfKeySocket(dialect)
    try:
        answer = sock.request("Listing algorithms", Message(n.SADB_REGISTER, dialect.esp))
    finally:
        sock.close()
    for kind, number, name in asked:
        listed = answer.find(kind)
        if listed is not None and number not in [each for each, _, _ in read_algorithms(listed)]:
            raise refusal(
                dialect,
                f"has a number for {name}, but this kernel does not have it",
                "Load its module, or negotiate another transform",
                errno.ENOSYS,
            )
