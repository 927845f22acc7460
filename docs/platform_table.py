"""Make the table of platforms from the reports of ``natcompat verify --json``.

    python docs/platform_table.py verify-*.json > platforms.md

The table has one row for each report and backend: the performer of each duty, and the number of checks that
differ from Solaris. A report that cannot be read is a row too, so that no platform is missing silently.
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
    """Yield the rows of one report. The file name is the name of the platform."""
    name = path.stem.removeprefix("verify-")
    try:
        report: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        system = report["platform"]
        backends = list(_backends(report))
    except (ValueError, KeyError, TypeError) as error:
        yield name, f"no report: {type(error).__name__}", *[""] * (len(HEAD) - 2)
        return
    start = name, f"{system['system']} {system['release']}", system["python"]
    for backend, duties, outcomes in backends:
        differences = [outcome["row"] for outcome in outcomes if not outcome["passed"]]
        limits = sorted({outcome["row"] for outcome in outcomes if outcome["limit"]})
        yield (
            *start,
            backend,
            *duties,
            str(len(outcomes)),
            ", ".join(sorted(set(differences))) or "0",
            ", ".join(limits),
        )
    if not backends:
        reasons = "; ".join(backend["reason"] for backend in report["skipped"])
        yield *start, "none", *[""] * 4, "0", reasons, ""


def _backends(report: dict[str, Any]) -> Iterator[tuple[str, list[str], list[dict[str, Any]]]]:
    """Yield the name, the performers of the four duties, and the outcomes of each backend in the report."""
    trials = report["trials"]
    for backend in dict.fromkeys(trial["backend"] for trial in trials):
        own_trials = [trial for trial in trials if trial["backend"] == backend]
        duties = [" or ".join(sorted({trial["duties"][duty] for trial in own_trials})) for duty in DUTIES]
        yield backend, duties, [outcome for trial in own_trials for outcome in trial["outcomes"]]


def table(paths: list[Path]) -> str:
    """Return the table in Markdown, sorted by platform."""
    lines = [HEAD, ("---",) * len(HEAD)]
    for path in sorted(paths):
        lines += rows(path)
    return "".join(f"| {' | '.join(_cell(cell) for cell in line)} |\n" for line in lines)


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    sys.stdout.write(table([Path(argument) for argument in sys.argv[1:]]))
