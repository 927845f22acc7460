"""Traffic selectors: networks, ranges of addresses and ports, and which packets they mean."""

from __future__ import annotations

import errno
from dataclasses import replace
from ipaddress import IPv4Address, ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natcompat.errors import NatCompatError
from natcompat.esp.engine.packet import Flow, matches
from natcompat.ipsec import AddressRange, PortRange, TrafficSelector
from natcompat.ipsec.selectors import ANY_PORT, refuse_ranges


def selector(**changes: Any) -> TrafficSelector:
    return TrafficSelector(**{"source": "10.0.0.0/8", "destination": "10.9.0.0/16", **changes})


@pytest.mark.parametrize(
    ("addresses", "network", "exact"),
    {
        "a network": ("10.0.0.0-10.0.0.255", "10.0.0.0/24", None),
        "one address": ("10.0.0.7-10.0.0.7", "10.0.0.7/32", None),
        "everything": ("0.0.0.0-255.255.255.255", "0.0.0.0/0", None),
        "no network": ("10.0.0.5-10.0.0.9", "10.0.0.0/28", "10.0.0.5-10.0.0.9"),
        "over a boundary": ("10.0.0.255-10.0.1.0", "10.0.0.0/23", "10.0.0.255-10.0.1.0"),
        "spaces": ("10.0.0.5 - 10.0.0.9", "10.0.0.0/28", "10.0.0.5-10.0.0.9"),
    }.values(),
)
def test_a_range_of_addresses_has_its_network(addresses: str, network: str, exact: str | None) -> None:
    made = selector(source=addresses)
    assert made.source == ip_network(network)
    assert str(made.source_range) == str(exact)
    assert made.has_ranges == (exact is not None)


@pytest.mark.parametrize(
    ("ports", "port", "exact"),
    {
        "any": (0, 0, ANY_PORT),
        "one": (25, 25, PortRange(25, 25)),
        "one in words": ("25", 25, PortRange(25, 25)),
        "all": ("0-65535", 0, ANY_PORT),
        "a range": ("5000-5999", 0, PortRange(5000, 5999)),
        "one, as a range": (PortRange(25, 25), 25, PortRange(25, 25)),
    }.values(),
)
def test_ports(ports: Any, port: int, exact: PortRange) -> None:
    made = selector(protocol=6, destination_port=ports)
    assert (made.destination_port, made.destination_ports) == (port, exact)
    assert made.has_ranges == (exact not in (ANY_PORT, PortRange(port, port)))


@pytest.mark.parametrize(
    "changes",
    {
        "backwards": {"source": "10.0.0.9-10.0.0.5"},
        "two families": {"source": "10.0.0.9-2001:db8::1"},
        "no address": {"source": "10.0.0.9-next"},
        "ports backwards": {"protocol": 6, "source_port": "9-5"},
        "no port": {"protocol": 6, "source_port": "ssh"},
        "a port too many": {"protocol": 6, "source_port": "1-65536"},
        "ports without a protocol": {"source_port": "1-5"},
        "a range of another network": {"source_range": AddressRange("192.0.2.1", "192.0.2.3")},
    }.values(),
)
def test_what_is_no_range_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"source|first|protocol"):
        selector(**changes)


def test_ranges_stay_when_something_else_is_replaced() -> None:
    """A selector never becomes wider than what it was made of."""
    made = selector(source="10.0.0.5-10.0.0.9", protocol=17, source_port="5000-5999", destination_port=53)
    other = replace(made, destination=ip_network("10.8.0.0/16"))
    assert other.source_range == made.source_range
    assert other.source_ports == PortRange(5000, 5999)
    assert other.destination_port == 53
    assert replace(other, destination=ip_network("10.9.0.0/16")) == made
    assert replace(made, destination_port=0).destination_ports == ANY_PORT


def test_text_and_hash_have_the_ranges() -> None:
    made = selector(source="10.0.0.5-10.0.0.9", protocol=17, source_port="5000-5999", destination_port=53)
    assert str(made) == "10.0.0.5-10.0.0.9 port 5000-5999 to 10.9.0.0/16 port 53, protocol 17"
    assert len({made, selector(source="10.0.0.0/28"), replace(made, protocol=6)}) == 3


def test_who_has_no_ranges_refuses_them() -> None:
    refuse_ranges([selector(protocol=6, source_port=25)], "XFRM")
    with pytest.raises(NatCompatError, match=r"XFRM.*10\.0\.0\.5-10\.0\.0\.9") as caught:
        refuse_ranges([selector(source="10.0.0.5-10.0.0.9")], "XFRM")
    assert caught.value.errno == errno.EOPNOTSUPP


@given(st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_the_networks_of_a_range_are_the_range(one: int, other: int) -> None:
    addresses = AddressRange(IPv4Address(min(one, other)), IPv4Address(max(one, other)))
    networks = addresses.networks()
    assert sum(network.num_addresses for network in networks) == abs(one - other) + 1
    assert addresses.first in addresses.covering_network()
    assert addresses.last in addresses.covering_network()


@given(
    st.tuples(st.integers(0, 40), st.integers(0, 40)),
    st.tuples(st.integers(0, 20), st.integers(0, 20)),
    st.integers(0, 45),
    st.sampled_from([0, 5, 10, 15, 20]),
    st.sampled_from([6, 17, 1]),
)
def test_both_definitions_of_a_match_agree(
    addresses: tuple[int, int], ports: tuple[int, int], address: int, port: int, protocol: int
) -> None:
    base = int(IPv4Address("10.0.0.0"))
    first, last = sorted(addresses)
    made = TrafficSelector(
        source=AddressRange(IPv4Address(base + first), IPv4Address(base + last)),
        destination="10.9.0.0/16",
        protocol=6,
        source_port=PortRange(*sorted(ports)),
    )
    source, destination = IPv4Address(base + address), ip_address("10.9.0.1")
    expected = first <= address <= last and protocol == 6 and port in made.source_ports
    assert made.matches(source, destination, protocol, port, 80) == expected
    flow = Flow(4, protocol, int(source), int(destination), port, 80)
    assert matches(made, flow) == expected


@pytest.mark.parametrize(
    ("ports", "mask"),
    [
        (PortRange(0, 65535), 0),
        (PortRange(25, 25), 0xFFFF),
        (PortRange(0, 0), 0xFFFF),
        (PortRange(5000, 5007), 0xFFF8),
        (PortRange(32768, 65535), 0x8000),
        (PortRange(5001, 5008), None),  # not aligned
        (PortRange(5000, 5005), None),
        (PortRange(1024, 65535), None),
    ],
)
def test_the_mask_of_ports(ports: PortRange, mask: int | None) -> None:
    assert ports.mask == mask
    if mask is not None:
        assert [port for port in range(0x10000) if port & mask == ports.first] == list(
            range(ports.first, ports.last + 1)
        )


def test_port_0_alone_is_not_any_port() -> None:
    made = selector(protocol=1, source_port=PortRange(0, 0))
    assert made.source_ports == PortRange(0, 0)
    assert made.has_ranges
    assert made != selector(protocol=1)


def test_who_has_port_masks_takes_what_they_can_say() -> None:
    refuse_ranges([selector(protocol=6, source_port="5000-5007")], "XFRM", port_masks=True)
    for refused in (
        selector(protocol=6, source_port="5000-5008"),
        selector(protocol=6, source_port="5000-5007", destination="10.0.0.5-10.0.0.9"),
    ):
        with pytest.raises(NatCompatError, match="ports under a mask"):
            refuse_ranges([refused], "XFRM", port_masks=True)
