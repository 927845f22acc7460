"""A tunnel by the verbs of `natcompat.ipsec` alone: through the kernel, NAT changes and rekeys.

    kernel_tunnel.py responder 203.0.113.2 10.2.0.1
    kernel_tunnel.py initiator 192.168.1.2 10.1.0.1 203.0.113.2 10.2.0.1

The arguments are the own outer and inner address, and for the initiator those of the responder. The initiator
may be behind a NAT. Each end takes root and a kernel with ESP (`natcompat doctor` says so). Lines on standard
input are commands: ``rekey``, ``quit``. In place of IKE there is one message with SPIs and keys IN THE CLEAR:
this shows how to use `natcompat.ipsec`, and protects nothing. client.py does the same with `natcompat.ike`.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
from typing import Any

from natcompat import open_ipsec, set_nat_t_endpoint
from natcompat.ipsec import (
    Acquire,
    Direction,
    Encr,
    EventsLost,
    Expire,
    IPsec,
    Lifetime,
    MappingChange,
    Policy,
    SaId,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)

PORT = 4500
REQID = 7


class Tunnel:
    """One end of a tunnel: its policies, its SAs, and the peer's address as IKE sees it."""

    def __init__(self, ipsec: IPsec, sock: socket.socket, own: str, inside: str) -> None:
        self.ipsec, self.sock, self.own, self.inside = ipsec, sock, own, inside
        self.peer: tuple[str, int] = ("", 0)
        self.policies: list[Policy] = []
        self.generations: list[dict[Direction, SaId]] = []
        self.offered: dict[str, Any] = {}

    def add_policies(self, peer_inside: str) -> None:
        """Protect everything between the inner addresses: from now on nothing goes in the clear."""
        for direction, inner, outer in (
            (Direction.OUT, (self.inside, peer_inside), (self.own, self.peer[0])),
            (Direction.IN, (peer_inside, self.inside), (self.peer[0], self.own)),
        ):
            policy = Policy(
                direction=direction,
                selector=TrafficSelector(source=inner[0], destination=inner[1]),
                source=outer[0],
                destination=outer[1],
                reqid=REQID,
            )
            self.ipsec.add_policy(policy)
            self.policies.append(policy)

    def add_sa(self, direction: Direction, spi: int, key: bytes) -> None:
        """Install one SA of the newest generation."""
        ends = (self.peer[0], self.own) if direction is Direction.IN else (self.own, self.peer[0])
        sa = SecurityAssociation(
            spi=spi,
            source=ends[0],
            destination=ends[1],
            direction=direction,
            encryption=Encr.AES_GCM_16,
            encryption_key=key,
            encapsulation=UDPEncapsulation(local_port=PORT, remote_port=self.peer[1]),
            lifetime=Lifetime(soft_seconds=3000, hard_seconds=3600),
            reqid=REQID,
            nat_keepalive=20 if direction is Direction.OUT else None,
        )
        self.generations[-1][direction] = self.ipsec.add_sa(sa)

    def offer(self) -> None:
        """Start a generation of SAs: reserve an SPI, choose keys, and send both to the responder."""
        spi = self.ipsec.allocate_spi(self.peer[0], self.own, reqid=REQID)
        keys = [os.urandom(20).hex(), os.urandom(20).hex()]
        self.offered = {"spi": spi, "keys": keys, "inside": self.inside}
        self.sock.sendto(json.dumps(self.offered).encode(), self.peer)

    def message(self, data: bytes, source: tuple[str, int]) -> None:
        """Handle the stand-in for an IKE message: an offer (at the responder), an answer, or "delete"."""
        message: dict[str, Any] = json.loads(data)
        if "delete" in message:
            self.delete_oldest()
            return
        answer = "answer" in message
        if not answer and not self.policies:
            self.peer = source
            self.add_policies(message["inside"])
        self.generations.append({})
        to_initiator, to_responder = map(bytes.fromhex, (self.offered if answer else message)["keys"])
        # Inbound first: no end sends on an SA before the other end can receive on it.
        if answer:
            self.add_sa(Direction.IN, self.offered["spi"], to_initiator)
            self.add_sa(Direction.OUT, message["answer"], to_responder)
            print("tunnel is up", flush=True)
            if len(self.generations) > 1:  # the new SAs carry the traffic now: the old ones may go
                self.sock.sendto(b'{"delete": true}', self.peer)
                self.delete_oldest()
        else:
            spi = self.ipsec.allocate_spi(self.peer[0], self.own, reqid=REQID)
            self.add_sa(Direction.IN, spi, to_responder)
            self.sock.sendto(json.dumps({"answer": spi}).encode(), source)
            self.add_sa(Direction.OUT, message["spi"], to_initiator)
            print("tunnel is up", flush=True)

    def event(self, event: object) -> None:
        """Handle an event of the kernel as a daemon does."""
        if isinstance(event, MappingChange):
            # The kernel has authenticated a packet from there. A daemon may check more (RFC 7296, 2.23).
            if str(event.new_address) != self.peer[0]:
                print("peer has another address, and so have its policies: begin anew", flush=True)
                return
            self.peer = (self.peer[0], event.new_port)
            encapsulation = UDPEncapsulation(local_port=PORT, remote_port=event.new_port)
            for generation in self.generations:
                for direction, sa_id in generation.items():
                    generation[direction] = self.ipsec.update_sa(sa_id, encapsulation=encapsulation)
            print(f"peer moved to {self.peer[0]} port {self.peer[1]}", flush=True)
        elif isinstance(event, Expire) and event.hard:
            for generation in self.generations:
                for direction in [key for key, sa_id in generation.items() if sa_id == event.sa_id]:
                    del generation[direction]
            print(f"{event.sa_id} has expired", flush=True)
        elif isinstance(event, Expire):
            print(f"time to rekey {event.sa_id}", flush=True)
        elif isinstance(event, Acquire):
            print(f"traffic waits for an SA: {event.selector}", flush=True)
        elif isinstance(event, EventsLost):
            print("some events were lost; what is still due follows", flush=True)

    def delete_oldest(self) -> None:
        """Delete the SAs that have been replaced."""
        for sa_id in self.generations.pop(0).values():
            self.ipsec.delete_sa(sa_id)
        print("old SAs are gone", flush=True)

    def close(self) -> None:
        """Remove SAs, then policies, so that nothing goes in the clear before the end."""
        for generation in self.generations:
            for sa_id in generation.values():
                self.ipsec.delete_sa(sa_id)
        for policy in self.policies:
            self.ipsec.delete_policy(policy)


