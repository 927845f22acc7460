"""Segmentation and merging in C, against scapy and the portable checksum: what comes out is what went in."""

from __future__ import annotations

import struct
from typing import Any, Final

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natcompat.esp.engine.packet import checksum

_datapath = pytest.importorskip("natcompat.esp.datapath.compiled", reason="the C data path is not built here")
ffi: Any = _datapath.ffi
lib: Any = _datapath.lib

NEEDS_CSUM: Final = 1
NONE, TCPV4, TCPV6, UDP_L4, ECN = 0, 1, 4, 5, 0x80  # struct virtio_net_hdr, gso_type
FIN, SYN, RST, PSH, ACK, URG, CWR = 1, 2, 4, 8, 16, 32, 0x80
TCP, UDP = 6, 17
MALFORMED, UNSUPPORTED, BAD_CHECKSUM = -1, -2, -3


def pseudo_sum(packet: bytes, transport: int, protocol: int) -> int:
    """Return what the kernel leaves in the checksum field: the folded sum of the pseudo-header."""
    addresses = packet[12:20] if packet[0] >> 4 == 4 else packet[8:40]
    length = len(packet) - transport
    return 0xFFFF - checksum(addresses + struct.pack("!II", length, protocol))


def ip(version: int, protocol: int, body: bytes, *, ident: int = 7, df: bool = True, hop: int = 64) -> bytes:
    if version == 6:
        header = struct.pack("!IHBB", 0x60012345, len(body), protocol, hop)
        return header + bytes.fromhex("20010db8" + "00" * 11 + "01" + "20010db8" + "00" * 11 + "02") + body
    header = struct.pack("!BBHHHBB", 0x45, 0, 20 + len(body), ident, 0x4000 if df else 0, hop, protocol)
    addresses = bytes((10, 0, 0, 1, 10, 0, 0, 2))
    return header + checksum(header + bytes(2) + addresses).to_bytes(2) + addresses + body


def finish(packet: bytes, transport: int, protocol: int) -> bytes:
    """Return `packet` with the right TCP or UDP checksum."""
    at = transport + (16 if protocol == TCP else 6)
    zeroed = packet[:at] + bytes(2) + packet[at + 2 :]
    addresses = packet[12:20] if packet[0] >> 4 == 4 else packet[8:40]
    total = checksum(addresses + struct.pack("!II", len(packet) - transport, protocol) + zeroed[transport:])
    return packet[:at] + (total or (0xFFFF if protocol == UDP else 0)).to_bytes(2) + packet[at + 2 :]


def tcp_packet(
    version: int = 4,
    payload: bytes = b"",
    *,
    sequence: int = 1000,
    flags: int = ACK,
    options: bytes = b"",
    acknowledged: int = 1,
    window: int = 512,
    port: int = 5001,
    **more: Any,
) -> bytes:
    offset = (20 + len(options)) // 4 << 4
    header = struct.pack(
        "!HHIIBBHHH", port, 443, sequence & 0xFFFFFFFF, acknowledged, offset, flags, window, 0, 0
    )
    return finish(ip(version, TCP, header + options + payload, **more), 20 if version == 4 else 40, TCP)


def udp_packet(version: int = 4, payload: bytes = b"", *, port: int = 5001, **more: Any) -> bytes:
    header = struct.pack("!HHHH", port, 443, 8 + len(payload), 0)
    return finish(ip(version, UDP, header + payload, **more), 20 if version == 4 else 40, UDP)


def virtio(
    flags: int = 0, gso: int = 0, header: int = 0, size: int = 0, start: int = 0, at: int = 0
) -> bytes:
    return struct.pack("=BBHHHH", flags, gso, header, size, start, at)


