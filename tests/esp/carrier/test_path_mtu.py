"""TCP through ESP between two hosts, over paths that are narrower than they seem: it must not stall."""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest

from natcompat import set_nat_t_endpoint
from natcompat.commands.verify.namespaces import INITIATOR, RESPONDER, ROUTER_OUTSIDE, Namespace, Topology
from natcompat.errors import NatCompatError
from natcompat.esp.carrier.mtu import device_mtu
from natcompat.esp.carrier.path_mtu import kernel_path_mtu
from natcompat.esp.device.routes import DeviceRoutes
from natcompat.esp.device.tun import TunDevice
from natcompat.esp.userspace import UserspaceIPsec
from natcompat.ipsec import (
    Action,
    Direction,
    Encr,
    Policy,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)
from tests.support import esp as making
from tests.support.linux import LINUX, ip
from tests.support.tun import TUN

pytestmark = [LINUX, TUN]

FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
INNER = {"initiator": {4: "10.1.0.1", 6: "fd00:a::1"}, "responder": {4: "10.2.0.1", 6: "fd00:b::1"}}
NETWORK = {"initiator": {4: "10.1.0.0/16", 6: "fd00:a::/64"}, "responder": {4: "0.0.0.0/0", 6: "::/0"}}
"""What is behind each end. The initiator's default routes lead into the tunnel, and cover its peer."""
SPI = {"initiator": 0x1001, "responder": 0x2002}
PEER_OF = {"initiator": "responder", "responder": "initiator"}


class CountingTun(TunDevice):
    """A TUN device that counts what senders are told."""

    too_big = 0

    def write_burst(self, packets: Sequence[bytes]) -> int:
        for packet in packets:
            header = (packet[9], packet[20]) if packet[0] >> 4 == 4 else (packet[6], packet[40])
            self.too_big += header in ((1, 3), (58, 2))  # destination unreachable, packet too big
        return super().write_burst(packets)


class End:
    """One end of the tunnel; lives in the process of its namespace."""

    def __init__(self, role: str, version: int) -> None:
        peer = PEER_OF[role]
        local, remote = INITIATOR[version], RESPONDER[version]
        if role == "responder":
            local, remote = RESPONDER[version], ROUTER_OUTSIDE[version]
        common: dict[str, Any] = {
            "encapsulation": UDPEncapsulation(local_port=4500, remote_port=4500),
            "reqid": 1,
            **making.keys(Encr.AES_GCM_16, length=20),
        }
        out = SecurityAssociation(
            spi=SPI[peer], source=local, destination=remote, direction=Direction.OUT, **common
        )
        back = SecurityAssociation(
            spi=SPI[role], source=remote, destination=local, direction=Direction.IN, **common
        )
        policies = []
        for inner in (4, 6):
            near, far = NETWORK[role][inner], NETWORK[peer][inner]
            for direction, networks, outer in (
                (Direction.OUT, (near, far), (local, remote)),
                (Direction.IN, (far, near), (remote, local)),
            ):
                selector = TrafficSelector(source=networks[0], destination=networks[1])
                policies.append(
                    Policy(
                        direction=direction, selector=selector, source=outer[0], destination=outer[1], reqid=1
                    )
                )
            # as with any IPsec: else what a gateway says to hosts behind it is protected, too
            selector = TrafficSelector(source=NETWORK[role][inner], destination=NETWORK["initiator"][inner])
            if role == "initiator":
                policies.append(Policy(direction=Direction.OUT, selector=selector, action=Action.BYPASS))
        with ExitStack() as stack:
            self.sock = stack.enter_context(socket.socket(FAMILY[version], socket.SOCK_DGRAM))
            self.sock.bind((local, 4500))
            mtu = device_mtu([out], lambda host: kernel_path_mtu(host, self.sock) or 0)
            self.device = CountingTun(mtu=mtu)
            stack.callback(self.device.close)
            for inner in (4, 6):
                self.device.add_address(INNER[role][inner])
            routes = stack.enter_context(DeviceRoutes(self.device))
            self.table = routes.table
            routes.exempt(self.sock)
            routes.follow(policies)
            routes.check_peer(remote)
            ipsec = stack.enter_context(UserspaceIPsec(self.device, follow_mapping=True))
            stack.callback(set_nat_t_endpoint(self.sock, backend="userspace", esp=ipsec).close)
            for sa in (out, back):
                ipsec.add_sa(sa)
            for policy in policies:
                ipsec.add_policy(policy)
            self.close = stack.pop_all().close


_end: End


def _open(role: str, version: int) -> int:
    """Open the end of this namespace; return the MTU of its device."""
    global _end
    _end = End(role, version)
    return _end.device.mtu


def _count() -> tuple[int, int]:
    """Return how often senders were told, and how many outer packets were fragmented."""
    return _end.device.too_big, _fragmented()


def _fragmented() -> int:
    with open("/proc/self/net/snmp") as file:
        names, values = (line.split() for line in file if line.startswith("Ip:"))
    count = int(values[names.index("FragOKs")])
    with open("/proc/self/net/snmp6") as file:
        return count + sum(int(line.split()[1]) for line in file if line.startswith("Ip6FragOKs"))


def _close() -> None:
    _end.close()


def _set_mtu(name: str, mtu: int) -> None:
    from pyroute2 import IPRoute

    with IPRoute() as route:
        route.link("set", index=route.link_lookup(ifname=name)[0], mtu=mtu)


