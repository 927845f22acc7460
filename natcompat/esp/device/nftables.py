"""Messages of nf_tables (linux/netfilter/nf_tables.h), and the netlink socket that carries them in batches.

A batch is applied by the kernel whole or not at all. What is here is what `natcompat.esp.device.guard` needs:
tables with an owner, chains, hash sets of concatenated keys, named counters, and rules of a few expressions.
Integers of nf_tables are in network byte order; data in registers is as in the packet, marks and interface
indices are in host byte order.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, NamedTuple

from natcompat.errors import NatCompatError
from natcompat.kernel.requests import Owner
from natcompat.kernel.xfrm.netlink import (
    HEADER,
    NLM_F_DUMP,
    NLMSG_DONE,
    acknowledgement,
    attributes,
    messages_in,
    receive,
)
from natcompat.kernel.xfrm.probe import (
    NETLINK_EXT_ACK,
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    SOL_NETLINK,
)

_NETLINK_NETFILTER: Final = 12  # linux/netlink.h
_SUBSYSTEM: Final = 10  # NFNL_SUBSYS_NFTABLES, linux/netfilter/nfnetlink.h
_BATCH_BEGIN, _BATCH_END = 16, 17
_NESTED: Final = 0x8000
_TYPE_INTEGER: Final = 4
"""What nft shows the keys as."""
_INET: Final = 1  # NFPROTO_INET
_NLM_F_APPEND: Final = 0x800
_SO_SNDBUFFORCE: Final = 32
_SEND_BUFFER: Final = 16 << 20
"""Bytes. A batch is one datagram, and 10,000 policies are some megabytes."""
_TIMEOUT: Final = 60  # seconds: the first batch may load modules
_ELEMENTS_PER_MESSAGE: Final = 500
"""The list of elements is one attribute, and an attribute has 65535 bytes at most."""

NEWTABLE, GETTABLE, DELTABLE = 0, 1, 2  # enum nf_tables_msg_types
NEWCHAIN, NEWRULE, DELRULE = 3, 6, 8
NEWSET, DELSET = 9, 11
NEWSETELEM, DELSETELEM = 12, 14
NEWOBJ, GETOBJ = 18, 19

OWNER, PERSIST = 0x2, 0x4  # NFT_TABLE_F_*: Linux 5.12, 6.9
LOCAL_IN, FORWARD, POST_ROUTING = 1, 2, 4  # enum nf_inet_hooks
DROP, ACCEPT, JUMP, GOTO, RETURN = 0, 1, -3, -4, -5

MARK, IIF, OIF, NFPROTO, L4PROTO = 3, 4, 5, 15, 16  # NFT_META_*
NETWORK, TRANSPORT = 1, 2  # NFT_PAYLOAD_*_HEADER
EQUAL, NOT_EQUAL = 0, 1  # NFT_CMP_*
_FIRST_REGISTER: Final = 8
"""NFT_REG32_00: registers of four bytes; a key of several fields is in consecutive ones."""
_REMEDIES: Final[Mapping[int, str]] = {
    errno.EPERM: "Run as root, or grant CAP_NET_ADMIN (docker run --cap-add NET_ADMIN)",
    errno.ENOENT: "Load the module nf_tables (CONFIG_NF_TABLES, CONFIG_NF_TABLES_INET)",
    errno.EMSGSIZE: "Install fewer policies, or larger networks in place of many small ones",
}


def attribute(kind: int, value: bytes) -> bytes:
    """Return one netlink attribute, padded."""
    return struct.pack("=HH", 4 + len(value), kind) + value + bytes(-len(value) % 4)


def nested(kind: int, *attributes: bytes) -> bytes:
    """Return an attribute that holds `attributes`."""
    return attribute(kind | _NESTED, b"".join(attributes))


def number(kind: int, value: int) -> bytes:
    """Return an attribute with a 32-bit integer."""
    return struct.pack("=HH", 8, kind) + struct.pack("!I", value & 0xFFFF_FFFF)


def text(kind: int, value: str) -> bytes:
    """Return an attribute with a name."""
    return attribute(kind, value.encode() + b"\0")


class Message(NamedTuple):
    """One change of a batch."""

    kind: int
    """NEWTABLE and so on."""
    body: bytes
    flags: int = 0


# --- expressions of rules (the names of their attributes are NFTA_*)


def _expression(name: str, *fields: bytes) -> bytes:
    return nested(1, text(1, name), nested(2, *fields))  # LIST_ELEM, EXPR_NAME, EXPR_DATA


def _register(index: int) -> int:
    return _FIRST_REGISTER + index


def meta(key: int, register: int = 0) -> bytes:
    """Load a property of the packet that is in no header."""
    return _expression("meta", number(1, _register(register)), number(2, key))


def payload(base: int, offset: int, length: int, register: int = 0) -> bytes:
    """Load `length` bytes of a header. The rule ends where a packet has none, such as a later fragment."""
    fields = number(1, _register(register)), number(2, base), number(3, offset), number(4, length)
    return _expression("payload", *fields)


def extension_header(kind: int, offset: int, length: int, register: int = 0) -> bytes:
    """Load `length` bytes of an IPv6 extension header. The rule ends where a packet lacks the header."""
    kind_field = attribute(2, bytes([kind]))
    return _expression(
        "exthdr", number(1, _register(register)), kind_field, number(3, offset), number(4, length)
    )


def masked(mask: bytes, register: int = 0) -> bytes:
    """Clear the bits of a register that `mask` lacks."""
    fields = number(1, _register(register)), number(2, _register(register)), number(3, len(mask))
    return _expression(
        "bitwise", *fields, nested(4, attribute(1, mask)), nested(5, attribute(1, bytes(len(mask))))
    )


def compare(data: bytes, register: int = 0, operator: int = EQUAL) -> bytes:
    """End the rule unless the register is `data`."""
    return _expression(
        "cmp", number(1, _register(register)), number(2, operator), nested(3, attribute(1, data))
    )


def lookup(name: str, *, inverted: bool = False) -> bytes:
    """End the rule unless the key, from the first register on, is in the set `name`."""
    return _expression(
        "lookup", text(1, name), number(2, _register(0)), *([number(5, 1)] if inverted else [])
    )


def verdict(code: int, chain: str = "") -> bytes:
    """Decide, or go to `chain`."""
    fields = [number(1, code), *([text(2, chain)] if chain else [])]
    return _expression("immediate", number(1, 0), nested(2, nested(2, *fields)))


def count(counter: str) -> bytes:
    """Count the packet."""
    return _expression("objref", number(1, 1), text(2, counter))


def socket_mark(register: int = 0) -> bytes:
    """Load the mark of the socket that the packet is for; the rule ends where there is none."""
    return _expression("socket", number(1, 1), number(2, _register(register)))


# --- changes


def new_table(table: str, flags: int) -> Message:
    """Create a table, or adopt one that its owner left (OWNER and PERSIST)."""
    return Message(NEWTABLE, text(1, table) + number(2, flags), NLM_F_CREATE)


def delete_table(table: str) -> Message:
    """Delete a table with all that is in it."""
    return Message(DELTABLE, text(1, table))


def new_chain(table: str, name: str, hook: tuple[int, int] | None = None) -> Message:
    """Create a chain; `hook`: where packets enter it, and the priority there."""
    body = text(1, table) + text(3, name)
    if hook is not None:
        body += nested(4, number(1, hook[0]), number(2, hook[1])) + number(5, ACCEPT) + text(7, "filter")
    return Message(NEWCHAIN, body, NLM_F_CREATE)


def new_counter(table: str, name: str) -> Message:
    """Create a named counter."""
    return Message(NEWOBJ, text(1, table) + text(2, name) + number(3, 1) + nested(4), NLM_F_CREATE)


def new_rule(table: str, chain: str, *expressions: bytes) -> Message:
    """Append a rule to a chain."""
    return Message(
        NEWRULE, text(1, table) + text(2, chain) + nested(4, *expressions), NLM_F_CREATE | _NLM_F_APPEND
    )


def first_rule(table: str, chain: str, *expressions: bytes) -> Message:
    """Put a rule in front of the others of a chain."""
    return Message(NEWRULE, text(1, table) + text(2, chain) + nested(4, *expressions), NLM_F_CREATE)


def flush_rules(table: str, chain: str) -> Message:
    """Delete all rules of a chain."""
    return Message(DELRULE, text(1, table) + text(2, chain))


def new_set(table: str, name: str, number_of_set: int, key_length: int) -> Message:
    """Create a hash set. `number_of_set`: unique in the batch."""
    body = text(1, table) + text(2, name) + number(3, 0) + number(4, _TYPE_INTEGER) + number(5, key_length)
    return Message(NEWSET, body + number(10, number_of_set), NLM_F_CREATE)


def delete_set(table: str, name: str) -> Message:
    """Delete a set that no rule uses."""
    return Message(DELSET, text(1, table) + text(2, name))


def set_elements(table: str, name: str, keys: Sequence[bytes], *, delete: bool = False) -> list[Message]:
    """Put `keys` into a set, or take them out."""
    messages = []
    for start in range(0, len(keys), _ELEMENTS_PER_MESSAGE):
        elements = [
            nested(1, nested(1, attribute(1, key))) for key in keys[start : start + _ELEMENTS_PER_MESSAGE]
        ]
        body = text(1, table) + text(2, name) + nested(3, *elements)
        messages.append(Message(DELSETELEM if delete else NEWSETELEM, body, 0 if delete else NLM_F_CREATE))
    return messages


class TableState(NamedTuple):
    """A table of the family inet, as the kernel lists it."""

    name: str
    flags: int
    owner: int
    """The netlink port of the owner's socket; 0: none."""


