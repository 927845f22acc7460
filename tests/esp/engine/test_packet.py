"""Inner packets, trailers, ECN and checksums, each against scapy or a table of the RFC."""

from __future__ import annotations

from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from scapy.layers.inet import ICMP, IP, TCP, UDP, IPOption_NOP
from scapy.layers.inet6 import (
    MIP6MH_BU,
    ICMPv6EchoRequest,
    IPv6,
    IPv6ExtHdrDestOpt,
    IPv6ExtHdrFragment,
    IPv6ExtHdrHopByHop,
    IPv6ExtHdrRouting,
    PadN,
)

from natcompat.esp.engine import packet as packets
from natcompat.esp.engine.packet import Flow
from natcompat.esp.engine.results import Reason
from natcompat.ipsec import TrafficSelector
from tests.support.esp import INNER, inner, ip_packet, udp

V4: dict[str, Any] = dict(zip(("src", "dst"), INNER[4], strict=True))
V6: dict[str, Any] = dict(zip(("src", "dst"), INNER[6], strict=True))


def flow(packet: Any) -> Flow | None:
    whole = bytes(packet)
    assert packets.inner_length(whole) == len(whole)
    return packets.flow_of(whole)


def expected(version: int, protocol: int, source_port: int = 0, destination_port: int = 0) -> Flow:
    source, destination = (int(ip_address(each)) for each in INNER[version])
    return Flow(version, protocol, source, destination, source_port, destination_port)


@pytest.mark.parametrize(
    ("packet", "found"),
    [
        (IP(**V4) / UDP(sport=1234, dport=53) / b"x", expected(4, 17, 1234, 53)),
        (IP(**V4) / TCP(sport=80, dport=81), expected(4, 6, 80, 81)),
        (IP(**V4, options=[IPOption_NOP()] * 4) / UDP(sport=1, dport=2), expected(4, 17, 1, 2)),
        (IP(**V4) / ICMP(type=8, code=0), expected(4, 1, 8, 0)),
        (IP(**V4) / ICMP(type=3, code=4), expected(4, 1, 3, 4)),
        (IP(**V4, proto=47) / bytes(40), expected(4, 47)),
        (IP(**V4, proto=17, frag=5) / bytes(40), expected(4, 17)),
        (IP(**V4, flags="MF") / UDP(sport=1234, dport=53), expected(4, 17, 1234, 53)),
        (IP(**V4, proto=6) / b"ab", expected(4, 6)),
        (IPv6(**V6) / UDP(sport=1234, dport=53) / b"x", expected(6, 17, 1234, 53)),
        (IPv6(**V6) / ICMPv6EchoRequest(), expected(6, 58, 128, 0)),
        (IPv6(**V6) / MIP6MH_BU(), expected(6, 135, 5, 0)),
        (
            IPv6(**V6)
            / IPv6ExtHdrHopByHop(options=PadN(optdata=bytes(12)))
            / IPv6ExtHdrRouting(addresses=["::1"])
            / IPv6ExtHdrDestOpt()
            / TCP(sport=7, dport=8),
            expected(6, 6, 7, 8),
        ),
        (IPv6(**V6) / IPv6ExtHdrFragment(m=1, nh=17) / UDP(sport=7, dport=8), expected(6, 17, 7, 8)),
        (IPv6(**V6) / IPv6ExtHdrFragment(offset=9, nh=17) / bytes(16), expected(6, 17)),
        (IPv6(**V6, nh=51) / (b"\x11\x04" + bytes(22)) / UDP(sport=7, dport=8), expected(6, 17, 7, 8)),
        (IPv6(**V6, nh=59), expected(6, 59)),
        (IPv6(**V6, nh=60) / b"\x11\0", None),
        (IPv6(**V6, nh=60) / (b"\x3c\0" + bytes(6)) / (b"\x3c\0" + bytes(6)), None),
        (IPv6(**V6, nh=60) / ((b"\x3c\0" + bytes(6)) * 9), None),
    ],
    ids=lambda value: value.summary() if hasattr(value, "summary") else "",
)
def test_flows(packet: Any, found: Flow | None) -> None:
    assert flow(packet) == found
    key = packets.flow_key(bytes(packet))
    assert (key is None) == (found is None)


