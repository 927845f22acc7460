"""The numbers of IKEv1 (IPsec DOI) in the words of IKEv2 and `natcompat.ipsec`.

Sources: RFC 2407, 4.4.4 and 4.5; RFC 3947, 5.1; the IANA registry "Magic Numbers for ISAKMP Protocol".
"""

from __future__ import annotations

from typing import Final

from natcompat.ipsec import Encr, Integ, Lifetime, Mode

_ENCRYPTION: Final = {
    3: 3,  # ESP_3DES
    11: 11,  # ESP_NULL
    12: 12,  # ESP_AES-CBC (RFC 3602)
    13: 13,  # ESP_AES-CTR (RFC 3686)
    14: 14,  # ESP_AES-CCM_8 (RFC 4309)
    15: 15,
    16: 16,
    18: 18,  # ESP_AES-GCM_8 (RFC 4106)
    19: 19,
    20: 20,
    22: 23,  # ESP_CAMELLIA (RFC 4312)
    23: 21,  # ESP_NULL_AUTH_AES-GMAC (RFC 4543)
}
"""ESP transform identifier of the IPsec DOI: number of the IKEv2 encryption transform."""

_INTEGRITY: Final = {
    1: 1,  # HMAC-MD5
    2: 2,  # HMAC-SHA
    5: 12,  # HMAC-SHA2-256 (RFC 4868)
    6: 13,
    7: 14,
    9: 5,  # AES-XCBC-MAC (RFC 3566)
}
"""Value of the attribute Authentication Algorithm: number of the IKEv2 integrity transform."""

_MODES: Final = {
    1: (Mode.TUNNEL, False),
    2: (Mode.TRANSPORT, False),
    3: (Mode.TUNNEL, True),  # RFC 3947
    4: (Mode.TRANSPORT, True),
    61443: (Mode.TUNNEL, True),  # its drafts, which old peers speak
    61444: (Mode.TRANSPORT, True),
}

_ATTRIBUTES: Final = {Mode.TUNNEL: 1, Mode.TRANSPORT: 2}
_ENCAPSULATED: Final = 2
"""UDP-Encapsulated-Tunnel is 3, UDP-Encapsulated-Transport 4."""


def encryption(transform_id: int) -> Encr:
    """Return the encryption transform of an ESP transform identifier.

    ValueError: natcompat has no such transform. The key length is an attribute of its own (6), in bits
    and without the salt, as in IKEv2.
    """
    return Encr(_number(_ENCRYPTION, "ESP transform", transform_id))


def integrity(algorithm: int | None) -> Integ:
    """Return the integrity transform of an Authentication Algorithm attribute (5); None: it is absent.

    ValueError: natcompat has no such transform.
    """
    return (
        Integ.NONE if algorithm is None else Integ(_number(_INTEGRITY, "authentication algorithm", algorithm))
    )


def encapsulation_mode(value: int) -> tuple[Mode, bool]:
    """Return the mode of an Encapsulation Mode attribute (4), and whether ESP goes in UDP.

    The values of the NAT-T drafts (61443, 61444) are accepted. ValueError: the value is unknown.
    """
    if value not in _MODES:
        raise ValueError(f"encapsulation mode {value} is not one of {', '.join(map(str, _MODES))}")
    return _MODES[value]


def encapsulation_mode_value(mode: Mode, udp: bool) -> int:
    """Return the value of the Encapsulation Mode attribute to propose (RFC 3947, 5.1)."""
    return _ATTRIBUTES[mode] + (_ENCAPSULATED if udp else 0)


def transform_id(transform: Encr) -> int:
    """Return the ESP transform identifier to propose. ValueError: IKEv1 has none (ChaCha20-Poly1305)."""
    return _inverse(_ENCRYPTION, transform)


def authentication_algorithm(transform: Integ) -> int | None:
    """Return the value of the Authentication Algorithm attribute; None: leave the attribute out."""
    return None if transform is Integ.NONE else _inverse(_INTEGRITY, transform)


def lifetime(*, seconds: int | None = None, kilobytes: int | None = None, rekey_at: float = 0.9) -> Lifetime:
    """Return the lifetime of SA Life Type and SA Life Duration attributes, which are hard limits.

    The soft limits, where rekeying begins, are `rekey_at` of them. A kilobyte is 1024 bytes.
    """
    if not 0 < rekey_at <= 1:
        raise ValueError(f"rekey_at: {rekey_at} is not a part of the lifetime")
    octets = None if kilobytes is None else kilobytes * 1024
    return Lifetime(
        soft_seconds=_soft(seconds, rekey_at),
        hard_seconds=seconds,
        soft_bytes=_soft(octets, rekey_at),
        hard_bytes=octets,
    )


def _soft(limit: int | None, rekey_at: float) -> int | None:
    return None if limit is None else max(1, int(limit * rekey_at))


def _number(table: dict[int, int], kind: str, value: int) -> int:
    if value not in table:
        raise ValueError(f"{kind} {value} of IKEv1 is not supported; {', '.join(map(str, table))} are")
    return table[value]


def _inverse(table: dict[int, int], transform: Encr | Integ) -> int:
    for value, number in table.items():
        if number == transform.value:
            return value
    raise ValueError(f"{transform.name} has no number in IKEv1")
