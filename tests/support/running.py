"""How tests run the command: as a user does, in a pipe or on a terminal, as root or without privilege."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Mapping
from pathlib import Path

import pytest

import natcompat

ROOT = Path(natcompat.__file__).resolve().parent.parent
NOBODY = 65534
COMMAND = [sys.executable, "-m", "natcompat"]


def run(
    *arguments: str, env: Mapping[str, str] | None = None, prefix: tuple[str, ...] = ()
) -> subprocess.CompletedProcess[str]:
    """Run ``natcompat ARGUMENTS...`` in a pipe."""
    command = [*(prefix or COMMAND), *arguments] if not prefix else [*prefix, "-m", "natcompat", *arguments]
    return subprocess.run(
        command, capture_output=True, text=True, env=environment(env), timeout=100, check=False
    )


def environment(more: Mapping[str, str] | None = None) -> dict[str, str]:
    paths = (more or {}).get("PYTHONPATH", ""), str(ROOT), os.environ.get("PYTHONPATH", "")
    plain = {key: value for key, value in os.environ.items() if key != "NATCOMPAT_BACKEND"}
    return {**plain, **(more or {}), "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def can_become_nobody() -> bool:
    """Return whether this process is root and there is an ordinary user; a user namespace may have none."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    ranges = [line.split() for line in Path("/proc/self/uid_map").read_text().splitlines()]
    return any(int(first) <= NOBODY < int(first) + int(count) for first, _, count in ranges)


becomes_nobody = pytest.mark.skipif(
    not can_become_nobody(), reason="becomes an ordinary user, which takes root and such a user"
)


def as_nobody() -> tuple[str, ...]:
    """Return the start of a command that runs Python as an ordinary user; empty where that cannot be.

    The interpreter that runs the tests may be out of an ordinary user's reach, another of the same
    version will do.
    """
    if os.geteuid() != 0:
        return (sys.executable,)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    packages = os.pathsep.join((str(ROOT), sysconfig.get_paths()["purelib"]))
    for python in (sys.executable, f"/usr/bin/python{version}", f"/usr/local/bin/python{version}"):
        command = (
            *("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups"),
            *("env", "HOME=/nonexistent", "PYTHONDONTWRITEBYTECODE=1", f"PYTHONPATH={packages}", python),
        )
        check = [*command, "-c", "import natcompat.commands.doctor.examine, rich, pyroute2"]
        if (
            shutil.which("setpriv")
            and subprocess.run(check, capture_output=True, check=False).returncode == 0
        ):
            return command
    return ()


def run_on_terminal(*arguments: str, width: int = 100, prefix: tuple[str, ...] = ()) -> tuple[int, str]:
    """Run ``natcompat ARGUMENTS...`` on a terminal, behind `prefix`; return its status and output."""
    ours, theirs = pty.openpty()
    env = environment({"TERM": "xterm-256color", "COLUMNS": str(width), "LINES": "40"})
    for name in ("NO_COLOR", "CI", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
        env.pop(name, None)
    command = [*prefix, *COMMAND, *arguments]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=env)
    os.close(theirs)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the terminal has no other end any more
        while piece := os.read(ours, 65536):
            shown += piece
    os.close(ours)
    return process.wait(timeout=60), shown.decode()


def wait_for_output(process: subprocess.Popen[str]) -> None:
    """Wait until `process` has written something on stdout."""
    assert process.stdout is not None
    assert select.select([process.stdout], [], [], 60)[0], "nothing came"


def wait_until_gone(pids: list[int], seconds: float = 10) -> list[int]:
    """Wait until none of `pids` lives; return those that do after all."""
    deadline = time.monotonic() + seconds
    while (alive := [pid for pid in pids if _lives(pid)]) and time.monotonic() < deadline:
        time.sleep(0.02)
    return alive


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def children(pid: int) -> list[int]:
    """Return the processes under `pid`, their children included."""
    found = []
    for task in Path("/proc").glob(f"{pid}/task/*/children"):
        for child in map(int, task.read_text().split()):
            found += [child, *children(child)]
    return found
