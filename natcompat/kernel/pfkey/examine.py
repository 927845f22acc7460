"""The state of PF_KEY on this system, for ``natcompat doctor``."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

from natcompat.errors import NatCompatError
from natcompat.kernel.pfkey import numbers as n
from natcompat.kernel.pfkey.dialects import DIALECTS, Dialect, Move, Policies
from natcompat.kernel.pfkey.transport import open_socket

_SYSTEMS = {"linux": "linux", "darwin": "macos", "sunos5": "solaris"}
_PROC = "/proc/net/pfkey"


def dialect_here() -> Dialect | None:
    """Return the dialect of this system; None where there is no PF_KEY."""
    name = _SYSTEMS.get(sys.platform, sys.platform.rstrip("0123456789."))
    return DIALECTS.get(name)


def examine() -> dict[str, Any]:
    """Return ``dialect``, ``usable`` (null: not tried), ``reason``, ``remedy`` and ``limits``.

    Opens a socket and closes it; on Linux only where af_key is loaded, since to open one loads it.
    """
    dialect = dialect_here()
    if dialect is None:
        return _answer(None, False, "This system has no PF_KEY.")
    if dialect.name == "linux" and not os.path.exists(_PROC):
        reason = "The module af_key is not loaded; natcompat has no need of it, and does not load it to see."
        return _answer(dialect, None, reason, "For NATCOMPAT_IPSEC=pfkey: modprobe af_key.")
    try:
        open_socket(dialect, dialect.family, n.PF_KEY_V2, 1 << 16).close()
    except NatCompatError as error:
        return _answer(dialect, False, f"{error.strerror}.", f"{error.remedy}.")
    return _answer(dialect, True, "SAs and policies can be installed over PF_KEY.")


def _answer(dialect: Dialect | None, usable: bool | None, reason: str, remedy: str = "") -> dict[str, Any]:
    return {
        "dialect": dialect.name if dialect else None,
        "usable": usable,
        "reason": reason,
        "remedy": remedy,
        "limits": list(limits(dialect)) if dialect else [],
    }


def limits(dialect: Dialect) -> Iterator[str]:
    """Yield what cannot be had over PF_KEY of a system, a sentence each."""
    if dialect.keys_in_broadcasts:
        yield "Keys of new and deleted SAs go to every PF_KEY socket of the network namespace."
    encryption = ", ".join(each.name for each in dialect.encryption)
    integrity = ", ".join(each.name for each in dialect.integrity)
    yield f"Transforms: {encryption}; {integrity}."
    for name in ("HMAC_SHA2_256_128", "AES_GCM_16"):
        if name in dialect.reasons:
            yield f"Not {name}: {dialect.reasons[name]}."
    if not dialect.wide_windows:
        yield f"Replay windows of {dialect.largest_window} packets at most."
    if not dialect.esn:
        yield "No extended sequence numbers."
    if not dialect.packet_lifetimes:
        yield "No lifetimes in packets."
    if Move.ADDRESSES not in dialect.moves:
        what = "Addresses" if Move.PORTS in dialect.moves else "Addresses and ports"
        yield f"{what} of an SA do not change: negotiate a new one."
    if not dialect.mapping_events:
        yield "No event tells of a changed NAT mapping."
    if not dialect.cross_family:
        yield "A tunnel carries the IP version of its own addresses only."
    versions = " and ".join(f"IPv{each}" for each in sorted(dialect.nat_t_versions))
    if len(dialect.nat_t_versions) < 2:
        yield f"ESP in UDP over {versions} only."
    if dialect.policies is Policies.SPD:
        yield f"A reqid in a policy is {n.IPSEC_MANUAL_REQID_MAX} at most."
    yield from dialect.limits
