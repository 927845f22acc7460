"""What natcompat asks of XFRM, without asking it."""

from __future__ import annotations

import errno
import sys
from typing import Any

import pytest

if sys.platform != "linux":
    pytest.skip("XFRM is the IPsec of Linux", allow_module_level=True)

from natcompat.errors import NatCompatError
from natcompat.ipsec import (
    Action,
    Direction,
    Encr,
    Integ,
    Lifetime,
    Mark,
    Mode,
    Policy,
    PortRange,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)
from natcompat.ipsec.associations import encapsulation_of, wire_ports
from natcompat.kernel.xfrm import messages
from natcompat.kernel.xfrm.netlink import NLM_F_DUMP_INTR, Netlink
from natcompat.kernel.xfrm.translate import (
    KernelFeatures,
    encode_sa,
    encode_sa_id,
    selector_fields,
    selector_of,
)
from natcompat.kernel.xfrm.translate_policy import encode_policy, encode_policy_id, kernel_directions
from tests.kernel.xfrm.test_messages import REQUESTS, decode

OLD = KernelFeatures(sa_direction=False, keepalive=False)
NEW = KernelFeatures(sa_direction=True, keepalive=True)
PORTS = UDPEncapsulation(local_port=4500, remote_port=34567)


def test_ports_in_their_one_place() -> None:
    assert wire_ports(PORTS, Direction.OUT) == (4500, 34567)
    assert wire_ports(PORTS, Direction.IN) == (34567, 4500)
    for direction in Direction:
        assert encapsulation_of(*wire_ports(PORTS, direction), direction) == PORTS


def differences(ours: bytes, name: str) -> dict[str, Any]:
    """Return the fields and attributes in which `ours` is not what `ip xfrm` sent."""
    mine, theirs = decode(bytes(ours)), decode(bytes.fromhex(REQUESTS[name]["bytes"]))
    found: dict[str, Any] = {
        field: (mine[field], theirs[field]) for field, _ in mine.fields if mine[field] != theirs[field]
    }
    pairs = [{slot.name: slot.value for slot in message["attrs"]} for message in (mine, theirs)]
    for attribute in pairs[0].keys() | pairs[1].keys():
        if pairs[0].get(attribute) != pairs[1].get(attribute):
            found[attribute] = tuple(pair.get(attribute) for pair in pairs)
    return found


def with_header(message: bytearray, kind: int) -> bytes:
    return bytes(message[:4]) + kind.to_bytes(2, "little") + bytes(message[6:])


def test_a_tunnel_is_what_ip_xfrm_makes_of_it() -> None:
    sa = SecurityAssociation(
        spi=0xC0DE0001,
        source="192.0.2.1",
        destination="192.0.2.2",
        direction=Direction.OUT,
        encryption=Encr.AES_GCM_16,
        encryption_key=bytes(range(20)),
        reqid=7,
        encapsulation=UDPEncapsulation(local_port=4500, remote_port=34567),
        selectors=[TrafficSelector(source="0.0.0.0/0", destination="0.0.0.0/0")],
    )
    found = differences(with_header(encode_sa(sa, OLD), messages.XFRM_MSG_NEWSA), "tunnel AEAD with UDP")
    # The kernel gives an empty selector the family of the SA; an outbound SA has no window.
    assert found == {"sel_family": (2, 0), "replay_window": (0, 32)}


def test_transport_mode_is_what_ip_xfrm_makes_of_it() -> None:
    sa = SecurityAssociation(
        spi=0xC0DE0002,
        source="2001:db8::1",
        destination="2001:db8::2",
        direction=Direction.IN,
        mode=Mode.TRANSPORT,
        encryption=Encr.AES_CBC,
        encryption_key=bytes(range(16)),
        integrity=Integ.HMAC_SHA2_256_128,
        integrity_key=bytes(range(32)),
        reqid=8,
        esn=True,
        replay_window=128,
    )
    found = differences(with_header(encode_sa(sa, OLD), messages.XFRM_MSG_NEWSA), "transport CBC with ESN")
    esn = [dict(value) for value in found.pop("XFRMA_REPLAY_ESN_VAL")]
    assert (esn[0].pop("bmp"), esn[1].pop("bmp")) == ((0, 0, 0, 0), ())
    assert esn[0]["replay_window"] == esn[1]["replay_window"] == 128
    assert set(found) <= {"sel_family", "replay_window"}


