"""SAs, policies and packets for the tests of ESP in this process."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any
from unittest import mock

from natcompat.esp.engine import nonces
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.packet import checksum
from natcompat.esp.engine.results import Destination, Dropped, Opened, Reason
from natcompat.ipsec import (
    Action,
    Direction,
    Encr,
    Integ,
    Mode,
    Policy,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)

OUTER = {4: ("192.0.2.1", "192.0.2.2"), 6: ("2001:db8::1", "2001:db8::2")}
"""This end and the other, by IP version of the outer header."""

INNER = {4: ("10.1.0.1", "10.2.0.1"), 6: ("fd00:1::1", "fd00:2::1")}
"""A host behind this end and one behind the other."""

NETWORKS = {4: ("10.1.0.0/16", "10.2.0.0/16"), 6: ("fd00:1::/64", "fd00:2::/64")}
INBOUND_SELECTOR = TrafficSelector(source=NETWORKS[4][0], destination=NETWORKS[4][1])
"""What `Pair.far` takes from `Pair.near`."""

PORTS = UDPEncapsulation(local_port=4500, remote_port=4500)
SPI = 0xC0DE0001

TRANSFORMS: list[tuple[Encr, Integ]] = [
    *((encryption, Integ.NONE) for encryption in Encr if encryption.is_aead),
    *itertools.product(
        [Encr.AES_CBC, Encr.AES_CTR, Encr.NULL],
        [each for each in Integ if each not in (Integ.NONE, Integ.AES_XCBC_96) and not each.is_legacy],
    ),
]
"""Every combination that the engine has."""

IN_C = [each for each in TRANSFORMS if "CCM" not in each[0].name and each[0] is not Encr.NULL_AUTH_AES_GMAC]
"""Those that the C data path has, in tunnel mode; the rest it leaves to Python."""


def native_providers() -> list[str]:
    """Return the libraries that the C data path has for its ciphers here; none: there is no such path."""
    try:
        from natcompat.esp.datapath.compiled import ffi, lib
    except ImportError:
        return []
    found = []
    for each in ("ipsec-mb", "libcrypto"):
        path = lib.esp_path_new(each.encode())
        if path != ffi.NULL:
            lib.esp_path_release(path)
            found.append(each)
    return found


@contextlib.contextmanager
def another_process() -> Iterator[None]:
    """Let an engine that is made within have the memory of a process that has used no keys."""
    with mock.patch.object(nonces, "USED_KEYS", nonces.UsedKeys()):
        yield


def name(transforms: tuple[Encr, Integ]) -> str:
    """Return an id for a parametrised test."""
    return "-".join(each.name for each in transforms if each is not Integ.NONE)


def keys(encryption: Encr, integrity: Integ = Integ.NONE, *, length: int | None = None) -> dict[str, Any]:
    """Return the arguments for transforms, with keys of the greatest length, or of `length` bytes."""
    size = max(encryption.key_lengths) if length is None else length
    return {
        "encryption": encryption,
        "encryption_key": bytes(range(1, size + 1)),
        "integrity": integrity,
        "integrity_key": bytes(range(101, 101 + integrity.key_length)),
    }


def sa(direction: Direction, *, version: int = 4, **changes: Any) -> SecurityAssociation:
    """Return an SA of this end, towards the other or from there."""
    local, remote = OUTER[version]
    out = direction is Direction.OUT
    arguments: dict[str, Any] = {
        "spi": SPI,
        "source": local if out else remote,
        "destination": remote if out else local,
        "direction": direction,
        "encapsulation": PORTS,
        "reqid": 7,
        **keys(Encr.AES_GCM_16, length=20),
        **changes,
    }
    return SecurityAssociation(**arguments)


def policy(direction: Direction, *, version: int = 4, inner: int = 4, **changes: Any) -> Policy:
    """Return the policy that belongs to `sa`."""
    out = direction is Direction.OUT
    local, remote = OUTER[version] if out else OUTER[version][::-1]
    near, far = NETWORKS[inner] if out else NETWORKS[inner][::-1]
    transport = changes.get("mode") is Mode.TRANSPORT
    arguments: dict[str, Any] = {
        "direction": direction,
        "selector": TrafficSelector(source=local, destination=remote)
        if transport
        else TrafficSelector(source=near, destination=far),
        "reqid": 7,
        **changes,
    }
    if not transport and arguments.get("action", Action.PROTECT) is Action.PROTECT:
        arguments = {"source": local, "destination": remote, **arguments}
    return Policy(**arguments)


def ip_packet(
    source: str,
    destination: str,
    payload: bytes,
    *,
    protocol: int = 17,
    traffic_class: int = 0,
    dont_fragment: bool = False,
) -> bytes:
    """Return an IP packet of either version."""
    addresses = ip_address(source).packed + ip_address(destination).packed
    if ip_address(source).version == 6:
        start = (0x6000_0000 | traffic_class << 20).to_bytes(4) + len(payload).to_bytes(2)
        return start + bytes((protocol, 64)) + addresses + payload
    start = bytes((0x45, traffic_class)) + (20 + len(payload)).to_bytes(2) + bytes(2)
    start += bytes((0x40 if dont_fragment else 0, 0, 64, protocol))
    return start + checksum(start + bytes(2) + addresses).to_bytes(2) + addresses + payload


def udp(payload: bytes = b"a question", *, source_port: int = 1234, destination_port: int = 53) -> bytes:
    """Return a UDP datagram without a checksum."""
    ports = source_port.to_bytes(2) + destination_port.to_bytes(2)
    return ports + (8 + len(payload)).to_bytes(2) + bytes(2) + payload


def inner(version: int = 4, payload: bytes | None = None, **changes: Any) -> bytes:
    """Return a packet from behind this end to behind the other."""
    return ip_packet(*INNER[version], udp() if payload is None else payload, **changes)


def only(sealed: list[tuple[bytes, Destination]] | Dropped) -> tuple[bytes, Destination]:
    """Return the only packet that was sealed."""
    assert not isinstance(sealed, Dropped), sealed
    (packet,) = sealed
    return packet


def drop_reason(result: object) -> Reason | None:
    """Return why a packet was dropped; None: it was not."""
    return result.reason if isinstance(result, Dropped) else None


class Pair:
    """Two engines: `near` seals what `far` opens."""

    def __init__(
        self, *, version: int = 4, inner: int | None = None, sequence: int | None = None, **changes: Any
    ) -> None:
        self.near, self.far = EspEngine(timer=False), EspEngine(timer=False)
        mode = changes.get("mode", Mode.TUNNEL)
        local, remote = OUTER[version]
        self.source = (local, 4500)
        self.sent = self.near.add_sa(sa(Direction.OUT, version=version, **changes), sequence=sequence)
        self.expected = self.far.add_sa(
            sa(Direction.IN, version=version, **{**changes, "source": local, "destination": remote})
        )
        inner = inner or version
        self.near.add_policy(policy(Direction.OUT, version=version, inner=inner, mode=mode))
        near, far = NETWORKS[inner]
        selector = (
            TrafficSelector(source=local, destination=remote)
            if mode is Mode.TRANSPORT
            else TrafficSelector(source=near, destination=far)
        )
        self.far.add_policy(
            policy(Direction.IN, mode=mode, selector=selector, source=local, destination=remote)
        )

    def seal(self, packet: bytes) -> tuple[bytes, Destination]:
        """Return what `near` makes of `packet`."""
        return only(self.near.seal(packet))

    def open(self, packet: bytes, traffic_class: int = 0) -> bytes | Reason:
        """Return what `far` makes of `packet`."""
        opened = self.far.open(packet, self.source, traffic_class)
        return opened.inner if isinstance(opened, Opened) else opened.reason
