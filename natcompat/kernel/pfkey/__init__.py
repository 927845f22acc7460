"""`natcompat.ipsec.IPsec` over PF_KEY v2 (RFC 2367): Solaris, the BSDs, macOS, and Linux's af_key."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from natcompat.ipsec import IPsec


def open_ipsec(dialect_name: str) -> IPsec:
    """Open the kernel's SAs and policies over PF_KEY.

    `dialect_name`: linux, freebsd, netbsd, openbsd, macos or solaris. Raises
    `natcompat.errors.NatCompatError`: EINVAL for another name, EPERM without the privilege that the
    remedy names, EAFNOSUPPORT where the kernel has no PF_KEY.
    """
    import errno

    from natcompat.errors import NatCompatError
    from natcompat.kernel.pfkey.dialects import DIALECTS
    from natcompat.kernel.pfkey.kernel import PfKeyIPsec

    if dialect_name not in DIALECTS:
        raise NatCompatError(
            errno.EINVAL,
            f"there is no dialect of PF_KEY called {dialect_name!r}",
            f"Choose among {', '.join(DIALECTS)}",
        )
    return PfKeyIPsec(DIALECTS[dialect_name])
