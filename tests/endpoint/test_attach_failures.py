"""A failed attach leaves the socket as it was; each step of each backend fails once.

The test injects the faults in place of the kernel: one of the real system calls raises, the
others run. What is compared is all that can be seen of the socket and of the process afterwards.
"""

from __future__ import annotations

import errno
import socket
import threading
from collections.abc import Callable
from typing import Any

import pytest

from natcompat import get_nat_t_endpoint, set_nat_t_endpoint
from natcompat.backends.base import Viability
from natcompat.backends.diversion import Diversion
from natcompat.backends.linux import LinuxBackend
from natcompat.backends.linux_sockets import features, options, steering
from natcompat.backends.linux_sockets import filters as bpf
from natcompat.backends.userspace import InLineAttachment, UserspaceBackend
from natcompat.contract import Duty, Performer
from natcompat.endpoint import switch
from tests.support.linux import (
    ESP,
    KEEPALIVE,
    LINUX,
    Collector,
    at,
    check_demultiplexing,
    ike,
    nothing_left,
    queued,
    send_ike,
    state,
    udp,
)

pytestmark = LINUX

GRO = socket.IPPROTO_UDP, options.UDP_GRO
ENCAP = socket.IPPROTO_UDP, options.UDP_ENCAP
REUSEPORT = socket.SOL_SOCKET, socket.SO_REUSEPORT


class Fault(OSError):
    """The error that the test injects."""

    def __init__(self) -> None:
        super().__init__(errno.ENOMEM, "injected by the test")


class Interruption(BaseException):
    """A KeyboardInterrupt between two steps."""


class Faulty:
    """Counts the system calls of attaching, and lets the one at `position` fail."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.position = -1
        self.calls: list[str] = []
        self.fault: BaseException = Fault()
        for owner, name in (
            (socket.socket, "setsockopt"),
            (socket.socket, "bind"),
            (bpf, "_attach"),
            (threading.Thread, "start"),
            (socket, "socketpair"),
            (switch, "make_class"),
        ):
            self._wrap(monkeypatch, owner, name)

    def _wrap(self, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
        plain = getattr(owner, name)

        def call(*arguments: Any, **keywords: Any) -> Any:
            if self.position >= 0:
                self.calls.append(f"{name} {[value for value in arguments[1:] if isinstance(value, int)]}")
                if len(self.calls) == self.position + 1:
                    self.position = -1  # once: the undoing must run
                    raise self.fault
            return plain(*arguments, **keywords)

        monkeypatch.setattr(owner, name, call)


def make_app(with_gro: bool) -> socket.socket:
    sock = udp()
    if with_gro:
        sock.setsockopt(*GRO, 1)
    return sock


BACKENDS: list[Any] = [
    pytest.param(lambda: UserspaceBackend(), Collector(coalesce=True), id="steering"),
    pytest.param(lambda: UserspaceBackend(), None, id="filter"),
    pytest.param(lambda: Always(LinuxBackend()), None, id="linux"),
]


@pytest.mark.parametrize("fault", [Fault(), Interruption()], ids=["error", "interruption"])
@pytest.mark.parametrize("with_gro", [False, True], ids=["no GRO", "GRO of the application's"])
@pytest.mark.parametrize(("make_backend", "consumer"), BACKENDS)
def test_a_failure_of_each_step_of_attaching_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch,
    make_backend: Callable[[], Any],
    consumer: Collector | None,
    with_gro: bool,
    fault: BaseException,
) -> None:
    """The call raises and changes nothing, or the endpoint is served in a weaker mode with a reason."""
    assert features.steering_refused() == features.filter_refused() == ""  # the proofs are done now
    with make_app(with_gro) as sock:
        endpoint = set_nat_t_endpoint(sock, backend=make_backend(), esp=consumer)
        strongest = endpoint.mode
        endpoint.close()
    faulty = Faulty(monkeypatch)
    faulty.fault = fault
    position, outcomes = 0, []
    while True:
        with nothing_left(), make_app(with_gro) as sock, udp() as peer:
            before = state(sock)
            faulty.position, faulty.calls = position, []
            try:
                endpoint = set_nat_t_endpoint(sock, backend=make_backend(), esp=consumer)
            except (OSError, Interruption) as error:
                faulty.position = -1
                raised = [error, error.__cause__]
                assert fault in raised
                assert state(sock) == before
                assert get_nat_t_endpoint(sock) is None
                for payload in (ESP, KEEPALIVE):
                    peer.sendto(payload, at(sock))
                assert queued(sock) == [ESP, KEEPALIVE]
                outcomes.append("raised")
            else:
                if faulty.position >= 0:  # every step has failed once
                    faulty.position = -1
                    break
                assert isinstance(fault, OSError)
                if endpoint.mode != strongest:
                    assert "injected by the test" in endpoint.reason
                    outcomes.append(endpoint.mode)
                for payload in (KEEPALIVE, ESP):
                    peer.sendto(payload, at(sock))
                send_ike(peer, at(sock), 1)
                assert sock.recv(64) == ike(1)
                endpoint.close()
                assert state(sock) == before
        position += 1
    assert position >= 3, faulty.calls
    assert outcomes


def test_the_failing_steps_cover_all_steps_of_attaching(monkeypatch: pytest.MonkeyPatch) -> None:
    """A new step of attaching fails this test until it is among those that fail."""
    features.steering_refused()
    features.filter_refused()
    faulty = Faulty(monkeypatch)
    with udp() as sock:
        faulty.position = 1000
        set_nat_t_endpoint(sock, backend="userspace", esp=Collector(coalesce=True)).close()
        faulty.position = -1
    names = [call.split()[0] for call in faulty.calls]
    assert names[0] == "make_class"
    assert {"setsockopt", "bind", "_attach", "start", "socketpair"} <= set(names)
    assert names.count("_attach") == 2  # the program and the filter


def test_a_failed_attach_hands_back_ike_that_the_engine_has_received(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Between the join and the program, which is refused here, the kernel distributes by hash."""
    features.steering_refused()
    count = 40
    with udp() as sock:
        peers = [udp() for _ in range(count)]

        def refused(joined: socket.socket, engines: int) -> None:
            for number, peer in enumerate(peers):
                send_ike(peer, at(sock), number)
            raise Fault

        monkeypatch.setattr(bpf, "attach_steering", refused)
        endpoint = set_nat_t_endpoint(sock, backend="userspace", esp=Collector())
        assert endpoint.mode == "in line"
        received = dict(sock.recvfrom(64) for _ in range(count))
        assert received == {ike(number): peer.getsockname() for number, peer in enumerate(peers)}
        assert endpoint.stats().handed_back > 0
        for peer in peers:
            peer.close()


