"""NAT detection of IKEv2 and IKEv1: the hashes to send, and the conclusion from those received."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv6Address, ip_address
from typing import Self, TypeAlias

from natcompat.ipsec import IPAddress

IkeAddress: TypeAlias = tuple[str | IPAddress, int]
"""IP address and UDP port (host byte order). The further members of an IPv6 socket address are ignored."""

_NOWHERE: IkeAddress = ("0.0.0.0", 0)  # noqa: S104 - not bound to, but hashed
"""The false source of a forced detection. No packet can come from there, so that the hash never matches."""


def nat_detection_hash(
    spi_i: bytes | int, spi_r: bytes | int, address: str | IPAddress, port: int, *, algorithm: str = "sha1"
) -> bytes:
    """Return the data of a NAT_DETECTION_SOURCE_IP or NAT_DETECTION_DESTINATION_IP notification.

    The hash is over both SPIs of the IKE header (8 bytes each; as an integer, in host byte order), the
    address (4 or 16 bytes) and the port (2 bytes). `spi_r` is 0 in the first request (RFC 7296, 2.23).
    IKEv2 uses SHA-1: 20 bytes. For IKEv1 pass the cookies, and the hash that phase 1 negotiated as
    `algorithm`, a name of `hashlib` (RFC 3947, 3.2).
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port: {port} is not in 0..65535")
    data = _ike_spi("spi_i", spi_i) + _ike_spi("spi_r", spi_r) + _plain(address).packed + port.to_bytes(2)
    return hashlib.new(algorithm, data, usedforsecurity=False).digest()


@dataclass(frozen=True, slots=True)
class NatDetection:
    """The result of NAT detection between two IKE peers (RFC 7296, 2.23; RFC 3947, 3.2)."""

    supported: bool
    """Both peers sent the hashes. False: this peer has no NAT traversal."""
    local_behind_nat: bool
    """A NAT changed this host's address or port. This host then sends the NAT-keepalives."""
    remote_behind_nat: bool
    """A NAT changed the peer's address or port."""
    forced: bool = False
    """This host sent a false source hash, so that the peer uses UDP encapsulation without a NAT."""

    @property
    def encapsulate(self) -> bool:
        """Whether IKE moves to port 4500 and ESP goes in UDP."""
        return self.supported and (self.local_behind_nat or self.remote_behind_nat or self.forced)

    @property
    def needs_keepalive(self) -> bool:
        """Whether this host sends NAT-keepalives (RFC 3948, 4: the host behind the NAT does)."""
        return self.supported and self.local_behind_nat

    @staticmethod
    def hashes(
        spi_i: bytes | int,
        spi_r: bytes | int,
        *,
        local: IkeAddress,
        remote: IkeAddress,
        force: bool = False,
        algorithm: str = "sha1",
    ) -> tuple[bytes, bytes]:
        """Return the data of NAT_DETECTION_SOURCE_IP and NAT_DETECTION_DESTINATION_IP to send.

        `local` and `remote` are the addresses of the message that carries them: a socket bound to a
        wildcard has to find out its local address first (`endpoint.receive()`).

        `force=True` makes the peer use UDP encapsulation although there is no NAT, for an IPsec whose
        `features.requires_udp_encapsulation` is true: the source hash is that of 0.0.0.0 port 0, which
        matches no packet. The initiator and the responder do it in the same way, each in its own message.
        """
        return (
            nat_detection_hash(spi_i, spi_r, *(_NOWHERE if force else local[:2]), algorithm=algorithm),
            nat_detection_hash(spi_i, spi_r, *remote[:2], algorithm=algorithm),
        )

    @classmethod
    def received(
        cls,
        spi_i: bytes | int,
        spi_r: bytes | int,
        *,
        local: IkeAddress,
        remote: IkeAddress,
        sources: Iterable[bytes],
        destinations: Iterable[bytes],
        forced: bool = False,
        algorithm: str = "sha1",
    ) -> Self:
        """Return what the peer's hashes say.

        `spi_i` and `spi_r` are those in the header of the peer's message, `local` and `remote` its
        destination and source as this host received it. `sources` and `destinations` are the data of all
        its NAT_DETECTION_SOURCE_IP and NAT_DETECTION_DESTINATION_IP notifications: a peer that does not
        know its address sends several source hashes, and one match is enough. Where either kind is
        missing, `supported` is False. `forced`: whether this host sent its own hashes with `force=True`.

        The notifications of IKE_SA_INIT are not authenticated at this point: conclude nothing from them
        but where to send. Somebody on the path can cause UDP encapsulation, and no more.
        """
        sources, destinations = list(sources), list(destinations)
        if not sources or not destinations:
            return cls(supported=False, local_behind_nat=False, remote_behind_nat=False, forced=forced)
        source = nat_detection_hash(spi_i, spi_r, *remote[:2], algorithm=algorithm)
        destination = nat_detection_hash(spi_i, spi_r, *local[:2], algorithm=algorithm)
        return cls(
            supported=True,
            local_behind_nat=destination not in destinations,
            remote_behind_nat=source not in sources,
            forced=forced,
        )


def _ike_spi(name: str, value: bytes | int) -> bytes:
    if isinstance(value, int):
        if not 0 <= value < 1 << 64:
            raise ValueError(f"{name}: an IKE SPI has 64 bits")
        return value.to_bytes(8)
    if len(value) != 8:
        raise ValueError(f"{name}: an IKE SPI has 8 bytes, not {len(value)}")
    return bytes(value)


def _plain(address: str | IPAddress) -> IPAddress:
    """Return the address as it is in the packet: without a zone, and IPv4 where it is mapped into IPv6."""
    parsed = ip_address(str(address).partition("%")[0])
    mapped = parsed.ipv4_mapped if isinstance(parsed, IPv6Address) else None
    return mapped or parsed
