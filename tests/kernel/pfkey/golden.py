"""SAs of the golden tests, and the messages that belong to them, put together from documented structures."""

from __future__ import annotations

from typing import Any

import pytest

from natcompat.ipsec.associations import SecurityAssociation, UDPEncapsulation
from natcompat.ipsec.transforms import Encr, Integ
from natcompat.ipsec.values import Direction
from natcompat.kernel.pfkey.dialects import DIALECTS
from natcompat.kernel.pfkey.translate import check_sa, encode_sa
from tests.kernel.pfkey import layouts
from tests.kernel.pfkey.layouts import (
    System,
    extension,
    port,
)

ADD, UPDATE = 3, 2
OURS, PEER = "192.0.2.1", "198.51.100.2"
OURS6, PEER6 = "2001:db8::1", "2001:db8::2"
SPI = 0x0A0B0C0D

PORTS = UDPEncapsulation(local_port=4500, remote_port=40001)

GCM: dict[str, Any] = {"encryption": Encr.AES_GCM_16, "encryption_key": bytes(range(1, 21))}

CBC: dict[str, Any] = {
    "encryption": Encr.AES_CBC,
    "encryption_key": bytes(range(1, 17)),
    "integrity": Integ.HMAC_SHA2_512_256,
    "integrity_key": bytes(range(64)),
}

BOTH = pytest.mark.parametrize("direction", Direction, ids=lambda each: each.value)


def association(direction: Direction, version: int = 4, **changes: Any) -> SecurityAssociation:
    ends = (OURS, PEER) if version == 4 else (OURS6, PEER6)
    source, destination = ends if direction is Direction.OUT else ends[::-1]
    arguments: dict[str, Any] = {
        "spi": SPI,
        "source": source,
        "destination": destination,
        "direction": direction,
        "replay_window": 32,
        "reqid": 7,
        **changes,
    }
    return SecurityAssociation(**arguments)


def encoded(system: System, sa: SecurityAssociation, kind: int = ADD) -> bytes:
    dialect = DIALECTS[system.name]
    check_sa(dialect, sa)
    return bytes(encode_sa(dialect, sa, kind).encode())


def ends(system: System, direction: Direction, version: int = 4, **fields: int) -> tuple[bytes, bytes]:
    """Return SADB_EXT_ADDRESS_SRC and _DST, in the order of the packets."""
    ours, peer = (OURS, PEER) if version == 4 else (OURS6, PEER6)
    source, destination = (ours, peer) if direction is Direction.OUT else (peer, ours)
    return system.address(5, source, **fields), system.address(6, destination, **fields)


def nat_t(direction: Direction) -> tuple[bytes, ...]:
    """Return SADB_X_EXT_NAT_T_TYPE, _SPORT, _DPORT: ours is the source of what goes out."""
    source, destination = (4500, 40001) if direction is Direction.OUT else (40001, 4500)
    return extension(layouts.sadb_x_nat_t_type(0, 20, 2)), port(21, source), port(22, destination)


def sa2(mode: int, reqid: int = 7) -> bytes:
    return extension(layouts.sadb_x_sa2(0, 19, mode, 0, 0, 0, reqid))
