"""`PfKeyIPsec` over af_key against a real kernel: beyond what the conformance suites ask."""

from __future__ import annotations

import asyncio
import errno
import subprocess
from concurrent.futures import ThreadPoolExecutor
from ipaddress import ip_address
from typing import Any

import pytest

from natcompat.errors import NatCompatError
from natcompat.ipsec import (
    Action,
    Direction,
    Encr,
    Expire,
    Integ,
    Lifetime,
    Mark,
    Mode,
    Policy,
    TrafficSelector,
    UDPEncapsulation,
)
from natcompat.kernel.pfkey import numbers as n
from natcompat.kernel.pfkey.dialects import LINUX
from natcompat.kernel.pfkey.kernel import PfKeyIPsec
from natcompat.kernel.pfkey.messages import decode, read_key
from natcompat.kernel.pfkey.transport import PfKeySocket
from natcompat.kernel.xfrm.kernel import XfrmIPsec
from tests.lab.making import PORTS, SELECTOR, modest, open_pfkey, refused, tunnel

pytestmark = pytest.mark.kernel_esp


# -- what the kernel makes of it


def test_ip_xfrm_agrees(pfkey: PfKeyIPsec) -> None:
    pfkey.add_sa(modest(1001, encapsulation=PORTS, lifetime=Lifetime(soft_seconds=100, hard_bytes=10**12)))
    behind = UDPEncapsulation(local_port=4500, remote_port=34567, original_address=ip_address("10.9.9.9"))
    pfkey.add_sa(modest(1002, direction=Direction.IN, encapsulation=behind, mode=Mode.TRANSPORT))
    pfkey.add_sa(
        modest(1003, copy_ecn=False, copy_df=False, integrity=Integ.AES_XCBC_96, integrity_key=bytes(16))
    )
    shown = subprocess.run(["ip", "-s", "xfrm", "state"], capture_output=True, text=True, check=True).stdout
    blocks = {block.split("spi 0x")[1][:8]: block for block in shown.split("src 192.0.2.1 dst 192.0.2.2")[1:]}
    assert "sport 4500 dport 34567" in blocks["000003e9"]
    assert "mode tunnel" in blocks["000003e9"]
    assert "reqid 7(" in blocks["000003e9"]
    assert "limit: soft (INF)(bytes), hard 1000000000000(bytes)" in blocks["000003e9"]
    assert "expire add: soft 100(sec), hard 0(sec)" in blocks["000003e9"]
    assert "auth-trunc hmac(sha384)" in blocks["000003e9"]
    assert "(384 bits) 192" in blocks["000003e9"]
    assert "sport 34567 dport 4500" in blocks["000003ea"]
    assert "mode transport" in blocks["000003ea"]
    assert "replay-window 32" in blocks["000003ea"]
    assert "noecn nopmtudisc" in blocks["000003eb"]
    assert "auth-trunc xcbc(aes)" in blocks["000003eb"]
    with XfrmIPsec() as other:
        described = {each.sa_id.spi: each.association for each in other.list_sas()}
    found = described[1001]
    assert found is not None
    assert found.encryption_key == bytes(range(16))
    assert found.lifetime == Lifetime(soft_seconds=100, hard_bytes=10**12)


@pytest.mark.parametrize(
    ("policy", "shown"),
    [
        (tunnel(Direction.OUT), ("dir out", "tmpl src 192.0.2.1 dst 192.0.2.2", "reqid 7", "mode tunnel")),
        (
            tunnel(Direction.IN, mode=Mode.TRANSPORT, source=None, destination=None, reqid=0, optional=True),
            ("dir in", "level use", "mode transport"),
        ),
        (
            tunnel(
                Direction.OUT,
                selector=TrafficSelector(
                    source="fd00::/64",
                    destination="fd01::1",
                    protocol=6,
                    source_port=80,
                    destination_port=8080,
                ),
                source="2001:db8::1",
                destination="2001:db8::2",
                priority=12,
            ),
            ("src fd00::/64 dst fd01::1/128 proto tcp sport 80 dport 8080", "priority 12", "2001:db8::2"),
        ),
        (
            tunnel(Direction.IN, action=Action.DISCARD, source=None, destination=None, reqid=0),
            ("action block",),
        ),
    ],
    ids=["tunnel", "optional", "ports", "discard"],
)
def test_policies(pfkey: PfKeyIPsec, policy: Policy, shown: tuple[str, ...]) -> None:
    pfkey.add_policy(policy)
    said = subprocess.run(["ip", "xfrm", "policy"], capture_output=True, text=True, check=True).stdout
    assert all(each in said for each in shown), said
    found = pfkey.get_policy(policy).policy
    for name in ("direction", "selector", "source", "destination", "mode", "reqid", "action", "optional"):
        assert getattr(found, name) == getattr(policy, name), name
    with XfrmIPsec() as other:
        assert [each.policy for each in other.list_policies()] == [found]
    pfkey.delete_policy(policy)
    left = subprocess.run(["ip", "xfrm", "policy", "list", "nosock"], capture_output=True, check=True)
    assert left.stdout == b""


