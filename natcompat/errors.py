"""The exceptions that natcompat raises, and text from outside made safe for terminals and logs."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import logging


class NatCompatError(OSError):
    """An operation failed. Carries the errno that Solaris would give, and a remedy.

    `remedy` is one sentence that says what to do (load a module, grant a capability, make another
    call), or empty. It is part of ``str(error)``. Neither the message nor the remedy contains a secret
    or, since both pass through `printable`, a control character.
    """

    remedy: str

    def __init__(self, errno: int, reason: str, remedy: str = "") -> None:
        super().__init__(errno, printable(reason or os.strerror(errno)))
        self.remedy = printable(remedy)

    def __str__(self) -> str:
        return f"{super().__str__()}. {self.remedy}" if self.remedy else super().__str__()

    def __reduce__(self) -> tuple[type[NatCompatError], tuple[int, str, str]]:
        return type(self), (self.errno or 0, self.strerror or "", self.remedy)


class BackendUnavailableError(NatCompatError):
    """The requested backend is unknown here or cannot work here; the message says why."""


def printable(text: object) -> str:
    """Return `text` as one line that is safe in a terminal and in a log.

    Every character that is not printable (`str.isprintable`: control characters, escape sequences, line
    ends, bidirectional and zero-width marks, lone surrogates, every space but U+0020) becomes
    ``\\xNN``, ``\\uNNNN`` or ``\\UNNNNNNNN``, with lower-case hexadecimal digits. All else stays,
    backslashes included, so that a second call changes nothing.

    Bytes are read as UTF-8, those that are none become ``\\xNN``; any other object gives its ``str()``.
    Use it for every text from outside: process and interface names, file contents, error texts of the
    system, identities of peers.
    """
    if isinstance(text, (bytes, bytearray, memoryview)):
        text = bytes(text).decode("utf-8", "backslashreplace")
    characters = str(text)
    return characters if characters.isprintable() else "".join(map(_visible, characters))


def _visible(character: str) -> str:
    if character.isprintable():
        return character
    number = ord(character)
    if number < 0x100:
        return f"\\x{number:02x}"
    return f"\\u{number:04x}" if number < 0x10000 else f"\\U{number:08x}"


def get_logger(name: str = "natcompat") -> logging.Logger:
    """Return the logger `name`, whose messages and tracebacks are made safe by `printable`.

    Every module of natcompat logs through this function, so that no call can forget it.
    """
    import logging  # a command that logs nothing does not pay for it

    logger = logging.getLogger(name)
    if _make_record_printable not in logger.filters:
        logger.addFilter(_make_record_printable)
    return logger


def _make_record_printable(record: logging.LogRecord) -> bool:
    """Replace the control characters in the message and the traceback of a record; keeps the record."""
    record.msg, record.args = printable(record.getMessage()), None
    if record.exc_info and not record.exc_text:
        import traceback

        lines: list[str] = []
        for piece in traceback.format_exception(*record.exc_info):
            text = piece.strip("\n")  # a frame has lines; a message shall have one
            lines += map(printable, text.split("\n") if text.startswith("  File ") else [text])
        record.exc_text = "\n".join(lines)
    return True
