"""Whatever a kernel says, or something in its place: understood, or refused as malformed."""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natcompat.ipsec.values import Direction
from natcompat.kernel.pfkey import flows, rules, spd
from natcompat.kernel.pfkey.dialects import DIALECTS, Dialect, Policies
from natcompat.kernel.pfkey.messages import (
    HEADER,
    Extension,
    MalformedMessageError,
    Message,
    address_extension,
    decode,
    extension,
    read_address,
    read_algorithms,
)
from natcompat.kernel.pfkey.readback import installed_sa, record_of, usage_of
from natcompat.kernel.pfkey.translate import encode_sa
from tests.kernel.pfkey.golden import CBC, PORTS, association
from tests.kernel.pfkey.test_golden_policies import policy

TRIED = settings(max_examples=60, deadline=None, database=None)
EVERY = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)


def readers(dialect: Dialect) -> list[Callable[[Message], object]]:
    """Return all that takes a kernel's messages apart."""
    found: list[Callable[[Message], object]] = [
        lambda message: installed_sa(dialect, message, lambda _: Direction.IN),
        lambda message: usage_of(dialect, message),
        lambda message: record_of(dialect, message),
    ]
    if dialect.policies is Policies.SPD:
        found.append(lambda message: spd.policy_of(dialect, message))
    elif dialect.policies is Policies.FLOWS:
        found.append(lambda message: flows.selector_of(dialect, message))
    else:
        found.append(lambda message: list(rules.policies_of(dialect, message)))
    return found


def messages(dialect: Dialect) -> list[bytes]:
    """Return messages of every kind that the readers know."""
    changes: dict[str, Any] = {"replay_window": 32} if dialect.name != "openbsd" else {"replay_window": 64}
    found = [
        bytes(encode_sa(dialect, association(direction, **CBC, encapsulation=PORTS, **changes), 3).encode())
        for direction in Direction
    ]
    if dialect.policies is Policies.SPD:
        found.append(bytes(spd.encode_policy(dialect, policy(Direction.OUT), 2).encode()))
    elif dialect.policies is Policies.FLOWS:
        found.append(bytes(flows.encode_flow(dialect, policy(Direction.IN), 12).encode()))
    else:
        found.append(bytes(rules.encode_rule(dialect, policy(Direction.IN, interface_id=1), 2).encode()))
    return found


def try_all(dialect: Dialect, data: bytes) -> None:
    try:
        message = decode(data)
    except MalformedMessageError:
        return
    repr(message)
    for read in readers(dialect):
        try:
            repr(read(message))
        except ValueError:
            continue


@EVERY
@TRIED
@given(data=st.binary(max_size=200))
def test_anything(dialect: Dialect, data: bytes) -> None:
    try_all(dialect, data)


@EVERY
@TRIED
@given(data=st.data())
def test_messages_with_something_wrong(dialect: Dialect, data: st.DataObject) -> None:
    message = bytearray(data.draw(st.sampled_from(messages(dialect))))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, len(message) - 1))
        message[at] = data.draw(st.integers(0, 255))
    try_all(dialect, bytes(message))


@EVERY
@TRIED
@given(data=st.data())
def test_messages_that_end_too_soon(dialect: Dialect, data: st.DataObject) -> None:
    message = data.draw(st.sampled_from(messages(dialect)))
    cut = message[: data.draw(st.integers(0, len(message) - 1))]
    with pytest.raises(MalformedMessageError):
        decode(cut)
    # the same, but the header says what has come: the extensions end too soon
    whole = bytearray(cut[: len(cut) // 8 * 8])
    if len(whole) >= HEADER.size:
        struct.pack_into("=H", whole, 4, len(whole) // 8)
        try_all(dialect, bytes(whole))


@EVERY
@TRIED
@given(extensions=st.lists(st.builds(extension, st.integers(0, 45), st.binary(max_size=80)), max_size=8))
def test_extensions_of_any_size(dialect: Dialect, extensions: list[Extension]) -> None:
    try_all(dialect, bytes(Message(5, dialect.esp, extensions).encode()))


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "0 bytes"),
        (bytes(15), "15 bytes"),
        (b"\x03" + bytes(15), "version 3"),
        (HEADER.pack(2, 5, 0, 3, 1, 0, 0, 0), "message of 8 bytes"),
        (HEADER.pack(2, 5, 0, 3, 3, 0, 0, 0), "message of 24 bytes"),
        (HEADER.pack(2, 5, 0, 3, 3, 0, 0, 0) + bytes(8), "extension of 0 bytes"),
        (HEADER.pack(2, 5, 0, 3, 3, 0, 0, 0) + struct.pack("=HHI", 2, 1, 0), "extension of 16 bytes in 8"),
    ],
)
def test_lengths_that_cannot_be(data: bytes, words: str) -> None:
    with pytest.raises(MalformedMessageError, match=words):
        decode(data)


def test_unknown_extensions_are_passed_over() -> None:
    dialect = DIALECTS["freebsd"]
    sa = association(Direction.IN, **CBC)
    message = encode_sa(dialect, sa, 3)
    message.extensions = [extension(200, b"?"), *message.extensions, extension(0xFFFF, bytes(100))]
    found = installed_sa(dialect, decode(message.encode() + bytes(24)), lambda _: Direction.IN)
    assert found.association is not None
    assert found.association.encryption_key == sa.encryption_key
    assert message.find(77) is None


@EVERY
def test_socket_addresses_that_cannot_be(dialect: Dialect) -> None:
    good = address_extension(dialect, 5, association(Direction.OUT, **CBC).source)
    family = 9 if dialect.lengths else 8
    for at in {8, family}:  # the length, where there is one, and the family
        bad = Extension(good[:at] + b"\x63" + good[at + 1 :])
        with pytest.raises(MalformedMessageError):
            read_address(dialect, bad)
    with pytest.raises(MalformedMessageError, match="8 bytes"):
        read_address(dialect, Extension(good[:16]))
    if dialect.name == "openbsd":
        return  # there is no prefix
    with pytest.raises(MalformedMessageError, match="33 bits"):
        read_address(dialect, Extension(good[:5] + b"\x21" + good[6:]))


def test_lists_of_algorithms_may_end_anywhere() -> None:
    for size in range(30):
        assert len(read_algorithms(extension(14, bytes(4 + size)))) == -(-(8 + size) // 8) - 1


def test_what_is_too_long_is_not_sent() -> None:
    with pytest.raises(ValueError, match="cannot be sent"):
        Message(3, extensions=[extension(9, bytes(60000))] * 9).encode()
