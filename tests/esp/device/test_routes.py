"""Routes into a TUN device that cover the peer, and the outer packets that must not take them."""

from __future__ import annotations

import contextlib
import errno
import io
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network
from random import Random
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from natcompat.commands.doctor import examine as doctor
from natcompat.commands.doctor import report as doctor_report
from natcompat.commands.verify.namespaces import INITIATOR, RESPONDER, Topology
from natcompat.errors import NatCompatError
from natcompat.esp.carrier.path_mtu import kernel_path_mtu
from natcompat.esp.device.outer_path import refuse_loop
from natcompat.esp.device.policy_routes import PolicyRoutes
from natcompat.esp.device.routes import MARK, DeviceRoutes
from natcompat.esp.device.rtnetlink import MAIN_TABLE, Rtnetlink
from natcompat.esp.device.tun import TunDevice
from natcompat.esp.engine.databases import PolicyDatabase
from natcompat.esp.engine.packet import Flow
from natcompat.esp.userspace import open_process_ipsec
from natcompat.ipsec import Action, Direction, IPNetwork, Policy, TrafficSelector
from tests.support.linux import LINUX, ip, isolated, nothing_left
from tests.support.tun import TUN, interfaces, read_until

pytestmark = [LINUX, TUN]

VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["v4", "v6"])
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
EVERYTHING = {4: "0.0.0.0/0", 6: "::/0"}
INNER = {4: "10.1.0.1", 6: "fd00:9::1"}
ANYONE = {4: "198.51.100.7", 6: "2001:db8:7::7"}
PEER = {4: "203.0.113.2", 6: "2001:db8:113::2"}
UPLINK = {4: "192.0.2.1/24", 6: "2001:db8:1::1/64"}


def goes_to(address: str, mark: int = 0) -> str:
    """Return the name of the interface that packets take."""
    netlink = Rtnetlink()
    try:
        index = netlink.interface_to(ip_address(address), mark=mark)
    finally:
        netlink.close()
    return socket.if_indextoname(index) if index else ""


def rules() -> str:
    return "".join(
        subprocess.run(["ip", family, "rule"], check=True, capture_output=True, text=True).stdout
        for family in ("-4", "-6")
    )


def thrown(netlink: Rtnetlink) -> list[IPNetwork]:
    return [network for index, network, _ in netlink.routes() if not index]


def doctors_report() -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        doctor_report.show(doctor.examine())
    return output.getvalue()


def is_to(address: str, packet: bytes) -> bool:
    packed = ip_address(address).packed
    return packet[16:20] == packed if packet[0] >> 4 == 4 else packet[24:40] == packed


# --- through a network ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> Iterator[Topology]:
    try:
        made = Topology()
    except NatCompatError as error:
        pytest.skip(f"no network: {error}")
    with made:
        yield made


@VERSIONS
def test_the_outer_packets_of_a_default_route_go_out_by_the_uplink(network: Topology, version: int) -> None:
    before = network.initiator.call(rules)
    with network.responder.socket(FAMILY[version]) as far:
        far.bind((RESPONDER[version], 4500))
        far.settimeout(10)
        network.initiator.call(_send_through, version, far)
    assert network.initiator.call(rules) == before
    assert network.initiator.call(interfaces) == {"lo", "uplink"}


def _send_through(version: int, far: socket.socket) -> None:
    """Runs on the initiator; `far` is the peer's."""
    peer = RESPONDER[version]
    with (
        TunDevice() as device,
        DeviceRoutes(device) as routes,
        socket.socket(FAMILY[version], socket.SOCK_DGRAM) as outer,
        socket.socket(FAMILY[version], socket.SOCK_DGRAM) as inner,
    ):
        outer.bind((INITIATOR[version], 4500))
        outer.settimeout(10)
        device.add_address(INNER[version])
        routes.add(EVERYTHING[version], source=INNER[version])
        assert goes_to(peer) == device.name

        outer.sendto(b"a loop", (peer, 4500))
        read_until(device, lambda each: is_to(peer, each) and each.endswith(b"a loop"))

        routes.exempt(outer)
        routes.check_peer(peer)
        inner.connect((ANYONE[version], 7))
        assert inner.getsockname()[0] == INNER[version]
        for number in range(5):
            inner.send(b"packet %d" % number)
            packet, others = read_until(device, lambda each: is_to(ANYONE[version], each))
            assert not any(is_to(peer, each) for each in others)
            outer.sendto(b"outer" + packet, (peer, 4500))
            arrived, source = far.recvfrom(2000)
            assert arrived == b"outer" + packet
            assert arrived.endswith(b"packet %d" % number)
            far.sendto(b"an answer", source)
            assert outer.recvfrom(100)[0] == b"an answer"
        assert not any(is_to(peer, each) for each in device.read_burst())

        routes.exempt(outer, False)
        outer.sendto(b"a loop", (peer, 4500))
        read_until(device, lambda each: is_to(peer, each))


