"""Every order of the steps that open a tunnel: IKE leaves in clear, inner packets leave as ESP."""

from __future__ import annotations

import contextlib
import itertools
import os
import select
import socket
import struct
import time
from collections.abc import Callable, Iterator, Sequence

import pytest

from natcompat import NatTEndpoint, open_ipsec, set_nat_t_endpoint
from natcompat.esp.userspace import UserspaceIPsec
from natcompat.ipsec import Direction, Encr, Policy, SecurityAssociation, TrafficSelector, UDPEncapsulation
from tests.support.linux import LINUX, ip, set_up
from tests.support.pairs import MARKER, in_thread
from tests.support.steering import unshare_network
from tests.support.tun import TUN

pytestmark = [LINUX, TUN, pytest.mark.skipif(os.geteuid() != 0, reason="makes network namespaces")]

HOST, PEER, INNER, FAR = "192.168.1.2", "203.0.113.2", "10.1.0.1", "10.2.0.1"
SPI = 0xC0DE0001
IKE = b"\x01" * 28
STEPS = ("endpoint", "open_ipsec", "address", "SA", "policy")
EVERYTHING = TrafficSelector(source="0.0.0.0/0", destination="0.0.0.0/0")


class Wire:
    """The other end of the only link of this network namespace."""

    def __init__(self, stack: contextlib.ExitStack) -> None:
        set_up("lo")
        ip("link", "add", "eth0", "type", "veth", "peer", "name", "wire")
        for end in ("wire", "eth0"):
            ip("link", "set", end, "arp", "off", "up")
        ip("address", "add", f"{HOST}/24", "dev", "eth0")
        ip("route", "add", "default", "via", "192.168.1.1", "dev", "eth0", "onlink")
        self._capture = stack.enter_context(socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, 0))
        self._capture.bind(("wire", 0x0800))
        self._capture.setblocking(False)

    def datagrams(self, count: int, seconds: float = 5) -> list[tuple[str, str, bytes]]:
        """Return source, destination and payload of `count` UDP datagrams, fewer if no more come."""
        seen: list[tuple[str, str, bytes]] = []
        deadline = time.monotonic() + seconds
        while len(seen) < count and (left := deadline - time.monotonic()) > 0:
            if select.select([self._capture], [], [], left)[0]:
                seen += self._read()
        return seen + self._read()

    def _read(self) -> list[tuple[str, str, bytes]]:
        with contextlib.suppress(BlockingIOError):
            packet = self._capture.recv(65535)
            header = (packet[0] & 15) * 4
            addresses = (socket.inet_ntoa(packet[start : start + 4]) for start in (12, 16))
            assert packet[9] == socket.IPPROTO_UDP, f"protocol {packet[9]} left"
            return [(*addresses, packet[header + 8 :])]  # type: ignore[list-item]
        return []


class Tunnel:
    """The steps of a client that opens a tunnel, for all its traffic, to `PEER`."""

    def __init__(self, stack: contextlib.ExitStack, *, bound: bool) -> None:
        self._stack = stack
        self.sock = stack.enter_context(socket.socket(type=socket.SOCK_DGRAM))
        if bound:
            self.sock.bind((HOST, 4500))
        self.ipsec: UserspaceIPsec | None = None
        self.endpoint: NatTEndpoint | None = None
        self._postponed: list[Callable[[UserspaceIPsec], object]] = []

    def take(self, step: str) -> None:
        """Take one step; those that need the object of open_ipsec() are taken as soon as it exists."""
        if step == "endpoint":
            self.endpoint = set_nat_t_endpoint(self.sock, backend="userspace")
        elif step == "open_ipsec":
            self.ipsec = self._stack.enter_context(open_ipsec("userspace"))
            for operation in self._postponed:
                operation(self.ipsec)
        elif self.ipsec is None:
            self._postponed.append(getattr(self, f"add_{step}"))
        else:
            getattr(self, f"add_{step}")(self.ipsec)

    def add_address(self, ipsec: UserspaceIPsec) -> None:
        ipsec.add_address(f"{INNER}/32")

    def add_SA(self, ipsec: UserspaceIPsec) -> None:  # noqa: N802 - the name of the step
        ipsec.add_sa(
            SecurityAssociation(
                spi=SPI,
                source=HOST,
                destination=PEER,
                direction=Direction.OUT,
                encryption=Encr.AES_GCM_16,
                encryption_key=os.urandom(20),
                reqid=1,
                encapsulation=UDPEncapsulation(local_port=4500, remote_port=4500),
            )
        )

    def add_policy(self, ipsec: UserspaceIPsec) -> None:
        ipsec.add_policy(
            Policy(direction=Direction.OUT, selector=EVERYTHING, source=HOST, destination=PEER, reqid=1)
        )


@contextlib.contextmanager
def tunnel(*, bound: bool) -> Iterator[tuple[Tunnel, Wire]]:
    with contextlib.ExitStack() as stack:
        unshare_network()
        wire = Wire(stack)
        yield Tunnel(stack, bound=bound), wire


@pytest.mark.parametrize("bound", [True, False], ids=["bound", "unbound"])
@pytest.mark.parametrize("order", list(itertools.permutations(STEPS)), ids="-".join)
def test_every_order_of_the_steps_gives_the_same_tunnel(order: Sequence[str], bound: bool) -> None:
    def run() -> None:
        with tunnel(bound=bound) as (client, wire):
            for step in order:
                client.take(step)
                if bound and client.endpoint is not None:  # it can send from the first moment on
                    client.sock.sendto(IKE, (PEER, 4500))
                    assert wire.datagrams(1) == [(HOST, PEER, MARKER + IKE)], f"IKE after {step}"
            if not bound:
                client.sock.bind((HOST, 4500))
            check(client, wire)

    in_thread(run)()


def check(client: Tunnel, wire: Wire) -> None:
    """IKE of all objects of the socket leaves in clear, and an inner packet as ESP."""
    with client.sock.dup() as duplicate, socket.socket(fileno=os.dup(client.sock.fileno())) as alias:
        client.sock.sendto(IKE, (PEER, 4500))
        duplicate.sendto(IKE, (PEER, 4500))
        alias.sendto(MARKER + IKE, (PEER, 4500))
        assert wire.datagrams(3) == [(HOST, PEER, MARKER + IKE)] * 3
    with socket.socket(type=socket.SOCK_DGRAM) as application:
        application.bind((INNER, 0))
        application.sendto(b"inner", (FAR, 9))
    [(source, destination, payload)] = wire.datagrams(1)
    assert (source, destination) == (HOST, PEER)
    assert struct.unpack_from("!II", payload) == (SPI, 1), "not the first ESP packet of the SA"
    assert b"inner" not in payload


@pytest.mark.parametrize(
    "order", list(itertools.permutations(("endpoint", "open_ipsec", "policy"))), ids="-".join
)
@pytest.mark.parametrize("implicitly", ["sendto", "connect"])
def test_an_implicit_bind_keeps_ike_out_of_the_policies(order: Sequence[str], implicitly: str) -> None:
    """The kernel chooses the source address of the first send by the exempt route, not by the policy's."""

    def run() -> None:
        with tunnel(bound=False) as (client, wire):
            for step in order:
                client.take(step)
            assert client.ipsec is not None
            client.add_address(client.ipsec)
            if implicitly == "connect":
                client.sock.connect((PEER, 4500))
                client.sock.send(IKE)
            else:
                client.sock.sendto(IKE, (PEER, 4500))
            assert wire.datagrams(1) == [(HOST, PEER, MARKER + IKE)]

    in_thread(run)()
