"""Traffic, mapping changes and keepalives with SAs that were installed over af_key."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from natcompat.commands.ipsec.databases import sad, spd
from natcompat.ipsec import (
    Acquire,
    Direction,
    Encr,
    MappingChange,
    Policy,
    TrafficSelector,
    UDPEncapsulation,
)
from natcompat.kernel.pfkey.kernel import PfKeyIPsec
from tests.lab.making import PORTS, modest, next_event, open_pfkey, tunnel
from tests.lab.topology import Network, inside

pytestmark = pytest.mark.kernel_esp


def test_through_the_nat_to_a_peer_on_xfrm(network: Network) -> None:
    """An acquire, SAs, traffic, another NAT mapping, and the end: af_key at the responder."""
    near, far = network.initiator, network.responder
    with inside(far.name):
        ipsec = open_pfkey()
    with ipsec, near.udp() as first, far.udp() as second:
        with inside(far.name):
            events = ipsec.events()
        with events:
            first.sendto(bytes(4) + b"IKE", (far.address, 4500))
            peer = second.recvfrom(100)[1]
            for direction in Direction:
                out = direction is Direction.OUT
                ends = (far.inner, near.inner) if out else (near.inner, far.inner)
                outer = (far.address, peer[0]) if out else (peer[0], far.address)
                ipsec.add_policy(
                    Policy(
                        direction=direction,
                        selector=TrafficSelector(source=ends[0], destination=ends[1]),
                        source=outer[0],
                        destination=outer[1],
                        reqid=5,
                    )
                )
                here, there = (near.address, far.address) if out else (far.address, near.address)
                near.ipsec.add_policy(
                    Policy(
                        direction=direction,
                        selector=TrafficSelector(source=ends[1], destination=ends[0]),
                        source=here,
                        destination=there,
                        reqid=9,
                    )
                )
            assert far.ping(near.inner, "-W", "1", count=1) == 0
            acquire = next_event(events, Acquire)
            assert (str(acquire.source), str(acquire.destination)) == (far.address, peer[0])
            assert acquire.reqid == 5
            assert acquire.selector == TrafficSelector(source=far.inner, destination=near.inner)
            inbound = ipsec.allocate_spi(
                acquire.destination, acquire.source, reqid=5, sequence=acquire.sequence
            )
            outbound = 0x5001
            local = UDPEncapsulation(local_port=4500, remote_port=4500)
            remote = UDPEncapsulation(local_port=4500, remote_port=peer[1])
            ids = {}
            for spi, direction in ((inbound, Direction.IN), (outbound, Direction.OUT)):
                out = direction is Direction.OUT
                ends = (far.address, peer[0]) if out else (peer[0], far.address)
                ids[direction] = ipsec.add_sa(
                    modest(
                        spi,
                        source=ends[0],
                        destination=ends[1],
                        direction=direction,
                        encapsulation=remote,
                        reqid=5,
                    )
                )
                ends = (far.address, near.address) if out else (near.address, far.address)
                opposite = Direction.IN if out else Direction.OUT
                near.ipsec.add_sa(
                    modest(
                        spi,
                        source=ends[0],
                        destination=ends[1],
                        direction=opposite,
                        encapsulation=local,
                        reqid=9,
                    )
                )
            assert near.ping(far.inner) == 3
            assert {ipsec.get_sa(each).packets for each in ids.values()} == {3}
            network.nat("30000-30999")
            try:
                assert near.ping(far.inner, "-W", "1", count=1) == 0
                change = next_event(events, MappingChange)
                assert change.sa_id == ids[Direction.IN]
                assert (change.reqid, change.old_port) == (5, peer[1])
                assert 30000 <= change.new_port <= 30999
                near.ping(far.inner, "-W", "1", count=1)
                assert events.read() == [], "not for every packet"
                for each in ids.values():
                    ipsec.update_sa(
                        each, encapsulation=UDPEncapsulation(local_port=4500, remote_port=change.new_port)
                    )
                assert near.ping(far.inner, count=5) == 5
                assert near.ipsec.get_sa(near.ipsec.list_sas()[0].sa_id).replay_drops == 0
            finally:
                network.nat("20000-20999")
        ipsec.flush_sas()
        ipsec.flush_policies()
        assert far.ipsec.list_sas() == []
        assert far.ipsec.list_policies() == []


def test_a_mapping_change_of_somebody_elses_sa(network: Network) -> None:
    """The kernel's message lacks the SA's own address: it is looked up."""
    near, far = network.initiator, network.responder
    with inside(far.name):
        ipsec = open_pfkey()
        other = open_pfkey()
        events = other.events()
    with ipsec, other, events, far.udp(), near.udp(port=4600, encap=False) as moved:
        keys = {"encryption": Encr.NULL, "encryption_key": b""}
        sa = modest(
            0x6001,
            source="203.0.113.1",
            destination=far.address,
            direction=Direction.IN,
            encapsulation=UDPEncapsulation(local_port=4500, remote_port=77),
            **keys,
        )
        ipsec.add_sa(sa)
        from natcompat.esp.engine.engine import EspEngine
        from natcompat.esp.engine.results import Dropped
        from natcompat.testing.ipsec.traffic import udp_packet

        with EspEngine(timer=False) as peer:
            peer.add_sa(
                modest(0x6001, source="203.0.113.1", destination=far.address, encapsulation=PORTS, **keys)
            )
            selector = TrafficSelector(source="10.1.0.1", destination="10.2.0.1")
            peer.add_policy(
                Policy(
                    direction=Direction.OUT,
                    selector=selector,
                    reqid=7,
                    source="203.0.113.1",
                    destination=far.address,
                )
            )
            sealed = peer.seal(udp_packet("10.1.0.1", "10.2.0.1", b"x"))
            assert not isinstance(sealed, Dropped)
            moved.sendto(sealed[0][0], (far.address, 4500))
        change = next_event(events, MappingChange)
        assert (change.sa_id, change.reqid, change.old_port) == (sa.sa_id, 7, 77)
        assert str(change.new_address) == "203.0.113.1"


def test_keepalives_come_from_the_process(network: Network) -> None:
    near, far = network.initiator, network.responder
    with inside(near.name):
        ipsec = open_pfkey()
    with ipsec, far.udp(encap=False) as listener, far.udp(port=4600, encap=False) as elsewhere:
        sa_id = ipsec.add_sa(
            modest(
                source=near.address,
                destination=far.address,
                encapsulation=UDPEncapsulation(local_port=4500, remote_port=4500),
                nat_keepalive=1,
            )
        )
        assert listener.recv(100) == b"\xff"
        ipsec.update_sa(sa_id, encapsulation=UDPEncapsulation(local_port=4500, remote_port=4600))
        assert elsewhere.recv(100) == b"\xff"


def test_the_commands_show_it(pfkey: PfKeyIPsec, monkeypatch: pytest.MonkeyPatch) -> None:
    pfkey.add_sa(modest(encapsulation=PORTS))
    pfkey.add_policy(tunnel(Direction.OUT))
    monkeypatch.setenv("NATCOMPAT_IPSEC", "pfkey")
    (row,) = json.loads(CliRunner().invoke(sad, ["--json"], catch_exceptions=False).output)
    assert (row["encryption"], row["remote_port"], row["sequence"]) == ("AES_CBC", 34567, None)
    shown = CliRunner().invoke(sad, [], catch_exceptions=False).output
    assert "0xc0de0001" in shown
    (row,) = json.loads(CliRunner().invoke(spd, ["--json"], catch_exceptions=False).output)
    assert row["reqid"] == 7