# --- the tables, the rules and the mark ----------------------------------------------------------


@contextlib.contextmanager
def uplink(*versions: int) -> Iterator[TunDevice]:
    """A default route that is there before: by another TUN device, since that is at hand."""
    with TunDevice("uplink0") as device:
        for version in versions or (4, 6):
            device.add_address(UPLINK[version])
            device.add_route(EVERYTHING[version])
        yield device


@isolated(network=True)
def test_two_devices_share_the_mark_and_nothing_else() -> None:
    before = rules()
    with uplink(), TunDevice() as first, TunDevice() as second:
        with DeviceRoutes(first) as one:
            with DeviceRoutes(second) as other:
                one.add("0.0.0.0/1")
                one.add("::/1")
                other.add("0.0.0.0/0")
                other.add("128.0.0.0/1")
                assert one.table != other.table
                assert goes_to("10.0.0.1") == first.name
                assert goes_to("203.0.113.2") == second.name
                assert goes_to("2001:db8::1") == first.name
                for address in ("10.0.0.1", "203.0.113.2", "2001:db8::1"):
                    assert goes_to(address, mark=MARK) == "uplink0"
                    assert goes_to(address, mark=MARK | 0xCA6C) == "uplink0", "other bits do not matter"
                    assert goes_to(address, mark=0xCA6C) != "uplink0"
                one.check_peer("10.0.0.1")
                other.remove("128.0.0.0/1")
                assert goes_to("203.0.113.2") == second.name
                with pytest.raises(NatCompatError, match="already"):
                    other.add("0.0.0.0/0")
            assert goes_to("203.0.113.2") == "uplink0"
            assert goes_to("10.0.0.1") == first.name
            other.close()
        assert goes_to("10.0.0.1") == "uplink0"
    assert rules() == before


@isolated(network=True)
def test_which_of_two_routes_wins() -> None:
    before = rules()
    with uplink() as link, TunDevice() as device:
        link.add_route("198.51.100.0/24")
        with DeviceRoutes(device) as routes:
            routes.add("0.0.0.0/0")
            assert goes_to("198.51.100.7") == device.name, "nobody can take it out of the tunnel"
            assert goes_to("203.0.113.2") == device.name
        with DeviceRoutes(device, prefer_main=True) as routes:
            routes.add("0.0.0.0/0")
            assert goes_to("198.51.100.7") == "uplink0"
            assert goes_to("192.0.2.7") == "uplink0", "the own link stays in reach"
            assert goes_to("203.0.113.2") == device.name
            assert goes_to("203.0.113.2", mark=MARK) == "uplink0"
    assert rules() == before


@isolated(network=True)
def test_other_bits_of_the_mark_stay() -> None:
    with (
        TunDevice() as device,
        DeviceRoutes(device) as routes,
        socket.socket(type=socket.SOCK_DGRAM) as sock,
    ):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0xCA6C)
        routes.exempt(sock)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == MARK | 0xCA6C
        routes.exempt(sock, False)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == 0xCA6C


@isolated(network=True)
def test_the_path_mtu_is_that_of_the_way_that_the_socket_takes() -> None:
    with (
        uplink() as link,
        TunDevice(mtu=1300) as device,
        DeviceRoutes(device) as routes,
        socket.socket(type=socket.SOCK_DGRAM) as marked,
        socket.socket(type=socket.SOCK_DGRAM) as bound,
    ):
        link.mtu = 1480
        routes.add("0.0.0.0/0")
        routes.exempt(marked)
        bound.setsockopt(socket.SOL_SOCKET, 25, b"uplink0\0")  # SO_BINDTODEVICE
        assert kernel_path_mtu(PEER[4]) == 1300
        assert kernel_path_mtu(PEER[4], marked) == kernel_path_mtu(PEER[4], bound) == 1480


