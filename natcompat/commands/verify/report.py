"""The report of ``natcompat verify``, for people."""

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
    """What was found, and what was not looked at."""

    trials: list[Trial] = field(default_factory=list)
    replays: list[Replay] = field(default_factory=list)
    skipped: list[dict[str, str]] = field(default_factory=list)
    nat: str | None = None

    @property
    def passed(self) -> bool:
        """Whether something was verified, and nothing differed."""
        trials, replays = (all(each.passed for each in found) for found in (self.trials, self.replays))
        return bool(self.trials) and trials and replays

    def skip(self, what: str, reason: str, remedy: str = "") -> None:
        """Note that something was not looked at."""
        self.skipped.append({"what": what, "reason": reason, "remedy": remedy})

    def as_json(self) -> dict[str, Any]:
        """Return the report; see the module."""
        from natcompat import __version__

        return {
            "schema": SCHEMA,
            "natcompat": __version__,
            "platform": _platform(),
            "passed": self.passed,
            "trials": [{**asdict(each), "passed": each.passed} for each in self.trials],
            "replays": [{**asdict(each), "passed": each.passed} for each in self.replays],
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


def show(found: Verification) -> None:
    """Print the report for people."""
    from natcompat.commands.report import Printer, bad, doubtful, good, quiet

    out = Printer()
    for name in dict.fromkeys(each.backend for each in found.trials):
        trials = [each for each in found.trials if each.backend == name]
        for section, title in _TITLES.items():
            _show_section(out, f"{name}: {title}", section, trials)
        modes = dict.fromkeys((each.mode, each.reason) for each in trials)
        for mode, reason in modes:
            out.line(f"  Mode {mode}{f' ({reason})' if reason else ''}; {_duties(trials[0].duties)}.")
        if any(outcome.woke for each in trials for outcome in each.outcomes):
            out.line("  select may wake for what the process drops: no kernel helps in this mode.")
        for each in found.replays:
            if each.backend == name:
                _show_replay(out, each)
    if found.trials:
        out.heading("Paths")
        out.table(
            ["", ""],
            [[_HEADS[each], _describe(each)] for each in dict.fromkeys(trial.path for trial in found.trials)],
        )
    limits = list(
        dict.fromkeys(
            f"{trial.backend}, {each.row}: {each.limit}"
            for trial in found.trials
            for each in trial.outcomes
            if each.limit
        )
    )
    if limits:
        out.heading("Limits", "what the kernel denies to every socket that is served in this way")
        for line in limits:
            out.line(doubtful("  limit  "), line)
    differences = list(_differences(found))
    if differences:
        out.heading("Differences")
        for line in differences:
            out.line(bad("  differs  "), line)
    if found.skipped:
        out.heading("Not looked at")
        out.table(
            ["", "", ""],
            [[each["what"], each["reason"].rstrip(".") + ".", each["remedy"]] for each in found.skipped],
        )
    checks = [each.passed for trial in found.trials for each in trial.outcomes]
    checks += [each.passed for replayed in found.replays for each in replayed.counts]
    out.heading("Result")
    if found.passed:
        but = " but what the limits say" if limits else ""
        out.line(good("As on Solaris"), f": {len(checks)} checks, no difference{but}.")
    elif differences:
        out.line(bad("Not as on Solaris"), f": {checks.count(False)} of {len(checks)} checks differ.")
    else:
        out.line(bad("Nothing was verified."), quiet(" See above."))


def _show_section(out: Any, title: str, section: str, trials: list[Trial]) -> None:
    """Print one table: a row for each row of the contract, a column for each path."""
    from natcompat.commands.report import bad, doubtful, good

    outcomes = [[(trial, each) for each in trial.outcomes if each.section == section] for trial in trials]
    paths = list(dict.fromkeys(each.path for each in trials))
    rows = []
    for same in zip(*outcomes, strict=True):
        worst = next((each for _, each in same if not each.passed), same[0][1])
        cells = []
        for path in paths:
            differ = [f"v{trial.version}" for trial, each in same if trial.path == path and not each.passed]
            limited = any(each.limit for trial, each in same if trial.path == path)
            cells.append(
                bad(f"DIFFERS {' '.join(differ)}") if differ else doubtful("limit") if limited else good("ok")
            )
        here = worst.arrived if worst.passed else bad(worst.arrived)
        rows.append([worst.row, worst.sent, worst.solaris, here, worst.performer, *cells])
    out.heading(title)
    out.table(["row", "bytes", "Solaris", "here", "by", *(_HEADS[each] for each in paths)], rows)


def _show_replay(out: Any, found: Replay) -> None:
    from natcompat.commands.report import bad, good

    out.heading(
        f"{found.backend}: a recorded conversation",
        "IKEv2, ESP in UDP and keepalives of two strongSwan daemons, replayed over loopback",
    )
    names = {"ike": "IKE", "esp": "ESP", "keepalive": "NAT-keepalives", "runt": "runts", "sent": "IKE sent"}
    out.table(
        ["datagrams", "recorded", "here", "by", ""],
        [
            [
                names[each.what],
                str(each.recorded),
                each.arrived,
                each.performer,
                good("ok") if each.passed else bad("DIFFERS"),
            ]
            for each in found.counts
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
    done = {who: [words[duty] for duty, each in duties.items() if each == who] for who in duties.values()}
    return "; ".join(f"{who} {', '.join(what)}" for who, what in done.items())


def _differences(found: Verification) -> Iterator[str]:
    """Yield what differs, a line for each row: the paths on which it does so in the same way are with it."""
    where: dict[str, list[str]] = {}
    for trial in found.trials:
        for each in trial.outcomes:
            if not each.passed:
                what = (
                    f"{trial.backend}, {each.section}, row {each.row!r}: Solaris: {each.solaris}; "
                    f"here: {each.arrived} (by {each.performer})"
                )
                where.setdefault(what, []).append(f"{trial.path} IPv{trial.version}")
    for what, paths in where.items():
        yield f"{what}; {', '.join(paths)}"
    for replayed in found.replays:
        for count in replayed.counts:
            if not count.passed:
                yield (
                    f"{replayed.backend}, recorded conversation, {count.what}: {count.recorded} recorded; "
                    f"here: {count.arrived} (by {count.performer})"
                )
