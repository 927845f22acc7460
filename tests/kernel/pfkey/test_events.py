"""Events over PF_KEY, and requests whose answers are late, lost or somebody else's."""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
from typing import Any

import pytest

from natcompat.errors import NatCompatError
from natcompat.ipsec import (
    Acquire,
    Direction,
    EventsLost,
    Expire,
)
from natcompat.kernel.pfkey.messages import Message
from tests.kernel.pfkey import layouts
from tests.kernel.pfkey.golden import GCM, OURS, PEER, SPI, association
from tests.kernel.pfkey.layouts import extension
from tests.kernel.pfkey.models import EVERY, Opener, extension_of, read, refused
from tests.kernel.pfkey.test_golden_policies import policy

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the models' sockets are Linux's (SOCK_SEQPACKET)"
)


@EVERY
def test_acquires(system: layouts.System, start: Opener) -> None:
    kernel, ipsec = start(system)
    changes = {"interface_id": 3} if system is layouts.SOLARIS else {}
    ipsec.add_policy(policy(Direction.OUT, **changes))
    number = extension(layouts.sadb_x_policy(0, 18, 2, 2, 0, 0))
    more: tuple[bytes, ...] = () if system is layouts.OPENBSD else (number,)
    if system is layouts.SOLARIS:  # says the selector itself
        more = (
            system.address(7, "10.2.0.0", port=1000, proto=17, prefix=24),
            system.address(22, "10.1.0.0", port=2000, proto=17, prefix=16),
        )
    with ipsec.events() as events:
        kernel.tell(6, system.address(5, OURS), system.address(6, PEER), *more, seq=77)
        (found,) = read(events)
    assert isinstance(found, Acquire)
    assert (str(found.source), str(found.destination), found.sequence) == (OURS, PEER, 77)
    assert found.selector == policy(Direction.OUT).selector
    assert found.reqid == (0 if system in (layouts.OPENBSD, layouts.SOLARIS) else 7)


@EVERY
def test_acquires_of_policies_that_are_gone(system: layouts.System, start: Opener) -> None:
    kernel, ipsec = start(system)
    number = extension(layouts.sadb_x_policy(0, 18, 2, 2, 0, 5))
    more = () if system in (layouts.OPENBSD, layouts.SOLARIS) else (number,)
    with ipsec.events() as events:
        ends = [system.address(kind, each, port=80, proto=6) for kind, each in ((5, OURS), (6, PEER))]
        kernel.tell(6, *ends, *more, seq=77)
        (found,) = read(events)
    assert found.reqid == 0
    assert (str(found.selector.source), str(found.selector.destination)) == (f"{OURS}/32", f"{PEER}/32")
    if system is not layouts.OPENBSD:  # whose addresses have no protocol
        assert (found.selector.protocol, found.selector.source_port) == (6, 80)


@EVERY
def test_what_is_no_event(system: layouts.System, start: Opener) -> None:
    kernel, ipsec = start(system)
    ends = system.address(5, OURS, prefix=32), system.address(6, PEER, prefix=32)
    current = extension(layouts.sadb_lifetime(0, 2))
    hard = extension(layouts.sadb_lifetime(0, 3))
    with ipsec.events() as events:
        kernel.tell_raw(b"rubbish")
        kernel.tell(8, layouts.sa(SPI), current)  # lacks addresses
        kernel.tell(8, layouts.sa(SPI), current, *ends)  # neither hard nor soft: idle
        kernel.tell(8, layouts.sa(0), hard, *ends)  # what waited for an acquire
        kernel.tell(8, layouts.sa(SPI), hard, *ends, satype=9)  # IPComp
        kernel.tell(23, layouts.sa(SPI), *ends)
        kernel.tell_raw(layouts.message(6, kernel.esp, *ends, pid=os.getpid()))
        kernel.tell_raw(layouts.message(6, kernel.esp, *ends, errno=1))
        kernel.tell(8, layouts.sa(SPI), hard, *ends)
        found: list[Any] = []
        while not found:
            found += read(events)
    assert found == [Expire(sa_id=association(Direction.OUT, **GCM).sa_id, reqid=0, hard=True)]


def test_events_that_may_have_been_lost(start: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, ipsec = start(layouts.FREEBSD)
    with ipsec.events() as events:
        events._room = 1
        sa_id = ipsec.add_sa(association(Direction.OUT, **GCM))
        kernel.sas.clear()
        kernel.tell(9)
        assert read(events) == [EventsLost(), Expire(sa_id=sa_id, reqid=7, hard=True)]
        monkeypatch.setattr(ipsec, "list_sas", lambda: refused_list())
        kernel.tell(9)
        assert read(events) == [EventsLost()], "nothing could be found out"


def refused_list() -> list[Any]:
    raise NatCompatError(errno.ENOBUFS, "no")


def test_a_kernel_that_does_not_answer(start: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, ipsec = start(layouts.NETBSD)
    kernel.silent = True
    ipsec._socket._patience = 0.05
    error = refused(ipsec.flush_sas)
    assert error.errno == errno.ETIMEDOUT
    assert "Look whether" in error.remedy


def test_answers_to_others_are_passed_over(start: Opener) -> None:
    kernel, ipsec = start(layouts.FREEBSD)
    answer = kernel._answer

    def among_others(client: socket.socket, data: bytes) -> None:
        client.send(b"rubbish")
        client.send(layouts.message(data[1], 3, errno=errno.EPERM, seq=1, pid=os.getpid()))
        client.send(layouts.message(data[1], 3, errno=errno.EPERM, pid=1) + bytes(8))
        client.send(layouts.message(11, 3, pid=os.getpid()))
        answer(client, data)

    kernel._answer = among_others  # type: ignore[method-assign]
    sa_id = ipsec.add_sa(association(Direction.OUT, **GCM))
    assert ipsec.get_sa(sa_id).octets == 0


def test_a_socket_that_breaks(start: Opener) -> None:
    _, ipsec = start(layouts.FREEBSD)
    ipsec._socket.socket.close()
    assert refused(ipsec.flush_sas).errno == errno.EBADF


def test_threads_take_turns(start: Opener) -> None:
    _, ipsec = start(layouts.FREEBSD)
    errors: list[BaseException] = []

    def work(first: int) -> None:
        try:
            for number in range(first, first + 50):
                ipsec.delete_sa(ipsec.add_sa(association(Direction.OUT, **GCM, spi=number)))
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    threads = [threading.Thread(target=work, args=(1000 * number,)) for number in range(1, 5)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert errors == []


def test_malformed_answers_are_said(start: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    _, ipsec = start(layouts.FREEBSD)
    sa_id = ipsec.add_sa(association(Direction.OUT, **GCM))
    short = Message(5, 3, [extension_of(1, 4), extension_of(2, 4)])
    monkeypatch.setattr(ipsec._socket, "request", lambda *_, **__: short)
    assert refused(ipsec.get_sa, sa_id).errno == errno.EBADMSG
    assert refused(ipsec.update_sa, sa_id, source="192.0.2.9").errno == errno.EBADMSG
    monkeypatch.setattr(ipsec._socket, "dump", lambda *_, **__: [short])
    assert ipsec.list_sas() == []
