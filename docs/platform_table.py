"""Make the table of platforms from what ``natcompat verify --json`` found on them.

    python docs/platform_table.py verify-*.json > platforms.md

One row for each report and backend: who does which duty there, and how many checks differed from
Solaris. A report that cannot be read is a row, too: a platform is not left out silently.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

HEAD = (
    "platform",
    "kernel",
    "Python",
    "backend",
    "runts dropped by",
    "ESP diverted by",
    "marker stripped by",
    "marker inserted by",
    "checks",
    "differences",
    "limits of the kernel",
)
DUTIES = ("drop_runts", "divert_esp", "strip_marker", "insert_marker")


def rows(path: Path) -> Iterator[tuple[str, ...]]:
    """Return the rows of one report, whose name tells the platform."""
    name = path.stem.removeprefix("verify-")
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        system = report["platform"]
        found = list(_backends(report))
    except (ValueError, KeyError, TypeError) as error:
        yield name, f"no report: {type(error).__name__}", *[""] * (len(HEAD) - 2)
        return
    start = name, f"{system['system']} {system['release']}", system["python"]
    for backend, duties, outcomes in found:
        differences = [each["row"] for each in outcomes if not each["passed"]]
        limits = sorted({each["row"] for each in outcomes if each["limit"]})
        yield (
            *start,
            backend,
            *duties,
            str(len(outcomes)),
            ", ".join(sorted(set(differences))) or "0",
            ", ".join(limits),
        )
    if not found:
        reasons = "; ".join(each["reason"] for each in report["skipped"])
        yield *start, "none", *[""] * 4, "0", reasons, ""


def _backends(report: dict[str, Any]) -> Iterator[tuple[str, list[str], list[dict[str, Any]]]]:
    """Return name, who does which duty, and outcomes of each backend that was looked at."""
    trials = report["trials"]
    for backend in dict.fromkeys(each["backend"] for each in trials):
        mine = [each for each in trials if each["backend"] == backend]
        duties = [" or ".join(sorted({each["duties"][duty] for each in mine})) for duty in DUTIES]
        yield backend, duties, [outcome for each in mine for outcome in each["outcomes"]]


def table(paths: list[Path]) -> str:
    """Return the table in Markdown, platforms in order of their names."""
    lines = [HEAD, ("---",) * len(HEAD)]
    for path in sorted(paths):
        lines += rows(path)
    return "".join(f"| {' | '.join(_cell(each) for each in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.stdout.write(table([Path(argument) for argument in sys.argv[1:]]))
