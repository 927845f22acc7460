"""Rules, routes and tables that devices of natcompat have, and those that killed processes left behind."""

from __future__ import annotations

import contextlib
import socket
from typing import Final

from natcompat.esp.device.rtnetlink import Rtnetlink, Rule

TABLES: Final = 0x4E45_0000
"""The routing table of a device is this plus the index of its interface."""

SLOT: Final = 4
"""Priorities for one device with `prefer_main`: its three rules, and before them that for the main table."""


def table_of(index: int) -> int:
    """Return the routing table of the device with the interface `index`."""
    return TABLES + index


def present_tables() -> set[int]:
    """Return the tables that the interfaces of this network namespace would have."""
    return {table_of(index) for index, _ in socket.if_nameindex()}


def stale_rules() -> list[Rule]:
    """Return the rules of devices that are gone, since their processes were killed. Needs no privilege."""
    netlink = Rtnetlink()
    try:
        return without_device(netlink.rules(), present_tables())
    finally:
        netlink.close()


def remove_stale_rules() -> int:
    """Remove rules and routes of killed processes; return how many rules. EPERM without CAP_NET_ADMIN."""
    netlink = Rtnetlink()
    try:
        present = present_tables()
        stale = without_device(netlink.rules(), present)
        for rule in stale:
            netlink.delete_rule(rule)
        for index, network, table in netlink.routes():
            if not index and table not in present:
                netlink.delete_route(index, network, table=table)
        return len(stale)
    finally:
        netlink.close()


def without_device(rules: list[Rule], present: set[int]) -> list[Rule]:
    """Return those of `rules` whose device has none of the tables `present`."""
    slots = {(rule.family, rule.priority // SLOT) for rule in rules if rule.table in present}

    def lives(rule: Rule) -> bool:
        return rule.table in present or (rule.not_default and (rule.family, rule.priority // SLOT) in slots)

    return [rule for rule in rules if not lives(rule)]


def remove_stale(netlink: Rtnetlink, own_table: int) -> None:
    """Remove the rules and routes of killed processes, and those in `own_table`, whose device persists."""
    present = present_tables() - {own_table}
    with contextlib.ExitStack() as removals:
        removals.enter_context(contextlib.suppress(OSError))  # another process was faster
        for rule in without_device(netlink.rules(), present):
            removals.callback(netlink.delete_rule, rule)
        for index, network, table in netlink.routes():
            if table == own_table or (not index and table not in present):
                removals.callback(netlink.delete_route, index, network, table=table)