def super_packet(packet: bytes, protocol: int, size: int, gso: int | None = None) -> bytes:
    """Return the frame in which the kernel hands out `packet`, to be cut in pieces of `size` bytes."""
    version = packet[0] >> 4
    transport = 20 if version == 4 else 40
    at = 16 if protocol == TCP else 6
    partial = pseudo_sum(packet, transport, protocol).to_bytes(2)
    packet = packet[: transport + at] + partial + packet[transport + at + 2 :]
    if gso is None:
        gso = UDP_L4 if protocol == UDP else TCPV4 if version == 4 else TCPV6
    return virtio(NEEDS_CSUM, gso, 0, size, transport, at) + packet


def split(frame: bytes) -> list[bytes] | int:
    state = ffi.new("struct split *")
    buffer = ffi.from_buffer(frame)
    count = lib.split_begin(state, buffer, len(frame))
    if count < 0:
        return int(count)
    packets = []
    while length := lib.split_length(state):
        out = ffi.new("uint8_t[]", length)  # of exactly this length, for the sanitizers
        assert lib.split_next(state, out) == length
        packets.append(bytes(ffi.buffer(out, length)))
    assert lib.split_next(state, ffi.NULL) == 0
    assert len(packets) == count
    return packets


def merge(packets: list[bytes], *, with_udp: bool = True) -> list[bytes]:
    """Return the frames that are written to the TUN for a batch of received packets."""
    state = ffi.new("struct merge *")
    state.kinds = 15 if with_udp else 3
    lib.merge_begin(state)
    kept = []
    for packet in packets:
        data = ffi.new("uint8_t[]", packet)
        kept.append(data)
        assert lib.merge_add(state, data, len(packet)) == 0
    frames = []
    header, pieces = ffi.new("uint8_t[10]"), ffi.new("struct iovec[260]")
    for number in range(state.frames):
        count = lib.merge_finish(state, number, header, pieces, 260)
        assert count >= 2
        frames.append(
            b"".join(bytes(ffi.buffer(pieces[n].iov_base, pieces[n].iov_len)) for n in range(count))
        )
    assert lib.merge_finish(state, state.frames, header, pieces, 260) == -1
    return frames


def reference(packet: bytes, protocol: int, size: int) -> list[bytes]:
    """Cut `packet` as RFC 9293 and tcp_gso_segment() say, with checksums computed anew."""
    v4 = packet[0] >> 4 == 4
    transport = 20 if v4 else 40
    header = transport + (8 if protocol == UDP else (packet[transport + 12] >> 4) * 4)
    payload = packet[header:]
    pieces = [payload[at : at + size] for at in range(0, len(payload), size)] or [b""]
    result = []
    for number, piece in enumerate(pieces):
        head = bytearray(packet[:header])
        if v4:
            head[2:4] = (header + len(piece)).to_bytes(2)
            head[4:6] = ((int.from_bytes(packet[4:6]) + number) & 0xFFFF).to_bytes(2)
            head[10:12] = bytes(2)
            head[10:12] = checksum(bytes(head[:20])).to_bytes(2)
        else:
            head[4:6] = (header - 40 + len(piece)).to_bytes(2)
        if protocol == UDP:
            head[transport + 4 : transport + 6] = (8 + len(piece)).to_bytes(2)
        else:
            sequence = int.from_bytes(packet[transport + 4 : transport + 8]) + number * size
            head[transport + 4 : transport + 8] = (sequence & 0xFFFFFFFF).to_bytes(4)
            if number:
                head[transport + 13] &= ~CWR & 0xFF
            if number + 1 < len(pieces):
                head[transport + 13] &= ~(FIN | PSH) & 0xFF
        result.append(finish(bytes(head) + piece, transport, protocol))
    return result


# ---- checksums


@given(st.binary(max_size=300), st.integers(0, 0xFFFF))
def test_the_sum_is_that_of_rfc_1071(data: bytes, start: int) -> None:
    buffer, to = ffi.new("uint8_t[]", data), ffi.new("uint8_t[]", len(data))
    expected = checksum(start.to_bytes(2) + data)
    for total in (
        lib.checksum_add(struct.unpack("=H", start.to_bytes(2))[0], buffer, len(data)),
        lib.checksum_copy(struct.unpack("=H", start.to_bytes(2))[0], to, buffer, len(data)),
    ):
        assert 0xFFFF - int.from_bytes(struct.pack("=H", lib.checksum_fold(total))) == expected
    assert bytes(ffi.buffer(to, len(data))) == data


