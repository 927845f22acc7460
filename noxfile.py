"""Run the tests on every supported Python, with the lowest versions, and without optional packages.

``make nox`` runs all of it; ``make nox ARGS="-s tests-3.13 -- -k steering"`` a part.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import nox

PROJECT = nox.project.load_toml("pyproject.toml")["project"]
OPTIONAL = ("gevent", "trio", "uvloop", "scapy")  # their tests are skipped where they are missing
REQUIRED = [
    requirement
    for requirement in PROJECT["optional-dependencies"]["test"]
    if not requirement.startswith(OPTIONAL)
]

nox.options.error_on_missing_interpreters = False
nox.options.reuse_existing_virtualenvs = True

# bypass the shims of a version manager: they refuse versions that are not enabled
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
    """Run the tests with the lowest versions of direct dependencies that pyproject.toml allows."""
    requirements = [*PROJECT["dependencies"], *PROJECT["optional-dependencies"]["test"]]
    session.install("-e", ".", *(re.sub(r">=", "==", requirement, count=1) for requirement in requirements))
    pytest(session)


@nox.session(python="3.11")
def bare(session: nox.Session) -> None:
    """Run the tests without the packages that only some tests need."""
    session.install("-e", ".", *REQUIRED)
    pytest(session, CI="")  # CI would turn the skips into failures


@nox.session(python="3.14t")
def free_threaded(session: nox.Session) -> None:
    """Run the tests on a Python without the interpreter lock, without packages that would enable the lock."""
    session.install("-e", ".", *REQUIRED)
    pytest(session, CI="", PYTHON_GIL="0")
