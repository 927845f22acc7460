"""The C data path as it was built: what it is, and that it says what Python says."""

from __future__ import annotations

import pytest

from natcompat.esp.results import Reason

datapath = pytest.importorskip(
    "natcompat.esp._datapath", reason="the C data path is not built: python ffi/build_datapath.py"
)
lib, ffi = datapath.lib, datapath.ffi


def test_results_are_numbered_as_reasons_are() -> None:
    names = ffi.typeof("enum esp_result").relements
    assert [names[f"ESP_{reason.name}"] for reason in Reason] == list(range(1, lib.ESP_REASONS))
    assert names["ESP_DONE"] == 0
    assert lib.ESP_REASONS <= lib.ESP_UP


def test_a_provider_that_there_is_not() -> None:
    assert lib.esp_path_new(b"rot13") == ffi.NULL
