"""`XfrmIPsec` against a real kernel: what is installed, changed, refused, and reported."""

from __future__ import annotations

import dataclasses
import errno
import socket
import struct
import subprocess
from ipaddress import ip_address
from typing import Any

import pytest

from natcompat.ipsec import (
    Action,
    Direction,
    Encr,
    Integ,
    Lifetime,
    Mark,
    Mode,
    Policy,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)
from natcompat.kernel.xfrm import messages
from natcompat.kernel.xfrm.esp_support import EspSupport
from natcompat.kernel.xfrm.kernel import XfrmIPsec
from natcompat.kernel.xfrm.netlink import attributes
from natcompat.kernel.xfrm.probe import probe_esp, probe_esp_unprivileged
from natcompat.kernel.xfrm.readback import decode
from natcompat.kernel.xfrm.translate import INFO_END, encode_sa_id
from tests.lab.making import PORTS, cbc, make, refused

pytestmark = pytest.mark.kernel_esp


def test_the_probes_say_available() -> None:
    for family in (socket.AF_INET, socket.AF_INET6):
        assert probe_esp(family=family).support is EspSupport.AVAILABLE
        assert probe_esp("rfc4106(gcm(aes))", "", family=family)
        assert probe_esp_unprivileged(family)


# -- what is installed is what was asked for


@pytest.mark.parametrize("transform", list(Encr), ids=lambda each: each.name)
def test_every_transform(ipsec: XfrmIPsec, transform: Encr) -> None:
    """With every key length, integrity, mode, family and direction, with ESN, UDP, and without."""
    spi = 1000
    expected = {}
    for key_length in transform.key_lengths:
        for integrity in [Integ.NONE] if transform.is_aead else list(Integ)[1:]:
            for version in (4, 6):
                for mode in Mode:
                    for direction in Direction:
                        spi += 1
                        sa = make(
                            spi,
                            version,
                            direction=direction,
                            mode=mode,
                            encryption=transform,
                            encryption_key=bytes(range(1, key_length + 1)),
                            integrity=integrity,
                            integrity_key=bytes(range(1, integrity.key_length + 1)),
                            esn=spi % 2 == 0,
                            encapsulation=PORTS if spi % 3 == 0 else None,
                        )
                        expected[ipsec.add_sa(sa, legacy=True)] = sa
    found = {each.sa_id: each.association for each in ipsec.list_sas()}
    assert found.keys() == expected.keys()
    for sa_id, sa in expected.items():
        association = found[sa_id]
        assert association is not None
        for name in (
            "encryption",
            "encryption_key",
            "integrity",
            "integrity_key",
            "mode",
            "esn",
            "reqid",
            "direction",
        ):
            assert getattr(association, name) == getattr(sa, name), name


@pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
def test_what_the_kernel_shows_is_what_was_asked_for(ipsec: XfrmIPsec, version: int) -> None:
    sa = make(
        version=version,
        encapsulation=PORTS,
        lifetime=Lifetime(
            soft_seconds=100, hard_seconds=200, soft_bytes=3000, hard_bytes=2**40, hard_packets=9
        ),
        mark=Mark(value=0x2A, mask=0xFF),
        interface_id=17,
        tfc=1200,
        copy_dscp=False,
        copy_ecn=False,
        copy_df=False,
        selectors=[
            TrafficSelector(source="10.1.0.0/16", destination="10.2.0.0/24", protocol=17, source_port=9)
        ],
    )
    sa_id = ipsec.add_sa(sa)
    (found,) = ipsec.list_sas()
    assert found.sa_id == sa_id
    assert found.association is not None
    assert dataclasses.replace(found.association, replay_window=64) == sa
    usage = ipsec.get_sa(sa_id)
    assert (usage.packets, usage.octets, usage.first_used, usage.sequence) == (0, 0, None, 0)
    assert usage == found.usage


@pytest.mark.parametrize("window", [0, 32, 33, 64, 1024, 4096])
@pytest.mark.parametrize("esn", [False, True], ids=["32 bit", "ESN"])
def test_replay_windows(ipsec: XfrmIPsec, window: int, esn: bool) -> None:
    if esn and not window:
        with pytest.raises(ValueError, match="need one"):
            make(direction=Direction.IN, esn=True, replay_window=0)
        return
    ipsec.add_sa(make(direction=Direction.IN, esn=esn, replay_window=window))
    (found,) = ipsec.list_sas()
    assert found.association is not None
    assert (found.association.replay_window, found.association.esn) == (window, esn)


