"""The order of the house: imports go down, modules are short, and every folder says what it holds."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.running import ROOT

LIMITS = {"natcompat": 400, "ffi": 400, "tests": 500}
"""Lines of a module, by folder."""
SOURCES = {".py", ".pyi", ".c", ".h"}
LARGEST_ROOT = 12
"""Modules and packages at the root of natcompat/, besides `__init__`."""


def modules(folder: str) -> list[Path]:
    """Return the sources of `folder` that belong to the project."""
    paths = [path for path in sorted((ROOT / folder).rglob("*")) if path.suffix in SOURCES]
    return [path for path in paths if "__pycache__" not in path.parts]


@pytest.mark.parametrize("folder", LIMITS)
def test_modules_are_short(folder: str) -> None:
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text("utf-8").splitlines()) for path in modules(folder)
    }
    assert len(lines) > 10
    long = {name: count for name, count in lines.items() if count > LIMITS[folder]}
    assert not long, f"split these by subject: more than {LIMITS[folder]} lines"


def test_the_root_of_the_package_has_few_entries() -> None:
    root = ROOT / "natcompat"
    entries = {path.stem for path in root.glob("*.py")} - {"__init__"}
    entries |= {path.parent.name for path in root.glob("*/__init__.py")}
    assert 5 < len(entries) <= LARGEST_ROOT, sorted(entries)


def test_every_module_says_what_it_holds() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in modules("natcompat")
        if path.suffix == ".py" and not path.read_text("utf-8").startswith('"""')
    ]
    assert not silent


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the package, in which edges can be added."""
    if not (ROOT / ".venv" / "bin" / "lint-imports").exists():
        pytest.skip("import-linter is not installed: pip install 'natcompat[check]'")
    copy = tmp_path_factory.mktemp("tree")
    shutil.copytree(
        ROOT / "natcompat", copy / "natcompat", ignore=shutil.ignore_patterns("__pycache__", "*.so")
    )
    shutil.copy(ROOT / "pyproject.toml", copy)
    return copy


def lint(tree: Path) -> tuple[int, str]:
    """Return status and output of the checker that `make check` runs."""
    done = subprocess.run(
        [str(ROOT / ".venv" / "bin" / "lint-imports"), "--no-cache", "--no-logo"],
        cwd=tree,
        env={"PYTHONPATH": str(tree), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def test_imports_go_down(tree: Path) -> None:
    status, output = lint(tree)
    assert status == 0, output


TYPE_CHECKING = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    "


@pytest.mark.parametrize(
    ("module", "line", "words"),
    [
        ("kernel/verbs.py", "from natcompat.esp.userspace import UserspaceIPsec", "natcompat.kernel is not"),
        ("errors.py", f"{TYPE_CHECKING}from natcompat.contract import Verdict", "natcompat.errors is not"),
        (
            "kernel/verbs.py",
            f"{TYPE_CHECKING}from natcompat.commands.main import main",
            "natcompat.kernel is not",
        ),
        ("esp/userspace.py", "from natcompat.endpoint.stats import Stats", "natcompat.esp is not"),
        ("esp/engine/replay.py", "from natcompat.esp.carrier import mtu", "natcompat.esp.engine is not"),
        ("ike/nat.py", "from natcompat.ike.child import ChildSa", ".nat -> .child"),
    ],
    ids=["up", "sideways, for types", "up, for types", "between siblings", "up within esp", "a circle"],
)
def test_an_edge_that_goes_up_is_found(tree: Path, module: str, line: str, words: str) -> None:
    path = tree / "natcompat" / module
    source = path.read_text("utf-8")
    try:
        path.write_text(f"{source}\n{line}\n", "utf-8")
        status, output = lint(tree)
    finally:
        path.write_text(source, "utf-8")
    assert status == 1
    assert words in output
