"""The structures of linux/xfrm.h, as fields in header order."""

from __future__ import annotations

import struct

Fields = tuple[tuple[str, str], ...]


def embedded(name: str, fields: Fields) -> Fields:
    """Return `fields` as those of the member `name` of a larger structure."""
    return tuple((f"{name}_{field.lstrip('_')}", fmt) for field, fmt in fields)


XFRM_ID: Fields = (("daddr", "16B"), ("spi", ">I"), ("proto", "B"), ("_pad", "3x"))

XFRM_USERSA_ID: Fields = (("daddr", "16B"), ("spi", ">I"), ("family", "H"), ("proto", "B"), ("_pad", "x"))

XFRM_SELECTOR: Fields = (
    ("daddr", "16B"),
    ("saddr", "16B"),
    ("dport", ">H"),
    ("dport_mask", ">H"),
    ("sport", ">H"),
    ("sport_mask", ">H"),
    ("family", "H"),
    ("prefixlen_d", "B"),
    ("prefixlen_s", "B"),
    ("proto", "B"),
    ("_pad", "3x"),
    ("ifindex", "i"),
    ("user", "I"),
)

XFRM_LIFETIME_CFG: Fields = (
    ("soft_byte_limit", "Q"),
    ("hard_byte_limit", "Q"),
    ("soft_packet_limit", "Q"),
    ("hard_packet_limit", "Q"),
    ("soft_add_expires_seconds", "Q"),
    ("hard_add_expires_seconds", "Q"),
    ("soft_use_expires_seconds", "Q"),
    ("hard_use_expires_seconds", "Q"),
)

XFRM_LIFETIME_CUR: Fields = (("bytes", "Q"), ("packets", "Q"), ("add_time", "Q"), ("use_time", "Q"))

XFRM_STATS: Fields = (("replay_window", "I"), ("replay", "I"), ("integrity_failed", "I"))

XFRM_USERSA_INFO: Fields = (
    *embedded("sel", XFRM_SELECTOR),
    *embedded("id", XFRM_ID),
    ("saddr", "16B"),
    *embedded("lft", XFRM_LIFETIME_CFG),
    *embedded("curlft", XFRM_LIFETIME_CUR),
    *embedded("stats", XFRM_STATS),
    ("seq", "I"),
    ("reqid", "I"),
    ("family", "H"),
    ("mode", "B"),
    ("replay_window", "B"),
    ("flags", "B"),
    ("_pad", "7x"),
)

XFRM_USERPOLICY_INFO: Fields = (
    *embedded("sel", XFRM_SELECTOR),
    *embedded("lft", XFRM_LIFETIME_CFG),
    *embedded("curlft", XFRM_LIFETIME_CUR),
    ("priority", "I"),
    ("index", "I"),
    ("dir", "B"),
    ("action", "B"),
    ("flags", "B"),
    ("share", "B"),
    ("_pad", "4x"),
)

XFRM_USER_KMADDRESS: Fields = (
    ("local", "16B"),
    ("remote", "16B"),
    ("reserved", "I"),
    ("family", "H"),
    ("_pad", "2x"),
)

XFRM_USER_TMPL: Fields = (
    *embedded("id", XFRM_ID),
    ("family", "H"),
    ("_pad", "2x"),
    ("saddr", "16B"),
    ("reqid", "I"),
    ("mode", "B"),
    ("share", "B"),
    ("optional", "B"),
    ("_pad_aalgos", "x"),
    ("aalgos", "I"),
    ("ealgos", "I"),
    ("calgos", "I"),
)


def size_of(fields: Fields) -> int:
    """Return the bytes that `fields` take."""
    return sum(struct.calcsize(fmt) for _, fmt in fields)


def offset_of(fields: Fields, name: str) -> int:
    """Return the offset of the field `name` among `fields`."""
    offset = 0
    for field, fmt in fields:
        if field == name:
            return offset
        offset += struct.calcsize(fmt)
    raise KeyError(name)
