"""The command ``events``: what happens to the kernel's SAs, as it happens."""

from __future__ import annotations

import click

from natcompat.commands.ipsec.common import as_json
from natcompat.commands.ipsec.lines import event_line
from natcompat.commands.ipsec.sources import Sources
from natcompat.commands.report import flush, print_json, write_line


@click.command(short_help="Report acquires, expiries, mapping changes and failures as they happen.")
@as_json
@click.option("--count", type=click.IntRange(1), help="End after so many events.")
@click.option("--timeout", type=click.FloatRange(0), help="End after so many seconds.")
def events(json_output: bool, count: int | None, timeout: float | None) -> None:
    """Report acquires, expiries, mapping changes and failures as they happen, until interrupted.

    \b
    acquire             traffic matched a policy without an SA: IKE should negotiate one
    soft expire         an SA should be replaced
    hard expire         an SA has ended
    mapping change      packets of an SA come from another address or port, since the
                        mapping of a NAT changed
    integrity failure   the first of a series of packets with a wrong check value
    peer silent         this end sends, and nothing authentic comes back
    protection restored rules, routes or the device of policies were taken away by
                        another program, and put back
    events lost         the queue was too short; what is still due follows

    Those of the kernel and of user-space IPsec in this network namespace, one a line, each written at
    once. The kernel's take root or CAP_NET_ADMIN; those of user-space IPsec are shown to its user and
    to root, unless its program runs with NATCOMPAT_CONTROL=none. Nothing is changed, and no event is
    taken away from an IKE daemon.

    \b
    Exit status:
      0    --count or --timeout was reached
      1    no user-space IPsec runs, and this process may not ask the kernel (root or
           CAP_NET_ADMIN), or the kernel has no IPsec; the last line says which, and
           what would help
      2    the command line is wrong
      130  interrupted by Ctrl-C

    \b
    Examples:
      natcompat events
      natcompat events --json --timeout 60 | jq 'select(.event == "mapping change")'
    """
    with Sources() as sources:
        for seen, row in enumerate(sources.events(timeout), 1):
            if json_output:
                print_json(row, one_line=True)
            else:
                write_line(event_line(row))
            flush()
            if seen == count:
                return
