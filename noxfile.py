"""The tests on every Python, with the lowest versions of what natcompat needs, and without options.

``make nox`` runs all of it; ``make nox ARGS="-s tests-3.13 -- -k steering"`` a part.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import nox

PROJECT = nox.project.load_toml("pyproject.toml")["project"]
NOT_NEEDED = ("gevent", "trio", "uvloop", "scapy")  # tests of these are skipped where they are missing
NEEDED = [each for each in PROJECT["optional-dependencies"]["test"] if not each.startswith(NOT_NEEDED)]

nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True

# a version manager's shims refuse versions that are not switched on, so go past them
_versions = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv") / "versions"
os.environ["PATH"] = os.pathsep.join(
    [*(str(version / "bin") for version in sorted(_versions.glob("3.*"))), os.environ["PATH"]]
)
for _name in ("PYTHONPATH", "PIP_FIND_LINKS", "PIP_USER", "PYTEST_ADDOPTS", "NATCOMPAT_BACKEND"):
    os.environ.pop(_name, None)


def pytest(session: nox.Session, **environment: str) -> None:
    """Run the tests in `session`, without coverage."""
    session.run("python", "-m", "pytest", "-n", "2", *session.posargs, env=environment)


@nox.session(python=["3.11", "3.12", "3.13"])
def tests(session: nox.Session) -> None:
    """Run the tests on one Python."""
    session.install("-e", ".[test]")
    pytest(session)


@nox.session(python="3.11")
def lowest(session: nox.Session) -> None:
    """Run the tests with the lowest versions that pyproject.toml allows, of direct dependencies."""
    requirements = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    session.install("-e", ".", *(re.sub(r">=", "==", requirement, count=1) for requirement in requirements))
    pytest(session)


@nox.session(python="3.11")
def bare(session: nox.Session) -> None:
    """Run the tests without the packages that only some of them need."""
    session.install("-e", ".", *NEEDED)
    pytest(session, CI="")  # their tests skip here, and shall


@nox.session(python="3.14t")
def free_threaded(session: nox.Session) -> None:
    """Run the tests on a Python without the interpreter lock, without packages that would bring it back."""
    session.install("-e", ".", *NEEDED)
    pytest(session, CI="", PYTHON_GIL="0")