def removal(state: TableState) -> list[Message]:
    """Return what removes a table that no process owns."""
    return [*adoption(state), delete_table(state.name)]


def adoption(state: TableState) -> list[Message]:
    """Return what makes this process the owner of a table whose owner has gone (with PERSIST)."""
    return [new_table(state.name, OWNER | PERSIST)] if state.flags & PERSIST else []


class Nfnetlink:
    """A netlink socket to nf_tables, in the network namespace of the thread that makes it.

    Tables with OWNER belong to the socket: the kernel removes them when the last process that has the socket
    closes it, or keeps them with PERSIST. Methods may be called from any thread; a forked child must not call
    them (EINVAL).
    """

    def __init__(self) -> None:
        """Open the socket. EPROTONOSUPPORT: this kernel has no nfnetlink."""
        self._owner = Owner()
        self._lock = threading.Lock()
        self._sequence = 0
        try:
            self._socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER
            )
        except OSError as error:
            raise _failure("Opening nf_tables", error.errno or errno.EPROTONOSUPPORT, "") from None
        self._socket.setsockopt(SOL_NETLINK, NETLINK_EXT_ACK, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", _TIMEOUT, 0))
        for option in (socket.SO_SNDBUF, _SO_SNDBUFFORCE):
            try:
                self._socket.setsockopt(socket.SOL_SOCKET, option, _SEND_BUFFER)
            except OSError:  # without CAP_NET_ADMIN, where no batch goes through anyway
                break
        self._socket.bind((0, 0))

    def close(self) -> None:
        """Close the socket, and with it the tables that it owns."""
        self._socket.close()

    def batch(self, operation: str, messages: Iterable[Message]) -> None:
        """Apply `messages` whole or not at all. `operation` begins the text of the error."""
        self._owner.check(operation)
        with self._lock:
            first = self._sequence + 1
            parts = [_message(_BATCH_BEGIN, NLM_F_REQUEST, first, b"", family=0, resource=_SUBSYSTEM)]
            sequence = first
            listed = list(messages)
            for index, message in enumerate(listed, 1):
                sequence += 1
                flags = NLM_F_REQUEST | message.flags | (NLM_F_ACK if index == len(listed) else 0)
                parts.append(_message(_SUBSYSTEM << 8 | message.kind, flags, sequence, message.body))
            end = _message(_BATCH_END, NLM_F_REQUEST, sequence + 1, b"", family=0, resource=_SUBSYSTEM)
            self._sequence = (sequence + 1) & 0x3FFF_FFFF
            self._send(operation, b"".join([*parts, end]))
            self._await(operation, first, sequence)

    def _send(self, operation: str, data: bytes) -> None:
        try:
            self._socket.sendto(data, (0, 0))
        except OSError as error:
            raise _failure(operation, error.errno or 0, error.strerror or "") from None

    def _await(self, operation: str, first: int, last: int) -> None:
        """Read acknowledgements up to that of message `last`; raise the first error."""
        failed: NatCompatError | None = None
        while True:
            for kind, flags, sequence, answer in self._receive(operation):
                if kind != NLMSG_ERROR or not first <= sequence <= last:
                    continue
                code, reason = acknowledgement(answer, flags)
                if code and failed is None:
                    failed = _failure(operation, code, reason)
                if sequence in (first, last):  # the batch as a whole, or its last message
                    if failed is not None:
                        raise failed
                    return

    def _receive(self, operation: str) -> Iterable[tuple[int, int, int, bytes]]:
        try:
            return list(messages_in(receive(self._socket, 1 << 18)))
        except OSError as error:
            raise _failure(operation, error.errno or errno.EIO, error.strerror or "") from None

    def _dump(self, operation: str, kind: int, body: bytes) -> list[bytes]:
        self._owner.check(operation)
        answers: list[bytes] = []
        with self._lock:
            self._sequence += 1
            sequence = self._sequence
            self._send(
                operation, _message(_SUBSYSTEM << 8 | kind, NLM_F_REQUEST | NLM_F_DUMP, sequence, body)
            )
            while True:
                for answer_kind, flags, answered, answer in self._receive(operation):
                    if answered != sequence:
                        continue
                    if answer_kind == NLMSG_ERROR:
                        raise _failure(operation, *acknowledgement(answer, flags))
                    if answer_kind == NLMSG_DONE:
                        return answers
                    answers.append(answer)

    def tables(self) -> list[TableState]:
        """Return the tables of the family inet."""
        tables = []
        for answer in self._dump("Listing the tables", GETTABLE, b""):
            if answer[HEADER.size] == _INET:
                fields = _fields(answer)
                flags, owner = (int.from_bytes(fields.get(kind, b"")) for kind in (2, 7))
                name = fields.get(1, b"").rstrip(b"\0").decode(errors="replace")
                tables.append(TableState(name, flags, owner))
        return tables

    def counters(self, table: str) -> dict[str, int]:
        """Return the packets of the named counters of a table."""
        counters = {}
        for answer in self._dump("Reading the counters", GETOBJ, text(1, table) + number(3, 1)):
            fields = _fields(answer)
            for kind, start, end in attributes(fields.get(4, b""), 0):
                if kind == 2:
                    name = fields.get(2, b"").rstrip(b"\0").decode(errors="replace")
                    counters[name] = int.from_bytes(fields[4][start:end])
        return counters


def _fields(answer: bytes) -> dict[int, bytes]:
    return {kind: answer[start:end] for kind, start, end in attributes(answer, HEADER.size + 4)}


def _message(
    kind: int, flags: int, sequence: int, body: bytes, *, family: int = 1, resource: int = 0
) -> bytes:
    """Return a message: struct nlmsghdr, struct nfgenmsg (family NFPROTO_INET), attributes."""
    head = HEADER.pack(HEADER.size + 4 + len(body), kind, flags, sequence, 0)
    return head + struct.pack("!BBH", family, 0, resource) + body


def _failure(operation: str, code: int, reason: str) -> NatCompatError:
    return NatCompatError(code, f"{operation}: {reason or os.strerror(code)}", _REMEDIES.get(code, ""))
