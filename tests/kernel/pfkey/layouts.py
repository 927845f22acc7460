"""The structures of the systems' headers, as ctypes lays them out, and messages put together from them.

Written from the documented declarations (RFC 2367; net/pfkeyv2.h of each system; linux/pfkeyv2.h;
net/pfpolicy.h), not from natcompat: numbers stand here as those headers have them.
"""

from __future__ import annotations

import ctypes
import socket
import sys
from ctypes import c_uint8, c_uint16, c_uint32, c_uint64
from dataclasses import dataclass


class sadb_msg(ctypes.Structure):
    _fields_ = [
        ("sadb_msg_version", c_uint8),
        ("sadb_msg_type", c_uint8),
        ("sadb_msg_errno", c_uint8),
        ("sadb_msg_satype", c_uint8),
        ("sadb_msg_len", c_uint16),
        ("sadb_msg_reserved", c_uint16),
        ("sadb_msg_seq", c_uint32),
        ("sadb_msg_pid", c_uint32),
    ]


class sadb_ext(ctypes.Structure):
    _fields_ = [("sadb_ext_len", c_uint16), ("sadb_ext_type", c_uint16)]


class sadb_sa(ctypes.Structure):
    _fields_ = [
        ("sadb_sa_len", c_uint16),
        ("sadb_sa_exttype", c_uint16),
        ("sadb_sa_spi", c_uint32),
        ("sadb_sa_replay", c_uint8),
        ("sadb_sa_state", c_uint8),
        ("sadb_sa_auth", c_uint8),
        ("sadb_sa_encrypt", c_uint8),
        ("sadb_sa_flags", c_uint32),
    ]


class sadb_sa_2(ctypes.Structure):
    """macOS."""

    _fields_ = [
        ("sa", sadb_sa),
        ("sadb_sa_natt_port", c_uint16),
        ("sadb_sa_natt_interval", c_uint16),
        ("sadb_sa_natt_offload_interval", c_uint16),
        ("sadb_sa_natt_src_port", c_uint16),
    ]


class sadb_lifetime(ctypes.Structure):
    _fields_ = [
        ("sadb_lifetime_len", c_uint16),
        ("sadb_lifetime_exttype", c_uint16),
        ("sadb_lifetime_allocations", c_uint32),
        ("sadb_lifetime_bytes", c_uint64),
        ("sadb_lifetime_addtime", c_uint64),
        ("sadb_lifetime_usetime", c_uint64),
    ]


class sadb_address(ctypes.Structure):
    """All but OpenBSD."""

    _fields_ = [
        ("sadb_address_len", c_uint16),
        ("sadb_address_exttype", c_uint16),
        ("sadb_address_proto", c_uint8),
        ("sadb_address_prefixlen", c_uint8),
        ("sadb_address_reserved", c_uint16),
    ]


class sadb_address_openbsd(ctypes.Structure):
    _fields_ = [
        ("sadb_address_len", c_uint16),
        ("sadb_address_exttype", c_uint16),
        ("sadb_address_reserved", c_uint32),
    ]


class sadb_key(ctypes.Structure):
    _fields_ = [
        ("sadb_key_len", c_uint16),
        ("sadb_key_exttype", c_uint16),
        ("sadb_key_bits", c_uint16),
        ("sadb_key_reserved", c_uint16),
    ]


class sadb_spirange(ctypes.Structure):
    _fields_ = [
        ("sadb_spirange_len", c_uint16),
        ("sadb_spirange_exttype", c_uint16),
        ("sadb_spirange_min", c_uint32),
        ("sadb_spirange_max", c_uint32),
        ("sadb_spirange_reserved", c_uint32),
    ]


class sadb_x_sa2(ctypes.Structure):
    _fields_ = [
        ("sadb_x_sa2_len", c_uint16),
        ("sadb_x_sa2_exttype", c_uint16),
        ("sadb_x_sa2_mode", c_uint8),
        ("sadb_x_sa2_reserved1", c_uint8),
        ("sadb_x_sa2_reserved2", c_uint16),
        ("sadb_x_sa2_sequence", c_uint32),
        ("sadb_x_sa2_reqid", c_uint32),
    ]


