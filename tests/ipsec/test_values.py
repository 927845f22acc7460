"""SAs and policies are checked when they are made, and their keys stay where they are."""

import copy
import dataclasses
import json
import pickle
import subprocess
import sys
import traceback
from ipaddress import IPv4Address, IPv4Network, IPv6Address
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natcompat.ipsec import (
    Action,
    Direction,
    Encr,
    Integ,
    Key,
    Lifetime,
    Mark,
    Mode,
    Policy,
    SaId,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)

SECRET = b"swordfish-swordfish!"


def make(**changes: Any) -> SecurityAssociation:
    arguments: dict[str, Any] = {
        "spi": 0xC0DE0001,
        "source": "192.0.2.1",
        "destination": "192.0.2.2",
        "direction": Direction.IN,
        "encryption": Encr.AES_GCM_16,
        "encryption_key": SECRET,
    }
    return SecurityAssociation(**{**arguments, **changes})


def test_strings_become_addresses() -> None:
    sa = make()
    assert sa.source == IPv4Address("192.0.2.1")
    assert sa.sa_id == SaId(spi=0xC0DE0001, destination=IPv4Address("192.0.2.2"))
    assert str(sa.sa_id) == "ESP 0xc0de0001 to 192.0.2.2"


IANA = {
    "TRIPLE_DES_CBC": (3, (24,)),
    "NULL": (11, (0,)),
    "AES_CBC": (12, (16, 24, 32)),
    "AES_CTR": (13, (20, 28, 36)),
    "AES_CCM_8": (14, (19, 27, 35)),
    "AES_CCM_12": (15, (19, 27, 35)),
    "AES_CCM_16": (16, (19, 27, 35)),
    "AES_GCM_8": (18, (20, 28, 36)),
    "AES_GCM_12": (19, (20, 28, 36)),
    "AES_GCM_16": (20, (20, 28, 36)),
    "NULL_AUTH_AES_GMAC": (21, (20, 28, 36)),
    "CAMELLIA_CBC": (23, (16, 24, 32)),
    "CHACHA20_POLY1305": (28, (36,)),
}


def test_encryption_transforms_are_those_of_iana() -> None:
    assert {transform.name: (transform.value, transform.key_lengths) for transform in Encr} == IANA


@pytest.mark.parametrize("transform", list(Encr), ids=lambda transform: transform.name)
@pytest.mark.parametrize("length", range(40))
def test_key_lengths(transform: Encr, length: int) -> None:
    integrity: dict[str, Any] = (
        {} if transform.is_aead else {"integrity": Integ.HMAC_SHA1_96, "integrity_key": bytes(20)}
    )
    if length in transform.key_lengths:
        assert (
            len(make(encryption=transform, encryption_key=bytes(length), **integrity).encryption_key)
            == length
        )
    else:
        with pytest.raises(
            ValueError, match=f"^encryption_key: {transform.name} takes .* bytes.*, not {length}$"
        ):
            make(encryption=transform, encryption_key=bytes(length), **integrity)


@pytest.mark.parametrize(
    ("transform", "length", "icv"),
    [
        (1, 16, 12),
        (2, 20, 12),
        (5, 16, 12),
        (8, 16, 12),
        (12, 32, 16),
        (13, 48, 24),
        (14, 64, 32),
        (1026, 32, 12),
    ],
)
def test_integrity_key_lengths(transform: int, length: int, icv: int) -> None:
    cbc: dict[str, Any] = {"encryption": 12, "encryption_key": bytes(16), "integrity": transform}
    sa = make(**cbc, integrity_key=bytes(length))
    assert sa.integrity is Integ(transform)
    assert sa.integrity.icv_length == icv
    with pytest.raises(ValueError, match=f"^integrity_key: .* takes {length} bytes, not {length - 1}"):
        make(**cbc, integrity_key=bytes(length - 1))


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"spi": 255}, "spi: 255 is not in 256..4294967295"),
        ({"spi": 1 << 32}, "spi: 4294967296 is not in"),
        ({"spi": -1}, "spi: -1 is not in"),
        ({"source": "2001:db8::1"}, "one outer address family"),
        ({"source": "192.0.2.300"}, "source: '192.0.2.300' is not an IP address"),
        ({"destination": "0.0.0.0"}, "destination: an SA has one"),
        ({"encryption": 99}, "encryption: transform 99 is not known here; known are TRIPLE_DES_CBC"),
        ({"integrity": 3}, "integrity: transform 3 is not known here"),
        ({"integrity": Integ.HMAC_SHA1_96, "integrity_key": bytes(20)}, "AES_GCM_16 brings its own"),
        ({"encryption": Encr.AES_CBC, "encryption_key": bytes(16)}, "without integrity is forbidden"),
        ({"replay_window": 4097}, "replay_window: 4097 is not in"),
        ({"reqid": -1}, "reqid: -1"),
        ({"nat_keepalive": 20}, "nat_keepalive: only outbound SAs with encapsulation"),
        ({"interface_id": 0}, "interface_id: 0 is not in"),
        ({"tfc": 1400, "mode": Mode.TRANSPORT}, "tfc: only tunnel mode"),
        (
            {
                "mode": Mode.TRANSPORT,
                "selectors": [TrafficSelector(source="2001:db8::/64", destination="2001:db8::/64")],
            },
            "transport mode carries the family of the SA only",
        ),
        (
            {
                "encapsulation": UDPEncapsulation(
                    local_port=4500, remote_port=4500, original_address=IPv6Address("2001:db8::1")
                )
            },
            "original_address is of another family",
        ),
    ],
)
def test_bad_associations(changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ValueError, match=problem.replace("(", r"\(")):
        make(**changes)


