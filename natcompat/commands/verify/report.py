"""Prints the report of ``natcompat verify`` for people."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Final

from natcompat.commands.verify.recorded import Replay
from natcompat.commands.verify.values import Trial

SCHEMA: Final = 1

BEHIND: Final = "from behind NAT", "to behind NAT"

_TITLES: Final = {
    "inbound": "what arrives",
    "outbound": "what is sent, and is on the wire",
    "socket": "the socket",
}

_HEADS: Final = {"loopback": "loop", "from behind NAT": "NAT>", "to behind NAT": "<NAT"}


@dataclass(slots=True)
class Verification:
    """The results of the trials, and the list of those that were left out."""

    trials: list[Trial] = field(default_factory=list)
    replays: list[Replay] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    nat: str | None = None

    @property
    def passed(self) -> bool:
        """Whether at least one trial ran, and no result differs from the contract."""
        trials, replays = (all(part.passed for part in parts) for parts in (self.trials, self.replays))
        return bool(self.trials) and trials and replays

    def skip(self, subject: str, reason: str, remedy: str = "") -> None:
        """Note that a trial was left out."""
        self.skipped.append({"what": subject, "reason": reason, "remedy": remedy})

    def as_json(self) -> dict[str, Any]:
        """Return the report for ``--json``; `natcompat.commands.verify.command` documents its keys."""
        from natcompat import __version__

        return {
            "schema": SCHEMA,
            "natcompat": __version__,
            "platform": _platform(),
            "passed": self.passed,
            "trials": [{**asdict(trial), "passed": trial.passed} for trial in self.trials],
            "replays": [{**asdict(replay), "passed": replay.passed} for replay in self.replays],
            "nat": self.nat,
            "skipped": self.skipped,
        }


def _platform() -> dict[str, str | bool | None]:
    return {
        "system": platform.system(),
        "release": platform.release(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "root": os.geteuid() == 0 if hasattr(os, "geteuid") else None,
    }


def show(verification: Verification) -> None:
    """Print the report for people."""
    from natcompat.commands.report import Printer, bad, doubtful, good, quiet

    out = Printer()
    for name in dict.fromkeys(trial.backend for trial in verification.trials):
        trials = [trial for trial in verification.trials if trial.backend == name]
        for section, title in _TITLES.items():
            _show_section(out, f"{name}: {title}", section, trials)
        modes = dict.fromkeys((trial.mode, trial.reason) for trial in trials)
        for mode, reason in modes:
            out.line(f"  Mode {mode}{f' ({reason})' if reason else ''}; {_duties(trials[0].duties)}.")
        if any(outcome.woke for trial in trials for outcome in trial.outcomes):
            out.line("  select may wake for what the process drops: no kernel helps in this mode.")
        for replay in verification.replays:
            if replay.backend == name:
                _show_replay(out, replay)
    if verification.trials:
        out.heading("Paths")
        out.table(
            ["", ""],
            [
                [_HEADS[path], _describe(path)]
                for path in dict.fromkeys(trial.path for trial in verification.trials)
            ],
        )
    limits = list(
        dict.fromkeys(
            f"{trial.backend}, {outcome.row}: {outcome.limit}"
            for trial in verification.trials
            for outcome in trial.outcomes
            if outcome.limit
        )
    )
    if limits:
        out.heading("Limits", "what the kernel denies to every socket that is served in this way")
        for line in limits:
            out.line(doubtful("  limit  "), line)
    differences = list(_differences(verification))
    if differences:
        out.heading("Differences")
        for line in differences:
            out.line(bad("  differs  "), line)
    if verification.skipped:
        out.heading("Not looked at")
        out.table(
            ["", "", ""],
            [
                [skipped["what"], skipped["reason"].rstrip(".") + ".", skipped["remedy"]]
                for skipped in verification.skipped
            ],
        )
    checks = [outcome.passed for trial in verification.trials for outcome in trial.outcomes]
    checks += [count.passed for replay in verification.replays for count in replay.counts]
    out.heading("Result")
    if verification.passed:
        but = " but what the limits say" if limits else ""
        out.line(good("As on Solaris"), f": {len(checks)} checks, no difference{but}.")
    elif differences:
        out.line(bad("Not as on Solaris"), f": {checks.count(False)} of {len(checks)} checks differ.")
    else:
        out.line(bad("Nothing was verified."), quiet(" See above."))


def _show_section(out: Any, title: str, section: str, trials: list[Trial]) -> None:
    """Print one table: a row for each row of the contract, a column for each path."""
    from natcompat.commands.report import bad, doubtful, good

    outcomes = [
        [(trial, outcome) for outcome in trial.outcomes if outcome.section == section] for trial in trials
    ]
    paths = list(dict.fromkeys(trial.path for trial in trials))
    rows = []
    for same in zip(*outcomes, strict=True):
        worst = next((outcome for _, outcome in same if not outcome.passed), same[0][1])
        cells = []
        for path in paths:
            differ = [
                f"v{trial.version}" for trial, outcome in same if trial.path == path and not outcome.passed
            ]
            limited = any(outcome.limit for trial, outcome in same if trial.path == path)
            cells.append(
                bad(f"DIFFERS {' '.join(differ)}") if differ else doubtful("limit") if limited else good("ok")
            )
        here = worst.arrived if worst.passed else bad(worst.arrived)
        rows.append([worst.row, worst.sent, worst.solaris, here, worst.performer, *cells])
    out.heading(title)
    out.table(["row", "bytes", "Solaris", "here", "by", *(_HEADS[path] for path in paths)], rows)


def _show_replay(out: Any, replay: Replay) -> None:
    from natcompat.commands.report import bad, good

    out.heading(
        f"{replay.backend}: a recorded conversation",
        "IKEv2, ESP in UDP and keepalives of two strongSwan daemons, replayed over loopback",
    )
    names = {"ike": "IKE", "esp": "ESP", "keepalive": "NAT-keepalives", "runt": "runts", "sent": "IKE sent"}
    out.table(
        ["datagrams", "recorded", "here", "by", ""],
        [
            [
                names[count.what],
                str(count.recorded),
                count.arrived,
                count.performer,
                good("ok") if count.passed else bad("DIFFERS"),
            ]
            for count in replay.counts
        ],
    )


def _describe(path: str) -> str:
    return {
        "loopback": "both on this host",
        BEHIND[0]: "the peer is behind a NAT that changes ports, the endpoint has a public address",
        BEHIND[1]: "the endpoint is behind the NAT, the peer answers through the mapping",
    }[path]


def _duties(duties: dict[str, str]) -> str:
    words = {
        "drop_runts": "drops runts",
        "divert_esp": "diverts ESP",
        "strip_marker": "strips the marker",
        "insert_marker": "inserts it",
    }
    done = {
        name: [words[duty] for duty, performer in duties.items() if performer == name]
        for name in duties.values()
    }
    return "; ".join(f"{name} {', '.join(actions)}" for name, actions in done.items())


def _differences(verification: Verification) -> Iterator[str]:
    """Yield a line for each difference, with all paths that show it."""
    paths_of: dict[str, list[str]] = {}
    for trial in verification.trials:
        for outcome in trial.outcomes:
            if not outcome.passed:
                difference = (
                    f"{trial.backend}, {outcome.section}, row {outcome.row!r}: Solaris: {outcome.solaris}; "
                    f"here: {outcome.arrived} (by {outcome.performer})"
                )
                paths_of.setdefault(difference, []).append(f"{trial.path} IPv{trial.version}")
    for difference, paths in paths_of.items():
        yield f"{difference}; {', '.join(paths)}"
    for replay in verification.replays:
        for count in replay.counts:
            if not count.passed:
                yield (
                    f"{replay.backend}, recorded conversation, {count.what}: {count.recorded} recorded; "
                    f"here: {count.arrived} (by {count.performer})"
                )