# --- detaching and attaching again ----------------------------------------------------------------


def test_a_failed_socket_operation_leaves_the_endpoint_steering() -> None:
    consumer = Collector()
    with udp() as sock, udp() as peer:
        endpoint = set_nat_t_endpoint(sock, backend="userspace", esp=consumer)
        failing: list[Callable[[], object]] = [
            lambda: sock.bind(peer.getsockname()),
            lambda: sock.connect(("no address", 1)),
            lambda: sock.setsockopt(socket.SOL_SOCKET, options.SO_BINDTODEVICE, b"no such device"),
            lambda: sock.setsockopt(*ENCAP, 250),
        ]
        for operation in failing:
            with pytest.raises(OSError, match=r"\["):
                operation()
            assert endpoint.mode == "steering"
            check_demultiplexing(sock, consumer, peer, at(sock))


@pytest.mark.parametrize("backend", ["userspace", "linux"])
def test_an_endpoint_that_cannot_attach_again_is_served_in_line(
    monkeypatch: pytest.MonkeyPatch, backend: str, caplog: pytest.LogCaptureFixture
) -> None:
    """The application's operation has succeeded by then, so it does not see the error."""
    made = UserspaceBackend() if backend == "userspace" else LinuxBackend()
    with udp() as sock, udp() as peer:
        before = state(sock)
        endpoint = set_nat_t_endpoint(sock, backend=Always(made))
        monkeypatch.setattr(features, "switch_gro_off", raising)
        sock.setsockopt(*ENCAP, 0)
        monkeypatch.undo()
        assert endpoint.mode == "in line"
        assert "attaching again failed" in endpoint.reason
        assert endpoint.stats().errors == 1
        for payload in (KEEPALIVE, ESP):
            peer.sendto(payload, at(sock))
        send_ike(peer, at(sock), 1)
        assert sock.recv(64) == ike(1)
        assert (endpoint.stats().keepalives, endpoint.stats().esp) == (1, 1)
        endpoint.close()
        assert state(sock) == before


def raising(*_: Any) -> Any:
    raise Fault