def test_the_sum_does_not_overflow_on_the_largest_packet() -> None:
    data = b"\xff" * 65575
    assert lib.checksum_fold(lib.checksum_add(0xFFFF, data, len(data) - 1)) == 0xFFFF


# ---- splitting


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [TCP, UDP])
@pytest.mark.parametrize(
    ("length", "size"), [(1, 1400), (1400, 1400), (1401, 1400), (65000, 1448), (5000, 1)]
)
def test_a_super_packet_is_cut_as_the_kernel_would(
    version: int, protocol: int, length: int, size: int
) -> None:
    payload = (bytes(range(256)) * 256)[:length]
    if protocol == TCP:
        options = bytes.fromhex("0101080a0000000100000002")
        packet = tcp_packet(
            version, payload, flags=ACK | PSH | FIN | CWR, sequence=0xFFFFF000, options=options, ident=0xFFF0
        )
    else:
        packet = udp_packet(version, payload, ident=0xFFF0)
    assert split(super_packet(packet, protocol, size)) == reference(packet, protocol, size)


def test_scapy_agrees_with_every_field() -> None:
    from scapy.layers.inet import IP
    from scapy.layers.inet import TCP as ScapyTCP

    packet = bytes(
        IP(src="10.1.2.3", dst="10.3.2.1", id=9, flags="DF", tos=0xB8)
        / ScapyTCP(sport=1, dport=2, seq=77, ack=5, flags="PACE", options=[("NOP", None), ("WScale", 3)])
        / (b"natcompat" * 700)
    )
    packets = split(super_packet(packet, TCP, 1000, TCPV4 | ECN))
    assert isinstance(packets, list)
    for number, each in enumerate(packets):
        parsed: Any = IP(each)
        shown = parsed.chksum, parsed[ScapyTCP].chksum
        del parsed.chksum, parsed[ScapyTCP].chksum
        again: Any = IP(bytes(parsed))
        assert shown == (again.chksum, again[ScapyTCP].chksum)
        assert (parsed.id, parsed[ScapyTCP].seq) == (9 + number, 77 + 1000 * number)
        last = number + 1 == len(packets)
        assert str(parsed[ScapyTCP].flags) == ("PA" if last else "A") + "E" + ("C" if not number else "")
    assert b"".join(bytes(IP(each)[ScapyTCP].payload) for each in packets) == b"natcompat" * 700


def test_extension_headers_stay_in_front_of_every_segment() -> None:
    inner = tcp_packet(6, bytes(3000))
    packet = inner[:4] + struct.pack("!HB", len(inner) - 40 + 8, 60) + inner[7:40] + b"\x06\0\1\4\0\0\0\0"
    packet += inner[40:56] + struct.pack("!H", pseudo_sum(inner, 40, TCP)) + inner[58:]
    packets = split(virtio(NEEDS_CSUM, TCPV6, 0, 1000, 48, 16) + packet)
    assert isinstance(packets, list)
    assert [len(each) for each in packets] == [1068] * 3
    for number, each in enumerate(packets):
        assert each[:4] + each[6:48] == packet[:4] + packet[6:48]
        plain = each[:4] + struct.pack("!HB", len(each) - 48, 6) + each[7:40] + each[48:]
        assert plain == finish(plain, 40, TCP)
        assert int.from_bytes(each[52:56]) == 1000 + 1000 * number


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_an_unfinished_checksum_is_completed(version: int, protocol: int) -> None:
    packet = (tcp_packet if protocol == TCP else udp_packet)(version, b"natcompat")
    assert split(super_packet(packet, protocol, 0, NONE)) == [packet]