class sadb_x_nat_t_type(ctypes.Structure):
    _fields_ = [
        ("sadb_x_nat_t_type_len", c_uint16),
        ("sadb_x_nat_t_type_exttype", c_uint16),
        ("sadb_x_nat_t_type_type", c_uint8),
        ("sadb_x_nat_t_type_reserved", c_uint8 * 3),
    ]


class sadb_x_nat_t_port(ctypes.Structure):
    """And OpenBSD's sadb_x_udpencap."""

    _fields_ = [
        ("sadb_x_nat_t_port_len", c_uint16),
        ("sadb_x_nat_t_port_exttype", c_uint16),
        ("sadb_x_nat_t_port_port", c_uint16),
        ("sadb_x_nat_t_port_reserved", c_uint16),
    ]


class sadb_x_sa_replay(ctypes.Structure):
    """FreeBSD."""

    _fields_ = [
        ("sadb_x_sa_replay_len", c_uint16),
        ("sadb_x_sa_replay_exttype", c_uint16),
        ("sadb_x_sa_replay_replay", c_uint32),
    ]


class sadb_x_policy(ctypes.Structure):
    """FreeBSD and Linux; NetBSD and macOS have reserved bytes where these have scope and priority."""

    _fields_ = [
        ("sadb_x_policy_len", c_uint16),
        ("sadb_x_policy_exttype", c_uint16),
        ("sadb_x_policy_type", c_uint16),
        ("sadb_x_policy_dir", c_uint8),
        ("sadb_x_policy_reserved", c_uint8),
        ("sadb_x_policy_id", c_uint32),
        ("sadb_x_policy_priority", c_uint32),
    ]


class sadb_x_ipsecrequest(ctypes.Structure):
    _fields_ = [
        ("sadb_x_ipsecrequest_len", c_uint16),
        ("sadb_x_ipsecrequest_proto", c_uint16),
        ("sadb_x_ipsecrequest_mode", c_uint8),
        ("sadb_x_ipsecrequest_level", c_uint8),
        ("sadb_x_ipsecrequest_reqid", c_uint16),
    ]


class sadb_x_ipsecrequest_linux(ctypes.Structure):
    _fields_ = [
        ("sadb_x_ipsecrequest_len", c_uint16),
        ("sadb_x_ipsecrequest_proto", c_uint16),
        ("sadb_x_ipsecrequest_mode", c_uint8),
        ("sadb_x_ipsecrequest_level", c_uint8),
        ("sadb_x_ipsecrequest_reserved1", c_uint16),
        ("sadb_x_ipsecrequest_reqid", c_uint32),
        ("sadb_x_ipsecrequest_reserved2", c_uint32),
    ]


class sadb_protocol(ctypes.Structure):
    """OpenBSD."""

    _fields_ = [
        ("sadb_protocol_len", c_uint16),
        ("sadb_protocol_exttype", c_uint16),
        ("sadb_protocol_proto", c_uint8),
        ("sadb_protocol_direction", c_uint8),
        ("sadb_protocol_flags", c_uint8),
        ("sadb_protocol_reserved2", c_uint8),
    ]


class sadb_x_replay_openbsd(ctypes.Structure):
    _fields_ = [
        ("sadb_x_replay_len", c_uint16),
        ("sadb_x_replay_exttype", c_uint16),
        ("sadb_x_replay_reserved", c_uint32),
        ("sadb_x_replay_count", c_uint64),
    ]


