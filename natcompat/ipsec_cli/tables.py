"""Lines as a table: JSON, aligned plain text in a pipe, or drawn on a terminal."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

import click

from natcompat.ipsec_cli.describe import Row

if TYPE_CHECKING:
    from rich.console import RenderableType


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
    names = list(dict.fromkeys(name for line in lines for name in line))
    cells = [names, *([str(line.get(name, "")) or "-" for name in names] for line in lines)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(names))]
    return "".join(
        "  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip() + "\n"
        for row in cells
    )


def table(title: str, lines: list[Row]) -> RenderableType:
    """Return `lines` as something that Rich prints."""
    from rich.table import Table
    from rich.text import Text

    if not lines:
        return Text(f"{title}: none in this network namespace")
    names = list(dict.fromkeys(name for line in lines for name in line))
    needed = sum(max(len(str(line.get(name, ""))) for line in [{name: name}, *lines]) + 3 for name in names)
    stacked = needed >= shutil.get_terminal_size().columns  # two values in a cell, one above the other
    table = Table(
        title=f"{title}: {len(lines)}",
        title_justify="left",
        header_style="bold",
        show_lines=stacked,
        padding=0 if stacked else (0, 1),
    )
    groups = (
        [names[start : start + 2] for start in range(0, len(names), 2)] if stacked else [[n] for n in names]
    )
    for group in groups:
        right = set(group) <= {"packets", "bytes", "drops", "reqid", "priority", "packets/s", "bytes/s"}
        table.add_column("\n".join(group), justify="right" if right else "left", overflow="fold")
    for line in lines:
        table.add_row(*(Text("\n".join(str(line.get(name, "")) for name in group)) for group in groups))
    return table
