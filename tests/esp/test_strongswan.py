"""strongSwan's ESP in user space at the other end: natcompat's engine takes one side's place."""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from natcompat import Verdict, classify
from natcompat.commands.verify.namespaces import INITIATOR, RESPONDER, Topology
from natcompat.errors import NatCompatError
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.packet import checksum
from natcompat.esp.engine.results import Dropped, Opened
from natcompat.ipsec import Usage
from natcompat.ipsec.associations import SecurityAssociation, UDPEncapsulation
from natcompat.ipsec.policies import Policy
from natcompat.ipsec.selectors import TrafficSelector
from natcompat.ipsec.transforms import Encr, Integ, Key
from natcompat.ipsec.values import Direction
from tests.support.esp import IN_C, ip_packet
from tests.support.linux import wait_until
from tests.support.strongswan import Charon, Side, found, lacking, namespace, negotiated

REASON = lacking(libipsec=True)
pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)

INNER = {"initiator": ("10.1.0.1", "fd00:21::1"), "responder": ("10.2.0.1", "fd00:22::1")}

TRANSFORMS: dict[str, tuple[Encr, Integ]] = {
    "aes256gcm16": (Encr.AES_GCM_16, Integ.NONE),
    "aes128-sha256": (Encr.AES_CBC, Integ.HMAC_SHA2_256_128),
    "chacha20poly1305": (Encr.CHACHA20_POLY1305, Integ.NONE),
    "aes192gcm12": (Encr.AES_GCM_12, Integ.NONE),
    "aes128gcm8": (Encr.AES_GCM_8, Integ.NONE),
    "aes256ccm16": (Encr.AES_CCM_16, Integ.NONE),
    "aes128ccm12": (Encr.AES_CCM_12, Integ.NONE),
    "aes128ccm8": (Encr.AES_CCM_8, Integ.NONE),
    "aes256ctr-sha384": (Encr.AES_CTR, Integ.HMAC_SHA2_384_192),
    "aes256-sha512": (Encr.AES_CBC, Integ.HMAC_SHA2_512_256),
    "aes192-sha1": (Encr.AES_CBC, Integ.HMAC_SHA1_96),
    "aes128-aescmac": (Encr.AES_CBC, Integ.AES_CMAC_96),
    "null-sha256": (Encr.NULL, Integ.HMAC_SHA2_256_128),
}
"""All that libipsec has and the engine, too. It lacks AES-GMAC, ESN and transport mode."""


@pytest.fixture(scope="module")
def network() -> Iterator[Topology]:
    try:
        made = Topology()
    except NatCompatError as error:
        pytest.skip(f"no network can be made here: {error}")
    with made:
        yield made


def sides(network: Topology) -> tuple[Side, Side]:
    def side(name: str, address: str) -> Side:
        networks = f"{INNER[name][0]}/32", f"{INNER[name][1]}/128"
        return Side(name, namespace(getattr(network, name)), address, networks)

    return side("initiator", INITIATOR[4]), side("responder", RESPONDER[4])