class sadb_x_counter(ctypes.Structure):
    """OpenBSD."""

    _fields_ = [
        ("sadb_x_counter_len", c_uint16),
        ("sadb_x_counter_exttype", c_uint16),
        ("sadb_x_counter_pad", c_uint32),
        ("sadb_x_counter_ipackets", c_uint64),
        ("sadb_x_counter_opackets", c_uint64),
        ("sadb_x_counter_ibytes", c_uint64),
        ("sadb_x_counter_obytes", c_uint64),
        ("sadb_x_counter_idrops", c_uint64),
        ("sadb_x_counter_odrops", c_uint64),
        ("sadb_x_counter_idecompbytes", c_uint64),
        ("sadb_x_counter_ouncompbytes", c_uint64),
    ]


class sadb_x_replay_ctr(ctypes.Structure):
    """Solaris."""

    _fields_ = [
        ("sadb_x_rc_len", c_uint16),
        ("sadb_x_rc_exttype", c_uint16),
        ("sadb_x_rc_replay32", c_uint32),
        ("sadb_x_rc_replay64", c_uint64),
    ]


class spd_rule(ctypes.Structure):
    """Solaris."""

    _fields_ = [
        ("spd_rule_len", c_uint16),
        ("spd_rule_type", c_uint16),
        ("spd_rule_priority", c_uint32),
        ("spd_rule_flags", c_uint32),
        ("spd_rule_unused", c_uint32),
        ("spd_rule_index", c_uint64),
    ]


class spd_address(ctypes.Structure):
    """Solaris; the bytes of the address come behind it."""

    _fields_ = [
        ("spd_address_len", c_uint16),
        ("spd_address_exttype", c_uint16),
        ("spd_address_af", c_uint8),
        ("spd_address_prefixlen", c_uint8),
        ("spd_address_reserved2", c_uint16),
    ]


class spd_proto(ctypes.Structure):
    """Solaris."""

    _fields_ = [
        ("spd_proto_len", c_uint16),
        ("spd_proto_exttype", c_uint16),
        ("spd_proto_number", c_uint8),
        ("spd_proto_reserved1", c_uint8),
        ("spd_proto_reserved2", c_uint16),
    ]


class spd_portrange(ctypes.Structure):
    """Solaris."""

    _fields_ = [
        ("spd_ports_len", c_uint16),
        ("spd_ports_exttype", c_uint16),
        ("spd_ports_minport", c_uint16),
        ("spd_ports_maxport", c_uint16),
    ]


class spd_ext_actions(ctypes.Structure):
    """Solaris; attributes come behind it."""

    _fields_ = [
        ("spd_actions_len", c_uint16),
        ("spd_actions_exttype", c_uint16),
        ("spd_actions_count", c_uint16),
        ("spd_actions_reserved", c_uint16),
    ]


class spd_attribute(ctypes.Structure):
    """Solaris."""

    _fields_ = [("spd_attr_tag", c_uint32), ("spd_attr_value", c_uint32)]


SIZES = {
    sadb_msg: 16, sadb_ext: 4, sadb_sa: 16, sadb_sa_2: 24, sadb_lifetime: 32, sadb_address: 8,
    sadb_address_openbsd: 8, sadb_key: 8, sadb_spirange: 16, sadb_x_sa2: 16, sadb_x_nat_t_type: 8,
    sadb_x_nat_t_port: 8, sadb_x_sa_replay: 8, sadb_x_policy: 16, sadb_x_ipsecrequest: 8,
    sadb_x_ipsecrequest_linux: 16, sadb_protocol: 8, sadb_x_replay_openbsd: 16, sadb_x_counter: 72,
    sadb_x_replay_ctr: 16, spd_rule: 24, spd_address: 8, spd_proto: 8, spd_portrange: 8,
    spd_ext_actions: 8, spd_attribute: 8,
}  # fmt: skip
"""What a C compiler prints for sizeof on the systems (LP64)."""


class sockaddr_in(ctypes.Structure):
    """Solaris and Linux."""

    _fields_ = [
        ("sin_family", c_uint16),
        ("sin_port", c_uint16),
        ("sin_addr", c_uint8 * 4),
        ("sin_zero", c_uint8 * 8),
    ]


