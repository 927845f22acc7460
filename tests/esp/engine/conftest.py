"""Fixtures of the tests of the ESP engine."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from natcompat.esp.engine.engine import EspEngine


@pytest.fixture
def engine() -> Iterator[EspEngine]:
    """An engine without a timer thread, closed at the end of the test."""
    with EspEngine(timer=False) as engine:
        yield engine
