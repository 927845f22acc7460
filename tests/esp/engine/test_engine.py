"""Verbs of the ESP engine that are refused, races between verbs and packets, and the engine as a consumer."""

from __future__ import annotations

import errno
import subprocess
import sys
import threading
from typing import Any

import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.ciphers import aead

from natcompat.errors import NatCompatError
from natcompat.esp.engine.engine import LONGEST_QUEUE, EspEngine
from natcompat.esp.engine.portable import PortableDataPath
from natcompat.esp.engine.results import Dropped, Opened, Packet, Reason
from natcompat.ipsec import (
    Direction,
    Encr,
    HardwareOffload,
    Integ,
    Lifetime,
    UDPEncapsulation,
)
from tests.support.esp import (
    INBOUND_SELECTOR,
    OUTER,
    Pair,
    drop_reason,
    inner,
    keys,
    only,
    policy,
    sa,
    udp,
)

pytestmark = pytest.mark.usefixtures("datapath")


def test_an_sa_that_ends_while_a_packet_is_under_way() -> None:
    """It was found, and is gone when the packet gets its lock: the next one is taken, or none."""
    pair = Pair()
    sealed, _ = pair.seal(inner())
    for engine, sa_id in ((pair.near, pair.sent), (pair.far, pair.expected)):
        engine._find(sa_id).retire()
    assert pair.open(sealed) is Reason.NO_SA
    assert drop_reason(pair.near.seal(inner())) is Reason.ACQUIRE
    assert pair.near.seal_dummy(pair.sent, 10) == Dropped(Reason.NO_SA)


def test_traffic_while_an_sa_moves_back_and_forth() -> None:
    """In another thread: nothing is lost for want of an SA, nobody is asked for one."""
    pair = Pair()
    ports = [UDPEncapsulation(local_port=4500, remote_port=port) for port in (4500, 1024)]
    stop = threading.Event()

    def move() -> None:
        while not stop.is_set():
            for each in ports:
                pair.near.update_sa(pair.sent, encapsulation=each)

    thread = threading.Thread(target=move)
    with pair.near.events() as events:
        thread.start()
        try:
            results = [pair.near.seal(inner()) for _ in range(2000)]
        finally:
            stop.set()
            thread.join()
        assert not events.read()
    sealed = [only(each) for each in results if not isinstance(each, Dropped)]
    assert {destination[1] for _, destination in sealed} <= {4500, 1024}
    numbers = [int.from_bytes(packet[4:8]) for packet, _ in sealed]
    assert numbers == list(range(1, len(sealed) + 1))
    assert len(sealed) == 2000


def test_dummies_count_towards_a_lifetime() -> None:
    pair = Pair(lifetime=Lifetime(hard_packets=1))
    assert not isinstance(pair.near.seal_dummy(pair.sent, 10), Dropped)
    assert pair.near.list_sas() == []


def test_more_flows_than_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natcompat.esp.engine.flows.MOST_FLOWS", 10)
    pair = Pair()
    for port in range(1, 35):
        packet = inner(payload=udp(source_port=port))
        assert pair.open(pair.seal(packet)[0]) == packet
    path = pair.near._path
    assert isinstance(path, PortableDataPath)
    assert len(path._ways.decisions) <= 10


# -- what is refused


def test_ranges_of_spis(engine: EspEngine) -> None:
    for minimum, maximum in ((255, 300), (300, 299), (256, 1 << 32)):
        with pytest.raises(ValueError, match="no range within"):
            engine.allocate_spi(*OUTER[4], minimum=minimum, maximum=maximum)
    assert engine.list_sas() == []


def test_spis_are_unique_whatever_the_destination(engine: EspEngine) -> None:
    engine.add_sa(sa(Direction.IN, spi=0x4000))
    one = engine.allocate_spi("192.0.2.2", "192.0.2.1", minimum=0x4000, maximum=0x4002)
    other = engine.allocate_spi("192.0.2.2", "192.0.2.9", minimum=0x4000, maximum=0x4002)
    assert {one, other} == {0x4001, 0x4002}
    assert engine.get_sa(engine.list_sas()[1].sa_id).packets == 0


