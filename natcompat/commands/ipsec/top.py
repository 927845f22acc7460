"""The command ``top``: the kernel's SAs with their rates, round by round."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from natcompat.commands.ipsec.common import as_json, opened
from natcompat.commands.ipsec.describe import describe_sas
from natcompat.commands.ipsec.lines import Rates
from natcompat.commands.report import flush, print_json, write_line
from natcompat.commands.tables import Row, live, table, write_plain

if TYPE_CHECKING:
    from natcompat.ipsec import IPsec


@click.command(short_help="Show the busiest security associations, live.")
@as_json
@click.option("--interval", type=click.FloatRange(0.1), default=1.0, show_default=True, help="Seconds.")
@click.option("--count", type=click.IntRange(1), help="End after so many rounds (the first has no rates).")
def top(json_output: bool, interval: float, count: int | None) -> None:
    """Show the busiest security associations, live.

    The columns of natcompat sad, and packets and bytes a second since the last round; in a pipe a
    table each round, with --json an array a line. Ctrl-C ends it.

    Takes root or CAP_NET_ADMIN, changes nothing.

    \b
    Exit status:
      0    --count was reached
      1    this process may not ask (it takes root or CAP_NET_ADMIN), or the kernel
           has no IPsec; the last line says which, and what would help
      2    the command line is wrong
      130  interrupted by Ctrl-C

    \b
    Examples:
      natcompat top
      natcompat top --interval 10 --count 7 > minute.txt
    """
    with opened() as ipsec:
        rounds = _rounds(ipsec, interval, count)
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


def _rounds(ipsec: IPsec, interval: float, count: int | None) -> Iterator[list[Row]]:
    """Return, every `interval` seconds, the SAs with their rates, the busiest first."""
    rates = Rates(lambda row: (row["spi"], row["destination"]))
    for number in itertools.count() if count is None else range(count):
        if number:
            time.sleep(interval)
        lines = rates.lines(describe_sas(ipsec.list_sas()))
        yield sorted(lines, key=lambda line: (-line["bytes/s"], -line["bytes"]))
