"""`ChildSa` when the verbs that undo or delete fail themselves: the first error is told, the rest goes on."""

from __future__ import annotations

import errno
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from natcompat import NatCompatError
from natcompat.esp.engine import EspEngine
from natcompat.ike import ChildSa
from tests.ike.children import Negotiated

DENIED = NatCompatError(errno.EPERM, "the privilege was given up")


class Denying:
    """An IPsec that refuses some verbs, as a kernel does once CAP_NET_ADMIN was given up."""

    def __init__(self, engine: EspEngine, *verbs: str) -> None:
        self.engine, self.verbs = engine, set(verbs)

    def __getattr__(self, name: str) -> Any:
        if name in self.verbs:
            return self._deny
        return getattr(self.engine, name)

    def _deny(self, *_: Any, **__: Any) -> Any:
        raise DENIED


@pytest.fixture
def engine() -> Iterator[EspEngine]:
    with EspEngine(timer=False) as made:
        yield made


def install(ipsec: Any, number: int = 1, **changes: Any) -> ChildSa:
    return Negotiated(number).install(ipsec, near=True, **changes)


def test_an_undo_that_fails_is_logged_and_the_first_error_told(
    engine: EspEngine, caplog: pytest.LogCaptureFixture
) -> None:
    ipsec = Denying(engine, "add_policy", "delete_sa")
    with caplog.at_level(logging.WARNING, "natcompat"), pytest.raises(NatCompatError) as caught:
        install(ipsec)
    assert caught.value is DENIED
    assert "could not be undone whole" in caplog.text
    assert "the privilege was given up" in caplog.text


def test_replacing_stops_where_the_policy_that_is_there_cannot_be_read(engine: EspEngine) -> None:
    """Otherwise nothing could bring it back."""
    with pytest.raises(NatCompatError) as caught:
        install(Denying(engine, "get_policy"), replace_policies=True)
    assert caught.value is DENIED
    assert engine.list_sas() == []
    assert engine.list_policies() == []


def test_delete_goes_on_behind_an_error_and_can_be_finished(engine: EspEngine) -> None:
    ipsec = Denying(engine)
    child = install(ipsec)
    ipsec.verbs = {"delete_sa"}
    with pytest.raises(NatCompatError) as caught:
        child.delete()
    assert caught.value is DENIED
    assert len(engine.list_sas()) == 2
    assert engine.list_policies() == []  # they were deleted all the same
    ipsec.verbs = set()
    child.delete()
    assert engine.list_sas() == []
    assert child.inbound is None
    assert child.policies == ()


def test_the_new_child_sends_even_if_the_old_one_cannot_be_deleted(engine: EspEngine) -> None:
    ipsec = Denying(engine)
    old = install(ipsec)
    new = install(ipsec, 2, rekeys=old)
    ipsec.verbs = {"delete_sa"}
    with pytest.raises(NatCompatError):
        old.rekeyed_by(new)
    assert len(new.policies) == 2
    assert new.outbound is not None


def test_encapsulation_can_begin_when_a_nat_is_found_later(engine: EspEngine) -> None:
    child = install(engine)
    child.move(remote=("198.51.100.7", 31234), nat=True)
    assert child.encapsulation is not None
    assert child.encapsulation.remote_port == 31234
    child.move(remote="198.51.100.8")  # the port stays
    assert child.remote.port == 31234
