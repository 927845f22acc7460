"""What happens in the lab counts outside: failures fail, and a lab that cannot run skips, except in CI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

TESTS = """
import os
import pytest

def test_outside():
    assert "NATCOMPAT_LAB_RESULTS" not in os.environ

@pytest.mark.kernel_esp
def test_inside():
    assert os.environ["NATCOMPAT_LAB_RESULTS"]

@pytest.mark.kernel_esp
def test_fails():
    assert 6 * 7 == 54, "the answer"

@pytest.mark.kernel_esp
def test_skips():
    pytest.skip("a reason of its own")

@pytest.mark.kernel_esp
def test_dies():
    if "NATCOMPAT_LAB_DIE" in os.environ.get("PATH", ""):
        os._exit(3)

@pytest.mark.kernel_esp
@pytest.mark.parametrize("which", ["a", "b"])
def test_parametrised(which):
    assert which in "ab"
"""


def run(directory: Path, **environment: str) -> str:
    (directory / "conftest.py").write_text('pytest_plugins = ("tests.lab.plugin",)\n')
    (directory / "test_some.py").write_text(TESTS)
    (directory / "pyproject.toml").write_text(
        '[tool.pytest.ini_options]\nmarkers = ["kernel_esp: in the lab"]\n'
    )
    hidden = ("CI", "NATCOMPAT_LAB", "PYTEST_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(hidden)}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-rA", "-p", "no:cacheprovider"],
        cwd=directory,
        env={**inherited, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


needs_root = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="makes namespaces, which takes root on Linux"
)


@needs_root
def test_results_of_the_inside_count_outside(tmp_path: Path) -> None:
    output = run(tmp_path, NATCOMPAT_LAB="native")
    assert "1 failed, 5 passed, 1 skipped" in output
    assert "FAILED test_some.py::test_fails - AssertionError: the answer" in output
    assert "assert (6 * 7) == 54" in output
    assert "a reason of its own" in output


@needs_root
def test_an_inside_that_dies_fails_what_it_did_not_run(tmp_path: Path) -> None:
    output = run(tmp_path, NATCOMPAT_LAB="native", PATH=os.environ["PATH"] + ":/NATCOMPAT_LAB_DIE")
    assert "4 failed, 2 passed, 1 skipped" in output
    assert "no result came out of the lab" in output


def test_without_a_kernel_the_reason_is_said(tmp_path: Path) -> None:
    output = run(tmp_path, NATCOMPAT_LAB="guest", UML_KERNEL="/nonexistent/linux.uml")
    assert "1 passed, 6 skipped" in output
    assert "no kernel with ESP" in output
    assert "/nonexistent/linux.uml" in output


def test_in_ci_a_lab_that_does_not_run_is_a_failure(tmp_path: Path) -> None:
    output = run(tmp_path, NATCOMPAT_LAB="guest", UML_KERNEL="/nonexistent/linux.uml", CI="true")
    assert "1 passed, 6 errors" in output or "6 failed, 1 passed" in output
