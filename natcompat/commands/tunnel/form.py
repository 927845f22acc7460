"""The schema of a tunnel's file: its tables, their keys, and the values that each key takes.

No error shows a value that may be key material, which may stand in the wrong place.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from ipaddress import ip_address, ip_interface, ip_network
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeAlias

from natcompat.errors import NatCompatError
from natcompat.ipsec import Action, Direction, Encr, Integ, Mode

Table: TypeAlias = dict[str, Any]
REQUIRED: Final = object()
"""In place of a default: the key has to be there."""

_LONG_DIGITS: Final = re.compile(r"[0-9A-Fa-f]{16,}")
_LONGEST_SHOWN: Final = 40


class ConfigurationError(NatCompatError):
    """A fault in a tunnel's file; the message names file, line, table and key."""


class Kind(NamedTuple):
    """One kind of value."""

    read: Callable[[Any], Any]
    """Returns the value as natcompat wants it; a ValueError, whatever it says, if it is not of this kind."""
    right: str
    """The remedy: what to write in place of a wrong value."""


class Entry(NamedTuple):
    """One key of a table."""

    kind: Kind
    default: Any = REQUIRED


def shown(value: object) -> str:
    """Return `value` for an error message, without anything that may be a key."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value) if abs(value) < 1 << 64 else "a number that large"
    if isinstance(value, str):
        return f'"{hide_keys(value)}"' if len(value) <= _LONGEST_SHOWN else "a text that long"
    kinds = {dict: "a table", list: "an array", float: "a fraction"}
    return kinds.get(type(value), "a date or time")


def hide_keys(text: str) -> str:
    """Return `text` on one line, without digits that may be a key."""
    return _LONG_DIGITS.sub("...", text).encode("unicode_escape").decode("ascii")


# --- kinds ---------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError
    return value


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


def _integer(smallest: int, largest: int) -> Kind:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not smallest <= value <= largest:
            raise ValueError
        return value

    return Kind(read, f"Write an integer from {smallest} to {largest}")


def _one_of(values: Mapping[str, Any]) -> Kind:
    def read(value: Any) -> Any:
        if not isinstance(value, str) or value not in values:
            raise ValueError
        return values[value]

    return Kind(read, f"Write one of {', '.join(chr(34) + value + chr(34) for value in values)}")


def _by(function: Callable[[str], Any]) -> Callable[[Any], Any]:
    return lambda value: function(_text(value))


def _specified(value: str) -> Any:
    address = ip_address(value)
    if address.is_unspecified or address.is_multicast or getattr(address, "scope_id", None):
        raise ValueError
    return address


def _array_of(kind: Kind, example: str) -> Kind:
    def read(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list):
            raise ValueError
        return tuple(kind.read(element) for element in value)

    return Kind(read, f"Write an array such as {example}")


def _interface(value: str) -> str:
    name = value.replace("%d", "0", 1)
    if len(value.encode()) > 15 or not re.fullmatch(r"[A-Za-z0-9_.-]+", name) or name in (".", ".."):
        raise ValueError
    return value


def _protocol(value: Any) -> int:
    if isinstance(value, str):
        return _PROTOCOLS[value] if value in _PROTOCOLS else _integer(0, 0).read(value)
    number: int = _integer(0, 255).read(value)
    return number


def _table(value: Any) -> Table:
    if not isinstance(value, dict):
        raise ValueError
    return value


def _tables(value: Any) -> list[Table]:
    if not isinstance(value, list) or not all(isinstance(table, dict) for table in value):
        raise ValueError
    return value


_PROTOCOLS: Final = {"any": 0, "icmp": 1, "tcp": 6, "udp": 17, "ipv6-icmp": 58, "sctp": 132}

TEXT: Final = Kind(_text, "Write a text in quotes")
PATH: Final = Kind(_by(Path), "Write a path in quotes; a relative one begins where the file is")
BOOLEAN: Final = Kind(_boolean, "Write true or false")
PORT: Final = _integer(1, 65535)
ADDRESS: Final = Kind(_by(_specified), 'Write an IP address of one host, such as "192.0.2.1"')
NETWORK: Final = Kind(_by(ip_network), 'Write a network, such as "10.1.0.0/16" (no bits behind its length)')
NETWORKS: Final = _array_of(NETWORK, '["10.2.0.0/16", "fd00:2::/64"]')
INTERFACES: Final = _array_of(Kind(_by(ip_interface), ""), '["10.1.0.1/16", "fd00:1::1/64"]')
DEVICE_NAME: Final = Kind(_by(_interface), "Write up to 15 letters and digits; %d stands for the next number")
PROTOCOL: Final = Kind(
    _protocol, f"Write a number from 0 to 255, or one of {', '.join(_PROTOCOLS)} in quotes"
)
TABLE: Final = Kind(_table, "Write a table")
LIMIT: Final = _integer(1, (1 << 63) - 1)

# --- tables --------------------------------------------------------------------------------------

TOP: Final[Mapping[str, Entry]] = {
    "state": Entry(PATH, None),
    "endpoint": Entry(Kind(_table, "Write a table: [endpoint]")),
    "device": Entry(Kind(_table, "Write a table: [device]"), None),
    "sa": Entry(Kind(_tables, "Begin every SA with [[sa]]")),
    "policy": Entry(Kind(_tables, "Begin every policy with [[policy]]")),
}

ENDPOINT: Final[Mapping[str, Entry]] = {
    "backend": Entry(_one_of({"userspace": "userspace", "linux": "linux"}), "userspace"),
    "local_address": Entry(ADDRESS),
    "local_port": Entry(PORT, 4500),
    "remote_address": Entry(ADDRESS),
    "remote_port": Entry(PORT, 4500),
    "follow_mapping": Entry(BOOLEAN, False),
    "keepalive": Entry(_one_of({"esp": "esp", "nat": "nat", "none": "none"}), None),
    "silence": Entry(_integer(0, 86400), 60),
}

DEVICE: Final[Mapping[str, Entry]] = {
    "kind": Entry(_one_of({"tun": "tun", "none": "none"}), "tun"),
    "name": Entry(DEVICE_NAME, "natcompat%d"),
    "addresses": Entry(INTERFACES, ()),
    "routes": Entry(NETWORKS, None),
    "mtu": Entry(_integer(576, 65535), None),
    "lockdown": Entry(BOOLEAN, False),
}

SA: Final[Mapping[str, Entry]] = {
    "spi": Entry(_integer(256, 0xFFFF_FFFF)),
    "direction": Entry(_one_of({each.value: each for each in Direction})),
    "source": Entry(ADDRESS, None),
    "destination": Entry(ADDRESS, None),
    "remote_port": Entry(PORT, None),
    "mode": Entry(_one_of({each.value: each for each in Mode}), Mode.TUNNEL),
    "encryption": Entry(_one_of(dict(Encr.__members__))),
    "encryption_key": Entry(Kind(lambda value: value, ""), None),
    "integrity": Entry(_one_of(dict(Integ.__members__)), Integ.NONE),
    "integrity_key": Entry(Kind(lambda value: value, ""), None),
    "esn": Entry(BOOLEAN, False),
    "replay_window": Entry(_integer(0, 4096), 1024),
    "reqid": Entry(_integer(0, 0xFFFF_FFFF), 0),
    "lifetime": Entry(TABLE, None),
    "nat_keepalive": Entry(_integer(1, 3600), None),
    "tfc": Entry(_integer(0, 65535), 0),
    "copy_dscp": Entry(BOOLEAN, True),
    "copy_ecn": Entry(BOOLEAN, True),
    "copy_df": Entry(BOOLEAN, True),
}

KEY: Final[Mapping[str, Entry]] = {
    "key_file": Entry(PATH, None),
    "key_environment": Entry(TEXT, None),
}

LIFETIME: Final[Mapping[str, Entry]] = {
    f"{limit}_{unit}": Entry(LIMIT, None)
    for unit in ("seconds", "bytes", "packets")
    for limit in ("soft", "hard")
}

POLICY: Final[Mapping[str, Entry]] = {
    "direction": Entry(_one_of({each.value: each for each in Direction})),
    "source": Entry(NETWORK),
    "destination": Entry(NETWORK),
    "protocol": Entry(PROTOCOL, 0),
    "source_port": Entry(_integer(0, 65535), 0),
    "destination_port": Entry(_integer(0, 65535), 0),
    "action": Entry(_one_of({each.value: each for each in Action}), Action.PROTECT),
    "mode": Entry(_one_of({each.value: each for each in Mode}), Mode.TUNNEL),
    "tunnel_source": Entry(ADDRESS, None),
    "tunnel_destination": Entry(ADDRESS, None),
    "reqid": Entry(_integer(0, 0xFFFF_FFFF), 0),
    "priority": Entry(_integer(0, 0xFFFF_FFFF), None),
    "optional": Entry(BOOLEAN, False),
}


# --- reading -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Place:
    """A table of the file, for errors to name it."""

    path: Path
    text: str
    """Of the whole file; only looked at for the number of a line."""
    table: str = ""
    number: int = 0
    """Of this table among those of its name, from 1; 0: there is one."""
    inner: str = ""
    """The key whose table this is, as in ``lifetime = { soft_seconds = 1 }``."""

    def error(self, key: str, problem: str, remedy: str, *, near: str = "") -> ConfigurationError:
        """Return the error for `key`, which may be empty: the table as a whole, on the line of `near`."""
        line = _line(self.text, self.table, self.number, self.inner or key or near)
        where = [f"{hide_keys(str(self.path))}, line {line}" if line else hide_keys(str(self.path))]
        if self.table:
            where.append(f"[[{self.table}]] {self.number}" if self.number else f"[{self.table}]")
        names = ".".join(name for name in (self.inner, key) if name)
        where += [names] if names else []
        return ConfigurationError(errno.EINVAL, f"{', '.join(where)}: {problem}", remedy)

    def read(self, table: Table, entries: Mapping[str, Entry]) -> Table:
        """Return the values of `table`, defaults among them."""
        for key in table:
            if key not in entries:
                near = _nearest(key, entries)
                choice = f"Known here: {', '.join(entries)}"
                remedy = f"Is {near} meant? {choice}" if near else choice
                raise self.error("", f"unknown key {shown(key)}", remedy, near=key)
        values = {}
        for key, entry in entries.items():
            if key not in table:
                if entry.default is REQUIRED:
                    raise self.error("", f"{key} is missing", entry.kind.right)
                values[key] = entry.default
                continue
            try:
                values[key] = entry.kind.read(table[key])
            except ValueError:
                raise self.error(key, f"{shown(table[key])} is not right", entry.kind.right) from None
        return values


def _nearest(key: str, entries: Mapping[str, Entry]) -> str:
    import difflib

    return next(iter(difflib.get_close_matches(key, entries, 1)), "")


def _line(text: str, table: str, number: int, key: str) -> int:
    """Return the number of the line where `key` of a table stands, or the table, or 0: not found.

    tomllib does not tell. This reads lines, not TOML: good for what people write.
    """
    inside, headers, header = not table, 0, 0
    for count, line in enumerate(text.splitlines(), 1):
        begun = re.match(r"\s*\[\[?\s*([A-Za-z0-9_.-]+)\s*\]\]?", line)
        if begun:
            if inside and table:
                break
            headers += begun[1] == table
            inside = begun[1] == table and headers == max(number, 1)
            header = count if inside else header
            if not table and begun[1] == key:
                return count
        elif inside and key and re.match(rf"\s*[\"']?{re.escape(key)}[\"']?\s*[=.]", line):
            return count
    return header
