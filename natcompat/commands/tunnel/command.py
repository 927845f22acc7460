"""The command line of ``natcompat tunnel``."""

from __future__ import annotations

import contextlib
import os
import sys
from importlib import resources
from pathlib import Path

import click

from natcompat.commands.report import log_to_stderr, write_line


def _example(context: click.Context, _: click.Parameter, asked_for: bool) -> None:
    if asked_for and not context.resilient_parsing:
        for line in (resources.files("natcompat") / "data" / "tunnel.toml").read_text("utf-8").splitlines():
            write_line(line)
        context.exit()


@click.command("tunnel", short_help="Run a tunnel with manual keys: ESP in UDP, described in a file.")
@click.argument("file", metavar="FILE.toml | status", type=click.Path(path_type=Path))
@click.option("--check", is_flag=True, help="Check the file and its keys, say what it asks for, do nothing.")
@click.option("--create-state", is_flag=True, help="Make the state file, and run: for keys never used.")
@click.option(
    "--backend", type=click.Choice(["userspace", "linux"]), help="In place of the one that the file names."
)
@click.option("--interval", type=click.FloatRange(0.1), default=1.0, show_default=True, help="Seconds.")
@click.option("--count", type=click.IntRange(1), help="End after so many rounds of counters.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print JSON; natcompat/commands/tunnel/display.py has the keys."
)
@click.option(
    "--log-level",
    type=click.Choice(["debug", "info", "warning", "error"]),
    help="Write a log to the standard error: info for changes, debug for their causes, too.",
)
@click.option(
    "--example",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_example,
    help="Print a commented example, and end.",
)
def command(
    file: Path,
    check: bool,
    create_state: bool,
    backend: str | None,
    interval: float,
    count: int | None,
    as_json: bool,
    log_level: str | None,
) -> int:
    """Run a tunnel with manual keys: ESP in UDP (RFC 3948), described in a file.

    FILE.toml says which endpoint carries it, its SAs with their keys, its policies, and the TUN device
    for the packets inside; --example prints one that explains itself. Manual keys are for tests,
    laboratories and hosts without IKE (RFC 4301, 4.5.1): nobody renews them, and who learns them reads
    all that they protected.

    The tunnel is up while the command runs, in the foreground. On a terminal it shows what each SA has
    carried and dropped, live; in a pipe it prints a table each round, with --json an object a line. SIGINT
    (Ctrl-C), SIGTERM and SIGHUP end it: SAs, policies, device, addresses, routes and sockets are gone then.

    With the backend userspace ESP is done by this process. A TUN device takes root or CAP_NET_ADMIN;
    without a device it runs unprivileged and only receives. With the backend linux the kernel does
    ESP, which takes root or CAP_NET_ADMIN; the same file will do, but for counter modes, which are
    refused there, since nobody can choose the kernel's IVs.

    Keys stand in the file, in files of their own or in the environment, as hexadecimal digits. A file with
    keys that its group or others may touch, or that belongs to neither this user nor root, is refused;
    without keys in it FILE.toml may be readable. Keys are never shown.

    The state file keeps sequence numbers across restarts, so that no IV is used twice with one key: they
    are reserved in blocks, on the disk before use. --create-state makes it, once, for keys that are new.
    If it cannot be written later on, sealing stops at the end of the block. Never copy it or put back an
    older one. It also has the highest number that was received, as of the end or, after a crash, of
    ten seconds before or less: what came since then could be replayed once.

    An idle outbound SA sends dummy packets (RFC 4303, 2.6), which keep the mapping of a NAT and tell a peer
    that follows mappings (follow_mapping) of a new one; keepalive in [endpoint] chooses NAT-keepalives
    instead, or none. The learnt address of a peer is kept in the state file for the next start. If nothing
    authentic comes for a minute (silence in [endpoint]) although this end sends, that is reported and logged.

    With lockdown in [device], what the policies cover stays blocked if the process dies, until the next
    start or natcompat doctor --clean.

    natcompat tunnel status shows the tunnels that run: peer and mapping, last packet, bytes, drops by cause,
    and when keys have to be replaced; with --json as natcompat/commands/tunnel/status.py documents. A file of
    that name is ./status.

    \b
    Exit status:
      0    --check found nothing wrong, --count was reached, or status shows a tunnel
      1    the file is wrong, the tunnel cannot be, its last SA has expired, or status
           finds no tunnel; the last line says why and what to do
      2    the command line is wrong
      129, 130, 143  ended by SIGHUP, SIGINT, SIGTERM; all was taken down

    \b
    Examples:
      natcompat tunnel --example > tunnel.toml
      natcompat tunnel --check tunnel.toml
      natcompat tunnel --create-state tunnel.toml      # the first time
      natcompat tunnel tunnel.toml
      natcompat tunnel status
      natcompat tunnel --json --interval 60 tunnel.toml >> counters.jsonl
    """
    if log_level is not None:
        log_to_stderr(log_level)
    if os.fspath(file) == "status":
        from natcompat.commands.tunnel.status import show_status

        return show_status(as_json=as_json)
    from natcompat.commands.tunnel.file import read_tunnel

    tunnel = read_tunnel(file, backend=backend)
    if check:
        from natcompat.commands.tunnel import describe

        if as_json:
            from natcompat.commands.report import print_json

            print_json(describe.describe(tunnel))
        else:
            describe.show(tunnel)
        return 0
    from natcompat.commands.tunnel.display import reporter
    from natcompat.commands.tunnel.run import run

    with contextlib.ExitStack() as stack:
        output = sys.stdout or stack.enter_context(open(os.devnull, "w"))
        return run(
            tunnel,
            create_state=create_state,
            interval=interval,
            count=count,
            reporter=reporter(output, as_json=as_json),
        )
