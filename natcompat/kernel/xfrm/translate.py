"""Between the values of `natcompat.ipsec` and the messages of XFRM, both ways.

An SA is encoded from a template: what all SAs of one shape have in common is encoded once, by
pyroute2, and addresses, SPI, ports, reqid and keys are put in their places. So key material is in
the one buffer that is sent (and overwritten by `natcompat.kernel.xfrm.netlink`), and nowhere else.
"""

from __future__ import annotations

import errno
import functools
import socket
import struct
from ipaddress import IPv4Address, IPv6Address, ip_network
from typing import Any, NamedTuple

from natcompat.errors import NatCompatError
from natcompat.ipsec import (
    Direction,
    Encr,
    Integ,
    IPAddress,
    Lifetime,
    Mark,
    Mode,
    PortRange,
    SaId,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)
from natcompat.ipsec.associations import wire_ports
from natcompat.kernel.xfrm import layouts, messages
from natcompat.kernel.xfrm.algorithms import ENCRYPTION_NAMES, INTEGRITY_NAMES
from natcompat.kernel.xfrm.netlink import HEADER, attributes
from natcompat.kernel.xfrm.offload import offload_fields
from natcompat.kernel.xfrm.probe import UDP_ENCAP_ESPINUDP

MAPPING_INTERVAL = 5
"""Seconds between two reports of the same new NAT mapping (XFRMA_MTIMER_THRESH)."""

_REPLAY_VAL, _REPLAY_ESN_VAL = 10, 23  # linux/xfrm.h, XFRMA_*

BODY = HEADER.size
_INFO = {
    name: BODY + layouts.offset_of(layouts.XFRM_USERSA_INFO, name)
    for name in ("sel_daddr", "sel_saddr", "sel_family", "id_daddr", "id_spi", "saddr", "reqid", "family")
}
INFO_END = BODY + layouts.size_of(layouts.XFRM_USERSA_INFO)


class KernelFeatures(NamedTuple):
    """The features of a kernel on which the messages depend."""

    sa_direction: bool
    keepalive: bool
    output_mark: bool = False
    hw_offload: bool = False
    cpu: bool = False


def octets(address: IPAddress | None) -> bytes:
    """Return `address` as an xfrm_address_t: 16 bytes, an IPv4 address in the first four."""
    return bytes(16) if address is None else address.packed.ljust(16, b"\0")


def address_of(value: bytes | tuple[int, ...], family: int) -> IPAddress:
    """Return the address in an xfrm_address_t."""
    packed = bytes(value)
    return IPv6Address(packed) if family == socket.AF_INET6 else IPv4Address(packed[:4])


def family_of(address: IPAddress) -> int:
    """Return AF_INET or AF_INET6."""
    return socket.AF_INET if address.version == 4 else socket.AF_INET6


class _Shape(NamedTuple):
    """The properties of an SA that decide size and constant parts of its message."""

    family: int
    direction: Direction
    mode: Mode
    encryption: Encr
    encryption_key_length: int
    integrity: Integ
    esn: bool
    replay_window: int
    encapsulated: bool
    lifetime: Lifetime
    selector: TrafficSelector | None
    nat_keepalive: int | None
    mark: Mark | None
    interface_id: int | None
    tfc: int
    copy_dscp: bool
    copy_ecn: bool
    copy_df: bool
    output_mark: Mark | None
    hw_offload: tuple[int, int] | None
    """Interface index, flags."""
    cpu: int | None
    features: KernelFeatures


class _Template(NamedTuple):
    data: bytes
    encryption_key: int
    integrity_key: int
    encapsulation: int
    """Offsets into `data`; 0 where there is none."""


