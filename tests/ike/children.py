"""Two ends of a CHILD_SA, for the tests: an engine each, and the arguments that both negotiated."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from natcompat.esp.engine import EspEngine, Opened
from natcompat.ike import ChildSa, IkeSelector, NatDetection
from natcompat.ipsec import Encr, Integ, IPsec
from tests.support.esp import inner, ip_packet, only, udp

NEAR, FAR = ("192.0.2.1", 4500), ("192.0.2.2", 4500)
BEHIND_NAT = NatDetection(supported=True, local_behind_nat=True, remote_behind_nat=False)
REMOTE_BEHIND_NAT = NatDetection(supported=True, local_behind_nat=False, remote_behind_nat=True)
REQUEST = inner()
"""From behind the near end to behind the far one."""
ANSWER = ip_packet("10.2.0.1", "10.1.0.1", udp(b"an answer", source_port=53, destination_port=1234))


def _portable() -> EspEngine:
    return EspEngine(timer=False)


def _native() -> EspEngine:
    native = pytest.importorskip("natcompat.esp.datapath.native", reason="the C data path was not built")
    return EspEngine(timer=False, datapath=native.NativeDataPath)


PATHS: list[Callable[[], EspEngine]] = [_portable, _native]


@contextmanager
def two_engines(make: Callable[[], EspEngine]) -> Iterator[tuple[EspEngine, EspEngine]]:
    with make() as near, make() as far:
        yield near, far


class Negotiated:
    """What one exchange of IKE leaves in the hands of both ends. `near` is the initiator of it."""

    def __init__(self, number: int = 1, **changes: Any) -> None:
        self.spis = (0xA000 + number).to_bytes(4), (0xB000 + number).to_bytes(4)
        """Of the near end and of the far end, as IKE has them."""
        self.common: dict[str, Any] = {
            "encryption": Encr.AES_GCM_16,
            "integrity": Integ.NONE,
            "keymat": os.urandom(72),
            "reqid": 7,
            **changes,
        }

    def arguments(self, *, near: bool) -> dict[str, Any]:
        networks = IkeSelector.of("10.1.0.0/16"), IkeSelector.of("10.2.0.0/16")
        return {
            "local": NEAR if near else FAR,
            "remote": FAR if near else NEAR,
            "spi_in": self.spis[0 if near else 1],
            "spi_out": self.spis[1 if near else 0],
            "initiator": near,
            "selectors": [networks if near else networks[::-1]],
            "nat": BEHIND_NAT if near else REMOTE_BEHIND_NAT,
            **self.common,
        }

    def install(self, ipsec: IPsec, *, near: bool, **changes: Any) -> ChildSa:
        return ChildSa.install(ipsec, **{**self.arguments(near=near), **changes})


def carried(
    sender: EspEngine, receiver: EspEngine, packet: bytes, source: tuple[str, int] = NEAR
) -> bytes | None:
    """Return what `receiver` makes of `packet` sealed by `sender`; None: it was dropped."""
    opened = receiver.open(only(sender.seal(packet))[0], source)
    return opened.inner if isinstance(opened, Opened) else None


def databases(ipsec: IPsec) -> tuple[list[Any], list[Any]]:
    """Return names of the SAs and the policies, for comparison."""
    return (
        sorted((str(sa.sa_id), sa.larval, sa.association) for sa in ipsec.list_sas()),
        sorted(map(repr, (entry.policy for entry in ipsec.list_policies()))),
    )