def main() -> None:
    """Run one end until ``quit``, or the end of standard input."""
    role, own, inside, *responder = sys.argv[1:]
    with open_ipsec("linux") as ipsec, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((own, PORT))
        set_nat_t_endpoint(sock, backend="linux")  # also exempts the socket from the policies
        with ipsec.events() as events:
            tunnel = Tunnel(ipsec, sock, own, inside)
            try:
                print("ready", flush=True)
                if role == "initiator":
                    tunnel.peer = (responder[0], PORT)
                    tunnel.add_policies(responder[1])
                    tunnel.offer()
                loop(tunnel, events.fileno(), events)
            finally:
                tunnel.close()


def loop(tunnel: Tunnel, descriptor: int, events: Any) -> None:
    """Serve IKE, the kernel and the user at once."""
    while True:
        ready, _, _ = select.select([tunnel.sock, descriptor, sys.stdin], [], [])
        if tunnel.sock in ready:  # IKE only: the kernel takes ESP, and keepalives are dropped
            tunnel.message(*tunnel.sock.recvfrom(65535))
        if descriptor in ready:
            for event in events.read():
                tunnel.event(event)
        if sys.stdin in ready:
            command = sys.stdin.readline().strip()
            if command == "rekey":
                tunnel.offer()
            else:
                return


if __name__ == "__main__":
    main()
