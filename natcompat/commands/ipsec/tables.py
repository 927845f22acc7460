"""Lines as a table: JSON, aligned plain text in a pipe, or drawn as the width of the terminal allows."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from natcompat.commands.ipsec.describe import Row

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.text import Text

_NUMBERS = frozenset({"packets", "bytes", "drops", "reqid", "priority", "packets/s", "bytes/s"})


def show(title: str, rows: list[Row], columns: Callable[[Row], Row], *, json_output: bool) -> None:
    """Write `rows`: as JSON, as a table on a terminal, or as aligned plain lines."""
    if json_output:
        click.echo(json.dumps(rows, indent=2))
        return
    lines = [columns(row) for row in rows]
    if sys.stdout.isatty():
        from rich.console import Console

        Console().print(table(title, lines))
        return
    click.echo(plain(lines), nl=False)


def plain(lines: list[Row]) -> str:
    """Return `lines` as aligned text, under the names of their columns."""
    if not lines:
        return ""
    names = _names(lines)
    cells = [names, *([_text(line, name) or "-" for name in names] for line in lines)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(names))]
    return "".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() + "\n"
        for row in cells
    )


def table(title: str, lines: list[Row]) -> RenderableType:
    """Return `lines` as something that Rich prints.

    One value beside the other; else two in a cell, one above the other, where words may wrap but do not
    break; else, on a terminal that is too narrow for that, too, a value a line.
    """
    from rich.table import Table
    from rich.text import Text

    if not lines:
        return Text(f"{title}: none in this network namespace")
    title = f"{title}: {len(lines)}"
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
        title=title,
        title_justify="left",
        header_style="bold",
        show_lines=stacked,
        padding=0 if stacked else (0, 1),
    )
    for group, width in zip(groups, widths, strict=True):
        right = _NUMBERS.issuperset(group)
        table.add_column("\n".join(group), justify="right" if right else "left", width=width)
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


def _listed(title: str, lines: list[Row], room: int) -> Text:
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
                listed.append(f"\n{name}", style="not italic bold")
                listed.append(gap + value, style="not italic")
    return listed


def _names(lines: list[Row]) -> list[str]:
    return list(dict.fromkeys(name for line in lines for name in line))


def _text(line: Row, name: str) -> str:
    return str(line.get(name, ""))


def _texts(lines: list[Row], names: list[str]) -> list[str]:
    return [*names, *(_text(line, name) for line in lines for name in names)]
