"""Routes that follow the policies of IPsec."""

from __future__ import annotations

import contextlib
import socket
import sys
from collections.abc import Callable, Iterator
from ipaddress import ip_address, ip_network
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from natcompat.errors import NatCompatError
from natcompat.esp.device.policy_routes import PolicyRoutes
from natcompat.esp.device.routes import MARK, DeviceRoutes
from natcompat.esp.device.rtnetlink import Rtnetlink
from natcompat.esp.device.tun import TunDevice
from natcompat.esp.engine.databases import PolicyDatabase
from natcompat.esp.engine.packet import Flow
from natcompat.esp.userspace import open_process_ipsec
from natcompat.ipsec import Action, Direction, IPNetwork, Policy
from tests.support.linux import LINUX, isolated
from tests.support.routing import (
    ANY,
    ANYONE,
    INNER,
    LAN,
    PEER,
    forwarded,
    goes_to,
    out_of_memory,
    policy,
    rules,
    thrown,
    uplink,
)
from tests.support.tun import TUN

pytestmark = [LINUX, TUN]


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


def _out_of_memory_for(network: str) -> Callable[..., None]:
    real = Rtnetlink.add_throw

    def add_throw(self: Rtnetlink, wanted: IPNetwork, *, table: int) -> None:
        if str(wanted) == network:
            out_of_memory()
        real(self, wanted, table=table)

    return add_throw
