"""The offloads that the data path may use: `NATCOMPAT_OFFLOADS`.

A list of names switches on those and no others ("tso4,csum"), names with a minus switch off those and leave
the others ("-udp-gro,-uso"), ``none`` switches off all. Without the variable, or with ``all``, each is used
where the system has it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from typing import Final

VARIABLE: Final = "NATCOMPAT_OFFLOADS"

OFFLOADS: Final[Mapping[str, str]] = {
    "csum": "the TUN device leaves checksums to the reader (TUN_F_CSUM)",
    "tso4": "the TUN device leaves segmentation of TCP over IPv4 to the reader (TUN_F_TSO4)",
    "tso6": "the TUN device leaves segmentation of TCP over IPv6 to the reader (TUN_F_TSO6)",
    "uso": "the TUN device leaves segmentation of UDP to the reader (TUN_F_USO4, TUN_F_USO6; Linux 6.2)",
    "tcp-gro": "opened TCP packets are written into the TUN device as one",
    "udp-gro": "opened UDP packets are written into the TUN device as one",
    "gro": "the sockets of ESP receive packets as one (UDP_GRO)",
    "gso": "the sockets of ESP send packets as one (UDP_SEGMENT)",
}
"""The names, and what each is."""

# linux/if_tun.h
TUN_F_CSUM: Final = 0x01
_TUN_FLAGS: Final = {"csum": TUN_F_CSUM, "tso4": 0x02, "tso6": 0x04, "uso": 0x20 | 0x40}
_TUN_F_TSO_ECN: Final = 0x08


def enabled(setting: str | None = None) -> frozenset[str]:
    """Return the names of the offloads that may be used. `setting`: in the place of the variable.

    ValueError: it has a name that is none of `OFFLOADS`.
    """
    text = os.environ.get(VARIABLE, "") if setting is None else setting
    words = [word.strip().lower() for word in text.split(",") if word.strip()]
    if words == ["none"]:
        return frozenset()
    if not words or words == ["all"]:
        return frozenset(OFFLOADS)
    for word in words:
        if word.removeprefix("-") not in OFFLOADS:
            names = ", ".join(OFFLOADS)
            raise ValueError(f"{VARIABLE}: {word!r} is none of {names}; none, all, or names with a minus")
    wanted = {word for word in words if not word.startswith("-")}
    unwanted = {word.removeprefix("-") for word in words if word.startswith("-")}
    return frozenset((wanted or set(OFFLOADS)) - unwanted)


def tun_flags(names: Iterable[str]) -> int:
    """Return the TUN_F_* for `names`. Segmentation takes checksums: without ``csum`` there is none of it."""
    chosen = set(names)
    if "csum" not in chosen:
        return 0
    flags = 0
    for name in chosen & _TUN_FLAGS.keys():
        flags |= _TUN_FLAGS[name]
    if chosen & {"tso4", "tso6"}:
        flags |= _TUN_F_TSO_ECN
    return flags


def tun_names(flags: int) -> frozenset[str]:
    """Return the names of offloads that `flags` (TUN_F_*) switch on."""
    return frozenset(name for name, bits in _TUN_FLAGS.items() if flags & bits == bits)
