"""Policies, expiry and events of `XfrmIPsec` against a real kernel."""

from __future__ import annotations

import asyncio
import dataclasses
import errno
import select
import subprocess
from ipaddress import IPv4Address
from typing import Any

import pytest

from natcompat.ipsec import (
    Action,
    Direction,
    Expire,
    Lifetime,
    Mark,
    Mode,
    Policy,
    TrafficSelector,
)
from natcompat.kernel.xfrm.kernel import XfrmIPsec
from natcompat.kernel.xfrm.netlink import attributes
from natcompat.kernel.xfrm.translate import INFO_END
from tests.lab.making import PORTS, make, refused, tunnel
from tests.lab.test_kernel import _raw
from tests.lab.topology import wait_for

pytestmark = pytest.mark.kernel_esp


@pytest.mark.parametrize(
    "policy",
    [
        tunnel(),
        tunnel(Direction.OUT, optional=True, priority=12, mode=Mode.TRANSPORT, source=None, destination=None),
        tunnel(mark=Mark(value=1, mask=3), interface_id=9),
        tunnel(Direction.OUT, source="2001:db8::1", destination="2001:db8::2"),
        tunnel(mode=Mode.TRANSPORT, source=None, destination=None),
        tunnel(Direction.OUT, action=Action.BYPASS, source=None, destination=None, reqid=0),
        tunnel(action=Action.DISCARD, source=None, destination=None, reqid=0),
        tunnel(
            Direction.OUT,
            selector=TrafficSelector(
                source="fd00::/64", destination="fd01::1", protocol=6, source_port=80, destination_port=8080
            ),
        ),
    ],
    ids=[
        "tunnel",
        "optional",
        "mark and interface",
        "IPv4 in IPv6",
        "transport",
        "bypass",
        "discard",
        "ports",
    ],
)
def test_policies_come_back(ipsec: XfrmIPsec, policy: Policy) -> None:
    ipsec.add_policy(policy)
    found = ipsec.get_policy(policy)
    expected = policy if policy.priority is not None else dataclasses.replace(
        policy, priority=found.policy.priority
    )  # fmt: skip
    assert found.policy == expected
    assert [each.policy for each in ipsec.list_policies()] == [expected]
    assert found.last_used is None
    assert refused(ipsec.add_policy, policy).errno == errno.EEXIST
    ipsec.delete_policy(policy)
    assert ipsec.list_policies() == []
    assert not subprocess.run(
        ["ip", "xfrm", "policy", "list", "nosock"], capture_output=True, check=True
    ).stdout


def test_an_outbound_tunnel_cannot_be_optional(ipsec: XfrmIPsec) -> None:
    error = refused(ipsec.add_policy, tunnel(Direction.OUT, optional=True))
    assert error.errno == errno.EINVAL
    assert "BYPASS" in error.remedy


def test_what_comes_in_may_be_forwarded(ipsec: XfrmIPsec) -> None:
    ipsec.add_policy(tunnel())
    shown = subprocess.run(["ip", "xfrm", "policy"], capture_output=True, text=True, check=True).stdout
    assert shown.count("dir in") == shown.count("dir fwd") == 1
    ipsec.flush_policies()
    ipsec.add_policy(tunnel(mode=Mode.TRANSPORT, source=None, destination=None))
    shown = subprocess.run(["ip", "xfrm", "policy"], capture_output=True, text=True, check=True).stdout
    assert "dir fwd" not in shown


def test_the_more_specific_policy_comes_first(ipsec: XfrmIPsec) -> None:
    selectors = [
        TrafficSelector(source="0.0.0.0/0", destination="0.0.0.0/0"),
        TrafficSelector(source="0.0.0.0/0", destination="0.0.0.0/0", protocol=17),
        TrafficSelector(source="10.0.0.0/8", destination="10.0.0.0/8"),
        TrafficSelector(source="10.0.0.0/8", destination="10.0.0.0/9"),
        TrafficSelector(source="10.0.0.0/8", destination="10.0.0.0/9", protocol=6, destination_port=80),
    ]
    for selector in selectors:
        ipsec.add_policy(tunnel(Direction.OUT, selector=selector))
    priorities = {each.policy.selector: each.policy.priority for each in ipsec.list_policies()}
    ordered = [priorities[selector] or 0 for selector in selectors]
    assert ordered == sorted(ordered, reverse=True)
    assert len(set(ordered)) == len(ordered)


def test_sas_of_others_are_described(ipsec: XfrmIPsec) -> None:
    command = "ip xfrm state add src 192.0.2.1 dst 192.0.2.2 proto ah spi 0x999 auth hmac(sha1) 0x"
    subprocess.run([*command.split()[:-1], "0x" + "07" * 20], check=True)
    (found,) = ipsec.list_sas()
    assert found.association is None
    assert found.description.startswith("AH hmac(sha1)")


def test_hard_and_soft_expiry(ipsec: XfrmIPsec) -> None:
    with ipsec.events() as events:
        sa_id = ipsec.add_sa(make(lifetime=Lifetime(soft_seconds=1, hard_seconds=3)))
        found: list[Any] = []

        def both() -> bool:
            assert select.select([events], [], [], 10)[0]
            found.extend(events.read())
            return len(found) >= 2

        wait_for("both expiries", both)
    assert found == [Expire(sa_id=sa_id, reqid=7, hard=False), Expire(sa_id=sa_id, reqid=7, hard=True)]
    assert ipsec.list_sas() == []


def test_events_can_be_waited_for_in_event_loops(ipsec: XfrmIPsec) -> None:
    async def in_asyncio() -> None:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(events, readable.set)
        ipsec.add_sa(make(lifetime=Lifetime(soft_seconds=1)))
        await asyncio.wait_for(readable.wait(), 10)
        loop.remove_reader(events)

    trio = pytest.importorskip("trio")

    async def in_trio() -> None:
        ipsec.add_sa(make(lifetime=Lifetime(soft_seconds=1)))
        with trio.fail_after(10):
            await trio.lowlevel.wait_readable(events.fileno())

    for in_trio_too in (False, True):
        with ipsec.events() as events:
            if in_trio_too:
                trio.run(in_trio)
            else:
                asyncio.run(in_asyncio())
            assert events.read() == [Expire(sa_id=make().sa_id, reqid=7, hard=False)]
        ipsec.flush_sas()


def test_features(ipsec: XfrmIPsec) -> None:
    features = ipsec.features
    assert (features.mapping_events, features.marks, features.requires_udp_encapsulation) == (
        True,
        True,
        False,
    )
    ipsec.add_sa(make(encapsulation=PORTS, nat_keepalive=20, direction=Direction.OUT))
    kinds = {kind for kind, _, _ in attributes(_raw(ipsec, make().sa_id), INFO_END)}
    assert (33 in kinds) == features.sa_direction
    assert (34 in kinds) == features.kernel_keepalive


def test_flushing_leaves_nothing(ipsec: XfrmIPsec) -> None:
    ipsec.flush_sas()
    ipsec.add_sa(make())
    ipsec.flush_sas()
    ipsec.flush_policies()
    assert ipsec.list_sas() == []
    assert ipsec.list_policies() == []
    assert IPv4Address("127.0.0.1") in ipsec._local
    assert IPv4Address("192.0.2.1") not in ipsec._local