LAN = "192.0.2.0/24"


def policy(destination: str, action: Action = Action.PROTECT, **changes: Any) -> Policy:
    """Return an outbound policy of this host."""
    version = ip_network(destination).version
    selector: dict[str, Any] = {"source": {4: "10.1.0.0/16", 6: "fd00:9::/64"}[version]}
    selector["destination"] = destination
    selector |= {
        name: changes.pop(name) for name in ("source", "protocol", "destination_port") if name in changes
    }
    outer: dict[str, Any] = {"reqid": 1}
    if action is Action.PROTECT:
        outer |= {"source": "192.0.2.1", "destination": PEER[4]}
    return Policy(
        direction=Direction.OUT, selector=TrafficSelector(**selector), action=action, **outer, **changes
    )


@isolated(network=True)
def test_routes_follow_the_policies() -> None:
    before = rules()
    everything, lan = policy("0.0.0.0/0"), policy(LAN, Action.BYPASS)
    with uplink(), TunDevice() as device:
        for version in (4, 6):
            device.add_address(INNER[version])
        with DeviceRoutes(device) as routes:
            routes.follow([everything, lan, policy("fd00:7::/64"), policy("fd00:8::/64", Action.DISCARD)])
            assert goes_to(PEER[4]) == device.name
            assert goes_to(PEER[4], mark=MARK) == "uplink0"
            assert goes_to("192.0.2.7") == "uplink0"
            assert goes_to("fd00:7::7") == goes_to("fd00:8::8") == device.name
            assert goes_to(PEER[6]) == "uplink0"
            with socket.socket(type=socket.SOCK_DGRAM) as sock:
                sock.connect((ANYONE[4], 7))
                assert sock.getsockname()[0] == INNER[4]
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Rtnetlink, "add_throw", _out_of_memory_for("fd00:6::/64"))
                with pytest.raises(NatCompatError, match="no memory"):
                    routes.follow([policy("fd00:5::/64"), policy("fd00:6::/64", Action.BYPASS), policy(LAN)])
            assert goes_to("fd00:5::5") == "uplink0", "whole or not at all"
            assert goes_to("fd00:7::7") == device.name
            assert goes_to("192.0.2.7") == "uplink0"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Rtnetlink, "add_throw", _out_of_memory_for(ANY))
                with pytest.raises(NatCompatError, match="no memory"):
                    routes.follow([lan, policy(ANY, Action.BYPASS)])
            assert goes_to(PEER[4]) == device.name
            with socket.socket(type=socket.SOCK_DGRAM) as sock:
                sock.connect((ANYONE[4], 7))
                assert sock.getsockname()[0] == INNER[4], "as it was"
            routes.follow([everything])
            assert goes_to("192.0.2.7") == device.name
            assert goes_to("fd00:7::7") == "uplink0"
            routes.follow([policy("10.2.0.0/16"), policy("fd00:8::/63", Action.BYPASS)])
            assert goes_to(PEER[4]) == "uplink0"
            assert goes_to("10.2.0.1") == device.name
        assert goes_to("10.2.0.1") == "uplink0"
        netlink = Rtnetlink()
        assert thrown(netlink) == []
        netlink.close()
    assert rules() == before


def forwarded(source: str, destination: str, interface: str) -> str:
    """Return the name of the interface that packets take which came in by another."""
    command = ["ip", "-oneline", "route", "get", destination, "from", source, "iif", interface]
    line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return line.partition(" dev ")[2].split()[0]


