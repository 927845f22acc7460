"""Traffic selectors of IKEv2 become policy selectors that match the same packets, or are refused."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natcompat.ike import IkeSelector, policy_selectors, selector_pairs
from natcompat.ipsec import AddressRange, Direction, IPAddress, PortRange, TrafficSelector

IN, OUT = Direction.IN, Direction.OUT
EVERYTHING = IkeSelector.of("0.0.0.0/0")


def matched(selectors: tuple[TrafficSelector, ...], *packet: object) -> bool:
    return any(selector.matches(*packet) for selector in selectors)  # type: ignore[arg-type]


def covers(selector: IkeSelector, address: IPAddress, protocol: int, port: int) -> bool:
    """The meaning of a traffic selector, as RFC 7296, 3.13.1 has it."""
    return (
        int(selector.first_address) <= int(address) <= int(selector.last_address)
        and selector.protocol in (0, protocol)
        and selector.first_port <= port <= selector.last_port
    )


@st.composite
def pairs(draw: st.DrawFn) -> tuple[IkeSelector, IkeSelector]:
    """Two selectors whose ranges begin and end near each other's, in one family."""
    base = draw(st.sampled_from([ip_address("10.0.0.0"), ip_address("fd00::")]))
    protocol = draw(st.sampled_from([0, 6, 17, 132]))

    def one() -> IkeSelector:
        first, last = sorted(draw(st.tuples(st.integers(0, 40), st.integers(0, 40))))
        ports = (0, 65535)
        if protocol:
            low, high = sorted(draw(st.tuples(st.integers(0, 70), st.integers(0, 70))))
            ports = draw(st.sampled_from([(0, 65535), (low, high), (low, low)]))
        return IkeSelector(base + first, base + last, protocol, *ports)

    return one(), one()


@given(pairs(), st.sampled_from([IN, OUT]), st.booleans(), st.data())
def test_the_same_packets_match(
    pair: tuple[IkeSelector, IkeSelector], direction: Direction, ranges: bool, data: st.DataObject
) -> None:
    local, remote = pair
    selectors = policy_selectors(local, remote, direction, ranges=ranges, limit=100_000)
    assert not ranges or len(selectors) == 1
    base = ip_address("10.0.0.0") if local.first_address.version == 4 else ip_address("fd00::")
    for _ in range(20):
        here = base + data.draw(st.integers(0, 48))
        there = base + data.draw(st.integers(0, 48))
        protocol = data.draw(st.sampled_from([6, 17, 132, local.protocol or 1]))
        here_port, there_port = data.draw(st.tuples(st.integers(0, 80), st.integers(0, 80)))
        expected = covers(local, here, protocol, here_port) and covers(remote, there, protocol, there_port)
        packet: tuple[object, ...] = (here, there, protocol, here_port, there_port)
        if direction is IN:
            packet = (there, here, protocol, there_port, here_port)
        assert matched(selectors, *packet) == expected


def test_networks_stay_networks() -> None:
    local, remote = IkeSelector.of("10.1.0.0/16"), IkeSelector.of("10.2.0.0/16", 6, 443, 443)
    assert policy_selectors(local, remote, OUT) == (
        TrafficSelector(source="10.1.0.0/16", destination="10.2.0.0/16", protocol=6, destination_port=443),
    )
    assert policy_selectors(local, remote, IN) == (
        TrafficSelector(source="10.2.0.0/16", destination="10.1.0.0/16", protocol=6, source_port=443),
    )


def test_a_range_is_a_range_or_its_prefixes() -> None:
    local = IkeSelector(ip_address("10.0.0.5"), ip_address("10.0.0.9"), 17, 5000, 5003)
    (whole,) = policy_selectors(local, EVERYTHING, OUT, ranges=True)
    assert whole == TrafficSelector(
        source=AddressRange("10.0.0.5", "10.0.0.9"),
        destination="0.0.0.0/0",
        protocol=17,
        source_port=PortRange(5000, 5003),
    )
    split = policy_selectors(local, EVERYTHING, OUT)
    assert [str(selector.source) for selector in split] == ["10.0.0.5/32", "10.0.0.6/31", "10.0.0.8/31"]
    assert {selector.source_ports for selector in split} == {PortRange(5000, 5003)}  # a block, for a mask
    assert not any(selector.source_range for selector in split)


