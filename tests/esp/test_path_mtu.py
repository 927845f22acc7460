"""TCP through ESP between two hosts, over paths that are narrower than they seem: it must not stall.

Who carries the packets here does with path MTUs what `natcompat.esp.mtu` says, and nothing else.
"""

from __future__ import annotations

import errno
import os
import select
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import pytest

from natcompat.errors import NatCompatError
from natcompat.esp.discovery import kernel_path_mtu, set_dont_fragment
from natcompat.esp.engine import EspEngine
from natcompat.esp.mtu import PathMtus, TooBigReplies, device_mtu, may_fragment
from natcompat.esp.results import Destination, Dropped, Opened
from natcompat.esp.tun import TunDevice
from natcompat.ipsec import Direction, Encr, Policy, SecurityAssociation, TrafficSelector, UDPEncapsulation
from natcompat.namespaces import INITIATOR, RESPONDER, ROUTER_OUTSIDE, Namespace, Topology
from tests.esp import making
from tests.esp.tunnelling import TUN
from tests.linux_support import LINUX, ip

pytestmark = [LINUX, TUN]

FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
INNER = {"initiator": {4: "10.1.0.1", 6: "fd00:a::1"}, "responder": {4: "10.2.0.1", 6: "fd00:b::1"}}
NETWORK = {
    "initiator": {4: "10.1.0.0/16", 6: "fd00:a::/64"},
    "responder": {4: "10.2.0.0/16", 6: "fd00:b::/64"},
}
SPI = {"initiator": 0x1001, "responder": 0x2002}
PEER_OF = {"initiator": "responder", "responder": "initiator"}


class End:
    """One end of the tunnel; lives in the process of its namespace."""

    def __init__(self, role: str, version: int) -> None:
        peer = PEER_OF[role]
        local, remote = INITIATOR[version], RESPONDER[version]
        if role == "responder":
            local, remote = RESPONDER[version], ROUTER_OUTSIDE[version]
        self.stack = ExitStack()
        self.engine = self.stack.enter_context(EspEngine(timer=False, follow_mapping=True))
        ports = UDPEncapsulation(local_port=4500, remote_port=4500)
        keys = making.keys(Encr.AES_GCM_16, length=20)
        self.out = SecurityAssociation(
            spi=SPI[peer],
            source=local,
            destination=remote,
            direction=Direction.OUT,
            encapsulation=ports,
            reqid=1,
            **keys,
        )
        self.engine.add_sa(self.out)
        self.engine.add_sa(
            SecurityAssociation(
                spi=SPI[role],
                source=remote,
                destination=local,
                direction=Direction.IN,
                encapsulation=ports,
                reqid=1,
                **keys,
            )
        )
        for inner in (4, 6):
            near, far = NETWORK[role][inner], NETWORK[peer][inner]
            for direction, selector, outer in (
                (Direction.OUT, TrafficSelector(source=near, destination=far), (local, remote)),
                (Direction.IN, TrafficSelector(source=far, destination=near), (remote, local)),
            ):
                self.engine.add_policy(
                    Policy(
                        direction=direction, selector=selector, source=outer[0], destination=outer[1], reqid=1
                    )
                )
        self.sock = self.stack.enter_context(socket.socket(FAMILY[version], socket.SOCK_DGRAM))
        self.sock.bind((local, 4500))
        self.sock.setblocking(False)
        self.paths = PathMtus(lambda host: kernel_path_mtu(host, self.sock))
        self.replies = TooBigReplies()
        self.answered = self.fragmented = 0
        self.device = self.stack.enter_context(TunDevice(mtu=device_mtu([self.out], self.paths.of)))
        for inner in (4, 6):
            self.device.add_address(INNER[role][inner])
            self.device.add_route(NETWORK[peer][inner], source=INNER[role][inner])
        self.awake, self.wake = os.pipe()
        self.dont_fragment = False
        self.thread = threading.Thread(target=self.carry)
        self.thread.start()

    def carry(self) -> None:
        while True:
            watched = [self.device.fileno(), self.sock.fileno(), self.awake]
            if self.awake in select.select(watched, [], [])[0]:
                return
            burst = self.device.read_burst()
            for inner, sealed in zip(burst, self.engine.seal_burst(burst), strict=True):
                if not isinstance(sealed, Dropped):
                    self.send(inner, *sealed)
            received = []
            try:
                for _ in range(64):
                    received.append(self.sock.recvfrom(65535))
            except OSError:
                pass
            opened = [each for each in self.engine.open_burst(received) if isinstance(each, Opened)]
            self.device.write_burst([each.inner for each in opened])

    def send(self, inner: bytes, packet: bytes, destination: Destination) -> None:
        try:
            self.send_with(packet, destination, destination.dont_fragment)
        except OSError as error:
            if error.errno != errno.EMSGSIZE:
                return
            largest = self.paths.refused(self.out, len(inner))
            if may_fragment(inner, largest):
                self.fragmented += 1
                self.send_with(packet, destination, False)
            elif (message := self.replies.too_big(inner, largest)) is not None:
                self.answered += 1
                self.device.write_burst([message])

    def send_with(self, packet: bytes, destination: Destination, dont_fragment: bool) -> None:
        set_dont_fragment(self.sock, dont_fragment)
        self.sock.sendto(packet, destination)

    def close(self) -> None:
        os.write(self.wake, b"\0")
        self.thread.join()
        os.close(self.awake)
        os.close(self.wake)
        self.stack.close()


_end: End


def _open(role: str, version: int) -> int:
    """Open the end of this namespace; return the MTU of its device."""
    global _end
    _end = End(role, version)
    return _end.device.mtu


def _count() -> tuple[int, int]:
    return _end.answered, _end.fragmented


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


def transfer(network: Topology, inner: int, client_in: Namespace | None = None, size: int = 1 << 20) -> None:
    """Send `size` bytes each way at once over one TCP connection to the responder."""
    data = os.urandom(size)
    with network.responder.socket(FAMILY[inner], socket.SOCK_STREAM) as listener:
        listener.bind((INNER["responder"][inner], 0))
        listener.listen()
        listener.settimeout(30)
        with (client_in or network.initiator).socket(FAMILY[inner], socket.SOCK_STREAM) as client:
            client.settimeout(30)
            client.connect(listener.getsockname()[:2])
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
        far, gateway = NETWORK["responder"][version], INITIATOR[version]
        ip(f"-{version}", "route", "add", far, "via", gateway, "src", HOST[version])


def _say_that_packets_may_be_long() -> None:
    """Announce the MSS that a host behind this end has, on an Ethernet."""
    for version in (4, 6):
        far = NETWORK["initiator"][version]
        ip(
            f"-{version}",
            "route",
            "change",
            far,
            "dev",
            _end.device.name,
            "advmss",
            str(1500 - 10 * version),
        )


def test_hosts_behind_a_gateway_need_no_clamped_mss() -> None:
    """Both say in their SYN that they take what fits on Ethernet, and learn better from ICMP."""
    with tunnel(4) as (network, _):
        network.router.call(_be_a_host)
        network.initiator.call(_be_a_gateway)
        network.responder.call(_say_that_packets_may_be_long)
        for inner in (4, 6):
            transfer(network, inner, network.router)
        assert network.initiator.call(_count)[0] == 0, "the MTU of the device is enough"
        _narrow(network, 1400)
        for inner in (4, 6):
            transfer(network, inner, network.router)
        assert network.initiator.call(_count)[0] >= 2
