"""`PfKeyIPsec` where kernels differ: against models of those that cannot run here."""

from __future__ import annotations

import errno
import os
import socket
import sys
from ipaddress import ip_address
from typing import Any

import pytest

from natcompat.ipsec import (
    Action,
    Direction,
    Mark,
    Mode,
    Policy,
    SaId,
    TrafficSelector,
    UDPEncapsulation,
)
from natcompat.ipsec.transforms import Encr, Integ
from natcompat.kernel.pfkey import bypass, transport
from natcompat.kernel.pfkey.dialects import DIALECTS, FREEBSD, LINUX, OPENBSD
from tests.kernel.pfkey import layouts
from tests.kernel.pfkey.golden import CBC, GCM, OURS, PEER, PORTS, SPI, association
from tests.kernel.pfkey.layouts import extension
from tests.kernel.pfkey.model import ModelKernel
from tests.kernel.pfkey.models import EVERY, SELECTOR, Opener, pfkey_of, refused
from tests.kernel.pfkey.test_golden_policies import policy

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="the models' sockets are Linux's (SOCK_SEQPACKET)"
)


# -- SAs


@EVERY
def test_a_transform_that_this_kernel_lacks(system: layouts.System, start: Opener) -> None:
    kernel, ipsec = start(system)
    kernel.algorithms -= {DIALECTS[system.name].integrity[Integ.HMAC_SHA2_512_256]}
    error = refused(ipsec.add_sa, association(Direction.OUT, **CBC))
    assert error.errno == errno.ENOSYS
    assert "HMAC_SHA2_512_256" in str(error)
    assert ipsec.list_sas() == []
    ipsec.add_sa(association(Direction.OUT, **GCM))


