"""The table of platforms has the contents of the reports of `natcompat verify`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = Path(__file__).parents[2] / "docs" / "platform_table.py"


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "natcompat",
        "verify",
        "--json",
        "--no-nat",
        "--backend",
        "userspace:in-line",
    ]
    content: dict[str, Any] = json.loads(subprocess.run(command, capture_output=True, check=True).stdout)
    return content


def make(directory: Path) -> list[list[str]]:
    command = [sys.executable, str(SCRIPT), *map(str, sorted(directory.glob("*.json")))]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_one_row_for_each_backend(tmp_path: Path, report: dict[str, Any]) -> None:
    (tmp_path / "verify-Somewhere, root.json").write_text(json.dumps(report))
    head, _, row = make(tmp_path)
    cells = dict(zip(head, row, strict=True))
    assert cells["platform"] == "Somewhere, root"
    assert cells["kernel"] == f"{report['platform']['system']} {report['platform']['release']}"
    assert cells["backend"] == "userspace:in-line"
    assert cells["ESP diverted by"] == "process"
    assert int(cells["checks"]) == sum(len(trial["outcomes"]) for trial in report["trials"])
    assert cells["differences"] == "0"


def test_differences_are_named(tmp_path: Path, report: dict[str, Any]) -> None:
    changed = json.loads(json.dumps(report))
    changed["trials"][0]["outcomes"][0]["passed"] = False
    (tmp_path / "verify-Elsewhere.json").write_text(json.dumps(changed))
    head, _, row = make(tmp_path)
    assert dict(zip(head, row, strict=True))["differences"] == report["trials"][0]["outcomes"][0]["row"]


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"platform": {}, "trials": 1}'])
def test_a_broken_report_is_a_row(tmp_path: Path, text: str) -> None:
    (tmp_path / "verify-Broken.json").write_text(text)
    *_, row = make(tmp_path)
    assert row[0] == "Broken"
    assert row[1].startswith("no report: ")
