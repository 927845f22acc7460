"""The command behaves as a command of Unix should."""

from __future__ import annotations

import io
import os
import subprocess
import sys

import pytest
from rich.console import Console

import natcompat
from natcompat.commands.tables import table
from tests.support.running import COMMAND, environment, run, run_on_terminal


def test_version() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout) == (0, f"natcompat {natcompat.__version__}\n")


def test_version_loads_nothing_heavy() -> None:
    script = (
        "import sys\n"
        "sys.argv[1:] = ['--version']\n"
        "from natcompat.commands.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print({name.partition('.')[0] for name in sys.modules} & {'pyroute2', 'asyncio', 'rich', 'ctypes'})"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, env=environment(), check=True
    )
    assert done.stdout.splitlines()[-1] == "set()"


@pytest.mark.parametrize(
    "command",
    [(), ("doctor",), ("verify",), ("tunnel",), ("run",)],
    ids=str,
)
@pytest.mark.parametrize("option", ["--help", "-h"])
def test_help_is_a_manual_page(command: tuple[str, ...], option: str) -> None:
    done = run(*command, option)
    assert done.returncode == 0
    assert not done.stderr
    for heading in ("Usage: natcompat", "Exit status:", "Examples:", "Options:"):
        assert heading in done.stdout


def test_help_names_every_command() -> None:
    shown = run("--help").stdout
    assert "doctor" in shown
    assert "verify" in shown


@pytest.mark.parametrize(
    "arguments",
    [("nonsense",), ("--nonsense",), ("verify", "--backend"), ("doctor", "argument")],
    ids=" ".join,
)
def test_usage_errors(arguments: tuple[str, ...]) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert "Error: " in done.stderr
    assert not done.stdout


@pytest.mark.parametrize("name", ["no-such-backend", "verify,"])
def test_errors_name_the_remedy(name: str) -> None:
    done = run("verify", "--no-nat", "--backend", name)
    assert done.returncode == 1
    assert done.stderr.startswith("natcompat: ")
    assert "Choose among auto, linux, userspace, userspace:in-line" in done.stderr
    assert "Errno" not in done.stderr
    assert "Traceback" not in done.stderr


def test_closed_pipe_is_quiet() -> None:
    readable, writable = os.pipe()
    os.close(readable)
    with os.fdopen(writable, "w") as pipe:
        done = subprocess.run(
            [*COMMAND, "doctor"],
            stdout=pipe,
            stderr=subprocess.PIPE,
            env=environment(),
            check=False,
            timeout=60,
        )
    assert (done.returncode, done.stderr) == (141, b"")


def test_no_stdout_is_quiet() -> None:
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *COMMAND, "doctor", "--json"],
        stderr=subprocess.PIPE,
        env=environment(),
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_full_disk_is_an_error() -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "doctor"],
            stdout=full,
            stderr=subprocess.PIPE,
            env=environment(),
            check=False,
            timeout=60,
        )
    assert done.returncode == 1
    assert done.stderr == b"natcompat: [Errno 28] No space left on device.\n"


def test_colours_on_a_terminal_only() -> None:
    status, shown = run_on_terminal("doctor")
    assert status == 0
    assert "\x1b[" in shown
    assert "\x1b" not in run("doctor").stdout


@pytest.mark.skipif(sys.platform != "linux", reason="the variable is for Linux")
def test_errors_of_every_command_look_alike() -> None:
    done = run("sad", env={"NATCOMPAT_IPSEC": "no-such"})
    assert done.returncode == 1
    assert done.stderr.startswith("natcompat: there is no mapping of IPsec called 'no-such'")
    assert done.stderr.endswith("Choose among auto, xfrm, pfkey.\n")


@pytest.mark.parametrize("width", [40, 60, 80])
@pytest.mark.parametrize(
    ("source", "destination"),
    [("192.168.100.200", "203.0.113.200"), ("2001:db8:1234:5678:9abc:def0:1234:5678", "2001:db8::1")],
    ids=["IPv4", "IPv6"],
)
def test_values_stay_whole_on_a_narrow_terminal(
    monkeypatch: pytest.MonkeyPatch, width: int, source: str, destination: str
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    line = {"SPI": "0x00c0de01", "way": "out", "source": source, "destination": destination}
    line |= {"UDP": "4500-4500", "mode": "tunnel", "transform": "AES_GCM_16 256", "reqid": "16383"}
    line |= {"packets": "123456", "bytes": "12345678", "drops": "0", "age": "90 s"}
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(table("SAs", [line]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for text in (*line, *line.values()):
        assert text in shown


def test_words_wrap_before_a_table_becomes_a_list(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "44")
    line = {"way": "out", "selector": "10.0.0.0/8 to 10.1.0.0/16", "action": "protect", "mode": "tunnel"}
    line |= {"tunnel": "192.0.2.1 to 192.0.2.2", "reqid": "1"}
    console = Console(file=io.StringIO(), width=44, color_system=None)
    console.print(table("Policies", [line]))
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    assert "┃" in shown
    assert "10.0.0.0/8 to" in shown
    assert "10.1.0.0/16" in shown