@EVERY
def test_what_a_kernel_refuses_for_another_reason(
    system: layouts.System, start: Opener, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, ipsec = start(system)

    def refuse(*_: object) -> None:
        from tests.kernel.pfkey.model import RefusedError

        raise RefusedError(errno.EINVAL)

    monkeypatch.setattr(kernel, "_check", refuse)
    assert refused(ipsec.add_sa, association(Direction.OUT, **GCM)).errno == errno.EINVAL


def test_the_diagnostic_of_solaris_is_said() -> None:
    assert "diagnostic 51 of net/pfkeyv2.h" in str(transport.failure("Adding", errno.EINVAL, {}, 51))


@EVERY
def test_a_name_without_a_source(system: layouts.System, start: Opener) -> None:
    _, ipsec = start(system)
    sa_id = ipsec.add_sa(association(Direction.OUT, **GCM, encapsulation=PORTS))
    bare = SaId(spi=SPI, destination=ip_address(PEER))
    with pfkey_of(system) as other:
        assert other.list_sas()[0].sa_id == sa_id
        if system is not layouts.NETBSD:  # which wants to hear the ports, too
            assert other.get_sa(bare).octets == 0
    ipsec.delete_sa(bare)
    assert refused(ipsec.delete_sa, bare).errno == errno.ESRCH


@EVERY
def test_the_direction_of_sas_of_others(system: layouts.System, start: Opener) -> None:
    _, ipsec = start(system)
    ipsec.add_sa(association(Direction.IN, **GCM, destination="127.0.0.1"))
    ipsec.add_sa(association(Direction.OUT, **GCM, spi=SPI + 1))
    with pfkey_of(system) as other:
        found = {each.sa_id.spi: each.association for each in other.list_sas()}
    directions = {spi: sa.direction for spi, sa in found.items() if sa}
    assert directions == {SPI: Direction.IN, SPI + 1: Direction.OUT}


@EVERY
def test_an_spi_whose_larval_sa_is_gone(system: layouts.System, start: Opener) -> None:
    kernel, ipsec = start(system)
    spi = ipsec.allocate_spi(PEER, OURS, minimum=5000, maximum=5001)
    kernel.sas.clear()
    assert ipsec.allocate_spi(PEER, OURS, minimum=5000, maximum=5001) != spi, "promised already"
    kernel.sas.clear()
    assert ipsec.is_there(SaId(spi=spi, destination=ip_address(OURS)))
    ipsec.add_sa(association(Direction.IN, **GCM, spi=spi))
    assert [each.larval for each in ipsec.list_sas()] == [False]
    with pytest.raises(ValueError, match="no range"):
        ipsec.allocate_spi(PEER, OURS, minimum=5, maximum=4)


def test_a_larval_sa_that_goes_while_it_is_completed(start: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, ipsec = start(layouts.NETBSD)
    spi = ipsec.allocate_spi(PEER, OURS)
    find = ipsec._find
    monkeypatch.setattr(ipsec, "_find", lambda sa_id: _found_and_gone(kernel, find, sa_id))
    ipsec.add_sa(association(Direction.IN, **GCM, spi=spi))
    monkeypatch.undo()
    assert [key[1] for key in kernel.sas] == [spi]


def _found_and_gone(kernel: ModelKernel, find: Any, sa_id: SaId) -> Any:
    found = find(sa_id)
    kernel.sas.clear()
    return found


def test_openbsd_has_one_local_port(start: Opener) -> None:
    _, ipsec = start(layouts.OPENBSD)
    sa_id = ipsec.add_sa(association(Direction.OUT, **GCM, encapsulation=PORTS))
    error = refused(ipsec.update_sa, sa_id, encapsulation=UDPEncapsulation(local_port=4501, remote_port=1))
    assert error.errno == errno.EOPNOTSUPP
    assert "udpencap_port" in error.remedy
    ports = UDPEncapsulation(local_port=4500, remote_port=1)
    moved = ipsec.update_sa(sa_id, source="192.0.2.9", encapsulation=ports)
    (found,) = ipsec.list_sas()
    assert found.association is not None
    assert found.sa_id == moved == sa_id
    assert str(found.association.source) == "192.0.2.9"
    assert found.association.encapsulation == ports
    assert found.association.reqid == 7, "this object knows it"


def test_a_kernel_that_ignores_an_update(start: Opener, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel, ipsec = start(layouts.FREEBSD)
    sa_id = ipsec.add_sa(association(Direction.OUT, **GCM, encapsulation=PORTS))
    monkeypatch.setattr(kernel, "_2", lambda found, send: send(*found.values()))
    error = refused(ipsec.update_sa, sa_id, encapsulation=UDPEncapsulation(local_port=4500, remote_port=1))
    assert error.errno == errno.EOPNOTSUPP
    assert "ignored" in str(error)


def test_moving_to_a_name_that_is_taken(start: Opener) -> None:
    _, ipsec = start(layouts.OPENBSD)
    one = ipsec.add_sa(association(Direction.OUT, **GCM))
    ipsec.add_sa(association(Direction.OUT, **GCM, destination="192.0.2.44"))
    assert refused(ipsec.update_sa, one, destination="192.0.2.44").errno == errno.EEXIST
    assert refused(ipsec.update_sa, one, encapsulation=PORTS).errno == errno.EOPNOTSUPP, "into UDP"


# -- policies


@EVERY
def test_policies_of_the_same_selector(system: layouts.System, start: Opener) -> None:
    _, ipsec = start(system)
    mine = Policy(direction=Direction.OUT, selector=SELECTOR, action=Action.DISCARD)
    ipsec.add_policy(mine)
    assert refused(ipsec.add_policy, mine).errno == errno.EEXIST
    assert ipsec.get_policy(mine).policy.action is Action.DISCARD
    ipsec.delete_policy(mine)
    for verb in (ipsec.get_policy, ipsec.delete_policy):
        assert refused(verb, mine).errno == errno.ESRCH


@EVERY
@pytest.mark.parametrize(
    "changes",
    [{"mark": Mark(value=1)}, {"interface_id": 3}, {"priority": 5}, {"optional": True}, {"reqid": 0x4000}],
    ids=lambda changes: next(iter(changes)),
)
def test_policies_that_cannot_be_said(system: layouts.System, changes: dict[str, Any], start: Opener) -> None:
    _, ipsec = start(system)
    word = next(iter(changes))
    can = {
        "interface_id": (layouts.SOLARIS,),
        "priority": (layouts.SOLARIS, layouts.FREEBSD),
        "optional": (layouts.OPENBSD,),
        "reqid": (layouts.SOLARIS, layouts.OPENBSD),
    }
    if system is layouts.SOLARIS:
        changes = {"interface_id": 3, **changes}
    asked = policy(Direction.OUT, **changes)
    if system in can.get(word, ()):
        ipsec.add_policy(asked)
        return
    error = refused(ipsec.add_policy, asked)
    assert error.errno == errno.EOPNOTSUPP
    assert error.remedy
    assert ipsec.list_policies() == []


def test_tunnels_of_solaris_are_interfaces(start: Opener) -> None:
    _, ipsec = start(layouts.SOLARIS)
    error = refused(ipsec.add_policy, policy(Direction.OUT))
    assert error.errno == errno.EINVAL
    assert "dladm create-iptun" in error.remedy
    assert (
        refused(ipsec.add_policy, policy(Direction.OUT, interface_id=1, priority=0x7FFFFFFF)).errno
        == errno.EINVAL
    )
    ipsec.add_policy(policy(Direction.OUT, interface_id=1))
    with pfkey_of(layouts.SOLARIS) as other:  # which has not installed it
        (found,) = other.list_policies()
    assert (found.policy.interface_id, str(found.policy.source)) == (1, "0.0.0.0")
    assert found.policy.selector == policy(Direction.OUT).selector


def test_rules_for_both_directions(start: Opener) -> None:
    kernel, ipsec = start(layouts.SOLARIS)
    ipsec.add_policy(Policy(direction=Direction.OUT, selector=SELECTOR, action=Action.BYPASS))
    (rule,) = kernel.policies.values()
    rule[7] = (
        rule[7][:8] + b"\3" + rule[7][9:]
        if sys.byteorder == "little"
        else rule[7][:11] + b"\3" + rule[7][12:]
    )
    with pfkey_of(layouts.SOLARIS) as other:
        found = {each.policy.direction: each.policy.selector for each in other.list_policies()}
    assert found[Direction.OUT] == SELECTOR
    assert (found[Direction.IN].source, found[Direction.IN].destination) == (
        SELECTOR.destination,
        SELECTOR.source,
    )
    rule[6] = extension(layouts.spd_ext_actions(0, 6, 1), bytes(layouts.spd_attribute(0x101, 2)))
    with pfkey_of(layouts.SOLARIS) as other:
        assert other.list_policies() == [], "an action without a type"


def test_flows_between_hosts(start: Opener) -> None:
    kernel, ipsec = start(layouts.OPENBSD)
    for direction in Direction:
        ends = (OURS, PEER) if direction is Direction.OUT else (PEER, OURS)
        selector = TrafficSelector(source=ends[0], destination=ends[1])
        ipsec.add_policy(Policy(direction=direction, selector=selector, mode=Mode.TRANSPORT))
    addresses = {(flow[5][12:16], flow[6][12:16]) for flow in kernel.policies.values()}
    assert addresses == {(socket.inet_aton(OURS), socket.inet_aton(PEER))}, "ours, then the peer's"


# -- events


# -- sockets


class Recorded:
    """A socket that records its options."""

    def __init__(self, limit: int = 1 << 30, refusal: int = 0) -> None:
        self.family = socket.AF_INET
        self.limit, self.refusal = limit, refusal
        self.options: list[tuple[Any, ...]] = []
        self.closed = False

    def setsockopt(self, *option: Any) -> None:
        if self.refusal:
            raise OSError(self.refusal, os.strerror(self.refusal))
        if isinstance(option[2], int) and option[2] > self.limit:
            raise OSError(errno.ENOBUFS, "No buffer space available")
        self.options.append(option)

    def close(self) -> None:
        self.closed = True


def test_as_long_a_queue_as_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Recorded(limit=300_000)
    monkeypatch.setattr(socket, "socket", lambda *_: made)
    opened: Any = transport.open_socket(FREEBSD, 27, 2, 1 << 20)
    assert opened is made
    assert made.options == [(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 18)]
    stingy = Recorded(limit=0)
    monkeypatch.setattr(socket, "socket", lambda *_: stingy)
    opened = transport.open_socket(OPENBSD, 30, 2, 1 << 20)
    assert opened is stingy
    broken = Recorded(refusal=errno.EINVAL)
    monkeypatch.setattr(socket, "socket", lambda *_: broken)
    with pytest.raises(OSError, match="Invalid"):
        transport.open_socket(LINUX, 15, 2, 1 << 20)
    assert broken.closed


@pytest.mark.parametrize("name", [each for each in DIALECTS if each != "linux"])
def test_a_socket_is_exempted(name: str) -> None:
    sock: Any = Recorded()
    bypass.bypass(DIALECTS[name], sock)
    assert [option[:2] for option in sock.options] == [each[:2] for each in bypass.options(DIALECTS[name], 4)]
    refusing: Any = Recorded(refusal=errno.EPERM)
    error = refused(bypass.bypass, DIALECTS[name], refusing)
    assert (error.errno, error.remedy) == (errno.EPERM, DIALECTS[name].privilege)
    refusing.refusal = errno.EINVAL
    assert "before connect" in refused(bypass.bypass, DIALECTS[name], refusing).remedy
    sock.family = socket.AF_UNIX
    assert refused(bypass.bypass, DIALECTS[name], sock).errno == errno.EAFNOSUPPORT


def test_the_verb_exempts_by_the_dialect(start: Opener) -> None:
    _, ipsec = start(layouts.MACOS)
    sock: Any = Recorded()
    ipsec.bypass(sock)
    assert len(sock.options) == 2
    assert ipsec.features.kernel_keepalive


@EVERY
def test_keepalives(system: layouts.System, start: Opener) -> None:
    _, ipsec = start(system)
    for interval in (10, 30):
        sa = association(
            Direction.OUT, **GCM, encapsulation=PORTS, nat_keepalive=interval, spi=SPI + interval
        )
        if DIALECTS[system.name].kernel_keepalive in range(1, interval + 1):
            ipsec.add_sa(sa)
        else:
            error = refused(ipsec.add_sa, sa)
            assert error.errno == errno.EOPNOTSUPP
            assert "natcompat.endpoint.keepalive" in error.remedy


def test_encryption_by_name_is_not_mistaken_for_integrity() -> None:
    """Both are numbers of IANA, in registries of their own: 12 is AES-CBC here and SHA-256 there."""
    assert int(Encr.AES_CBC) == int(Integ.HMAC_SHA2_256_128)
    assert all(isinstance(each, Encr) for dialect in DIALECTS.values() for each in dialect.encryption)
    assert all(isinstance(each, Integ) for dialect in DIALECTS.values() for each in dialect.integrity)