@isolated(network=True)
def test_policies_are_for_the_hosts_that_they_name() -> None:
    before = rules()
    with open("/proc/sys/net/ipv4/ip_forward", "w") as file:
        file.write("1")
    with uplink(), TunDevice() as device, DeviceRoutes(device) as routes:

        def ways() -> dict[str, str]:
            return {
                "this host": goes_to(ANYONE[4]),
                "a host behind": forwarded("10.1.7.1", ANYONE[4], "uplink0"),
                "another": forwarded("10.9.9.9", ANYONE[4], "uplink0"),
                "back": forwarded(ANYONE[4], "10.1.7.1", device.name),
            }

        routes.follow([policy(ANY)])
        assert ways() == {
            "this host": "uplink0",
            "a host behind": device.name,
            "another": "uplink0",
            "back": "uplink0",
        }
        device.add_address(INNER[4])
        routes.follow([policy(ANY)])
        with_address = {
            "this host": device.name,
            "a host behind": device.name,
            "another": "uplink0",
            "back": "uplink0",
        }
        assert ways() == with_address
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.connect((ANYONE[4], 7))
            assert sock.getsockname()[0] == INNER[4]
        routes.follow([policy(ANY, source="10.9.0.0/16")])
        assert ways() == {
            "this host": "uplink0",
            "a host behind": "uplink0",
            "another": device.name,
            "back": "uplink0",
        }
        routes.follow([policy(ANY, source="10.9.0.0/16"), policy(ANY)])
        assert ways() == {**dict.fromkeys(with_address, device.name), "back": "uplink0"}
        routes.follow([policy(ANY, source=ANY)])
        assert ways() == dict.fromkeys(with_address, device.name)
        routes.follow([])
        assert rules() == before
        routes.add(ANY, INNER[4], behind=["10.1.0.0/16"])
        assert ways() == with_address
        routes.remove(ANY)
        routes.add(ANY)
        assert ways() == dict.fromkeys(with_address, device.name)
        with pytest.raises(NatCompatError, match="no route"):
            routes.remove(LAN)


ANY = "0.0.0.0/0"
INTO_THE_DEVICE = {
    "a bypass comes first": ([policy(ANY), policy(LAN, Action.BYPASS)], False),
    "for more sources": ([policy(ANY), policy(LAN, Action.BYPASS, source=ANY)], False),
    "for some of the sources": ([policy(ANY), policy(LAN, Action.BYPASS, source="10.1.7.0/24")], True),
    "for other sources": ([policy(ANY), policy(LAN, Action.BYPASS, source="10.7.0.0/16")], True),
    "for one protocol": ([policy(ANY), policy(LAN, Action.BYPASS, protocol=17)], True),
    "comes later": ([policy(ANY, priority=1), policy(LAN, Action.BYPASS, priority=2)], True),
    "comes at once": ([policy(ANY, priority=1), policy(LAN, Action.BYPASS, priority=1)], True),
    "what is discarded comes first": (
        [policy(ANY, Action.DISCARD, priority=1), policy(LAN, Action.BYPASS, priority=2)],
        True,
    ),
    "one port is protected first": (
        [policy(ANY, protocol=6, destination_port=443, priority=1), policy(LAN, Action.BYPASS)],
        True,
    ),
    "a host of it is protected": (
        [policy(ANY), policy(LAN, Action.BYPASS), policy("192.0.2.7/32")],
        True,
    ),
    "another host of it is protected": (
        [policy(ANY), policy(LAN, Action.BYPASS), policy("192.0.2.8/32")],
        False,
    ),
    "the same is protected": ([policy(LAN), policy(LAN, Action.BYPASS, priority=1)], True),
    "nothing is protected": ([policy(LAN, Action.BYPASS)], False),
}


@isolated(network=True)
def test_what_a_policy_may_want_never_passes_by_the_device() -> None:
    with uplink(), TunDevice() as device, DeviceRoutes(device) as routes:
        device.add_address(INNER[4])
        for case, (policies, expected) in INTO_THE_DEVICE.items():
            for order in (policies, policies[::-1]):
                routes.follow(order)
                assert (goes_to("192.0.2.7") == device.name) is expected, case


NETWORKS = st.builds(
    lambda address, length: str(ip_network((address << (32 - length) & 0xFFFF_FFFF, length))),
    st.integers(0, 7),
    st.sampled_from([0, 1, 2, 3]),
)
"""Few and large ones, which overlap."""
POLICIES = st.lists(
    st.builds(
        policy,
        NETWORKS,
        st.sampled_from(Action),
        source=NETWORKS,
        protocol=st.sampled_from([0, 0, 6]),
        priority=st.sampled_from([None, None, 1, 2]),
    ),
    max_size=6,
    unique_by=lambda each: each.selector,
)
QUIETLY = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
ADDRESSES = [number << 29 for number in range(8)]