def encode_sa(sa: SecurityAssociation, features: KernelFeatures) -> bytearray:
    """Return the message that installs `sa` (XFRM_MSG_NEWSA or XFRM_MSG_UPDSA), header left empty."""
    template = _template(
        _Shape(
            family_of(sa.source),
            sa.direction,
            sa.mode,
            sa.encryption,
            len(sa.encryption_key),
            sa.integrity,
            sa.esn,
            sa.replay_window,
            sa.encapsulation is not None,
            sa.lifetime,
            sa.selectors[0] if len(sa.selectors) == 1 else None,
            sa.nat_keepalive,
            sa.mark,
            sa.interface_id,
            sa.tfc,
            sa.copy_dscp,
            sa.copy_ecn,
            sa.copy_df,
            sa.output_mark,
            None if sa.hw_offload is None else offload_fields(sa.hw_offload, sa.direction),
            sa.cpu,
            features,
        )
    )
    message = bytearray(template.data)
    destination, source = sa.destination.packed, sa.source.packed
    message[_INFO["id_daddr"] : _INFO["id_daddr"] + len(destination)] = destination
    message[_INFO["saddr"] : _INFO["saddr"] + len(source)] = source
    struct.pack_into(">I", message, _INFO["id_spi"], sa.spi)
    struct.pack_into("=I", message, _INFO["reqid"], sa.reqid)
    if sa.encapsulation is not None:
        patch_ports(message, template.encapsulation, sa.encapsulation, sa.direction)
    message[template.encryption_key : template.encryption_key + len(sa.encryption_key)] = sa.encryption_key
    if sa.integrity_key:
        message[template.integrity_key : template.integrity_key + len(sa.integrity_key)] = sa.integrity_key
    return message


def refuse_unknown(sa: SecurityAssociation, features: KernelFeatures) -> None:
    """Raise `natcompat.NatCompatError` (EOPNOTSUPP) for attributes that this kernel would ignore."""
    for name in ("output_mark", "hw_offload", "cpu"):
        if getattr(sa, name) is not None and not getattr(features, name):
            raise NatCompatError(
                errno.EOPNOTSUPP,
                f"Adding {sa.sa_id}: this kernel knows no {name} of SAs",
                f"Leave {name} out, or run a newer kernel",
            )


def put_sequence(message: bytearray, direction: Direction, sequence: int) -> None:
    """Let the SA in `message` (of `encode_sa`) go on behind `sequence`, sent or received."""
    sent, received = (sequence, 0) if direction is Direction.OUT else (0, sequence)
    for kind, start, end in attributes(message, INFO_END):
        if kind == _REPLAY_ESN_VAL:  # struct xfrm_replay_state_esn
            low = (sent & 0xFFFF_FFFF, received & 0xFFFF_FFFF)
            struct.pack_into("=4I", message, start + 4, *low, sent >> 32, received >> 32)
            if received:
                message[start + 24 : end] = b"\xff" * (end - start - 24)
            return
    bitmap = 0xFFFF_FFFF if received else 0
    message += struct.pack("=HH3I", 16, _REPLAY_VAL, sent, received, bitmap)


def patch_ports(
    message: bytearray, offset: int, encapsulation: UDPEncapsulation, direction: Direction
) -> None:
    """Put ports and original address into the struct xfrm_encap_tmpl at `offset`."""
    struct.pack_into(">HH", message, offset + 2, *wire_ports(encapsulation, direction))
    message[offset + 8 : offset + 24] = octets(encapsulation.original_address)


