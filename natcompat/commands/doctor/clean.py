"""``natcompat doctor --clean``: removes what killed processes left behind, and nothing of living ones.

``--json`` prints an object: ``removed`` (``guards``: names of nf_tables tables, under which traffic stayed
blocked by lockdown; ``rules``: the number of routing rules, with their routes; ``control_sockets``: paths)
and ``errors`` (a list of sentences: what could not be removed, and why).
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from natcompat.commands.ipsec.engines import directories
from natcompat.commands.report import Printer, bad, good
from natcompat.errors import NatCompatError, printable


def clean() -> dict[str, Any]:
    """Remove what is left of killed processes in this network namespace; return what was removed."""
    report: dict[str, Any] = {"removed": {"guards": [], "rules": 0, "control_sockets": []}, "errors": []}
    steps: dict[str, Callable[[], object]] = {"control_sockets": _control_sockets}
    if sys.platform == "linux":
        from natcompat.esp.device.guard import remove_stale_guards
        from natcompat.esp.device.stale_rules import remove_stale_rules

        steps |= {"guards": _unless_unknown(remove_stale_guards), "rules": remove_stale_rules}
    for name, remove in steps.items():
        try:
            report["removed"][name] = remove()
        except OSError as error:
            remedy = error.remedy if isinstance(error, NatCompatError) else ""
            reason = ". ".join(filter(None, (error.strerror or str(error), remedy)))
            report["errors"].append(printable(f"{name.replace('_', ' ')}: {reason.rstrip('.')}."))
    return report


def _control_sockets() -> list[str]:
    from natcompat.esp.control_directory import remove_stale

    # of this user's own: root would remove in directories that their users can exchange meanwhile
    return [
        str(path)
        for where in directories()
        if where.is_dir() and where.stat().st_uid == os.geteuid()
        for path in remove_stale(where)
    ]


def _unless_unknown(remove: Callable[[], list[str]]) -> Callable[[], list[str]]:
    """Return `remove` for kernels that may have no nf_tables, where there is no guard to remove."""
    import errno

    def call() -> list[str]:
        try:
            return remove()
        except NatCompatError as error:
            if error.errno in (errno.EPROTONOSUPPORT, errno.ENOENT, errno.EOPNOTSUPP):
                return []
            raise

    return call


def show(report: dict[str, Any]) -> None:
    """Print the report of `clean` for people."""
    out, removed = Printer(), report["removed"]
    for name in removed["guards"]:
        out.line(good("removed  "), f"the guard {name} of a killed process; what it blocked is free again")
    if removed["rules"]:
        out.line(good("removed  "), f"{removed['rules']} routing rules of killed processes, and their routes")
    for path in removed["control_sockets"]:
        out.line(good("removed  "), f"the control socket {path}")
    for error in report["errors"]:
        out.line(bad("left  "), error)
    if not any(removed.values()) and not report["errors"]:
        out.line("Killed processes have left nothing behind.")