@QUIETLY
@given(POLICIES)
def test_what_passes_by_the_device_the_policies_bypass(policies: list[Policy]) -> None:
    """Against the database by which packets are sealed, for every kind of packet that it can tell apart."""
    database = PolicyDatabase()
    for each in policies:
        database.add(each, 0)
    routes = PolicyRoutes(policies)
    said = {each: routes.sources(each) for each in routes.destinations()}
    caught = {each for each, found in said.items() if found}
    sources = {source for found in said.values() if found for source in found}
    for destination in ADDRESSES:
        networks = [
            each for each, found in said.items() if found is not None and ip_address(destination) in each
        ]
        chosen = max(networks, key=lambda network: network.prefixlen, default=None)
        for source in ADDRESSES:
            for protocol in (6, 17):
                found = database.look_up(Direction.OUT, Flow(4, protocol, source, destination, 0, 0))
                if found is not None and found.policy.action is not Action.BYPASS:
                    assert chosen in caught, f"{found.policy} wants what goes past"
                    assert any(ip_address(source) in each for each in sources)


@QUIETLY
@given(POLICIES.filter(bool), st.randoms(use_true_random=False))
def test_policies_that_come_and_go_want_the_routes_that_all_at_once_want(
    policies: list[Policy], random: Random
) -> None:
    routes, here = PolicyRoutes(), list[Policy]()
    for each in random.choices(policies, k=3 * len(policies)):
        before = {network: routes.sources(network) for network in routes.destinations()}
        change = here.remove if each in here else here.append
        told = (routes.remove if each in here else routes.add)(each)
        change(each)
        at_once = PolicyRoutes(here)
        after = {network: at_once.sources(network) for network in at_once.destinations()}
        assert {network: routes.sources(network) for network in routes.destinations()} == after
        assert told >= {
            each for each in before.keys() | after.keys() if before.get(each) != after.get(each)
        }, "destinations whose routes are others now were not told"


@isolated(network=True)
def test_one_policy_more_costs_the_same_however_many_there_are() -> None:
    def clients(count: int) -> Iterator[Policy]:
        for number in range(count):
            yield policy(f"10.7.{number >> 8}.{number & 0xFF}/32", source=ANY)
            yield policy(ANY, source=f"10.8.{number >> 8}.{number & 0xFF}/32")

    with open("/proc/sys/net/ipv4/ip_forward", "w") as file:
        file.write("1")
    with uplink(), open_process_ipsec() as ipsec:
        device = ipsec.device
        assert isinstance(device, TunDevice)
        ipsec.add_policy(policy(LAN, Action.BYPASS))
        calls = []
        for each in clients(300):
            with _counting_calls() as counted:
                ipsec.add_policy(each)
            calls.append(counted[0])
        assert goes_to("10.7.1.2") == device.name
        assert forwarded("10.8.1.2", ANYONE[4], "uplink0") == device.name
        assert max(calls[-50:]) < 2 * max(calls[10:60])
        for each in clients(300):
            ipsec.delete_policy(each)
        assert goes_to("10.7.1.2") == "uplink0"
        assert "proto 78" not in rules()


@contextlib.contextmanager
def _counting_calls() -> Iterator[list[int]]:
    """Count the calls of Python functions, which is steadier than a clock."""
    counted = [0]

    def count(_: object, event: str, __: object) -> None:
        counted[0] += event == "call"

    sys.setprofile(count)
    try:
        yield counted
    finally:
        sys.setprofile(None)


def _set(name: str, value: int) -> None:
    with open(f"/proc/sys/net/ipv4/conf/{name}", "w") as file:
        file.write(str(value))


@isolated(network=True)
def test_what_would_keep_the_peer_away_is_named() -> None:
    with TunDevice() as device, DeviceRoutes(device) as routes:
        routes.add("0.0.0.0/0")
        with pytest.raises(NatCompatError, match="there is none to") as caught:
            routes.check_peer(PEER[4])
        assert caught.value.errno == errno.ENETUNREACH
        with uplink():
            routes.check_peer(PEER[4])
            _set("uplink0/rp_filter", 1)
            with pytest.raises(
                NatCompatError, match=r"sysctl -w net\.ipv4\.conf\.uplink0\.rp_filter=2"
            ) as caught:
                routes.check_peer(PEER[4])
            assert caught.value.errno == errno.EHOSTUNREACH
            _set("uplink0/rp_filter", 2)
            routes.check_peer(PEER[4])
            routes.check_peer(PEER[6])  # which no route covers
            assert routes.covers(PEER[4])
            assert not routes.covers(PEER[6])
        device.add_route("0.0.0.0/0")  # somebody does it by hand
        with pytest.raises(NatCompatError, match="would go into natcompat0") as caught:
            routes.check_peer(PEER[4])
        assert caught.value.errno == errno.ELOOP


