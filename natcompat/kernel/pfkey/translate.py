"""From the values of `natcompat.ipsec` to the messages of PF_KEY that install and name SAs.

What a dialect cannot say is refused (EOPNOTSUPP, ENOSYS for a transform): an SA is installed as it was
asked for or not at all.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address, ip_network

from natcompat.errors import NatCompatError
from natcompat.ipsec.associations import Lifetime, SaId, SecurityAssociation, UDPEncapsulation, wire_ports
from natcompat.ipsec.selectors import TrafficSelector
from natcompat.ipsec.transforms import Encr, Integ
from natcompat.ipsec.values import Direction, IPAddress, IPNetwork, Mode
from natcompat.kernel.pfkey import numbers as n
from natcompat.kernel.pfkey.dialects import Dialect, Modes, NatT
from natcompat.kernel.pfkey.messages import (
    Extension,
    LifetimeFields,
    Message,
    SaFields,
    address_extension,
    key_extension,
    lifetime_extension,
    pack,
    port_extension,
    sa_extension,
)

OPENBSD_WINDOW = 64
"""Any number but 0 switches OpenBSD's window on, which has one size."""
_IN_IP = {4: 4, 6: 41}
"""IPPROTO_IPIP and IPPROTO_IPV6, by the version of what a tunnel carries."""


def refusal(dialect: Dialect, what: str, remedy: str, code: int = errno.EOPNOTSUPP) -> NatCompatError:
    """Return the error for what PF_KEY of this system cannot say."""
    return NatCompatError(code, f"PF_KEY of {dialect.system} {what}", remedy)


# --- what cannot be said ---------------------------------------------------------------------------


def check_sa(dialect: Dialect, sa: SecurityAssociation) -> None:
    """Raise for what `sa` asks for and the dialect has no word for."""
    for transform, table in ((sa.encryption, dialect.encryption), (sa.integrity, dialect.integrity)):
        if transform is not Integ.NONE and transform not in table:
            why = dialect.reasons.get(transform.name, "there is no number for it")
            raise refusal(
                dialect,
                f"has no {transform.name}: {why}",
                f"Negotiate one of {', '.join(sorted(each.name for each in table))}",
                errno.ENOSYS,
            )
    for what, asked, remedy in _beyond(dialect, sa):
        if asked:
            raise refusal(dialect, what, remedy)


def _beyond(dialect: Dialect, sa: SecurityAssociation) -> Iterator[tuple[str, object, str]]:
    outbound = sa.direction is Direction.OUT
    lifetime = sa.lifetime
    yield "has no extended sequence numbers", sa.esn and not dialect.esn, "Negotiate an SA without them"
    if not outbound and not dialect.wide_windows:
        largest = dialect.largest_window
        yield (
            f"has replay windows of {largest} packets at most",
            sa.replay_window > largest,
            f"Ask for replay_window={largest}",
        )
    yield (
        "counts no packets for the lifetime of an SA",
        not dialect.packet_lifetimes and (lifetime.soft_packets or lifetime.hard_packets),
        "Limit seconds or bytes",
    )
    yield (
        "counts packets up to 2**32 - 1",
        max(lifetime.soft_packets or 0, lifetime.hard_packets or 0) > 0xFFFF_FFFF,
        "Set a lower limit",
    )
    yield (
        f"has no reqid above {dialect.largest_reqid}",
        dialect.largest_reqid and sa.reqid > dialect.largest_reqid,
        "Choose a smaller one",
    )
    yield "has no marks", sa.mark or sa.output_mark, "Tell SAs apart by addresses and SPI"
    yield "hands no SA to a network card", sa.hw_offload is not None, "Leave hw_offload out"
    yield "ties no SA to a processor", sa.cpu is not None, "Leave cpu out"
    yield "ties no SA to an interface", sa.interface_id is not None, "Leave interface_id out"
    yield "does not pad packets (TFC)", sa.tfc, "Leave tfc out"
    if outbound:
        yield "always copies the DSCP", not sa.copy_dscp, "Leave copy_dscp as it is"
        yield (
            "has no say in the DF bit",
            not sa.copy_df and not dialect.no_pmtu_discovery,
            "Leave copy_df as it is",
        )
    yield "has no say in ECN", not sa.copy_ecn and not dialect.no_ecn, "Leave copy_ecn as it is"
    yield from _beyond_selectors(dialect, sa)
    if sa.encapsulation is not None:
        yield from _beyond_encapsulation(dialect, sa, sa.encapsulation)


