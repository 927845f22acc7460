"""What policies cover never passes in the clear, and other packets do: by what is on the wire."""

from __future__ import annotations

import errno
import logging
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from natcompat import open_ipsec
from natcompat.errors import NatCompatError
from natcompat.esp.device import clear_path, nftables
from natcompat.ipsec import Action, Direction, ProtectionRestored
from tests.support.linux import LINUX, isolated
from tests.support.tun import TUN, interfaces
from tests.support.wire import (
    BEHIND,
    EVERYTHING,
    FAMILY,
    FAR,
    ICMP,
    NEAR,
    PEER,
    SPI,
    STRANGER,
    TCP,
    UDP,
    US,
    Host,
    Seen,
    datagram,
    fragment,
    policy,
    protected,
    send,
    sh,
    wait_for,
)

pytestmark = [LINUX, TUN]

VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["v4", "v6"])

DISTURBANCES = {
    "rules removed": "for f in -4 -6; do ip $f rule flush; ip $f rule add priority 32766 lookup main; done",
    "table flushed": "ip route flush table {table}; ip -6 route flush table {table} || true",
    "down": "ip link set {tun} down",
    "down and up": "ip link set {tun} down; ip link set {tun} up",
    "other firewalls flushed": "nft flush ruleset",
    "addresses flushed": "ip addr flush dev {tun}",
}


def sealed(host: Host) -> int:
    return sum(packets_in(seen) for seen in host.left())


def packets_in(seen: Seen) -> int:
    """Return how many ESP packets a datagram to the peer has: several leave in one piece."""
    return seen.packet.count(SPI.to_bytes(4) + bytes(3)) if seen.destination == PEER else 0


@VERSIONS
@pytest.mark.parametrize("disturbance", DISTURBANCES)
@isolated(network=True)
def test_nothing_leaves_in_the_clear_and_all_is_put_back_at_once(disturbance: str, version: int) -> None:
    with protected() as (host, ipsec), ipsec.events() as events:
        if "addresses" not in disturbance:  # those of an application, which stay
            for address in NEAR.values():
                ipsec.remove_address(address)
                sh(f"ip addr add {address} dev lo")
        ipsec.add_policy(policy(version=version))
        send(FAR[version], NEAR[version])
        assert sealed(host) == 3
        routes = ipsec._host.routes if ipsec._host else None
        assert routes is not None
        sh(DISTURBANCES[disturbance].format(tun="natcompat0", table=routes.table))
        for device in ("", "eth0"):
            send(FAR[version], NEAR[version], device=device)
        assert host.clear(FAR[version], seconds=0.05) == []

        def works() -> bool:
            send(FAR[version], NEAR[version], count=1)
            return any(seen.destination == PEER for seen in host.left(0.02))

        wait_for(works, "sealed again")
        assert host.clear(FAR[version]) == []
        if disturbance != "other firewalls flushed":
            restored = [event for event in events.read() if isinstance(event, ProtectionRestored)]
            assert restored
            assert ipsec.host_counters()["restored"] == restored[-1].count


@pytest.mark.parametrize(
    "disturbance",
    [
        "ip link set {tun} down; ip link set {tun} name other0; ip link set other0 up",
        "ip link del {tun}",
        "ip netns add aside; ip link set {tun} netns aside; ip netns del aside",
    ],
    ids=["renamed", "deleted", "moved"],
)
@isolated(network=True)
def test_a_device_that_is_renamed_deleted_or_moved_lets_nothing_out(disturbance: str) -> None:
    with protected(address=False) as (host, ipsec), ipsec.events() as events:
        sh(f"ip addr add {NEAR[4]} dev lo")
        ipsec.add_policy(policy())
        ipsec.add_policy(policy(Direction.IN))
        sh(disturbance.format(tun="natcompat0"))
        for _ in range(5):
            send(FAR[4], NEAR[4])
            send(FAR[4], NEAR[4], device="eth0")
            assert host.clear(FAR[4], seconds=0.05) == []
        found = [event for event in events.read() if isinstance(event, ProtectionRestored)]
        assert found, "it is told"
        if "renamed" not in disturbance and "other0" not in disturbance:
            assert "stays blocked" in found[-1].description
            assert ipsec.host_counters()["blocked-output"] >= 5
        send(STRANGER[4], US[4])
        assert len(host.clear(STRANGER[4])) == 3, "others are left alone"


@VERSIONS
@isolated(network=True)
def test_cleartext_that_an_inbound_policy_covers_is_dropped_and_counted(version: int) -> None:
    with protected() as (host, ipsec), receiver(NEAR[version], version) as local:
        ipsec.add_policy(policy(version=version))
        host.arrive(datagram(FAR[version], NEAR[version], 7777, b"no inbound policy yet"))
        assert local.recv(100) == b"no inbound policy yet"
        ipsec.add_policy(policy(Direction.IN, version))
        host.arrive(datagram(FAR[version], NEAR[version], 7777))
        host.arrive(datagram(FAR[version], BEHIND[version], 7777))
        host.arrive(datagram(STRANGER[version], NEAR[version], 7777, b"from a stranger"))
        host.arrive(datagram(STRANGER[version], BEHIND[version], 7777, b"from a stranger"))
        assert local.recv(100) == b"from a stranger"
        forwarded = [seen for seen in host.left(interface="lan0") if seen.protocol == UDP]
        assert [seen.source for seen in forwarded] == [STRANGER[version]]
        counters = ipsec.host_counters()
        assert (counters["blocked-input"], counters["blocked-forward"]) == (1, 1)
        ipsec.delete_policy(policy(Direction.IN, version))
        host.arrive(datagram(FAR[version], NEAR[version], 7777, b"no longer covered"))
        assert local.recv(100) == b"no longer covered"


