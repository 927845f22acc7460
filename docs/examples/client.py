"""A client with a virtual address and a default route through its gateway, on any backend.

    client.py gateway 203.0.113.2
    client.py client 192.168.1.2 203.0.113.2

The first address is the program's own. The client may be behind a NAT. Both take root: SAs go to the kernel
where it has ESP, else this process does ESP and makes a TUN interface; the program is the same. Lines on
standard input are commands: ``rekey``, ``quit``. Where IKE would be there are messages in JSON that say the
keys IN THE CLEAR: this shows how to use `natcompat.ike`, and protects nothing.
"""

from __future__ import annotations

import json
import os
import select
import socket
import sys
import time
from typing import Any

from natcompat import open_ipsec, set_nat_t_endpoint
from natcompat.ike import ChildSa, IkeSelector, NatDetection
from natcompat.ipsec import Encr, Expire, IPsec, Lifetime, MappingChange

PORT = 4500
VIRTUAL = "10.9.0.10"
LINGER = 2.0  # seconds that an old inbound SA stays: ESP under way may come after the IKE message about it
IKE_SPI = bytes(range(8))  # IKE has one of each peer, in its header


class Peer:
    """The common part of both ends: the socket, IPsec, and the CHILD_SA with its predecessor."""

    def __init__(self, ipsec: IPsec, sock: socket.socket, own: str, peer: str) -> None:
        self.ipsec, self.sock = ipsec, sock
        self.own, self.peer = (own, PORT), (peer, PORT)
        self.force = ipsec.features.requires_udp_encapsulation
        self.nat: NatDetection | None = None
        self.child: ChildSa | None = None
        self.old: ChildSa | None = None
        self.spi = 0
        self.retired: list[tuple[float, ChildSa]] = []

    def send(self, **message: Any) -> None:
        """Send the stand-in for an IKE message."""
        self.sock.sendto(json.dumps(message).encode(), self.peer)

    def hashes(self) -> list[str]:
        """Return the data of the two notifications of NAT detection."""
        hashes = NatDetection.hashes(IKE_SPI, IKE_SPI, local=self.own, remote=self.peer, force=self.force)
        return [value.hex() for value in hashes]

    def detect_nat(self, hashes: list[str]) -> None:
        """Find out from the peer's hashes whether there is a NAT."""
        source, destination = map(bytes.fromhex, hashes)
        self.nat = NatDetection.received(
            IKE_SPI,
            IKE_SPI,
            local=self.own,
            remote=self.peer,
            sources=[source],
            destinations=[destination],
            forced=self.force,
        )

    def reserve_spi(self) -> str:
        """Reserve the SPI of an inbound SA, and return it as IKE sends it."""
        self.spi = self.ipsec.allocate_spi(self.peer[0], self.own[0], reqid=7)
        return self.spi.to_bytes(4).hex()

    def install(self, message: dict[str, Any], *, client: bool, rekeys: ChildSa | None = None) -> ChildSa:
        """Install a CHILD_SA. The client begins every exchange, so it is the initiator of each."""
        ends = IkeSelector.of(VIRTUAL), IkeSelector.of("0.0.0.0/0")
        return ChildSa.install(
            self.ipsec,
            local=self.own,
            remote=self.peer,
            spi_in=self.spi,
            spi_out=bytes.fromhex(message["spi"]),
            encryption=Encr.AES_GCM_16,
            keymat=bytes.fromhex(message["keymat"]),
            initiator=client,
            selectors=[ends if client else ends[::-1]],
            reqid=7,
            nat=self.nat or False,
            lifetime=Lifetime(soft_seconds=3000, hard_seconds=3600),
            keepalive=20,
            rekeys=rekeys,
        )

    def event(self, event: object) -> None:
        """Handle an event of IPsec as a daemon does."""
        if isinstance(event, MappingChange) and self.child is not None:
            # The packet was authentic. A daemon may check more (RFC 7296, 2.23).
            self.peer = (str(event.new_address), event.new_port)
            self.child.move(remote=self.peer)
            print(f"peer moved to {self.peer[0]} port {self.peer[1]}", flush=True)
        elif isinstance(event, Expire) and not event.hard:
            print(f"time to rekey {event.sa_id}", flush=True)

    def retire_old(self) -> None:
        """Let the old CHILD_SA go on receiving for a while, and delete it then."""
        if self.old is not None:
            self.retired.append((time.monotonic() + LINGER, self.old))
            self.old = None
            print("rekeyed", flush=True)

    def delete_retired(self) -> None:
        """Delete the old CHILD_SAs whose time has come."""
        while self.retired and self.retired[0][0] <= time.monotonic():
            self.retired.pop(0)[1].delete()

    def close(self) -> None:
        """Remove the SAs and the policies. The address goes with IPsec."""
        for child in (*(child for _, child in self.retired), self.old, self.child):
            if child is not None:
                child.delete()


