"""``setsockopt(IPPROTO_UDP, UDP_NAT_T_ENDPOINT)``, as a daemon for Solaris calls it."""

from __future__ import annotations

import errno
import socket
import struct
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

import natcompat
from natcompat import get_nat_t_endpoint, set_nat_t_endpoint
from tests.support.pairs import MARKER, Pair, outcome

OPTION = (socket.IPPROTO_UDP, 0x0103)

pytestmark = pytest.mark.skipif(sys.platform == "sunos5", reason="Solaris knows the option")


@pytest.fixture
def installed() -> Iterator[None]:
    natcompat.install()
    yield
    natcompat.uninstall()


VALUES: dict[str, tuple[tuple[Any, ...], bool]] = {
    "one": ((1,), True),
    "true": ((True,), True),
    "any-number": ((-3,), True),
    "bytes": ((struct.pack("=i", 1),), True),
    "other-byte": ((b"\0\0\1\0",), True),
    "a-bytearray": ((bytearray(struct.pack("=i", 1)),), True),
    "zero": ((0,), False),
    "false": ((False,), False),
    "zero-bytes": ((bytes(4),), False),
}
BAD_VALUES: dict[str, tuple[tuple[Any, ...], type[Exception]]] = {
    "no-bytes": ((b"",), OSError),
    "too-few-bytes": ((b"\1",), OSError),
    "too-many-bytes": ((bytes(8),), OSError),
    "none-and-a-length": ((None, 4), OSError),
    "none": ((None,), OSError),
    "number-and-a-length": ((1, 4), OSError),
    "text": (("1",), TypeError),
    "a-float": ((1.5,), TypeError),
}


@pytest.mark.parametrize(("value", "expected"), VALUES.values(), ids=VALUES.keys())
def test_an_endpoint_has_the_option_without_install(
    pair: Pair, value: tuple[Any, ...], expected: bool
) -> None:
    assert pair.app.getsockopt(*OPTION) == 1
    assert pair.app.getsockopt(*OPTION, 4) == struct.pack("=i", 1)
    pair.app.setsockopt(*OPTION, *value)
    assert pair.endpoint.closed is not expected
    assert (get_nat_t_endpoint(pair.app) is not None) is expected
    pair.app.sendto(b"message", pair.peer.getsockname())
    assert pair.peer.recv(100) == (MARKER if expected else b"") + b"message"


@pytest.mark.parametrize(("value", "error"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_a_bad_value_changes_nothing(pair: Pair, value: tuple[Any, ...], error: type[Exception]) -> None:
    with pytest.raises(error) as caught:
        pair.app.setsockopt(*OPTION, *value)
    assert getattr(caught.value, "errno", None) == (errno.EINVAL if error is OSError else None)
    assert not pair.endpoint.closed


def test_without_install_a_plain_socket_does_not_have_the_option(pair: Pair) -> None:
    pair.endpoint.close()
    for sock in (pair.app, pair.peer):
        assert outcome(partial(sock.setsockopt, *OPTION, 1)) == (OSError, errno.ENOPROTOOPT)
        assert outcome(partial(sock.getsockopt, *OPTION)) == (OSError, errno.ENOPROTOOPT)
    assert not hasattr(socket, "UDP_NAT_T_ENDPOINT")


@pytest.fixture
def plain(family: socket.AddressFamily) -> Iterator[socket.socket]:
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        yield sock


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("value", "expected"), VALUES.values(), ids=VALUES.keys())
def test_after_install_every_socket_has_the_option(
    plain: socket.socket, loopback: tuple[str, int], value: tuple[Any, ...], expected: bool
) -> None:
    assert plain.getsockopt(*OPTION) == 0
    assert plain.getsockopt(*OPTION, 4) == bytes(4)
    plain.setsockopt(*OPTION, *value)
    assert plain.getsockopt(*OPTION) == int(expected)
    plain.bind(loopback)
    assert socket.UDP_NAT_T_ENDPOINT == 0x0103  # type: ignore[attr-defined]
    plain.setsockopt(*OPTION, 1)
    plain.setsockopt(*OPTION, 1)
    assert get_nat_t_endpoint(plain) is not None
    plain.setsockopt(*OPTION, 0)
    plain.setsockopt(*OPTION, 0)
    assert plain.getsockopt(*OPTION) == 0
    assert type(plain) is socket.socket


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("value", "error"), BAD_VALUES.values(), ids=BAD_VALUES.keys())
def test_after_install_a_bad_value_changes_nothing(
    plain: socket.socket, value: tuple[Any, ...], error: type[Exception]
) -> None:
    with pytest.raises(error):
        plain.setsockopt(*OPTION, *value)
    assert plain.getsockopt(*OPTION) == 0


