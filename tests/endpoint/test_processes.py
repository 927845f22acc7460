"""Endpoints in forked and spawned processes."""

from __future__ import annotations

import copy
import multiprocessing
import os
import pickle
import socket
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest

from natcompat import get_nat_t_endpoint, set_nat_t_endpoint
from tests.support.pairs import MARKER, Kind, Pair, ready

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def answer(sock: socket.socket, times: int) -> None:
    """Answer messages in a child."""
    for _ in range(times):
        message, source = sock.recvfrom(100)
        sock.sendto(b"child: " + message, source)


@FORKS
@pytest.mark.parametrize("end", ["exit", "close"])
def test_a_forked_child_is_served_and_its_end_does_not_affect_the_parent(pair: Pair, end: str) -> None:
    pair.noise()
    pair.ike(b"one")
    child = multiprocessing.get_context("fork").Process(
        target=answer_and_end, args=(pair.app, 2, end), daemon=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of threads in the parent
        child.start()
    try:
        assert pair.peer.recv(100) == MARKER + b"child: one"
        pair.noise()
        pair.ike(b"two")
        assert pair.peer.recv(100) == MARKER + b"child: two"
    finally:
        child.join(20)
    assert child.exitcode == 0
    child.close()
    mode = pair.endpoint.mode
    pair.app.setblocking(False)
    pair.noise()
    assert pair.kind.exact is not ready(pair.app)
    pair.ike(b"parent")
    assert pair.app.recv(100) == b"parent"
    pair.app.sendto(b"message", pair.peer.getsockname())
    assert pair.peer.recv(100) == MARKER + b"message"
    assert pair.endpoint.mode == mode != "off"


def answer_and_end(sock: socket.socket, times: int, end: str) -> None:
    answer(sock, times)
    if end == "close":
        sock.close()
        assert get_nat_t_endpoint(sock) is None


@pytest.mark.parametrize("timeout", [10, None], ids=["with-timeout", "blocking"])
def test_a_spawned_child_is_served(pair: Pair, timeout: float | None) -> None:
    pair.app.settimeout(timeout)
    child = multiprocessing.get_context("spawn").Process(
        target=answer_in_child, args=(pair.app, timeout), daemon=True
    )
    child.start()
    try:
        pair.peer.settimeout(30)
        for message in (b"one", b"two"):
            pair.noise()
            pair.ike(message)
            assert pair.peer.recv(100) == MARKER + b"child: " + message
    finally:
        child.join(30)
    assert child.exitcode == 0
    child.close()
    pair.ike(b"parent")
    assert pair.app.recv(100) == b"parent"


def answer_in_child(sock: socket.socket, timeout: float | None) -> None:
    assert get_nat_t_endpoint(sock) is not None
    assert sock.gettimeout() == timeout
    with sock:
        answer(sock, 2)


@pytest.mark.parametrize("duplicator", [copy.copy, copy.deepcopy, pickle.dumps])
def test_pickling_without_multiprocessing_is_refused_as_for_a_plain_socket(
    kind: Kind, duplicator: Callable[[Any], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "multiprocessing.reduction", raising=False)
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        with pytest.raises(TypeError, match="cannot pickle 'socket' object"):
            duplicator(sock)
        set_nat_t_endpoint(sock, backend=kind.take())
        with pytest.raises(TypeError, match="cannot pickle 'socket' object"):
            duplicator(sock)
