"""strongSwan as the other end: natcompat takes over one side of what two strongSwans negotiated."""

from __future__ import annotations

import dataclasses

import pytest

from natcompat.ipsec import Direction, Encr
from tests.lab.topology import Host, Network
from tests.support.strongswan import Side, lacking, negotiated

REASON = lacking(libipsec=False)
pytestmark = [pytest.mark.kernel_esp, pytest.mark.skipif(bool(REASON), reason=REASON)]


def side(host: Host) -> Side:
    return Side(host.name, f"/run/netns/{host.name}", host.address, (f"{host.inner}/32",))


@pytest.mark.parametrize(
    ("proposal", "transform"),
    [("aes256gcm16-x25519", Encr.AES_GCM_16), ("aes128-sha256-x25519-esn", Encr.AES_CBC)],
    ids=["AES-GCM", "AES-CBC with HMAC-SHA2 and ESN"],
)
@pytest.mark.parametrize("replaced", ["responder", "initiator"])
def test_natcompat_takes_the_place_of_one_strongswan(
    network: Network, proposal: str, transform: Encr, replaced: str
) -> None:
    near, far = network.initiator, network.responder
    host = far if replaced == "responder" else near
    with negotiated(side(near), side(far), proposal, libipsec=False) as daemons:
        daemon = daemons[1] if replaced == "responder" else daemons[0]
        found = host.ipsec.list_sas()
        policies = [each.policy for each in host.ipsec.list_policies() if each.policy.reqid]
        assert len(found) == 2
        assert {policy.direction for policy in policies} == set(Direction)
        daemon.kill()
        host.ipsec.flush_sas()
        host.ipsec.flush_policies()
        assert near.ping("10.2.0.1", "-W", "1", count=1) == 0

        ids = {}
        for each in found:
            association = each.association
            assert association is not None, each.description
            assert association.encryption is transform
            assert association.esn == proposal.endswith("esn")
            assert association.encapsulation is not None
            assert association.encapsulation.local_port == 4500
            ids[association.direction] = host.ipsec.add_sa(association)
        for policy in policies:
            host.ipsec.add_policy(dataclasses.replace(policy, priority=None))
        with host.udp() as sock:
            host.ipsec.bypass(sock)
            assert near.ping("10.2.0.1") == 3
            assert {way: host.ipsec.get_sa(ids[way]).packets for way in ids} == dict.fromkeys(Direction, 3)
