"""The messages of PF_KEY v2 (RFC 2367, 2), both ways, without any I/O.

A message is a header of 16 bytes and extensions, each with its length in words of 64 bits. Integers
are in the machine's byte order, SPIs and ports in network byte order (the exceptions are said where
they are). What comes from a kernel is checked: a length that does not fit makes the whole message
`MalformedMessageError`; extensions that nobody asks for are passed over.

Messages may hold keys. So their text says what they are, never what is in them.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address
from sys import byteorder
from typing import NamedTuple

from natcompat.ipsec.values import IPAddress
from natcompat.kernel.pfkey.dialects import Dialect
from natcompat.kernel.pfkey.numbers import PF_KEY_V2, SADB_EXT_SA

HEADER = struct.Struct("=BBBBHHII")
"""struct sadb_msg: version, type, errno, SA type, words, reserved, sequence number, process."""
WORD = 8
AF_INET = 2

_SA = struct.Struct("=4xIBBBBI")
_LIFETIME = struct.Struct("=4xIQQQ")
_ADDRESS = struct.Struct("=4xBBH")
_KEY = struct.Struct("=4xHH")
_MACOS_SA = struct.Struct("=HHHH")


class MalformedMessageError(ValueError):
    """A message whose lengths contradict each other, or of another protocol version."""


class Extension(bytes):
    """One extension, with its header; may hold a key, so its text does not show it."""

    __slots__ = ()

    @property
    def kind(self) -> int:
        """Its number (sadb_ext_type)."""
        return int.from_bytes(self[2:4], byteorder)

    def __repr__(self) -> str:
        return f"<extension {self.kind}, {len(self)} bytes>"

    __str__ = __repr__


class Wire(bytearray):
    """An encoded message; may hold keys, so its text does not show it."""

    def __repr__(self) -> str:
        return f"<message of {len(self)} bytes>"

    __str__ = __repr__

    def wipe(self) -> None:
        """Overwrite it with zeros."""
        self[:] = bytes(len(self))


@dataclass(slots=True)
class Message:
    """A message in pieces."""

    type: int
    satype: int = 0
    extensions: Sequence[Extension] = ()
    errno: int = 0
    sequence: int = 0
    process: int = 0
    diagnostic: int = 0
    """What Solaris says beyond the errno (sadb_x_msg_diagnostic); reserved elsewhere."""

    def find(self, kind: int) -> Extension | None:
        """Return the extension with this number; the first, if a kernel should send two."""
        for extension in self.extensions:
            if extension.kind == kind:
                return extension
        return None

    def encode(self, version: int = PF_KEY_V2) -> Wire:
        """Return the message as it is sent."""
        wire = Wire(HEADER.size)
        for extension in self.extensions:
            wire += extension
        words, rest = divmod(len(wire), WORD)
        if rest or words > 0xFFFF:
            raise ValueError(f"a message of {len(wire)} bytes cannot be sent")
        HEADER.pack_into(
            wire, 0, version, self.type, self.errno, self.satype, words, 0, self.sequence, self.process
        )
        return wire


def decode(data: bytes | bytearray | memoryview, protocol: int = PF_KEY_V2) -> Message:
    """Take one message apart. Raises `MalformedMessageError`."""
    view = memoryview(data)
    if len(view) < HEADER.size:
        raise MalformedMessageError(f"{len(view)} bytes are no message")
    version, kind, code, satype, words, diagnostic, sequence, process = HEADER.unpack_from(view)
    if version != protocol:
        raise MalformedMessageError(f"version {version}")
    # The header counts for less than what came: Linux leaves room at the end of some messages.
    end = words * WORD
    if not HEADER.size <= end <= len(view):
        raise MalformedMessageError(f"a message of {end} bytes in {len(view)}")
    extensions = []
    at = HEADER.size
    while at < end:
        length = int.from_bytes(view[at : at + 2], byteorder) * WORD
        if length < WORD or at + length > end:
            raise MalformedMessageError(f"an extension of {length} bytes in {end - at}")
        extensions.append(Extension(view[at : at + length]))
        at += length
    return Message(kind, satype, extensions, code, sequence, process, diagnostic)


def extension(kind: int, body: bytes | bytearray) -> Extension:
    """Return an extension with `body` behind its header, padded to whole words."""
    size = 4 + len(body)
    words = -(-size // WORD)
    return Extension(struct.pack("=HH", words, kind) + body + bytes(words * WORD - size))


def pack(kind: int, form: str, *values: int | bytes) -> Extension:
    """Return an extension whose body is `values`, packed by `form` (see `struct`) without padding."""
    return extension(kind, struct.pack(form, *values))


def unpack(form: str, found: Extension) -> tuple[int, ...]:
    """Return the fields behind the header of `found`. Raises `MalformedMessageError`."""
    return _fields(struct.Struct(form[0] + "4x" + form[1:]), found)


def _fields(layout: struct.Struct, found: Extension) -> tuple[int, ...]:
    if len(found) < layout.size:
        raise MalformedMessageError(f"extension {found.kind} has {len(found)} bytes")
    return layout.unpack_from(found)


# --- addresses -------------------------------------------------------------------------------------


def sockaddr(dialect: Dialect, address: IPAddress, port: int = 0) -> bytes:
    """Return a struct sockaddr_in or sockaddr_in6."""
    if address.version == 4:
        start = struct.pack("=BB", 16, AF_INET) if dialect.lengths else struct.pack("=H", AF_INET)
        return start + port.to_bytes(2, "big") + address.packed + bytes(8)
    size = dialect.sockaddr_in6_size
    start = struct.pack("=BB", size, dialect.inet6) if dialect.lengths else struct.pack("=H", dialect.inet6)
    return (start + port.to_bytes(2, "big") + bytes(4) + address.packed).ljust(size, b"\0")


def read_sockaddr(dialect: Dialect, data: bytes) -> tuple[IPAddress, int, int]:
    """Return address, port and size of the structure at the start of `data`."""
    if len(data) < 16:
        raise MalformedMessageError(f"a socket address of {len(data)} bytes")
    family = data[1] if dialect.lengths else int.from_bytes(data[:2], byteorder)
    port = int.from_bytes(data[2:4], "big")
    if family == AF_INET:
        address: IPAddress = IPv4Address(data[4:8])
        size = 16
    elif family == dialect.inet6:
        size = dialect.sockaddr_in6_size
        if len(data) < size:
            raise MalformedMessageError(f"an IPv6 socket address of {len(data)} bytes")
        address = IPv6Address(data[8:24])
        if dialect.maps_ipv4 and address.ipv4_mapped is not None:
            address = address.ipv4_mapped
    else:
        raise MalformedMessageError(f"a socket address of family {family}")
    if dialect.lengths and data[0] != size:
        raise MalformedMessageError(f"a socket address that says it has {data[0]} bytes")
    return address, port, size


def address_extension(
    dialect: Dialect,
    kind: int,
    address: IPAddress,
    *,
    port: int = 0,
    prefix: int | None = None,
    protocol: int | None = None,
) -> Extension:
    """Return a struct sadb_address with its socket address.

    `prefix` None: all bits. `protocol` None: that of an outer address.
    """
    start = bytes(4)
    if dialect.address_protocol is not None:
        bits = address.max_prefixlen if prefix is None else prefix
        start = struct.pack("=BBH", dialect.address_protocol if protocol is None else protocol, bits, 0)
    return extension(kind, start + sockaddr(dialect, address, port))


class AddressFields(NamedTuple):
    """The content of a struct sadb_address."""

    address: IPAddress
    port: int
    prefix: int
    protocol: int


def read_address(dialect: Dialect, found: Extension) -> AddressFields:
    """Take a struct sadb_address apart."""
    protocol, prefix, _ = _fields(_ADDRESS, found)
    address, port, _ = read_sockaddr(dialect, found[_ADDRESS.size :])
    if dialect.address_protocol is None:  # OpenBSD: reserved
        protocol, prefix = 0, address.max_prefixlen
    if prefix > address.max_prefixlen:
        raise MalformedMessageError(f"a prefix of {prefix} bits")
    return AddressFields(address, port, prefix, protocol)


# --- SAs -------------------------------------------------------------------------------------------


class SaFields(NamedTuple):
    """The content of a struct sadb_sa."""

    spi: int
    window: int = 0
    state: int = 0
    integrity: int = 0
    encryption: int = 0
    flags: int = 0


def sa_extension(fields: SaFields, ports: tuple[int, int, int] | None = None) -> Extension:
    """Return a struct sadb_sa; with `ports`, the struct sadb_sa_2 of macOS.

    `ports`: the peer's port (host byte order there), the keepalive interval, our port (network order).
    """
    spi = int.from_bytes(fields.spi.to_bytes(4, "big"), byteorder)
    body = _SA.pack(spi, *fields[1:])[4:]
    if ports is not None:
        remote, interval, local = ports
        body += _MACOS_SA.pack(remote, interval, 0, int.from_bytes(local.to_bytes(2, "big"), byteorder))
    return extension(SADB_EXT_SA, body)


def read_sa(found: Extension) -> SaFields:
    """Take a struct sadb_sa apart."""
    spi, *rest = _fields(_SA, found)
    return SaFields(int.from_bytes(spi.to_bytes(4, byteorder), "big"), *rest)


def read_sa_ports(found: Extension) -> tuple[int, int, int] | None:
    """Return what struct sadb_sa_2 of macOS adds (see `sa_extension`); None for a struct sadb_sa."""
    if len(found) < _SA.size + _MACOS_SA.size:
        return None
    remote, interval, _, local = _MACOS_SA.unpack_from(found, _SA.size)
    return remote, interval, int.from_bytes(local.to_bytes(2, byteorder), "big")


class LifetimeFields(NamedTuple):
    """The content of a struct sadb_lifetime; 0: no limit."""

    allocations: int = 0
    bytes: int = 0
    added: int = 0
    used: int = 0


def lifetime_extension(kind: int, fields: LifetimeFields) -> Extension:
    """Return a struct sadb_lifetime."""
    return extension(kind, _LIFETIME.pack(*fields)[4:])


def read_lifetime(found: Extension) -> LifetimeFields:
    """Take a struct sadb_lifetime apart."""
    return LifetimeFields(*_fields(_LIFETIME, found))


def key_extension(kind: int, key: bytes) -> Extension:
    """Return a struct sadb_key with all bits of `key`."""
    return extension(kind, _KEY.pack(8 * len(key), 0)[4:] + key)


def read_key(found: Extension) -> memoryview:
    """Return the key in a struct sadb_key."""
    bits, _ = _fields(_KEY, found)
    size = -(-bits // 8)
    if _KEY.size + size > len(found):
        raise MalformedMessageError(f"a key of {bits} bits in {len(found)} bytes")
    return memoryview(found)[_KEY.size : _KEY.size + size]


def port_extension(kind: int, port: int) -> Extension:
    """Return a struct sadb_x_nat_t_port or sadb_x_udpencap: `port` in network byte order."""
    return extension(kind, port.to_bytes(2, "big") + bytes(2))


def read_port(found: Extension) -> int:
    """Return the port in a struct sadb_x_nat_t_port or sadb_x_udpencap."""
    return int.from_bytes(found[4:6], "big")


def read_algorithms(found: Extension) -> list[tuple[int, int, int]]:
    """Return number, least and most bits of each algorithm in a struct sadb_supported."""
    algorithms = []
    for at in range(8, len(found), 8):
        number, _, least, most = struct.unpack_from("=BBHH", found, at)
        algorithms.append((number, least, most))
    return algorithms