class Substitute:
    """The engine in the place of a charon: its keys, its port, its inner addresses. The charon is gone."""

    def __init__(self, daemon: Charon, network: Topology, transforms: tuple[Encr, Integ]) -> None:
        initiates = daemon.side.name == "initiator"
        self.inner, self.peer_inner = (INNER[each] for each in sorted(INNER, reverse=not initiates))
        self.peer, child, (_, sent) = daemon.peer(), daemon.child_sa(), daemon.packets()
        daemon.kill()
        self.sock = getattr(network, daemon.side.name).socket(socket.AF_INET)
        self.sock.settimeout(10)
        self.sock.bind((daemon.side.address, 4500))
        self.engine = EspEngine(timer=False)
        for direction, spi in ((Direction.IN, child.inbound_spi), (Direction.OUT, child.outbound_spi)):
            out = direction is Direction.OUT
            whose = 0 if out is initiates else 1
            here, there = (daemon.side.address, *self.inner), (self.peer[0], *self.peer_inner)
            outer, *inner = zip(here, there, strict=True) if out else zip(there, here, strict=True)
            sa = SecurityAssociation(
                spi=spi,
                source=ip_address(outer[0]),
                destination=ip_address(outer[1]),
                direction=direction,
                encryption=transforms[0],
                encryption_key=Key(child.encryption_keys[whose]),
                integrity=transforms[1],
                integrity_key=Key(child.integrity_keys[whose]),
                encapsulation=UDPEncapsulation(local_port=4500, remote_port=self.peer[1]),
                reqid=1,
            )
            # Numbers go on where charon's are; it makes IVs of them, too, but masks them at random.
            self.engine.add_sa(sa, sequence=sent if out else None)
            for source, destination in inner:
                selector = TrafficSelector(source=source, destination=destination)
                self.engine.add_policy(
                    Policy(
                        direction=direction, selector=selector, source=outer[0], destination=outer[1], reqid=1
                    )
                )

    def send(self, inner: bytes) -> None:
        sealed = self.engine.seal(inner)
        assert not isinstance(sealed, Dropped), sealed
        for packet, destination in sealed:
            self.sock.sendto(packet, destination)

    def receive(self) -> bytes:
        """Return the next inner packet; what is not ESP is for an IKE daemon that is gone."""
        while True:
            packet, source = self.sock.recvfrom(65535)
            if classify(packet) is Verdict.ESP:
                opened = self.engine.open(packet, source)
                assert isinstance(opened, Opened), opened
                return opened.inner

    def ping(self, version: int, number: int, size: int) -> None:
        """Ask the peer's host behind strongSwan, and wait for its answer."""
        near, far = (each[version == 6] for each in (self.inner, self.peer_inner))
        payload = bytes((number,)) * size
        self.send(echo(near, far, 8 if version == 4 else 128, number, payload))
        while (answer := self.receive())[-len(payload) :] != payload:
            pass  # router solicitations and the like
        assert (answer[12:20] if version == 4 else answer[8:40]) == packed(far, near)
        assert message(answer)[0] == (0 if version == 4 else 129)

    def answer_until_end_of(self, process: subprocess.Popen[str]) -> str:
        """Answer pings until `process` ends; return what it says."""
        assert process.stdout is not None
        said = ""
        with process.stdout:
            while True:
                readable = select.select([self.sock, process.stdout], [], [], 30)[0]
                assert readable, said
                if self.sock in readable:
                    self.answer(self.receive())
                if process.stdout in readable:
                    line = process.stdout.readline()
                    if not line:
                        process.wait(10)
                        return said
                    said += line

    def answer(self, packet: bytes) -> None:
        """Answer `packet` if it is a ping."""
        version, icmp = packet[0] >> 4, message(packet)
        if icmp[0] == (8 if version == 4 else 128):
            near, far = (each[version == 6] for each in (self.inner, self.peer_inner))
            reply = 0 if version == 4 else 129
            self.send(echo(near, far, reply, int.from_bytes(icmp[6:8]), icmp[8:], icmp[4:6]))

    def usage(self, direction: Direction) -> Usage:
        """Return what the SA of one direction has done."""
        (usage,) = [
            each.usage
            for each in self.engine.list_sas()
            if each.association is not None and each.association.direction is direction
        ]
        return usage

    def close(self) -> None:
        self.sock.close()
        self.engine.close()


def packed(*addresses: str) -> bytes:
    """Return addresses as a header has them."""
    return b"".join(ip_address(each).packed for each in addresses)


def message(packet: bytes) -> bytes:
    """Return the ICMP message in a packet without options."""
    return packet[20 if packet[0] >> 4 == 4 else 40 :]


def echo(source: str, destination: str, kind: int, number: int, payload: bytes, name: bytes = b"nc") -> bytes:
    """Return a ping or the answer to one: `kind` is its ICMP type."""
    rest = name + number.to_bytes(2) + payload
    version = ip_address(source).version
    pseudo = b""
    if version == 6:
        pseudo = packed(source, destination) + (4 + len(rest)).to_bytes(4) + (58).to_bytes(4)
    check = checksum(pseudo + bytes((kind, 0, 0, 0)) + rest)
    icmp = bytes((kind, 0)) + check.to_bytes(2) + rest
    return ip_packet(source, destination, icmp, protocol=1 if version == 4 else 58)


CASES = [
    (datapath, proposal, replaced)
    for datapath in ("python", "c")
    for number, proposal in enumerate(TRANSFORMS)
    for replaced in ("initiator", "responder")
    if (number < 3 or (replaced == "responder") == number % 2)
    and (datapath == "python" or TRANSFORMS[proposal] in IN_C)
]
"""The three that IKE daemons propose most: both ways round; the others: one or the other."""


@pytest.mark.parametrize(
    ("datapath", "proposal", "replaced"), CASES, indirect=["datapath"], ids=map("-".join, CASES)
)
@pytest.mark.usefixtures("datapath")
def test_the_engine_takes_the_place_of_one_strongswan(
    network: Topology, proposal: str, replaced: str
) -> None:
    ends = sides(network)
    with negotiated(*ends, f"{proposal}-x25519", libipsec=True) as daemons:
        first, other = daemons if replaced == "initiator" else daemons[::-1]
        first.run("ping", "-c", "2", "-i", "0.05", "-w", "10", INNER[other.side.name][0])
        here = Substitute(first, network, TRANSFORMS[proposal])
        with contextlib.closing(here):
            _, sent = other.packets()
            for version, number, size in ((4, 1, 56), (6, 2, 56), (4, 3, 1300), (6, 4, 1), (4, 5, 0)):
                here.ping(version, number, size or 3)
            for address in here.inner:
                # by -w it waits for the answers, and asks again as long as one is missing
                command = ["ping", "-c", "3", "-i", "0.05", "-w", "10", "-s", "1200", address]
                said = here.answer_until_end_of(other.start(*command))
                assert int(found("([0-9]+) received", said)) >= 3, said
            while here.usage(Direction.IN).packets < other.packets()[1] - sent:
                here.receive()
            assert not here.engine.counters(), "strongSwan has sent nothing that had to be dropped"
            wait_until(
                lambda: other.packets()[0] == here.usage(Direction.OUT).sequence, "it takes all there are"
            )