_OPEN_AND_WAIT = """
from natcompat.esp.device.tun import TunDevice
from natcompat.esp.device.routes import DeviceRoutes, _PAST
from ipaddress import ip_network
import time
devices = [TunDevice(), TunDevice()]
for device, prefer_main in zip(devices, (False, True)):
    routes = DeviceRoutes(device, prefer_main=prefer_main)
    routes.add("0.0.0.0/0")
    routes.add("::/0")
    routes._change({ip_network("192.0.2.0/24"): _PAST})
print("ready", flush=True)
time.sleep(99)
"""


@isolated(network=True)
def test_rules_of_a_killed_process_do_nothing_and_are_removed() -> None:
    before = rules()
    with uplink():
        for how in (signal.SIGTERM, signal.SIGKILL):
            with subprocess.Popen(
                [sys.executable, "-c", _OPEN_AND_WAIT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            ) as process:
                assert process.stdout is not None
                assert process.stdout.readline() == b"ready\n"
                assert rules().count("proto 78") == 6
                assert goes_to(PEER[4]).startswith("natcompat")
                with TunDevice() as device, DeviceRoutes(device) as routes:
                    routes.add("::/0")
                    assert rules().count("proto 78") == 7, "those of a process that lives stay"
                    assert doctor.examine()["tun"]["stale_rules"] == 0
                process.send_signal(how)
            assert [goes_to(PEER[4]), goes_to(PEER[6])] == ["uplink0", "uplink0"]
            assert doctor.examine()["tun"]["stale_rules"] == 6
            assert re.search(r"routing rules +stale +6 of a tunnel that was killed", doctors_report())
            with TunDevice() as device, DeviceRoutes(device) as routes:
                assert rules() == before
                assert thrown(routes._netlink) == []
                routes.add("::/0")
                assert rules().count("proto 78") == 1
            assert rules() == before


@isolated(network=True)
def test_a_device_that_persists_is_taken_over_from_a_killed_process() -> None:
    """It still has the number of its interface, and so the table."""
    before = rules()
    with uplink():
        for persisting in ("natcompat0", "natcompat1"):
            ip("tuntap", "add", "mode", "tun", "name", persisting)
        opening = _OPEN_AND_WAIT.replace("[TunDevice(),", '[TunDevice("natcompat0"),').replace(
            " TunDevice()]", ' TunDevice("natcompat1")]'
        )
        for _ in range(2):
            with subprocess.Popen(
                [sys.executable, "-c", opening], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            ) as process:
                assert process.stdout is not None
                assert process.stdout.readline() == b"ready\n"
                process.kill()
        for persisting in ("natcompat0", "natcompat1"):
            with TunDevice(persisting) as device, DeviceRoutes(device) as routes:
                assert all(table != routes.table for _, _, table in routes._netlink.routes())
                routes.add("0.0.0.0/0")
                assert goes_to(PEER[4]) == persisting
        assert goes_to(PEER[4]) == "uplink0"
    assert rules() == before


@isolated(network=True)
def test_nothing_is_left_of_what_failed_half_way() -> None:
    before = rules()
    with nothing_left(), TunDevice() as device:
        with DeviceRoutes(device) as routes, pytest.raises(ValueError, match="host bits"):
            routes.add("10.1.0.1/8")
        with DeviceRoutes(device) as routes:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Rtnetlink, "add_rule", _out_of_memory)
                with pytest.raises(NatCompatError, match="no memory"):
                    routes.add("0.0.0.0/0")
            routes.add("0.0.0.0/0")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Rtnetlink, "add_rule", _out_of_memory)
            with pytest.raises(NatCompatError, match="no memory"):
                DeviceRoutes(device)
    assert rules() == before


def _out_of_memory(*_: object) -> None:
    raise NatCompatError(errno.ENOMEM, "no memory")


def _out_of_memory_for(network: str) -> Callable[..., None]:
    real = Rtnetlink.add_throw

    def add_throw(self: Rtnetlink, wanted: IPNetwork, *, table: int) -> None:
        if str(wanted) == network:
            _out_of_memory()
        real(self, wanted, table=table)

    return add_throw


