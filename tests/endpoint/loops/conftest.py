"""Event loops and sockets for the tests of this folder."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from tests.support.loops import Main, NewSocket, Run

ASYNCIO = ["asyncio", "uvloop", "model of the Proactor"]


@pytest.fixture(params=ASYNCIO)
def run(request: pytest.FixtureRequest) -> Iterator[Run]:
    """Run a coroutine function on each asyncio loop; an error that the loop reports fails the test."""
    from tests.support.loops import LOOPS

    reported: list[dict[str, Any]] = []
    before = threading.enumerate()

    def run_on_loop(main: Main) -> None:
        with asyncio.Runner(loop_factory=LOOPS[request.param]) as runner:
            runner.get_loop().set_exception_handler(lambda _, context: reported.append(context))
            runner.run(main())

    yield run_on_loop
    assert reported == []
    left = set(threading.enumerate()).difference(before)
    assert [thread for thread in left if thread.name == "natcompat-readiness"] == []


@pytest.fixture(params=[*ASYNCIO, "trio"])
def run_anywhere(request: pytest.FixtureRequest) -> Run:
    """Run a coroutine function on each asyncio loop, and on trio."""
    if request.param == "trio":
        import trio

        return trio.run
    from tests.support.loops import LOOPS, run_on

    return lambda main: run_on(LOOPS[request.param], main)


@pytest.fixture(params=["userspace", "userspace:in-line"])
def backend(request: pytest.FixtureRequest) -> str:
    """A backend that steers ESP or filters, and one that classifies in the process."""
    name: str = request.param
    return name


@pytest.fixture
def new_socket() -> Iterator[NewSocket]:
    """Make UDP sockets on loopback, with a timeout of 10 s; closed at the end of the test."""
    from tests.support.loops import PATIENCE

    opened: list[socket.socket] = []

    def make(family: int = socket.AF_INET, cls: type[socket.socket] = socket.socket) -> socket.socket:
        sock = cls(family, socket.SOCK_DGRAM)
        opened.append(sock)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        sock.bind(("::1" if family == socket.AF_INET6 else "127.0.0.1", 0))
        sock.settimeout(PATIENCE)
        return sock

    yield make
    for sock in opened:
        sock.close()