WRONG: dict[str, tuple[Callable[[], socket.socket], int]] = {
    "tcp": (lambda: socket.socket(), errno.ENOPROTOOPT),
    "unix": (lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM), errno.EAFNOSUPPORT),
}


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(("make", "number"), WRONG.values(), ids=WRONG.keys())
def test_after_install_other_sockets_refuse_the_option(
    make: Callable[[], socket.socket], number: int
) -> None:
    with make() as sock:
        bare = outcome(lambda: super(socket.socket, sock).getsockopt(*OPTION))
        with pytest.raises(OSError, match="option") as caught:
            sock.setsockopt(*OPTION, 1)
        assert caught.value.errno == number
        assert outcome(lambda: sock.getsockopt(*OPTION)) == bare


@pytest.mark.usefixtures("installed")
def test_after_install_a_closed_socket_is_a_bad_descriptor(plain: socket.socket) -> None:
    plain.close()
    for operation in (lambda: plain.setsockopt(*OPTION, 1), lambda: plain.getsockopt(*OPTION)):
        assert outcome(operation) == (OSError, errno.EBADF)


@pytest.mark.usefixtures("installed")
def test_after_install_other_options_are_unchanged(plain: socket.socket) -> None:
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
    assert plain.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST)
    plain.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, struct.pack("=i", 0))
    assert plain.getsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 4) == bytes(4)
    for mistake in ((17,), (17, 0x103), (17, "option", 1), (1, 2, 3, 4, 5)):
        with pytest.raises(TypeError):
            plain.setsockopt(*mistake)
    with pytest.raises(TypeError):
        plain.getsockopt(17)  # type: ignore[call-overload]


def test_install_can_be_repeated_and_undone(plain: socket.socket) -> None:
    before = dict(vars(socket.socket))
    for _ in range(2):
        natcompat.install()
        natcompat.install()
        plain.setsockopt(*OPTION, 1)
        natcompat.uninstall()
        natcompat.uninstall()
        assert dict(vars(socket.socket)) == before
        assert not hasattr(socket, "UDP_NAT_T_ENDPOINT")
        assert plain.getsockopt(*OPTION) == 1  # sockets keep the option
        set_nat_t_endpoint(plain, False)


def test_uninstall_restores_the_methods_of_another_library(monkeypatch: pytest.MonkeyPatch) -> None:
    inherited = socket.socket.setsockopt

    def theirs(self: socket.socket, *arguments: Any) -> None:
        inherited(self, *arguments)

    monkeypatch.setattr(socket.socket, "setsockopt", theirs, raising=False)
    monkeypatch.setattr(socket, "UDP_NAT_T_ENDPOINT", 0x0103, raising=False)
    natcompat.install()
    assert socket.socket.setsockopt is not theirs
    natcompat.uninstall()
    assert socket.socket.setsockopt is theirs
    assert socket.UDP_NAT_T_ENDPOINT == 0x0103  # type: ignore[attr-defined]


def test_on_solaris_install_does_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    before = dict(vars(socket.socket))
    monkeypatch.setattr(sys, "platform", "sunos5")
    natcompat.install()
    assert dict(vars(socket.socket)) == before