@pytest.mark.parametrize("esn", [False, True])
@pytest.mark.parametrize("window", [32, 64, 1024])
@pytest.mark.parametrize("direction", list(Direction), ids=lambda value: value.value)
def test_sequence_numbers_that_go_on(ipsec: XfrmIPsec, direction: Direction, window: int, esn: bool) -> None:
    sequence = 0x5_0000_0007 if esn else 0x1234_5678
    destination = "127.0.0.1" if direction is Direction.IN else "192.0.2.2"
    sa = cbc(direction=direction, esn=esn, replay_window=window, destination=destination)
    assert ipsec.get_sa(ipsec.add_sa(sa, sequence=sequence)).sequence == sequence
    (found,) = ipsec.list_sas()
    assert found.association is not None
    assert found.association == dataclasses.replace(
        sa, replay_window=window if direction is Direction.IN else found.association.replay_window
    )
    ipsec.delete_sa(sa.sa_id)
    ipsec.allocate_spi(sa.source, sa.destination, minimum=sa.spi, maximum=sa.spi)
    assert ipsec.get_sa(ipsec.add_sa(sa, sequence=sequence)).sequence == sequence, "of a larval SA as well"


def test_the_direction_of_sas_of_others(ipsec: XfrmIPsec) -> None:
    ids = [ipsec.add_sa(make(1001, destination="127.0.0.1")), ipsec.add_sa(make(1002))]
    with XfrmIPsec() as other:
        found = {each.sa_id: each.association for each in other.list_sas()}
    expected = (Direction.OUT,) if ipsec.features.sa_direction else (Direction.IN, Direction.OUT)
    for sa_id, direction in zip(ids, expected * 2, strict=False):
        association = found[sa_id]
        assert association is not None
        assert association.direction is direction


def test_ip_xfrm_agrees(ipsec: XfrmIPsec) -> None:
    ipsec.add_sa(cbc(encapsulation=PORTS))
    shown = subprocess.run(["ip", "xfrm", "state"], capture_output=True, text=True, check=True).stdout
    assert "src 192.0.2.1 dst 192.0.2.2" in shown
    assert "proto esp spi 0xc0de0001 reqid 7 mode tunnel" in shown
    assert "auth-trunc hmac(sha256)" in shown
    assert "encap type espinudp sport 4500 dport 34567" in shown


def test_ports_depend_on_the_direction(ipsec: XfrmIPsec) -> None:
    ipsec.add_sa(make(1001, encapsulation=PORTS))
    ipsec.add_sa(make(1002, direction=Direction.IN, encapsulation=PORTS))
    shown = subprocess.run(["ip", "xfrm", "state"], capture_output=True, text=True, check=True).stdout
    assert shown.count("sport 4500 dport 34567") == shown.count("sport 34567 dport 4500") == 1


def test_messages_of_the_kernel_are_understood(ipsec: XfrmIPsec) -> None:
    """Every attribute in every answer is known and none has bytes left over."""
    ipsec.add_sa(cbc(1001, encapsulation=PORTS, direction=Direction.IN, esn=True))
    ipsec.add_sa(make(1002, mark=3, interface_id=4, tfc=1000))
    answers = ipsec._dump_sas()
    assert len(answers) == 2
    for answer in answers:
        message = decode(messages.xfrm_usersa_info, answer)
        names = [slot.name for slot in message["attrs"]]
        assert "UNKNOWN" not in names
        again = messages.xfrm_usersa_info()
        for name, _ in message.fields:
            again[name] = message[name]
        again["header"] = dict(message["header"])
        again["attrs"] = [(slot.name, slot.value) for slot in message["attrs"]]
        again.encode()
        assert bytes(again.data) == answer


# -- larval SAs


def test_an_spi_is_reserved_and_completed(ipsec: XfrmIPsec) -> None:
    spi = ipsec.allocate_spi("192.0.2.1", "192.0.2.2", reqid=7, minimum=0x1000, maximum=0x1FFF)
    assert 0x1000 <= spi <= 0x1FFF
    (larval,) = ipsec.list_sas()
    assert larval.larval
    assert larval.association is None
    sa_id = ipsec.add_sa(make(spi, direction=Direction.IN))
    (found,) = ipsec.list_sas()
    assert (found.larval, found.sa_id) == (False, sa_id)
    assert found.association is not None
    assert found.association.encryption_key == bytes(range(1, 21))


