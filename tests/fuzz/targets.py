"""What is fuzzed: functions of bytes that raise when something is not as it has to be.

`open_burst` and `seal_burst` run every data path there is and compare them. Whoever sends the bytes
has the keys, too, so what is behind authentication is reached as well.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import Any

from natcompat.contract import NON_ESP_MARKER, Verdict, classify
from natcompat.esp.carrier.mtu import may_fragment, too_big
from natcompat.esp.engine import packet as packets
from natcompat.esp.engine.crypto import make_cipher
from natcompat.esp.engine.data_path import DataPathFactory
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.portable import PortableDataPath
from natcompat.esp.engine.results import Dropped, Opened, Reason
from natcompat.ipsec import Direction, Encr, Integ, Mode, TrafficSelector
from tests.support.esp import INNER, OUTER, SPI, another_process, keys, native_providers, policy, sa

TRANSFORMS = (
    (Encr.AES_GCM_16, Integ.NONE),
    (Encr.AES_CBC, Integ.HMAC_SHA2_256_128),
    (Encr.NULL, Integ.HMAC_SHA1_96),
    (Encr.CHACHA20_POLY1305, Integ.NONE),
)
EVERYTHING = {4: "0.0.0.0/0", 6: "::/0"}


def data_paths() -> list[DataPathFactory]:
    """Return the portable data path, and the one in C where it is built."""
    if not native_providers():
        return [PortableDataPath]
    from natcompat.esp.datapath.native import NativeDataPath

    return [PortableDataPath, NativeDataPath]


PATHS = data_paths()


def pieces(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Cut `data` into pieces, each with a number that says what to do with it; no more than 32."""
    for _ in range(32):
        if len(data) < 3:
            return
        kind, length = data[0], int.from_bytes(data[1:3]) & 0x7FF
        yield kind, data[3 : 3 + length]
        data = data[3 + length :]


def configuration(data: bytes) -> dict[str, Any]:
    """Return the arguments of an SA that the first byte chooses."""
    bits = data[0] if data else 0
    return {
        "version": 6 if bits & 1 else 4,
        "mode": Mode.TRANSPORT if bits & 2 else Mode.TUNNEL,
        "esn": bool(bits & 4),
        "replay_window": 32 if bits & 12 else 0,
        "copy_ecn": bool(bits & 16),
        **keys(*TRANSFORMS[bits >> 5 & 3]),
    }


def add_policies(
    engine: EspEngine, direction: Direction, version: int, mode: Mode, *, wide: bool, **ends: str
) -> None:
    """Let everything pass, or what the tests' hosts say to each other."""
    for inner in (4, 6) if mode is Mode.TUNNEL else (version,):
        changes: dict[str, Any] = {"mode": mode, **ends}
        if wide and mode is Mode.TUNNEL:
            changes["selector"] = TrafficSelector(source=EVERYTHING[inner], destination=EVERYTHING[inner])
        elif ends:
            changes["selector"] = TrafficSelector(**ends)  # type: ignore[arg-type]
        engine.add_policy(policy(direction, version=version, inner=inner, **changes))


def open_burst(data: bytes) -> None:
    """Open packets that are garbage, or forged by who has the key; all data paths say the same."""
    arguments = configuration(data)
    version, mode = arguments.pop("version"), arguments["mode"]
    association = sa(Direction.IN, version=version, **arguments)
    cipher = make_cipher(
        association.encryption,
        association.encryption_key,
        association.integrity,
        association.integrity_key,
    )
    high = bytes(4) if association.esn else b""
    spi, sequence, last = SPI.to_bytes(4), 0, b""
    burst, classes = [], []
    for kind, piece in pieces(data[1:]):
        match kind & 7:
            case 0:
                last = piece
            case 1:
                last = spi + piece
            case 2 | 3:  # authentic, the next one or any
                sequence = sequence + 1 if kind & 7 == 2 else int.from_bytes(piece[:4])
                text = piece if kind & 7 == 2 else piece[4:]
                text += bytes(-len(text) % cipher.block_length)
                header = spi + (sequence & 0xFFFF_FFFF).to_bytes(4) + bytes(cipher.iv_length)
                if len(text) >= 2:
                    last = cipher.seal(header, text, high)
            case 4 if piece and last:  # the last one with a bit turned
                at = int.from_bytes(piece[:2]) % len(last)
                last = last[:at] + bytes((last[at] ^ 1 << (kind >> 3 & 7),)) + last[at + 1 :]
            case 5:  # cut
                last = last[: int.from_bytes(piece[:2])]
        burst.append((last, (OUTER[version][1], 4500 + (kind >> 7))))
        classes.append(kind >> 3)
    outcomes = []
    for path in PATHS:
        with EspEngine(timer=False, datapath=path) as engine, engine.events() as events:
            sa_id = engine.add_sa(association)
            add_policies(engine, Direction.IN, version, mode, wide=bool(data and data[0] & 128))
            results = engine.open_burst([(memoryview(each), source) for each, source in burst], classes)
            assert len(results) == len(burst)
            for each in results:
                if isinstance(each, Opened):
                    assert each.sa == association
                    assert packets.inner_length(each.inner) == len(each.inner)
                    assert packets.flow_of(each.inner) is not None
            reasons = Counter(each.reason for each in results if isinstance(each, Dropped))
            assert engine.counters() == reasons
            usage = engine.get_sa(sa_id)
            assert usage.packets >= sum(isinstance(each, Opened) for each in results)
            outcomes.append(
                (
                    [each.inner if isinstance(each, Opened) else each.reason for each in results],
                    (usage.packets, usage.octets, usage.sequence),
                    (usage.replay_drops, usage.window_drops, usage.integrity_drops),
                    list(events.read()),
                )
            )
    assert all(each == outcomes[0] for each in outcomes), outcomes


