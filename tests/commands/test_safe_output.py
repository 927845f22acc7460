"""Text from outside reaches no terminal and no log raw: the output layers replace control characters."""

from __future__ import annotations

import ast
import ctypes
import io
import json
import logging
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from rich.console import Console

from natcompat import NatCompatError
from natcompat.commands import report, tables
from natcompat.errors import get_logger
from tests.support.running import COMMAND, ROOT, becomes_nobody, environment, run_on_terminal

HOSTILE = "\x1b]0;owned\x07\x1b[2J\u202e[red]x[/red]\nnatcompat: forged"
SHOWN = r"\x1b]0;owned\x07\x1b[2J\u202e[red]x[/red]\x0anatcompat: forged"

OUTPUT_LAYERS = {"natcompat/commands/report.py", "natcompat/commands/tables.py"}
"""The modules of the commands that may write. Each of their functions calls `printable`."""

WRITERS = {"print", "echo", "secho", "Console", "Text", "Live", "getLogger", "basicConfig", "warn", "warning"}
ALLOWED = {
    ("natcompat/commands/run.py", "print"),  # its own docstring
    ("natcompat/commands/verify/command.py", "Console"),  # a bar; its texts are printable and no markup
    ("natcompat/errors.py", "getLogger"),  # get_logger itself
}


def calls_that_write(path: Path) -> Iterator[str]:
    """Yield the names of the writing functions that a module calls."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            function = node.func
            name = function.id if isinstance(function, ast.Name) else getattr(function, "attr", "")
            stream = ast.unparse(function.value) if isinstance(function, ast.Attribute) else ""
            if name in ("write", "writelines") and "std" in stream:
                yield f"{stream}.{name}"
            elif name in WRITERS and not stream.endswith(("_log", "logger", "_reporter", "self")):
                yield name


def test_only_the_output_layers_write() -> None:
    found = {
        (name, call)
        for path in sorted((ROOT / "natcompat" / "commands").rglob("*.py"))
        if (name := str(path.relative_to(ROOT))) not in OUTPUT_LAYERS
        for call in calls_that_write(path)
    }
    assert found == {allowed for allowed in ALLOWED if "commands" in allowed[0]}


def test_every_module_logs_through_the_safe_logger() -> None:
    found = {
        (str(path.relative_to(ROOT)), call)
        for path in sorted((ROOT / "natcompat").rglob("*.py"))
        for call in calls_that_write(path)
        if call in ("getLogger", "basicConfig")
    }
    assert found == {allowed for allowed in ALLOWED if allowed[1] == "getLogger"}


@pytest.mark.parametrize(
    "text",
    [
        "click.echo(x)",
        "print(x)",
        "sys.stdout.write(x)",
        "Console()",
        "rich.text.Text(x)",
        "logging.getLogger()",
    ],
)
def test_the_search_finds_those_who_write(text: str, tmp_path: Path) -> None:
    module = tmp_path / "module.py"
    module.write_text(text)
    assert list(calls_that_write(module))


# --- what the layers do ----------------------------------------------------------------------------


def test_a_printer_replaces_control_characters() -> None:
    stream = io.StringIO()
    out = report.Printer(stream)
    out.heading(HOSTILE, HOSTILE)
    out.line("by ", report.bad(HOSTILE))
    out.table([HOSTILE, ""], [[HOSTILE, report.good(HOSTILE)]])
    assert stream.getvalue().count(SHOWN) == 6
    assert "\x1b" not in stream.getvalue()
    assert len(stream.getvalue().splitlines()) == 6


@pytest.mark.parametrize("width", [400, 70, 10], ids=["side by side", "stacked", "listed"])
def test_a_drawn_table_replaces_control_characters(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    console = Console(file=io.StringIO(), width=400, color_system=None)
    console.print(tables.table(HOSTILE, [{"name": HOSTILE, HOSTILE: 1}]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert shown.count(SHOWN) == 3
    assert "\x1b" not in shown


def test_lines_json_and_complaints_replace_control_characters(capsys: pytest.CaptureFixture[str]) -> None:
    tables.write_plain([{"name": HOSTILE}])
    report.write_line(HOSTILE)
    report.complain(HOSTILE)
    report.print_json({"name": HOSTILE + "\x7f\x9b"}, one_line=True)
    out, err = capsys.readouterr()
    assert err == f"natcompat: {SHOWN}.\n"
    *lines, last = out.splitlines()
    assert lines == ["name", SHOWN, SHOWN]
    assert json.loads(last) == {"name": HOSTILE + "\x7f\x9b"}
    assert last.isprintable()
    assert last.isascii()


def test_an_error_carries_no_control_characters() -> None:
    assert str(NatCompatError(1, HOSTILE, HOSTILE)) == f"[Errno 1] {SHOWN}. {SHOWN}"


def test_a_log_has_no_control_characters(caplog: pytest.LogCaptureFixture) -> None:
    log = get_logger("natcompat.test")
    assert get_logger("natcompat.test") is log
    log.warning("from %s", HOSTILE)
    try:
        raise ValueError(HOSTILE) from OSError(HOSTILE)
    except ValueError:
        log.exception("failed")
    formatted = [logging.Formatter("%(message)s").format(record) for record in caplog.records]
    assert formatted[0] == f"from {SHOWN}"
    assert f"ValueError: {SHOWN}" in formatted[1].splitlines()
    assert f"OSError: {SHOWN}" in formatted[1].splitlines()
    assert "\x1b" not in formatted[1]


@pytest.mark.parametrize("arguments", [(HOSTILE,), ("doctor", f"--{HOSTILE}"), ("tunnel", HOSTILE)])
def test_a_command_line_is_not_echoed_raw(arguments: tuple[str, ...]) -> None:
    done = subprocess.run(
        [*COMMAND, *arguments], capture_output=True, env=environment(), timeout=60, check=False
    )
    assert done.returncode in (1, 2)
    assert b"\x1b" not in done.stderr
    assert b"\nnatcompat: forged" not in done.stderr
    assert b"owned" in done.stderr


@becomes_nobody
def test_doctor_shows_the_names_of_others_harmlessly() -> None:
    """Another user's process holds UDP 4500, and gave itself a name that clears the screen."""
    ready, told = os.pipe()
    child = os.fork()
    if not child:
        os.setgid(65534)
        os.setuid(65534)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.bind(("127.0.0.1", 4500))
            ctypes.CDLL(None).prctl(15, b"\x1b]0;owned\x07\x1b[2J", 0, 0, 0)
            os.write(told, b"x")
            signal.pause()
        os._exit(0)
    try:
        os.read(ready, 1)
        _, terminal = run_on_terminal("doctor")
        piped = subprocess.run(
            [*COMMAND, "doctor"], capture_output=True, text=True, env=environment(), timeout=60, check=True
        ).stdout
    finally:
        os.kill(child, 9)
        os.waitpid(child, 0)
        os.close(ready)
        os.close(told)
    for shown in (terminal, piped):
        assert r"\x1b]0;owned" in shown
        assert "\x1b]0;" not in shown