def test_port_ranges_are_split_into_blocks_of_a_power_of_two() -> None:
    local = IkeSelector.of("10.0.0.1", 6, 1024, 65535)
    blocks = [selector.source_ports for selector in policy_selectors(local, EVERYTHING, OUT)]
    assert blocks == [PortRange(1 << bit, (2 << bit) - 1) for bit in range(10, 16)]
    for block in blocks:
        size = block.last - block.first + 1
        assert size & (size - 1) == 0
        assert block.first % size == 0


def test_icmp_has_type_and_code() -> None:
    echo = IkeSelector.of("10.0.0.1", 1, 0x0800, 0x08FF)
    for direction in (IN, OUT):
        (selector,) = policy_selectors(echo, EVERYTHING, direction)
        assert (selector.source_port, selector.destination_port) == (8, 0)
    (reply,) = policy_selectors(IkeSelector.of("10.0.0.1", 1, 0, 0), EVERYTHING, OUT)
    assert (reply.source_ports, reply.destination_ports) == (PortRange(0, 0), PortRange(0, 0))
    needs_fragmentation = IkeSelector.of("10.0.0.1", 1, 0x0304, 0x0304)
    (selector,) = policy_selectors(needs_fragmentation, needs_fragmentation, OUT)
    assert (selector.source_port, selector.destination_port) == (3, 4)


@pytest.mark.parametrize(
    ("local", "remote", "words"),
    [
        (IkeSelector.of("10.0.0.1", 6), IkeSelector.of("10.0.0.2", 17), "match no packet"),
        (IkeSelector.of("10.0.0.1"), IkeSelector.of("fd00::1"), "match no packet"),
        (IkeSelector.of("10.0.0.1", 1, 0x0800, 0x08FF), IkeSelector.of("10.0.0.2", 1, 0, 255), "different"),
        (IkeSelector.of("10.0.0.1", 1, 0x0302, 0x0504), IkeSelector.of("10.0.0.2"), "several message types"),
        (IkeSelector.of("10.0.0.1", 0, 80, 80), IkeSelector.of("10.0.0.2"), "has no ports"),
        (
            IkeSelector(ip_address("10.0.0.1"), ip_address("10.255.255.254")),
            IkeSelector(ip_address("11.0.0.1"), ip_address("11.255.255.254")),
            "2116 policies",
        ),
    ],
)
def test_what_cannot_be_said_exactly_is_refused(local: IkeSelector, remote: IkeSelector, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        policy_selectors(local, remote, OUT)


def test_opaque_ports_are_refused() -> None:
    with pytest.raises(ValueError, match="OPAQUE"):
        IkeSelector.of("10.0.0.1", 6, 65535, 0)


@pytest.mark.parametrize("arguments", [("10.0.0.2", "10.0.0.1"), ("10.0.0.1", "fd00::1"), ("10.0.0.1", "x")])
def test_ranges_that_are_none_are_refused(arguments: tuple[str, str]) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 - each says it in its own words
        IkeSelector(*arguments)  # type: ignore[arg-type]


def test_the_pairs_of_a_negotiation_are_those_that_fit() -> None:
    v4, v6 = IkeSelector.of("10.0.0.0/8"), IkeSelector.of("fd00::/8")
    tcp, udp = IkeSelector.of("10.2.0.0/16", 6), IkeSelector.of("10.2.0.0/16", 17)
    assert selector_pairs([v4, v6, tcp], [udp, v6]) == [(v4, udp), (v6, v6)]


def test_the_format_of_rfc_7296() -> None:
    data = bytes.fromhex("0706 0010 0050 01bb 0a000005 0a000009")
    selector = IkeSelector.from_bytes(data)
    assert selector == IkeSelector(ip_address("10.0.0.5"), ip_address("10.0.0.9"), 6, 80, 443)
    assert selector.to_bytes() == data


@given(pairs())
def test_bytes_and_back(pair: tuple[IkeSelector, IkeSelector]) -> None:
    for selector in pair:
        assert IkeSelector.from_bytes(selector.to_bytes()) == selector


@given(st.binary(max_size=48))
def test_bytes_that_are_no_selector_raise_value_error(data: bytes) -> None:
    try:
        selector = IkeSelector.from_bytes(data)
    except ValueError:
        return
    assert selector.to_bytes() == data
