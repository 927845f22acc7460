"""The recorded conversation is what its README says, and the reader refuses what it cannot read."""

from __future__ import annotations

import re
import struct
from collections import Counter
from decimal import Decimal
from importlib import resources
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from natcompat.commands.verify.conversation import Conversation, Datagram, load
from natcompat.contract import NAT_T_PORT, NON_ESP_MARKER, Verdict, classify

ETHERNET, RAW_IP = 1, 101
MICROSECONDS, NANOSECONDS = 0xA1B2C3D4, 0xA1B23C4D
DATA = resources.files("natcompat") / "data"


def udp(payload: bytes, *, source: int = 4500, destination: int = 4501, length: int | None = None) -> bytes:
    length = 8 + len(payload) if length is None else length
    return struct.pack("!HHHH", source, destination, length, 0) + payload


def ipv4(
    body: bytes,
    *,
    ihl: int = 5,
    protocol: int = 17,
    fragment: int = 0x4000,
    length: int | None = None,
    options: bytes = b"",
) -> bytes:
    length = 20 + len(options) + len(body) if length is None else length
    header = struct.pack("!BBHHHBBH", 0x40 | ihl, 0, length, 1, fragment, 64, protocol, 0)
    return header + bytes([192, 0, 2, 1, 198, 51, 100, 2]) + options + body


def ipv6(body: bytes, *, protocol: int = 17, length: int | None = None) -> bytes:
    header = struct.pack("!IHBB", 0x60000000, len(body) if length is None else length, protocol, 64)
    return header + bytes.fromhex("20010db8000000000000000000000001 20010db8000000000000000000000002") + body


def ethernet(packet: bytes, *, ethertype: int = 0x0800) -> bytes:
    return bytes(12) + struct.pack("!H", ethertype) + packet


def pcap(
    *frames: bytes,
    order: str = "<",
    magic: int = MICROSECONDS,
    link_type: int = ETHERNET,
    version: tuple[int, int] = (2, 4),
    fraction: int = 7,
) -> bytes:
    data = struct.pack(f"{order}IHHiIII", magic, *version, 0, 0, 65535, link_type)
    for second, frame in enumerate(frames, 1):
        data += struct.pack(f"{order}IIII", second, fraction, len(frame), len(frame)) + frame
    return data


def read(directory: Path, data: bytes) -> Conversation:
    path = directory / "case.pcap"
    path.write_bytes(data)
    return load(path)


def frames_of_the_package() -> list[bytes]:
    data, offset, frames = (DATA / "ikev2-nat-t.pcap").read_bytes(), 24, []
    while offset < len(data):
        (length,) = struct.unpack_from("<I", data, offset + 8)
        frames.append(data[offset + 16 : offset + 16 + length])
        offset += 16 + length
    return frames


def microseconds(time: Decimal) -> int:
    """Undo the float that scapy multiplies the fraction by."""
    return round(time * 1_000_000)