def test_a_udp_checksum_of_zero_becomes_its_other_form() -> None:
    packet = udp_packet(4, udp_packet(4, bytes(2))[26:28])  # a word that makes up for all the others
    assert packet[26:28] == b"\xff\xff"
    assert split(super_packet(packet, UDP, 0, NONE)) == [packet]
    assert split(super_packet(packet, UDP, 1400)) == [packet]


def test_what_needs_nothing_stays_as_it_is() -> None:
    packet = tcp_packet(4, b"wrong checksum")
    packet = packet[:36] + b"\x12\x34" + packet[38:]
    assert split(virtio() + packet) == [packet]


def test_nobody_vouches_for_a_super_packet_that_is_corrupt() -> None:
    packet = tcp_packet(4, bytes(3000))
    frame = virtio(0, TCPV4, 0, 1000) + packet
    assert split(frame) == reference(packet, TCP, 1000)
    assert split(frame[:-1] + b"\1") == BAD_CHECKSUM


GOOD = super_packet(tcp_packet(4, bytes(100)), TCP, 10)


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (b"", MALFORMED),
        (bytes(29), MALFORMED),
        (GOOD[:-1], MALFORMED),
        (GOOD + b"\0", MALFORMED),
        (GOOD + bytes(70000), MALFORMED),
        (virtio(0, 3, 0, 10) + GOOD[10:], UNSUPPORTED),
        (virtio(NEEDS_CSUM, TCPV4, 0, 0, 20, 16) + GOOD[10:], MALFORMED),
        (virtio(NEEDS_CSUM, TCPV6, 0, 10, 20, 16) + GOOD[10:], MALFORMED),
        (virtio(NEEDS_CSUM, UDP_L4, 0, 10, 20, 16) + GOOD[10:], MALFORMED),
        (virtio(NEEDS_CSUM, TCPV4, 0, 10, 24, 16) + GOOD[10:], MALFORMED),
        (virtio(NEEDS_CSUM, TCPV4, 0, 10, 20, 6) + GOOD[10:], MALFORMED),
        (virtio(NEEDS_CSUM, NONE, 0, 0, 20, 65535) + GOOD[10:], MALFORMED),
        (virtio(NEEDS_CSUM, NONE, 0, 0, 139, 0) + GOOD[10:], MALFORMED),
        (virtio(NEEDS_CSUM, NONE, 0, 0, 0, 16) + GOOD[10:], MALFORMED),
        (GOOD[:16] + b"\x20\0" + GOOD[18:], MALFORMED),
        (GOOD[:42] + b"\x40" + GOOD[43:], MALFORMED),
        (GOOD[:42] + b"\xf0" + GOOD[43:70], MALFORMED),
    ],
)
def test_what_contradicts_itself_is_refused(frame: bytes, why: int) -> None:
    assert split(frame) == why


@settings(max_examples=500)
@given(
    st.binary(max_size=10),
    st.sampled_from(
        [GOOD, super_packet(tcp_packet(6, bytes(99)), TCP, 7), super_packet(udp_packet(4, bytes(9)), UDP, 2)]
    ),
    st.lists(st.tuples(st.integers(0, 80), st.integers(0, 255)), max_size=6),
    st.integers(0, 40),
)
def test_hostile_frames_read_and_write_nothing_else(
    header: bytes, frame: bytes, changes: list[tuple[int, int]], cut: int
) -> None:
    """The sanitizers look; here at least the lengths are true."""
    hostile = bytearray(header + frame[len(header) :])
    for at, value in changes:
        hostile[at % len(hostile)] = value
    packets = split(bytes(hostile[: len(hostile) - cut]))
    if isinstance(packets, list):
        for each in packets:
            assert len(each) == (
                int.from_bytes(each[2:4]) if each[0] >> 4 == 4 else 40 + int.from_bytes(each[4:6])
            )


# ---- merging


