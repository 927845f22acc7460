"""What network managers, suspend and DHCP do to a host, by the same operations on links and rules."""

from __future__ import annotations

import socket
from dataclasses import replace
from ipaddress import ip_address

import pytest

from natcompat.esp.engine.engine import EspEngine
from natcompat.ipsec import Direction
from tests.support.linux import LINUX, isolated
from tests.support.tun import TUN
from tests.support.wire import (
    EVERYTHING,
    FAR,
    GATEWAY,
    NEAR,
    PEER,
    STRANGER,
    US,
    datagram,
    outbound_sa,
    policy,
    protected,
    send,
    sh,
    wait_for,
)

pytestmark = [LINUX, TUN]

EVENTS = {
    # ManageForeignRoutingPolicyRules=, ManageForeignRoutes=: what it did not make goes
    "systemd-networkd reconfigures": [
        "ip rule flush; ip rule add priority 32766 lookup main",
        "ip route flush table all proto 78 || true",
        "ip addr flush dev natcompat0 || true",
    ],
    # unmanaged devices are left alone; `nmcli networking off` and `on` take the uplink away and bring it back
    "NetworkManager off and on": [
        "ip link set eth0 down",
        "ip addr flush dev eth0",
        f"ip link set eth0 up; ip addr add {US[4]}/24 dev eth0",
        f"ip route replace default via {GATEWAY[4]} dev eth0 onlink",
    ],
    "suspend and resume": [
        "ip link set natcompat0 down; ip link set eth0 down",
        "ip rule flush; ip rule add priority 32766 lookup main",
        "ip link set eth0 up; ip link set natcompat0 up",
        f"ip route replace default via {GATEWAY[4]} dev eth0 onlink",
    ],
    "DHCP renews": [
        f"ip addr change {US[4]}/24 dev eth0 valid_lft 3600 preferred_lft 3600",
        f"ip route replace default via {GATEWAY[4]} dev eth0 onlink proto dhcp",
        f"ip route replace 10.2.0.0/24 via {GATEWAY[4]} dev eth0 onlink proto dhcp",
    ],
    "the device is managed, too": [
        "ip link set natcompat0 mtu 1300",
        "ip addr add 169.254.7.7/16 dev natcompat0",
        "ip link set natcompat0 down",
    ],
}


@pytest.mark.parametrize("event", EVENTS)
@isolated(network=True)
def test_nothing_leaves_in_the_clear_and_the_tunnel_goes_on(event: str) -> None:
    with protected(address=False) as (host, ipsec):
        sh(f"ip addr add {NEAR[4]} dev lo")
        ipsec.add_policy(policy())
        for command in EVENTS[event]:
            sh(command)
            for device in ("", "eth0"):
                send(FAR[4], NEAR[4], device=device, count=2)

        def works() -> bool:
            send(FAR[4], NEAR[4], count=1)
            return any(seen.destination == PEER for seen in host.left(0.02))

        assert host.clear(FAR[4], seconds=0.05) == []
        wait_for(works, "sealed again", 3)
        send(STRANGER[4], US[4], count=1)
        packets = host.left()
        assert [seen.destination for seen in packets if seen.destination in (FAR[4], STRANGER[4])] == [
            STRANGER[4]
        ]


@isolated(network=True)
def test_a_policy_for_everything_lets_esp_in_and_what_it_holds() -> None:
    with protected(address=False) as (host, ipsec), socket.socket(type=socket.SOCK_DGRAM) as local:
        local.bind((US[4], 7777))
        local.settimeout(2)
        inbound = replace(
            outbound_sa(), source=ip_address(PEER), destination=ip_address(US[4]), direction=Direction.IN
        )
        ipsec.add_sa(inbound)
        for direction in Direction:
            ipsec.add_policy(policy(direction, near=EVERYTHING[4], far=EVERYTHING[4]))
        with EspEngine() as peer:
            peer.add_sa(replace(inbound, direction=Direction.OUT))
            peer.add_policy(
                replace(policy(Direction.IN, near=EVERYTHING[4], far=EVERYTHING[4]), direction=Direction.OUT)
            )
            sealed = peer.seal(datagram(STRANGER[4], US[4], 7777, b"through the tunnel"))
        assert isinstance(sealed, list)
        host.arrive(datagram(STRANGER[4], US[4], 7777))
        host.arrive(datagram(PEER, US[4], 4500, sealed[0][0], source_port=4500))
        assert local.recv(100) == b"through the tunnel"
        assert ipsec.host_counters()["blocked-input"] == 1
        host.left(0.05)
        local.sendto(b"an answer", (STRANGER[4], 9))
        assert {seen.destination for seen in host.left()} == {PEER}
