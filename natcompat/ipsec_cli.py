"""What is installed in the kernel, for people and for programs: ``sad``, ``spd``, ``events``, ``top``.

On a terminal they draw tables, in a pipe they write plain lines, with ``--json`` JSON. Later versions of
natcompat may add keys to these. Times are seconds since the epoch, null where there was none.

``sad --json``
    an array of SAs. Always: ``spi`` (0x and eight digits), ``source``, ``destination``, ``state``
    (mature, or larval: only an SPI so far), ``description`` (protocol and algorithms in the kernel's words),
    ``packets``, ``octets``, ``added``, ``first_used``, ``last_used``, ``sequence`` (of the last packet sent,
    or the highest received), ``replay_drops``, ``window_drops``, ``integrity_drops`` (these four are null
    where the kernel does not say), ``mark`` (0xVALUE/0xMASK or null). Of what natcompat has words for, too:
    ``direction`` (in, out), ``mode`` (tunnel, transport), ``encryption`` and ``integrity`` (names of
    natcompat.ipsec.Encr and Integ), ``encryption_bits``, ``esn``, ``replay_window``, ``local_port`` and
    ``remote_port`` (null: not in UDP), ``reqid``, ``nat_keepalive`` (seconds), ``interface_id``,
    ``selectors``, ``lifetime`` (the limits there are, by the names of natcompat.ipsec.Lifetime). With
    ``--show-keys``: ``encryption_key`` and ``integrity_key`` in hexadecimal digits, a salt at their end
``spd --json``
    an array of policies: ``direction``, ``selector``, ``action`` (protect, bypass, discard), ``mode``,
    ``source`` and ``destination`` (of the tunnel, or null), ``reqid``, ``priority``, ``optional``,
    ``mark``, ``interface_id``, ``added``, ``last_used``
``events --json``
    one object a line: ``time``, ``event``, and for ``acquire``: ``source``, ``destination``, ``reqid``,
    ``selector``, ``sequence``; for ``soft expire`` and ``hard expire``: ``spi``, ``destination``,
    ``reqid``; for ``mapping change``: these, ``old`` and ``new`` ("ADDRESS port NUMBER"); for
    ``events lost`` nothing more
``top --json``
    one array a line, the busiest SA first, with the columns of the table as keys: ``SPI``, ``way``,
    ``source``, ``destination``, ``UDP``, ``mode``, ``transform``, ``reqid``, ``packets``, ``bytes``,
    ``drops``, ``age``, ``packets/s``, ``bytes/s``
"""

from __future__ import annotations

import json
import os
import select
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import click

from natcompat.errors import NatCompatError

if TYPE_CHECKING:
    from natcompat.ipsec import Event, InstalledSA, IPsec, Policy, PolicyUsage, TrafficSelector

Row: TypeAlias = dict[str, Any]
"""One object of the JSON output: names to strings, numbers, booleans, None and lists."""

_Command = TypeVar("_Command", bound=Callable[..., Any])
as_json: Callable[[_Command], _Command] = click.option(
    "--json", "json_output", is_flag=True, help="Print JSON; natcompat/ipsec_cli.py documents its keys."
)


def open_ipsec() -> IPsec:
    """Open the IPsec of this machine's kernel: XFRM, or PF_KEY where that is what there is."""
    from natcompat import pfkey
    from natcompat.backends.linux import LinuxBackend
    from natcompat.pfkey.examine import dialect_here

    dialect = dialect_here()
    if dialect is None:
        raise click.ClickException(f"natcompat knows no IPsec databases of {sys.platform}")
    return LinuxBackend().open_ipsec() if dialect.name == "linux" else pfkey.open_ipsec(dialect.name)


@contextmanager
def opened() -> Iterator[IPsec]:
    """Open IPsec; say what goes wrong in one sentence and end with status 1."""
    try:
        ipsec = open_ipsec()
        try:
            yield ipsec
        finally:
            ipsec.close()
    except NatCompatError as error:
        raise click.ClickException(f"{error.strerror}. {error.remedy}") from None


def describe_selector(selector: TrafficSelector) -> str:
    """Return a selector in one line."""
    names = {0: "any", 1: "icmp", 6: "tcp", 17: "udp", 58: "ipv6-icmp", 132: "sctp"}
    ends = []
    for network, port in (
        (selector.source, selector.source_port),
        (selector.destination, selector.destination_port),
    ):
        text = str(network.network_address) if network.prefixlen == network.max_prefixlen else str(network)
        ends.append(f"{text} port {port}" if port else text)
    protocol = "" if selector.protocol == 0 else f" {names.get(selector.protocol, selector.protocol)}"
    return " to ".join(ends) + protocol


