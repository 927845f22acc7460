"""Security associations and policies in the words of RFC 4301 (`natcompat.ipsec` has the rest).

All values are immutable, checked when they are made (a `ValueError` or `TypeError` names the argument)
and safe to share between threads. Keys appear in no ``repr()``, no error and no pickle. Ports and
SPIs are integers in host byte order, durations are seconds, sizes are bytes.
"""

from __future__ import annotations

import errno
from collections.abc import Iterable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Any, NoReturn, Self, SupportsIndex

from natcompat.errors import NatCompatError
from natcompat.ipsec.offload import HardwareOffload
from natcompat.ipsec.selectors import TrafficSelector
from natcompat.ipsec.transforms import Encr, Integ, Key
from natcompat.ipsec.values import Direction, IPAddress, Mark, Mode, check_address, check_range, describe

SMALLEST_SPI = 256
"""1 to 255 are reserved, 0 is for local use (RFC 4303, 2.1)."""
LARGEST_SPI = 0xFFFF_FFFF
LARGEST_REPLAY_WINDOW = 4096
"""Packets; XFRMA_REPLAY_ESN_MAX of linux/xfrm.h, and enough for any offload."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UDPEncapsulation:
    """ESP goes in UDP (RFC 3948). Ports are local and remote, whatever the direction of the SA."""

    local_port: int
    remote_port: int
    original_address: IPAddress | None = None
    """The peer's address before the NAT (NAT-OA), for transport-mode checksums where a kernel wants it."""

    def __post_init__(self) -> None:
        check_range("local_port", self.local_port, 1, 65535)
        check_range("remote_port", self.remote_port, 1, 65535)
        if self.original_address is not None:
            object.__setattr__(self, "original_address", ip_address(self.original_address))


def spi_number(spi: int | bytes) -> int:
    """Return an SPI as an integer; `spi` may be four bytes in network order, as IKE has it."""
    if not isinstance(spi, bytes | bytearray | memoryview):
        return spi
    if len(spi) != 4:
        raise ValueError(f"spi: an SPI of ESP has 4 bytes, not {len(spi)}")
    return int.from_bytes(spi)


def wire_ports(encapsulation: UDPEncapsulation, direction: Direction) -> tuple[int, int]:
    """Return source and destination port of the packets of an SA. The one place that knows."""
    local, remote = encapsulation.local_port, encapsulation.remote_port
    return (local, remote) if direction is Direction.OUT else (remote, local)


def encapsulation_of(source_port: int, destination_port: int, direction: Direction) -> UDPEncapsulation:
    """Undo `wire_ports`."""
    if direction is Direction.OUT:
        return UDPEncapsulation(local_port=source_port, remote_port=destination_port)
    return UDPEncapsulation(local_port=destination_port, remote_port=source_port)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lifetime:
    """When an SA expires: at the soft limit it is time to rekey, at the hard limit the SA is gone.

    None: no limit. Seconds count from when the SA was added.
    """

    soft_seconds: int | None = None
    hard_seconds: int | None = None
    soft_bytes: int | None = None
    hard_bytes: int | None = None
    soft_packets: int | None = None
    hard_packets: int | None = None

    def __post_init__(self) -> None:
        for unit in ("seconds", "bytes", "packets"):
            soft: int | None = getattr(self, f"soft_{unit}")
            hard: int | None = getattr(self, f"hard_{unit}")
            for name, limit in ((f"soft_{unit}", soft), (f"hard_{unit}", hard)):
                if limit is not None:
                    check_range(name, limit, 1, 2**63)
            if soft is not None and hard is not None and soft > hard:
                raise ValueError(f"soft_{unit}: {soft} comes after hard_{unit}, {hard}")


