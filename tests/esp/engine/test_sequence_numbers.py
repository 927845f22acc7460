"""Sequence numbers of the ESP engine: the last one, reserved ones, and those from before a restart."""

from __future__ import annotations

import errno

import pytest

from natcompat.errors import NatCompatError
from natcompat.esp.engine.results import Dropped, Reason
from natcompat.ipsec import (
    Direction,
    Expire,
)
from tests.support.esp import (
    Pair,
    drop_reason,
    inner,
    sa,
)

pytestmark = pytest.mark.usefixtures("datapath")


@pytest.mark.parametrize("esn", [False, True])
def test_the_last_sequence_number(esn: bool) -> None:
    last = (1 << 64 if esn else 1 << 32) - 1
    pair = Pair(esn=esn, sequence=last - 2)
    with pair.near.events() as events:
        for number in (last - 1, last):
            sealed, _ = pair.seal(inner())
            assert int.from_bytes(sealed[4:8]) == number & 0xFFFF_FFFF
        assert not events.read()
        assert drop_reason(pair.near.seal(inner())) is Reason.SEQUENCE
        assert events.read() == [Expire(sa_id=pair.sent, reqid=7, hard=True)]
        assert drop_reason(pair.near.seal(inner())) is Reason.ACQUIRE, "nothing goes in the clear"
    assert pair.near.list_sas() == []


@pytest.mark.parametrize("esn", [False, True])
def test_sequence_numbers_that_are_reserved(esn: bool) -> None:
    """None is used before it is permitted, and the SA waits for more."""
    pair = Pair(esn=esn)
    pair.near.delete_sa(pair.sent)
    sent = pair.near.add_sa(
        sa(Direction.OUT, esn=esn, encryption_key=bytes(20)), sequence=1000, permitted=1002
    )
    for number in (1001, 1002):
        assert int.from_bytes(pair.seal(inner())[0][4:8]) == number
    for _ in range(2):
        assert drop_reason(pair.near.seal(inner())) is Reason.UNRESERVED
    assert isinstance(pair.near.seal_dummy(sent, 10), Dropped)
    assert pair.near.get_sa(sent).sequence == 1002
    assert pair.near.counters()[Reason.UNRESERVED] == 2
    pair.near.permit(sent, 900)  # what is permitted stays so
    pair.near.permit(sent, 1003)
    sealed = pair.seal(inner())[0]
    assert (sealed[4:8], sealed[8:16]) == ((1003).to_bytes(4), (1003).to_bytes(8))
    assert drop_reason(pair.near.seal(inner())) is Reason.UNRESERVED
    pair.near.permit(sent, 1 << 70)
    pair.seal(inner())
    with pytest.raises(NatCompatError) as caught:
        pair.far.permit(pair.expected, 5)
    assert caught.value.errno == errno.ESRCH


def test_the_last_sequence_number_ends_an_sa_that_reserves() -> None:
    pair = Pair()
    pair.near.delete_sa(pair.sent)
    last = 0xFFFF_FFFF
    pair.near.add_sa(sa(Direction.OUT, encryption_key=bytes(20)), sequence=last - 1, permitted=1 << 40)
    pair.seal(inner())
    assert drop_reason(pair.near.seal(inner())) is Reason.SEQUENCE
    assert pair.near.list_sas() == []


@pytest.mark.parametrize("esn", [False, True])
def test_what_was_received_before_a_restart_is_a_replay(esn: bool) -> None:
    pair = Pair(esn=esn, sequence=(1 << 33) - 2 if esn else 98)
    old, last, new = (pair.seal(inner())[0] for _ in range(3))
    assert pair.open(last) == (Reason.REPLAYED if esn else inner()), "a fresh window begins at 0"
    highest = (pair.near.get_sa(pair.sent).sequence or 0) - 1
    installed = pair.far.list_sas()[0].association
    assert installed is not None
    pair.far.delete_sa(pair.expected)
    pair.far.add_sa(installed, sequence=highest)
    assert pair.open(old) is Reason.REPLAYED
    assert pair.open(last) is Reason.REPLAYED
    assert pair.open(new) == inner(), "also from another 2**32 than the first"
    assert pair.far.get_sa(pair.expected).sequence == highest + 1
