"""The messages of policies and of exempt sockets, byte by byte."""

from __future__ import annotations

import ctypes
import socket
from typing import Any

import pytest

from natcompat.ipsec.policies import Policy
from natcompat.ipsec.selectors import TrafficSelector
from natcompat.ipsec.values import Action, Direction
from natcompat.kernel.pfkey import bypass, flows, rules, spd
from natcompat.kernel.pfkey.dialects import DIALECTS
from tests.kernel.pfkey import layouts
from tests.kernel.pfkey.golden import BOTH, OURS, OURS6, PEER, PEER6
from tests.kernel.pfkey.layouts import (
    FREEBSD,
    LINUX,
    MACOS,
    NETBSD,
    OPENBSD,
    System,
    extension,
)

SELECTOR = TrafficSelector(
    source="10.2.0.0/24", destination="10.1.0.0/16", protocol=17, source_port=1000, destination_port=2000
)


def policy(direction: Direction, **changes: Any) -> Policy:
    source, destination = (OURS, PEER) if direction is Direction.OUT else (PEER, OURS)
    arguments: dict[str, Any] = {
        "direction": direction,
        "selector": SELECTOR,
        "source": source,
        "destination": destination,
        "reqid": 7,
        **changes,
    }
    return Policy(**arguments)


@BOTH
@pytest.mark.parametrize("system", [FREEBSD, NETBSD, MACOS, LINUX], ids=lambda each: each.name)
def test_policies_of_kame_and_linux(system: System, direction: Direction) -> None:
    mine = policy(direction, priority=1000 if system in (FREEBSD, LINUX) else None)
    addresses = system.sockaddr(str(mine.source)) + system.sockaddr(str(mine.destination))
    # the length of a request counts bytes; level 3 is "unique": this reqid
    request = (
        bytes(layouts.sadb_x_ipsecrequest_linux(48, 50, 2, 3, 0, 7))
        if system is LINUX
        else bytes(layouts.sadb_x_ipsecrequest(40, 50, 2, 3, 7))
    )
    number = 1 if direction is Direction.IN else 2
    priority = 1000 if system in (FREEBSD, LINUX) else 0
    dialect = DIALECTS[system.name]
    assert spd.kernel_directions(dialect, mine)[0] == number
    assert bytes(spd.encode_policy(dialect, mine, number).encode()) == layouts.message(
        14,
        0,
        system.address(5, "10.2.0.0", port=1000, proto=17, prefix=24),
        system.address(6, "10.1.0.0", port=2000, proto=17, prefix=16),
        extension(layouts.sadb_x_policy(0, 18, 2, number, 0, 0, priority), request + addresses),
    )


@pytest.mark.parametrize("system", [FREEBSD, NETBSD, MACOS, LINUX], ids=lambda each: each.name)
@pytest.mark.parametrize(
    ("action", "kind"), [(Action.DISCARD, 0), (Action.BYPASS, 1)], ids=["discard", "bypass"]
)
def test_policies_without_ipsec(system: System, action: Action, kind: int) -> None:
    wide = TrafficSelector(source="::/0", destination="::/0")
    mine = policy(Direction.OUT, selector=wide, action=action, source=None, destination=None)
    found = bytes(spd.encode_policy(DIALECTS[system.name], mine, 2).encode())
    priority = 0x2000 + 256 * 8 + 7 if system in (FREEBSD, LINUX) else 0
    assert found == layouts.message(
        14,
        0,
        system.address(5, "::", proto=255),
        system.address(6, "::", proto=255),
        extension(layouts.sadb_x_policy(0, 18, kind, 2, 0, 0, priority)),
    )


def test_a_tunnel_over_ipv6_in_a_policy() -> None:
    """Two socket addresses of 28 bytes back to back, and the whole request in words of 64 bits."""
    mine = policy(Direction.OUT, source=OURS6, destination=PEER6, reqid=0)
    addresses = FREEBSD.sockaddr(OURS6) + FREEBSD.sockaddr(PEER6)
    request = bytes(layouts.sadb_x_ipsecrequest(64, 50, 2, 2, 0)) + addresses
    assert len(request) == 64
    found = bytes(spd.encode_policy(DIALECTS["freebsd"], mine, 2).encode())
    assert found.endswith(request)


