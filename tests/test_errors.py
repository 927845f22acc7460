"""The exceptions, and `printable`: text from outside cannot steer a terminal or forge a line of a log."""

from __future__ import annotations

import copy
import errno
import os
import pickle
import sys
from collections.abc import Callable

import pytest

from natcompat import BackendUnavailableError, NatCompatError
from natcompat.errors import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("tun0", "tun0"),
        ("", ""),
        ("C:\\x1b[31m", "C:\\x1b[31m"),
        ("Zürich 東京 ✓", "Zürich 東京 ✓"),
        ("\x1b[2J\x1b]0;title\x07", r"\x1b[2J\x1b]0;title\x07"),
        ("one\ntwo\r\tthree\x00", r"one\x0atwo\x0d\x09three\x00"),
        ("\x7f\x80\x9b31m", r"\x7f\x80\x9b31m"),
        ("user\u202egpj.exe", r"user\u202egpj.exe"),
        ("a\u2066b\u2069\u200e\u200f\u061c", r"a\u2066b\u2069\u200e\u200f\u061c"),
        ("zero\u200bwidth\ufeff", r"zero\u200bwidth\ufeff"),
        ("line\u2028paragraph\u2029next\x85", r"line\u2028paragraph\u2029next\x85"),
        ("no\xa0break\u3000", r"no\xa0break\u3000"),
        ("lone \udc9b surrogate", r"lone \udc9b surrogate"),
        ("tag \U000e0041", r"tag \U000e0041"),
        (b"Z\xc3\xbcrich\x1b", r"Zürich\x1b"),
        (bytearray(b"\xff\xfe"), r"\xff\xfe"),
        (memoryview(b"\x9b31m"), r"\x9b31m"),
        (NatCompatError(1, "no \x1b[31mway"), r"[Errno 1] no \x1b[31mway"),
        (4500, "4500"),
    ],
)
def test_printable_replaces_what_is_not_printable(text: object, shown: str) -> None:
    assert printable(text) == shown


def test_printable_returns_printable_text_for_every_character() -> None:
    characters = "".join(map(chr, range(sys.maxunicode + 1)))
    shown = printable(characters)
    assert shown.isprintable()
    shown.encode()  # no lone surrogate is left
    assert printable(shown) == shown


def test_an_error_says_what_and_what_to_do() -> None:
    error = NatCompatError(errno.ENOTSUP, "it does not work", "Do something else")
    assert str(error) == f"[Errno {errno.ENOTSUP}] it does not work. Do something else"
    assert (error.errno, error.strerror, error.remedy) == (
        errno.ENOTSUP,
        "it does not work",
        "Do something else",
    )
    assert str(NatCompatError(errno.EBADF, "closed")) == f"[Errno {errno.EBADF}] closed"
    assert NatCompatError(errno.EBADF, "").strerror == os.strerror(errno.EBADF)
    assert isinstance(error, OSError)


@pytest.mark.parametrize("cls", [NatCompatError, BackendUnavailableError])
@pytest.mark.parametrize(
    "duplicate", [copy.copy, copy.deepcopy, lambda error: pickle.loads(pickle.dumps(error))]
)
def test_an_error_passes_between_processes(
    cls: type[NatCompatError], duplicate: Callable[[NatCompatError], NatCompatError]
) -> None:
    error = cls(errno.ENOTSUP, "it does not work", "Do something else")
    other = duplicate(error)
    assert type(other) is cls
    assert (other.errno, other.remedy, str(other)) == (error.errno, error.remedy, str(error))
