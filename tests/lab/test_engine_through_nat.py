"""The engine behind a NAT, the kernel's ESP in the open: each opens what the other seals."""

from __future__ import annotations

import contextlib
import struct
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any, NamedTuple

import pytest

from natcompat.contract import NON_ESP_MARKER
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.packet import checksum
from natcompat.esp.engine.results import Dropped, Opened
from natcompat.ipsec import (
    Direction,
    IPsec,
    Mode,
    Policy,
    SaId,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)
from natcompat.testing.ipsec.traffic import udp_packet
from tests.lab.topology import Network, iptables
from tests.support.esp import IN_C, TRANSFORMS, keys

pytestmark = pytest.mark.kernel_esp

REQID = 7
SIZES = (40, 41, 1200, 33, 64)
"""Bytes in the datagrams of a burst."""


class End(NamedTuple):
    """One end, and the world as it sees it."""

    ipsec: IPsec
    outer: tuple[str, str]
    """This end and the other."""
    inner: tuple[str, str]
    """What is behind this end and behind the other; in transport mode the same as `outer`."""
    port: int
    """Of the other."""

    def add_policies(self, mode: Mode) -> None:
        """Protect UDP between the inner addresses."""
        for direction in Direction:
            step = 1 if direction is Direction.OUT else -1
            source, destination = self.inner[::step]
            tunnel: dict[str, Any] = {}
            if mode is Mode.TUNNEL:
                tunnel = dict(zip(("source", "destination"), self.outer[::step], strict=True))
            # of UDP only: neighbour discovery of IPv6 is not for an SA
            selector = TrafficSelector(source=source, destination=destination, protocol=17)
            self.ipsec.add_policy(
                Policy(direction=direction, selector=selector, mode=mode, reqid=REQID, **tunnel)
            )

    def add_sa(self, direction: Direction, spi: int, **changes: Any) -> SaId:
        """Install an SA of this end."""
        source, destination = self.outer[:: 1 if direction is Direction.OUT else -1]
        ports = UDPEncapsulation(local_port=4500, remote_port=self.port)
        return self.ipsec.add_sa(
            SecurityAssociation(
                spi=spi,
                source=ip_address(source),
                destination=ip_address(destination),
                direction=direction,
                encapsulation=ports,
                reqid=REQID,
                **changes,
            )
        )


@contextlib.contextmanager
def nat_of_ipv6(network: Network) -> Iterator[None]:
    """Translate IPv6, too, as long as this lasts."""
    rule = "POSTROUTING -o out -p udp -j MASQUERADE --to-ports 21000-21999".split()  # noqa: SIM905
    tool = iptables().replace("iptables", "ip6tables")
    network.router(tool, "-t", "nat", "-A", *rule)
    try:
        yield
    finally:
        network.router(tool, "-t", "nat", "-D", *rule)


def datagram(packet: bytes) -> tuple[str, str, int, int, bytes]:
    """Return addresses, ports and payload of a packet with a UDP datagram whose checksum is right or none."""
    header, size = (20, 4) if packet[0] >> 4 == 4 else (40, 16)
    addresses = packet[header - 2 * size : header]
    udp = packet[header:]
    source_port, port, length, check = struct.unpack_from("!4H", udp)
    assert length == len(udp)
    if check or header == 40:
        assert checksum(addresses + len(udp).to_bytes(4) + (17).to_bytes(4) + udp) == 0
    ends = str(ip_address(addresses[:size])), str(ip_address(addresses[size:]))
    return (*ends, source_port, port, udp[8:])


@pytest.mark.parametrize(
    ("datapath", "mode"),
    [("python", Mode.TUNNEL), ("python", Mode.TRANSPORT), ("c", Mode.TUNNEL)],
    indirect=["datapath"],
    ids=["python-tunnel", "python-transport", "c-tunnel"],
)
@pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
def test_every_transform_through_the_nat(network: Network, version: int, datapath: str, mode: Mode) -> None:
    near, far = network.initiator, network.responder
    here, there = (near.address, far.address) if version == 4 else (near.address6, far.address6)
    inner = (near.inner, far.inner) if version == 4 else (near.inner6, far.inner6)
    with contextlib.ExitStack() as stack:
        stack.enter_context(nat_of_ipv6(network))
        sock = stack.enter_context(near.udp(here, encap=False))
        peer = stack.enter_context(far.udp(there))
        far.ipsec.bypass(peer)
        sock.sendto(NON_ESP_MARKER + b"IKE", (there, 4500))
        mapped = peer.recvfrom(64)[1][:2]
        assert mapped[0] != here
        assert mapped[1] != 4500

        transport = mode is Mode.TRANSPORT
        engine = stack.enter_context(EspEngine(timer=False))
        ours = End(engine, (here, there), (here, there) if transport else inner, 4500)
        outer = (there, mapped[0])
        theirs = End(far.ipsec, outer, outer if transport else inner[::-1], mapped[1])
        for end in (ours, theirs):
            end.add_policies(mode)
        application = stack.enter_context(far.udp(theirs.inner[0], 7002, encap=False))
        tried = TRANSFORMS if datapath == "python" else IN_C
        cases = [(transforms, esn) for transforms in tried for esn in (False, True)]
        for number, (transforms, esn) in enumerate(cases):
            ids = []
            for spi, way, opposite in (
                (0x1000 + 2 * number, Direction.OUT, Direction.IN),
                (0x1001 + 2 * number, Direction.IN, Direction.OUT),
            ):
                key = keys(*transforms)
                if key["encryption_key"]:  # one key, one SA
                    key["encryption_key"] = spi.to_bytes(4) + key["encryption_key"][4:]
                for end, direction in ((ours, way), (theirs, opposite)):
                    ids.append((end.ipsec, end.add_sa(direction, spi, mode=mode, esn=esn, **key)))
            questions = [bytes((number,)) * size for size in SIZES]
            answers = [bytes((255 - number,)) * size for size in SIZES]
            for sealed in engine.seal_burst(udp_packet(*ours.inner, each) for each in questions):
                assert not isinstance(sealed, Dropped), sealed
                sock.sendto(*sealed)
            for question, answer in zip(questions, answers, strict=True):
                message, source = application.recvfrom(2048)
                assert (message, source[:2]) == (question, (theirs.inner[1], 7001)), transforms
                application.sendto(answer, source)
            arrived = [sock.recvfrom(2048) for _ in answers]
            for opened, answer in zip(engine.open_burst(arrived), answers, strict=True):
                assert isinstance(opened, Opened), (opened, transforms, esn)
                assert datagram(opened.inner) == (*ours.inner[::-1], 7002, 7001, answer)
            assert {ipsec.get_sa(sa_id).packets for ipsec, sa_id in ids} == {len(SIZES)}, transforms
            for ipsec, sa_id in ids:
                ipsec.delete_sa(sa_id)
        assert not engine.counters()
