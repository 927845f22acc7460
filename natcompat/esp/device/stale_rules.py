"""Routing rules that a process left which has been killed."""

from __future__ import annotations

import socket
from typing import Final

from natcompat.esp.device.rtnetlink import Rtnetlink, Rule

SLOT: Final = 4
"""Priorities for one device with `prefer_main`: its three, and in front of them that for the main table."""

TABLES: Final = 0x4E45_0000
"""A device's table is this plus the index of its interface."""


def stale_rules() -> list[Rule]:
    """Return the rules of devices that are gone: their processes were killed. Takes no privilege."""
    netlink = Rtnetlink()
    try:
        return stale_among(netlink.rules(), present_tables())
    finally:
        netlink.close()


def stale_among(rules: list[Rule], present: set[int]) -> list[Rule]:
    """Return those of `rules` that lead to tables which no device of a living process has."""
    slots = {(each.family, each.priority // SLOT) for each in rules if each.table in present}

    def lives(rule: Rule) -> bool:
        return rule.table in present or (rule.not_default and (rule.family, rule.priority // SLOT) in slots)

    return [each for each in rules if not lives(each)]


def present_tables() -> set[int]:
    """Return the routing tables of the devices that exist."""
    return {TABLES + index for index, _ in socket.if_nameindex()}
