"""The replay window against a naive model, and the inference of extended sequence numbers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natcompat.esp.engine.replay import ReplayWindow
from natcompat.esp.engine.results import Reason


class Model:
    """What RFC 4303, 3.4.3 says, with a set that forgets nothing."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.seen: set[int] = set()
        self.top = 0

    def check(self, sequence: int) -> Reason | None:
        if sequence == 0 or sequence in self.seen:
            return Reason.REPLAYED if sequence + self.size > self.top or not sequence else Reason.TOO_OLD
        return Reason.TOO_OLD if sequence + self.size <= self.top else None

    def commit(self, sequence: int) -> None:
        self.seen.add(sequence)
        self.top = max(self.top, sequence)


SIZES = st.one_of(st.integers(1, 130), st.sampled_from([255, 256, 257, 1024, 4095, 4096]))
STEPS = st.lists(
    st.one_of(
        st.integers(-9, 9),
        st.integers(-140, 140),
        st.integers(-5000, 5000),
        st.sampled_from([1 << 20, 1 << 31]),
    ),
    max_size=80,
)


@given(size=SIZES, steps=STEPS, start=st.sampled_from([0, 1, 63, 64, (1 << 32) - 70, (1 << 63)]))
def test_as_the_model(size: int, steps: list[int], start: int) -> None:
    window, model = ReplayWindow(size), Model(size)
    at = start
    for step in steps:
        at = max(0, at + step)
        expected = model.check(at)
        assert window.check(at) is expected
        assert window.check(at) is expected, "to check changes nothing"
        if expected is None:
            window.commit(at)
            model.commit(at)
            assert window.top == model.top


@given(size=SIZES, top=st.one_of(st.integers(0, 300), st.sampled_from([1 << 32, (1 << 63) - 3])), steps=STEPS)
def test_a_window_that_goes_on(size: int, top: int, steps: list[int]) -> None:
    """All up to `top` counts as received, and nothing behind it."""
    window, model = ReplayWindow(size, top), Model(size)
    model.top = top
    model.seen = set(range(max(0, top - size - 8), top + 1))
    at = top
    for step in steps:
        at = max(0, at + step)
        assert window.check(at) is model.check(at)
        if model.check(at) is None:
            window.commit(at)
            model.commit(at)


@given(size=SIZES, numbers=st.permutations(range(1, 40)))
def test_any_order_once(size: int, numbers: list[int]) -> None:
    window = ReplayWindow(size)
    for number in numbers:
        reason = window.check(number)
        assert (reason is None) == (number + size > window.top)
        if reason is None:
            window.commit(number)
    assert all(window.check(number) is not None for number in numbers)


def test_without_a_window_everything_passes() -> None:
    window = ReplayWindow(0)
    for number in (7, 7, 3, 0, 7):
        assert window.check(number) is None
        window.commit(number)
    assert window.top == 7
    assert window.check(-1) is Reason.TOO_OLD


def naive_inference(low: int, top: int, size: int) -> int:
    """Return the only number with this lower half in the 2**32 numbers from the window's left edge."""
    left = top - size + 1
    return left + (low - left) % (1 << 32)


@given(
    size=st.sampled_from([1, 32, 64, 1024, 4096]),
    top=st.one_of(
        st.integers(0, 5000), st.integers((1 << 32) - 5000, (1 << 32) + 5000), st.integers(0, (1 << 64) - 1)
    ),
    data=st.data(),
)
def test_inference(size: int, top: int, data: st.DataObject) -> None:
    """RFC 4303, A2: whatever comes from the window or up to 2**32 - size numbers ahead is found again."""
    window = ReplayWindow(size)
    window.top = top
    number = data.draw(
        st.one_of(st.integers(max(0, top - size + 1), top + size), st.integers(top, top + (1 << 32) - size))
    )
    low = number & 0xFFFF_FFFF
    assert naive_inference(low, top, size) == number
    assert window.infer(low) == (number if number < 1 << 64 else -1)


def test_numbers_from_behind_the_last_are_too_old() -> None:
    """They would be authentic as the first ones, which were received long ago."""
    window = ReplayWindow(64, (1 << 64) - 3)
    assert window.infer(0xFFFF_FFFF) == (1 << 64) - 1
    assert window.infer(1) == -1
    assert window.check(-1) is Reason.TOO_OLD


def test_numbers_from_before_the_first_are_too_old() -> None:
    window = ReplayWindow(64)
    window.commit(1)
    assert window.infer(0xFFFF_FFFF) == -1
    assert window.check(-1) is Reason.TOO_OLD


@pytest.mark.parametrize("ahead", [0, 1, (1 << 31) - 1])
def test_without_a_window_the_nearest_number_is_meant(ahead: int) -> None:
    window = ReplayWindow(0)
    window.commit(1 << 33)
    assert window.infer(((1 << 33) + ahead) & 0xFFFF_FFFF) == (1 << 33) + ahead
    assert window.infer(((1 << 33) - ahead) & 0xFFFF_FFFF) == (1 << 33) - ahead