def readme_table() -> dict[str, tuple[int, int]]:
    text = (DATA / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| ([^|]+) \| (\d+) \| (\d+) \|$", text, re.MULTILINE)
    return {name: (int(received), int(sent)) for name, received, sent in rows}


class TestPackaged:
    def test_counts_are_those_of_the_readme(self) -> None:
        conversation = load()
        received = Counter(classify(datagram.payload) for datagram in conversation.received())
        sent = Counter(classify(datagram.payload) for datagram in conversation.sent())
        assert readme_table() == {
            "IKE on port 500": (len(conversation.received(500)), len(conversation.sent(500))),
            "IKE behind the marker on port 4500": (received[Verdict.IKE], sent[Verdict.IKE]),
            "ESP on port 4500": (received[Verdict.ESP], sent[Verdict.ESP]),
            "NAT-keepalive on port 4500": (received[Verdict.KEEPALIVE], sent[Verdict.KEEPALIVE]),
        }
        assert received[Verdict.RUNT] == sent[Verdict.RUNT] == 0

    def test_every_kind_is_there_and_nothing_else(self) -> None:
        conversation = load()
        counts = readme_table()
        assert all(received for received, _ in counts.values())
        assert [name for name, (_, sent) in counts.items() if not sent] == ["NAT-keepalive on port 4500"]
        assert sum(map(sum, counts.values())) == len(conversation.datagrams)
        assert f" {len(conversation.datagrams)} packets" in (DATA / "README.md").read_text("utf-8")

    def test_ike_and_esp_headers(self) -> None:
        """IKE lengths and SPIs fit (RFC 7296, 3.1); ESP counts up from 1 for each SPI (RFC 4303, 2.2)."""
        conversation = load()
        sequences: dict[bytes, list[int]] = {}
        initiators = set()
        for datagram in conversation.datagrams:
            verdict = classify(datagram.payload)
            if NAT_T_PORT not in (datagram.source_port, datagram.destination_port) or verdict is Verdict.IKE:
                message = datagram.payload.removeprefix(NON_ESP_MARKER)
                initiators.add(message[:8])
                assert message[17] == 0x20
                assert int.from_bytes(message[24:28]) == len(message)
            elif verdict is Verdict.ESP:
                sequences.setdefault(datagram.payload[:4], []).append(int.from_bytes(datagram.payload[4:8]))
        assert len(initiators) == 1
        assert len(sequences) == 4  # two SAs, and two more after the rekeying
        assert all(numbers == [*range(1, len(numbers) + 1)] for numbers in sequences.values())

    def test_the_nat_changed_the_port(self) -> None:
        ports = {datagram.source_port for datagram in load().received()}
        assert len(ports) == 1
        assert ports != {NAT_T_PORT}
        assert ports == {datagram.destination_port for datagram in load().sent()}

    def test_times_do_not_go_back(self) -> None:
        times = [datagram.time for datagram in load().datagrams]
        assert times == sorted(times)

    @pytest.mark.parametrize("order", ["<", ">"])
    def test_scapy_reads_the_same(self, order: str, tmp_path: Path) -> None:
        scapy = pytest.importorskip("scapy.all")
        path = tmp_path / "copy.pcap"
        path.write_bytes(pcap(*frames_of_the_package(), order=order))
        packets = scapy.rdpcap(str(path))
        expected = [
            Datagram(
                microseconds(packet.time) * 1000,
                packet["IP"].src,
                packet["UDP"].sport,
                packet["IP"].dst,
                packet["UDP"].dport,
                bytes(packet["UDP"])[8 : packet["UDP"].len],
            )
            for packet in packets
        ]
        assert list(load(path).datagrams) == expected

    def test_scapy_reads_the_packaged_file(self) -> None:
        scapy = pytest.importorskip("scapy.all")
        with resources.as_file(DATA / "ikev2-nat-t.pcap") as path:
            packets = scapy.rdpcap(str(path))
        for packet, datagram in zip(packets, load().datagrams, strict=True):
            assert microseconds(packet.time) * 1000 == datagram.time
            assert bytes(packet["UDP"])[8 : packet["UDP"].len] == datagram.payload
            checksum = packet["UDP"].chksum
            if checksum:  # zero: none was made, as for ESP (RFC 3948, 2.1)
                del packet["UDP"].chksum
                assert type(packet)(bytes(packet))["UDP"].chksum == checksum


class TestFormats:
    @pytest.mark.parametrize("order", ["<", ">"])
    @pytest.mark.parametrize(("magic", "unit"), [(MICROSECONDS, 1000), (NANOSECONDS, 1)])
    @pytest.mark.parametrize("link_type", [ETHERNET, RAW_IP])
    def test_byte_orders_clocks_and_link_types(
        self, order: str, magic: int, unit: int, link_type: int, tmp_path: Path
    ) -> None:
        packets = [ipv4(udp(b"four")), ipv6(udp(b"six"))]
        if link_type == ETHERNET:
            packets = [ethernet(packets[0]), ethernet(packets[1], ethertype=0x86DD)]
        conversation = read(tmp_path, pcap(*packets, order=order, magic=magic, link_type=link_type))
        assert conversation.datagrams == (
            Datagram(1_000_000_000 + 7 * unit, "192.0.2.1", 4500, "198.51.100.2", 4501, b"four"),
            Datagram(2_000_000_000 + 7 * unit, "2001:db8::1", 4500, "2001:db8::2", 4501, b"six"),
        )

    def test_latest_time(self, tmp_path: Path) -> None:
        """32 unsigned bits of seconds, and nanoseconds that a float could not hold."""
        data = bytearray(pcap(ipv4(udp(b"")), magic=NANOSECONDS, link_type=RAW_IP, fraction=999_999_999))
        data[24:28] = b"\xff" * 4
        assert read(tmp_path, bytes(data)).datagrams[0].time == 4_294_967_295_999_999_999

    @pytest.mark.parametrize(
        ("packet", "payload"),
        [
            pytest.param(ipv4(udp(b"")), b"", id="empty"),
            pytest.param(ipv4(udp(b"\xff")) + bytes(17), b"\xff", id="padded frame"),
            pytest.param(ipv4(udp(b"data"), ihl=6, options=b"\x94\x04\0\0"), b"data", id="IPv4 options"),
            pytest.param(ipv4(udp(b"datatrailer", length=12)), b"data", id="UDP shorter than the packet"),
        ],
    )
    def test_payloads(self, packet: bytes, payload: bytes, tmp_path: Path) -> None:
        assert [each.payload for each in read(tmp_path, pcap(ethernet(packet))).datagrams] == [payload]

    @pytest.mark.parametrize(
        "frame",
        [
            pytest.param(ethernet(bytes(28), ethertype=0x0806), id="ARP"),
            pytest.param(ethernet(bytes(4) + ipv4(udp(b"")), ethertype=0x8100), id="VLAN"),
            pytest.param(ethernet(ipv4(bytes(20), protocol=6)), id="TCP"),
            pytest.param(ethernet(ipv4(bytes(20), protocol=6, length=1500)), id="TCP cut by the capture"),
            pytest.param(ethernet(ipv4(bytes(8), protocol=44)), id="IPv4 protocol 44"),
            pytest.param(ethernet(ipv6(bytes(8), protocol=58), ethertype=0x86DD), id="ICMPv6"),
        ],
    )
    def test_skips_what_is_not_udp(self, frame: bytes, tmp_path: Path) -> None:
        conversation = read(tmp_path, pcap(frame, ethernet(ipv4(udp(b"data"))), frame))
        assert [datagram.payload for datagram in conversation.datagrams] == [b"data"]

    def test_frame_check_sequence_bits(self, tmp_path: Path) -> None:
        data = pcap(ethernet(ipv4(udp(b"data"))) + b"FCS.", link_type=0x2400_0000 | ETHERNET)
        assert read(tmp_path, data).datagrams[0].payload == b"data"

    def test_file_without_packets(self, tmp_path: Path) -> None:
        conversation = read(tmp_path, pcap())
        assert conversation.datagrams == conversation.received() == conversation.sent() == ()

    def test_directions(self, tmp_path: Path) -> None:
        to, other = ipv4(udp(b"to", destination=4500)), ipv4(udp(b"other"))
        back = to[:12] + to[16:20] + to[12:16] + udp(b"back")
        conversation = read(tmp_path, pcap(to, other, back[:2] + b"\0\x20" + back[4:], link_type=RAW_IP))
        assert [datagram.payload for datagram in conversation.received()] == [b"to"]
        assert [datagram.payload for datagram in conversation.received(4501)] == [b"other"]
        assert [datagram.payload for datagram in conversation.sent()] == [b"back"]

    def test_path_may_be_text(self, tmp_path: Path) -> None:
        read(tmp_path, pcap())
        assert load(str(tmp_path / "case.pcap")) == Conversation(())


FRAME = ethernet(ipv4(udp(b"data")))
ONE = pcap(FRAME)


class TestMalformed:
    @pytest.mark.parametrize(
        ("data", "message"),
        [
            pytest.param(b"", r"not a pcap file: it starts with b''", id="empty file"),
            pytest.param(b"\x0a\x0d\x0d\x0a" + bytes(24), r"not a pcap file: .*\\n\\r\\r\\n", id="pcapng"),
            pytest.param(pcap()[:3], r"not a pcap file", id="truncated magic"),
            pytest.param(pcap()[:23], r"file header truncated to 23 of 24 bytes", id="truncated file header"),
            pytest.param(pcap(version=(2, 3)), r"pcap version 2\.3, not 2\.4", id="version"),
            pytest.param(
                pcap(link_type=113), r"link type 113, neither Ethernet \(1\) nor raw", id="link type"
            ),
            pytest.param(ONE[: 24 + 15], r"packet 1: header truncated to 15 of 16 bytes", id="record header"),
            pytest.param(ONE + ONE[24:-1], r"packet 2: truncated to 45 of 46 bytes", id="truncated packet"),
        ],
    )
    def test_file(self, data: bytes, message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=rf"^{re.escape(str(tmp_path))}/case\.pcap: {message}"):
            read(tmp_path, data)

    @pytest.mark.parametrize(
        ("frame", "message"),
        [
            pytest.param(FRAME[:13], r"Ethernet frame of only 13 bytes", id="Ethernet header"),
            pytest.param(FRAME[:14], r"no IPv4 packet: it starts with b''", id="no packet"),
            pytest.param(ethernet(ipv6(udp(b""))), r"no IPv4 packet: it starts with b'`'", id="IPv6 as IPv4"),
            pytest.param(FRAME[: 14 + 19], r"IPv4 packet of only 19 bytes", id="IPv4 header"),
            pytest.param(
                ethernet(ipv6(udp(b""))[:39], ethertype=0x86DD),
                r"IPv6 packet of only 39 bytes",
                id="IPv6 header",
            ),
            pytest.param(ethernet(ipv4(udp(b""), ihl=4)), r"IPv4 header .* only 16 bytes", id="IHL"),
            pytest.param(
                ethernet(ipv4(b"", ihl=15)), r"IP length of 20 bytes: header of 60", id="IHL too large"
            ),
            pytest.param(
                ethernet(ipv4(udp(b""), length=19)), r"IP length of 19 bytes", id="length too small"
            ),
            pytest.param(
                FRAME[:-1], r"IP length of 32 bytes: header of 20, 31 captured", id="cut by the capture"
            ),
            pytest.param(
                ethernet(ipv6(udp(b""), length=9), ethertype=0x86DD),
                r"IP length of 49 bytes",
                id="IPv6 length",
            ),
            pytest.param(
                ethernet(ipv4(udp(b"")[:7])), r"UDP header truncated to 7 of 8 bytes", id="UDP header"
            ),
            pytest.param(
                ethernet(ipv4(udp(b"data", length=13))),
                r"UDP length of 13 bytes in a packet with 12",
                id="UDP too long",
            ),
            pytest.param(
                ethernet(ipv4(udp(b"data", length=7))), r"UDP length of 7 bytes", id="UDP too short"
            ),
            pytest.param(ethernet(ipv4(udp(b"data"), fragment=0x2000)), r"fragmented", id="first fragment"),
            pytest.param(ethernet(ipv4(udp(b"data"), fragment=1)), r"fragmented", id="last fragment"),
            pytest.param(
                ethernet(ipv6(bytes(16), protocol=44), ethertype=0x86DD), r"fragmented", id="IPv6 fragment"
            ),
        ],
    )
    def test_frame(self, frame: bytes, message: str, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=rf"case\.pcap: packet 2: {message}"):
            read(tmp_path, pcap(FRAME, frame))

    @pytest.mark.parametrize("packet", [b"", b"\x50" + bytes(40)], ids=["empty", "version 5"])
    def test_raw_ip(self, packet: bytes, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match=r"packet 1: no IPv4 or IPv6 packet: it starts with b'P?'"):
            read(tmp_path, pcap(packet, link_type=RAW_IP))

    def test_no_file(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            load(tmp_path / "none.pcap")

    @settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
    @given(
        frame=st.binary(max_size=80)
        | st.builds(lambda start, rest: start + rest, st.sampled_from([FRAME[:14], FRAME[:38]]), st.binary()),
        link_type=st.sampled_from([ETHERNET, RAW_IP]),
    )
    def test_any_frame_is_read_or_refused_with_valueerror(
        self, frame: bytes, link_type: int, tmp_path: Path
    ) -> None:
        try:
            read(tmp_path, pcap(frame, link_type=link_type))
        except ValueError as error:
            assert "packet 1: " in str(error)  # noqa: PT017 - either outcome is right