class sockaddr_in_bsd(ctypes.Structure):
    _fields_ = [
        ("sin_len", c_uint8),
        ("sin_family", c_uint8),
        ("sin_port", c_uint16),
        ("sin_addr", c_uint8 * 4),
        ("sin_zero", c_uint8 * 8),
    ]


class sockaddr_in6(ctypes.Structure):
    """Linux."""

    _fields_ = [
        ("sin6_family", c_uint16),
        ("sin6_port", c_uint16),
        ("sin6_flowinfo", c_uint32),
        ("sin6_addr", c_uint8 * 16),
        ("sin6_scope_id", c_uint32),
    ]


class sockaddr_in6_solaris(ctypes.Structure):
    _fields_ = [*sockaddr_in6._fields_, ("__sin6_src_id", c_uint32)]


class sockaddr_in6_bsd(ctypes.Structure):
    _fields_ = [
        ("sin6_len", c_uint8),
        ("sin6_family", c_uint8),
        ("sin6_port", c_uint16),
        ("sin6_flowinfo", c_uint32),
        ("sin6_addr", c_uint8 * 16),
        ("sin6_scope_id", c_uint32),
    ]


def extension(structure: ctypes.Structure, payload: bytes = b"") -> bytes:
    """Return an extension with its length in words: `structure` first, `payload`, zeros to a whole word."""
    data = bytes(structure) + payload
    data += bytes(-len(data) % 8)
    return (len(data) // 8).to_bytes(2, sys.byteorder) + data[2:]


@dataclass(frozen=True)
class System:
    """How a system writes addresses."""

    name: str
    inet6: int
    bsd: bool = True

    def sockaddr(self, address: str, port: int = 0) -> bytes:
        if ":" not in address:
            packed = (c_uint8 * 4)(*socket.inet_pton(socket.AF_INET, address))
            if self.bsd:
                return bytes(sockaddr_in_bsd(16, 2, socket.htons(port), packed))
            return bytes(sockaddr_in(2, socket.htons(port), packed))
        packed6 = (c_uint8 * 16)(*socket.inet_pton(socket.AF_INET6, address))
        if self.bsd:
            return bytes(sockaddr_in6_bsd(28, self.inet6, socket.htons(port), 0, packed6))
        kind = sockaddr_in6_solaris if self.name == "solaris" else sockaddr_in6
        return bytes(kind(self.inet6, socket.htons(port), 0, packed6))

    def address(self, kind: int, address: str, *, port: int = 0, proto: int = 0, prefix: int = 0) -> bytes:
        start = (
            sadb_address_openbsd(0, kind) if self.name == "openbsd" else sadb_address(0, kind, proto, prefix)
        )
        return extension(start, self.sockaddr(address, port))


LINUX = System("linux", 10, bsd=False)
FREEBSD = System("freebsd", 28)
NETBSD = System("netbsd", 24)
OPENBSD = System("openbsd", 24)
MACOS = System("macos", 30)
SOLARIS = System("solaris", 26, bsd=False)


def message(
    kind: int, satype: int, *extensions: bytes, seq: int = 0, pid: int = 0, errno: int = 0, version: int = 2
) -> bytes:
    """Return a whole message."""
    body = b"".join(extensions)
    return bytes(sadb_msg(version, kind, errno, satype, (16 + len(body)) // 8, 0, seq, pid)) + body


def sa(spi: int, **fields: int) -> bytes:
    """Return a struct sadb_sa."""
    named = {f"sadb_sa_{name}": value for name, value in fields.items()}
    return extension(sadb_sa(0, 1, socket.htonl(spi), sadb_sa_state=1, **named))


def key(kind: int, value: bytes) -> bytes:
    """Return a struct sadb_key with `value`."""
    return extension(sadb_key(0, kind, 8 * len(value)), value)


def port(kind: int, number: int) -> bytes:
    """Return a struct sadb_x_nat_t_port."""
    return extension(sadb_x_nat_t_port(0, kind, socket.htons(number)))
