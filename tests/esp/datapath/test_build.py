"""The C data path as it was built: what it is, and that it says what Python says."""

from __future__ import annotations

import errno
from functools import partial

import pytest

from natcompat.errors import NatCompatError
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.results import Reason
from tests.support.esp import Pair, inner

datapath = pytest.importorskip(
    "natcompat.esp.datapath.compiled", reason="the C data path is not built: python ffi/build_datapath.py"
)
lib, ffi = datapath.lib, datapath.ffi


def test_results_are_numbered_as_reasons_are() -> None:
    names = ffi.typeof("enum esp_result").relements
    assert [names[f"ESP_{reason.name}"] for reason in Reason] == list(range(1, lib.ESP_REASONS))
    assert names["ESP_DONE"] == 0
    assert lib.ESP_REASONS <= lib.ESP_UP


def test_a_provider_that_there_is_not() -> None:
    from natcompat.esp.datapath.native import NativeDataPath

    with pytest.raises(NatCompatError, match="has no rot13 here") as caught:
        EspEngine(timer=False, datapath=partial(NativeDataPath, provider="rot13"))
    assert caught.value.errno == errno.ENOSYS


def test_serials_are_not_used_again() -> None:
    from natcompat.esp.datapath.native_association import Register

    register = Register()
    one, other = register.take(), register.take()
    association = object()
    register.put(one, association)  # type: ignore[arg-type]
    assert (register.get(one), register.get(other)) == (association, None)
    register.give_back(one)
    register.give_back(one)
    assert register.get(one) is None
    again, more = register.take(), register.take()
    assert len({one, other, again, more}) == 4
    assert {again >> 32, more >> 32} == {one >> 32, 3}, "the slot of the first, once, and a fresh one"


def test_what_is_remembered_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    from natcompat.esp.datapath.native import NativeDataPath

    monkeypatch.setitem(EspEngine.__init__.__kwdefaults__ or {}, "datapath", NativeDataPath)
    monkeypatch.setattr("natcompat.esp.datapath.native._MOST_REMEMBERED", 2)
    pair = Pair(replay_window=0)
    for number in range(9):
        sealed, destination = pair.seal(inner(traffic_class=number << 2))
        assert destination.traffic_class == number << 2
        pair.source = (f"192.0.2.{number + 1}", 4500)
        assert pair.open(sealed) == inner(traffic_class=number << 2)
    path = pair.near._path
    assert isinstance(path, NativeDataPath)
    assert len(path._destinations) <= 2


def test_traffic_classes_that_are_too_few() -> None:
    from natcompat.esp.datapath.native import NativeDataPath

    with EspEngine(timer=False, datapath=NativeDataPath) as engine, pytest.raises(ValueError, match="many"):
        engine.open_burst([(b"", ("192.0.2.1", 1))], [])
