"""The commands ``sad`` and ``spd``: what is in the kernel's databases now."""

from __future__ import annotations

import os

import click

from natcompat.commands.ipsec.common import as_json
from natcompat.commands.ipsec.lines import policy_columns, sa_columns
from natcompat.commands.ipsec.sources import Sources
from natcompat.commands.tables import show


@click.command(short_help="List the security associations of the kernel and of user-space IPsec.")
@as_json
@click.option("--show-keys", is_flag=True, help="Show keys, too; for root only.")
def sad(json_output: bool, show_keys: bool) -> None:
    """List the security associations of the kernel and of user-space IPsec.

    Every SA of this network namespace: its engine (kernel, or the process ID of a program with
    user-space IPsec), SPI and direction, outer addresses, UDP ports (local-remote) where ESP goes in
    UDP, transforms, the packets that it has carried and those that it has dropped (replays, wrong
    integrity check values). A larval SA is a reserved SPI, or traffic that waits for IKE. Where the
    kernel does not know the direction of an SA, the addresses of this host tell it.

    The kernel's SAs take root or CAP_NET_ADMIN. Those of user-space IPsec are shown to its user and
    to root, unless its program runs with NATCOMPAT_CONTROL=none. Nothing is changed. Keys are never
    shown, except those of the kernel to root with --show-keys: their holder reads the traffic.

    \b
    Exit status:
      0    the SAs were listed, be there any or not; those of the kernel may be missing
           where user-space IPsec runs: then the last line says why
      1    no user-space IPsec runs, and this process may not ask the kernel (root or
           CAP_NET_ADMIN), or the kernel has no IPsec; the last line says which, and
           what would help
      2    the command line is wrong

    \b
    Examples:
      natcompat sad
      natcompat sad --json | jq '.[] | select(.integrity_drops > 0)'
      ip netns exec gateway natcompat sad
    """
    if show_keys and os.geteuid() != 0:
        raise click.ClickException("--show-keys is for root only. Run it with sudo, or leave it out")
    with Sources() as sources:
        rows = sources.sas(show_keys=show_keys)
        show("Security associations", rows, sa_columns, json_output=json_output)


@click.command(short_help="List the policies of the kernel and of user-space IPsec.")
@as_json
def spd(json_output: bool) -> None:
    """List the policies of the kernel and of user-space IPsec.

    Every inbound and outbound policy of this network namespace: its engine (kernel, or the process ID
    of a program with user-space IPsec), selector, action (protect, bypass, discard), the ends of its
    tunnel, the reqid of its SAs, and the time of the last packet that matched. A policy with a smaller
    priority is looked up first. The kernel's policies for forwarding belong to the inbound ones and
    are not listed again, nor are those of single sockets, such as the exemption of endpoints with the
    option.

    The kernel's policies take root or CAP_NET_ADMIN. Those of user-space IPsec are shown to its user
    and to root, unless its program runs with NATCOMPAT_CONTROL=none. Nothing is changed.

    \b
    Exit status:
      0    the policies were listed, be there any or not; those of the kernel may be
           missing where user-space IPsec runs: then the last line says why
      1    no user-space IPsec runs, and this process may not ask the kernel (root or
           CAP_NET_ADMIN), or the kernel has no IPsec; the last line says which, and
           what would help
      2    the command line is wrong

    \b
    Examples:
      natcompat spd
      natcompat spd --json | jq '.[] | select(.last_used == null)'
    """
    with Sources() as sources:
        show("Policies", sources.policies(), policy_columns, json_output=json_output)