@pytest.mark.parametrize("name", ["encryption_key", "integrity_key"])
def test_keys_are_bytes(name: str) -> None:
    with pytest.raises(TypeError, match=f"{name}: bytes are wanted, not str"):
        make(**{name: "swordfish"})
    with pytest.raises(TypeError, match="spi: an integer is wanted, not float"):
        make(spi=1e3)


def test_values_of_the_other_types() -> None:
    with pytest.raises(ValueError, match="local_port: 0 is not in"):
        UDPEncapsulation(local_port=0, remote_port=4500)
    with pytest.raises(ValueError, match="soft_seconds: 20 comes after hard_seconds, 10"):
        Lifetime(soft_seconds=20, hard_seconds=10)
    with pytest.raises(ValueError, match="hard_bytes: 0 is not in"):
        Lifetime(hard_bytes=0)
    with pytest.raises(ValueError, match="never matches"):
        Mark(value=3, mask=2)
    with pytest.raises(ValueError, match="protocol: 0 has no ports"):
        TrafficSelector(source="10.0.0.0/8", destination="10.0.0.0/8", source_port=80)
    with pytest.raises(ValueError, match=r"source: .* has host bits set"):
        TrafficSelector(source="10.0.0.1/8", destination="10.0.0.0/8")
    with pytest.raises(ValueError, match="one address family"):
        TrafficSelector(source="10.0.0.0/8", destination="2001:db8::/32")
    selector = TrafficSelector(source="10.0.0.1", destination="10.0.0.0/8")
    assert selector.source == IPv4Network("10.0.0.1/32")
    with pytest.raises(ValueError, match="a tunnel policy needs both outer addresses"):
        Policy(direction=Direction.IN, selector=selector)
    with pytest.raises(ValueError, match="priority: -1"):
        Policy(direction=Direction.IN, selector=selector, action=Action.DISCARD, priority=-1)


def leaks(text: str) -> bool:
    return any(part in text for part in ("swordfish", SECRET.hex(), "ordfish", "119, 111, 114, 100"))


def test_keys_do_not_print() -> None:
    sa = make()
    assert not leaks(
        repr(sa) + str(sa) + f"{sa}{sa.encryption_key}{sa.encryption_key!r}%s" % sa.encryption_key
    )
    assert not leaks(repr(dataclasses.asdict(sa)) + repr(dataclasses.astuple(sa)))
    assert repr(sa.encryption_key) == "<key of 20 bytes>"
    assert bytes(sa.encryption_key) == SECRET == sa.encryption_key


def test_keys_do_not_travel() -> None:
    sa = make()
    for value in (sa, sa.encryption_key):
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            with pytest.raises(TypeError, match="not pickled by accident"):
                pickle.dumps(value, protocol)
        with pytest.raises(TypeError):
            json.dumps(value)
        assert copy.copy(value) is value
        assert copy.deepcopy(value) is value


@pytest.mark.parametrize(
    "changes", [{"spi": 1}, {"encryption_key": SECRET + b"x"}, {"tfc": "1"}, {"integrity_key": SECRET}]
)
def test_keys_are_not_in_the_locals_of_a_traceback(changes: dict[str, Any]) -> None:
    with pytest.raises((ValueError, TypeError)) as caught:
        make(**changes)
    frames = traceback.TracebackException.from_exception(caught.value, capture_locals=True).stack
    ours = [frame for frame in frames if frame.filename.endswith("associations.py")]
    assert ours
    assert not leaks(repr([frame.locals for frame in ours]))
    assert not leaks(str(caught.value))


def test_values_are_immutable_and_can_be_replaced() -> None:
    sa = make(mark=7)
    assert sa.mark == Mark(value=7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        sa.spi = 300  # type: ignore[misc]
    with pytest.raises((AttributeError, TypeError)):
        object.__setattr__(sa, "colour", "red")
    other = dataclasses.replace(sa, spi=300)
    assert (other.spi, other.encryption_key) == (300, sa.encryption_key)
    assert other != sa
    assert hash(dataclasses.replace(other, spi=sa.spi)) == hash(sa)


@given(st.binary(max_size=80))
def test_key_is_its_bytes(octets: bytes) -> None:
    assert Key(octets) == octets
    assert str(Key(octets)) == f"<key of {len(octets)} bytes>"


def test_knows_no_backend() -> None:
    script = (
        "import sys, natcompat.ipsec as _;"
        "print([m for m in sys.modules if m.startswith('pyroute2') or 'cryptography' in m or '.xfrm' in m])"
    )
    answer = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert answer.stdout.strip() == "[]"