def test_sas_of_others_are_described(pfkey: PfKeyIPsec) -> None:
    with XfrmIPsec() as other:
        other.add_sa(
            modest(
                encryption=Encr.AES_GCM_16, encryption_key=bytes(20), integrity=Integ.NONE, integrity_key=b""
            )
        )
        other.add_sa(modest(1002, destination="127.0.0.1"))
    found = {each.sa_id.spi: each for each in pfkey.list_sas()}
    assert found[0xC0DE0001].association is None
    assert found[0xC0DE0001].description == "ESP encryption 0, integrity 0"
    ours = found[1002].association
    assert ours is not None
    assert ours.direction is Direction.IN, "127.0.0.1 is this host's"
    assert ours.integrity_key == bytes(range(48))


@pytest.mark.parametrize(
    ("changes", "code", "words"),
    [
        (
            {
                "encryption": Encr.AES_GCM_16,
                "encryption_key": bytes(20),
                "integrity": Integ.NONE,
                "integrity_key": b"",
            },
            errno.ENOSYS,
            "combined",
        ),
        ({"integrity": Integ.HMAC_SHA2_256_128, "integrity_key": bytes(32)}, errno.ENOSYS, "96 bits"),
        ({"direction": Direction.IN, "replay_window": 64}, errno.EOPNOTSUPP, "replay_window=32"),
        ({"esn": True}, errno.EOPNOTSUPP, "extended"),
        ({"mark": Mark(value=1)}, errno.EOPNOTSUPP, "marks"),
        ({"interface_id": 1}, errno.EOPNOTSUPP, "interface"),
        ({"tfc": 100}, errno.EOPNOTSUPP, "pad"),
        ({"copy_dscp": False}, errno.EOPNOTSUPP, "DSCP"),
        ({"selectors": [SELECTOR]}, errno.EOPNOTSUPP, "policies"),
        ({"lifetime": Lifetime(hard_packets=2**40)}, errno.EOPNOTSUPP, "2\\*\\*32"),
    ],
    ids=lambda each: " ".join(each) if isinstance(each, dict) else None,
)
def test_what_af_key_cannot_say(pfkey: PfKeyIPsec, changes: dict[str, Any], code: int, words: str) -> None:
    with pytest.raises(NatCompatError, match=words) as caught:
        pfkey.add_sa(modest(**changes))
    assert caught.value.errno == code
    assert caught.value.remedy
    assert pfkey.list_sas() == []


def test_why_a_short_check_value_is_refused(pfkey: PfKeyIPsec) -> None:
    """What the refusal says is so: the kernel would cut HMAC-SHA-256 to 96 bits."""
    from natcompat.kernel.pfkey.messages import Message
    from natcompat.kernel.pfkey.translate import encode_sa

    sa = modest(integrity=Integ.HMAC_SHA1_96, integrity_key=bytes(20))
    message = encode_sa(LINUX, sa, n.SADB_ADD)
    forged = [
        each.replace(b"\x03\x0c", b"\x05\x0c") if each.kind == n.SADB_EXT_SA else each
        for each in message.extensions
    ]
    pfkey._socket.request(
        "Adding",
        Message(message.type, message.satype, [type(message.extensions[0])(each) for each in forged]),
    )
    shown = subprocess.run(["ip", "xfrm", "state"], capture_output=True, text=True, check=True).stdout
    assert "auth-trunc hmac(sha256)" in shown
    assert shown.split("auth-trunc hmac(sha256)")[1].split()[1] == "96"


@pytest.mark.parametrize(
    ("policy", "words"),
    [
        (tunnel(Direction.OUT, reqid=0x4000), "above 16383"),
        (tunnel(Direction.IN, optional=True), "optional"),
        (tunnel(Direction.OUT, mark=Mark(value=1)), "marks"),
        (tunnel(Direction.OUT, interface_id=1), "interface"),
    ],
    ids=["reqid", "optional", "mark", "interface"],
)
def test_policies_that_af_key_cannot_say(pfkey: PfKeyIPsec, policy: Policy, words: str) -> None:
    with pytest.raises(NatCompatError, match=words) as caught:
        pfkey.add_policy(policy)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert pfkey.list_policies() == []


# -- moving, SPIs


