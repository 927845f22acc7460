"""The command ``top``: SAs with their rates, round by round."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from natcompat.commands.ipsec.common import as_json
from natcompat.commands.ipsec.lines import Rates
from natcompat.commands.ipsec.sources import Sources
from natcompat.commands.report import flush, print_json, write_line
from natcompat.commands.tables import live, table, write_plain
from natcompat.ipsec.describe import Row

if TYPE_CHECKING:
    pass


@click.command(short_help="Show the busiest security associations, live.")
@as_json
@click.option("--interval", type=click.FloatRange(0.1), default=1.0, show_default=True, help="Seconds.")
@click.option("--count", type=click.IntRange(1), help="End after so many rounds (the first has no rates).")
def top(json_output: bool, interval: float, count: int | None) -> None:
    """Show the busiest security associations, live.

    The columns of natcompat sad, and packets and bytes a second since the last round; in a pipe a
    table each round, with --json an array a line. Ctrl-C ends it.

    The kernel's SAs take root or CAP_NET_ADMIN. Those of user-space IPsec are shown to its user and
    to root, unless its program runs with NATCOMPAT_CONTROL=none. Nothing is changed.

    \b
    Exit status:
      0    --count was reached
      1    no user-space IPsec runs, and this process may not ask the kernel (root or
           CAP_NET_ADMIN), or the kernel has no IPsec; the last line says which, and
           what would help
      2    the command line is wrong
      130  interrupted by Ctrl-C

    \b
    Examples:
      natcompat top
      natcompat top --interval 10 --count 7 > minute.txt
    """
    with Sources() as sources:
        rounds = _rounds(sources, interval, count)
        if json_output:
            for lines in rounds:
                print_json(lines, one_line=True)
                flush()
        elif sys.stdout.isatty():
            with live(screen=count is None) as draw:
                for lines in rounds:
                    draw(table("Busiest security associations", lines))
        else:
            for lines in rounds:
                write_plain(lines)
                write_line("")
                flush()


def _rounds(sources: Sources, interval: float, count: int | None) -> Iterator[list[Row]]:
    """Yield, every `interval` seconds, the SAs with their rates, the busiest first."""
    rates = Rates(lambda row: (row["pid"], row["spi"], row["destination"]))
    for number in itertools.count() if count is None else range(count):
        if number:
            time.sleep(interval)
        lines = rates.lines(sources.sas())
        yield sorted(lines, key=lambda line: (-line["bytes/s"], -line["bytes"]))