def _narrow(network: Topology, mtu: int) -> None:
    """Make the link between router and responder narrow."""
    network.router.call(_set_mtu, "outside", mtu)
    network.responder.call(_set_mtu, "uplink", mtu)


@contextmanager
def tunnel(version: int) -> Iterator[tuple[Topology, int]]:
    """A tunnel over IPv`version` that was set up before the path became narrow."""
    try:
        network = Topology()
    except NatCompatError as error:
        pytest.skip(f"no network: {error}")
    with network, ExitStack() as ends:
        mtus = set()
        for namespace in (network.responder, network.initiator):
            mtus.add(namespace.call(_open, namespace.name, version))
            ends.callback(namespace.call, _close)
        assert len(mtus) == 1
        yield network, mtus.pop()


def transfer(network: Topology, inner: int, client_in: Namespace | None = None, size: int = 1 << 20) -> int:
    """Send `size` bytes each way at once by a TCP connection to the responder; return the first MSS."""
    data = os.urandom(size)
    with network.responder.socket(FAMILY[inner], socket.SOCK_STREAM) as listener:
        listener.bind((INNER["responder"][inner], 0))
        listener.listen()
        listener.settimeout(30)
        with (client_in or network.initiator).socket(FAMILY[inner], socket.SOCK_STREAM) as client:
            client.settimeout(30)
            client.connect(listener.getsockname()[:2])
            maximum_segment = client.getsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG)
            server, _ = listener.accept()
            with server:
                server.settimeout(30)
                got: dict[str, bytes] = {}
                threads = [
                    threading.Thread(target=work)
                    for end, name in ((client, "client"), (server, "server"))
                    for work in (_sender(end, data), _receiver(end, got, name))
                ]
                for thread in threads:
                    thread.start()
                for thread in threads:
                    thread.join()
    assert {name: len(each) for name, each in got.items()} == {"client": size, "server": size}
    assert got == {"client": data, "server": data}
    return maximum_segment


def _sender(end: socket.socket, data: bytes) -> Callable[[], None]:
    def send() -> None:
        try:
            end.sendall(data)
            end.shutdown(socket.SHUT_WR)
        except OSError:
            pass  # what did not come tells

    return send


def _receiver(end: socket.socket, got: dict[str, bytes], name: str) -> Callable[[], None]:
    def receive() -> None:
        pieces = []
        try:
            while piece := end.recv(1 << 16):
                pieces.append(piece)
        except OSError:
            pass
        got[name] = b"".join(pieces)

    return receive


@pytest.mark.parametrize("version", [4, 6], ids=["over v4", "over v6"])
def test_tcp_does_not_stall_when_the_path_becomes_narrow(version: int) -> None:
    with tunnel(version) as (network, mtu):
        assert mtu == {4: 1438, 6: 1418}[version]
        for inner in (4, 6):
            transfer(network, inner)
        assert network.initiator.call(_count) == network.responder.call(_count) == (0, 0)
        _narrow(network, 1400)
        for inner in (4, 6):
            transfer(network, inner)
        assert network.initiator.call(_count)[0] >= 2, "learnt from the router's ICMP"
        assert network.responder.call(_count)[0] >= 2, "learnt from the own link"
        assert network.initiator.call(_count)[1] == network.responder.call(_count)[1] == 0
        _narrow(network, 1290 if version == 4 else 1280)
        for inner in (4, 6):
            transfer(network, inner)
        # IPv6 packets of 1280 bytes pass in fragments, and IPv4 senders go further down
        assert network.initiator.call(_count)[1] > 0
        assert network.responder.call(_count)[1] > 0


HOST = {4: "10.1.7.1", 6: "fd00:a::7:1"}
"""A host behind the initiator, which is its gateway."""


def _be_a_gateway() -> None:
    for setting in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        with open(f"/proc/sys/net/{setting}", "w") as file:
            file.write("1")
    for version in (4, 6):
        ip(f"-{version}", "route", "add", HOST[version], "dev", "uplink")


def _be_a_host() -> None:
    for version in (4, 6):
        ip(
            f"-{version}",
            "address",
            "add",
            HOST[version],
            "dev",
            "inside",
            *(["nodad"] if version == 6 else []),
        )
        far, gateway = INNER["responder"][version], INITIATOR[version]
        ip(f"-{version}", "route", "add", far, "via", gateway, "src", HOST[version])


def _say_that_packets_may_be_long() -> None:
    """Announce the MSS that a host behind this end has, on an Ethernet."""
    for version in (4, 6):
        route = [NETWORK["initiator"][version], "dev", _end.device.name, "table", str(_end.table)]
        ip(f"-{version}", "route", "change", *route, "advmss", str(1500 - 10 * version))


def test_hosts_behind_a_gateway_need_no_clamped_mss() -> None:
    """Both say in their SYN that they take what fits on Ethernet, and learn better from ICMP."""
    with tunnel(4) as (network, _):
        network.router.call(_be_a_host)
        network.initiator.call(_be_a_gateway)
        network.responder.call(_say_that_packets_may_be_long)
        for inner in (4, 6):
            assert transfer(network, inner, network.router) > 1400
        assert network.initiator.call(_count)[0] == 0, "the MTU of the device is enough"
        _narrow(network, 1400)
        for inner in (4, 6):
            transfer(network, inner, network.router)
        assert network.initiator.call(_count)[0] >= 2