@pytest.mark.parametrize("version", [4, 6])
@pytest.mark.parametrize("protocol", [TCP, UDP])
def test_merging_is_the_reverse_of_splitting(version: int, protocol: int) -> None:
    length = 30000 if protocol == TCP else 1000 * 31 + 5
    payload = (bytes(range(251)) * 200)[:length]
    packet = (
        tcp_packet(version, payload, flags=ACK | PSH) if protocol == TCP else udp_packet(version, payload)
    )
    frame = super_packet(packet, protocol, 1000)
    packets = split(frame)
    assert isinstance(packets, list)
    (merged,) = merge(packets)
    # the kernel's hint of the headers' length is the only field that the one need not set
    assert merged[:2] + merged[4:] == frame[:2] + frame[4:]
    assert struct.unpack_from("=H", merged, 2)[0] == len(packet) - len(payload)


def test_udp_is_merged_only_for_devices_that_take_it() -> None:
    packets = [udp_packet(4, bytes(100), ident=number) for number in range(5)]
    assert merge(packets, with_udp=False) == [virtio() + packet for packet in packets]
    assert len(merge(packets)) == 1


def test_nobody_vouches_for_a_corrupt_packet() -> None:
    packets = split(super_packet(tcp_packet(4, bytes(7000)), TCP, 1000))
    assert isinstance(packets, list)
    corrupt = packets[3][:-1] + b"\1"
    frames = merge([*packets[:3], corrupt, *packets[4:]])
    assert frames[1] == virtio() + corrupt
    assert [len(frame) for frame in frames] == [10 + 40 + 3000, 10 + 1040, 10 + 40 + 3000]
    # the first of a frame is looked at, too
    frames = merge([corrupt, *packets[4:]])
    assert frames[0] == virtio() + corrupt
    bad_header = packets[1][:8] + b"\x41" + packets[1][9:]
    assert merge([packets[0], bad_header]) == [virtio() + packets[0], virtio() + bad_header]


FIRST: Final[dict[str, Any]] = {"payload": bytes(1000), "sequence": 0}
NEXT: Final[dict[str, Any]] = {"payload": bytes(1000), "sequence": 1000, "ident": 8}


@pytest.mark.parametrize(
    "different",
    [
        {"sequence": 1001},
        {"sequence": 0},
        {"payload": bytes(1001)},
        {"payload": b""},
        {"flags": ACK | SYN},
        {"flags": ACK | RST},
        {"flags": ACK | URG},
        {"flags": ACK | CWR},
        {"flags": ACK | 0x40},
        {"acknowledged": 2},
        {"window": 513},
        {"options": b"\1\1\1\1"},
        {"port": 5002},
        {"hop": 63},
        {"df": False},
        {"ident": 9},
    ],
    ids=str,
)
def test_what_differs_is_not_merged(different: dict[str, Any]) -> None:
    one, other = tcp_packet(4, **FIRST), tcp_packet(4, **{**NEXT, **different})
    assert len(merge([one, tcp_packet(4, **NEXT)])) == 1
    assert merge([one, other]) == [virtio() + one, virtio() + other]


def test_the_end_of_a_flight_ends_the_frame() -> None:
    packets = [
        tcp_packet(6, bytes(100), sequence=number * 100, flags=ACK | (PSH if number in (1, 3) else 0))
        for number in range(5)
    ]
    assert [len(frame) - 70 for frame in merge(packets)] == [200, 200, 100]


def test_a_frame_holds_64_kib_at_most() -> None:
    packets = [tcp_packet(6, bytes(1400), sequence=1400 * number) for number in range(100)]
    frames = merge(packets)
    assert max(len(frame) - 10 - 60 for frame in frames) == 1400 * (65535 - 60) // 1400 // 1400 * 1400
    assert sum(len(frame) - 70 for frame in frames) == 140000


def test_a_full_batch_takes_no_more() -> None:
    state, packet = ffi.new("struct merge *"), ffi.new("uint8_t[]", bytes(20))
    lib.merge_begin(state)
    assert [lib.merge_add(state, packet, 20) for _ in range(lib.MERGE_MOST + 1)] == [0] * lib.MERGE_MOST + [
        -1
    ]
    assert lib.merge_finish(state, 0, ffi.new("uint8_t[10]"), ffi.new("struct iovec[1]"), 1) == -1


