"""Unsuitable sockets and arguments give an error with a remedy, and change nothing."""

from __future__ import annotations

import _socket
import errno
import os
import socket
import ssl
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from natcompat import (
    BackendUnavailableError,
    NatCompatError,
    backends,
    get_nat_t_endpoint,
    set_nat_t_endpoint,
)
from tests.support.pairs import Kind

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="options and addresses of Linux")


class Imposter:
    """An object with the attributes of a socket."""

    family, type, proto = socket.AF_INET, socket.SOCK_DGRAM, 0

    def fileno(self) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(f"natcompat must not read {name}")


def closed() -> socket.socket:
    sock = socket.socket(type=socket.SOCK_DGRAM)
    sock.close()
    return sock


def detached() -> socket.socket:
    sock = socket.socket(type=socket.SOCK_DGRAM)
    os.close(sock.detach())
    return sock


def secured() -> socket.socket:
    ours, theirs = socket.socketpair()
    theirs.close()
    return ssl.create_default_context().wrap_socket(
        ours, server_hostname="localhost", do_handshake_on_connect=False
    )


def in_trio() -> Any:
    return pytest.importorskip("trio").socket.from_stdlib_socket(socket.socket(type=socket.SOCK_DGRAM))


def in_c() -> Any:
    return _socket.socket(socket.AF_INET, socket.SOCK_DGRAM)


NO_SOCKETS: dict[str, tuple[Callable[[], Any], str]] = {
    "nothing": (lambda: None, "expected a UDP socket.socket, not NoneType"),
    "a-descriptor": (lambda: 7, r"not int; wrap the descriptor: socket.socket\(fileno=os.dup\(fd\)\)"),
    "text": (lambda: "socket", "not str"),
    "a-class": (lambda: socket.socket, "not type"),
    "an-imposter": (Imposter, "not Imposter"),
    "a-socket-of-the-c-module": (in_c, "expected a UDP socket.socket"),
    "ssl": (secured, "an SSL socket cannot be"),
    "trio": (in_trio, r"natcompat.endpoint.loops.open_nat_t_endpoint\(\)"),
}
WRONG_SOCKETS: dict[str, tuple[Callable[[], socket.socket], int, str]] = {
    "closed": (closed, errno.EBADF, "closed"),
    "detached": (detached, errno.EBADF, "closed"),
    "tcp": (
        lambda: socket.socket(),
        errno.ENOPROTOOPT,
        "not SOCK_STREAM of protocol 0. Make the socket with",
    ),
    "tcp-6": (lambda: socket.socket(socket.AF_INET6), errno.ENOPROTOOPT, "SOCK_STREAM"),
    "unix": (
        lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM),
        errno.EAFNOSUPPORT,
        "AF_INET and AF_INET6, not AF_UNIX",
    ),
    "unix-stream": (lambda: socket.socket(socket.AF_UNIX), errno.EAFNOSUPPORT, "AF_UNIX"),
}
if sys.platform == "linux":
    WRONG_SOCKETS["udp-lite"] = (
        lambda: socket.socket(type=socket.SOCK_DGRAM, proto=socket.IPPROTO_UDPLITE),
        errno.ENOPROTOOPT,
        "of protocol 136",
    )
    WRONG_SOCKETS["netlink"] = (
        lambda: socket.socket(socket.AF_NETLINK, socket.SOCK_RAW),
        errno.EAFNOSUPPORT,
        "AF_NETLINK",
    )


@pytest.fixture
def bad(request: pytest.FixtureRequest) -> Iterator[Any]:
    sock = request.param()
    yield sock
    opened = sock._sock if type(sock).__module__.startswith("trio") else sock
    if isinstance(opened, _socket.socket):
        opened.close()


@pytest.mark.parametrize(("bad", "message"), NO_SOCKETS.values(), ids=NO_SOCKETS.keys(), indirect=["bad"])
@pytest.mark.parametrize("enable", [True, False], ids=["on", "off"])
def test_an_object_that_is_no_socket_is_a_type_error_with_a_remedy(
    bad: Any, message: str, enable: bool
) -> None:
    with pytest.raises(TypeError, match=message):
        set_nat_t_endpoint(bad, enable)
    assert get_nat_t_endpoint(bad) is None


