"""A connection between two hosts of the lab: IKE's socket, SAs and policies at both ends."""

from __future__ import annotations

import dataclasses
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from natcompat.ipsec import (
    Direction,
    Encr,
    Mode,
    Policy,
    SaId,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)
from tests.lab.topology import Host, Network

MARKER = bytes(4)

NAT_ADDRESS = "203.0.113.1"


def key(seed: int) -> bytes:
    return random.Random(seed).randbytes(20)


@dataclasses.dataclass
class Connection:
    """A tunnel (or transport-mode SAs) between an initiator behind the NAT and the responder."""

    initiator: Host
    responder: Host
    sockets: tuple[socket.socket, socket.socket]
    peer: tuple[str, int]
    """Where the responder sees the initiator."""
    mode: Mode
    reqid: int
    ids: dict[str, SaId] = dataclasses.field(default_factory=dict)

    def associations(
        self, generation: int = 0, **changes: Any
    ) -> list[tuple[str, Host, SecurityAssociation]]:
        """Return what an IKE negotiation would have come to."""
        spi = 0x1000 + 0x100 * self.reqid + 2 * generation
        local = {"encapsulation": UDPEncapsulation(local_port=4500, remote_port=4500)}
        remote = {"encapsulation": UDPEncapsulation(local_port=4500, remote_port=self.peer[1])}
        found = []
        for name, host, number, direction in (
            ("initiator in", self.initiator, spi, Direction.IN),
            ("initiator out", self.initiator, spi + 1, Direction.OUT),
            ("responder in", self.responder, spi + 1, Direction.IN),
            ("responder out", self.responder, spi, Direction.OUT),
        ):
            ours = host is self.initiator
            addresses = (host.address, self.responder.address if ours else self.peer[0])
            source, destination = addresses if direction is Direction.OUT else addresses[::-1]
            sa = SecurityAssociation(
                **{
                    "spi": number,
                    "source": source,
                    "destination": destination,
                    "direction": direction,
                    "mode": self.mode,
                    "encryption": Encr.AES_GCM_16,
                    "encryption_key": key(number),
                    "reqid": self.reqid,
                    **(local if ours else remote),
                    **changes,
                }
            )
            found.append((name, host, sa))
        return found

    def add_sas(self, generation: int = 0, **changes: Any) -> None:
        """Install the SAs, inbound ones first."""
        for name, host, sa in sorted(
            self.associations(generation, **changes), key=lambda each: "out" in each[0]
        ):
            self.ids[f"{name} {generation}" if generation else name] = host.ipsec.add_sa(sa)

    def add_policies(self, inner: str = "", peer_inner: str = "", **changes: Any) -> None:
        """Install the policies of a tunnel between two inside addresses."""
        ends = (inner or self.initiator.inner, peer_inner or self.responder.inner)
        outer = (self.initiator.address, self.responder.address)
        for host, local, remote, here, there in (
            (self.initiator, *ends, *outer),
            (self.responder, *ends[::-1], self.responder.address, self.peer[0]),
        ):
            for direction, source, destination, start, end in (
                (Direction.OUT, local, remote, here, there),
                (Direction.IN, remote, local, there, here),
            ):
                host.ipsec.add_policy(
                    Policy(
                        direction=direction,
                        selector=TrafficSelector(source=source, destination=destination),
                        source=start,
                        destination=end,
                        mode=self.mode,
                        reqid=self.reqid,
                        **changes,
                    )
                )

    def packets(self, name: str) -> int:
        """Return how many packets the SA `name` has had."""
        host = self.initiator if name.startswith("initiator") else self.responder
        return host.ipsec.get_sa(self.ids[name]).packets


@contextmanager
def connect(network: Network, initiator: Host, reqid: int, mode: Mode = Mode.TUNNEL) -> Iterator[Connection]:
    """Exchange IKE through the NAT: from then on there is a mapping, and the responder knows it."""
    with initiator.udp() as near, shared_socket(network.responder) as far:
        peer = exchange_ike(near, far, b"IKE_SA_INIT")
        assert peer[0] == NAT_ADDRESS
        assert peer[1] != 4500
        yield Connection(initiator, network.responder, (near, far), peer, mode, reqid)


_shared: dict[str, socket.socket] = {}


@contextmanager
def shared_socket(host: Host) -> Iterator[socket.socket]:
    """Return the one NAT-T socket of a host, open as long as the outermost user needs it."""
    if host.name in _shared:
        yield _shared[host.name]
        return
    with host.udp() as sock:
        _shared[host.name] = sock
        try:
            yield sock
        finally:
            del _shared[host.name]


def exchange_ike(near: socket.socket, far: socket.socket, text: bytes) -> tuple[str, int]:
    """Send an IKE message each way on sockets that carry ESP, too; return the address after the NAT."""
    near.sendto(MARKER + text, ("203.0.113.2", 4500))
    received, peer = far.recvfrom(2048)
    assert received == MARKER + text
    far.sendto(MARKER + text[::-1], peer)
    assert near.recv(2048) == MARKER + text[::-1]
    return peer[0], peer[1]


def transfer(client: Host, server: Host, octets: int, address: str = "10.2.0.1", port: int = 7000) -> int:
    """Send `octets` by TCP and return how many came out at the other end."""
    received = []
    with server.tcp() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((address, port))
        listener.listen()

        def serve() -> None:
            accepted, _ = listener.accept()
            accepted.settimeout(10)
            with accepted:
                while chunk := accepted.recv(65536):
                    received.append(len(chunk))

        thread = threading.Thread(target=serve)
        thread.start()
        with client.tcp() as sender:
            sender.connect((address, port))
            sender.sendall(bytes(octets))
        thread.join(10)
    return sum(received)
