"""The commands ``sad`` and ``spd``: what is in the kernel's databases now."""

from __future__ import annotations

import os

import click

from natcompat.commands.ipsec.common import as_json, opened
from natcompat.commands.ipsec.describe import describe_policy, describe_sas
from natcompat.commands.ipsec.lines import policy_columns, sa_columns
from natcompat.commands.tables import show


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
            describe_sas(ipsec.list_sas(), show_keys=show_keys),
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