def _no_rules(*_: object) -> None:
    raise NatCompatError(errno.EOPNOTSUPP, "Operation not supported")


# --- where outer packets cannot be kept out -------------------------------------------------------


@isolated(network=True)
def test_without_rules_a_route_that_covers_the_peer_is_refused() -> None:
    with uplink(), TunDevice() as device, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rtnetlink, "add_rule", _no_rules)
        with DeviceRoutes(device) as routes, socket.socket(type=socket.SOCK_DGRAM) as sock:
            assert "no rules" in routes.refusal
            assert routes.table == MAIN_TABLE
            with pytest.raises(
                NatCompatError, match=r"covers the peer 203\.0\.113\.2.*Route smaller networks"
            ):
                routes.add("203.0.0.0/8", peers=[PEER[4]])
            with pytest.raises(NatCompatError, match="would loop"):
                routes.follow([policy("10.2.0.0/16"), policy("203.0.0.0/8"), policy(LAN, Action.BYPASS)])
            assert goes_to("10.2.0.1") == "uplink0"
            routes.add("10.2.0.0/16", peers=[PEER[4]])
            routes.exempt(sock)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == 0
            assert goes_to("10.2.0.1") == device.name
            assert goes_to(PEER[4]) == "uplink0"
            routes.check_peer(PEER[4])
            routes.add("203.0.113.0/24")  # whom it covers was not said
            with pytest.raises(NatCompatError, match="Route smaller networks"):
                routes.check_peer(PEER[4])
        assert goes_to("10.2.0.1") == "uplink0"


@isolated(network=True)
def test_without_privilege_the_route_is_refused_and_the_error_names_it() -> None:
    with TunDevice() as device, DeviceRoutes(device) as routes:
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            _drop_capabilities()
            with pytest.raises(NatCompatError, match="CAP_NET_ADMIN") as caught:
                routes.exempt(sock)
            assert caught.value.errno == errno.EPERM
        with pytest.raises(NatCompatError, match="CAP_NET_ADMIN") as caught:
            routes.add("0.0.0.0/0")
        assert caught.value.errno == errno.EPERM
        with pytest.raises(NatCompatError, match="CAP_NET_ADMIN"):
            DeviceRoutes(device)
    assert interfaces() == {"lo"}, "the descriptor is enough to remove it"


@isolated(network=True)
def test_without_privilege_any_more_it_still_ends() -> None:
    """A daemon may have given them up: then the routes go with the interface, and nothing else stays."""
    with open_process_ipsec() as ipsec:
        ipsec.add_policy(policy("10.2.0.0/16"))
        _drop_capabilities()
        with pytest.raises(NatCompatError, match="CAP_NET_ADMIN"):
            ipsec.add_policy(policy("10.3.0.0/16"))
        with pytest.raises(NatCompatError, match="CAP_NET_ADMIN"):
            ipsec.delete_policy(policy("10.2.0.0/16"))
        assert [each.policy for each in ipsec.list_policies()] == [policy("10.2.0.0/16")]
    with pytest.raises(NatCompatError, match="closed"):
        ipsec.list_policies()
    assert interfaces() == {"lo"}


def _drop_capabilities() -> None:
    """Take all capabilities from this process (capset(2))."""
    import ctypes
    import struct

    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, linux/capability.h
    assert libc.capset(header, bytes(24)) == 0, os.strerror(ctypes.get_errno())


@pytest.mark.parametrize(
    ("network", "peers", "loops"),
    [
        ("0.0.0.0/0", ["203.0.113.2"], True),
        ("0.0.0.0/0", ["2001:db8::1"], False),
        ("::/0", ["2001:db8::1"], True),
        ("203.0.113.0/24", ["192.0.2.1", "203.0.113.2"], True),
        ("203.0.113.0/24", ["203.0.114.2"], False),
        ("203.0.113.0/24", ["::ffff:203.0.113.2"], True),
        ("10.0.0.0/8", [], False),
    ],
)
def test_which_routes_cover_a_peer(network: str, peers: list[str], loops: bool) -> None:
    if loops:
        with pytest.raises(NatCompatError, match="would loop") as caught:
            refuse_loop(network, peers)
        assert caught.value.errno == errno.ELOOP
    else:
        refuse_loop(network, peers)
