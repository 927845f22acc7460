"""Sequence numbers are on the disk before they are used, so no restart repeats one, nor an IV."""

from __future__ import annotations

import contextlib
import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from natcompat.commands.tunnel import reserve
from natcompat.commands.tunnel.reserve import Numbers, Reservations
from natcompat.commands.tunnel.state import StateFile
from natcompat.errors import NatCompatError
from natcompat.esp import choice as datapaths
from natcompat.esp.engine.data_path import DataPath
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.portable import PortableDataPath
from natcompat.esp.engine.results import Dropped, Reason
from natcompat.ipsec import Direction, SecurityAssociation
from tests.support.esp import another_process, inner, policy, sa

if not hasattr(os, "fork"):
    pytest.skip("needs flock and directories that can be synced", allow_module_level=True)


class Run:
    """One life of a tunnel: an engine that goes by a state file."""

    make_path: ClassVar[Callable[..., DataPath]] = PortableDataPath

    def __init__(self, path: Path, associations: list[SecurityAssociation]) -> None:
        self.complaints: list[str] = []
        self.associations = associations
        self.state = StateFile(path, create=not path.exists())
        with another_process():  # a run is a process that was started again
            self.engine = EspEngine(timer=False, datapath=Run.make_path)
        try:
            self.reservations = Reservations(
                self.state,
                associations,
                numbers=self.last_numbers,
                permit=self.engine.permit,
                complain=self.complaints.append,
            )
            self.numbers = self.reservations.begin()
        except BaseException:
            self.crash()
            raise
        self.engine.add_policy(policy(Direction.OUT))
        for each in associations:
            sequence, permitted = self.numbers[each.direction, each.spi]
            self.engine.add_sa(each, sequence=sequence, permitted=permitted)

    def last_numbers(self) -> Numbers:
        return {
            (each.association.direction, each.sa_id.spi): (each.sa_id, each.usage.sequence or 0)
            for each in self.engine.list_sas()
            if each.association is not None
        }

    def seal(self) -> bytes | Reason:
        sealed = self.engine.seal(inner())
        return sealed.reason if isinstance(sealed, Dropped) else sealed[0][0]

    def crash(self) -> None:
        self.engine.close()
        self.state.close()

    def end(self) -> None:
        self.reservations.close()
        self.reservations.finish(self.last_numbers())
        self.crash()


