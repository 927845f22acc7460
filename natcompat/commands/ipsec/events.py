"""The command ``events``: what happens to the kernel's SAs, as it happens."""

from __future__ import annotations

import select
import time

import click

from natcompat.commands.ipsec.common import as_json, opened
from natcompat.commands.ipsec.describe import describe_event
from natcompat.commands.ipsec.lines import event_line
from natcompat.commands.report import flush, print_json, write_line


@click.command(short_help="Report acquires, expiries and mapping changes as they happen.")
@as_json
@click.option("--count", type=click.IntRange(1), help="End after so many events.")
@click.option("--timeout", type=click.FloatRange(0), help="End after so many seconds.")
def events(json_output: bool, count: int | None, timeout: float | None) -> None:
    """Report acquires, expiries and mapping changes as they happen, until interrupted.

    \b
    acquire         traffic met a policy that has no SA: IKE should negotiate one
    soft expire     an SA should be replaced
    hard expire     an SA is gone
    mapping change  packets of an SA come from another address or port, since the
                    mapping of a NAT changed
    events lost     the kernel had more than the queue took; what is still due follows

    Those of this network namespace, one a line, each written at once. Takes root or CAP_NET_ADMIN,
    changes nothing, and takes no event away from an IKE daemon.

    \b
    Exit status:
      0    --count or --timeout was reached
      1    this process may not ask (it takes root or CAP_NET_ADMIN), or the kernel
           has no IPsec; the last line says which, and what would help
      2    the command line is wrong
      130  interrupted by Ctrl-C

    \b
    Examples:
      natcompat events
      natcompat events --json --timeout 60 | jq 'select(.event == "mapping change")'
    """
    deadline = None if timeout is None else time.monotonic() + timeout
    with opened() as ipsec, ipsec.events() as source:
        seen = 0
        while True:
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return
            if not select.select([source], [], [], left)[0]:
                continue
            for event in source.read():
                row = describe_event(event)
                if json_output:
                    print_json({"time": time.time(), **row}, one_line=True)
                else:
                    write_line(event_line(row))
                flush()
                seen += 1
                if seen == count:
                    return