@functools.lru_cache(maxsize=256)
def _template(shape: _Shape) -> _Template:
    outbound = shape.direction is Direction.OUT
    tunnel = shape.mode is Mode.TUNNEL
    fields: dict[str, Any] = {
        "id_proto": socket.IPPROTO_ESP,
        "family": shape.family,
        "mode": messages.XFRM_MODE_TUNNEL if tunnel else messages.XFRM_MODE_TRANSPORT,
        **lifetime_fields(shape.lifetime),
    }
    flags = 0
    if shape.selector is not None:
        fields.update(selector_fields(shape.selector, "sel_"))
    elif tunnel:
        flags |= messages.XFRM_STATE_AF_UNSPEC  # IPv4 and IPv6 both may pass the tunnel
    else:
        fields["sel_family"] = shape.family
    flags |= messages.XFRM_STATE_NOECN * (not shape.copy_ecn)
    flags |= messages.XFRM_STATE_NOPMTUDISC * (outbound and not shape.copy_df)
    flags |= messages.XFRM_STATE_ESN * shape.esn

    attrs: list[tuple[str, Any]] = _algorithms(shape)
    # An outbound SA has no window, and a kernel that knows directions insists; others want one for ESN.
    window = shape.replay_window if not outbound else 32 * (shape.esn and not shape.features.sa_direction)
    if shape.esn or window > 32:
        words = -(-window // 32)
        attrs.append(("XFRMA_REPLAY_ESN_VAL", {"bmp_len": words, "replay_window": window}))
        window = 0
    fields["replay_window"] = window
    if shape.encapsulated:
        attrs.append(("XFRMA_ENCAP", {"encap_type": UDP_ENCAP_ESPINUDP}))
        if not outbound:
            attrs.append(("XFRMA_MTIMER_THRESH", MAPPING_INTERVAL))
    if shape.nat_keepalive is not None and shape.features.keepalive:
        attrs.append(("XFRMA_NAT_KEEPALIVE_INTERVAL", shape.nat_keepalive))
    if shape.features.sa_direction:
        attrs.append(("XFRMA_SA_DIR", messages.XFRM_SA_DIR_OUT if outbound else messages.XFRM_SA_DIR_IN))
    if shape.mark is not None:
        attrs.append(("XFRMA_MARK", {"v": shape.mark.value, "m": shape.mark.mask}))
    if shape.interface_id is not None:
        attrs.append(("XFRMA_IF_ID", shape.interface_id))
    if shape.tfc and outbound:
        attrs.append(("XFRMA_TFCPAD", shape.tfc))
    if outbound and not shape.copy_dscp:
        attrs.append(("XFRMA_SA_EXTRA_FLAGS", messages.XFRM_SA_XFLAG_DONT_ENCAP_DSCP))
    if shape.output_mark is not None:
        attrs.append(("XFRMA_SET_MARK", shape.output_mark.value))
        attrs.append(("XFRMA_SET_MARK_MASK", shape.output_mark.mask))
    if shape.hw_offload is not None:
        index, offload_flags = shape.hw_offload
        attrs.append(("XFRMA_OFFLOAD_DEV", {"ifindex": index, "flags": offload_flags}))
    if shape.cpu is not None:
        attrs.append(("XFRMA_SA_PCPU", shape.cpu))

    message = messages.xfrm_usersa_info()
    message.update({**fields, "flags": flags, "attrs": attrs})
    message.encode()
    places = {}
    for kind, start, _ in attributes(bytes(message.data), INFO_END):
        places[messages.xfrm_attributes.nla_map[kind][0]] = start
    return _Template(
        data=bytes(message.data),
        encryption_key=places["XFRMA_ALG_AEAD"] + 72
        if shape.encryption.is_aead
        else places["XFRMA_ALG_CRYPT"] + 68,
        integrity_key=places.get("XFRMA_ALG_AUTH_TRUNC", 0) + 72,
        encapsulation=places.get("XFRMA_ENCAP", 0),
    )


def _algorithms(shape: _Shape) -> list[tuple[str, Any]]:
    """Return the attributes of the transforms, with zeros for keys."""
    name = ENCRYPTION_NAMES[shape.encryption]
    length = shape.encryption_key_length
    blank = {"alg_name": name, "alg_key_len": 8 * length, "alg_key": bytes(length)}
    if shape.encryption.is_aead:
        return [("XFRMA_ALG_AEAD", {**blank, "alg_icv_len": 8 * shape.encryption.icv_length})]
    integrity = {
        "alg_name": INTEGRITY_NAMES[shape.integrity],
        "alg_key_len": 8 * shape.integrity.key_length,
        "alg_trunc_len": 8 * shape.integrity.icv_length,
        "alg_key": bytes(shape.integrity.key_length),
    }
    return [("XFRMA_ALG_CRYPT", blank), ("XFRMA_ALG_AUTH_TRUNC", integrity)]


def lifetime_fields(lifetime: Lifetime | None) -> dict[str, int]:
    """Return the fields of a struct xfrm_lifetime_cfg; None: no limits."""
    fields = dict.fromkeys(
        (f"lft_{grade}_{unit}_limit" for grade in ("soft", "hard") for unit in ("byte", "packet")),
        messages.XFRM_INF,
    )
    if lifetime is not None:
        for grade in ("soft", "hard"):
            for unit, name in (("bytes", "byte"), ("packets", "packet")):
                limit = getattr(lifetime, f"{grade}_{unit}")
                fields[f"lft_{grade}_{name}_limit"] = messages.XFRM_INF if limit is None else limit
            fields[f"lft_{grade}_add_expires_seconds"] = getattr(lifetime, f"{grade}_seconds") or 0
    return fields


def lifetime_of(message: Any, prefix: str = "lft_") -> Lifetime:
    """Return the limits in a struct xfrm_lifetime_cfg."""

    def limit(name: str) -> int | None:
        value = int(message[f"{prefix}{name}"])
        return None if value in (0, messages.XFRM_INF) or value > 2**63 else value

    return Lifetime(
        soft_seconds=limit("soft_add_expires_seconds"),
        hard_seconds=limit("hard_add_expires_seconds"),
        soft_bytes=limit("soft_byte_limit"),
        hard_bytes=limit("hard_byte_limit"),
        soft_packets=limit("soft_packet_limit"),
        hard_packets=limit("hard_packet_limit"),
    )


def selector_fields(selector: TrafficSelector, prefix: str) -> dict[str, Any]:
    """Return the fields of a struct xfrm_selector."""
    return {
        f"{prefix}daddr": tuple(octets(selector.destination.network_address)),
        f"{prefix}saddr": tuple(octets(selector.source.network_address)),
        f"{prefix}dport": selector.destination_ports.first,
        f"{prefix}dport_mask": selector.destination_ports.mask,  # refuse_ranges() saw to it that there is one
        f"{prefix}sport": selector.source_ports.first,
        f"{prefix}sport_mask": selector.source_ports.mask,
        f"{prefix}family": family_of(selector.destination.network_address),
        f"{prefix}prefixlen_d": selector.destination.prefixlen,
        f"{prefix}prefixlen_s": selector.source.prefixlen,
        f"{prefix}proto": selector.protocol,
    }


def selector_of(message: Any, prefix: str = "sel_") -> TrafficSelector:
    """Return the selector in a struct xfrm_selector."""
    family = message[f"{prefix}family"]
    source = address_of(message[f"{prefix}saddr"], family)
    destination = address_of(message[f"{prefix}daddr"], family)
    return TrafficSelector(
        source=ip_network(f"{source}/{message[f'{prefix}prefixlen_s']}", strict=False),
        destination=ip_network(f"{destination}/{message[f'{prefix}prefixlen_d']}", strict=False),
        protocol=message[f"{prefix}proto"],
        source_port=_ports(message[f"{prefix}sport"], message[f"{prefix}sport_mask"]),
        destination_port=_ports(message[f"{prefix}dport"], message[f"{prefix}dport_mask"]),
    )


def _ports(port: int, mask: int) -> PortRange:
    """Return the ports that equal `port` under `mask`; of a mask with holes, the port alone."""
    ports = PortRange(port & mask, port & mask | ~mask & 0xFFFF)
    return ports if ports.mask == mask else PortRange(port, port)


def encode_sa_id(sa_id: SaId) -> bytearray:
    """Return the message that names an SA (XFRM_MSG_GETSA, XFRM_MSG_DELSA)."""
    message = bytearray(BODY)
    message += octets(sa_id.destination)
    message += struct.pack(
        "=4sHBx", sa_id.spi.to_bytes(4, "big"), family_of(sa_id.destination), socket.IPPROTO_ESP
    )
    return message + _mark_attribute(sa_id.mark)


def _mark_attribute(mark: Mark | None) -> bytes:
    number = 21  # XFRMA_MARK
    return struct.pack("=HHII", 12, number, mark.value, mark.mask) if mark else b""


def encode_allocate(
    source: IPAddress,
    destination: IPAddress,
    features: KernelFeatures,
    *,
    reqid: int,
    minimum: int,
    maximum: int,
    sequence: int,
) -> bytearray:
    """Return the message that reserves an SPI (XFRM_MSG_ALLOCSPI)."""
    message = messages.xfrm_userspi_info()
    message.update(
        info_id_daddr=tuple(octets(destination)),
        info_id_proto=socket.IPPROTO_ESP,
        info_saddr=tuple(octets(source)),
        info_seq=sequence,
        info_reqid=reqid,
        info_family=family_of(destination),
        info_mode=messages.XFRM_MODE_TUNNEL,
        min=minimum,
        max=maximum,
    )
    if features.sa_direction:  # only an SA of the same direction completes it
        message["attrs"] = [("XFRMA_SA_DIR", messages.XFRM_SA_DIR_IN)]
    message.encode()
    return bytearray(message.data)


KERNEL_DIRECTIONS = {
    Direction.IN: messages.XFRM_POLICY_IN,
    Direction.OUT: messages.XFRM_POLICY_OUT,
}
