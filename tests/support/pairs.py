"""An endpoint and a plain socket that talk to each other, for every way in which one is served."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest

from natcompat import NatTEndpoint, Viability, backends, set_nat_t_endpoint
from natcompat.backends.base import Backend
from natcompat.backends.linux import LinuxBackend

MARKER = bytes(4)
ESP = b"\xc0\xde\x00\x01" + bytes(range(60))
NOISE = (b"\xff", ESP, b"", b"\0\0\0", b"\1\2\3\4", ESP * 20)
"""Datagrams that never reach an application, of every kind."""
PEEK, TRUNC = socket.MSG_PEEK, getattr(socket, "MSG_TRUNC", 0)
DONTWAIT = getattr(socket, "MSG_DONTWAIT", 0)
MESSAGE = bytes(range(1, 21))
LINUX = pytest.mark.skipif(sys.platform != "linux", reason="flags and options of Linux")

Operation = Callable[[socket.socket], Any]

RECEIVES: dict[str, Operation] = {
    "recv": lambda sock: sock.recv(100),
    "recvfrom": lambda sock: sock.recvfrom(100)[0],
    "recv_into": lambda sock: sock.recv_into(bytearray(100)),
    "recvfrom_into": lambda sock: sock.recvfrom_into(bytearray(100))[0],
    "recvmsg": lambda sock: sock.recvmsg(100)[0],
    "recvmsg_into": lambda sock: sock.recvmsg_into([bytearray(100)])[0],
    "recv-peek": lambda sock: sock.recv(100, PEEK),
    "recv-dontwait": lambda sock: sock.recv(100, DONTWAIT),  # a timeout outranks it, as on a plain socket
}
each_receive = pytest.mark.parametrize("receive", RECEIVES.values(), ids=RECEIVES.keys())


class LinuxSocketsOnly(LinuxBackend):
    """The backend where this kernel may have no ESP: its socket half alone is under test."""

    def viability(self) -> Viability:
        return Viability(self.name, True, reason="its socket half alone is under test")


@dataclass(frozen=True)
class Kind:
    """One way of serving a socket."""

    name: str
    backend: str
    consumes: bool = False
    exact: bool = True
    """Whether the kernel delivers IKE alone."""

    def take(self) -> Backend:
        """Return the backend."""
        return LinuxSocketsOnly() if self.backend == "linux" else backends.get(self.backend)


KINDS = (
    Kind("in-line", "userspace:in-line", exact=False),
    Kind("in-line-with-consumer", "userspace:in-line", consumes=True, exact=False),
) + (
    (
        Kind("filter", "userspace"),
        Kind("steering", "userspace", consumes=True),
        Kind("linux", "linux"),
    )
    if sys.platform == "linux"
    else ()
)
EXACT = [kind for kind in KINDS if kind.exact]
IN_LINE = [kind for kind in KINDS if not kind.exact]


def of_kinds(kinds: list[Kind]) -> pytest.MarkDecorator:
    """Run a test with `kinds` alone."""
    return pytest.mark.parametrize("kind", kinds, ids=lambda kind: kind.name)


@dataclass
class Pair:
    """`app` is the application's socket with the option, `peer` a plain one: the wire."""

    kind: Kind
    family: int
    stack: contextlib.ExitStack
    esp: list[bytes] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.host = "::1" if self.family == socket.AF_INET6 else "127.0.0.1"
        self.peer = self.plain()
        self.app = self.plain()
        self.endpoint = self.switch_on(self.app)
        self.address = self.app.getsockname()

    def plain(self, cls: type[socket.socket] = socket.socket, *, bound: bool = True) -> socket.socket:
        """Return one more socket without the option, with a timeout; closed at the end."""
        sock = self.stack.enter_context(cls(self.family, socket.SOCK_DGRAM))
        sock.settimeout(10)
        if bound:
            sock.bind((self.host, 0))
        return sock

    def switch_on(self, sock: socket.socket) -> NatTEndpoint:
        """Set the option on `sock` in the way under test."""
        return set_nat_t_endpoint(
            sock, backend=self.kind.take(), esp=self.take_esp if self.kind.consumes else None
        )

    def take_esp(self, packet: memoryview, source: Any) -> None:
        """Take diverted ESP: a consumer."""
        assert source[:2] == self.peer.getsockname()[:2]
        self.esp.append(bytes(packet))

    def noise(self, times: int = 1) -> None:
        """Send everything that never reaches an application."""
        for payload in NOISE * times:
            self.peer.sendto(payload, self.address)

    def ike(self, message: bytes) -> None:
        """Send an IKE message as it is on the wire."""
        self.peer.sendto(MARKER + message, self.address)

    def expect_esp(self, packets: list[bytes]) -> None:
        """Wait until the consumer, if there is one, has `packets`."""
        if self.kind.consumes:
            until(lambda: len(self.esp) >= len(packets))
            assert self.esp == packets


def until(condition: Callable[[], object], seconds: float = 10) -> None:
    """Wait until `condition`, which another thread or process makes true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.001)


def ready(sock: socket.socket, seconds: float = 0) -> bool:
    """Tell whether select() would wake for `sock`."""
    return bool(select.select([sock], [], [], seconds)[0])


def outcome(operation: Callable[[], Any]) -> Any:
    """Return the result of `operation`, or the class and errno of its exception."""
    try:
        return operation()
    except Exception as error:
        # a class of natcompat's stands for the class that it derives from
        cls = OSError if isinstance(error, OSError) and not isinstance(error, TimeoutError) else type(error)
        return cls, getattr(error, "errno", None)


@contextlib.contextmanager
def flood(pair: Pair) -> Iterator[None]:
    """Send noise without a pause meanwhile."""
    stop = threading.Event()

    def send() -> None:
        with socket.socket(pair.family, socket.SOCK_DGRAM) as sock:
            sock.bind((pair.host, 0))
            while not stop.is_set():
                for payload in NOISE:
                    sock.sendto(payload, pair.address)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def in_thread(function: Callable[[], Any]) -> Callable[[], Any]:
    """Run `function` in a thread; return a function that waits and returns or raises its result."""
    results: list[Any] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def wait() -> Any:
        thread.join(20)
        assert not thread.is_alive(), "the thread hangs"
        if errors:
            raise errors[0]
        return results[0]

    wait.thread = thread  # type: ignore[attr-defined]
    return wait


def sleeping(wait: Callable[[], Any]) -> bool:
    """Tell whether the thread behind `wait` sleeps in the kernel (Linux)."""
    native = wait.thread.native_id  # type: ignore[attr-defined]
    with open(f"/proc/self/task/{native}/stat") as stat:
        return stat.read().rpartition(")")[2].split()[0] == "S"


def eagain() -> tuple[type[OSError], int]:
    """Return the outcome of a receive that found nothing."""
    return OSError, errno.EAGAIN
