"""``natcompat run`` and ``python -m natcompat.commands.run``: a program runs as under the interpreter."""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import natcompat
from natcompat.commands import run
from tests.support.running import COMMAND, environment

PROGRAM = """
import socket, sys
import neighbour
with socket.socket(type=socket.SOCK_DGRAM) as sock:
    sock.bind(("127.0.0.1", 0))
    sock.setsockopt(socket.IPPROTO_UDP, socket.UDP_NAT_T_ENDPOINT, 1)
    print(__name__, sock.getsockopt(17, 0x103), neighbour.NAME, sys.argv)
sys.exit(len(sys.argv))
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    (tmp_path / "neighbour.py").write_text("NAME = 'beside it'\n")
    (tmp_path / "program.py").write_text(PROGRAM)
    return tmp_path / "program.py"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., object]]:
    """Call `run.main` as ``python -m natcompat.commands.run`` would."""
    modules = set(sys.modules)

    def call(*arguments: str) -> object:
        monkeypatch.setattr(sys, "argv", ["natcompat.commands.run", *arguments])
        monkeypatch.setattr(sys, "path", ["where natcompat.commands.run is", *sys.path])
        return run.main()

    yield call
    natcompat.uninstall()
    for name in {"neighbour", "program"} & (set(sys.modules) - modules):
        del sys.modules[name]


def test_a_script_runs_as_python_would_run_it(
    program: Path, call: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        call(str(program), "-m", "--port=4500")
    assert end.value.code == 3
    assert capsys.readouterr().out == f"__main__ 1 beside it {[str(program), '-m', '--port=4500']}\n"


def test_a_script_may_end_without_exit(
    tmp_path: Path, call: Callable[..., object], capsys: pytest.CaptureFixture[str]
) -> None:
    script = tmp_path / "short.py"
    script.write_text("print('done')\n")
    assert call(str(script)) == 0
    assert capsys.readouterr().out == "done\n"


def test_a_module_runs_as_python_would_run_it(
    program: Path,
    call: Callable[..., object],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.syspath_prepend(program.parent)
    with pytest.raises(SystemExit) as end:
        call("-m", "program", "argument")
    assert end.value.code == 2
    assert capsys.readouterr().out == f"__main__ 1 beside it {[str(program), 'argument']}\n"


def test_a_module_may_end_without_exit(
    tmp_path: Path, call: Callable[..., object], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "neighbour.py").write_text("NAME = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert call("-m", "neighbour") == 0


USAGE: dict[str, tuple[list[str], int, str]] = {
    "no-program": ([], 2, "python -m natcompat.commands.run script.py"),
    "no-module": (["-m"], 2, "-m needs the name of a module"),
    "no-such-file": (["no/such/file.py"], 2, "there is no file no/such/file.py"),
    "a-directory": ([os.path.dirname(__file__)], 2, "there is no file"),
}


@pytest.mark.parametrize(("arguments", "status", "message"), USAGE.values(), ids=USAGE.keys())
def test_an_invalid_command_line_is_refused_with_a_message(
    arguments: list[str],
    status: int,
    message: str,
    call: Callable[..., object],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert call(*arguments) == status
    out, err = capsys.readouterr()
    assert message in err
    assert not out


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_is_printed(flag: str, call: Callable[..., object], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(flag) == 0
    assert "NATCOMPAT_BACKEND chooses" in capsys.readouterr().out


def test_run_is_a_module_to_run(program: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "natcompat.commands.run", str(program)],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.startswith("__main__ 1 beside it")


def test_the_module_ends_with_the_status_of_main(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["natcompat.commands.run", "--help"])
    monkeypatch.delitem(sys.modules, "natcompat.commands.run")
    with pytest.raises(SystemExit) as end:
        runpy.run_module("natcompat.commands.run", run_name="__main__")
    assert end.value.code == 0
    assert "script.py" in capsys.readouterr().out


# --- natcompat run --------------------------------------------------------------------------------


def natcompat_run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "run", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        cwd=cwd,
        check=False,
    )


def test_the_subcommand_runs_a_script_with_its_own_options(program: Path) -> None:
    done = natcompat_run(str(program), "--help", "-m", "--port=4500")
    assert (done.returncode, done.stderr) == (4, "")
    assert done.stdout == f"__main__ 1 beside it {[str(program), '--help', '-m', '--port=4500']}\n"


def test_the_subcommand_runs_a_module_of_the_current_directory(program: Path) -> None:
    done = natcompat_run("-m", "program", "-h", cwd=program.parent)
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.startswith("__main__ 1 beside it")


def test_errors_of_the_program_are_its_own(tmp_path: Path) -> None:
    script = tmp_path / "fails.py"
    script.write_text("raise OSError(28, 'No space left on device')\n")
    done = natcompat_run(str(script))
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback")
    assert "natcompat: " not in done.stderr


def test_sigterm_ends_the_program_as_it_ends_every_python_program(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text("import os, signal\nos.kill(os.getpid(), signal.SIGTERM)\n")
    assert natcompat_run(str(script)).returncode == -signal.SIGTERM


@pytest.mark.parametrize(
    ("arguments", "message"),
    [((), "Missing the program"), (("-m",), "name of a module"), (("no-such.py",), "there is no file")],
    ids=["no-program", "no-module", "no-such-file"],
)
def test_the_subcommand_refuses_what_cannot_run(arguments: tuple[str, ...], message: str) -> None:
    done = natcompat_run(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert not done.stdout