@contextmanager
def receiver(address: str, version: int, port: int = 7777) -> Iterator[socket.socket]:
    with socket.socket(FAMILY[version], socket.SOCK_DGRAM) as sock:
        wait_for(lambda: bindable(sock, address, port), "the address is there")
        sock.settimeout(2)
        yield sock


def bindable(sock: socket.socket, address: str, port: int) -> bool:
    try:
        sock.bind((address, port))
    except OSError:
        return False
    return True


@VERSIONS
@isolated(network=True)
def test_what_this_host_forwards_is_sealed_or_dropped(version: int) -> None:
    with protected() as (host, ipsec):
        ipsec.add_policy(policy(version=version))
        host.arrive(datagram(BEHIND[version], FAR[version]), "lan0")
        assert sealed(host) == 1
        sh("for f in -4 -6; do ip $f rule flush; ip $f rule add priority 32766 lookup main; done")
        host.arrive(datagram(BEHIND[version], FAR[version]), "lan0")
        host.arrive(datagram(BEHIND[version], STRANGER[version]), "lan0")
        assert [seen.destination for seen in host.left(0.05) if seen.destination != PEER] == [
            STRANGER[version]
        ]


@VERSIONS
@isolated(network=True)
def test_a_policy_takes_what_its_selector_says_and_nothing_else(version: int) -> None:
    """Between the outer addresses, where a route would cut the peer off."""
    far = STRANGER[version]
    with protected() as (host, ipsec):
        for protocol, port, action in (
            (TCP, 23, Action.PROTECT),
            (UDP, "5000-5999", Action.PROTECT),
            (UDP, 5555, Action.BYPASS),
            (UDP, 53, Action.DISCARD),
        ):
            selector: dict[str, Any] = {"near": US[version], "far": far, "protocol": protocol}
            priority = 1 if action is Action.BYPASS else None
            ipsec.add_policy(
                policy(version=version, destination_port=port, action=action, priority=priority, **selector)
            )
        for device in ("", "eth0"):
            for port in (23, 80):
                with socket.socket(FAMILY[version]) as sock:
                    if device:
                        sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
                    sock.setblocking(False)
                    sock.connect_ex((far, port))
            for port in (53, 4999, 5000, 5555, 5999, 6000):
                send(far, port=port, device=device, count=1)
            packets = host.left(0.1)
            clear = {(seen.protocol, seen.destination_port) for seen in packets if seen.destination == far}
            assert clear == {(TCP, 80), (UDP, 4999), (UDP, 5555), (UDP, 6000)}, device
            assert sum(map(packets_in, packets)) == (0 if device else 3)


@VERSIONS
@isolated(network=True)
def test_icmp_is_told_apart_by_type(version: int) -> None:
    far, echo = STRANGER[version], {4: 8, 6: 128}[version]
    with protected() as (host, ipsec):
        ipsec.add_policy(
            policy(version=version, near=US[version], far=far, protocol=ICMP[version], source_port=echo)
        )
        ping = bytes((echo, 0, 0, 0)) + bytes(4)
        other = bytes(({4: 13, 6: 139}[version], 0, 0, 0)) + bytes(16)
        with socket.socket(FAMILY[version], socket.SOCK_RAW, ICMP[version]) as sock:
            sock.sendto(ping, (far, 0))
            sock.sendto(other, (far, 0))
        send(far, count=1)
        packets = host.left()
        assert [seen.protocol for seen in packets if seen.destination == far] in (
            [ICMP[version], UDP],
            [UDP, ICMP[version]],
        )
        assert sum(seen.destination == PEER for seen in packets) == 1


@isolated(network=True)
def test_fragments_of_a_covered_pair_never_leave_in_the_clear() -> None:
    with protected() as (host, ipsec):
        ipsec.add_policy(policy(near="0.0.0.0/0", protocol=UDP, destination_port=53))
        packet = datagram(BEHIND[4], FAR[4], 53, bytes(64))
        first, later = (
            fragment(packet[:60], 0, more=True),
            fragment(packet[:20] + packet[60:], 40, more=False),
        )
        for piece in (later, first):
            host.arrive(piece, "lan0")
        other = datagram(BEHIND[4], STRANGER[4], 53, bytes(64))
        host.arrive(fragment(other[:20] + other[60:], 40, more=False), "lan0")
        packets = host.left()
        assert [seen.destination for seen in packets if seen.destination != PEER] == [STRANGER[4]]
        sh("ip rule flush", "ip rule add priority 32766 lookup main")
        host.arrive(later, "lan0")
        assert host.clear(FAR[4], seconds=0.02) == []


