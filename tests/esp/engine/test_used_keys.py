"""The memory of counter-mode keys: one for a process, through engines, copies, forks and restores."""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, rule

from natcompat.errors import NatCompatError
from natcompat.esp.engine import nonces, process
from natcompat.esp.engine.association import Association
from natcompat.esp.engine.data_path import DataPathFactory
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.nonces import BLOCK, UsedKeys
from natcompat.esp.engine.results import Dropped, Reason
from natcompat.ipsec import Direction, Lifetime
from tests.fuzz.targets import data_paths
from tests.support.children import in_a_child, in_a_raw_child
from tests.support.esp import another_process, inner, only, policy, sa

PATHS = data_paths()


def key(number: int) -> bytes:
    return bytes([number]) * 20


class Lives(RuleBasedStateMachine):
    """Engines come and go, with few keys; no (key, IV) is seen twice."""

    engines: Bundle[EspEngine] = Bundle("engines")

    def __init__(self) -> None:
        super().__init__()
        self.process = another_process()
        self.process.__enter__()
        self.opened: list[EspEngine] = []
        self.seen: set[tuple[int, bytes]] = set()
        self.spi = 0x1000

    @rule(target=engines, path=st.sampled_from(PATHS))
    def open_engine(self, path: DataPathFactory) -> EspEngine:
        engine = EspEngine(timer=False, datapath=path)
        engine.add_policy(policy(Direction.OUT))
        self.opened.append(engine)
        return engine

    @rule(engine=consumes(engines))
    def close_engine(self, engine: EspEngine) -> None:
        engine.close()

    @rule(
        engine=engines,
        number=st.integers(0, 2),
        sequence=st.sampled_from([None, None, 0, 5, (1 << 32) - 3]),
        packets=st.integers(0, 4),
    )
    def add_and_seal(self, engine: EspEngine, number: int, sequence: int | None, packets: int) -> None:
        self.spi += 1
        association = sa(Direction.OUT, spi=self.spi, encryption_key=key(number))
        refused = None
        try:
            engine.add_sa(association, sequence=sequence)
        except NatCompatError as error:
            refused = error.errno
        assert refused in (None, errno.EEXIST)
        self.seal(engine, packets)

    @rule(engine=engines, packets=st.integers(1, 4))
    def seal(self, engine: EspEngine, packets: int) -> None:
        used = {
            installed.sa_id.spi: installed.association.encryption_key[0]
            for installed in engine.list_sas()
            if installed.association is not None
        }
        for sealed in engine.seal_burst([inner()] * packets):
            if not isinstance(sealed, Dropped):
                nonce = used[int.from_bytes(sealed[0][:4])], sealed[0][8:16]
                assert nonce not in self.seen
                self.seen.add(nonce)

    @rule(engine=engines, data=st.data())
    def delete(self, engine: EspEngine, data: st.DataObject) -> None:
        installed = engine.list_sas()
        if installed:
            engine.delete_sa(data.draw(st.sampled_from(installed)).sa_id)

    @rule(engine=engines, fork=st.sampled_from([in_a_child, in_a_raw_child]))
    def fork(self, engine: EspEngine, fork: Callable[[Callable[[], object]], int]) -> None:
        """The child cannot use an engine of its parent, nor a key that its parent has used."""

        def check() -> None:
            assert engine.seal(inner()) == Dropped(Reason.FORKED)
            with EspEngine(timer=False) as own:
                own.add_policy(policy(Direction.OUT))
                for number in {number for number, _ in self.seen}:
                    with pytest.raises(NatCompatError, match="by the process that this one was forked from"):
                        own.add_sa(sa(Direction.OUT, encryption_key=key(number)))
                own.add_sa(sa(Direction.OUT, encryption_key=key(99)))
                only(own.seal(inner()))

        assert fork(check) == 0

    def teardown(self) -> None:
        for engine in self.opened:
            engine.close()
        self.process.__exit__(None, None, None)


Lives.TestCase.settings = settings(max_examples=15, stateful_step_count=20, deadline=None)
TestLives = Lives.TestCase


@pytest.mark.parametrize("path", PATHS)
def test_sequence_numbers_from_a_file_are_taken_once(path: DataPathFactory) -> None:
    """By one engine, one after the other, and after very many other keys."""
    for life in range(2):
        with EspEngine(timer=False, datapath=path) as engine:
            if not life:
                engine.add_sa(sa(Direction.OUT), sequence=0)
                continue
            for number in range(5000):
                engine.delete_sa(engine.add_sa(sa(Direction.OUT, encryption_key=number.to_bytes(20))))
            with pytest.raises(NatCompatError, match="has been used before in this process") as caught:
                engine.add_sa(sa(Direction.OUT), sequence=7)
            assert caught.value.errno == errno.EEXIST
            with pytest.raises(NatCompatError, match="has been used before"):
                engine.add_sa(sa(Direction.OUT))
            assert engine.list_sas() == []


