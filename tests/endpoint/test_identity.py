"""Duplicates, files and descriptors of an endpoint's socket, and its end."""

from __future__ import annotations

import gc
import os
import socket
import sys
import threading
import warnings
import weakref
from typing import Any, ClassVar

import pytest

from natcompat import get_nat_t_endpoint
from tests.support.pairs import MARKER, Pair

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def is_off(pair: Pair) -> bool:
    return pair.endpoint.closed


def test_a_duplicate_shares_the_endpoint(pair: Pair) -> None:
    with pair.app.dup() as other:
        assert other.gettimeout() == pair.app.gettimeout()
        assert get_nat_t_endpoint(other) is pair.endpoint
        pair.noise()
        pair.ike(b"one")
        pair.ike(b"two")
        assert [other.recv(9), pair.app.recv(9)] == [b"one", b"two"]
        other.sendto(b"message", pair.peer.getsockname())
        assert pair.peer.recv(100) == MARKER + b"message"
        pair.app.close()
        assert not is_off(pair)
        pair.noise()
        pair.ike(b"three")
        assert other.recv(9) == b"three"
        pair.endpoint.send_keepalive(pair.peer.getsockname())
        assert pair.peer.recv(9) == b"\xff"
        with other.dup() as third:
            other.setsockopt(17, 0x103, 0)
            assert type(third) is type(other) is socket.socket
        assert is_off(pair)
    assert type(other) is socket.socket


class Closing(socket.socket):
    """A class that clears the option while a duplicate is made, as another thread might."""

    endpoint: ClassVar[Any] = None

    def __init__(self, *arguments: Any, **more: Any) -> None:
        super().__init__(*arguments, **more)
        if Closing.endpoint is not None:
            Closing.endpoint.close()


def test_a_duplicate_made_while_the_option_is_cleared_is_plain(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    app = pair.plain(Closing)
    monkeypatch.setattr(Closing, "endpoint", pair.switch_on(app))
    with app.dup() as other:
        assert type(other) is type(app) is Closing
        pair.peer.sendto(MARKER + b"raw", app.getsockname())
        assert other.recv(100) == MARKER + b"raw"


def test_a_with_statement_ends_the_endpoint_with_the_socket(pair: Pair) -> None:
    with pair.app:
        assert get_nat_t_endpoint(pair.app) is pair.endpoint
    assert pair.app.fileno() == -1
    assert is_off(pair)
    assert pair.endpoint.mode == "off"
    assert get_nat_t_endpoint(pair.app) is None
    assert type(pair.app) is socket.socket
    pair.endpoint.close()
    pair.app.close()
    with pytest.raises(OSError, match="closed"):
        pair.endpoint.send_keepalive(pair.peer.getsockname())
    with socket.socket(pair.family, socket.SOCK_DGRAM) as heir:  # the port is free
        heir.bind(pair.address)


def test_a_file_outlives_the_socket_and_is_served(pair: Pair) -> None:
    file = pair.app.makefile("rb", buffering=0)
    pair.app.close()
    assert not is_off(pair)
    pair.noise()
    pair.ike(b"message")
    assert file.read(100) == b"message"
    file.close()
    assert is_off(pair)
    with socket.socket(pair.family, socket.SOCK_DGRAM) as heir:
        heir.bind(pair.address)


def test_a_detached_descriptor_has_none_of_the_duties_of_the_process(pair: Pair) -> None:
    descriptor = pair.app.detach()
    assert is_off(pair)
    with socket.socket(fileno=descriptor) as plain:
        plain.settimeout(5)
        pair.ike(b"message")
        assert plain.recv(100) == MARKER + b"message"


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


@LINUX
@pytest.mark.parametrize("end", ["close", "endpoint", "option", "collected"])
def test_the_end_of_an_endpoint_leaves_no_descriptor_thread_or_class(pair: Pair, end: str) -> None:
    gc.collect()
    before, threads = descriptors(), threading.active_count()
    for _ in range(4):
        sock = socket.socket(pair.family, socket.SOCK_DGRAM)
        sock.bind((pair.host, 0))
        address = sock.getsockname()
        endpoint = pair.switch_on(sock)
        made = weakref.ref(type(sock))
        if end == "endpoint":
            endpoint.close()
        elif end == "option":
            sock.setsockopt(17, 0x103, 0)
        if end == "collected":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", ResourceWarning)
                del sock
            assert endpoint.closed
        else:
            sock.close()
        with socket.socket(pair.family, socket.SOCK_DGRAM) as heir:
            heir.bind(address)
        del endpoint
        gc.collect()
        assert made() is None
    assert descriptors() == before
    assert threading.active_count() == threads