def _beyond_selectors(dialect: Dialect, sa: SecurityAssociation) -> Iterator[tuple[str, object, str]]:
    inner = dialect.modes is Modes.INNER
    yield (
        "takes one selector with an SA at most" if inner else "takes no selectors with an SA",
        len(sa.selectors) > inner,
        "Leave selectors to the policies",
    )
    yield (
        "takes selectors with SAs in tunnel mode only",
        inner and sa.selectors and sa.mode is Mode.TRANSPORT,
        "Leave selectors to the policies",
    )


def _beyond_encapsulation(
    dialect: Dialect, sa: SecurityAssociation, encapsulation: UDPEncapsulation
) -> Iterator[tuple[str, object, str]]:
    yield (
        f"has no ESP in UDP over IPv{sa.source.version}",
        sa.source.version not in dialect.nat_t_versions,
        "Use IPv4, ESP without UDP, or the userspace backend",
    )
    if dialect.nat_t is NatT.ADDRESSES:
        yield (
            "wants to know the peer's address before the NAT",
            sa.mode is Mode.TRANSPORT and encapsulation.original_address is None,
            "Say original_address (NAT-OA, RFC 3947, 5), or use tunnel mode",
        )
    if sa.nat_keepalive is not None and dialect.name != "linux":
        least = dialect.kernel_keepalive
        yield (
            f"sends keepalives every {least} seconds at the most" if least else "sends no keepalives",
            not least or sa.nat_keepalive < least,
            "Leave nat_keepalive out and send keepalives on the socket of IKE (natcompat.endpoint.keepalive)",
        )


# --- SAs -------------------------------------------------------------------------------------------


def encode_sa(dialect: Dialect, sa: SecurityAssociation, kind: int) -> Message:
    """Return the message that installs `sa` (SADB_ADD), or completes its larval SA (SADB_UPDATE).

    `check_sa` comes before: what the dialect has no word for is not in it.
    """
    return Message(kind, dialect.esp, list(_extensions(dialect, sa)))


def _extensions(dialect: Dialect, sa: SecurityAssociation) -> Iterator[Extension]:
    """Yield what installs an SA, in the order of RFC 2367, 3.1.3, and the newer extensions behind it."""
    ports = None
    if dialect.nat_t is NatT.SA and sa.encapsulation is not None:
        encapsulation = sa.encapsulation
        ports = (encapsulation.remote_port, sa.nat_keepalive or 0, encapsulation.local_port)
    yield sa_extension(_sa_fields(dialect, sa), ports)
    yield from lifetimes(dialect, sa.lifetime)
    protocol = None
    inner = sa.selectors[0] if sa.selectors else everything(sa.source.version)
    if dialect.modes is Modes.INNER and sa.mode is Mode.TUNNEL:
        protocol = _IN_IP[inner.source.version]
    for kind, address in ((n.SADB_EXT_ADDRESS_SRC, sa.source), (n.SADB_EXT_ADDRESS_DST, sa.destination)):
        # Solaris takes the prefix of an outer address for that of a selector: ipseckey says 0
        prefix = 0 if dialect.modes is Modes.INNER else None
        yield address_extension(dialect, kind, address, protocol=protocol, prefix=prefix)
    if sa.integrity is not Integ.NONE:
        yield key_extension(n.SADB_EXT_KEY_AUTH, sa.integrity_key)
    if sa.encryption is not Encr.NULL or dialect.null_key:
        yield key_extension(n.SADB_EXT_KEY_ENCRYPT, sa.encryption_key)
    if dialect.modes is Modes.SA2:
        yield sa2(sa.mode, sa.reqid)
    elif dialect.modes is Modes.INNER and sa.mode is Mode.TUNNEL:
        yield from _inner(dialect, inner)
    if sa.encapsulation is not None:
        yield from nat_t(dialect, sa.encapsulation, sa.direction, sa.mode, keepalive=bool(sa.nat_keepalive))
    if sa.direction is Direction.IN and sa.replay_window > dialect.largest_window:
        yield pack(n.SADB_X_EXT_SA_REPLAY, "=I", sa.replay_window)