@BOTH
def test_flows_of_openbsd(direction: Direction) -> None:
    found = bytes(flows.encode_flow(DIALECTS["openbsd"], policy(direction), 12).encode())
    number = 1 if direction is Direction.IN else 2
    assert found == layouts.message(
        12,
        2,
        extension(layouts.sadb_protocol(0, 20, 3, number)),  # SADB_X_FLOW_TYPE_REQUIRE
        OPENBSD.address(5, OURS),  # ours and the peer's, whatever the direction
        OPENBSD.address(6, PEER),
        OPENBSD.address(21, "10.2.0.0", port=1000),
        OPENBSD.address(17, "255.255.255.0", port=0xFFFF),
        OPENBSD.address(22, "10.1.0.0", port=2000),
        OPENBSD.address(18, "255.255.0.0", port=0xFFFF),
        extension(layouts.sadb_protocol(0, 19, 17)),
    )


@pytest.mark.parametrize(
    ("changes", "kind"),
    [({"action": Action.BYPASS}, 4), ({"action": Action.DISCARD}, 5), ({"optional": True}, 1)],
    ids=["bypass", "discard", "optional"],
)
def test_types_of_flows(changes: dict[str, Any], kind: int) -> None:
    wide = TrafficSelector(source="::/0", destination="::/0")
    found = bytes(
        flows.encode_flow(DIALECTS["openbsd"], policy(Direction.OUT, selector=wide, **changes), 13).encode()
    )
    peers = (OPENBSD.address(5, OURS), OPENBSD.address(6, PEER)) if "optional" in changes else ()
    assert found == layouts.message(
        13,
        2,
        extension(layouts.sadb_protocol(0, 20, kind, 2)),
        *peers,
        *(OPENBSD.address(number, "::") for number in (21, 17, 22, 18)),
    )


@BOTH
def test_rules_of_solaris(direction: Direction) -> None:
    mine = policy(direction, interface_id=3, priority=100)
    inbound = direction is Direction.IN
    # local and remote: the source of what goes out is local, that of what comes in is remote
    local, remote = ("10.1.0.0", 16, 2000), ("10.2.0.0", 24, 1000)
    if not inbound:
        local, remote = remote, local
    addresses = [
        extension(layouts.spd_address(0, kind, 2, prefix), socket.inet_aton(address))
        for kind, (address, prefix, _) in ((4, local), (5, remote))
    ]
    ports = [
        extension(layouts.spd_portrange(0, kind, socket.htons(number), socket.htons(number)))
        for kind, (_, _, number) in ((1, local), (2, remote))
    ]
    attributes = b"".join(
        bytes(layouts.spd_attribute(*each)) for each in ((0x100, 3), (0x101, 2), (1, 0))
    )  # TYPE ipsec, FLAGS apply ESP, END
    common = [
        extension(layouts.spd_rule(0, 7, 0x7FFFFFFF - 100, (1 if inbound else 2) | 4, 0, 0)),
        extension(layouts.sadb_ext(0, 10), b"ip.tun3\0"),
        extension(layouts.spd_proto(0, 3, 17)),
        *addresses,
        *ports,
    ]
    action = extension(layouts.spd_ext_actions(0, 6, 1), attributes)
    dialect = DIALECTS["solaris"]
    assert bytes(rules.encode_rule(dialect, mine, 2).encode(1)) == layouts.message(
        2, 0, *common, action, version=1
    )
    assert bytes(rules.encode_rule(dialect, mine, 3).encode(1)) == layouts.message(3, 0, *common, version=1)


@pytest.mark.parametrize(
    ("name", "version", "expected"),
    [
        ("freebsd", 4, [(0, 21)] * 2),
        ("freebsd", 6, [(41, 28)] * 2),
        ("netbsd", 4, [(0, 22)] * 2),
        ("macos", 6, [(41, 28)] * 2),
        ("linux", 4, [(0, 16)] * 2),
        ("linux", 6, [(41, 34)] * 2),
    ],
)
def test_sockets_are_exempt_by_a_policy(name: str, version: int, expected: list[tuple[int, int]]) -> None:
    found = bypass.options(DIALECTS[name], version)
    assert [each[:2] for each in found] == expected
    # IPSEC_POLICY_BYPASS, out first, so that nothing that is sent goes before
    assert [each[2] for each in found] == [
        extension(layouts.sadb_x_policy(0, 18, 4, direction)) for direction in (2, 1)
    ]


def test_sockets_are_exempt_by_levels_and_by_preference() -> None:
    zero = bytes(ctypes.c_int(0))
    assert bypass.options(DIALECTS["openbsd"], 4) == [(0, number, zero) for number in (20, 21, 22, 29)]
    assert bypass.options(DIALECTS["openbsd"], 6) == [(41, number, zero) for number in (53, 54, 55, 60)]
    never = bytes((ctypes.c_uint32 * 3)(1, 1, 1)) + bytes(4)  # ipsec_req_t
    assert bypass.options(DIALECTS["solaris"], 4) == [(0, 0x22, never)]
    assert bypass.options(DIALECTS["solaris"], 6) == [(41, 0x22, never)]