@pytest.fixture(autouse=True, params=[each.name for each in datapaths.probe() if each.viable])
def datapath(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every data path that works here."""
    make_path = datapaths.select(request.param).make_path
    assert make_path is not None
    monkeypatch.setattr(Run, "make_path", staticmethod(make_path))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that are used up soon."""
    monkeypatch.setattr(reserve, "BLOCK", 8)
    monkeypatch.setattr(reserve, "AHEAD", 0.0)


STEPS = st.lists(
    st.one_of(st.integers(1, 12), st.sampled_from(["look", "look", "crash", "end", "full", "space"])),
    max_size=40,
)


@settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(steps=STEPS, esn=st.booleans())
@pytest.mark.usefixtures("small")
def test_nothing_repeats(tmp_path_factory: pytest.TempPathFactory, steps: list[int | str], esn: bool) -> None:
    """Whatever happens, in whatever order: killed, ended, disk full, sealing faster than reserving."""
    path = tmp_path_factory.mktemp("state") / "state"
    association = sa(Direction.OUT, esn=esn)
    numbers: list[int] = []
    ivs: set[bytes] = set()
    with contextlib.ExitStack() as stack:
        patch = stack.enter_context(pytest.MonkeyPatch.context())
        run = Run(path, [association])
        for step in steps:
            if isinstance(step, int):
                for _ in range(step):
                    packet = run.seal()
                    if isinstance(packet, Reason):
                        assert packet is Reason.UNRESERVED
                        continue
                    numbers.append(int.from_bytes(packet[4:8]))
                    assert packet[8:16] not in ivs
                    ivs.add(packet[8:16])
            elif step == "look":
                run.reservations.look()
            elif step in ("crash", "end"):
                with contextlib.suppress(OSError):  # a disk that is full when the tunnel ends
                    getattr(run, step)()
                run.crash()
                patch.undo()
                run = Run(path, [association])
            elif step == "full":
                patch.setattr(os, "fsync", full)
            else:
                patch.undo()
        run.crash()
    assert numbers == sorted(set(numbers))


def full(*_: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.usefixtures("small")
def test_a_clean_end_wastes_nothing(tmp_path: Path) -> None:
    for before in (0, 3):
        run = Run(tmp_path / "state", [sa(Direction.OUT)])
        assert run.numbers == {(Direction.OUT, sa(Direction.OUT).spi): (before, before + 8)}
        for _ in range(3):
            assert isinstance(run.seal(), bytes)
        run.end()


@pytest.mark.usefixtures("small")
def test_one_that_was_killed_loses_its_block(tmp_path: Path) -> None:
    run = Run(tmp_path / "state", [sa(Direction.OUT)])
    run.crash()
    run = Run(tmp_path / "state", [sa(Direction.OUT)])
    packet = run.seal()
    assert isinstance(packet, bytes)
    assert int.from_bytes(packet[4:8]) == int.from_bytes(packet[8:16]) == 9
    run.crash()


@pytest.mark.usefixtures("small")
def test_a_full_disk_stops_sealing_until_there_is_space(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = Run(tmp_path / "state", [sa(Direction.OUT)])
    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        sealed = [run.seal() for _ in range(9)]
        assert sealed[8] is Reason.UNRESERVED
        assert all(isinstance(each, bytes) for each in sealed[:8])
        for _ in range(3):
            run.reservations.look()
            assert run.seal() is Reason.UNRESERVED
        assert len(run.complaints) == 1
        assert "No space left on device" in run.complaints[0]
    run.reservations.look()
    assert run.complaints[1:] == ["sequence numbers can be reserved again"]
    assert isinstance(run.seal(), bytes)
    run.end()


@pytest.mark.usefixtures("small")
def test_the_thread_reserves_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reserve, "ROUND", 0.001)
    run = Run(tmp_path / "state", [sa(Direction.OUT)])
    run.reservations.start()
    sent = 0
    waited = threading.Event()
    for _ in range(20000):
        sent += isinstance(run.seal(), bytes)
        if sent == 100:
            break
        waited.wait(0.001)
    run.end()
    assert sent == 100
    assert not run.complaints


def test_blocks_grow_with_the_rate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reserve, "BLOCK", 8)
    run = Run(tmp_path / "state", [sa(Direction.OUT)])
    moment = 1000.0
    monkeypatch.setattr(time, "monotonic", lambda: moment)
    run.reservations.look()
    for _ in range(2):
        while isinstance(run.seal(), bytes):
            pass
        moment += 0.1
        run.reservations.look()
    used = run.last_numbers()[Direction.OUT, sa(Direction.OUT).spi][1]
    identity = run.state.identity(sa(Direction.OUT))
    assert run.state.last(identity) - used > 500, "two seconds at this rate"
    run.crash()


@pytest.mark.parametrize("esn", [False, True])
def test_the_end_of_the_numbers(tmp_path: Path, esn: bool) -> None:
    association, last = sa(Direction.OUT, esn=esn), (1 << 64 if esn else 1 << 32) - 1
    path = tmp_path / "state"
    with StateFile(path, create=True) as state:
        state.record({state.identity(association): last - 2})
    run = Run(path, [association])
    for _ in range(2):
        run.reservations.look()
        assert isinstance(run.seal(), bytes)
    assert run.seal() is Reason.SEQUENCE
    run.reservations.look()
    run.end()
    with pytest.raises(NatCompatError) as caught:
        Run(path, [association])
    assert caught.value.errno == errno.EOVERFLOW
    assert "Replace" in caught.value.remedy
    if not esn:  # the same key has numbers left where they have 64 bits
        Run(path, [replace(association, esn=True)]).crash()


def seal_for(association: SecurityAssociation, count: int) -> Iterator[bytes]:
    """Yield packets for the inbound `association`."""
    with EspEngine(timer=False) as peer:
        out = replace(association, direction=Direction.OUT)
        peer.add_sa(out, sequence=0)
        selectors: dict[str, Any] = {"source": out.source, "destination": out.destination}
        peer.add_policy(policy(Direction.OUT, selector=policy(Direction.IN).selector, **selectors))
        for _ in range(count):
            sealed = peer.seal(inner_back())
            assert not isinstance(sealed, Dropped)
            yield sealed[0][0]


def inner_back() -> bytes:
    packet = bytearray(inner())
    packet[12:16], packet[16:20] = packet[16:20], packet[12:16]  # the checksum stays what it was
    return bytes(packet)


@pytest.mark.parametrize("ending", ["end", "crash after a checkpoint"])
def test_what_was_received_stays_received(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    association = sa(Direction.IN)
    packets = list(seal_for(association, 4))
    peer = (str(association.source), 4500)
    run = Run(tmp_path / "state", [association])
    run.engine.add_policy(policy(Direction.IN))
    for packet in packets[:3]:
        assert not isinstance(run.engine.open(packet, peer), Dropped)
    if ending == "end":
        run.end()
    else:
        run.reservations.look()
        assert run.state.last(run.state.identity(association)) == 0, "not every look writes"
        monkeypatch.setattr(reserve, "CHECKPOINT", 0.0)
        run.reservations.look()
        run.crash()
    run = Run(tmp_path / "state", [association])
    run.engine.add_policy(policy(Direction.IN))
    for packet in packets[:3]:
        assert run.engine.open(packet, peer) == Dropped(Reason.REPLAYED)
    assert not isinstance(run.engine.open(packets[3], peer), Dropped)
    run.crash()


def test_an_sa_that_is_gone_or_being_moved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reserve, "BLOCK", 8)
    run = Run(tmp_path / "state", [sa(Direction.OUT)])
    for _ in range(8):
        run.seal()
    real = run.engine.permit
    with monkeypatch.context() as moment:

        def moved(*_: object) -> None:
            raise NatCompatError(errno.ESRCH, "there is no such SA")

        moment.setattr(run.reservations, "_permit", moved)
        run.reservations.look()
    assert run.seal() is Reason.UNRESERVED
    run.reservations._permit = real
    run.reservations.look()  # it knows that the SA was not told
    assert isinstance(run.seal(), bytes)
    run.engine.flush_sas()
    run.reservations.look()
    run.end()
