"""Rows as a table: JSON, aligned plain text in a pipe, or drawn as the width of the terminal allows."""

from __future__ import annotations

import contextlib
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from natcompat.commands.report import aligned, print_json, rich_text, write_line
from natcompat.errors import printable
from natcompat.ipsec.describe import Row

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text


_NUMBERS = frozenset({"packets", "bytes", "drops", "reqid", "priority", "packets/s", "bytes/s"})


def show(title: str, rows: list[Row], columns: Callable[[Row], Row], *, json_output: bool) -> None:
    """Write `rows` to the standard output: as JSON, as a table on a terminal, or as aligned plain lines."""
    if json_output:
        print_json(rows)
        return
    lines = [columns(row) for row in rows]
    if sys.stdout is not None and sys.stdout.isatty():
        from rich.console import Console

        Console(highlight=False, emoji=False, markup=False).print(table(title, lines))
        return
    write_plain(lines)


def write_plain(lines: Sequence[Row], stream: TextIO | None = None) -> None:
    """Write `lines` as aligned text under the names of their columns; nothing where there are none."""
    if lines:
        names = _names(lines)
        for text in aligned(
            [[*map(printable, names)], *([_text(line, name) or "-" for name in names] for line in lines)]
        ):
            write_line(text, stream)


@contextlib.contextmanager
def live(stream: TextIO | None = None, *, screen: bool = False) -> Iterator[Callable[..., None]]:
    """Return a function that draws its arguments in the place of those before.

    Arguments are what `table` returns, and texts. `screen`: on a screen of their own.
    """
    from rich.console import Console, Group
    from rich.live import Live

    console = Console(file=stream, highlight=False, emoji=False, markup=False)
    with Live(console=console, screen=screen, auto_refresh=False) as drawing:
        yield lambda *parts: drawing.update(
            Group(*(rich_text(part) if isinstance(part, str) else part for part in parts)), refresh=True
        )


def table(title: str, lines: Sequence[Row]) -> RenderableType:
    """Return `lines` as something that Rich prints.

    One value beside the other; else two in a cell, one above the other, where words may wrap but do not
    break; else, on a terminal that is too narrow for that, too, a value a line.
    """
    from rich.table import Table
    from rich.text import Text

    if not lines:
        return rich_text(f"{title}: none in this network namespace")
    title = printable(f"{title}: {len(lines)}")
    room = shutil.get_terminal_size().columns
    names = _names(lines)
    groups = [[name] for name in names]
    widths = [max(map(len, _texts(lines, group))) for group in groups]
    stacked = sum(widths) + 3 * len(widths) >= room
    if stacked:
        groups = [names[start : start + 2] for start in range(0, len(names), 2)]
        widths = _fit([_texts(lines, group) for group in groups], room)
        if not widths:
            return _listed(title, lines, room)
    table = Table(
        title=Text(title),
        title_style="italic",
        title_justify="left",
        header_style="bold",
        show_lines=stacked,
        padding=0 if stacked else (0, 1),
    )
    for group, width in zip(groups, widths, strict=True):
        right = _NUMBERS.issuperset(group)
        table.add_column(
            Text("\n".join(map(printable, group))), justify="right" if right else "left", width=width
        )
    for line in lines:
        table.add_row(*(Text("\n".join(_text(line, name) for name in group)) for group in groups))
    return table


def _fit(columns: list[list[str]], room: int) -> list[int]:
    """Return widths of columns in which no word breaks; none if they do not fit."""
    widths = [max(len(word) for text in texts for word in text.split()) for texts in columns]
    spare = room - 1 - sum(widths) - len(widths)  # a line before each, and behind the last
    if spare < 0:
        return []
    for number, texts in enumerate(columns):
        more = min(max(map(len, texts)) - widths[number], spare)
        widths[number] += more
        spare -= more
    return widths


def _listed(title: str, lines: Sequence[Row], room: int) -> Text:
    """Return a value a line, under its name where there is no room beside it."""
    from rich.text import Text

    listed = Text(title, style="italic", overflow="fold")
    margin = max(map(len, _names(lines))) + 2
    for line in lines:
        listed.append("\n")
        for name in line:
            value = _text(line, name)
            if value:
                gap = name.ljust(margin)[len(name) :] if margin + len(value) <= room else "\n"
                listed.append(f"\n{printable(name)}", style="not italic bold")
                listed.append(gap + value, style="not italic")
    return listed


def _names(lines: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line))


def _text(line: Row, name: str) -> str:
    return printable(line.get(name, ""))


def _texts(lines: Sequence[Row], names: list[str]) -> list[str]:
    return [*map(printable, names), *(_text(line, name) for line in lines for name in names)]
