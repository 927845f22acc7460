"""The C data path against the portable one: the same calls, and whatever comes out is the same.

Packets byte for byte (but for what AES-CBC has at random: there it is what the packet holds), destinations
with all fields, reasons, counters, times, events, usage of SAs and policies. Both have the same clock.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from natcompat.esp.engine.base import Inbound
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
    UDPEncapsulation,
)
from tests.support.esp import (
    IN_C,
    NETWORKS,
    OUTER,
    SPI,
    TRANSFORMS,
    inner,
    ip_packet,
    keys,
    native_providers,
    policy,
    sa,
    udp,
)

PROVIDERS = native_providers()
pytestmark = pytest.mark.skipif(
    not PROVIDERS, reason="the C data path is not built: python ffi/build_datapath.py"
)
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
        self.engines = [
            EspEngine(timer=False, datapath=PortableDataPath, **options),
            EspEngine(timer=False, datapath=partial(NativeDataPath, provider=provider), **options),
        ]
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


@pytest.mark.parametrize("provider", PROVIDERS)
@given(data=st.data())
@MANY
def test_opening(provider: str, data: st.DataObject) -> None:
    draw = data.draw
    version = draw(st.sampled_from([4, 6]))
    arguments = draw(associations(version=version))
    if draw(st.booleans()) and arguments["mode"] is Mode.TUNNEL:
        arguments["selectors"] = [TrafficSelector(source="10.1.0.0/16", destination="10.2.0.0/16")]
    bases = [0, 0, 50]
    if arguments["esn"]:  # numbers that overflow begin at 0 again, as those of a peer without manners
        bases += [(1 << 32) - 40, (1 << 40) + 7, (1 << 64) - 40, (1 << 64) - 4000]
    base = draw(st.sampled_from(bases))
    twins = Twins(provider, follow_mapping=draw(st.booleans()))
    with twins.running():
        association = sa(Direction.IN, **arguments)
        twins.do("add_sa", association, sequence=base or None)
        for each in policies(Direction.IN, version, association.mode):
            twins.do("add_policy", each)
        if draw(st.integers(0, 3)) == 0:  # another one with the same SPI
            elsewhere = "192.0.2.99" if version == 4 else "2001:db8::99"
            other = sa(Direction.IN, **{**arguments, "destination": elsewhere})
            twins.do("add_sa", other)
        forge = forger(association)
        for _ in range(draw(st.integers(1, 6))):
            sources = [draw(st.sampled_from(SOURCES))] if draw(st.booleans()) else SOURCES
            packet = st.tuples(esp_packets(association, forge, base), st.sampled_from(sources))
            burst = draw(st.lists(packet, max_size=12))
            burst += burst[: draw(st.integers(0, 3))]  # replayed
            classes = draw(st.lists(st.integers(0, 255), min_size=len(burst), max_size=len(burst)))
            twins.do("open_burst", burst, draw(st.sampled_from([None, classes, [3] * len(burst)])))
            base += draw(st.sampled_from([1, 10, 100, 3000]))
            match draw(st.sampled_from(["no"] * 4 + ["move", "delete", "again", "policy"])):
                case "move":
                    ports = UDPEncapsulation(local_port=4500, remote_port=draw(st.sampled_from([1024, 4500])))
                    twins.do("update_sa", association.sa_id, encapsulation=ports)
                case "delete":
                    twins.do("delete_sa", association.sa_id)
                case "again":
                    twins.do("add_sa", association)
                case "policy":
                    first = policies(Direction.IN, version, association.mode)[0]
                    twins.do("delete_policy", first)


CHANGES = ["move", "delete", "newer", "dummy", "permit", "policy", "large"]


@pytest.mark.parametrize("provider", PROVIDERS)
@given(data=st.data())
@MANY
def test_sealing(provider: str, data: st.DataObject) -> None:
    draw = data.draw
    version = draw(st.sampled_from([4, 6]))
    arguments = draw(associations(version=version))
    if arguments["mode"] is Mode.TUNNEL:
        arguments["tfc"] = draw(st.sampled_from([0, 0, 50, 700, 65535]))
    last = (1 << 64) - 4 if arguments["esn"] else (1 << 32) - 4
    twins = Twins(provider)
    with twins.running():
        association = sa(Direction.OUT, **arguments)
        sequence = draw(st.sampled_from([0, 0, 17, last, (1 << 32) - 3 if arguments["esn"] else 5]))
        permitted = draw(st.sampled_from([None, None, sequence + 5]))
        twins.reveal = revealer(association, sequence)
        twins.do("add_sa", association, sequence=sequence, permitted=permitted)
        for each in policies(Direction.OUT, version, association.mode):
            twins.do("add_policy", each)
        newer = sa(Direction.OUT, **{**arguments, "spi": SPI + 1, **keys(Encr.AES_GCM_16)})
        for _ in range(draw(st.integers(1, 6))):
            flows = draw(st.lists(st.tuples(inners(), st.sampled_from([1, 1, 2, 5])), max_size=8))
            twins.do("seal_burst", [packet for packet, times in flows for _ in range(times)])
            match draw(
                st.sampled_from(
                    ["no"] * 4 + ["move", "delete", "newer", "dummy", "permit", "policy", "large"]
                )
            ):
                case "move":
                    ports = UDPEncapsulation(local_port=4501, remote_port=draw(st.sampled_from([1024, 4500])))
                    twins.do("update_sa", association.sa_id, encapsulation=ports)
                case "delete":
                    twins.do("delete_sa", association.sa_id)
                case "newer":
                    twins.do("add_sa", newer, sequence=99)
                case "dummy":
                    twins.do("seal_dummy", association.sa_id, 33)
                case "permit":
                    twins.do("permit", association.sa_id, sequence + 20)
                case "policy":
                    first = policies(Direction.OUT, version, association.mode)[0]
                    twins.do("delete_policy", first)
                case "large":
                    size = draw(st.sampled_from([1400, 9000, 65440, 65470, 65500, 65507]))
                    twins.do("seal_burst", [ip_packet("10.1.0.1", "10.2.0.1", udp(bytes(size - 28)))])


CHAINED = [each for each in TRANSFORMS if each[0] is Encr.AES_CBC]
"""What C may do for many packets at once."""


@st.composite
def several(draw: st.DrawFn, direction: Direction) -> tuple[list[SecurityAssociation], list[Policy]]:
    """Return SAs, most of them `CHAINED`, whose packets go in one burst, and a policy for each."""
    associations, found = [], []
    esn, out = draw(st.booleans()), direction is Direction.OUT
    for number in range(draw(st.integers(1, 4))):
        encryption, integrity = draw(st.sampled_from(CHAINED) if number < 3 else transforms())
        length = draw(st.sampled_from(encryption.key_lengths))
        lifetime = draw(st.sampled_from([{}, {}, {"soft_packets": 10, "hard_packets": 30}]))
        associations.append(
            sa(
                direction,
                spi=SPI + number,
                reqid=7 + number,
                esn=esn,
                lifetime=Lifetime(**lifetime),
                tfc=draw(st.sampled_from([0, 0, 700])) if out else 0,
                **keys(encryption, integrity, length=length),
            )
        )
        ends = (NETWORKS[4][0], f"10.2.{number}.0/24")[:: 1 if out else -1]
        selector = TrafficSelector(source=ends[0], destination=ends[1])
        found.append(policy(direction, selector=selector, reqid=7 + number))
    return associations, found


@pytest.mark.parametrize("provider", PROVIDERS)
@given(data=st.data())
@MANY
def test_opening_many_at_once(provider: str, data: st.DataObject) -> None:
    draw = data.draw
    associations, policies = draw(several(Direction.IN))
    forges = [forger(each) for each in associations]
    base = draw(st.sampled_from([0, (1 << 32) - 20] if associations[0].esn else [0]))
    tops = [base] * len(forges)
    twins = Twins(provider)
    with twins.running():
        for association, each in zip(associations, policies, strict=True):
            twins.do("add_sa", association, sequence=base or None)
            twins.do("add_policy", each)
        for _ in range(draw(st.integers(1, 3))):
            burst = []
            runs = st.tuples(st.integers(0, len(forges) - 1), st.integers(1, 30), st.integers(0, 200))
            for which, times, size in draw(st.lists(runs, min_size=1, max_size=6)):
                packet = ip_packet(f"10.2.{which}.1", "10.1.0.1", udp(bytes(size)))
                padding = -(len(packet) + 2) % 16
                text = packet + PADDINGS[padding] + bytes((padding, IPV4))
                for _ in range(times):
                    tops[which] += 1
                    burst.append(forges[which](tops[which], text))
            for at in draw(st.lists(st.integers(0, len(burst) - 1), max_size=6)):
                changed = burst[at]
                match draw(st.sampled_from(["tampered", "cut", "replayed", "new", "unknown", "jump"])):
                    case "tampered":
                        where = draw(st.integers(0, len(changed)))
                        rest = bytes(octet ^ 1 for octet in changed[where : where + 1])
                        changed = changed[:where] + rest + changed[where + 1 :]
                    case "cut":
                        changed = changed[: draw(st.integers(0, len(changed)))]
                    case "replayed":
                        changed = burst[draw(st.integers(0, len(burst) - 1))]
                    case "new":  # a flow that Python has to see first, and an SA that may not carry it
                        far = draw(st.sampled_from(["10.2.0.9", "10.2.0.10", "10.3.0.1"]))
                        text = ip_packet(far, "10.1.0.1", udp(bytes(2))) + bytes((0, IPV4))
                        tops[0] += 1
                        changed = forges[0](tops[0], text)
                    case "unknown":
                        changed = (SPI + 77).to_bytes(4) + changed[4:]
                    case "jump":  # with extended sequence numbers, to where others have another upper half
                        tops[0] += draw(st.sampled_from([50, 5000]))
                        text = ip_packet("10.2.0.1", "10.1.0.1", udp(bytes(2))) + bytes((0, IPV4))
                        changed = forges[0](tops[0], text)
                burst[at] = changed
            moved = draw(st.integers(0, len(burst)))
            sources = [(OUTER[4][1], 4500)] * moved + [(OUTER[4][1], 1024)] * (len(burst) - moved)
            twins.do("open_burst", list(zip(burst, sources, strict=True)))


@pytest.mark.parametrize("provider", PROVIDERS)
@given(data=st.data())
@MANY
def test_sealing_many_at_once(provider: str, data: st.DataObject) -> None:
    draw = data.draw
    associations, policies = draw(several(Direction.OUT))
    esn = associations[0].esn
    last = (1 << 64) - 1 if esn else (1 << 32) - 1
    twins = Twins(provider)
    reveals = {}
    with twins.running():
        for association, each in zip(associations, policies, strict=True):
            sequence = draw(st.sampled_from([0, 0, (1 << 32) - 20, last - 20] if esn else [0, 0, last - 20]))
            permitted = draw(st.sampled_from([None, None, sequence + 15]))
            reveals[association.spi] = revealer(association, sequence)
            twins.do("add_sa", association, sequence=sequence, permitted=permitted)
            twins.do("add_policy", each)
        twins.reveal = lambda packet: reveals[int.from_bytes(packet[:4])](packet)
        for _ in range(draw(st.integers(1, 3))):
            runs = st.tuples(
                st.integers(0, 4), st.sampled_from([1, 9]), st.integers(1, 30), st.integers(0, 200)
            )
            burst = []
            for which, host, times, size in draw(st.lists(runs, min_size=1, max_size=6)):
                burst += [ip_packet("10.1.0.1", f"10.2.{which}.{host}", udp(bytes(size)))] * times
            for at in draw(st.lists(st.integers(0, len(burst) - 1), max_size=3)):
                burst[at] = draw(
                    st.sampled_from([b"", burst[at][:-1], ip_packet("10.1.0.1", "10.2.0.3", udp())])
                )
            twins.do("seal_burst", burst)


def test_which_transforms_are_done_in_c() -> None:
    from natcompat.esp.datapath.native import NativeDataPath

    with EspEngine(timer=False, datapath=NativeDataPath) as engine:
        assert isinstance(engine.path, NativeDataPath)
        for transforms in TRANSFORMS:
            for length in transforms[0].key_lengths:
                association = sa(Direction.OUT, **keys(*transforms, length=length))
                assert bool(engine.path.providers(association)) == (transforms in IN_C), transforms


@pytest.mark.skipif(PROVIDERS != ["ipsec-mb", "libcrypto"], reason="there is one library")
def test_which_library_does_what() -> None:
    from natcompat.esp.datapath.native import NativeDataPath

    def told(transforms: tuple[Encr, Integ], provider: str | None) -> str | None:
        with EspEngine(timer=False, datapath=partial(NativeDataPath, provider=provider)) as engine:
            assert isinstance(engine.path, NativeDataPath)
            return engine.path.providers(sa(Direction.OUT, **keys(*transforms)))

    gcm, cbc = (Encr.AES_GCM_16, Integ.NONE), (Encr.AES_CBC, Integ.HMAC_SHA2_256_128)
    assert [told(gcm, each) for each in (None, *PROVIDERS)] == ["ipsec-mb", "ipsec-mb", "libcrypto"]
    assert [told(cbc, each) for each in (None, "libcrypto")] == ["ipsec-mb and libcrypto", "libcrypto"]
    assert told((Encr.AES_CBC, Integ.AES_CMAC_96), None) == "libcrypto"


def test_a_burst_whose_sa_ends_before_it_is_out_goes_by_the_other() -> None:
    """Where the SA is gone when the C data path's caller asks where its packets go."""
    from natcompat.esp.datapath.native import NativeDataPath

    with EspEngine(timer=False, datapath=NativeDataPath) as engine:
        engine.add_policy(policy(Direction.OUT))
        ids = [
            engine.add_sa(sa(Direction.OUT, spi=0x1000 + number, encryption_key=bytes((number,)) * 20))
            for number in range(2)
        ]

        class Destinations(dict[Any, Any]):
            def get(self, key: Any, default: Any = None) -> Any:
                if ids:
                    engine.delete_sa(ids.pop())
                    ids.clear()
                return super().get(key, default)

        assert isinstance(engine._path, NativeDataPath)
        engine._path._destinations = Destinations()
        results = engine.seal_burst([inner()] * 3)
        assert not any(isinstance(each, Dropped) for each in results), results
        assert not engine.counters()


