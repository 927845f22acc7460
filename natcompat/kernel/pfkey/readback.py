"""Reads the kernel's SAs and their usage from PF_KEY messages."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple, TypeVar

from natcompat.ipsec import InstalledSA, Usage
from natcompat.ipsec.associations import (
    Lifetime,
    SaId,
    SecurityAssociation,
    UDPEncapsulation,
    encapsulation_of,
)
from natcompat.ipsec.selectors import TrafficSelector
from natcompat.ipsec.transforms import Integ, Key
from natcompat.ipsec.values import Direction, IPAddress, Mode
from natcompat.kernel.pfkey import numbers as n
from natcompat.kernel.pfkey.dialects import Dialect, Modes, NatT
from natcompat.kernel.pfkey.messages import (
    AddressFields,
    Extension,
    LifetimeFields,
    MalformedMessageError,
    Message,
    SaFields,
    read_address,
    read_key,
    read_lifetime,
    read_port,
    read_sa,
    read_sa_ports,
    unpack,
)
from natcompat.kernel.pfkey.translate import everything, network

Found = TypeVar("Found")


class SaRecord(NamedTuple):
    """An SA as a message names it."""

    sa_id: SaId
    source: IPAddress
    fields: SaFields
    reqid: int


def required(message: Message, kind: int) -> Extension:
    """Return an extension without which the message says nothing."""
    found = message.find(kind)
    if found is None:
        raise MalformedMessageError(f"message {message.type} lacks extension {kind}")
    return found


def optional(message: Message, kind: int, read: Callable[[Extension], Found], otherwise: Found) -> Found:
    """Return what an extension says, or `otherwise` where there is none."""
    found = message.find(kind)
    return otherwise if found is None else read(found)


def record_of(dialect: Dialect, message: Message) -> SaRecord:
    """Return the name of the SA in a message, and its reqid where the kernel keeps one."""
    fields = read_sa(required(message, n.SADB_EXT_SA))
    source = read_address(dialect, required(message, n.SADB_EXT_ADDRESS_SRC)).address
    destination = read_address(dialect, required(message, n.SADB_EXT_ADDRESS_DST)).address
    sa_id = SaId(spi=fields.spi, source=source, destination=destination)
    return SaRecord(sa_id, source, fields, _sa2(dialect, message)[2])


def _sa2(dialect: Dialect, message: Message) -> tuple[int, int, int]:
    """Return mode, sequence number and reqid of the struct sadb_x_sa2; zeros where there is none."""
    if dialect.modes is not Modes.SA2:
        return 0, 0, 0
    found = message.find(n.SADB_X_EXT_SA2)
    if found is None:
        return 0, 0, 0
    mode, sequence, reqid = unpack("=B3xII", found)
    return mode, sequence, reqid


def usage_of(dialect: Dialect, message: Message) -> Usage:
    """Return the usage in an answer to SADB_GET or SADB_DUMP."""
    current = optional(message, n.SADB_EXT_LIFETIME_CURRENT, read_lifetime, LifetimeFields())
    last_used: float | None = None
    sequence: int | None = None
    packets = current.allocations
    if dialect.modes is Modes.FLAG:  # OpenBSD
        last = optional(message, n.SADB_X_EXT_LIFETIME_LASTUSE, read_lifetime, LifetimeFields())
        last_used = float(last.used) or None
        sequence = optional(message, n.SADB_X_EXT_REPLAY, lambda found: unpack("=4xQ", found)[0], 0)
        packets = optional(message, n.SADB_X_EXT_COUNTER, lambda found: sum(unpack("=4xQQ", found)), 0)
    elif dialect.modes is Modes.INNER:  # Solaris, which leaves the extension out while it is 0
        sequence = optional(message, n.SADB_X_EXT_REPLAY_VALUE, lambda found: unpack("=I", found)[0], 0)
    elif not dialect.packet_lifetimes:  # KAME's descendants
        sequence = _sa2(dialect, message)[1]
    if not dialect.packet_lifetimes and dialect.modes is not Modes.FLAG:
        packets = sequence or 0  # nothing else there counts packets
    return Usage(
        packets=packets,
        octets=current.bytes,
        added=float(current.added),
        first_used=float(current.used) or None,
        last_used=last_used,
        replay_drops=None,
        window_drops=None,
        integrity_drops=None,
        sequence=sequence,
    )


def lifetime_of(dialect: Dialect, message: Message) -> Lifetime:
    """Return the limits in an answer or an expiry."""
    hard = optional(message, n.SADB_EXT_LIFETIME_HARD, read_lifetime, LifetimeFields())
    soft = optional(message, n.SADB_EXT_LIFETIME_SOFT, read_lifetime, LifetimeFields())

    def limit(value: int) -> int | None:
        return value if 0 < value <= 2**63 else None

    packets = dialect.packet_lifetimes
    return Lifetime(
        soft_seconds=limit(soft.added),
        hard_seconds=limit(hard.added),
        soft_bytes=limit(soft.bytes),
        hard_bytes=limit(hard.bytes),
        soft_packets=limit(soft.allocations) if packets else None,
        hard_packets=limit(hard.allocations) if packets else None,
    )


def installed_sa(
    dialect: Dialect, message: Message, direction_of: Callable[[SaId], Direction]
) -> InstalledSA:
    """Return the SA in an answer to SADB_GET or SADB_DUMP.

    `direction_of` tells the direction of an SA for which the kernel knows none.
    """
    record = record_of(dialect, message)
    larval = record.fields.state == n.SADB_SASTATE_LARVAL
    association = None
    description = "ESP"
    if not larval:
        fields = record.fields
        try:
            association = _association(dialect, message, record, direction_of)
            description = f"ESP {association.encryption.name}"
            if association.integrity is not Integ.NONE:
                description += f" {association.integrity.name}"
        except MalformedMessageError:
            raise
        except (KeyError, ValueError) as error:
            reason = f" ({error})" if not isinstance(error, KeyError) else ""
            description = f"ESP encryption {fields.encryption}, integrity {fields.integrity}{reason}"
    return InstalledSA(
        sa_id=record.sa_id,
        association=association,
        usage=usage_of(dialect, message),
        larval=larval,
        description=description,
    )


def _association(
    dialect: Dialect, message: Message, record: SaRecord, direction_of: Callable[[SaId], Direction]
) -> SecurityAssociation:
    """Say the kernel's SA in the words of RFC 4301; ValueError or KeyError for what cannot be said."""
    sa_id, source, fields, reqid = record
    direction = _direction(dialect, fields) or direction_of(sa_id)
    encryption = _reverse(dialect.encryption)[fields.encryption]
    integrity = Integ.NONE
    if fields.integrity and not encryption.is_aead:
        integrity = _reverse(dialect.integrity)[fields.integrity]
    encapsulation = encapsulation_in(dialect, message, direction)
    selectors: tuple[TrafficSelector, ...] = ()
    if dialect.modes is Modes.INNER:
        inner = inner_selector(dialect, message)
        if inner is not None and inner != everything(inner.source.version):
            selectors = (inner,)
    return SecurityAssociation(
        spi=sa_id.spi,
        source=source,
        destination=sa_id.destination,
        direction=direction,
        mode=_mode(dialect, message, fields),
        encryption=encryption,
        encryption_key=optional(message, n.SADB_EXT_KEY_ENCRYPT, _key, Key()),
        integrity=integrity,
        integrity_key=optional(message, n.SADB_EXT_KEY_AUTH, _key, Key()),
        esn=bool(dialect.esn and fields.flags & dialect.esn),
        replay_window=_window(dialect, message, fields),
        encapsulation=encapsulation,
        lifetime=lifetime_of(dialect, message),
        selectors=selectors,
        reqid=reqid,
        copy_ecn=not fields.flags & dialect.no_ecn,
        copy_df=not fields.flags & dialect.no_pmtu_discovery,
    )


