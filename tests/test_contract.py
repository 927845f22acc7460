"""The contract as data: the classifier against its table, and both against RFC 3948."""

from __future__ import annotations

import array
import itertools
import pickle
from typing import Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import natcompat
from natcompat import contract
from natcompat.contract import LARGEST_PAYLOAD, OUTBOUND_TABLE, TABLE, OutboundRow, Row, Verdict, classify


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_every_row_is_classified(row: Row) -> None:
    assert classify(row.payload) is row.verdict


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
def test_only_ike_is_delivered_and_without_the_marker(row: Row) -> None:
    assert (row.delivered is not None) == (row.verdict is Verdict.IKE)
    if row.delivered is not None:
        assert row.payload == bytes(4) + row.delivered


@pytest.mark.parametrize("row", OUTBOUND_TABLE, ids=lambda row: row.name)
def test_every_send_has_the_marker(row: OutboundRow) -> None:
    assert row.wire == bytes(4) + row.message


def test_the_table_has_every_boundary_length_with_and_without_zeros() -> None:
    by_length: dict[int, set[Verdict]] = {}
    for row in TABLE:
        by_length.setdefault(len(row.payload), set()).add(row.verdict)
    assert {1, 2, 3} <= by_length.keys()
    assert by_length[0] == {Verdict.RUNT}
    for length in (4, 5, 8):
        assert by_length[length] >= {Verdict.IKE, Verdict.ESP}
    assert len({row.name for row in TABLE}) == len(TABLE)


@settings(database=None)  # nothing is written beside the tests, which may be somebody else's
@given(st.binary(max_size=40))
def test_the_verdict_is_what_rfc_3948_says(payload: bytes) -> None:
    if len(payload) < 4:
        expected = Verdict.KEEPALIVE if payload == b"\xff" else Verdict.RUNT
    else:
        expected = Verdict.ESP if any(payload[:4]) else Verdict.IKE
    assert classify(payload) is expected


FIRST_WORDS = [bytes(octets) for octets in itertools.product((0, 1, 255), repeat=4)]


@pytest.mark.parametrize("rest", [b"", b"\0", bytes(4), b"\xff"], ids=["bare", "zero", "zeros", "FF"])
def test_any_bit_of_the_first_word_makes_a_datagram_esp(rest: bytes) -> None:
    for word in FIRST_WORDS:
        assert (classify(word + rest) is Verdict.IKE) == (word == bytes(4))


@pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
@pytest.mark.parametrize("form", ["B", "b", "c"])
def test_a_view_of_bytes_is_classified_like_the_bytes(row: Row, form: Literal["B", "b", "c"]) -> None:
    assert classify(bytearray(row.payload)) is row.verdict
    view: Any = memoryview(row.payload).cast(form)
    assert classify(view) is row.verdict


def test_a_view_of_words_is_classified_by_its_bytes() -> None:
    words = array.array("I", [0, 7])
    assert classify(memoryview(words)) is Verdict.IKE
    words[0] = 1
    assert classify(memoryview(words)) is Verdict.ESP


def test_the_largest_messages_fill_a_datagram() -> None:
    udp_header = 8
    assert LARGEST_PAYLOAD[4] + 4 + udp_header + 20 == 65535
    assert LARGEST_PAYLOAD[6] + 4 + udp_header == 65535


def test_every_public_name_of_the_module_is_defined() -> None:
    for name in natcompat.__all__:
        assert getattr(natcompat, name) is not None
    assert set(natcompat.__all__) <= set(dir(natcompat))
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        natcompat.nothing  # noqa: B018
    assert natcompat.UDP_NAT_T_ENDPOINT == 0x0103
    assert natcompat.classify is contract.classify


@pytest.mark.parametrize("verdict", Verdict)
def test_verdicts_survive_pickling(verdict: Verdict) -> None:
    assert pickle.loads(pickle.dumps(verdict)) is verdict
