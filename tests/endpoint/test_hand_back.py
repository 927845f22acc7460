"""The hand-back: displaced IKE returns to the application with its source."""

from __future__ import annotations

import copy
import os
import pickle
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


# --- copies and other senders -----------------------------------------------------------------------


def test_an_envelope_is_opened_once_and_a_peek_leaves_it(family: socket.AddressFamily) -> None:
    hand_back = HandBack(family)
    source = SOURCES[family][0]
    datagrams = [hand_back.wrap(b"%d" % number, source) for number in range(3000)]
    for datagram in reversed(datagrams[:1024]):  # as many may overtake each other
        assert hand_back.open(datagram, peek=True) is not None
        assert hand_back.open(datagram) is not None
        assert hand_back.open(datagram, peek=True) is None
        assert hand_back.open(datagram) is None
    assert hand_back.open(datagrams[2999]) is not None
    assert hand_back.open(datagrams[1500]) is None, "too far behind to be told from a copy"
    assert hand_back.open(datagrams[2999 - 1023]) is not None


def test_a_peeked_message_is_received_once(pair: Pair) -> None:
    state = state_of(pair.app)
    assert state is not None
    datagram = state.diversion.hand_back.wrap(MESSAGE, SOURCES[socket.AddressFamily(pair.family)][0])
    pair.peer.sendto(datagram, pair.address)
    assert pair.app.recv(100, socket.MSG_PEEK) == MESSAGE
    assert pair.app.recv(100, socket.MSG_PEEK) == MESSAGE
    assert pair.app.recv(100) == MESSAGE
    pair.peer.sendto(datagram, pair.address)
    assert pair.app.recvfrom(100) == (datagram[len(MARKER) :][:100], pair.peer.getsockname())


@pytest.mark.parametrize("changed", range(len(MARKER), OVERHEAD + 1))
def test_an_envelope_with_a_changed_byte_is_none(changed: int) -> None:
    hand_back = HandBack(socket.AF_INET)
    datagram = bytearray(hand_back.wrap(b"m", ("192.0.2.7", 500), ("192.0.2.1", 2)))
    datagram[changed] ^= 1
    assert hand_back.open(bytes(datagram)) is None


def test_a_message_that_is_larger_than_the_receive_is_lost_and_counted(pair: Pair) -> None:
    """What is truncated cannot be authenticated."""
    state = state_of(pair.app)
    assert state is not None
    pair.ike(MESSAGE)
    assert pair.app.recvfrom(100)[0] == MESSAGE
    exact = state.receive_size == 0
    source = SOURCES[socket.AddressFamily(pair.family)][0]
    pair.peer.sendto(state.diversion.hand_back.wrap(bytes(20_000), source), pair.address)
    pair.ike(b"later")
    assert pair.app.recvfrom(100)[0] == (b"later" if exact else bytes(100))
    assert pair.endpoint.stats().errors == exact


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes fork on Unix")
def test_a_forked_child_counts_as_another_sender() -> None:
    hand_back = HandBack(socket.AF_INET)
    source = ("192.0.2.7", 500)
    assert hand_back.open(hand_back.wrap(b"the parent's", source)) is not None
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.write(writer, hand_back.wrap(b"the child's", source))
        os._exit(0)
    os.waitpid(child, 0)
    opened = hand_back.open(os.read(reader, 4096))
    os.close(reader)
    os.close(writer)
    assert opened is not None
    assert opened.message == b"the child's"
    assert hand_back.open(hand_back.wrap(b"the parent's", source)) is not None


def test_the_windows_of_senders_are_bounded() -> None:
    hand_back = HandBack(socket.AF_INET)
    for _ in range(3000):
        hand_back._begin_sender()
        assert hand_back.open(hand_back.wrap(b"m", ("192.0.2.7", 500))) is not None
    assert len(hand_back._windows) <= 1024


def test_the_key_is_not_shown_and_not_copied() -> None:
    hand_back = HandBack(socket.AF_INET)
    key = hand_back._key
    assert key.hex() not in repr(hand_back)
    assert repr(key) not in repr(hand_back)
    for copier in (pickle.dumps, copy.copy, copy.deepcopy):
        with pytest.raises(TypeError, match="not copied"):
            copier(hand_back)
