"""`ChildSa` over the kernel's IPsec: through a NAT, rekeyed under load, moved, deleted, and undone whole."""

from __future__ import annotations

import errno
import os
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any

import pytest

from natcompat import NatCompatError
from natcompat.ike import ChildSa, IkeSelector, NatDetection
from natcompat.ipsec import Direction, Encr, Integ, Mode, TrafficSelector
from natcompat.kernel.xfrm.kernel import XfrmIPsec
from tests.lab.topology import Host, Network, wait_for

pytestmark = pytest.mark.kernel_esp

NEAR, FAR = IkeSelector.of("10.1.0.1"), IkeSelector.of("10.2.0.1")


class Ends:
    """Initiator and responder with their port 4500, and the port that the NAT gives the initiator."""

    def __init__(self, network: Network) -> None:
        self.near, self.far = network.initiator, network.responder
        self.near_ike, self.far_ike = self.near.udp(), self.far.udp()
        self.learn_mapping()
        self.nat = {
            "near": NatDetection(supported=True, local_behind_nat=True, remote_behind_nat=False),
            "far": NatDetection(supported=True, local_behind_nat=False, remote_behind_nat=True),
        }

    def learn_mapping(self) -> None:
        self.near_ike.sendto(bytes(4) + b"IKE", (self.far.address, 4500))
        self.mapping: tuple[str, int] = self.far_ike.recvfrom(100)[1]

    def negotiate(self, **changes: Any) -> dict[str, Any]:
        """Return what an exchange of IKE leaves both ends with."""
        return {
            "spi_near": self.near.ipsec.allocate_spi(self.far.address, self.near.address, reqid=7),
            "spi_far": self.far.ipsec.allocate_spi(self.mapping[0], self.far.address, reqid=7),
            "encryption": Encr.AES_GCM_16,
            "keymat": os.urandom(2 * 36),
            "reqid": 7,
            **changes,
        }

    def install(self, end: str, agreed: dict[str, Any], **changes: Any) -> ChildSa:
        near = end == "near"
        arguments = dict(agreed)
        spis = arguments.pop("spi_near"), arguments.pop("spi_far")
        host = self.near if near else self.far
        return ChildSa.install(
            host.ipsec,
            **{
                "local": (self.near.address, 4500) if near else (self.far.address, 4500),
                "remote": (self.far.address, 4500) if near else self.mapping,
                "spi_in": spis[0 if near else 1].to_bytes(4),
                "spi_out": spis[1 if near else 0],
                "initiator": near,
                "selectors": [(NEAR, FAR) if near else (FAR, NEAR)],
                "nat": self.nat[end],
                "keepalive": 20,
                **arguments,
                **changes,
            },
        )


@pytest.fixture
def ends(network: Network) -> Iterator[Ends]:
    network.nat("20000-20999")
    made = Ends(network)
    yield made
    made.near_ike.close()
    made.far_ike.close()


def empty(host: Host) -> bool:
    return host.ipsec.list_sas() == [] and host.ipsec.list_policies() == []


@pytest.mark.parametrize(
    ("encryption", "integrity", "length"),
    [
        (Encr.AES_GCM_16, Integ.NONE, 36),
        (Encr.AES_CBC, Integ.HMAC_SHA2_256_128, 64),
        (Encr.TRIPLE_DES_CBC, Integ.HMAC_MD5_96, 40),
    ],
)
def test_from_beginning_to_end(
    ends: Ends, network: Network, encryption: Encr, integrity: Integ, length: int
) -> None:
    agreed = ends.negotiate(
        encryption=encryption,
        integrity=integrity,
        keymat=os.urandom(2 * length),
        legacy=encryption.is_legacy,
    )
    far = ends.install("far", agreed)
    near = ends.install("near", agreed)
    assert ends.near.ping("10.2.0.1") == 3
    assert [sa.usage.packets for sa in ends.near.ipsec.list_sas()] == [3, 3]
    network.nat("21000-21999")
    ends.learn_mapping()  # what IKE, or the kernel's MappingChange, tells
    assert 21000 <= ends.mapping[1] <= 21999
    far.move(remote=ends.mapping)
    assert ends.near.ping("10.2.0.1") == 3
    assert far.remote.port == ends.mapping[1]
    near.delete()
    far.delete()
    assert empty(ends.near)
    assert empty(ends.far)


@contextmanager
def stream(sender: socket.socket) -> Iterator[list[int]]:
    """Send numbers, one a millisecond, to the responder; the list holds how many were sent."""
    stop, sent = threading.Event(), [0]

    def send() -> None:
        while not stop.is_set():
            sender.sendto(sent[0].to_bytes(4), ("10.2.0.1", 5000))
            sent[0] += 1
            time.sleep(0.001)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield sent
    finally:
        stop.set()
        thread.join()


