"""Pages name only what exists: links, anchors, modules and names, files, make targets, commands."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), ROOT / "tests" / "lab" / "README.md"]
HISTORY = "CHANGELOG.md"
"""Names what was, too."""

pytestmark = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def without_code(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def anchors(text: str) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_code(text), flags=re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading).strip().lower() for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text("utf-8"))):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name).resolve() if name else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file.read_text("utf-8")), target


def test_names_exist(page: Path) -> None:
    if page.name == HISTORY:
        return
    for name in sorted(set(re.findall(r"\bnatcompat(?:\.[A-Za-z_]\w*)+", page.read_text("utf-8")))):
        parts = name.split(".")
        if parts[-1] in ("toml", "dev", "git") or parts[:2] == ["natcompat", "backends"] == parts:
            continue
        for length in range(len(parts), 0, -1):
            try:
                found: object = importlib.import_module(".".join(parts[:length]))
            except ModuleNotFoundError as error:
                if error.name is None or not error.name.startswith("natcompat"):
                    pytest.skip(f"this system lacks {error.name}")
                continue
            for attribute in parts[length:]:
                found = getattr(found, attribute)
            break


def test_make_targets_exist(page: Path) -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(
        r"`?make ([a-z][a-z-]+)`? *(?:#|$|[`.,:;)])", page.read_text("utf-8"), re.MULTILINE
    ):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_commands_exist(page: Path) -> None:
    table = (ROOT / "natcompat" / "commands" / "main.py").read_text("utf-8")
    for command in re.findall(
        r"^[$#] (?:\.venv/bin/)?natcompat ([a-z]+)", page.read_text("utf-8"), re.MULTILINE
    ):
        assert f'"{command}":' in table, command