def describe_sa(installed: InstalledSA, *, show_keys: bool = False) -> Row:
    """Return an SA as a JSON object; its keys (hexadecimal) only with `show_keys`."""
    sa, usage = installed.association, installed.usage
    row: Row = {
        "spi": f"0x{installed.sa_id.spi:08x}",
        "source": str(installed.sa_id.source),
        "destination": str(installed.sa_id.destination),
        "state": "larval" if installed.larval else "mature",
        "description": installed.description,
        "packets": usage.packets,
        "octets": usage.octets,
        "added": usage.added,
        "first_used": usage.first_used,
        "last_used": usage.last_used,
        "sequence": usage.sequence,
        "replay_drops": usage.replay_drops,
        "window_drops": usage.window_drops,
        "integrity_drops": usage.integrity_drops,
        "mark": _describe_mark(installed.sa_id.mark),
    }
    if sa is not None:
        udp = sa.encapsulation
        row |= {
            "direction": sa.direction.value,
            "mode": sa.mode.value,
            "encryption": sa.encryption.name,
            "encryption_bits": 8 * (len(sa.encryption_key) - sa.encryption.salt_length),
            "integrity": sa.integrity.name,
            "esn": sa.esn,
            "replay_window": sa.replay_window,
            "local_port": udp.local_port if udp else None,
            "remote_port": udp.remote_port if udp else None,
            "reqid": sa.reqid,
            "nat_keepalive": sa.nat_keepalive,
            "interface_id": sa.interface_id,
            "selectors": [describe_selector(selector) for selector in sa.selectors],
            "lifetime": {
                name: getattr(sa.lifetime, name)
                for name in sa.lifetime.__slots__
                if getattr(sa.lifetime, name) is not None
            },
        }
        if show_keys:
            row |= {
                "encryption_key": bytes(sa.encryption_key).hex(),
                "integrity_key": bytes(sa.integrity_key).hex(),
            }
    return row


def describe_policy(usage: PolicyUsage) -> Row:
    """Return a policy as a JSON object."""
    policy: Policy = usage.policy
    return {
        "direction": policy.direction.value,
        "selector": describe_selector(policy.selector),
        "action": policy.action.value,
        "mode": policy.mode.value,
        "source": None if policy.source is None else str(policy.source),
        "destination": None if policy.destination is None else str(policy.destination),
        "reqid": policy.reqid,
        "priority": policy.priority,
        "optional": policy.optional,
        "mark": _describe_mark(policy.mark),
        "interface_id": policy.interface_id,
        "added": usage.added,
        "last_used": usage.last_used,
    }


def describe_event(event: Event) -> Row:
    """Return an event as a JSON object; ``event`` says which."""
    from natcompat.ipsec import Acquire, Expire, MappingChange

    if isinstance(event, Acquire):
        return {
            "event": "acquire",
            "source": str(event.source),
            "destination": str(event.destination),
            "reqid": event.reqid,
            "selector": describe_selector(event.selector),
            "sequence": event.sequence,
        }
    if isinstance(event, Expire):
        return {
            "event": "hard expire" if event.hard else "soft expire",
            "spi": f"0x{event.sa_id.spi:08x}",
            "destination": str(event.sa_id.destination),
            "reqid": event.reqid,
        }
    if isinstance(event, MappingChange):
        return {
            "event": "mapping change",
            "spi": f"0x{event.sa_id.spi:08x}",
            "destination": str(event.sa_id.destination),
            "reqid": event.reqid,
            "old": f"{event.old_address} port {event.old_port}",
            "new": f"{event.new_address} port {event.new_port}",
        }
    return {"event": "events lost"}


def _describe_mark(mark: Any) -> str | None:
    return None if mark is None else f"0x{mark.value:x}/0x{mark.mask:x}"


def sa_columns(row: Row) -> Row:
    """Choose and shorten what a line about an SA says."""
    transform = row["description"]
    if "encryption" in row:
        transform = f"{row['encryption']} {row['encryption_bits'] or ''}".rstrip()
        if row["integrity"] != "NONE":
            transform += f" {row['integrity']}"
    ports = f"{row['local_port']}-{row['remote_port']}" if row.get("local_port") else ""
    counted = [row["replay_drops"], row["window_drops"], row["integrity_drops"]]
    drops = "" if None in counted else sum(counted)
    return {
        "SPI": row["spi"],
        "way": row.get("direction", row["state"]),
        "source": row["source"],
        "destination": row["destination"],
        "UDP": ports,
        "mode": row.get("mode", ""),
        "transform": transform,
        "reqid": row.get("reqid", ""),
        "packets": row["packets"],
        "bytes": row["octets"],
        "drops": drops,
        "age": _duration(row["added"]),
        **{name: row[name] for name in ("encryption_key", "integrity_key") if row.get(name)},
    }


def policy_columns(row: Row) -> Row:
    """Choose and shorten what a line about a policy says."""
    tunnel = f"{row['source']} to {row['destination']}" if row["source"] else ""
    return {
        "way": row["direction"],
        "selector": row["selector"],
        "action": row["action"] + (" if possible" if row["optional"] else ""),
        "mode": row["mode"] if row["action"] == "protect" else "",
        "tunnel": tunnel,
        "reqid": row["reqid"],
        "priority": row["priority"],
        "mark": row["mark"] or "",
        "last used": _duration(row["last_used"]) if row["last_used"] else "never",
    }


