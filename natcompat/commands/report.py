"""Output of the commands: Rich on a terminal, aligned plain text in a pipe, the same words in both.

Every text that a command shows passes through this module or `natcompat.commands.tables`, and each of their
functions replaces control characters (`natcompat.errors.printable`). So a process name, a file or a peer
can neither steer the terminal nor forge a line. Rich gets `Text` objects only, so markup has no meaning.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TextIO

from natcompat.errors import get_logger, printable

if TYPE_CHECKING:
    from rich.text import Text

GOOD, BAD, DOUBTFUL, QUIET = "green", "bold red", "yellow", "dim"
"""Meanings of a text, as styles of Rich. No meaning is shown by colour alone."""


class Words(str):
    """A piece of text with a style of Rich."""

    __slots__ = ("style",)
    style: str

    def __new__(cls, text: str, style: str = "") -> Words:  # noqa: D102
        words = super().__new__(cls, text)
        words.style = style
        return words


def good(text: str = "ok") -> Words:
    """Return `text` in the style of a good result."""
    return Words(text, GOOD)


def bad(text: str) -> Words:
    """Return `text` in the style of a fault."""
    return Words(text, BAD)


def doubtful(text: str) -> Words:
    """Return `text` in the style of a result that deserves a look."""
    return Words(text, DOUBTFUL)


def quiet(text: str) -> Words:
    """Return `text` in the style of a remark."""
    return Words(text, QUIET)


def rich_text(text: str, style: str = "") -> Text:
    """Return `text` for Rich, safe for a terminal, in its own style or in `style`."""
    from rich.text import Text

    return Text(printable(text), style=style or _style(text))


class Printer:
    """Prints headings, lines and tables on `stream` (None: the standard output)."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._console: Any = None
        if self._stream is not None and self._stream.isatty():
            from rich.console import Console

            self._console = Console(file=self._stream, highlight=False, emoji=False, markup=False)

    def heading(self, text: str, remark: str = "") -> None:
        """Print the title of a section, and a remark under the title."""
        if self._console is not None:
            self._console.print()
            self._console.print(rich_text(text, "bold"))
            if remark:
                self._console.print(rich_text(remark, QUIET))
        else:
            write_line("", self._stream)
            write_line(text, self._stream)
            if remark:
                write_line(remark, self._stream)

    def line(self, *pieces: str) -> None:
        """Print one line (or paragraph) of text."""
        if self._console is not None:
            from rich.padding import Padding
            from rich.text import Text

            text = Text.assemble(*map(rich_text, pieces))
            indent = len(text.plain) - len(text.plain.lstrip())
            self._console.print(Padding(text[indent:], (0, 0, 0, indent), expand=False))
        else:
            write_line("".join(pieces), self._stream)

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print `rows` under the names of `columns`. A header of empty names is left out."""
        if self._console is not None:
            self._rich_table(columns, rows)
            return
        cells = [[printable(cell) for cell in row] for row in ([columns, *rows] if any(columns) else rows)]
        for line in aligned(cells):
            write_line(f"  {line}".rstrip(), self._stream)

    def _rich_table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        from rich import box
        from rich.table import Table

        table = Table(
            box=box.SIMPLE_HEAD if any(columns) else None,
            show_header=any(columns),
            header_style="bold",
            pad_edge=False,
            padding=(0, 1, 0, 0) if any(columns) else (0, 2, 0, 0),
        )
        for index, name in enumerate(columns):
            # a row is found by its first cell, so that is not folded; Rich loses text beside a min_width
            short = index == 0 and max((len(row[0]) for row in rows), default=0) <= 24
            table.add_column(rich_text(name), overflow="fold", no_wrap=short)
        for row in rows:
            table.add_row(*map(rich_text, row))
        self._console.print(table)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return a line for each row, its cells under one another. The cells have to be printable."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    ]


def write_line(text: str, stream: TextIO | None = None) -> None:
    """Write one line to `stream`, by default to the standard output; nowhere if that is closed."""
    stream = sys.stdout if stream is None else stream
    if stream is not None:
        stream.write(f"{printable(text)}\n")


def print_json(report: object, *, stream: TextIO | None = None, one_line: bool = False) -> None:
    """Print `report` as JSON, for machines: ASCII, every other character as ``\\uNNNN``."""
    stream = sys.stdout if stream is None else stream
    if stream is not None:
        text = json.dumps(report, indent=None if one_line else 2)
        stream.write(text.replace("\x7f", "\\u007f") + "\n")


def log_to_stderr(level: str) -> None:
    """Write records of natcompat's loggers from `level` on ("debug", "info", ...) to the standard error."""
    import logging

    class _Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if sys.stderr is not None:  # looked up each time: Rich replaces it while it draws
                for line in self.format(record).splitlines():
                    write_line(line, sys.stderr)

    handler = _Handler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger = get_logger()
    logger.addHandler(handler)
    logger.setLevel(level.upper())
    logger.propagate = False


def flush() -> None:
    """Hand what was written to the reader of the standard output."""
    if sys.stdout is not None:
        sys.stdout.flush()


def complain(text: str) -> None:
    """Write an error or a warning, one sentence or more, to the standard error."""
    if sys.stderr is not None:
        write_line(f"natcompat: {text.rstrip('.')}.", sys.stderr)
        sys.stderr.flush()


def _style(text: str) -> str:
    return text.style if isinstance(text, Words) else ""
