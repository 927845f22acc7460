"""Two engines, one on each data path, that are compared after every call; and random input for them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from natcompat.esp.engine.crypto import make_cipher
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.packet import DUMMY, IPV4, IPV6, PADDINGS
from natcompat.esp.engine.portable import PortableDataPath
from natcompat.esp.engine.results import Destination, Dropped, Opened
from natcompat.ipsec import (
    Action,
    Direction,
    Encr,
    Integ,
    Lifetime,
    Mode,
    Policy,
    SecurityAssociation,
    TrafficSelector,
)
from tests.support.esp import (
    NETWORKS,
    OUTER,
    TRANSFORMS,
    another_process,
    ip_packet,
    keys,
    native_providers,
    udp,
)

PROVIDERS = native_providers()
EXAMPLES = int(os.environ.get("NATCOMPAT_EXAMPLES", "30"))
"""Of each test; many more by hand."""
MANY = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.too_slow])


class Twins:
    """An engine of each kind, to which the same is done."""

    def __init__(self, provider: str, **options: Any) -> None:
        from natcompat.esp.datapath.native import NativeDataPath

        self.now = 1e9
        self.reveal: Callable[[bytes], Any] = bytes
        """Returns what sealed packets have to have in common."""
        self.engines = []
        for datapath in (PortableDataPath, partial(NativeDataPath, provider=provider)):
            with another_process():  # both number their IVs alike
                self.engines.append(EspEngine(timer=False, datapath=datapath, **options))
        self.listeners = [engine.events() for engine in self.engines]

    def _time(self) -> float:
        return self.now

    @contextlib.contextmanager
    def running(self) -> Iterator[Twins]:
        with (
            mock.patch("time.time", self._time),
            mock.patch("os.urandom", bytes),
        ):
            try:
                yield self
                self.compare()
            finally:
                for engine in self.engines:
                    engine.close()

    def do(self, verb: str, *arguments: Any, **options: Any) -> Any:
        """Call a method of both."""
        return self.both(lambda engine: getattr(engine, verb)(*arguments, **options))

    def both(self, what: Callable[[EspEngine], Any]) -> Any:
        """Do `what` to both, see that the same comes out, and return it."""
        self.now += 1.5
        portable, native = (_visible(_done(what, engine), self.reveal) for engine in self.engines)
        assert native == portable
        events = [listener.read() for listener in self.listeners]
        assert events[1] == events[0]
        return portable

    def compare(self) -> None:
        """See that both know the same of what has been."""
        self.both(lambda engine: [(each.sa_id, each.usage) for each in engine.list_sas()])
        self.both(lambda engine: dict(engine.counters()))
        self.both(lambda engine: [(each.policy, each.last_used) for each in engine.list_policies()])


def _done(what: Callable[[EspEngine], Any], engine: EspEngine) -> Any:
    try:
        return what(engine)
    except Exception as error:
        return type(error), str(error)


def _visible(result: Any, reveal: Callable[[bytes], Any] = bytes) -> Any:
    """Return `result` with all that two things have to have in common to be the same."""
    if isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], Destination):
        return reveal(result[0]), tuple(result[1]), vars(result[1])
    if isinstance(result, Opened):
        return result.inner, result.sa.sa_id, result.sa.encapsulation
    if isinstance(result, Dropped):
        return result.reason
    if isinstance(result, list | tuple):
        return type(result)(_visible(each, reveal) for each in result)
    return result


# -- what is drawn


def transforms() -> st.SearchStrategy[tuple[Encr, Integ]]:
    """All of them, and more often what C does without help."""
    often = [Encr.AES_GCM_16, Encr.AES_GCM_12, Encr.AES_GCM_8, Encr.CHACHA20_POLY1305]
    return st.sampled_from([*((each, Integ.NONE) for each in often * 4), *TRANSFORMS])


@st.composite
def associations(draw: st.DrawFn, *, version: int) -> dict[str, Any]:
    """Arguments that an SA and its counterpart share."""
    encryption, integrity = draw(transforms())
    esn = draw(st.booleans())
    numbers = st.sampled_from([None, None, 1, 2, 5, 9])
    soft, hard = sorted(draw(st.tuples(st.integers(1, 12), st.integers(1, 12))))
    lifetime: dict[str, int] = {}
    if draw(st.booleans()):
        lifetime = {"soft_packets": soft, "hard_packets": hard}
    if draw(numbers):
        lifetime |= {"soft_bytes": soft * 60, "hard_bytes": hard * 90}
    return {
        **keys(encryption, integrity, length=draw(st.sampled_from(encryption.key_lengths))),
        "version": version,
        "esn": esn,
        "replay_window": draw(st.sampled_from([1, 31, 32, 64, 65, 1024, 4096] + [0] * (not esn))),
        "mode": draw(st.sampled_from([Mode.TUNNEL] * 5 + [Mode.TRANSPORT])),
        "lifetime": Lifetime(**lifetime),
        "copy_dscp": draw(st.booleans()),
        "copy_ecn": draw(st.booleans()),
        "copy_df": draw(st.booleans()),
    }


addresses = st.sampled_from(["10.1.0.1", "10.2.0.1", "10.1.0.9", "10.9.0.1", *OUTER[4]])
addresses_6 = st.sampled_from(["fd00:1::1", "fd00:2::1", "fd00:1::9", "fd00:9::1", *OUTER[6]])


@st.composite
def inners(draw: st.DrawFn) -> bytes:
    """IP packets, most of them sound, and some rubbish."""
    kind = draw(st.sampled_from(["udp"] * 6 + ["other", "extensions", "fragment", "broken", "rubbish"]))
    if kind == "rubbish":
        return draw(st.binary(max_size=60))
    version = draw(st.sampled_from([4, 6]))
    source, destination = draw(st.tuples(*[addresses if version == 4 else addresses_6] * 2))
    fields: dict[str, Any] = {
        "traffic_class": draw(st.integers(0, 255)),
        "dont_fragment": draw(st.booleans()),
    }
    payload = udp(draw(st.binary(max_size=80)), source_port=draw(st.integers(1, 3)))
    if kind == "extensions":
        header = st.sampled_from([0, 43, 44, 51, 60, 17])
        chain = draw(
            st.lists(st.tuples(header, st.integers(0, 3), st.binary(min_size=6, max_size=6)), max_size=10)
        )
        payload = b"".join(bytes((each, length)) + six for each, length, six in chain) + payload
        return ip_packet(source, destination, payload, protocol=draw(header), **fields)
    protocol = 17 if kind == "udp" else draw(st.sampled_from([1, 6, 17, 33, 58, 132, 135, 136, 47]))
    packet = bytearray(ip_packet(source, destination, payload, protocol=protocol, **fields))
    if kind == "fragment" and version == 4:
        packet[6:8] = draw(st.integers(0, 0x3FFF)).to_bytes(2)
    if kind == "broken":
        packet[draw(st.integers(0, min(7, len(packet) - 1)))] = draw(st.integers(0, 255))
    return bytes(packet)


@st.composite
def plaintexts(draw: st.DrawFn, block: int) -> bytes:
    """What a peer with the keys may put into a packet, with manners or without."""
    payload = draw(inners()) + bytes(draw(st.sampled_from([0, 0, 0, 1, 7, 100])))  # TFC padding
    next_header = IPV6 if payload and payload[0] >> 4 == 6 else IPV4
    next_header = draw(st.sampled_from([next_header] * 8 + [IPV4, IPV6, DUMMY, 6, 17]))
    length = -(len(payload) + 2) % max(block, 4) + draw(st.sampled_from([0, 0, 0, block, 15 * block]))
    padding = PADDINGS[length] if draw(st.integers(0, 9)) else bytes(length)
    if block == 1 and not draw(st.integers(0, 9)):
        return draw(st.binary(max_size=40))
    return payload + padding + bytes((length, next_header))


@st.composite
def esp_packets(
    draw: st.DrawFn, association: SecurityAssociation, forge: Callable[..., bytes], base: int
) -> bytes:
    """What may arrive: authentic packets of any sequence number, and forged ones."""
    sequence = max(
        0, base + draw(st.integers(-80, 80)) + draw(st.sampled_from([0, 0, 0, 5000, 1 << 31, -(1 << 32)]))
    )
    limit = (1 << 64) - 1 if association.esn else (1 << 32) - 1
    packet = forge(sequence & limit, draw(plaintexts(1 if association.encryption.is_aead else 16)))
    match draw(st.sampled_from(["good"] * 8 + ["tampered", "cut", "longer", "rubbish"])):
        case "tampered":
            at = draw(st.integers(0, len(packet) - 1))
            packet = packet[:at] + bytes((packet[at] ^ draw(st.integers(1, 255)),)) + packet[at + 1 :]
        case "cut":
            packet = packet[: draw(st.integers(0, len(packet)))]
        case "longer":
            packet += draw(st.binary(min_size=1, max_size=20))
        case "rubbish":
            packet = draw(st.binary(max_size=80))
    return packet


def forger(association: SecurityAssociation) -> Callable[..., bytes]:
    """Return what makes ESP packets that `association` takes, of a sequence number and a plaintext."""
    cipher = make_cipher(
        association.encryption,
        association.encryption_key,
        association.integrity,
        association.integrity_key,
    )

    def forge(sequence: int, plaintext: bytes) -> bytes:
        high = (sequence >> 32).to_bytes(4) if association.esn else b""
        iv = (sequence * 0x9E3779B97F4A7C15 % (1 << 64)).to_bytes(8) * 2
        plaintext += bytes(-len(plaintext) % cipher.block_length)
        prefix = association.spi.to_bytes(4) + (sequence & 0xFFFF_FFFF).to_bytes(4) + iv[: cipher.iv_length]
        return cipher.seal(prefix, plaintext, high)

    return forge


def revealer(association: SecurityAssociation, sequence: int) -> Callable[[bytes], Any]:
    """Return what tells what a packet holds that `association` sealed with a number near `sequence`."""
    if association.encryption is not Encr.AES_CBC:
        return bytes
    cipher = make_cipher(
        association.encryption,
        association.encryption_key,
        association.integrity,
        association.integrity_key,
    )

    def reveal(packet: bytes) -> Any:
        if int.from_bytes(packet[:4]) != association.spi:
            return packet
        halves = (sequence >> 32, (sequence >> 32) + 1 & 0xFFFF_FFFF) if association.esn else (0,)
        found = [cipher.open(packet, half.to_bytes(4) if association.esn else b"") for half in halves]
        assert any(found)
        return packet[:8], len(packet), found

    return reveal


def policies(direction: Direction, version: int, mode: Mode) -> list[Policy]:
    """Protect between the networks of both families, discard and bypass some of the rest."""
    local, remote = OUTER[version]
    found = []
    pairs = [(local, remote)] if mode is Mode.TRANSPORT else [NETWORKS[4], NETWORKS[6]]
    ends = {"source": local, "destination": remote}
    if direction is Direction.IN:
        pairs, ends = [pair[::-1] for pair in pairs], {"source": remote, "destination": local}
    for source, destination in pairs:
        selector = TrafficSelector(source=source, destination=destination)
        outer: dict[str, Any] = {} if mode is Mode.TRANSPORT else ends
        found.append(Policy(direction=direction, selector=selector, reqid=7, mode=mode, **outer))
    for action, network in ((Action.DISCARD, "10.1.0.9"), (Action.BYPASS, "10.9.0.0/16")):
        selector = TrafficSelector(source="0.0.0.0/0", destination=network)
        found.append(Policy(direction=direction, selector=selector, action=action))
    return found


SOURCES = [
    *(
        (str(address), port)
        for address in (*OUTER[4], "::ffff:192.0.2.2", *OUTER[6])
        for port in (4500, 1024)
    ),
    ("fe80::1%eth0", 4500, 0, 2),
    (),
    ("nonsense", 1),
    (b"abc", None),
]