def test_ports_change_in_place_and_the_rest_stays(pfkey: PfKeyIPsec) -> None:
    sa = modest(
        encapsulation=PORTS,
        encryption=Encr.NULL,
        encryption_key=b"",
        lifetime=Lifetime(soft_packets=900, hard_packets=1000),
        copy_ecn=False,
    )
    sa_id = pfkey.add_sa(sa)
    ports = UDPEncapsulation(local_port=4501, remote_port=1024)
    assert pfkey.update_sa(sa_id, encapsulation=ports) == sa_id
    with XfrmIPsec() as other:  # sees all there is
        (found,) = other.list_sas()
    assert found.association is not None
    for name in ("encryption", "integrity_key", "lifetime", "reqid", "mode", "copy_ecn"):
        assert getattr(found.association, name) == getattr(sa, name), name
    assert pfkey.list_sas()[0].association is not None
    shown = subprocess.run(["ip", "xfrm", "state"], capture_output=True, text=True, check=True).stdout
    assert "sport 4501 dport 1024" in shown


@pytest.mark.parametrize(
    "change",
    [{"source": "192.0.2.9"}, {"destination": "192.0.2.9"}, {"encapsulation": None}],
    ids=lambda change: " ".join(change),
)
def test_what_would_use_sequence_numbers_twice_is_refused(pfkey: PfKeyIPsec, change: dict[str, Any]) -> None:
    sa_id = pfkey.add_sa(modest(encapsulation=PORTS))
    error = refused(pfkey.update_sa, sa_id, **change)
    assert error.errno == errno.EOPNOTSUPP
    assert "new SA" in error.remedy
    (found,) = pfkey.list_sas()
    assert found.association is not None
    assert (found.sa_id, found.association.encapsulation) == (sa_id, PORTS)
    assert pfkey.update_sa(sa_id, source="192.0.2.1", encapsulation=PORTS) == sa_id, "nothing new"
    with pytest.raises(ValueError, match="address family"):
        pfkey.update_sa(sa_id, destination="2001:db8::9")


def test_a_name_without_a_source_is_enough(pfkey: PfKeyIPsec) -> None:
    from natcompat.ipsec import SaId

    sa_id = pfkey.add_sa(modest())
    bare = SaId(spi=sa_id.spi, destination=sa_id.destination)
    with open_pfkey() as other:
        assert other.get_sa(bare).packets == 0
        other.delete_sa(bare)
    assert pfkey.list_sas() == []


# -- others on PF_KEY, threads, processes


def test_keys_go_to_whoever_listens(pfkey: PfKeyIPsec) -> None:
    """Why af_key is not what natcompat uses by itself."""
    listener = PfKeySocket(LINUX)
    try:
        pfkey.add_sa(modest(encryption_key=b"swordfish-sword!"))
        heard = decode(listener.socket.recv(65536))
        found = heard.find(n.SADB_EXT_KEY_ENCRYPT)
        assert found is not None
        assert bytes(read_key(found)) == b"swordfish-sword!"
        assert "swordfish" not in repr((heard, found, heard.encode()))
    finally:
        listener.close()


@pytest.fixture
def small(pfkey: PfKeyIPsec) -> PfKeyIPsec:
    """A socket whose queue holds a few messages."""
    pfkey._socket = PfKeySocket(LINUX, receive_buffer=4096)
    pfkey._sockets.append(pfkey._socket)
    return pfkey


def test_a_queue_that_is_full_before_a_request(small: PfKeyIPsec) -> None:
    with open_pfkey() as other:
        for number in range(60):
            other.add_sa(modest(3000 + number))
        assert len(small.list_sas()) == 60


def test_an_answer_that_is_lost_is_missed_at_once(small: PfKeyIPsec, monkeypatch: pytest.MonkeyPatch) -> None:
    with open_pfkey() as other:
        for number in range(60):
            other.add_sa(modest(3000 + number))
        monkeypatch.setattr(small._socket, "_drain", lambda what: None)
        error = refused(small.get_sa, modest(3000).sa_id)
        assert error.errno == errno.ENOBUFS
        assert "Look whether" in error.remedy


def test_answers_are_found_among_what_others_do(pfkey: PfKeyIPsec) -> None:
    with open_pfkey() as other, ThreadPoolExecutor(1) as pool:
        for number in range(60):
            other.add_sa(modest(3000 + number))

        def noise() -> None:
            for number in range(60):
                other.delete_sa(modest(3000 + number).sa_id)

        done = pool.submit(noise)
        for number in range(40):
            sa_id = pfkey.add_sa(modest(5000 + number, source="192.0.2.7"))
            assert pfkey.get_sa(sa_id).packets == 0
        done.result()
        assert len(other.list_sas()) == 40


# -- events


def test_events_can_be_waited_for_in_asyncio(pfkey: PfKeyIPsec) -> None:
    async def wait() -> None:
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(events, readable.set)
        pfkey.add_sa(modest(lifetime=Lifetime(soft_seconds=1)))
        found: list[Any] = []
        while not found:
            await asyncio.wait_for(readable.wait(), 10)
            readable.clear()
            found += events.read()
        loop.remove_reader(events)
        assert found == [Expire(sa_id=modest().sa_id, reqid=7, hard=False)]

    with pfkey.events() as events:
        asyncio.run(wait())