def test_a_transform_that_openssl_was_built_without(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model of a host in FIPS mode, where ChaCha20-Poly1305 is refused."""

    def refuse(_: bytes) -> None:
        raise UnsupportedAlgorithm("ChaCha20Poly1305 is not supported by this version of OpenSSL")

    monkeypatch.setattr(aead, "ChaCha20Poly1305", refuse)
    engine = EspEngine(timer=False, datapath=PortableDataPath)
    with pytest.raises(NatCompatError, match="has no CHACHA20_POLY1305") as caught:
        engine.add_sa(sa(Direction.OUT, **keys(Encr.CHACHA20_POLY1305)))
    assert caught.value.errno == errno.EPROTONOSUPPORT


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        (
            "import sys; sys.modules['cryptography'] = None; import natcompat.esp.engine.engine",
            "pip install 'natcompat[userspace]'",
        ),
        ("import natcompat, natcompat.ipsec, sys; print(sorted(sys.modules))", None),
    ],
    ids=["cryptography is missing", "it is not loaded before it is needed"],
)
def test_cryptography_is_optional(program: str, expected: str | None) -> None:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    if expected:
        assert expected in done.stderr
        assert "NatCompatError" in done.stderr
    else:
        assert "natcompat.ipsec" in done.stdout
        assert "cryptography" not in done.stdout
        assert "natcompat.esp" not in done.stdout


@pytest.mark.parametrize(
    ("changes", "number", "problem"),
    [
        ({"encapsulation": None}, errno.EPROTONOSUPPORT, "carried in UDP only"),
        ({"mark": 5}, errno.EOPNOTSUPP, "has no mark:"),
        ({"interface_id": 5}, errno.EOPNOTSUPP, "has no interface_id:"),
        ({"output_mark": 5, "cpu": 0}, errno.EOPNOTSUPP, "has no output_mark and cpu:"),
        ({"hw_offload": HardwareOffload(interface="eth0")}, errno.EOPNOTSUPP, "has no hw_offload:"),
        (
            {"encryption": 12, "encryption_key": bytes(16), "integrity": 5, "integrity_key": bytes(16)},
            errno.EPROTONOSUPPORT,
            "has no AES_XCBC_96",
        ),
        (
            {"encryption": 3, "encryption_key": bytes(24), "integrity": 12, "integrity_key": bytes(32)},
            errno.EPROTONOSUPPORT,
            "TRIPLE_DES_CBC of ESP .*: too old",
        ),
    ],
    ids=["no UDP", "mark", "interface", "output mark", "offload", "XCBC", "3DES"],
)
def test_refused(engine: EspEngine, changes: dict[str, Any], number: int, problem: str) -> None:
    with pytest.raises(NatCompatError, match=problem) as caught:
        engine.add_sa(sa(Direction.OUT, **changes))
    assert caught.value.errno == number
    assert caught.value.remedy
    assert engine.list_sas() == []


@pytest.mark.parametrize("integrity", list(Integ), ids=lambda transform: transform.name)
@pytest.mark.parametrize("encryption", list(Encr), ids=lambda transform: transform.name)
def test_no_legacy_transform_is_taken_for_another(
    engine: EspEngine, encryption: Encr, integrity: Integ
) -> None:
    """Even with legacy=True: the engine has none of them, and must not seal with NULL instead."""
    if encryption.is_aead or not (encryption.is_legacy or integrity.is_legacy):
        return
    if integrity is Integ.NONE:
        return
    changes: dict[str, Any] = {
        "encryption": encryption,
        "encryption_key": bytes(range(encryption.key_lengths[0])),
        "integrity": integrity,
        "integrity_key": bytes(range(integrity.key_length)),
    }
    with pytest.raises(NatCompatError) as caught:
        engine.add_sa(sa(Direction.OUT, **changes), legacy=True)
    assert caught.value.errno == errno.EPROTONOSUPPORT
    assert engine.list_sas() == []
    assert not any(transform.is_legacy for transform in engine.transforms().encryption)
    assert not any(transform.is_legacy for transform in engine.transforms().integrity)


@pytest.mark.parametrize("changes", [{"mark": 5}, {"interface_id": 5}], ids=str)
def test_policies_refused(engine: EspEngine, changes: dict[str, int]) -> None:
    with pytest.raises(NatCompatError, match=f"has no {next(iter(changes))}:"):
        engine.add_policy(policy(Direction.OUT, **changes))


def test_moving_to_a_name_that_is_taken(engine: EspEngine) -> None:
    one = engine.add_sa(sa(Direction.OUT))
    engine.add_sa(sa(Direction.OUT, destination="192.0.2.77"))
    with pytest.raises(NatCompatError) as caught:
        engine.update_sa(one, destination="192.0.2.77")
    assert caught.value.errno == errno.EEXIST
    assert len(engine.list_sas()) == 2
    with pytest.raises(NatCompatError) as caught:
        engine.update_sa(one, encapsulation=None)
    assert caught.value.errno == errno.EPROTONOSUPPORT


def test_closed() -> None:
    engine = EspEngine()
    engine.add_sa(sa(Direction.OUT, lifetime=Lifetime(hard_seconds=60)))
    events = engine.events()
    engine.close()
    engine.close()
    assert engine.seal(inner()) == Dropped(Reason.CLOSED)
    assert engine.open(bytes(64), ("192.0.2.1", 1)) == Dropped(Reason.CLOSED)
    assert events.fileno() == -1
    with pytest.raises(NatCompatError, match="closed"):
        engine.list_sas()


# -- as the consumer of a socket's ESP


def test_inbound_waits_to_be_received_and_not_for_ever() -> None:
    pair = Pair(replay_window=4096)
    sealed = [pair.seal(inner(payload=udp(number.to_bytes(4))))[0] for number in range(LONGEST_QUEUE + 5)]
    pair.far.inbound([(memoryview(packet), pair.source) for packet in sealed])
    received = pair.far.received()
    assert [each.inner for each in received] == [
        inner(payload=udp(number.to_bytes(4))) for number in range(LONGEST_QUEUE)
    ]
    assert received[0].sa.sa_id == pair.expected
    assert pair.far.counters() == {Reason.QUEUE: 5}
    assert pair.far.received() == []


def test_inbound_delivers() -> None:
    delivered: list[list[Opened]] = []
    pair = Pair()
    with EspEngine(timer=False, deliver=delivered.append) as far:
        far.add_sa(
            sa(Direction.IN, source="192.0.2.1", destination="192.0.2.2", selectors=[INBOUND_SELECTOR]),
            without_policies=True,
        )
        far.inbound([(memoryview(pair.seal(inner())[0]), pair.source), (memoryview(b"short"), pair.source)])
        far.inbound([(memoryview(b"short"), pair.source)])
        assert [[each.inner for each in burst] for burst in delivered] == [[inner()]]


def test_bursts_keep_their_order() -> None:
    pair = Pair()
    burst: list[Packet] = [inner(), b"rubbish", memoryview(inner(payload=udp(b"2")))]
    sealed = pair.near.seal_burst(burst)
    assert drop_reason(sealed[1]) is Reason.MALFORMED
    packets = [each[0] for each in sealed if not isinstance(each, Dropped)]
    opened = pair.far.open_burst([(each, pair.source) for each in packets], [0, 0])
    assert [each.inner for each in opened if isinstance(each, Opened)] == [burst[0], bytes(burst[2])]
