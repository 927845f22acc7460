"""What fuzzing has found interesting is tried again, and so is what Hypothesis makes up."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fuzz.targets import TARGETS

CORPORA = Path(__file__).with_name("corpora")


@pytest.mark.parametrize("name", TARGETS)
def test_corpus(name: str) -> None:
    inputs = (CORPORA / f"{name}.hex").read_text().splitlines()
    assert inputs
    for line in inputs:
        try:
            TARGETS[name](bytes.fromhex(line))
        except Exception as error:
            error.add_note(f"input of {name}: {line}")
            raise


PIECES = st.lists(
    st.tuples(st.integers(0, 255), st.binary(max_size=80)).map(
        lambda piece: bytes((piece[0],)) + len(piece[1]).to_bytes(2) + piece[1]
    ),
    max_size=8,
).map(b"".join)


@pytest.mark.parametrize("name", TARGETS)
@settings(max_examples=100, deadline=None)
@given(
    data=st.one_of(
        st.binary(max_size=200), st.tuples(st.binary(min_size=1, max_size=1), PIECES).map(b"".join)
    )
)
def test_made_up(name: str, data: bytes) -> None:
    TARGETS[name](data)