def test_blocks_of_one_key_are_disjoint() -> None:
    used = UsedKeys()
    firsts = [used.attach(b"k" * 20) for _ in range(500)]
    assert {(first - firsts[0]) % BLOCK for first in firsts} == {0}
    assert len(set(firsts)) == len(firsts)
    assert used.attach(b"other" * 4) not in firsts


def test_a_key_has_an_end() -> None:
    used = UsedKeys()
    for _ in range(0xFFFE):
        used.attach(b"k")
    used.attach(b"k")
    with pytest.raises(NatCompatError, match="used before"):
        used.attach(b"k")


def test_the_memory_refuses_before_it_forgets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nonces, "MOST_KEYS", 100)
    used = UsedKeys()
    for number in range(100):
        used.attach(bytes([number]))
    with pytest.raises(NatCompatError, match="remembers no more") as caught:
        used.attach(b"new")
    assert caught.value.errno == errno.ENOSPC
    with pytest.raises(NatCompatError, match="used before"):
        used.attach(bytes([0]), start=1)
    used.attach(bytes([0]))  # it is known, so its next IVs are


def test_extended_numbers_end_with_their_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """An SA may not count into the IVs of the next one with its key."""
    monkeypatch.setattr(nonces, "BLOCK", 3)
    for path in PATHS:
        with EspEngine(timer=False, datapath=path) as engine:
            engine.add_policy(policy(Direction.OUT))
            sa_id = engine.add_sa(sa(Direction.OUT, esn=True, encryption_key=bytes(20)))
            engine.permit(sa_id, 1 << 40)
            results = [isinstance(engine.seal(inner()), Dropped) for _ in range(5)]
            assert results == [False] * 3 + [True] * 2


def test_a_restore_from_a_checkpoint_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A restored process has another start than the one that was saved. (CRIU itself is not here.)"""
    for path in PATHS:
        with (
            another_process(),
            monkeypatch.context() as patch,
            EspEngine(timer=False, datapath=path) as engine,
        ):
            engine.add_policy(policy(Direction.OUT))
            engine.add_sa(sa(Direction.OUT))
            only(engine.seal(inner()))
            patch.setattr(process, "_birth", lambda: (b"this boot", b"another start"))
            with pytest.raises(NatCompatError, match="restored"):
                engine.tick()
            assert engine.seal(inner()) == Dropped(Reason.FORKED)
        process.notice_restore()  # the process is itself again


@pytest.mark.skipif(not process.WIPES, reason="this kernel wipes no pages at fork")
@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="makes PID namespaces: root")
@pytest.mark.parametrize("path", PATHS)
def test_a_child_with_the_number_of_its_parent(path: DataPathFactory) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    new_pids = 0x2000_0000  # CLONE_NEWPID

    def first_of_its_namespace() -> None:
        assert os.getpid() == 1
        engine = EspEngine(timer=False, datapath=path)
        engine.add_policy(policy(Direction.OUT))
        engine.add_sa(sa(Direction.OUT))
        only(engine.seal(inner()))

        def child() -> None:
            assert os.getpid() == 1
            assert engine.seal(inner()) == Dropped(Reason.FORKED)

        assert libc.unshare(new_pids) == 0
        assert in_a_child(child) == 0

    def namespace() -> None:
        assert libc.unshare(new_pids) == 0
        assert in_a_child(first_of_its_namespace) == 0

    assert in_a_child(namespace) == 0


class Forking(EspEngine):
    """Forks when it reports, as a signal handler might anywhere. `child`: what fork returned."""

    child: int | None = None

    def _report(self, association: Association) -> None:
        super()._report(association)
        if self.child is None:
            self.child = os.fork()


@pytest.mark.parametrize("path", PATHS)
def test_a_fork_within_a_burst_seals_no_more(path: DataPathFactory) -> None:
    with Forking(timer=False, datapath=path) as engine:
        engine.add_policy(policy(Direction.OUT))
        engine.add_sa(sa(Direction.OUT, lifetime=Lifetime(soft_packets=1)))
        results = engine.seal_burst([inner()] * 3)
        if engine.child == 0:
            os._exit(0 if results[1:] == [Dropped(Reason.FORKED)] * 2 else 1)
        assert engine.child is not None
        assert os.waitstatus_to_exitcode(os.waitpid(engine.child, 0)[1]) == 0
        assert not any(isinstance(result, Dropped) for result in results)
