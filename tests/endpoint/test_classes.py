"""Sockets of the application's own classes: their overrides run; unfit classes are refused."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, ClassVar

import pytest

from natcompat import NatTSocket, get_nat_t_endpoint
from tests.support.pairs import MARKER, Pair, in_thread, ready, sleeping, until

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


class Shouting(socket.socket):
    """A class whose overrides change messages and count their calls."""

    calls = 0

    def recvfrom(self, *arguments: Any) -> Any:
        self.calls += 1
        data, source = super().recvfrom(*arguments)
        return data.upper() + b"!", source

    def sendto(self, data: Any, *arguments: Any) -> int:
        self.calls += 1
        return super().sendto(data.upper(), *arguments)


class Slotted(socket.socket):
    __slots__ = ("tag",)


class Equal(socket.socket):
    """A class whose objects are all equal, and cannot be keys."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Equal)

    __hash__ = None  # type: ignore[assignment]


class Meta(type):
    made: ClassVar[list[str]] = []

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Meta:
        mcs.made.append(name)
        return super().__new__(mcs, name, bases, namespace)


class OfMeta(socket.socket, metaclass=Meta):
    pass


class Helpful(socket.socket):
    """A class with helpers of names that natcompat might use."""

    def _helper(self, *arguments: Any) -> Any:
        raise AssertionError("nobody but the application may call this")

    _receive = _send = _begin = _half = _rearrange = _receive_until = _send_pieces = _helper


class Falsy(socket.socket):
    def __len__(self) -> int:
        return 0


class Delegating(socket.socket):
    """A class with attributes of every name, which cannot be set."""

    def __getattr__(self, name: str) -> str:
        if name.startswith("__"):
            raise AttributeError(name)
        return f"not {name}"

    def __setattr__(self, name: str, value: object) -> None:
        if name not in ("_io_refs", "_closed"):
            raise AttributeError(name)
        super().__setattr__(name, value)


class Mixin:
    def greeting(self) -> str:
        return "hello"

    def recv(self, *arguments: Any) -> bytes:
        return b"<" + super().recv(*arguments) + b">"  # type: ignore[misc,no-any-return]


class Mixed(Mixin, socket.socket):
    pass


CLASSES: list[type[socket.socket]] = [
    socket.socket,
    Shouting,
    Slotted,
    Equal,
    OfMeta,
    Helpful,
    Falsy,
    Delegating,
    Mixed,
]
every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


@every_class
def test_every_class_is_served_and_restored(pair: Pair, cls: type[socket.socket]) -> None:
    app = pair.plain(cls)
    number, descriptor, text = id(app), app.fileno(), repr(app)
    for _ in range(2):
        endpoint = pair.switch_on(app)
        assert (id(app), app.fileno()) == (number, descriptor)
        assert isinstance(app, cls)
        assert isinstance(app, NatTSocket)
        assert type(app).__name__ == cls.__name__
        assert type(app).__module__ == cls.__module__
        assert repr(app).replace("[NAT-T]", "") == text
        assert get_nat_t_endpoint(app) is endpoint
        pair.noise()
        pair.peer.sendto(b"\1\2\3\4ESP", app.getsockname())
        pair.peer.sendto(MARKER + b"message", app.getsockname())
        assert app.recvfrom(100)[0] == (b"MESSAGE!" if cls is Shouting else b"message")
        pair.peer.sendto(MARKER + b"message", app.getsockname())
        assert app.recv(100) == (b"<message>" if cls is Mixed else b"message")
        app.sendto(b"message", pair.peer.getsockname())
        assert pair.peer.recv(100).lower() == MARKER + b"message"
        with app.dup() as other:
            assert type(other) is type(app)
        endpoint.close()
        assert type(app) is cls
        assert repr(app) == text


def test_overrides_run_once_and_keep_their_state(pair: Pair) -> None:
    app = pair.plain(Shouting)
    pair.switch_on(app)
    pair.peer.sendto(MARKER + b"message", app.getsockname())
    app.recvfrom(100)
    app.sendto(b"message", pair.peer.getsockname())
    assert pair.peer.recv(100) == MARKER + b"MESSAGE"
    assert vars(app)["calls"] == 2


@LINUX
def test_an_override_runs_once_when_the_option_is_cleared_meanwhile(pair: Pair) -> None:
    app = pair.plain(Shouting)
    endpoint = pair.switch_on(app)
    wait = in_thread(lambda: app.recvfrom(100))
    until(lambda: sleeping(wait))
    endpoint.close()
    pair.peer.sendto(b"message", app.getsockname())
    assert wait()[0] == b"MESSAGE!"
    assert vars(app)["calls"] == 1