@dataclass(frozen=True, slots=True, kw_only=True, init=False)
class SecurityAssociation:
    """One ESP security association, one direction (RFC 4301, 4.1)."""

    spi: int
    """256 to 2**32 - 1, chosen by the receiver; also taken as four bytes in network order."""
    source: IPAddress
    destination: IPAddress
    """The outer addresses, as this host sees them."""
    direction: Direction
    mode: Mode = Mode.TUNNEL
    encryption: Encr
    encryption_key: Key = field(repr=False)
    """The key and behind it the salt, as IKE derives them (RFC 4106, 8.1)."""
    integrity: Integ = Integ.NONE
    integrity_key: Key = field(default=Key(), repr=False)
    esn: bool = False
    """Extended (64-bit) sequence numbers (RFC 4303, 2.2.1)."""
    replay_window: int = 64
    """Packets; 0 turns the anti-replay service off. Means nothing on an outbound SA."""
    encapsulation: UDPEncapsulation | None = None
    lifetime: Lifetime = Lifetime()
    selectors: tuple[TrafficSelector, ...] = ()
    """What may pass the SA; empty: what the policies say."""
    reqid: int = 0
    """Ties the SA to the policies with the same number; 0: to those with none."""
    nat_keepalive: int | None = None
    """Send a NAT-keepalive after so many seconds without a packet; outbound encapsulated SAs only."""
    mark: Mark | None = None
    interface_id: int | None = None
    """The virtual interface that the SA belongs to (XFRM interface on Linux)."""
    tfc: int = 0
    """Pad tunnel-mode packets to this many bytes (RFC 4303, 2.7); 0: do not."""
    copy_dscp: bool = True
    """Outbound tunnel: copy the DSCP of the inner header to the outer one (RFC 4301, 5.1.2)."""
    copy_ecn: bool = True
    """Tunnel: keep ECN across the tunnel (RFC 6040)."""
    copy_df: bool = True
    """Outbound tunnel: copy the DF bit to the outer header; False: clear it there."""
    output_mark: Mark | None = None
    """The kernel sets these bits of the packet mark (XFRMA_SET_MARK) on what the SA sealed or opened.
    So answers find the right one of two clients behind one NAT (RFC 3948, 5.2)."""
    hw_offload: HardwareOffload | None = None
    cpu: int | None = None
    """The SA is for what this processor sends (RFC 9611; XFRMA_SA_PCPU, Linux 6.13). Unproven: no such kernel
    with ESP was at hand; the tests see the message."""

    __repr__ = describe

    def __init__(
        self,
        *,
        spi: int | bytes,
        source: IPAddress | str,
        destination: IPAddress | str,
        direction: Direction,
        mode: Mode = Mode.TUNNEL,
        encryption: Encr | int,
        encryption_key: bytes | bytearray | memoryview,
        integrity: Integ | int = Integ.NONE,
        integrity_key: bytes | bytearray | memoryview = b"",
        esn: bool = False,
        replay_window: int = 64,
        encapsulation: UDPEncapsulation | None = None,
        lifetime: Lifetime = Lifetime(),
        selectors: Iterable[TrafficSelector] = (),
        reqid: int = 0,
        nat_keepalive: int | None = None,
        mark: Mark | int | None = None,
        interface_id: int | None = None,
        tfc: int = 0,
        copy_dscp: bool = True,
        copy_ecn: bool = True,
        copy_df: bool = True,
        output_mark: Mark | int | None = None,
        hw_offload: HardwareOffload | None = None,
        cpu: int | None = None,
    ) -> None:
        # First of all: from here on no frame of ours holds key material that prints itself.
        try:
            encryption_key = _key("encryption_key", encryption_key)
            integrity_key = _key("integrity_key", integrity_key)
        except TypeError:
            encryption_key = integrity_key = _NO_KEY  # a traceback may show the local variables of this frame
            raise
        put = object.__setattr__
        put(self, "spi", check_range("spi", spi_number(spi), SMALLEST_SPI, LARGEST_SPI))
        put(self, "source", check_address("source", source))
        put(self, "destination", check_address("destination", destination))
        put(self, "direction", Direction(direction))
        put(self, "mode", Mode(mode))
        put(self, "encryption", _transform("encryption", Encr, encryption))
        put(self, "encryption_key", encryption_key)
        put(self, "integrity", _transform("integrity", Integ, integrity))
        put(self, "integrity_key", integrity_key)
        put(self, "esn", bool(esn))
        put(self, "replay_window", check_range("replay_window", replay_window, 0, LARGEST_REPLAY_WINDOW))
        put(self, "encapsulation", encapsulation)
        put(self, "lifetime", lifetime)
        put(self, "selectors", tuple(selectors))
        put(self, "reqid", check_range("reqid", reqid, 0, 0xFFFF_FFFF))
        put(self, "nat_keepalive", nat_keepalive)
        put(self, "mark", Mark(value=mark) if isinstance(mark, int) else mark)
        put(self, "interface_id", interface_id)
        put(self, "tfc", check_range("tfc", tfc, 0, 65535))
        put(self, "copy_dscp", bool(copy_dscp))
        put(self, "copy_ecn", bool(copy_ecn))
        put(self, "copy_df", bool(copy_df))
        put(self, "output_mark", Mark(value=output_mark) if isinstance(output_mark, int) else output_mark)
        put(self, "hw_offload", hw_offload)
        put(self, "cpu", None if cpu is None else check_range("cpu", cpu, 0, 0xFFFF_FFFE))
        self._check_addresses()
        self._check_transforms()
        self._check_services()

    def _check_addresses(self) -> None:
        if self.source.version != self.destination.version:
            raise ValueError("source, destination: an SA has one outer address family")
        if self.destination.is_unspecified:
            raise ValueError("destination: an SA has one; the unspecified address is none")
        original = self.encapsulation.original_address if self.encapsulation else None
        if original is not None and original.version != self.source.version:
            raise ValueError("encapsulation: original_address is of another family than the SA")
        if self.mode is Mode.TRANSPORT:
            for selector in self.selectors:
                if selector.source.version != self.source.version:
                    raise ValueError("selectors: transport mode carries the family of the SA only")

    def _check_transforms(self) -> None:
        encryption, integrity = self.encryption, self.integrity
        if len(self.encryption_key) not in encryption.key_lengths:
            lengths = " or ".join(str(length) for length in encryption.key_lengths)
            salt = f" (the last {encryption.salt_length} are the salt)" if encryption.salt_length else ""
            given = len(self.encryption_key)
            raise ValueError(f"encryption_key: {encryption.name} takes {lengths} bytes{salt}, not {given}")
        if len(self.integrity_key) != integrity.key_length:
            raise ValueError(
                f"integrity_key: {integrity.name} takes {integrity.key_length} bytes, "
                f"not {len(self.integrity_key)}"
            )
        if encryption.is_aead and integrity is not Integ.NONE:
            raise ValueError(f"integrity: {encryption.name} brings its own; it must be NONE")
        if not encryption.is_aead and integrity is Integ.NONE:
            raise ValueError(f"integrity: {encryption.name} without integrity is forbidden (RFC 8221, 4)")

    def _check_services(self) -> None:
        if self.esn and self.replay_window == 0 and self.direction is Direction.IN:
            raise ValueError("replay_window: extended sequence numbers need one (RFC 4303, 3.4.3)")
        if self.nat_keepalive is not None:
            check_range("nat_keepalive", self.nat_keepalive, 1, 3600)
            if self.direction is not Direction.OUT or self.encapsulation is None:
                raise ValueError("nat_keepalive: only outbound SAs with encapsulation send keepalives")
        if self.interface_id is not None:
            check_range("interface_id", self.interface_id, 1, 0xFFFF_FFFF)
        if self.tfc and self.mode is not Mode.TUNNEL:
            raise ValueError("tfc: only tunnel mode knows the length of what it carries (RFC 4303, 2.7)")

    @property
    def kernel_services(self) -> tuple[str, ...]:
        """The arguments of this SA that ask for what only a kernel does, by name; empty: none."""
        names = ("mark", "interface_id", "output_mark", "hw_offload", "cpu")
        return tuple(name for name in names if getattr(self, name) is not None)

    @property
    def sa_id(self) -> SaId:
        """The name of this SA from now on."""
        return SaId(spi=self.spi, destination=self.destination, source=self.source, mark=self.mark)

    def __reduce_ex__(self, _: SupportsIndex) -> NoReturn:
        raise TypeError("an SA holds keys, which are not pickled by accident; send its arguments instead")

    def __copy__(self) -> Self:
        return self

    def __deepcopy__(self, _: object) -> Self:
        return self


