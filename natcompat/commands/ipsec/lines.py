"""The lines that describe SAs, policies and events to people."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable
from typing import Final

from natcompat.ipsec.describe import Row

CAUSES: Final = {
    "integrity failure": "usual causes: the peer has another key or other transforms, "
    "or a middlebox changes packets",
    "peer silent": "usual causes: the peer is down or has other keys, or a NAT or firewall drops its packets",
}
"""Events of which the usual causes are told to people."""


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
        **_engine_column(row),
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
        "age": duration(row["added"]),
        **{name: row[name] for name in ("encryption_key", "integrity_key") if row.get(name)},
    }


def policy_columns(row: Row) -> Row:
    """Choose and shorten what a line about a policy says."""
    tunnel = f"{row['source']} to {row['destination']}" if row["source"] else ""
    return {
        **_engine_column(row),
        "way": row["direction"],
        "selector": row["selector"],
        "action": row["action"] + (" if possible" if row["optional"] else ""),
        "mode": row["mode"] if row["action"] == "protect" else "",
        "tunnel": tunnel,
        "reqid": row["reqid"],
        "priority": row["priority"],
        "mark": row["mark"] or "",
        "last used": duration(row["last_used"]) if row["last_used"] else "never",
    }


def _engine_column(row: Row) -> Row:
    """Return the column that names the engine: "kernel", or a process; none where there is but one."""
    if "engine" not in row:
        return {}
    return {"engine": "kernel" if row["engine"] == "kernel" else f"pid {row['pid']}"}


def duration(since: float) -> str:
    """Return the time that has passed since `since`, in seconds since the epoch, as in "90 s" or "3 h"."""
    seconds = max(0, int(time.time() - min(since, sys.float_info.max)))
    for size, unit in ((86400, "d"), (3600, "h"), (60, "m")):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"


class Rates:
    """Makes lines with rates of what SAs have done so far."""

    def __init__(self, name: Callable[[Row], object]) -> None:
        """`name` returns what an SA keeps from one round to the next, and shares with no other."""
        self._name = name
        self._before: dict[object, Row] = {}
        self._moment = time.monotonic()

    def lines(self, rows: Iterable[Row]) -> list[Row]:
        """Return a line for each SA, with what it has carried a second since the last round."""
        now = time.monotonic()
        passed, self._moment = max(now - self._moment, 1e-9), now
        before, self._before = self._before, {}
        lines = []
        for row in rows:
            name = self._name(row)
            self._before[name] = row
            old = before.get(name, row)
            rates = {
                "packets/s": round((row["packets"] - old["packets"]) / passed),
                "bytes/s": round((row["octets"] - old["octets"]) / passed),
            }
            lines.append(sa_columns(row) | rates)
        return lines


def event_line(row: Row) -> str:
    """Return a line about an event that happened now."""
    engine = _engine_column(row).get("engine", "")
    keys = {name: text for name, text in row.items() if name not in ("event", "time", "engine", "pid")}
    details = "  ".join(f"{name} {text}" for name, text in keys.items() if text is not None)
    words = [time.strftime("%H:%M:%S"), "" if engine == "kernel" else engine, row["event"], details]
    cause = CAUSES.get(row["event"], "")
    return "  ".join(filter(None, words)) + (f" ({cause})" if cause else "")