@pytest.mark.parametrize(
    ("bad", "number", "message"), WRONG_SOCKETS.values(), ids=WRONG_SOCKETS.keys(), indirect=["bad"]
)
@pytest.mark.parametrize("enable", [True, False], ids=["on", "off"])
def test_an_unsuitable_socket_is_refused_with_the_errno_of_solaris(
    bad: socket.socket, number: int, message: str, enable: bool
) -> None:
    before = type(bad)
    with pytest.raises(NatCompatError, match=message) as caught:
        set_nat_t_endpoint(bad, enable)
    assert caught.value.errno == number
    assert type(bad) is before
    assert get_nat_t_endpoint(bad) is None


class Elusive(type):
    """A metaclass whose every attribute raises."""

    def __getattr__(cls, name: str) -> Any:
        raise AttributeError(name)


class Answering:
    """An object with attributes of every name."""

    def __getattr__(self, name: str) -> str:
        return name


class Alike:
    """A class with another use of the attribute `_nat_t`."""

    _nat_t = "something else"


@pytest.mark.parametrize(
    "odd",
    [
        None,
        7,
        "text",
        object(),
        socket,
        socket.socket,
        Imposter(),
        Answering(),
        Alike(),
        Elusive("E", (), {})(),
    ],
    ids=lambda odd: type(odd).__name__,
)
def test_get_nat_t_endpoint_never_raises(odd: Any) -> None:
    assert get_nat_t_endpoint(odd) is None


@pytest.fixture
def sock(family: socket.AddressFamily) -> Iterator[socket.socket]:
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        yield sock


def test_clearing_the_option_on_a_plain_socket_is_no_error(sock: socket.socket) -> None:
    assert set_nat_t_endpoint(sock, False) is None
    assert set_nat_t_endpoint(sock, enable=False) is None
    assert type(sock) is socket.socket


def options(sock: socket.socket) -> list[int]:
    wanted = [(socket.SOL_SOCKET, socket.SO_REUSEPORT)]
    if sys.platform == "linux":
        wanted += [(socket.IPPROTO_UDP, option) for option in (1, 100, 103, 104)]
    return [sock.getsockopt(*option) for option in wanted]


def test_an_unknown_backend_is_refused_with_a_list_of_the_backends(sock: socket.socket) -> None:
    before = options(sock)
    with pytest.raises(BackendUnavailableError, match="there is no backend called 'nonesuch'") as caught:
        set_nat_t_endpoint(sock, backend="nonesuch")
    assert caught.value.errno == errno.EINVAL
    for name in filter(backends.is_for_this_system, backends.names()):
        assert name in caught.value.remedy
    assert type(sock) is socket.socket
    assert options(sock) == before


def test_an_unknown_backend_in_the_environment_is_refused(
    sock: socket.socket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NATCOMPAT_BACKEND", "nonesuch")
    with pytest.raises(BackendUnavailableError, match="nonesuch"):
        set_nat_t_endpoint(sock)
    assert type(sock) is socket.socket


@LINUX
@pytest.mark.parametrize("bound", [False, True], ids=["unbound", "bound"])
def test_a_consumer_is_refused_where_the_kernel_takes_esp(
    sock: socket.socket, loopback: tuple[str, int], bound: bool
) -> None:
    if bound:
        sock.bind(loopback)
    before = options(sock)
    with pytest.raises(BackendUnavailableError, match="ESP goes to the kernel") as caught:
        set_nat_t_endpoint(sock, backend=Kind("linux", "linux").take(), esp=print)
    assert caught.value.errno == errno.ENOTSUP
    assert type(sock) is socket.socket
    assert options(sock) == before


@pytest.mark.parametrize("esp", [7, "text", object(), b""], ids=lambda esp: type(esp).__name__)
def test_a_consumer_must_be_callable_or_have_inbound(sock: socket.socket, esp: Any) -> None:
    with pytest.raises(TypeError, match=r"callable or an object with inbound\(\), not"):
        set_nat_t_endpoint(sock, esp=esp)
    assert type(sock) is socket.socket


def test_a_refused_change_leaves_the_endpoint_as_it_was(
    sock: socket.socket, loopback: tuple[str, int], kind: Kind
) -> None:
    sock.bind(loopback)
    sock.settimeout(5)
    endpoint = set_nat_t_endpoint(sock, backend=kind.take())
    before = type(sock), endpoint.mode, endpoint.duties, options(sock)
    with pytest.raises(BackendUnavailableError, match="nonesuch"):
        set_nat_t_endpoint(sock, backend="nonesuch")
    with pytest.raises(TypeError, match="callable"):
        set_nat_t_endpoint(sock, esp=7)  # type: ignore[call-overload]
    assert (type(sock), endpoint.mode, endpoint.duties, options(sock)) == before
    sock.sendto(b"message", sock.getsockname())
    assert sock.recv(100) == b"message"
