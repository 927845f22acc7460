"""Runs the tests marked ``kernel_esp`` on a kernel with ESP, and counts them as if they had run here.

While the other tests run, all of them are run together by a second pytest: in a private network
namespace where the running kernel has ESP, otherwise in one guest (tests/lab/guest.py). Their reports
come back and are reported in their turn, after all others. Where neither works they are skipped with
the reason; with CI=true in the environment they fail instead.

NATCOMPAT_LAB=native or NATCOMPAT_LAB=guest chooses the place, NATCOMPAT_LAB_KERNEL another kernel for
the guest.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest

from tests.lab import guest, newer

RESULTS = "NATCOMPAT_LAB_RESULTS"
"""Environment variable of the second pytest: the file for its reports, one JSON object a line."""

LIMIT = 1200
SLOW_LIMIT = 3600
"""Seconds for all tests of the lab together; the second where the kernel is emulated."""

Reports = dict[str, list[dict[str, Any]]]


class Lab:
    """The run of all tests of the lab, in the background of this process or of another xdist worker."""

    def __init__(self, names: list[str], config: pytest.Config) -> None:
        self._names, self._config = names, config
        self._abandoned = threading.Event()
        self._found: Reports | str | None = None
        run_of_all = os.environ.get("PYTEST_XDIST_TESTRUNUID") or secrets.token_hex(16)
        self._directory = Path(tempfile.gettempdir()) / f"natcompat-lab-{run_of_all}"
        self._directory.mkdir(exist_ok=True)
        self._thread = threading.Thread(target=self.found, name="lab")
        self._thread.start()

    def found(self) -> Reports | str:
        """Return the reports, or why there are none. The first to ask runs the lab, others wait."""
        shared = self._directory / "found.json"
        with (self._directory / "lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if self._found is None and not shared.exists():
                config = self._config
                found = _run(self._names, config.rootpath, _measures_coverage(config), self._abandoned)
                shared.write_text(json.dumps(found))
            if self._found is None:
                self._found = json.loads(shared.read_text())
            assert self._found is not None
            return self._found

    def close(self) -> None:
        """End what still runs. The last worker takes away what they shared."""
        self._abandoned.set()
        self._thread.join()
        with (self._directory / "closed").open("a+") as closed:
            fcntl.flock(closed, fcntl.LOCK_EX)
            closed.write("x")
            last = closed.tell() == int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
        if last:
            shutil.rmtree(self._directory)


_LAB: pytest.StashKey[Lab] = pytest.StashKey()


def _is_lab_item(item: pytest.Item) -> bool:
    return item.get_closest_marker("kernel_esp") is not None


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if RESULTS not in os.environ:
        items.sort(key=_is_lab_item)
        for item in filter(_is_lab_item, items):  # the first waits for all; how long, LIMIT says
            item.add_marker(pytest.mark.timeout(0), append=False)


def pytest_collection_finish(session: pytest.Session) -> None:
    config = session.config
    names = [item.nodeid for item in session.items if _is_lab_item(item)]
    # of a run with workers, only these run tests
    leads = getattr(config.option, "numprocesses", None) and "PYTEST_XDIST_WORKER" not in os.environ
    if names and RESULTS not in os.environ and not config.option.collectonly and not leads:
        config.stash[_LAB] = Lab(names, config)


def pytest_sessionfinish(session: pytest.Session) -> None:
    lab = session.config.stash.get(_LAB, None)
    if lab is not None:
        lab.close()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    lab = item.config.stash.get(_LAB, None)
    if lab is None or not _is_lab_item(item):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    found = lab.found()
    for report in _reports(item, found):
        item.ihook.pytest_runtest_logreport(report=report)
    # what the test before this one left set up for it
    item.session._setupstate.teardown_exact(nextitem)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    # As the protocol that this replaces does it: what only tests before this one needed is torn down.
    item.session._setupstate.teardown_exact(nextitem)
    return True


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if RESULTS in os.environ and _inner_config:
        data = _inner_config[0].hook.pytest_report_to_serializable(config=_inner_config[0], report=report)
        with open(os.environ[RESULTS], "a", encoding="utf-8") as stream:
            stream.write(json.dumps({"nodeid": report.nodeid, "report": data}, default=str) + "\n")


_inner_config: list[pytest.Config] = []


def pytest_configure(config: pytest.Config) -> None:
    if RESULTS in os.environ:
        _inner_config.append(config)


def _reports(item: pytest.Item, found: Reports | str) -> list[pytest.TestReport]:
    if isinstance(found, str):
        path, line, _ = item.location
        if os.environ.get("CI") == "true":
            return [_report(item, "failed", f"the lab did not run, and in CI it must: {found}", "setup")]
        return [_report(item, "skipped", (path, line or 0, f"Skipped: no kernel with ESP: {found}"), "setup")]
    inner = found.get(item.nodeid)
    if not inner:
        return [_report(item, "failed", f"no result came out of the lab. {found[''][0]['output']}", "call")]
    hook = item.config.hook
    reports = [hook.pytest_report_from_serializable(config=item.config, data=dict(each)) for each in inner]
    for report in reports:
        if isinstance(report.longrepr, list):  # of a skip: path, line, reason; JSON knows no tuples
            report.longrepr = tuple(report.longrepr)
    if reports[-1].when != "teardown":
        reports.append(
            _report(item, "failed", f"the lab died in this test. {found[''][0]['output']}", "call")
        )
    return reports


def _report(item: pytest.Item, outcome: Any, text: Any, when: Any) -> pytest.TestReport:
    return pytest.TestReport(
        nodeid=item.nodeid,
        location=item.location,
        keywords=dict.fromkeys(item.keywords, 1),
        outcome=outcome,
        longrepr=text,
        when=when,
    )


def _measures_coverage(config: pytest.Config) -> bool:
    return bool(getattr(config.option, "cov_source", None)) and not config.option.no_cov


def _run(names: list[str], root: Path, coverage: bool, abandoned: threading.Event) -> Reports | str:
    """Run the tests `names` in the lab; return their reports (and the output under ""), or why not.

    With `coverage` what the inner run covers is left beside the outer run's data, which includes it.
    """
    place = os.environ.get("NATCOMPAT_LAB") or ("native" if _kernel_has_esp() else "guest")
    if place == "guest":
        problem = _install_packages()
        if problem:
            return problem
    with tempfile.TemporaryDirectory(prefix="natcompat-lab-") as name:
        directory = Path(name)
        (directory / "names").write_text("\n".join(names) + "\n")
        results = directory / "results"
        results.touch()
        command = [sys.executable, "-m"]
        if coverage:
            options = f"--rcfile={root}/pyproject.toml", f"--data-file={directory}/.coverage"
            command += ["coverage", "run", *options, "-m"]
        command += ["pytest", "-q", "-p", "no:cacheprovider", f"--rootdir={root}"]
        command += [
            "-c",
            str(root / "pyproject.toml"),
            "-o",
            "addopts=--strict-markers",
            f"@{directory}/names",
        ]
        environment = {"PATH": os.environ["PATH"], "HOME": "/root", RESULTS: str(results), "LANG": "C.UTF-8"}
        environment["PYTHONPATH"] = os.pathsep.join(
            [str(root), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        )
        environment["PATH"] += ":/usr/sbin:/sbin"
        ending = ""
        limit = SLOW_LIMIT if newer.KERNEL in os.environ else LIMIT
        try:
            status = (
                _run_natively(command, directory, environment, abandoned)
                if place == "native"
                else guest.run(command, directory, limit=limit, environment=environment, abandoned=abandoned)
            )
            ending = f"The inner run ended with status {status}."
        except (guest.GuestError, OSError, subprocess.SubprocessError) as error:
            ending = str(error)
            if not results.stat().st_size:
                return ending
        for data in directory.glob(".coverage.*"):
            shutil.copyfile(data, root / data.name)
        found: Reports = {"": []}
        for line in results.read_text().splitlines():
            with contextlib.suppress(ValueError):  # the last line of a run that was cut off
                entry = json.loads(line)
                found.setdefault(entry["nodeid"], []).append(entry["report"])
        output = (directory / "output").read_text(errors="replace")[-4000:]
        found[""] = [{"output": f"{ending}\n{output}"}]
        return found


def _kernel_has_esp() -> bool:
    if sys.platform != "linux" or os.geteuid() != 0:
        return False
    from natcompat.kernel.xfrm.probe import probe_esp

    return bool(probe_esp()) and bool(probe_esp("rfc4106(gcm(aes))", "", family=socket.AF_INET6))


def _run_natively(
    command: list[str], directory: Path, environment: dict[str, str], abandoned: threading.Event
) -> int:
    """Run `command` in namespaces of its own, which end with it."""
    script = 'mkdir -p /run/netns && mount -t tmpfs names /run/netns && ip link set lo up && exec "$@"'
    with (directory / "output").open("wb") as output:
        process = subprocess.Popen(
            ["unshare", "--net", "--mount", "sh", "-ec", script, "sh", *command],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
        try:
            return guest.wait(process, LIMIT, abandoned)
        finally:
            guest.end_session(process)


def _install_packages() -> str:
    """Install what the guest needs, where this process may; return what is in the way, if anything."""
    if guest.kernel() and shutil.which("iptables-legacy", path="/usr/sbin:/sbin") and shutil.which("swanctl"):
        return ""
    if sys.platform != "linux" or os.uname().machine != "x86_64":
        return "the guest is a Linux program for x86-64"
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        missing = " ".join(guest.PACKAGES)
        return "" if guest.kernel() else f"User Mode Linux is missing (as root: apt-get install {missing})"
    for step in (["update"], ["install", "-y", "--no-install-recommends", *guest.PACKAGES]):
        done = subprocess.run(
            ["apt-get", "-q", *step],
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    return "" if guest.kernel() else f"apt-get could not install User Mode Linux: {done.stderr[-500:]}"