def test_an_spi_that_is_free_again(ipsec: XfrmIPsec) -> None:
    spi = ipsec.allocate_spi("192.0.2.1", "192.0.2.2", minimum=5000, maximum=5000, lifetime=0)
    ipsec.delete_sa(make(spi).sa_id)
    assert ipsec.allocate_spi("192.0.2.1", "192.0.2.2", minimum=5000, maximum=5000) == spi


# -- bad input


def test_duplicate_spi(ipsec: XfrmIPsec) -> None:
    ipsec.add_sa(make())
    error = refused(ipsec.add_sa, make(encryption_key=bytes(range(20))))
    assert error.errno == errno.EEXIST
    assert "0xc0de0001" in str(error)
    assert "another SPI" in error.remedy
    (left,) = ipsec.list_sas()
    assert left.association is not None
    assert left.association.encryption_key == bytes(range(1, 21))


def test_marks_tell_sas_apart(ipsec: XfrmIPsec) -> None:
    ids = [ipsec.add_sa(make(mark=mark)) for mark in (5, 6)]
    assert {each.sa_id for each in ipsec.list_sas()} == set(ids)
    ipsec.delete_sa(ids[0])
    assert [each.sa_id for each in ipsec.list_sas()] == ids[1:]
    ipsec.flush_sas()
    ipsec.add_sa(make())  # one without a mark is for all of them
    assert refused(ipsec.add_sa, make(mark=5)).errno == errno.EEXIST


def test_unknown_sa(ipsec: XfrmIPsec) -> None:
    nobody = make().sa_id
    for error in (refused(ipsec.get_sa, nobody), refused(ipsec.delete_sa, nobody)):
        assert error.errno == errno.ESRCH
        assert error.remedy
    assert refused(ipsec.update_sa, nobody, source="192.0.2.7").errno == errno.ESRCH
    policy = Policy(
        direction=Direction.OUT,
        selector=TrafficSelector(source="10.1.0.0/16", destination="10.2.0.0/16"),
        action=Action.DISCARD,
    )
    assert refused(ipsec.get_policy, policy).errno == errno.ESRCH
    assert refused(ipsec.delete_policy, policy).errno == errno.ESRCH


