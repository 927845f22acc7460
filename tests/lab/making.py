"""SAs and policies for the tests of the kernel's IPsec."""

from __future__ import annotations

import select
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest

from natcompat.errors import NatCompatError
from natcompat.ipsec import (
    Direction,
    Encr,
    Integ,
    Policy,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)
from natcompat.kernel.pfkey import open_ipsec
from natcompat.kernel.pfkey.kernel import PfKeyIPsec
from natcompat.kernel.xfrm.kernel import XfrmIPsec
from tests.lab.topology import wait_for

Opened = TypeVar("Opened", bound=XfrmIPsec | PfKeyIPsec)

OUTER = {4: ("192.0.2.1", "192.0.2.2"), 6: ("2001:db8::1", "2001:db8::2")}
PORTS = UDPEncapsulation(local_port=4500, remote_port=34567)
SELECTOR = TrafficSelector(source="10.2.0.0/24", destination="10.1.0.0/16")


def make(spi: int = 0xC0DE0001, version: int = 4, **changes: Any) -> SecurityAssociation:
    arguments: dict[str, Any] = {
        "spi": spi,
        "source": OUTER[version][0],
        "destination": OUTER[version][1],
        "direction": Direction.OUT,
        "encryption": Encr.AES_GCM_16,
        "encryption_key": bytes(range(1, 21)),
        "reqid": 7,
    }
    return SecurityAssociation(**{**arguments, **changes})


def cbc(spi: int = 0xC0DE0001, **changes: Any) -> SecurityAssociation:
    return make(
        spi,
        **{
            "encryption": Encr.AES_CBC,
            "encryption_key": bytes(range(16)),
            "integrity": Integ.HMAC_SHA2_256_128,
            "integrity_key": bytes(range(32)),
            **changes,
        },
    )


def modest(spi: int = 0xC0DE0001, **changes: Any) -> SecurityAssociation:
    """Return an SA that af_key can have, too."""
    integrity = {"integrity": Integ.HMAC_SHA2_384_192, "integrity_key": bytes(range(48))}
    return cbc(spi, **{**integrity, "replay_window": 32, **changes})


def tunnel(direction: Direction = Direction.IN, **changes: Any) -> Policy:
    arguments: dict[str, Any] = {
        "direction": direction,
        "selector": SELECTOR,
        "source": "192.0.2.1",
        "destination": "192.0.2.2",
        "reqid": 7,
    }
    return Policy(**{**arguments, **changes})


def refused(what: Any, *arguments: Any, **options: Any) -> NatCompatError:
    with pytest.raises(NatCompatError) as caught:
        what(*arguments, **options)
    return caught.value


def open_pfkey() -> PfKeyIPsec:
    ipsec = open_ipsec("linux")
    assert isinstance(ipsec, PfKeyIPsec)
    return ipsec


@contextmanager
def emptied(ipsec: Opened) -> Iterator[Opened]:
    """Have nothing installed before and behind."""
    with ipsec:
        try:
            ipsec.flush_policies()
            ipsec.flush_sas()
            yield ipsec
        finally:
            ipsec.flush_policies()
            ipsec.flush_sas()


def next_event(events: Any, kind: type) -> Any:
    """Return the next event of a kind, among those of others."""
    found: list[Any] = []

    def one() -> Any:
        select.select([events], [], [], 10)
        found.extend(each for each in events.read() if isinstance(each, kind))
        return found

    return wait_for(f"a {kind.__name__}", one)[0]