@given(
    ports=st.lists(st.tuples(st.integers(0, 65535), st.integers(0, 65535)), min_size=2, max_size=2),
    protocols=st.lists(st.sampled_from([1, 6, 17, 47]), min_size=2, max_size=2),
    versions=st.lists(st.sampled_from([4, 6]), min_size=2, max_size=2),
)
def test_equal_keys_are_equal_flows(
    ports: list[tuple[int, int]], protocols: list[int], versions: list[int]
) -> None:
    one, other = (
        ip_packet(
            *INNER[version],
            udp(source_port=each[0], destination_port=each[1]).ljust(40, b"\0"),
            protocol=protocol,
        )
        for each, protocol, version in zip(ports, protocols, versions, strict=True)
    )
    same = packets.flow_of(one) == packets.flow_of(other)
    assert (packets.flow_key(one) == packets.flow_key(other)) == same


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"\x45",
        inner(4)[:19],
        inner(6)[:39],
        inner(4)[:-1],
        inner(6)[:-1],
        b"\x44" + inner(4)[1:],
        b"\x4f" + inner(4)[1:],
        inner(4)[:2] + b"\0\x13" + inner(4)[4:],
        b"\x55" + inner(4)[1:],
        b"\0" * 60,
    ],
    ids=[
        "nothing", "a byte", "IPv4 header cut", "IPv6 header cut", "IPv4 cut", "IPv6 cut", "header short",
        "header too long", "total length 19", "version 5", "version 0",
    ],
)  # fmt: skip
def test_no_packets(packet: bytes) -> None:
    assert packets.inner_length(packet) == 0


def test_a_packet_may_be_followed_by_padding() -> None:
    for version in (4, 6):
        assert packets.inner_length(inner(version) + bytes(100)) == len(inner(version))


@pytest.mark.parametrize(
    ("selector", "match"),
    [
        ({}, True),
        ({"protocol": 17}, True),
        ({"protocol": 6}, False),
        ({"protocol": 17, "destination_port": 53}, True),
        ({"protocol": 17, "destination_port": 54}, False),
        ({"protocol": 17, "source_port": 1234, "destination_port": 53}, True),
        ({"protocol": 17, "source_port": 1235}, False),
        ({"source": "10.1.0.0/31"}, True),
        ({"source": "10.1.0.2/31"}, False),
        ({"destination": "10.2.0.1"}, True),
        ({"destination": "10.2.0.2"}, False),
        ({"source": "fd00:1::/64", "destination": "fd00:2::/64"}, False),
    ],
    ids=str,
)
def test_selectors(selector: dict[str, Any], match: bool) -> None:
    arguments = {"source": "10.0.0.0/8", "destination": "0.0.0.0/0", **selector}
    found = packets.flow_of(inner(4))
    assert found is not None
    assert packets.matches(TrafficSelector(**arguments), found) is match


# RFC 6040, figure 4: inner field down, outer field across
NOT_ECT, ECT_1, ECT_0, CE = 0, 1, 2, 3
DECAPSULATION: dict[int, dict[int, int | None]] = {
    NOT_ECT: {NOT_ECT: NOT_ECT, ECT_0: NOT_ECT, ECT_1: NOT_ECT, CE: None},
    ECT_0: {NOT_ECT: ECT_0, ECT_0: ECT_0, ECT_1: ECT_1, CE: CE},
    ECT_1: {NOT_ECT: ECT_1, ECT_0: ECT_1, ECT_1: ECT_1, CE: CE},
    CE: {NOT_ECT: CE, ECT_0: CE, ECT_1: CE, CE: CE},
}


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("mine", DECAPSULATION)
@pytest.mark.parametrize("outer", [NOT_ECT, ECT_0, ECT_1, CE])
@pytest.mark.parametrize("dscp", [0, 46])
def test_ecn(version: int, mine: int, outer: int, dscp: int) -> None:
    packet = inner(version, traffic_class=dscp << 2 | mine)
    result = packets.decapsulate_ecn(packet, 10 << 2 | outer)
    ecn = DECAPSULATION[mine][outer]
    if ecn is None:
        assert result is None
    else:
        assert result == inner(version, traffic_class=dscp << 2 | ecn), "the header checksum is right, too"


