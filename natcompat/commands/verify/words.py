"""The words of a report: duties, addresses, octets and errors."""

from __future__ import annotations

import errno
from typing import Any, Final, TypeAlias

Address: TypeAlias = tuple[Any, ...]

TIMED_OUT: Final = "nothing"


def duty_words(duties: Any) -> dict[str, str]:
    """Return the performers of the duties as words: ``{"drop_runts": "filter", ...}``."""
    return {str(duty.name).lower(): performer.value for duty, performer in duties.items()}


def in_words(
    arrived: list[tuple[bytes, Address]],
    diverted: list[tuple[bytes, Address]],
    source: Address,
    *,
    in_full: bool,
) -> str:
    """Describe the datagrams that arrived; `in_full`: with their first bytes."""
    pieces = []
    for where, datagrams in (("IKE", arrived), ("esp=", diverted)):
        for data, sender in datagrams:
            words = show_bytes(data) if in_full else octets(len(data))
            pieces.append(f"{where}, {words}{from_address(sender, source)}")
    return "; ".join(pieces) or "nothing"


def from_address(source: Address, expected: Address) -> str:
    """Return the source of a datagram in words; empty if it is `expected`."""
    return (
        "" if source == expected else f" from {source[0]} port {source[1]}, not {expected[0]} {expected[1]}"
    )


def octets(count: int) -> str:
    """Return "1 byte", "2 bytes"..."""
    return "1 byte" if count == 1 else f"{count} bytes"


def show_bytes(data: bytes) -> str:
    """Return the number of bytes of `data` and the first of them: ``1404: 00000000...``."""
    return f"{len(data)}: {data[:4].hex()}{'...' if len(data) > 4 else ''}".rstrip(": ")


def describe_error(error: OSError) -> str:
    """Return the symbol of `error`, or its class and text."""
    if isinstance(error, TimeoutError):
        return TIMED_OUT
    return errno.errorcode.get(error.errno or 0, "") or f"{type(error).__name__}: {error}"


def errno_of(operation: Any) -> str:
    """Return the symbol of the error that `operation` raises."""
    try:
        return f"no error, but {operation()!r}"
    except OSError as error:
        return describe_error(error)
