"""Output of the commands: Rich on a terminal, aligned plain text in a pipe, the same words in both."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from typing import Any, TextIO

GOOD, BAD, DOUBTFUL, QUIET = "green", "bold red", "yellow", "dim"
"""What a word says, as styles of Rich. Nothing is said by colour alone."""


class Words(str):
    """A piece of text with a style."""

    __slots__ = ("style",)
    style: str

    def __new__(cls, text: str, style: str = "") -> Words:  # noqa: D102
        words = super().__new__(cls, text)
        words.style = style
        return words


def good(text: str = "ok") -> Words:
    """Return `text` as something that is well."""
    return Words(text, GOOD)


def bad(text: str) -> Words:
    """Return `text` as something that is wrong."""
    return Words(text, BAD)


def doubtful(text: str) -> Words:
    """Return `text` as something to look at."""
    return Words(text, DOUBTFUL)


def quiet(text: str) -> Words:
    """Return `text` as something that matters less."""
    return Words(text, QUIET)


class Printer:
    """Prints headings, lines and tables on `stream`."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream if stream is not None else sys.stdout
        self._console: Any = None
        if self._stream is not None and self._stream.isatty():
            from rich.console import Console

            self._console = Console(file=self._stream, highlight=False, emoji=False)

    def heading(self, text: str, remark: str = "") -> None:
        """Print the title of what follows, and a remark under it."""
        if self._console is not None:
            from rich.text import Text

            self._console.print()
            self._console.print(Text(text, style="bold"))
            if remark:
                self._console.print(Text(remark, style=QUIET))
        else:
            self._write(f"\n{text}")
            if remark:
                self._write(remark)

    def line(self, *pieces: str) -> None:
        """Print one line (or paragraph) of text."""
        if self._console is not None:
            from rich.padding import Padding
            from rich.text import Text

            text = Text.assemble(*[(str(each), _style(each)) for each in pieces])
            indent = len(text.plain) - len(text.plain.lstrip())
            self._console.print(Padding(text[indent:], (0, 0, 0, indent), expand=False))
        else:
            self._write("".join(pieces))

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print `rows` under the names of `columns`; names that are all empty are left out."""
        if self._console is not None:
            self._rich_table(columns, rows)
            return
        lines = [[*map(str, columns)], *rows] if any(columns) else [*rows]
        widths = [max(len(line[index]) for line in lines) for index in range(len(columns))] if lines else []
        for line in lines:
            cells = (cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            self._write(("  " + "  ".join(cells)).rstrip())

    def _rich_table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        from rich import box
        from rich.table import Table
        from rich.text import Text

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
            table.add_column(name, overflow="fold", no_wrap=short)
        for row in rows:
            table.add_row(*[Text(cell, style=_style(cell)) for cell in row])
        self._console.print(table)

    def _write(self, text: str) -> None:
        if self._stream is not None:
            self._stream.write(f"{text}\n")


def print_json(report: object) -> None:
    """Print `report` as JSON, for machines."""
    if sys.stdout is not None:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")


def _style(text: str) -> str:
    return text.style if isinstance(text, Words) else ""