@dataclass(frozen=True, slots=True, kw_only=True, init=False)
class SaId:
    """The name of an installed ESP SA: SPI and destination (RFC 4301, 4.1), and a mark if it has one."""

    spi: int
    """Also taken as four bytes in network order."""
    destination: IPAddress
    mark: Mark | None = None
    source: IPAddress | None = field(default=None, compare=False)
    """Where its packets come from; not part of the name, but some kernels ask for it."""

    def __init__(
        self,
        *,
        spi: int | bytes,
        destination: IPAddress | str,
        mark: Mark | None = None,
        source: IPAddress | str | None = None,
    ) -> None:
        put = object.__setattr__
        put(self, "spi", spi_number(spi))
        put(self, "destination", check_address("destination", destination))
        put(self, "mark", mark)
        put(self, "source", None if source is None else check_address("source", source))

    def __str__(self) -> str:
        return f"ESP 0x{self.spi:08x} to {self.destination}"


def refuse_legacy(sa: SecurityAssociation, legacy: bool) -> None:
    """Raise `natcompat.NatCompatError` (EPROTONOSUPPORT) for old transforms without leave."""
    names = [transform.name for transform in (sa.encryption, sa.integrity) if transform.is_legacy]
    if names and not legacy:
        raise NatCompatError(
            errno.EPROTONOSUPPORT,
            f"{' and '.join(names)} of {sa.sa_id}: too old to be installed unasked (RFC 8221)",
            "Negotiate AES_GCM_16; for a peer that has nothing better, add_sa(sa, legacy=True)",
        )


_NO_KEY = Key()
"""One for all: there may be many SAs."""


def _key(name: str, value: object) -> Key:
    if not isinstance(value, (bytes, bytearray, memoryview)):
        kind = type(value).__name__
        del value  # a traceback may show the local variables of this frame
        raise TypeError(f"{name}: bytes are wanted, not {kind}")
    if not value:
        return _NO_KEY
    return value if isinstance(value, Key) else Key(value)


def _transform(name: str, registry: type[Any], value: int) -> Any:
    try:
        return registry(value)
    except ValueError:
        known = ", ".join(f"{transform.name} ({transform.value})" for transform in registry)
        raise ValueError(f"{name}: transform {value} is not known here; known are {known}") from None