class Late(socket.socket):
    """A class that clears the option between its overrides and their ``super()``."""

    endpoint: Any = None

    def _off(self) -> None:
        if self.endpoint is not None:
            self.endpoint.close()

    def recv(self, *arguments: Any) -> bytes:
        method = super().recv
        self._off()
        return method(*arguments)

    def recvfrom(self, *arguments: Any) -> Any:
        method = super().recvfrom
        self._off()
        return method(*arguments)

    def recvmsg(self, *arguments: Any) -> Any:
        method = super().recvmsg
        self._off()
        return method(*arguments)

    def recv_into(self, *arguments: Any) -> int:
        method = super().recv_into
        self._off()
        return method(*arguments)

    def recvmsg_into(self, *arguments: Any) -> Any:
        method = super().recvmsg_into
        self._off()
        return method(*arguments)

    def send(self, *arguments: Any) -> int:
        method = super().send
        self._off()
        return method(*arguments)

    def sendall(self, *arguments: Any) -> None:
        method = super().sendall
        self._off()
        return method(*arguments)

    def sendto(self, *arguments: Any) -> int:
        method = super().sendto
        self._off()
        return method(*arguments)

    def sendmsg(self, *arguments: Any) -> int:
        method = super().sendmsg
        self._off()
        return method(*arguments)

    def setsockopt(self, *arguments: Any) -> None:
        method = super().setsockopt
        self._off()
        return method(*arguments)

    def getsockopt(self, *arguments: Any) -> Any:
        method = super().getsockopt
        self._off()
        return method(*arguments)

    def connect(self, *arguments: Any) -> None:
        method = super().connect
        self._off()
        return method(*arguments)

    def connect_ex(self, *arguments: Any) -> int:
        method = super().connect_ex
        self._off()
        return method(*arguments)

    def dup(self) -> Any:
        method = super().dup
        self._off()
        return method()

    def setblocking(self, *arguments: Any) -> None:
        method = super().setblocking
        self._off()
        return method(*arguments)

    def detach(self) -> int:
        method = super().detach
        self._off()
        return method()

    def _real_close(self, *arguments: Any) -> None:
        method = super()._real_close  # type: ignore[misc]
        self._off()
        method(*arguments)


def duplicate(sock: socket.socket) -> bytes:
    with sock.dup() as other:
        assert type(other) is type(sock)
        return other.recv(100)


OVERTAKEN: dict[str, tuple[Callable[[socket.socket, Any], Any], Any]] = {
    "recv": (lambda sock, _: sock.recv(100), b"\0\0\0\0raw"),
    "recvfrom": (lambda sock, _: sock.recvfrom(100)[0], b"\0\0\0\0raw"),
    "recvmsg": (lambda sock, _: sock.recvmsg(100)[0], b"\0\0\0\0raw"),
    "recv_into": (lambda sock, _: sock.recv_into(bytearray(100)), 7),
    "recvmsg_into": (lambda sock, _: sock.recvmsg_into([bytearray(100)])[0], 7),
    "sendto": (lambda sock, address: sock.sendto(b"message", address), 7),
    "sendmsg": (lambda sock, address: sock.sendmsg([b"message"], (), 0, address), 7),
    "connect": (lambda sock, address: sock.connect(address), None),
    "connect_ex": (lambda sock, address: sock.connect_ex(address), 0),
    "setsockopt": (lambda sock, _: sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 99999), None),
    "getsockopt": (lambda sock, _: sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT), 0),
    "dup": (lambda sock, _: duplicate(sock), b"\0\0\0\0raw"),
    "setblocking": (lambda sock, _: sock.setblocking(False), None),
    "detach": (lambda sock, _: os.close(sock.detach()), None),
    "close": (lambda sock, _: sock.close(), None),
}


@pytest.mark.parametrize(("operation", "expected"), OVERTAKEN.values(), ids=OVERTAKEN.keys())
def test_a_method_called_while_the_option_is_cleared_does_what_a_plain_socket_does(
    pair: Pair, operation: Callable[[socket.socket, Any], Any], expected: Any
) -> None:
    app = pair.plain(Late)
    app.endpoint = pair.switch_on(app)  # type: ignore[attr-defined]
    pair.peer.sendto(MARKER + b"raw", app.getsockname())
    assert operation(app, pair.peer.getsockname()) == expected
    assert type(app) is Late
    if ready(pair.peer):
        assert pair.peer.recv(100) == b"message"


@pytest.mark.parametrize("method", ["send", "sendall"])
def test_a_send_to_the_peer_while_the_option_is_cleared_has_no_marker(pair: Pair, method: str) -> None:
    app = pair.plain(Late)
    app.connect(pair.peer.getsockname())
    app.endpoint = pair.switch_on(app)  # type: ignore[attr-defined]
    getattr(app, method)(b"message")
    assert pair.peer.recv(100) == b"message"


# --- classes that cannot be served ----------------------------------------------------------------


class Parent(socket.socket):
    """A class that derived classes must pass an argument."""

    def __init_subclass__(cls, *, word: str) -> None:
        pass


UNFIT: dict[str, type[socket.socket]] = {"wants-a-word": Parent}


@pytest.mark.parametrize("cls", UNFIT.values(), ids=UNFIT.keys())
def test_a_class_that_cannot_be_derived_from_is_refused(pair: Pair, cls: type[socket.socket]) -> None:
    app = pair.plain(cls)
    with pytest.raises(TypeError, match="word"):
        pair.switch_on(app)
    assert type(app) is cls
    assert get_nat_t_endpoint(app) is None


class Changing(type):
    """A metaclass that gives every second class another object layout."""

    def __new__(mcs, name: str, bases: tuple[type, ...], namespace: dict[str, Any]) -> Changing:
        if bases[0] is not socket.socket:
            namespace["__slots__"] = ("one_more",)
        return super().__new__(mcs, name, bases, namespace)


class Changed(socket.socket, metaclass=Changing):
    pass


def test_a_class_with_another_layout_is_refused_and_the_socket_unchanged(pair: Pair) -> None:
    app = pair.plain(Changed)
    threads = threading.active_count()
    with pytest.raises(TypeError, match="layout"):
        pair.switch_on(app)
    assert type(app) is Changed
    assert threading.active_count() == threads
    assert app.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT) == 0
    for payload in (b"\xff", b"\1\2\3\4", MARKER):
        pair.peer.sendto(payload, app.getsockname())
        assert app.recv(100) == payload