def test_limits_marks_and_flags_are_what_ip_xfrm_makes_of_them() -> None:
    sa = SecurityAssociation(
        spi=0xC0DE0003,
        source="192.0.2.1",
        destination="192.0.2.2",
        direction=Direction.OUT,
        encryption=Encr.CHACHA20_POLY1305,
        encryption_key=bytes(range(36)),
        mark=Mark(value=0x2A, mask=0xFF),
        interface_id=0x11,
        copy_ecn=False,
        copy_df=False,
        lifetime=Lifetime(
            soft_bytes=1000,
            hard_bytes=2000,
            soft_packets=10,
            hard_packets=20,
            soft_seconds=100,
            hard_seconds=200,
        ),
    )
    found = differences(
        with_header(encode_sa(sa, OLD), messages.XFRM_MSG_NEWSA), "mark, interface and limits"
    )
    assert found.pop("flags")[0] == 1 | 4 | messages.XFRM_STATE_AF_UNSPEC
    assert not found


def test_newer_kernels_are_told_the_direction_and_older_ones_are_not() -> None:
    sa = SecurityAssociation(
        spi=300,
        source="192.0.2.1",
        destination="192.0.2.2",
        direction=Direction.OUT,
        encryption=Encr.AES_GCM_16,
        encryption_key=bytes(20),
        esn=True,
        encapsulation=PORTS,
        nat_keepalive=20,
    )
    for features, direction, keepalive, window in ((OLD, None, None, 32), (NEW, 2, 20, 0)):
        message = decode(with_header(encode_sa(sa, features), messages.XFRM_MSG_NEWSA))
        assert message.get_attr("XFRMA_SA_DIR") == direction
        assert message.get_attr("XFRMA_NAT_KEEPALIVE_INTERVAL") == keepalive
        assert message.get_attr("XFRMA_REPLAY_ESN_VAL")["replay_window"] == window


def test_names_of_sas_and_policies_are_what_ip_xfrm_sends() -> None:
    sa = SecurityAssociation(
        spi=0xC0DE0001,
        source="192.0.2.1",
        destination="192.0.2.2",
        direction=Direction.IN,
        encryption=Encr.AES_GCM_16,
        encryption_key=bytes(20),
    )
    assert set(differences(with_header(encode_sa_id(sa.sa_id), 18), "get an SA")) <= {"XFRMA_SRCADDR"}
    policy = Policy(
        direction=Direction.OUT,
        selector=TrafficSelector(
            source="10.1.0.0/16", destination="10.2.0.0/24", protocol=6, source_port=80, destination_port=8080
        ),
        source="192.0.2.1",
        destination="192.0.2.2",
        reqid=7,
        priority=1234,
    )
    (direction,) = kernel_directions(policy)
    assert differences(with_header(encode_policy(policy, direction), 19), "tunnel policy") == {}
    named = Policy(
        direction=Direction.OUT,
        selector=TrafficSelector(source="10.1.0.0/16", destination="10.2.0.0/24", protocol=6),
        action=Action.DISCARD,
    )
    assert differences(with_header(encode_policy_id(named, direction), 20), "delete a policy") == {}


class Interrupted(Netlink):
    """A kernel whose database changes during the first dumps."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def _exchange(self, *_: Any, **__: Any) -> list[tuple[int, bytes]]:
        self.times -= 1
        return [(0, b"one"), (NLM_F_DUMP_INTR * (self.times >= 0), b"two")]


def test_a_dump_is_repeated_until_it_is_consistent() -> None:
    netlink = Interrupted(3)
    assert netlink.dump("Listing", bytearray(16), 18) == [b"one", b"two"]
    netlink.close()
    netlink = Interrupted(1000)
    with pytest.raises(NatCompatError) as caught:
        netlink.dump("Listing", bytearray(16), 18)
    assert caught.value.errno == errno.EAGAIN
    netlink.close()


@pytest.mark.parametrize(
    "ports", [0, 25, PortRange(0, 0), PortRange(5000, 5007), PortRange(32768, 65535)], ids=str
)
def test_ports_are_a_value_and_a_mask(ports: int | PortRange) -> None:
    selector = TrafficSelector(
        source="10.1.0.0/16", destination="10.2.0.0/16", protocol=17, destination_port=ports
    )
    fields = {**dict.fromkeys(("sel_sport", "sel_sport_mask"), 0), **selector_fields(selector, "sel_")}
    assert fields["sel_dport"] & ~fields["sel_dport_mask"] == 0
    assert selector_of(fields) == selector


def test_a_mask_with_holes_is_never_read_as_more() -> None:
    selector = TrafficSelector(source="10.1.0.0/16", destination="10.2.0.0/16", protocol=17)
    fields = {**selector_fields(selector, "sel_"), "sel_dport": 0x1234, "sel_dport_mask": 0xFF0F}
    assert selector_of(fields).destination_ports == PortRange(0x1234, 0x1234)
