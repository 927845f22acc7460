"""Outer headers, TFC padding, dummy packets and transport-mode checksums of the ESP engine."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest

from natcompat.errors import NatCompatError
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.results import Dropped, Opened, Reason
from natcompat.ipsec import (
    Direction,
    Mode,
    TrafficSelector,
    UDPEncapsulation,
)
from tests.support.esp import (
    OUTER,
    Pair,
    inner,
    ip_packet,
    only,
    policy,
    sa,
    udp,
)

pytestmark = pytest.mark.usefixtures("datapath")


@pytest.mark.parametrize("copy_dscp", [True, False])
@pytest.mark.parametrize("copy_ecn", [True, False])
@pytest.mark.parametrize("copy_df", [True, False])
@pytest.mark.parametrize("dont_fragment", [True, False])
@pytest.mark.parametrize("version", [4, 6])
def test_outer_header(
    version: int, dont_fragment: bool, copy_df: bool, copy_ecn: bool, copy_dscp: bool
) -> None:
    pair = Pair(version=4, inner=version, copy_dscp=copy_dscp, copy_ecn=copy_ecn, copy_df=copy_df)
    for traffic_class in (0, 0xB8, 0xB9, 0xB8, 2):
        packet = inner(version, traffic_class=traffic_class, dont_fragment=dont_fragment)
        _, destination = pair.seal(packet)
        expected = (traffic_class & 0xFC if copy_dscp else 0) | (traffic_class & 3 if copy_ecn else 0)
        assert destination.traffic_class == expected
        assert destination.dont_fragment is ((dont_fragment or version == 6) and copy_df)


def test_transport_mode_leaves_the_header_as_it_is() -> None:
    pair = Pair(mode=Mode.TRANSPORT, copy_dscp=False, copy_ecn=False, copy_df=False)
    packet = ip_packet(*OUTER[4], udp(), traffic_class=0xB9, dont_fragment=True)
    sealed, destination = pair.seal(packet)
    assert (destination.traffic_class, destination.dont_fragment) == (0xB9, True)
    assert pair.open(sealed, 0xB9) == ip_packet(*OUTER[4], udp(), traffic_class=0xB9)


@pytest.mark.parametrize("copy_ecn", [True, False])
def test_congestion_goes_inside(copy_ecn: bool) -> None:
    pair = Pair(copy_ecn=copy_ecn)
    capable, incapable = inner(traffic_class=2), inner(traffic_class=0)
    assert pair.open(pair.seal(capable)[0], 3) == (inner(traffic_class=3) if copy_ecn else capable)
    assert pair.open(pair.seal(incapable)[0], 3) == (Reason.ECN if copy_ecn else incapable)


@pytest.mark.parametrize("size", [0, 1, 700, 1372, 1400])
def test_traffic_flow_confidentiality(size: int) -> None:
    pair = Pair(tfc=1400)
    packet = inner(payload=udp(bytes(size)))
    sealed, _ = pair.seal(packet)
    assert len(sealed) == max(1400, len(packet)) + (-max(1400, len(packet)) - 2) % 4 + 2 + 8 + 8 + 16
    assert pair.open(sealed) == packet


def test_dummy_packets() -> None:
    pair = Pair()
    dummy = pair.near.seal_dummy(pair.sent, 300)
    assert not isinstance(dummy, Dropped)
    assert pair.open(dummy[0]) is Reason.DUMMY
    assert pair.open(dummy[0]) is Reason.REPLAYED
    assert pair.open(pair.seal(inner())[0]) == inner()
    with pytest.raises(NatCompatError, match="no outbound SA"):
        pair.far.seal_dummy(pair.expected, 300)
    assert pair.near.seal_dummy(pair.sent, 70000) == Dropped(Reason.TOO_BIG)


@pytest.mark.parametrize("original", [None, "10.9.8.7"])
def test_transport_mode_checksums_through_a_nat(original: str | None) -> None:
    """The peer is 10.9.8.7 and seen as 192.0.2.1."""
    from scapy.layers.inet import IP, TCP

    near, far = EspEngine(timer=False), EspEngine(timer=False)
    ports = UDPEncapsulation(
        local_port=4500, remote_port=4500, original_address=None if original is None else ip_address(original)
    )
    near.add_sa(sa(Direction.OUT, mode=Mode.TRANSPORT, source="10.9.8.7"))
    near.add_policy(
        policy(
            Direction.OUT,
            mode=Mode.TRANSPORT,
            selector=TrafficSelector(source="10.9.8.7", destination="192.0.2.2"),
        )
    )
    arguments: dict[str, Any] = {"source": "192.0.2.1", "destination": "192.0.2.2"}
    far.add_sa(sa(Direction.IN, mode=Mode.TRANSPORT, encapsulation=ports, **arguments))
    far.add_policy(policy(Direction.IN, mode=Mode.TRANSPORT, selector=TrafficSelector(**arguments)))
    sent, received = (
        bytes(IP(src=source, dst="192.0.2.2") / TCP(sport=1, dport=2) / b"payload")
        for source in ("10.9.8.7", "192.0.2.1")
    )
    sealed, _ = only(near.seal(sent))
    opened = far.open(sealed, ("192.0.2.1", 4500))
    assert isinstance(opened, Opened)
    assert opened.inner[20:] == received[20:]
    assert opened.inner[12:20] == received[12:20]