def _key(found: Extension) -> Key:
    return Key(read_key(found))


def _reverse(table: Mapping[Found, int]) -> dict[int, Found]:
    return {number: transform for transform, number in table.items()}


def _direction(dialect: Dialect, fields: SaFields) -> Direction | None:
    if dialect.modes is Modes.INNER:
        if fields.flags & n.SOLARIS_OUTBOUND:
            return Direction.OUT
        if fields.flags & n.SOLARIS_INBOUND:
            return Direction.IN
    return None


def _mode(dialect: Dialect, message: Message, fields: SaFields) -> Mode:
    if dialect.modes is Modes.FLAG:
        return Mode.TUNNEL if fields.flags & n.OPENBSD_TUNNEL else Mode.TRANSPORT
    if dialect.modes is Modes.INNER:
        return Mode.TUNNEL if fields.flags & n.SOLARIS_TUNNEL else Mode.TRANSPORT
    number = _sa2(dialect, message)[0]
    if number not in (n.IPSEC_MODE_TRANSPORT, n.IPSEC_MODE_TUNNEL):
        raise ValueError("neither tunnel nor transport mode")
    return Mode.TUNNEL if number == n.IPSEC_MODE_TUNNEL else Mode.TRANSPORT


def _window(dialect: Dialect, message: Message, fields: SaFields) -> int:
    window = fields.window * (8 if dialect.window_in_bytes else 1)
    if dialect.wide_windows:
        window = optional(message, n.SADB_X_EXT_SA_REPLAY, lambda found: unpack("=I", found)[0], window)
    return window