def _sa_fields(dialect: Dialect, sa: SecurityAssociation) -> SaFields:
    return SaFields(
        spi=sa.spi,
        window=_window(dialect, sa),
        state=n.SADB_SASTATE_MATURE,
        integrity=0 if sa.integrity is Integ.NONE else dialect.integrity[sa.integrity],
        encryption=dialect.encryption[sa.encryption],
        flags=_flags(dialect, sa),
    )


def _window(dialect: Dialect, sa: SecurityAssociation) -> int:
    """Return sadb_sa_replay. An outbound SA has no window, except where it takes one to count at all."""
    if dialect.window_outbound:
        return OPENBSD_WINDOW if sa.replay_window or sa.direction is Direction.OUT else 0
    if sa.direction is Direction.OUT:
        return 0
    window = min(sa.replay_window, dialect.largest_window)
    return -(-window // 8) if dialect.window_in_bytes else window


def _flags(dialect: Dialect, sa: SecurityAssociation) -> int:
    outbound, tunnel = sa.direction is Direction.OUT, sa.mode is Mode.TUNNEL
    flags = dialect.esn * sa.esn | dialect.no_ecn * (not sa.copy_ecn)
    flags |= dialect.no_pmtu_discovery * (outbound and not sa.copy_df)
    if dialect.modes is Modes.FLAG:
        flags |= n.OPENBSD_TUNNEL * tunnel
    if dialect.modes is Modes.INNER:
        flags |= n.SOLARIS_OUTBOUND if outbound else n.SOLARIS_INBOUND
        flags |= n.SOLARIS_TUNNEL * tunnel
        flags |= n.SOLARIS_NOREPLAY * (not outbound and not sa.replay_window)
    if sa.encapsulation is None:
        return flags
    keepalive = sa.nat_keepalive is not None
    if dialect.nat_t is NatT.PEER:
        flags |= n.OPENBSD_UDPENCAP
    elif dialect.nat_t is NatT.SA:
        flags |= n.MACOS_NATT | n.MACOS_NATT_KEEPALIVE * keepalive
    elif dialect.nat_t is NatT.ADDRESSES:
        # NATT_LOC is what makes the kernel send keepalives, and who asks for them is behind the NAT.
        flags |= n.SOLARIS_NATT_REM | (n.SOLARIS_NATT_LOC | n.SOLARIS_NATTED) * keepalive
        flags |= n.SOLARIS_NATT_LOC * _says_local_port(sa.encapsulation)
    return flags


def _says_local_port(encapsulation: UDPEncapsulation) -> bool:
    """Tell whether Solaris has to be told our port: it takes 4500 otherwise, and sends no keepalives."""
    return encapsulation.local_port != 4500


def lifetimes(dialect: Dialect, lifetime: Lifetime) -> Iterator[Extension]:
    """Yield SADB_EXT_LIFETIME_HARD and SADB_EXT_LIFETIME_SOFT, as far as there are limits."""
    hard = LifetimeFields(lifetime.hard_packets or 0, lifetime.hard_bytes or 0, lifetime.hard_seconds or 0)
    soft = LifetimeFields(lifetime.soft_packets or 0, lifetime.soft_bytes or 0, lifetime.soft_seconds or 0)
    together = dialect.lifetimes_together and (any(hard) or any(soft))
    for kind, fields in ((n.SADB_EXT_LIFETIME_HARD, hard), (n.SADB_EXT_LIFETIME_SOFT, soft)):
        if together or any(fields):
            yield lifetime_extension(kind, fields)


def sa2(mode: Mode, reqid: int) -> Extension:
    """Return a struct sadb_x_sa2."""
    number = n.IPSEC_MODE_TUNNEL if mode is Mode.TUNNEL else n.IPSEC_MODE_TRANSPORT
    return pack(n.SADB_X_EXT_SA2, "=B3xII", number, 0, reqid)


def nat_t(
    dialect: Dialect,
    encapsulation: UDPEncapsulation,
    direction: Direction,
    mode: Mode,
    *,
    keepalive: bool = False,
) -> Iterator[Extension]:
    """Yield the extensions that put an SA into UDP; the flags are those of its struct sadb_sa."""
    source, destination = wire_ports(encapsulation, direction)
    original = encapsulation.original_address
    if dialect.nat_t is NatT.PORTS:
        yield pack(n.SADB_X_EXT_NAT_T_TYPE, "=B3x", n.UDP_ENCAP_ESPINUDP)
        yield port_extension(n.SADB_X_EXT_NAT_T_SPORT, source)
        yield port_extension(n.SADB_X_EXT_NAT_T_DPORT, destination)
        if original is not None and mode is Mode.TRANSPORT and direction is Direction.IN:
            yield address_extension(dialect, n.SADB_X_EXT_NAT_T_OA, original)
    elif dialect.nat_t is NatT.PEER:
        yield port_extension(n.SADB_X_EXT_UDPENCAP, encapsulation.remote_port)
    elif dialect.nat_t is NatT.ADDRESSES:
        if keepalive or _says_local_port(encapsulation):
            yield _nat_t_address(
                dialect, n.SADB_X_EXT_ADDRESS_NATT_LOC, IPv4Address(0), encapsulation.local_port
            )
        yield _nat_t_address(
            dialect, n.SADB_X_EXT_ADDRESS_NATT_REM, original or IPv4Address(0), encapsulation.remote_port
        )


def _nat_t_address(dialect: Dialect, kind: int, address: IPAddress, port: int) -> Extension:
    return address_extension(dialect, kind, address, port=port, prefix=0, protocol=17)


def network(address: IPAddress, prefix: int) -> IPNetwork:
    """Return the network of `address`, whatever its other bits are."""
    return ip_network((address, prefix), strict=False)


def everything(version: int) -> TrafficSelector:
    """Return the selector of all traffic of an IP version."""
    whole = "0.0.0.0/0" if version == 4 else "::/0"
    return TrafficSelector(source=whole, destination=whole)


def _inner(dialect: Dialect, selector: TrafficSelector) -> Iterator[Extension]:
    """Yield the inner addresses of an SA in tunnel mode (Solaris)."""
    for kind, addresses, port in (
        (n.SADB_X_EXT_ADDRESS_INNER_SRC, selector.source, selector.source_port),
        (n.SADB_X_EXT_ADDRESS_INNER_DST, selector.destination, selector.destination_port),
    ):
        yield address_extension(
            dialect,
            kind,
            addresses.network_address,
            port=port,
            prefix=addresses.prefixlen,
            protocol=selector.protocol,
        )


# --- SPIs and names --------------------------------------------------------------------------------


def encode_allocate(
    dialect: Dialect, source: IPAddress, destination: IPAddress, *, reqid: int, minimum: int, maximum: int
) -> Message:
    """Return the message that reserves an SPI (SADB_GETSPI)."""
    form = ">II4x" if dialect.spi_range_in_network_order else "=II4x"
    extensions = [
        address_extension(dialect, n.SADB_EXT_ADDRESS_SRC, source),
        address_extension(dialect, n.SADB_EXT_ADDRESS_DST, destination),
        pack(n.SADB_EXT_SPIRANGE, form, minimum, maximum),
    ]
    if dialect.modes is Modes.SA2:
        extensions.append(sa2(Mode.TUNNEL, reqid))
    return Message(n.SADB_GETSPI, dialect.esp, extensions)


def encode_sa_id(
    dialect: Dialect, kind: int, sa_id: SaId, direction: Direction | None, more: tuple[Extension, ...] = ()
) -> Message:
    """Return the message that names an SA (SADB_GET, SADB_DELETE).

    Where `SaId.source` is not known it is the unspecified address, which Linux does not look at.
    `direction` helps Solaris to find it; `more`: what else the system wants to hear.
    """
    flags = 0
    if dialect.modes is Modes.INNER and direction is not None:
        flags = n.SOLARIS_OUTBOUND if direction is Direction.OUT else n.SOLARIS_INBOUND
    source = sa_id.source or (IPv4Address(0) if sa_id.destination.version == 4 else IPv6Address(0))
    return Message(
        kind,
        dialect.esp,
        [
            sa_extension(SaFields(sa_id.spi, state=n.SADB_SASTATE_MATURE, flags=flags)),
            address_extension(dialect, n.SADB_EXT_ADDRESS_SRC, source),
            address_extension(dialect, n.SADB_EXT_ADDRESS_DST, sa_id.destination),
            *more,
        ],
    )
