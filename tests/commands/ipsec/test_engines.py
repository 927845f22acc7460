"""``natcompat sad``, ``spd``, ``events`` and ``top`` show running user-space IPsec beside the kernel's."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from natcompat.commands.ipsec import sources
from natcompat.commands.ipsec.engines import Engine, directories, engines
from natcompat.commands.ipsec.lines import event_line
from natcompat.errors import NatCompatError
from natcompat.esp.control_socket import ControlSocket
from natcompat.esp.userspace import UserspaceIPsec, open_process_ipsec
from natcompat.ipsec import Direction, Lifetime
from tests.support.esp import policy, sa
from tests.support.running import COMMAND, NOBODY, becomes_nobody, environment, run_on_terminal

if not hasattr(socket, "AF_UNIX") or not hasattr(os, "geteuid"):
    pytest.skip("needs unix sockets", allow_module_level=True)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NATCOMPAT_CONTROL", str(tmp_path / "control"))
    return tmp_path / "control"


@pytest.fixture
def ipsec(directory: Path) -> Iterator[UserspaceIPsec]:
    with open_process_ipsec(device="queue") as opened:
        opened.add_sa(sa(Direction.OUT))
        opened.add_policy(policy(Direction.OUT))
        yield opened


def natcompat(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], capture_output=True, text=True, env=environment(), timeout=60, check=False
    )


def rows_of(done: subprocess.CompletedProcess[str], engine: str = "userspace") -> list[dict[str, Any]]:
    assert done.returncode == 0, done.stderr
    return [row for row in json.loads(done.stdout) if row["engine"] == engine]


@pytest.mark.usefixtures("ipsec")
def test_sas_say_which_engine_has_them() -> None:
    (row,) = rows_of(natcompat("sad", "--json"))
    assert (row["spi"], row["pid"], row["encryption"]) == ("0xc0de0001", os.getpid(), "AES_GCM_16")
    assert not {"encryption_key", "integrity_key"} & row.keys()
    line = next(line for line in natcompat("sad").stdout.splitlines() if "0xc0de0001" in line)
    assert line.startswith(f"pid {os.getpid()}  ")


@pytest.mark.usefixtures("ipsec")
def test_keys_of_engines_are_never_shown() -> None:
    if os.geteuid() != 0:
        pytest.skip("--show-keys is for root")
    done = natcompat("sad", "--json", "--show-keys")
    assert bytes(sa(Direction.OUT).encryption_key).hex() not in done.stdout
    assert rows_of(done)


@pytest.mark.usefixtures("ipsec")
def test_policies_say_which_engine_has_them() -> None:
    (row,) = rows_of(natcompat("spd", "--json"))
    assert (row["direction"], row["pid"]) == ("out", os.getpid())
    assert f"pid {os.getpid()}" in natcompat("spd").stdout


def test_top_counts_packets_of_engines(ipsec: UserspaceIPsec) -> None:
    done = natcompat("top", "--json", "--count", "2", "--interval", "0.2")
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2
    assert [row["engine"] for row in lines[1] if row["SPI"] == "0xc0de0001"] == [f"pid {os.getpid()}"]


def test_a_table_on_a_terminal(ipsec: UserspaceIPsec) -> None:
    status, shown = run_on_terminal("sad")
    assert status == 0
    assert "0xc0de0001" in shown


def listen(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [*COMMAND, "events", "--json", *arguments], stdout=subprocess.PIPE, text=True, env=environment()
    )


def expire_until_the_end_of(listener: subprocess.Popen[str], ipsec: UserspaceIPsec) -> list[dict[str, Any]]:
    """Let SAs expire, one a second, until the command has seen enough, however late it began to listen."""
    with listener:
        for spi in range(0x7001, 0x7040):
            ipsec.add_sa(sa(Direction.OUT, spi=spi, lifetime=Lifetime(soft_seconds=1, hard_seconds=2)))
            with contextlib.suppress(subprocess.TimeoutExpired):
                listener.wait(1)
                break
        listener.kill()
        assert listener.stdout is not None
        return [json.loads(line) for line in listener.stdout]


def test_events_of_engines_arrive(ipsec: UserspaceIPsec) -> None:
    events = expire_until_the_end_of(listen("--count", "6"), ipsec)
    assert len(events) == 6
    assert {event["event"] for event in events} == {"soft expire", "hard expire"}
    assert {event["pid"] for event in events} == {os.getpid()}
    assert all(int(event["spi"], 16) >= 0x7001 for event in events)


def test_events_of_an_engine_that_begins_later_arrive(directory: Path) -> None:
    """And the command goes on when one ends."""
    with open_process_ipsec(device="queue"):
        listener = listen("--count", "1")
        threading.Event().wait(2)
    with open_process_ipsec(device="queue") as later:
        (event,) = expire_until_the_end_of(listener, later)
    assert event["pid"] == os.getpid()


def test_nothing_to_report_in_time(ipsec: UserspaceIPsec) -> None:
    done = natcompat("events", "--timeout", "0.3")
    assert (done.returncode, done.stdout) == (0, "")


def test_usual_causes_are_told_to_people() -> None:
    row = {
        "event": "integrity failure",
        "spi": "0x1",
        "count": 3,
        "engine": "userspace",
        "pid": 7,
        "time": 1.0,
    }
    line = event_line(row)
    assert "pid 7  integrity failure  spi 0x1  count 3" in line
    assert "another key" in line


# --- the kernel's share ----------------------------------------------------------------------------


def refuse() -> None:
    raise NatCompatError(1, "asking the kernel takes CAP_NET_ADMIN", "Run as root")


def test_without_the_kernel_engines_are_shown_with_a_remark(
    ipsec: UserspaceIPsec, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sources, "open_kernel", refuse)
    with sources.Sources() as shown:
        assert [row["engine"] for row in shown.sas()] == ["userspace"]
        assert [row["engine"] for row in shown.policies()] == ["userspace"]
    remark = capsys.readouterr().err
    assert remark == "natcompat: without the kernel's: asking the kernel takes CAP_NET_ADMIN. Run as root.\n"


@pytest.mark.usefixtures("directory")
def test_without_kernel_and_engines_the_command_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    import click

    monkeypatch.setattr(sources, "open_kernel", refuse)
    for method in (
        lambda shown: shown.sas(),
        lambda shown: shown.policies(),
        lambda shown: list(shown.events(1)),
    ):
        with sources.Sources() as shown, pytest.raises(click.ClickException, match="CAP_NET_ADMIN"):
            method(shown)


def test_engines_of_another_network_namespace_are_left_out(directory: Path) -> None:
    if sys.platform != "linux" or os.geteuid() != 0:
        pytest.skip("a network namespace takes root on Linux")
    program = "import time; from natcompat.esp.userspace import open_process_ipsec\n"
    program += "with open_process_ipsec(device='queue'): print('ready', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        ["unshare", "--net", sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        text=True,
        env=environment({"NATCOMPAT_CONTROL": str(directory)}),
    )
    with process:
        assert process.stdout is not None
        if process.stdout.readline() != "ready\n":
            pytest.skip("there are no network namespaces here")
        try:
            assert list(engines("sas")) == []
            (engine,) = engines("sas", everywhere=True)
            engine.close()
        finally:
            process.kill()


# --- hostile answers -------------------------------------------------------------------------------

ROW = {
    "spi": "0x1", "source": "a", "destination": "b", "state": "mature", "description": "", "packets": 1,
    "octets": 2, "added": 1.0, "replay_drops": 0, "window_drops": 0, "integrity_drops": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "row",
    [
        {},
        {**ROW, "packets": "many"},
        {**ROW, "spi": None},
        {**ROW, "added": "\x1b[2J"},
        {**ROW, "replay_drops": []},
    ],
    ids=["empty", "packets", "spi", "added", "drops"],
)
def test_objects_of_another_form_are_left_out(directory: Path, row: dict[str, Any]) -> None:
    control = ControlSocket({"sas": lambda: [row, ROW]})
    control.start()
    try:
        assert len(rows_of(natcompat("sad", "--json"))) == 1
        assert natcompat("sad").returncode == 0
    finally:
        control.close()


def test_hostile_values_are_shown_harmlessly(directory: Path) -> None:
    control = ControlSocket(
        {"sas": lambda: [{**ROW, "source": "\x1b[2J[red]", "added": 1e308 * 10, "encryption": {}}]}
    )
    control.start()
    try:
        for _ in range(2):
            done = natcompat("sad")
            assert "\x1b" not in done.stdout + done.stderr
            assert "Traceback" not in done.stderr
    finally:
        control.close()


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\n",
        b"[]\n",
        b'{"pid": "x"}\n',
        b"x" * (1 << 20),
        b'{"pid": 1, "requests": ["sas"]}\nnonsense\n',
        b'{"pid": 1, "requests": ["sas"]}\n{"added": NaN}\n',
        b'{"pid": 1, "requests": ["sas"]}\n{"error": "no"}\n',
        b'{"pid": 1, "requests": ["sas"]}\n' + b"[" * 50000 + b"\n",
    ],
)
def test_any_answer_is_survived(directory: Path, answer: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("natcompat.commands.ipsec.engines.PATIENCE", 0.5)
    directory.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(directory / "7-0.sock"))
        listener.listen(4)

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    client, _ = listener.accept()
                    with client, contextlib.suppress(OSError):
                        client.sendall(answer)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        for engine in engines("sas"):
            with engine, contextlib.suppress(OSError, ValueError):
                list(engine.ask("sas"))
        listener.shutdown(socket.SHUT_RDWR)
        thread.join(5)


@becomes_nobody
def test_a_directory_of_another_user_has_to_be_served_by_its_owner(directory: Path) -> None:
    directory.mkdir(mode=0o700)
    control = ControlSocket({"sas": lambda: [ROW]})
    control.start()
    assert control.path is not None
    Engine(control.path).close()
    os.chown(directory, NOBODY, -1)
    with pytest.raises(PermissionError):
        Engine(control.path)
    os.chown(directory, 0, -1)
    control.close()


@pytest.mark.usefixtures("directory")
def test_no_socket_no_question(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATCOMPAT_CONTROL", "none")
    assert directories() == []
    assert list(engines("sas")) == []
