"""Exempting one socket from the kernel's IPsec policies, on the systems with PF_KEY.

Linux has a call of its own (`natcompat.kernel.xfrm.bypass`); with af_key it would take this one, too.
"""

from __future__ import annotations

import errno
import socket
import struct
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from natcompat.errors import NatCompatError
from natcompat.kernel.pfkey import numbers as n
from natcompat.kernel.pfkey.dialects import Dialect, Policies

IP_IPSEC_POLICY: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"linux": (16, 34), "freebsd": (21, 28), "netbsd": (22, 28), "macos": (21, 28)}
)
"""IP_IPSEC_POLICY and IPV6_IPSEC_POLICY (netinet/in.h, netinet6/in6.h, linux/in.h)."""
IP_SEC_OPT = 0x22
"""Solaris, and IPV6_SEC_OPT is the same (netinet/in.h)."""
IPSEC_PREF_NEVER = 1
OPENBSD_LEVELS: Mapping[int, tuple[int, ...]] = MappingProxyType({4: (20, 21, 22, 29), 6: (53, 54, 55, 60)})
"""IP_AUTH_LEVEL, IP_ESP_TRANS_LEVEL, IP_ESP_NETWORK_LEVEL, IP_IPCOMP_LEVEL, and those of IPv6."""
IPSEC_LEVEL_BYPASS = 0


def options(dialect: Dialect, version: int) -> Sequence[tuple[int, int, bytes]]:
    """Return level, option and value of each call that exempts a socket of this IP version."""
    level = socket.IPPROTO_IP if version == 4 else socket.IPPROTO_IPV6
    if dialect.policies is Policies.RULES:
        # ipsec_req_t: AH, ESP, tunnel; then algorithms, which are looked at for what is required
        request = struct.pack("=III4x", *[IPSEC_PREF_NEVER] * 3)
        return [(level, IP_SEC_OPT, request)]
    if dialect.policies is Policies.FLOWS:
        value = struct.pack("=i", IPSEC_LEVEL_BYPASS)
        return [(level, option, value) for option in OPENBSD_LEVELS[version]]
    return _spd_options(dialect, version, n.IPSEC_POLICY_BYPASS)


def ordinary(dialect: Dialect, sock: socket.socket) -> list[tuple[int, int, bytes]]:
    """Return level, option and value of each call that makes `sock` again what it is to the policies now.

    On KAME's descendants, where that cannot be read back in a small space: to follow the policies, which is
    the default. Raises OSError where the kernel does not say.
    """
    version = 6 if sock.family == socket.AF_INET6 else 4
    if dialect.policies is Policies.SPD:
        return _spd_options(dialect, version, n.IPSEC_POLICY_ENTRUST)
    return [
        (level, option, sock.getsockopt(level, option, len(value)))
        for level, option, value in options(dialect, version)
    ]


def _spd_options(dialect: Dialect, version: int, policy: int) -> list[tuple[int, int, bytes]]:
    """Return the calls that give a socket `policy` in both directions: a bare sadb_x_policy each."""
    level = socket.IPPROTO_IP if version == 4 else socket.IPPROTO_IPV6
    option = IP_IPSEC_POLICY[dialect.name][version == 6]
    return [
        (level, option, struct.pack("=HHHBxII", 2, n.SADB_X_EXT_POLICY, policy, direction, 0, 0))
        for direction in (n.IPSEC_DIR_OUTBOUND, n.IPSEC_DIR_INBOUND)
    ]


def bypass(dialect: Dialect, sock: socket.socket) -> None:
    """Let everything pass that `sock` sends and receives, whatever the policies say.

    Raises EPERM without the privilege, EAFNOSUPPORT for what is neither AF_INET nor AF_INET6.
    """
    versions = {socket.AF_INET: 4, socket.AF_INET6: 6}
    if sock.family not in versions:
        raise NatCompatError(
            errno.EAFNOSUPPORT,
            f"A socket of family {sock.family!r} meets no IPsec policy",
            "Use AF_INET or AF_INET6",
        )
    try:
        for level, option, value in options(dialect, versions[sock.family]):
            sock.setsockopt(level, option, value)
    except OSError as error:
        text = f"The socket cannot be exempted from IPsec policies: {error.strerror}"
        remedy = dialect.privilege
        if error.errno not in (errno.EPERM, errno.EACCES):
            remedy = "Exempt it before connect(), on a kernel with IPsec"
        raise NatCompatError(error.errno or errno.EINVAL, text, remedy) from None