def _duration(since: float) -> str:
    seconds = max(0, int(time.time() - since))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


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


def table(title: str, lines: list[Row]) -> Any:
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


def _sa_rows(ipsec: IPsec, *, show_keys: bool = False) -> list[Row]:
    rows = [describe_sa(installed, show_keys=show_keys) for installed in ipsec.list_sas()]
    return sorted(rows, key=lambda row: (row["source"], row["destination"], row["spi"]))


@click.command(short_help="List the security associations of the kernel.")
@as_json
@click.option("--show-keys", is_flag=True, help="Show keys, too; for root only.")
def sad(json_output: bool, show_keys: bool) -> None:
    """List the security associations of the kernel.

    Every SA of this network namespace, whoever installed it: its SPI and direction, outer addresses,
    UDP ports (local-remote) where ESP goes in UDP, transforms, what it has carried and what it has
    dropped (replays, wrong integrity check values). A larval SA is an SPI that is reserved, or
    traffic that waits for IKE. Where the kernel does not know the direction of an SA, it is told
    from the addresses of this host.

    Takes root or CAP_NET_ADMIN, changes nothing. Keys are never shown, except to root with
    --show-keys: whoever has them reads the traffic.

    \b
    Exit status:
      0    the SAs were listed, be there any or not
      1    this process may not ask (it takes root or CAP_NET_ADMIN), or the kernel
           has no IPsec; the last line says which, and what would help
      2    the command line is wrong

    \b
    Examples:
      natcompat sad
      natcompat sad --json | jq '.[] | select(.integrity_drops > 0)'
      ip netns exec gateway natcompat sad
    """
    if show_keys and os.geteuid() != 0:
        raise click.ClickException("--show-keys is for root only. Run it with sudo, or leave it out")
    with opened() as ipsec:
        show(
            "Security associations",
            _sa_rows(ipsec, show_keys=show_keys),
            sa_columns,
            json_output=json_output,
        )


@click.command(short_help="List the policies of the kernel.")
@as_json
def spd(json_output: bool) -> None:
    """List the policies of the kernel.

    Every inbound and outbound policy of this network namespace, whoever installed it: which packets
    it is for, what happens to them (protect, bypass, discard), the ends of its tunnel, the reqid
    that its SAs have, and when a packet last met it. A smaller priority is looked at first.
    Those for forwarding come with the inbound ones and are not listed again, nor are those that
    single sockets have, such as the exemption of endpoints with the option.

    Takes root or CAP_NET_ADMIN, changes nothing.

    \b
    Exit status:
      0    the policies were listed, be there any or not
      1    this process may not ask (it takes root or CAP_NET_ADMIN), or the kernel
           has no IPsec; the last line says which, and what would help
      2    the command line is wrong

    \b
    Examples:
      natcompat spd
      natcompat spd --json | jq '.[] | select(.last_used == null)'
    """
    with opened() as ipsec:
        rows = [describe_policy(usage) for usage in ipsec.list_policies()]
        rows.sort(key=lambda row: (row["direction"], row["priority"]))
        show("Policies", rows, policy_columns, json_output=json_output)


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
                    click.echo(json.dumps({"time": time.time(), **row}))
                else:
                    stamp = time.strftime("%H:%M:%S")
                    details = "  ".join(f"{name} {text}" for name, text in row.items() if name != "event")
                    click.echo(f"{stamp}  {row['event']}  {details}".rstrip())
                seen += 1
                if seen == count:
                    return


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
                click.echo(json.dumps(lines))
        elif sys.stdout.isatty():
            from rich.live import Live

            with Live(screen=count is None, auto_refresh=False) as live:
                for lines in rounds:
                    live.update(table("Busiest security associations", lines), refresh=True)
        else:
            for lines in rounds:
                click.echo(plain(lines))


def _rounds(ipsec: IPsec, interval: float, count: int | None) -> Iterator[list[Row]]:
    """Return, every `interval` seconds, the SAs with their rates, the busiest first."""
    before: dict[tuple[str, str], Row] = {}
    moment = time.monotonic()
    finished = 0
    while count is None or finished < count:
        if finished:
            time.sleep(interval)
        now = time.monotonic()
        lines = []
        current = {}
        for row in _sa_rows(ipsec):
            name = (row["spi"], row["destination"])
            current[name] = row
            old = before.get(name, row)
            passed = max(now - moment, 1e-9)
            line = sa_columns(row)
            line["packets/s"] = round((row["packets"] - old["packets"]) / passed)
            line["bytes/s"] = round((row["octets"] - old["octets"]) / passed)
            lines.append(line)
        before, moment = current, now
        finished += 1
        yield sorted(lines, key=lambda line: (-line["bytes/s"], -line["bytes"]))


COMMANDS: tuple[click.Command, ...] = (sad, spd, events, top)
"""To be added to a click group."""
