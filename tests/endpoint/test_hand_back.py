"""The hand-back: displaced IKE returns to the application with its source."""

from __future__ import annotations

import socket
from typing import Any

import pytest

from natcompat.backends.hand_back import OVERHEAD, HandBack
from natcompat.endpoint.receive import discard_peeked
from natcompat.endpoint.state import state_of
from tests.support.pairs import (
    IN_LINE,
    MARKER,
    MESSAGE,
    RECEIVES,
    TRUNC,
    Operation,
    Pair,
    of_kinds,
    ready,
)

SOURCES: dict[int, list[tuple[Any, ...]]] = {
    socket.AF_INET: [("192.0.2.7", 500), ("0.0.0.0", 65535)],
    socket.AF_INET6: [
        ("2001:db8::7", 4500, 0, 0),
        ("fe80::1%lo", 500, 7, 3),
        ("::ffff:192.0.2.7", 1, 0xFFFFF, 0),
    ],
}


@pytest.mark.parametrize("message", [b"", b"m", bytes(1000)], ids=["empty", "short", "long"])
def test_an_envelope_returns_message_and_source(family: socket.AddressFamily, message: bytes) -> None:
    envelope, other = HandBack(family), HandBack(family)
    for host, *rest in SOURCES[family]:
        datagram = envelope.wrap(message, (host, *rest))
        assert datagram.startswith(MARKER)  # steered and filtered like IKE
        assert len(datagram) == OVERHEAD + len(message)
        assert other.open(datagram) is None, "the key is per endpoint"
        assert envelope.open(datagram[:-1]) is None
        assert envelope.open(b"\1" + datagram[1:]) is None
        opened = envelope.open(datagram)
        assert opened == (message, (host.partition("%")[0], *rest), None)


@pytest.mark.parametrize("receive", list(RECEIVES.values())[:6], ids=list(RECEIVES)[:6])
def test_ike_that_was_handed_back_has_its_source(pair: Pair, receive: Operation) -> None:
    state = state_of(pair.app)
    assert state is not None
    source = SOURCES[socket.AddressFamily(pair.family)][0]
    for trusted in (False, True):
        datagram = state.diversion.hand_back.wrap(b"a message", source)
        pair.peer.sendto(datagram, pair.address)
        assert receive(pair.app) in (b"a message", 9), f"{trusted=}"
    pair.peer.sendto(state.diversion.hand_back.wrap(b"a message", source), pair.address)
    assert pair.app.recvfrom(4) == (b"a me", source)
    pair.peer.sendto(state.diversion.hand_back.wrap(b"a message", source), pair.address)
    assert pair.app.recvmsg(4) == (b"a me", [], TRUNC, source)


# --- IKE taken in place of peeked ESP -------------------------------------------------------------


@of_kinds(IN_LINE)
def test_ike_taken_in_place_of_peeked_esp_is_put_back(pair: Pair) -> None:
    pair.ike(MESSAGE)  # the next datagram, once another thread has taken the peeked ESP
    source = pair.peer.getsockname()
    discard(pair.app)
    assert pair.app.recvfrom(100) == (MESSAGE, source)
    pair.ike(b"again")
    discard(pair.app)
    discard(pair.app)  # the message that was put back
    assert pair.app.recvfrom(100) == (b"again", source)
    discard(pair.app)  # the queue is empty
    assert pair.endpoint.stats().errors == 0


@of_kinds(IN_LINE)
def test_ike_that_cannot_be_put_back_is_counted(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    pair.app.connect(pair.peer.getsockname())
    pair.ike(MESSAGE)
    discard(pair.app)
    assert pair.endpoint.stats().errors == 1
    assert "could not be handed back" in caplog.text
    assert not ready(pair.app)


def discard(app: socket.socket) -> None:
    state = state_of(app)
    assert state is not None
    discard_peeked(app, socket.socket, state)