class Client(Peer):
    """The end that gets an address and sends everything through the tunnel."""

    def start(self) -> None:
        """Send the stand-in for IKE_SA_INIT and IKE_AUTH."""
        self.send(kind="connect", hashes=self.hashes(), spi=self.reserve_spi())

    def rekey(self) -> None:
        """Send the stand-in for CREATE_CHILD_SA."""
        self.send(kind="rekey", spi=self.reserve_spi())

    def message(self, message: dict[str, Any], source: tuple[str, int]) -> None:
        """Handle an answer of the gateway."""
        if message["kind"] == "connected":
            self.detect_nat(message["hashes"])
            self.ipsec.add_address(message["virtual"])
            self.child = self.install(message, client=True)
            print(f"connected as {message['virtual']}", flush=True)
        elif message["kind"] == "rekeyed" and self.child is not None:
            self.old, self.child = self.child, self.install(message, client=True, rekeys=self.child)
            self.old.rekeyed_by(self.child)
            self.send(kind="delete")
        elif message["kind"] == "deleted":
            self.retire_old()


class Gateway(Peer):
    """The end that gives the client its address."""

    def message(self, message: dict[str, Any], source: tuple[str, int]) -> None:
        """Handle a request of the client."""
        if message["kind"] == "connect":
            self.peer = source[:2]
            self.detect_nat(message["hashes"])
            answer = {"spi": self.reserve_spi(), "keymat": os.urandom(2 * 36).hex()}
            self.child = self.install({**answer, "spi": message["spi"]}, client=False)
            self.send(kind="connected", hashes=self.hashes(), virtual=VIRTUAL, **answer)
            print("client is connected", flush=True)
        elif message["kind"] == "rekey" and self.child is not None:
            answer = {"spi": self.reserve_spi(), "keymat": os.urandom(2 * 36).hex()}
            new = self.install({**answer, "spi": message["spi"]}, client=False, rekeys=self.child)
            self.old, self.child = self.child, new
            self.send(kind="rekeyed", **answer)
        elif message["kind"] == "delete" and self.old is not None and self.child is not None:
            self.old.rekeyed_by(self.child)  # from now on this end sends on the new SA, too
            self.send(kind="deleted")
            self.retire_old()


def main() -> None:
    """Run one end until ``quit``, or the end of standard input."""
    role, own, *gateway = sys.argv[1:]
    with open_ipsec() as ipsec, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind((own, PORT))
        set_nat_t_endpoint(sock)  # also exempts the socket from the policies
        end = Client(ipsec, sock, own, gateway[0]) if role == "client" else Gateway(ipsec, sock, own, "")
        with ipsec.events() as events:
            try:
                print("ready", flush=True)
                if isinstance(end, Client):
                    end.start()
                loop(end, events.fileno(), events)
            finally:
                end.close()


def loop(end: Client | Gateway, descriptor: int, events: Any) -> None:
    """Serve IKE, IPsec and the user at once."""
    while True:
        ready, _, _ = select.select([end.sock, descriptor, sys.stdin], [], [], LINGER / 4)
        end.delete_retired()
        if end.sock in ready:
            data, source = end.sock.recvfrom(65535)
            end.message(json.loads(data), source)
        if descriptor in ready:
            for event in events.read():
                end.event(event)
        if sys.stdin in ready:
            command = sys.stdin.readline().strip()
            if command == "rekey" and isinstance(end, Client):
                end.rekey()
            elif command in ("", "quit"):
                return


if __name__ == "__main__":
    main()