def encapsulation_in(dialect: Dialect, message: Message, direction: Direction) -> UDPEncapsulation | None:
    """Return how an SA goes in UDP; None: it does not."""
    if dialect.nat_t is NatT.PORTS:
        source = optional(message, n.SADB_X_EXT_NAT_T_SPORT, read_port, 0)
        destination = optional(message, n.SADB_X_EXT_NAT_T_DPORT, read_port, 0)
        return encapsulation_of(source, destination, direction) if source and destination else None
    if dialect.nat_t is NatT.SA:
        ports = read_sa_ports(required(message, n.SADB_EXT_SA))
        return UDPEncapsulation(local_port=ports[2], remote_port=ports[0]) if ports and ports[0] else None
    if dialect.nat_t is NatT.PEER:
        port = optional(message, n.SADB_X_EXT_UDPENCAP, read_port, 0)
        return UDPEncapsulation(local_port=4500, remote_port=port) if port else None

    def read(found: Extension) -> AddressFields | None:
        return read_address(dialect, found)

    local = optional(message, n.SADB_X_EXT_ADDRESS_NATT_LOC, read, None)
    remote = optional(message, n.SADB_X_EXT_ADDRESS_NATT_REM, read, None)
    if local is None and remote is None:
        return None
    original = remote.address if remote and not remote.address.is_unspecified else None
    return UDPEncapsulation(
        local_port=(local.port if local else 0) or 4500,
        remote_port=(remote.port if remote else 0) or 4500,
        original_address=original,
    )


def inner_selector(dialect: Dialect, message: Message) -> TrafficSelector | None:
    """Return the selector in the inner addresses of an SA or an acquire (Solaris); None: there are none."""
    start = message.find(n.SADB_X_EXT_ADDRESS_INNER_SRC)
    end = message.find(n.SADB_X_EXT_ADDRESS_INNER_DST)
    if start is None or end is None:
        return None
    source, destination = read_address(dialect, start), read_address(dialect, end)
    return TrafficSelector(
        source=network(source.address, source.prefix),
        destination=network(destination.address, destination.prefix),
        protocol=source.protocol,
        source_port=source.port,
        destination_port=destination.port,
    )