def test_a_move_that_the_owner_makes_first_is_not_reported() -> None:
    twins = Twins(PROVIDERS[0])
    with twins.running():
        association = sa(Direction.IN)
        plaintext = ip_packet("10.2.0.1", "10.1.0.1", udp()) + bytes((0, IPV4))
        packet = forger(association)(1, plaintext)
        twins.do("add_sa", association)
        for engine in twins.engines:
            (mine,) = engine._associations
            assert isinstance(mine, Inbound)
            # a thread that opens packets was here, when another moves the SA
            mine.open_run([packet], ("192.0.2.9", 4500), 0, twins.now)
            engine.update_sa(association.sa_id, source="192.0.2.9")
            engine._report(mine)
        assert not any(listener.read() for listener in twins.listeners)


def test_a_peer_that_moves_within_a_burst() -> None:
    """And an SA that moves stays the first of those that have its SPI."""
    for provider in PROVIDERS:
        twins = Twins(provider, follow_mapping=True)
        with twins.running():
            association = sa(Direction.IN)
            twins.do("add_sa", association)
            for each in policies(Direction.IN, 4, association.mode):
                twins.do("add_policy", each)
            twins.do("add_sa", sa(Direction.IN, destination="192.0.2.99"))
            inside = ip_packet("10.2.0.1", "10.1.0.1", udp()) + bytes((0, IPV4))
            forge = forger(association)
            for start in (1, 5):  # the flow is known the second time
                burst = [
                    (forge(start + each, inside), ("192.0.2.9", 1000 + start + each // 2))
                    for each in range(4)
                ]
                twins.do("open_burst", burst)
            assert twins.do("get_sa", association.sa_id).packets == 8


def test_padding_of_an_sa_that_comes_in_the_middle_of_a_burst() -> None:
    from natcompat.esp.datapath.native import NativeDataPath

    class Interrupted(NativeDataPath):
        def _find_way(self, key: Any) -> Any:
            """Another thread adds an SA while this one asks where a flow goes."""
            if self._spare == 0:
                engine.add_sa(sa(Direction.OUT, spi=0x2000, encryption_key=bytes(20), reqid=99, tfc=4000))
            return super()._find_way(key)

    with EspEngine(timer=False, datapath=Interrupted) as engine:
        engine.add_policy(policy(Direction.OUT))
        engine.add_sa(sa(Direction.OUT))
        results = engine.seal_burst([inner()] * 2)
        assert not any(isinstance(each, Dropped) for each in results), results


def test_a_serial_never_names_the_next_sa_of_its_slot() -> None:
    from natcompat.esp.datapath.native_association import Register

    register = Register()
    first, second = mock.sentinel.first, mock.sentinel.second

    class Taken(list[int]):
        def __getitem__(self, slot: Any) -> Any:
            """Another thread ends the SA right after it was looked at, and makes one."""
            found = super().__getitem__(slot)
            if busy:
                busy.clear()
                register.give_back(serial)
                register.put(register.take(), second)
            return found

    busy: list[bool] = []
    serial = register.take()
    register.put(serial, first)
    register._taken = Taken(register._taken)  # type: ignore[assignment]
    busy.append(True)
    assert register.get(serial) is not second
    assert register.get(serial) is None


@pytest.mark.parametrize("window", [1, 31, 32, 63, 64, 65, 1024, 4096])
@pytest.mark.parametrize("esn", [False, True])
def test_edges_of_the_window(window: int, esn: bool) -> None:
    twins = Twins(PROVIDERS[0])
    with twins.running():
        association = sa(Direction.IN, esn=esn, replay_window=window)
        twins.do("add_sa", association)
        twins.do("add_policy", policies(Direction.IN, 4, Mode.TUNNEL)[0])
        forge = forger(association)
        plaintext = ip_packet("10.2.0.1", "10.1.0.1", udp()) + bytes((0, IPV4))
        for top in (9000, 9001, 9000 + window, 20000):
            edge = top - window
            numbers = [top, edge + 1, edge, edge - 1, edge + 1, edge + 2, top + 1]
            burst = [(forge(number, plaintext), SOURCES[0]) for number in numbers if number > 0]
            twins.do("open_burst", burst)


def test_the_first_packets_are_not_taken_again_behind_the_last() -> None:
    """With extended sequence numbers the upper half would be what it was."""
    twins = Twins(PROVIDERS[0])
    with twins.running():
        association = sa(Direction.IN, esn=True)
        twins.do("add_sa", association, sequence=(1 << 64) - 3)
        twins.do("add_policy", policies(Direction.IN, 4, Mode.TUNNEL)[0])
        forge = forger(association)
        plaintext = ip_packet("10.2.0.1", "10.1.0.1", udp()) + bytes((0, IPV4))
        numbers = [1, 2, (1 << 64) - 1, 1, 2]
        twins.do("open_burst", [(forge(number, plaintext), SOURCES[0]) for number in numbers])
        (used,) = twins.do("list_sas")
        assert used.usage.packets == 1
        assert used.usage.window_drops == 4
