"""What each backend says of itself: viable or not, duties, reasons, remedies."""

from __future__ import annotations

import errno
import os
import socket
import sys
from typing import Any

import pytest

from natcompat import backends, set_nat_t_endpoint
from natcompat.backends.base import Viability
from natcompat.backends.linux import LinuxBackend
from natcompat.backends.linux_sockets import features
from natcompat.backends.linux_sockets import filters as bpf
from natcompat.backends.userspace import UserspaceBackend
from natcompat.contract import Duty, Performer
from natcompat.kernel.xfrm import probe as xfrm
from natcompat.kernel.xfrm.esp_support import EspProbe, EspSupport
from tests.support.linux import (
    ESP,
    LINUX,
    Collector,
    at,
    check_demultiplexing,
    ike,
    isolated,
    readable,
    send_ike,
    state,
    udp,
)
from tests.support.pairs import LinuxSocketsOnly

ENV = backends.ENVIRONMENT_VARIABLE
PROCESS = dict.fromkeys(Duty, Performer.PROCESS)


@pytest.fixture(autouse=True)
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment of the run asks for."""
    monkeypatch.delenv(ENV, raising=False)


def test_userspace_is_viable_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "openbsd7")
    found = UserspaceBackend().viability()
    assert (found.viable, dict(found.duties)) == (True, PROCESS)
    assert "in line" in found.reason


def test_userspace_is_in_line_where_there_is_no_steering(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "openbsd7")
    with udp() as sock, udp() as peer:
        endpoint = set_nat_t_endpoint(sock, backend=UserspaceBackend(), esp=(consumer := Collector()))
        assert (endpoint.mode, endpoint.reason) == ("in line", "only Linux has steering")
        assert endpoint.stats().dropped_in_kernel is None
        for payload in (b"", ESP):
            peer.sendto(payload, at(sock))
        send_ike(peer, at(sock), 1)
        assert sock.recv(64) == ike(1)
        assert [packet for packet, _ in consumer.packets] == [ESP]


@LINUX
def test_userspace_steers_here() -> None:
    found = backends.viability("userspace")
    assert found.duties[Duty.DIVERT_ESP] is found.duties[Duty.DROP_RUNTS] is Performer.STEERING
    assert (found.viable, found.remedy) == (True, "")


BOTH = (bpf.SO_ATTACH_FILTER, bpf.SO_ATTACH_REUSEPORT_CBPF)
IN_LINE = (Performer.PROCESS, Performer.PROCESS)


@LINUX
@pytest.mark.parametrize(
    ("refused", "duties", "said"),
    [
        pytest.param(BOTH, IN_LINE, ["refuses socket filters", "refuses SO_REUSEPORT programs"], id="both"),
        pytest.param(
            BOTH[1:],
            (Performer.FILTER, Performer.PROCESS),
            ["refuses SO_REUSEPORT programs"],
            id="steering",
        ),
        pytest.param(
            BOTH[:1], (Performer.STEERING, Performer.STEERING), ["refuses socket filters"], id="filter"
        ),
    ],
)
def test_under_a_sandbox_the_next_weaker_way_is_taken_and_named(
    refused: tuple[int, ...], duties: tuple[Performer, Performer], said: list[str]
) -> None:
    {BOTH: sandbox_of_both, BOTH[1:]: sandbox_of_steering, BOTH[:1]: sandbox_of_filters}[refused](
        duties, said
    )


def in_sandbox(duties: tuple[Performer, Performer], said: list[str]) -> None:
    found = backends.viability("userspace")
    assert found.viable
    assert (found.duties[Duty.DROP_RUNTS], found.duties[Duty.DIVERT_ESP]) == duties
    for words in said:
        assert words in found.reason
    assert "SO_ATTACH_REUSEPORT_CBPF" in found.remedy
    consumer = Collector()
    with udp() as sock, udp() as peer:
        before = state(sock)
        endpoint = set_nat_t_endpoint(sock, backend="userspace", esp=consumer)
        steered = duties[1] is Performer.STEERING
        assert endpoint.mode == ("steering" if steered else "in line")
        assert (endpoint.duties[Duty.DROP_RUNTS], endpoint.duties[Duty.DIVERT_ESP]) == duties
        assert steered or said[-1] in endpoint.reason
        if steered:
            check_demultiplexing(sock, consumer, peer, at(sock))
        else:
            peer.sendto(b"\xff", at(sock))
            assert readable(sock) == (duties[0] is Performer.PROCESS)
            peer.sendto(ESP, at(sock))
            send_ike(peer, at(sock), 1)
            assert sock.recv(64) == ike(1)
            assert [packet for packet, _ in consumer.packets] == [ESP]
        endpoint.close()
        assert state(sock) == before
        if features.filter_refused():  # UDP_ENCAP needs no filter, but the duties change
            attachment = LinuxBackend().attach(sock, endpoint._state.diversion)
            assert attachment.mode == "in line"
            assert attachment.duties[Duty.DROP_RUNTS] is Performer.PROCESS
            assert "refuses socket filters" in attachment.reason
            attachment.detach(sock)
            assert state(sock) == before
            assert "No filter: the kernel or a sandbox refuses" in backends.viability("linux").reason


@isolated(refused=BOTH)
def sandbox_of_both(duties: tuple[Performer, Performer], said: list[str]) -> None:
    in_sandbox(duties, said)


@isolated(refused=BOTH[1:])
def sandbox_of_steering(duties: tuple[Performer, Performer], said: list[str]) -> None:
    in_sandbox(duties, said)


@isolated(refused=BOTH[:1])
def sandbox_of_filters(duties: tuple[Performer, Performer], said: list[str]) -> None:
    in_sandbox(duties, said)


@LINUX
class TestLinuxByTheDryRun:
    """What `linux` says follows what XFRM answers to the dry run; models of other kernels' answers."""

    def answer(
        self, monkeypatch: pytest.MonkeyPatch, privileged: EspSupport, unprivileged: EspSupport
    ) -> Viability:
        def support(kind: EspSupport) -> EspProbe:
            return EspProbe(support=kind, reason=f"found {kind.name}.", remedy=f"remedy of {kind.name}.")

        monkeypatch.setattr(xfrm, "probe_esp", lambda: support(privileged))
        monkeypatch.setattr(xfrm, "probe_esp_unprivileged", lambda: support(unprivileged))
        return backends.viability("linux")

    @pytest.mark.parametrize(
        ("privileged", "unprivileged", "viable", "automatic"),
        [
            ("AVAILABLE", "NO_ESP", True, True),
            ("NO_ESP", "AVAILABLE", False, True),
            ("NO_PRIVILEGE", "NO_ESP", False, False),
            ("NO_PRIVILEGE", "AVAILABLE", True, False),
        ],
    )
    def test_answers(
        self,
        monkeypatch: pytest.MonkeyPatch,
        privileged: str,
        unprivileged: str,
        viable: bool,
        automatic: bool,
    ) -> None:
        found = self.answer(monkeypatch, getattr(EspSupport, privileged), getattr(EspSupport, unprivileged))
        assert (found.viable, found.automatic) == (viable, automatic)
        assert found.remedy or found.viable
        if not viable:
            assert found.remedy.startswith("remedy of NO_ESP")
        # auto follows: without an SA of this process's own it is user space that serves
        assert backends.select().name == ("linux" if viable and automatic else "userspace")

    def test_this_kernel(self) -> None:
        """Success of setsockopt proves nothing: it is asked whether an SA could be installed."""
        found = backends.viability("linux")
        assert found.viable == bool(xfrm.probe_esp()) or not found.automatic
        assert found.duties[Duty.DIVERT_ESP] is Performer.KERNEL
        assert found.duties[Duty.DROP_RUNTS] is Performer.FILTER

    def test_the_answer_is_not_remembered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A module may be loaded meanwhile, or a privilege dropped."""
        support = EspSupport
        assert not self.answer(monkeypatch, support.NO_ESP, support.NO_ESP).viable
        assert self.answer(monkeypatch, support.AVAILABLE, support.NO_ESP).viable


@LINUX
@pytest.mark.parametrize("encapsulating", [0, 2], ids=["plain", "with UDP_ENCAP of the application's"])
def test_linux_sets_udp_encap_and_restores_it(encapsulating: int) -> None:
    udp_encap = (socket.IPPROTO_UDP, 100)  # linux/udp.h
    with udp() as sock:
        sock.setsockopt(*udp_encap, encapsulating)
        before = state(sock)
        endpoint = set_nat_t_endpoint(sock, backend=LinuxSocketsOnly())
        assert endpoint.mode == "filter"
        assert sock.getsockopt(*udp_encap) == 2
        assert endpoint.duties[Duty.DIVERT_ESP] is Performer.KERNEL
        endpoint.close()
        assert state(sock) == before


@LINUX
def test_linux_without_xfrm_raises_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = socket.socket.setsockopt

    def setsockopt(sock: socket.socket, level: int, option: int, *value: Any) -> None:
        if (level, option) == (socket.IPPROTO_UDP, 100):
            raise OSError(errno.ENOPROTOOPT, os.strerror(errno.ENOPROTOOPT))
        plain(sock, level, option, *value)

    with udp() as sock:
        before = state(sock)
        monkeypatch.setattr(socket.socket, "setsockopt", setsockopt)
        with pytest.raises(OSError, match=r"UDP_ENCAP was refused.*CONFIG_XFRM.*userspace") as raised:
            set_nat_t_endpoint(sock, backend=LinuxSocketsOnly())
        assert raised.value.errno == errno.ENOPROTOOPT
        monkeypatch.undo()
        assert state(sock) == before