class Always:
    """A second backend that calls itself viable, since this kernel may have no ESP."""

    hands_over_esp = True

    def __init__(self, backend: Any) -> None:
        self.name = f"always {backend.name}"
        self._backend = backend

    def viability(self) -> Viability:
        return Viability(self.name, True)

    def attach(self, sock: socket.socket, diversion: Diversion) -> Any:
        return self._backend.attach(sock, diversion)


def test_a_failed_change_of_backend_restores_the_former_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    consumer = Collector()

    class Refusing(Always):
        def attach(self, sock: socket.socket, diversion: Diversion) -> Any:
            raise Fault

    with udp() as sock, udp() as peer:
        endpoint = set_nat_t_endpoint(sock, backend="userspace", esp=consumer)
        with pytest.raises(Fault):
            set_nat_t_endpoint(sock, backend=Refusing(UserspaceBackend()), esp=Collector())
        assert (endpoint.backend, endpoint.mode) == ("userspace", "steering")
        check_demultiplexing(sock, consumer, peer, at(sock))


def test_a_backend_without_an_entry_for_a_duty_is_detached_again() -> None:
    detached: list[socket.socket] = []

    class Forgetful(InLineAttachment):
        def __init__(self) -> None:
            super().__init__("")
            self.duties = {Duty.STRIP_MARKER: Performer.PROCESS}

        def detach(self, sock: socket.socket) -> None:
            detached.append(sock)

    class Broken(Always):
        def attach(self, sock: socket.socket, diversion: Diversion) -> Any:
            return Forgetful()

    with udp() as sock:
        before = state(sock)
        with pytest.raises(KeyError):
            set_nat_t_endpoint(sock, backend=Broken(UserspaceBackend()))
        assert state(sock) == before
        assert len(detached) == 1


@pytest.mark.parametrize(
    ("step", "left"),
    [
        ("program", {"program"}),
        ("SO_REUSEPORT", {"SO_REUSEPORT"}),
        ("filter", {"filter"}),
        ("GRO", {"UDP_GRO"}),
        ("receive", set()),
    ],
)
def test_a_failed_step_of_detaching_does_not_stop_the_others(
    monkeypatch: pytest.MonkeyPatch, step: str, left: set[str]
) -> None:
    """The error is raised, the option is off, and only what the failed step would have removed is left."""
    with nothing_left(), udp() as sock:
        sock.setsockopt(*GRO, 1)
        before = state(sock)
        endpoint = set_nat_t_endpoint(sock, backend="userspace", esp=Collector())
        plain = socket.socket.setsockopt

        def setsockopt(of: socket.socket, level: int, option: int, *value: Any) -> None:
            if step == "SO_REUSEPORT" and (level, option) == REUSEPORT:
                raise Fault
            plain(of, level, option, *value)

        monkeypatch.setattr(socket.socket, "setsockopt", setsockopt)
        match step:
            case "program":
                monkeypatch.setattr(steering, "_detach_program", raising)
            case "filter":
                monkeypatch.setattr(bpf, "detach_filter", raising)
            case "GRO":
                monkeypatch.setattr(features, "restore_gro", raising)
            case "receive":
                monkeypatch.setattr(steering.Steering, "_receive", raising)
        with pytest.raises(Fault):
            endpoint.close()
        monkeypatch.undo()
        assert endpoint.closed
        after = state(sock)
        assert {key for key in after if after[key] != before[key]} == left


def test_a_proof_that_failed_for_want_of_memory_is_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A lack of descriptors says nothing about the kernel."""
    for proof in (features._filter_proof, features._steering_proof):
        proof.cache_clear()
    plain = socket.socket.__init__

    def exhausted(sock: socket.socket, *arguments: Any, **keywords: Any) -> None:
        plain(sock, *arguments, **keywords)
        sock.close()
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as context:
        context.setattr(socket.socket, "__init__", exhausted)
        assert "Too many open files" in features.filter_refused()
        assert "Too many open files" in features.steering_refused()
    assert features.filter_refused() == features.steering_refused() == ""


def test_a_filter_without_effect_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """gVisor and others accept options and ignore them."""
    monkeypatch.setattr(bpf, "_attach", lambda *_: None)
    assert features._filter_proof.__wrapped__() == "it was accepted and has no effect"
    # without a program the socket of the group that gets the datagram of the proof is random
    assert features._steering_proof.__wrapped__().startswith("it was accepted")


def test_a_proof_whose_datagram_does_not_arrive_gives_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bpf, "IKE_ONLY", ((0x06, 0, 0, 0),))
    assert features._filter_proof.__wrapped__().endswith("did not arrive")