FLAGS: Final = [ACK] * 6 + [ACK | PSH, ACK | FIN, SYN, RST, ACK | CWR, ACK | 0x40]


@st.composite
def streams(draw: st.DrawFn) -> list[bytes]:
    """Several flows, interleaved, mostly in order, with everything that can go wrong."""
    flows = [
        {
            "version": draw(st.sampled_from([4, 6])),
            "port": 5000 + number,
            "sequence": draw(st.integers(0, 0xFFFFFFFF)),
            "ident": draw(st.integers(0, 0xFFFF)),
            "df": draw(st.booleans()),
            "udp": draw(st.booleans()),
        }
        for number in range(draw(st.integers(1, 3)))
    ]
    packets = []
    for _ in range(draw(st.integers(0, 24))):
        flow = draw(st.sampled_from(flows))
        size = draw(st.sampled_from([0, 1, 40, 40, 40, 41]))
        payload = draw(st.integers(0, 0xFFFF)).to_bytes(2) * 21
        ident = flow["ident"]
        flow["ident"] = (ident + draw(st.sampled_from([1, 1, 1, 1, 0, 2]))) & 0xFFFF
        if flow["udp"]:
            packet = udp_packet(
                flow["version"], payload[:size], port=flow["port"], ident=ident, df=flow["df"]
            )
        else:
            packet = tcp_packet(
                flow["version"], payload[:size], port=flow["port"], ident=ident, df=flow["df"],
                sequence=flow["sequence"],
                flags=draw(st.sampled_from(FLAGS)),
            )  # fmt: skip
            flow["sequence"] += size + draw(st.sampled_from([0, 0, 0, 0, 0, 1, -40]))
        if draw(st.integers(0, 9)) == 0:
            at = draw(st.integers(0, len(packet) - 1))
            packet = packet[:at] + bytes((packet[at] ^ 1 << draw(st.integers(0, 7)),)) + packet[at + 1 :]
        if draw(st.integers(0, 19)) == 0:
            packet = packet[: draw(st.integers(1, len(packet)))]
        packets.append(packet)
    return packets


def comparable(packet: bytes) -> bytes:
    """Return what has to stay of a packet: all, but the identifier of what has DF."""
    if packet[0] >> 4 == 4 and len(packet) > 20 and packet[6] & 0x40:
        return packet[:4] + bytes(2) + packet[6:10] + bytes(2) + packet[12:]
    return packet


def flow(packet: bytes) -> bytes:
    """Return the port that stands for a flow; of corrupt packets nothing, for their order does not matter."""
    transport = 20 if packet[0] == 0x45 else 40
    protocol = packet[9:10] if packet[0] == 0x45 else packet[6:7]
    if packet[0] >> 4 not in (4, 6) or len(packet) < transport + 8 or protocol not in (b"\x06", b"\x11"):
        return b""
    whole = len(packet) == (
        int.from_bytes(packet[2:4]) if transport == 20 else int.from_bytes(packet[4:6]) + 40
    )
    right = packet == finish(packet, transport, protocol[0])
    return packet[transport : transport + 2] if whole and right else b""


@settings(max_examples=400, deadline=None)
@given(streams(), st.booleans())
def test_what_is_merged_splits_into_what_was_received(packets: list[bytes], with_udp: bool) -> None:
    again: list[bytes] = []
    for frame in merge(packets, with_udp=with_udp):
        if frame[:10] == virtio():
            again.append(frame[10:])
            continue
        parts = split(frame)
        assert isinstance(parts, list)
        assert len(parts) > 1
        again += parts
    assert sorted(map(comparable, again)) == sorted(map(comparable, packets))
    for port in set(map(flow, packets)) - {b""}:
        order = [comparable(packet) for packet in packets if flow(packet) == port]
        assert [comparable(packet) for packet in again if flow(packet) == port] == order