def test_rekeying_under_load_loses_nothing(ends: Ends) -> None:
    agreed = ends.negotiate()
    children = {"far": ends.install("far", agreed), "near": ends.install("near", agreed)}
    with (
        ends.near.udp("10.1.0.1", 5000, encap=False) as sender,
        ends.far.udp("10.2.0.1", 5000, encap=False) as receiver,
    ):
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        with stream(sender) as sent:
            for generation in range(6):
                begins, answers = ("near", "far") if generation % 2 else ("far", "near")
                before = sent[0]
                wait_for("traffic", lambda before=before: sent[0] > before + 20)  # type: ignore[misc]
                agreed = ends.negotiate()
                answered = ends.install(answers, agreed, initiator=False, rekeys=children[answers])
                begun = ends.install(begins, agreed, initiator=True, rekeys=children[begins])
                children[begins].rekeyed_by(begun)
                children[answers].rekeyed_by(answered)
                before = sent[0]
                wait_for("old packets", lambda before=before: sent[0] > before + 20)  # type: ignore[misc]
                children[answers].delete()
                children[begins].delete()
                children = {begins: begun, answers: answered}
                assert len(ends.near.ipsec.list_sas()) == len(ends.far.ipsec.list_sas()) == 2
        receiver.settimeout(2)
        numbers = [int.from_bytes(receiver.recv(100)) for _ in range(sent[0])]
    assert numbers == list(range(sent[0]))
    assert sent[0] > 200
    for child in children.values():
        child.delete()
    assert empty(ends.near)
    assert empty(ends.far)


def test_move_to_another_address(ends: Ends) -> None:
    child = ends.install("near", ends.negotiate())
    child.move(local=("192.168.1.9", 4501))
    installed = {sa.sa_id: sa.association for sa in ends.near.ipsec.list_sas()}
    assert set(installed) == {child.inbound, child.outbound}
    for association in installed.values():
        assert association is not None
        assert association.encapsulation == child.encapsulation
        assert "192.168.1.9" in (str(association.source), str(association.destination))
    outer = {
        (str(entry.policy.source), str(entry.policy.destination)) for entry in ends.near.ipsec.list_policies()
    }
    assert outer == {("192.168.1.9", "203.0.113.2"), ("203.0.113.2", "192.168.1.9")}
    child.delete()
    assert empty(ends.near)


def test_what_the_kernel_refuses_leaves_nothing(ends: Ends) -> None:
    """The outbound SPI is taken, so that the third of four steps fails in the kernel."""
    first = ends.install("near", ends.negotiate(reqid=8), selectors=[(NEAR, IkeSelector.of("10.2.0.9"))])
    before = {sa.sa_id for sa in ends.near.ipsec.list_sas()}, len(ends.near.ipsec.list_policies())
    assert first.outbound is not None
    agreed = ends.negotiate(spi_far=first.outbound.spi)
    reserved = agreed["spi_near"]
    with pytest.raises(NatCompatError) as caught:
        ends.install("near", agreed)
    assert caught.value.errno == errno.EEXIST
    now = [sa for sa in ends.near.ipsec.list_sas() if sa.sa_id.spi != reserved]
    assert ({sa.sa_id for sa in now}, len(ends.near.ipsec.list_policies())) == before
    first.delete()


def test_ranges_become_prefixes(ipsec: XfrmIPsec) -> None:
    child = ChildSa.install(
        ipsec,
        local="192.0.2.1",
        remote="192.0.2.2",
        spi_in=0x1000,
        spi_out=0x2000,
        encryption=Encr.AES_GCM_16,
        keymat=bytes(range(40)),
        initiator=True,
        selectors=[
            (IkeSelector(ip_address("10.0.0.5"), ip_address("10.0.0.9")), IkeSelector.of("10.2.0.0/16"))
        ],
        reqid=7,
    )
    selectors = {
        entry.policy.selector for entry in ipsec.list_policies() if entry.policy.direction is Direction.OUT
    }
    assert selectors == {
        TrafficSelector(source=source, destination="10.2.0.0/16")
        for source in ("10.0.0.5", "10.0.0.6/31", "10.0.0.8/31")
    }
    child.delete()
    assert ipsec.list_policies() == []


def test_port_ranges_become_masks_that_hold_on_the_wire(ends: Ends) -> None:
    """Ports 5000 to 5009 at the far end are two policies; no other port meets them."""
    near, far = IkeSelector.of("10.1.0.1", 17), IkeSelector.of("10.2.0.1", 17, 5000, 5009)
    agreed = ends.negotiate()
    there = ends.install("far", agreed, selectors=[(far, near)])
    here = ends.install("near", agreed, selectors=[(near, far)])
    assert len(here.policies) == 4
    assert here.outbound is not None
    with ends.near.udp("10.1.0.1", 6000, encap=False) as sender:
        for port, protected in ((4999, 0), (5000, 1), (5007, 1), (5008, 1), (5009, 1), (5010, 0)):
            before = ends.near.ipsec.get_sa(here.outbound).packets
            sender.sendto(b"message", ("10.2.0.1", port))
            assert ends.near.ipsec.get_sa(here.outbound).packets - before == protected, port
    here.delete()
    there.delete()


def test_transport_mode_without_a_nat(ipsec: XfrmIPsec) -> None:
    ends = IkeSelector.of("192.0.2.1"), IkeSelector.of("192.0.2.2", 17, 1701, 1701)
    child = ChildSa.install(
        ipsec,
        local="192.0.2.1",
        remote="192.0.2.2",
        spi_in=0x1000,
        spi_out=0x2000,
        encryption=Encr.AES_GCM_16,
        keymat=bytes(range(40)),
        initiator=False,
        selectors=[ends],
        reqid=7,
        mode=Mode.TRANSPORT,
    )
    assert [entry.policy.mode for entry in ipsec.list_policies()] == [Mode.TRANSPORT] * 2
    assert {sa.association.mode for sa in ipsec.list_sas() if sa.association} == {Mode.TRANSPORT}
    child.delete()
    assert ipsec.list_sas() == []