def inner_packet(kind: int, piece: bytes, mode: Mode) -> bytes:
    """Return `piece` as it is, or with an IP header in front whose lengths are right."""
    version = 6 if kind & 2 else 4
    addresses = b"".join(
        ip_address(each).packed for each in (OUTER if mode is Mode.TRANSPORT else INNER)[version]
    )
    if kind & 1:
        return piece
    if version == 6:
        return b"\x60\0\0\0" + len(piece).to_bytes(2) + bytes((kind >> 2, 64)) + addresses + piece
    header = bytearray(b"\x45\0" + (20 + len(piece)).to_bytes(2) + bytes(4) + bytes((64, kind >> 2, 0, 0)))
    return bytes(header) + addresses + piece


def seal_burst(data: bytes) -> None:
    """Seal packets; what comes out is what went in when it is opened; all data paths do the same."""
    arguments = configuration(data)
    version, mode = arguments.pop("version"), arguments["mode"]
    local, remote = OUTER[version]
    burst = [inner_packet(kind, piece, mode) for kind, piece in pieces(data[1:])]
    outcomes = []
    for path in PATHS:
        with (
            another_process(),
            EspEngine(timer=False, datapath=path) as engine,
            EspEngine(timer=False) as peer,
        ):
            sa_id = engine.add_sa(sa(Direction.OUT, version=version, **arguments), sequence=7)
            ends = {"source": local, "destination": remote}
            peer.add_sa(sa(Direction.IN, version=version, **arguments, **ends))
            add_policies(engine, Direction.OUT, version, mode, wide=bool(data and data[0] & 128))
            add_policies(peer, Direction.IN, version, mode, wide=True, **ends)
            results = engine.seal_burst([memoryview(each) for each in burst])
            assert len(results) == len(burst)
            reasons = Counter(each.reason for each in results if isinstance(each, Dropped))
            assert engine.counters() == reasons
            for inner, each in zip(burst, results, strict=True):
                if not isinstance(each, Dropped):
                    assert each[1] == (remote, 4500)
                    opened = peer.open(each[0], (local, 4500))
                    if mode is Mode.TUNNEL:
                        assert isinstance(opened, Opened), opened
                        assert opened.inner == inner
                    elif isinstance(
                        opened, Dropped
                    ):  # in transport mode ESP says nothing else of protocol 59
                        assert inner[9 if version == 4 else 6] == packets.DUMMY, opened
            usage = engine.get_sa(sa_id)
            sealed = [each for each in results if not isinstance(each, Dropped)]
            assert usage.sequence == 7 + len(sealed) == 7 + usage.packets
            outcomes.append(
                [
                    each.reason
                    if isinstance(each, Dropped)
                    # the IVs of CBC are random, of the others they are the sequence numbers
                    else (
                        each[0] if arguments["encryption"] is not Encr.AES_CBC else len(each[0]),
                        vars(each[1]),
                    )
                    for each in results
                ]
            )
    assert all(each == outcomes[0] for each in outcomes), outcomes


def parse(data: bytes) -> None:
    """Take an inner packet apart, and change what may be changed about it."""
    length = packets.inner_length(data)
    if not length:
        return
    inner = data[:length]
    assert packets.inner_length(inner) == length
    key, flow = packets.flow_key(inner), packets.flow_of(inner)
    assert flow == (None if key is None else packets.expand(key))
    traffic_class, _ = packets.outer_fields(inner)
    for outer in range(4):
        marked = packets.decapsulate_ecn(inner, outer)
        if marked is not None:
            assert len(marked) == length
            assert packets.outer_fields(marked)[0] & 0xFC == traffic_class & 0xFC
    split = packets.split_for_transport(inner)
    version = inner[0] >> 4
    source, destination = (ip_address(each) for each in INNER[version])
    if not isinstance(split, Reason):
        joined = packets.join_for_transport(source, destination, *split, traffic_class)
        assert packets.inner_length(joined) == len(joined)
        for original in (None, destination):
            fixed = packets.fix_transport_checksum(*split, source, destination, original)
            assert len(fixed) == len(split[1])
    for largest in (68, 576, 1280):
        may_fragment(inner, largest)
        reply = too_big(inner, largest)
        assert reply is None or packets.inner_length(reply) == len(reply)


def contract(data: bytes) -> None:
    """Classify a datagram: the table of RFC 3948 and of Solaris, in other words."""
    verdict = classify(data)
    assert verdict is classify(memoryview(data))
    if len(data) < 4:
        assert verdict is (Verdict.KEEPALIVE if data == b"\xff" else Verdict.RUNT)
    else:
        assert verdict is (Verdict.IKE if data[:4] == NON_ESP_MARKER else Verdict.ESP)


TARGETS: dict[str, Callable[[bytes], None]] = {
    function.__name__: function for function in (open_burst, seal_burst, parse, contract)
}
