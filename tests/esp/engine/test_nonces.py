"""No key ever sees an initialization vector twice: threads, forks, SAs deleted and added again."""

from __future__ import annotations

import errno
import itertools
import threading
from contextlib import nullcontext

import pytest

from natcompat.errors import NatCompatError
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.results import Dropped, Reason
from natcompat.ipsec import Direction, Encr, Integ
from tests.support.children import in_a_child
from tests.support.esp import Pair, inner, keys, only, policy, sa

pytestmark = pytest.mark.usefixtures("datapath")

COUNTING = [
    (Encr.AES_GCM_8, Integ.NONE),
    (Encr.AES_GCM_16, Integ.NONE),
    (Encr.AES_CCM_16, Integ.NONE),
    (Encr.NULL_AUTH_AES_GMAC, Integ.NONE),
    (Encr.CHACHA20_POLY1305, Integ.NONE),
    (Encr.AES_CTR, Integ.HMAC_SHA2_256_128),
]


def iv(packet: bytes) -> bytes:
    return packet[8:16]


@pytest.mark.parametrize("transforms", COUNTING, ids=lambda value: value[0].name)
def test_threads(transforms: tuple[Encr, Integ]) -> None:
    """Eight threads on two SAs with one key: every IV once, every sequence number once and in order."""
    each = 400
    with EspEngine(timer=False) as engine:
        engine.add_policy(policy(Direction.OUT))
        for number in range(2):
            engine.add_sa(sa(Direction.OUT, spi=0x1000 + number, **keys(*transforms)))
        results: list[list[bytes]] = [[] for _ in range(8)]
        begin = threading.Barrier(len(results))

        def work(mine: list[bytes]) -> None:
            begin.wait()
            for _ in range(each // 20):
                sealed = engine.seal_burst([inner()] * 20)
                mine.extend(packet[0] for packet in sealed if not isinstance(packet, Dropped))

        threads = [threading.Thread(target=work, args=[mine]) for mine in results]
        for thread in threads:
            thread.start()
        engine.delete_sa(sa(Direction.OUT, spi=0x1001).sa_id)  # the newest: all go over to the other
        for thread in threads:
            thread.join()
    packets = list(itertools.chain(*results))
    assert len(packets) == each * len(results)
    assert len({iv(packet) for packet in packets}) == len(packets)
    assert len({packet[:8] for packet in packets}) == len(packets)
    for mine in results:
        for spi in (0x1000, 0x1001):
            numbers = [packet[4:8] for packet in mine if packet[:4] == spi.to_bytes(4)]
            assert numbers == sorted(numbers)


def test_an_sa_that_is_deleted_and_added_again_goes_on_with_its_ivs() -> None:
    seen = set()
    with EspEngine(timer=False) as engine:
        engine.add_policy(policy(Direction.OUT))
        for _ in range(5):
            sa_id = engine.add_sa(sa(Direction.OUT))
            packets = [only(engine.seal(inner()))[0] for _ in range(10)]
            assert [int.from_bytes(packet[4:8]) for packet in packets] == list(range(1, 11))
            seen |= {iv(packet) for packet in packets}
            engine.delete_sa(sa_id)
    assert len(seen) == 50


def test_keys_that_outlive_the_process() -> None:
    """The caller keeps the last sequence number; IVs are the numbers themselves."""
    pair = Pair(sequence=1000)
    sealed, _ = pair.seal(inner())
    assert (sealed[4:8], iv(sealed)) == ((1001).to_bytes(4), (1001).to_bytes(8))
    assert pair.open(sealed) == inner()
    pair.near.delete_sa(pair.sent)
    with pytest.raises(NatCompatError, match="has been used before") as caught:
        pair.near.add_sa(sa(Direction.OUT), sequence=1001)
    assert caught.value.errno == errno.EEXIST
    assert pair.near.list_sas() == []


@pytest.mark.parametrize("transforms", [(Encr.AES_CBC, Integ.HMAC_SHA2_256_128), COUNTING[1]], ids=str)
def test_equal_packets_never_look_alike(transforms: tuple[Encr, Integ]) -> None:
    pair = Pair(**keys(*transforms))
    length = 16 if transforms[0] is Encr.AES_CBC else 8
    packets = [pair.seal(inner())[0] for _ in range(500)]
    assert len({packet[8 : 8 + length] for packet in packets}) == 500
    assert len({packet[8 + length :][:16] for packet in packets}) == 500


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("timer", [True, False])
def test_a_forked_child_never_seals(timer: bool) -> None:
    with EspEngine(timer=timer) as engine:
        engine.add_policy(policy(Direction.OUT))
        sa_id = engine.add_sa(sa(Direction.OUT))
        before = only(engine.seal(inner()))[0]

        def check() -> None:
            assert engine.seal(inner()) == Dropped(Reason.FORKED)
            assert engine.seal_burst([inner()] * 3) == [Dropped(Reason.FORKED)] * 3
            assert engine.seal_dummy(sa_id, 100) == Dropped(Reason.FORKED)
            assert engine.open(before, ("192.0.2.1", 4500)) == Dropped(Reason.FORKED)
            for verb in (
                lambda: engine.add_sa(sa(Direction.OUT)),
                lambda: engine.get_sa(sa_id),
                engine.list_sas,
                engine.flush_sas,
                engine.events,
                engine.tick,
            ):
                with pytest.raises(NatCompatError, match="forked from") as caught:
                    verb()
                assert caught.value.errno == errno.EINVAL
                assert "after fork" in caught.value.remedy
            engine.close()
            with EspEngine(timer=False) as own:  # its own is as good as any
                own.add_policy(policy(Direction.OUT))
                own.add_sa(sa(Direction.OUT, encryption_key=bytes(20)))
                only(own.seal(inner()))

        assert in_a_child(check) == 0
        after = only(engine.seal(inner()))[0]
        assert int.from_bytes(iv(after)) == (int.from_bytes(iv(before)) + 1) % (1 << 64)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_fork_while_another_thread_holds_every_lock() -> None:
    """The child refuses at once; it does not wait for a thread that it has not."""
    with EspEngine(timer=False) as engine:
        engine.add_policy(policy(Direction.OUT))
        sa_id = engine.add_sa(sa(Direction.OUT))
        locked, release = threading.Event(), threading.Event()

        def hold() -> None:
            with engine._lock, getattr(engine._find(sa_id), "lock", nullcontext()):
                locked.set()
                release.wait(30)

        thread = threading.Thread(target=hold)
        thread.start()
        locked.wait(30)

        def check() -> None:
            assert engine.seal(inner()) == Dropped(Reason.FORKED)
            engine.close()

        assert in_a_child(check) == 0
        release.set()
        thread.join()