def test_a_missing_algorithm(ipsec: XfrmIPsec, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this kernel had no GCM: the request names an algorithm that nobody has."""
    from natcompat.kernel.xfrm import algorithms, probe, translate

    monkeypatch.setitem(algorithms.ENCRYPTION_NAMES, Encr.AES_GCM_16, "rfc4106(rot13(aes))")
    monkeypatch.setitem(probe.MODULES, "rfc4106(rot13(aes))", "gcm, ctr and ghash")
    translate._template.cache_clear()
    error = refused(ipsec.add_sa, make())
    translate._template.cache_clear()
    assert error.errno == errno.ENOSYS
    assert "Requested AEAD algorithm not found" in str(error)
    assert "modules gcm, ctr and ghash" in error.remedy
    assert ipsec.list_sas() == []


# -- moving an SA


def test_ports_change_in_place(ipsec: XfrmIPsec) -> None:
    sa_id = ipsec.add_sa(make(encapsulation=PORTS))
    added = ipsec.get_sa(sa_id).added
    with Deletions() as deletions:
        new = ipsec.update_sa(sa_id, encapsulation=UDPEncapsulation(local_port=4501, remote_port=1024))
        assert deletions.seen() == 0
    assert new == sa_id
    (found,) = ipsec.list_sas()
    assert found.association is not None
    assert found.association.encapsulation == UDPEncapsulation(local_port=4501, remote_port=1024)
    assert found.usage.added == added


class Deletions:
    """Counts the SAs that the kernel reports as deleted."""

    def __enter__(self) -> Deletions:
        self.socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 6)
        self.socket.bind((0, 1 << (messages.XFRMNLGRP_SA - 1)))
        self.socket.setblocking(False)
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def seen(self) -> int:
        count = 0
        while True:
            try:
                count += struct.unpack_from("=H", self.socket.recv(65536), 4)[0] == messages.XFRM_MSG_DELSA
            except BlockingIOError:
                return count


@pytest.mark.parametrize(
    "change",
    [
        {"source": "192.0.2.9"},
        {"destination": "192.0.2.9"},
        {"source": "192.0.2.8", "destination": "192.0.2.9"},
        {"encapsulation": None},
        {"source": "192.0.2.9", "encapsulation": UDPEncapsulation(local_port=4500, remote_port=77)},
    ],
    ids=lambda change: " and ".join(change),
)
@pytest.mark.parametrize("esn", [False, True], ids=["32 bit", "ESN"])
@pytest.mark.parametrize("direction", list(Direction), ids=lambda each: each.value)
def test_everything_else_is_kept_when_addresses_change(
    ipsec: XfrmIPsec, change: dict[str, Any], esn: bool, direction: Direction
) -> None:
    sa = make(encapsulation=PORTS, esn=esn, direction=direction, lifetime=Lifetime(hard_packets=1000))
    old = ipsec.add_sa(sa)
    before = _set_state(ipsec, sa)
    new = ipsec.update_sa(old, **change)
    after = _raw(ipsec, new)
    assert _replay(after) == _replay(before)
    (found,) = ipsec.list_sas()
    association = found.association
    assert association is not None
    assert association.source == ip_address(change.get("source", sa.source))
    assert association.destination == ip_address(change.get("destination", sa.destination))
    assert (association.encryption_key, association.esn) == (sa.encryption_key, esn)
    assert association.lifetime == sa.lifetime
    assert association.direction is direction
    assert association.encapsulation == change.get("encapsulation", sa.encapsulation)
    assert found.usage.octets == 5000
    assert found.usage.packets == 50


def _set_state(ipsec: XfrmIPsec, sa: SecurityAssociation) -> bytes:
    """Pretend traffic: set the counters and sequence numbers of `sa` (XFRM_MSG_NEWAE)."""
    message = bytearray(16) + bytearray(encode_sa_id(sa.sa_id)[16:])
    message += bytes(16) + struct.pack("=II", 0, 0)
    message += struct.pack("=HH4Q", 36, 9, 5000, 50, int(ipsec.get_sa(sa.sa_id).added), 0)  # XFRMA_LTIME_VAL
    outbound = sa.direction is Direction.OUT
    sent, received = (1234, 0) if outbound else (0, 1234)
    if outbound and not sa.esn:
        message += struct.pack("=HHIII", 16, 10, sent, 0, 0)
    else:  # an outbound SA has no window where the kernel knows that it is one
        words = int(not ipsec.features.sa_direction) if outbound else 2
        high = (int(outbound), int(not outbound)) if sa.esn else (0, 0)
        message += struct.pack(
            f"=HH6I{words}I", 28 + 4 * words, 23, words, sent, received, *high, 32 * words,
            *[0x5A5A5A5A] * words,
        )  # fmt: skip
    ipsec._netlink.request("aevent", message, messages.XFRM_MSG_NEWAE, 0x104)
    return _raw(ipsec, sa.sa_id)


def _raw(ipsec: XfrmIPsec, sa_id: Any) -> bytes:
    return ipsec._get(sa_id)


def _replay(answer: bytes) -> dict[int, bytes]:
    found = {kind: answer[start:end] for kind, start, end in attributes(answer, INFO_END) if kind in (10, 23)}
    assert any(b"\xd2\x04\0\0" in value for value in found.values())  # 1234
    return found


def test_a_move_that_fails_leaves_everything(ipsec: XfrmIPsec) -> None:
    first = ipsec.add_sa(make(encapsulation=PORTS))
    ipsec.add_sa(make(destination="192.0.2.9"))
    before = _raw(ipsec, first)[16:]
    assert refused(ipsec.update_sa, first, destination="192.0.2.9").errno == errno.EEXIST
    assert _raw(ipsec, first)[16:] == before
    with pytest.raises(ValueError, match="stays in its address family"):
        ipsec.update_sa(first, destination="2001:db8::9")
    assert len(ipsec.list_sas()) == 2


def test_what_is_deleted_and_refused_is_put_back(ipsec: XfrmIPsec, monkeypatch: pytest.MonkeyPatch) -> None:
    from natcompat.kernel.xfrm import move

    sa = make(encapsulation=PORTS)
    sa_id = ipsec.add_sa(sa)
    before = _set_state(ipsec, sa)
    changed = move._changed

    def spoiled(*arguments: Any) -> bytearray:
        message = changed(*arguments)
        message[move._AT["family"]] = 99  # the kernel refuses that
        return message

    monkeypatch.setattr(move, "_changed", spoiled)
    assert refused(ipsec.update_sa, sa_id, source="192.0.2.9").errno == errno.EINVAL
    assert _replay(_raw(ipsec, sa_id)) == _replay(before)
    assert ipsec.get_sa(sa_id).octets == 5000


# -- policies


# -- events
