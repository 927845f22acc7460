"""Endpoints in forked and spawned processes."""

from __future__ import annotations

import copy
import errno
import multiprocessing
import os
import pickle
import socket
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import pytest

from natcompat import NatCompatError, NatTEndpoint, get_nat_t_endpoint, open_ipsec, set_nat_t_endpoint
from natcompat.esp.device.queue import QueueDevice
from natcompat.esp.engine.results import Reason
from tests.support.pairs import ESP, KINDS, MARKER, Kind, Pair, of_kinds, ready, until

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
Result = TypeVar("Result")

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


# --- daemons -----------------------------------------------------------------------------------------


def daemonize(open_all: Callable[[], Result], go_on: Callable[[Result], object]) -> None:
    """Call `open_all` in a process that then forks twice and ends, and `go_on` in what is left."""
    reader, writer = os.pipe()
    opener = os.fork()
    if not opener:
        report = "nothing was called"
        try:
            opened = open_all()
            opener = os.getpid()
            if os.fork():
                os._exit(0)
            os.setsid()
            middle = os.getpid()
            if os.fork():
                os._exit(0)
            until(lambda: not lives(opener) and os.getppid() != middle)  # each has the sockets until its end
            go_on(opened)
            report = "done"
        except BaseException:
            report = traceback.format_exc()
        os.write(writer, report.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(opener, 0)
    with open(reader) as pipe:
        assert pipe.read() == "done"


def lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def endpoint_with(**options: Any) -> tuple[NatTEndpoint, socket.socket, socket.socket]:
    """Return an endpoint, its socket and a peer."""
    app, peer = (socket.socket(type=socket.SOCK_DGRAM) for _ in range(2))
    for sock in (app, peer):
        sock.bind(("127.0.0.1", 0))
        sock.settimeout(10)
    return set_nat_t_endpoint(app, **options), app, peer


@FORKS
@pytest.mark.parametrize("blocking", [True, False], ids=["a receive", "a send"])
@pytest.mark.parametrize("backend", ["userspace", "userspace:in-line"])
def test_a_daemon_takes_over_the_consumer_of_the_application(backend: str, blocking: bool) -> None:
    packets: list[bytes] = []

    def open_all() -> tuple[socket.socket, socket.socket]:
        return endpoint_with(backend=backend, esp=lambda packet, _: packets.append(bytes(packet)))[1:]

    def go_on(opened: tuple[socket.socket, socket.socket]) -> None:
        app, peer = opened
        peer.sendto(ESP, app.getsockname())
        if blocking:
            peer.sendto(MARKER + b"IKE", app.getsockname())
            assert app.recv(100) == b"IKE"
        else:
            app.sendto(b"IKE", peer.getsockname())
            assert peer.recv(100) == MARKER + b"IKE"
            peer.sendto(MARKER + b"IKE", app.getsockname())
            assert app.recv(100) == b"IKE"
        until(lambda: packets == [ESP])

    daemonize(open_all, go_on)


@FORKS
@pytest.mark.parametrize("backend", ["userspace", "userspace:in-line"])
def test_a_daemon_is_told_at_once_that_ipsec_has_ended(backend: str) -> None:
    """Until it opens IPsec again, which takes the endpoint over."""

    def open_all() -> Any:
        ipsec = open_ipsec("userspace", device=QueueDevice())
        return ipsec, endpoint_with(backend=backend)

    def go_on(opened: Any) -> None:
        ipsec, (endpoint, app, peer) = opened
        peer.sendto(MARKER + b"IKE", app.getsockname())
        operations: list[Callable[[], object]] = [
            lambda: app.recv(100),
            lambda: app.recvfrom(100),
            lambda: app.recvmsg(100),
            lambda: app.sendto(b"IKE", peer.getsockname()),
            lambda: app.sendmsg([b"IKE"], [], 0, peer.getsockname()),
            lambda: endpoint.receive(),
            endpoint.stats,
            lambda: endpoint.send(b"IKE", peer.getsockname()),
            lambda: endpoint.send_keepalive(peer.getsockname()),
            lambda: set_nat_t_endpoint(app),
        ]
        for operation in operations:
            with pytest.raises(NatCompatError, match="has ended with it") as caught:
                operation()
            assert caught.value.errno == errno.EINVAL
            assert caught.value.remedy.startswith("Daemonize before open_ipsec()")
        with pytest.raises(NatCompatError):
            ipsec.flush_sas()
        with open_ipsec("userspace", device=QueueDevice()) as again:
            assert app.recv(100) == b"IKE"
            app.sendto(b"IKE", peer.getsockname())
            assert peer.recv(100) == MARKER + b"IKE"
            peer.sendto(ESP, app.getsockname())
            peer.sendto(MARKER + b"IKE", app.getsockname())
            assert app.recv(100) == b"IKE"
            until(lambda: again.counters().get(Reason.NO_SA) == 1)
            assert set_nat_t_endpoint(app) is endpoint

    daemonize(open_all, go_on)


@FORKS
def test_a_daemon_may_clear_the_option_instead() -> None:
    def open_all() -> Any:
        return open_ipsec("userspace", device=QueueDevice()), endpoint_with(backend="userspace")

    def go_on(opened: Any) -> None:
        _, (endpoint, app, peer) = opened
        endpoint.close()
        peer.sendto(MARKER + b"raw", app.getsockname())
        assert app.recv(100) == MARKER + b"raw"
        assert set_nat_t_endpoint(app, esp=lambda *_: None).mode != "off"
        app.sendto(b"IKE", peer.getsockname())
        assert peer.recv(100) == MARKER + b"IKE"

    daemonize(open_all, go_on)


@FORKS
@of_kinds([kind for kind in KINDS if not kind.consumes])
def test_a_daemon_without_a_consumer_of_esp_is_served(kind: Kind) -> None:
    def go_on(opened: tuple[NatTEndpoint, socket.socket, socket.socket]) -> None:
        endpoint, app, peer = opened
        peer.sendto(MARKER + b"IKE", app.getsockname())
        assert app.recvfrom(100) == (b"IKE", peer.getsockname())
        app.sendto(b"IKE", peer.getsockname())
        assert peer.recv(100) == MARKER + b"IKE"
        assert set_nat_t_endpoint(app) is endpoint

    daemonize(lambda: endpoint_with(backend=kind.take()), go_on)


@FORKS
def test_a_worker_is_served_while_its_parent_runs_ipsec() -> None:
    with open_ipsec("userspace", device=QueueDevice()) as ipsec:
        endpoint, app, peer = endpoint_with(backend="userspace")
        with app, peer:
            peer.sendto(MARKER + b"IKE", app.getsockname())
            pid = os.fork()
            if not pid:
                answer(app, 1)
                os._exit(0)
            assert peer.recv(100) == MARKER + b"child: IKE"
            assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
            peer.sendto(ESP, app.getsockname())
            until(lambda: ipsec.counters().get(Reason.NO_SA) == 1)
            assert endpoint.mode == "steering"