@isolated(network=True)
def test_the_endpoint_and_ike_pass_a_policy_for_everything() -> None:
    with protected() as (host, ipsec), socket.socket(type=socket.SOCK_DGRAM) as ike:
        ike.bind((US[4], 500))
        ike.settimeout(2)
        ipsec.bypass(ike)
        for direction in Direction:
            ipsec.add_policy(policy(direction, near=EVERYTHING[4], far=EVERYTHING[4]))
        ike.sendto(b"IKE", (PEER, 500))
        assert [(seen.destination, seen.destination_port) for seen in host.left()] == [(PEER, 500)]
        host.arrive(datagram(PEER, US[4], 500, b"an answer"))
        assert ike.recv(100) == b"an answer"
        with receiver(US[4], 4, 7777) as other:
            other.settimeout(0.2)
            host.arrive(datagram(PEER, US[4], 7777))
            with pytest.raises(TimeoutError):
                other.recv(100)
        assert ipsec.host_counters()["blocked-input"] == 1


@isolated(network=True)
def test_replacing_a_policy_is_one_step() -> None:
    with protected(sa=False) as (host, ipsec):
        ipsec.add_policy(policy(action=Action.DISCARD))
        for action in (Action.BYPASS, Action.PROTECT, Action.DISCARD, Action.BYPASS):
            ipsec.add_policy(policy(action=action), replace=True)
            send(FAR[4], NEAR[4], count=1)
            assert len(host.clear(FAR[4], seconds=0.05)) == (action is Action.BYPASS), action
        ipsec.add_policy(policy(far=f"{FAR[4]}/32", action=Action.DISCARD, priority=1))
        send(FAR[4], NEAR[4], count=1)
        send("10.2.0.2", NEAR[4], count=1)
        assert [seen.destination for seen in host.clear(FAR[4], "10.2.0.2")] == ["10.2.0.2"]
        ipsec.flush_policies()
        send(FAR[4], NEAR[4], count=1)
        assert len(host.clear(FAR[4])) == 1


@isolated(network=True)
def test_an_inner_address_may_come_late_and_change() -> None:
    with protected(address=False) as (host, ipsec):
        for address in ("10.9.0.10", "10.9.0.11"):
            ipsec.add_policy(policy(near=address, far=EVERYTHING[4]))
        for address in ("10.9.0.10", "10.9.0.11", "10.9.0.10"):
            ipsec.add_address(f"{address}/32")
            send(FAR[4])
            packets = host.left()
            assert {seen.destination for seen in packets} == {PEER}, "the source is the inner address"
            assert sum(map(packets_in, packets)) == 3
            ipsec.remove_address(address)
            send(FAR[4])
            assert {seen.source for seen in host.clear(FAR[4])} == {US[4]}, "as without a tunnel"


@isolated(network=True)
def test_what_somebody_else_changes_is_said_in_the_log() -> None:
    texts: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(f"{record.levelname} {record.getMessage()}")

    logging.getLogger("natcompat").addHandler(Kept())
    with protected() as (_, ipsec):
        ipsec.add_policy(policy())
        sh("ip link set natcompat0 down")
        wait_for(lambda: any("natcompat0 was down" in text for text in texts), "logged")
        sh("ip link del natcompat0")
        wait_for(lambda: any("policies cover stays blocked" in text for text in texts), "logged")
        assert any(text.startswith("ERROR") and "was deleted or moved" in text for text in texts)


@pytest.mark.parametrize("missing", ["nf_tables", "raw sockets"])
@isolated(network=True)
def test_what_cannot_be_said_exactly_is_refused(missing: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        if missing == "nf_tables":
            patch.setattr(nftables.Nfnetlink, "tables", refused)
        else:
            patch.setattr(clear_path.ClearPath, "__init__", refused)
        with protected() as (host, ipsec):
            for inexact in ({"protocol": TCP, "destination_port": 23}, {"far": "10.2.0.1-10.2.0.9"}):
                with pytest.raises(NatCompatError, match="would cut off other traffic") as caught:
                    ipsec.add_policy(policy(**inexact))
                assert caught.value.errno == errno.EOPNOTSUPP
            assert ipsec.list_policies() == []
            send(FAR[4], NEAR[4], count=1)
            assert len(host.clear(FAR[4])) == 1, "nothing is left of what was refused"
            ipsec.add_policy(policy())
            assert send(FAR[4], NEAR[4]) == sealed(host) == 3
            sh("ip rule flush; ip rule add priority 32766 lookup main")
            wait_for(lambda: "proto 78" in sh("ip rule"), "put back by the watch alone")
        if missing == "nf_tables":
            with pytest.raises(NatCompatError, match="lockdown takes nf_tables"):
                open_ipsec("userspace", lockdown=True)
            assert interfaces() == {"lo", "eth0", "wire", "lan0", "lan"}


def refused(*_: object) -> None:
    raise NatCompatError(errno.EOPNOTSUPP, "Operation not supported")