@given(st.binary(max_size=200))
def test_checksum(data: bytes) -> None:
    """As in RFC 1071: over the data and its checksum the sum is all ones."""
    even = data + b"\0" * (len(data) % 2)
    words = [int.from_bytes(even[at : at + 2]) for at in range(0, len(even), 2)]
    total = sum(words)
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    assert packets.checksum(data) == total ^ 0xFFFF


ORIGINAL = {4: "10.9.8.7", 6: "fd00:9::7"}


def transport(version: int, source: str, destination: str, protocol: str, payload: bytes) -> bytes:
    """Return a TCP segment or UDP datagram with the checksum that scapy computes."""
    header = IP if version == 4 else IPv6
    layer = TCP(sport=4321, dport=80) if protocol == "TCP" else UDP(sport=4321, dport=80)
    packet = bytes(header(src=source, dst=destination) / layer / payload)
    return packet[20 if version == 4 else 40 :]


@given(
    version=st.sampled_from([4, 6]),
    protocol=st.sampled_from(["TCP", "UDP"]),
    payload=st.binary(max_size=90),
    translated=st.integers(1, (1 << 32) - 2),
)
def test_checksums_after_a_nat(version: int, protocol: str, payload: bytes, translated: int) -> None:
    """RFC 3948, 3.1.2: what the peer computed with its own address is right for the NAT's."""
    source = ip_address(translated.to_bytes(4) if version == 4 else bytes(12) + translated.to_bytes(4))
    original, destination = ip_address(ORIGINAL[version]), ip_address(INNER[version][1])
    before = transport(version, str(original), str(destination), protocol, payload)
    after = transport(version, str(source), str(destination), protocol, payload)
    number = 6 if protocol == "TCP" else 17
    assert packets.fix_transport_checksum(number, before, source, destination, original) == after
    anew = packets.fix_transport_checksum(number, before, source, destination, None)
    if (version, protocol) == (4, "UDP"):
        assert anew == after[:6] + b"\0\0" + after[8:], "none at all"
    else:
        assert anew == after


def test_a_corrupt_segment_stays_corrupt() -> None:
    source, original, destination = (ip_address(each) for each in ("192.0.2.9", "10.9.8.7", "192.0.2.2"))
    good = transport(4, str(original), str(destination), "TCP", b"payload")
    bad = good[:-1] + b"?"
    fixed = packets.fix_transport_checksum(6, bad, source, destination, original)
    assert fixed != transport(4, str(source), str(destination), "TCP", b"payloa?")
    assert fixed[:-1] == transport(4, str(source), str(destination), "TCP", b"payload")[:-1]


def test_no_checksum_stays_none_and_others_are_left_alone() -> None:
    source, original, destination = (ip_address(each) for each in ("192.0.2.9", "10.9.8.7", "192.0.2.2"))
    assert packets.fix_transport_checksum(17, udp(), source, destination, original) == udp()
    for protocol, payload in ((47, bytes(40)), (6, bytes(19)), (17, bytes(7))):
        assert packets.fix_transport_checksum(protocol, payload, source, destination, original) == payload


def test_a_udp_checksum_of_zero_is_sent_as_ones() -> None:
    """Found by search: a datagram whose checksum is 0x0000 for the new address."""
    source, original, destination = (ip_address(each) for each in ("192.0.2.9", "10.9.8.7", "192.0.2.2"))
    probe = transport(4, str(source), str(destination), "UDP", b"\0\0")
    payload = probe[6:8]  # its complement sums up to ones
    after = transport(4, str(source), str(destination), "UDP", payload)
    before = transport(4, str(original), str(destination), "UDP", payload)
    assert after[6:8] == b"\xff\xff"
    assert packets.fix_transport_checksum(17, before, source, destination, original) == after


@pytest.mark.parametrize(
    ("packet", "reason"),
    [
        (IP(**V4, frag=1) / bytes(8), Reason.FRAGMENT),
        (IP(**V4, flags="MF") / bytes(8), Reason.FRAGMENT),
        (IPv6(**V6) / IPv6ExtHdrFragment(nh=17) / UDP(), Reason.FRAGMENT),
        (IPv6(**V6) / IPv6ExtHdrHopByHop() / UDP(), Reason.HEADERS),
        (IPv6(**V6) / IPv6ExtHdrRouting(addresses=["::1"]) / UDP(), Reason.HEADERS),
    ],
    ids=["later fragment", "first fragment", "IPv6 fragment", "hop by hop", "routing"],
)
def test_what_transport_mode_cannot_carry(packet: Any, reason: Reason) -> None:
    assert packets.split_for_transport(bytes(packet)) is reason


def test_what_transport_mode_carries() -> None:
    options = bytes(IP(**V4, options=[IPOption_NOP()] * 4) / UDP())
    assert packets.split_for_transport(options) == (17, options[24:])
    with_header = bytes(IPv6(**V6) / IPv6ExtHdrDestOpt() / UDP())
    assert packets.split_for_transport(with_header) == (60, with_header[40:])


@pytest.mark.parametrize("version", [4, 6])
def test_the_header_is_made_again(version: int) -> None:
    source, destination = (ip_address(each) for each in INNER[version])
    made = packets.join_for_transport(source, destination, 17, udp(), 0xB9)
    assert made == inner(version, traffic_class=0xB9)


@given(st.binary(max_size=40), st.integers(0, 15), st.integers(0, 255))
def test_trailers(payload: bytes, length: int, next_header: int) -> None:
    plaintext = payload + packets.trailers(next_header)[length]
    assert packets.payload_length(plaintext) == len(payload)
    assert plaintext[-1] == next_header


@pytest.mark.parametrize(
    "plaintext",
    [b"\1\2\4\3\x04", b"\0\0\1\x04", b"\2\1\4", b"\1\2\3\xff\x04", b"\1\2\3\4\4"],
    ids=["wrong", "zero", "longer than the packet", "far longer", "one too many"],
)
def test_bad_padding(plaintext: bytes) -> None:
    assert packets.payload_length(plaintext) == -1


def packets_of_few_flows() -> st.SearchStrategy[bytes]:
    """Packets that are often of the flow of the one before, or look as if they were."""
    whole = st.builds(
        lambda version, port, payload, traffic_class: ip_packet(
            *INNER[version], udp(payload, source_port=port), traffic_class=traffic_class
        ),
        st.sampled_from([4, 6]),
        st.sampled_from([1, 2]),
        st.binary(max_size=40),
        st.sampled_from([0, 0, 0, 1]),
    )

    def changed(packet: bytes, at: int, to: int) -> bytes:
        return packet[: at % len(packet)] + bytes((to,)) + packet[at % len(packet) + 1 :]

    return st.one_of(whole, whole, st.builds(changed, whole, st.integers(0, 50), st.integers(0, 255)))


@given(burst=st.lists(packets_of_few_flows() | st.binary(max_size=50), max_size=20))
def test_a_run_is_of_one_flow(burst: list[bytes]) -> None:
    found = list(packets.runs(memoryview(each) for each in burst))
    assert [packet for _, run in found for packet in run] == burst
    for key, run in found:
        for packet in run:
            sound = len(packet) == packets.inner_length(packet) > 0
            assert key == (packets.flow_key(packet) if sound else None)
        if key is not None:
            assert len({packets.outer_fields(packet) for packet in run}) == 1


def test_packets_of_one_flow_are_one_run() -> None:
    for version in (4, 6):
        burst = [ip_packet(*INNER[version], udp(bytes(length))) for length in (100, 100, 7, 1300)]
        assert [run for _, run in packets.runs(burst)] == [burst]
