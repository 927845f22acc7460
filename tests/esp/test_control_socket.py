"""The control socket of user-space IPsec: read only, for the owner and root, bounded, and gone at the end."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from natcompat.errors import NatCompatError
from natcompat.esp import control_socket
from natcompat.esp.control_directory import stale
from natcompat.esp.control_socket import LONGEST_REQUEST, MOST_CLIENTS, MOST_ROWS, ControlSocket
from natcompat.esp.userspace import UserspaceIPsec, open_process_ipsec
from natcompat.ipsec import Direction, Expire, IPAddress, Lifetime
from tests.support.esp import policy, sa
from tests.support.running import NOBODY, becomes_nobody, environment

if not hasattr(socket, "AF_UNIX") or not hasattr(os, "fork"):
    pytest.skip("needs unix sockets", allow_module_level=True)


@pytest.fixture
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("NATCOMPAT_CONTROL", str(tmp_path / "control"))
    return tmp_path / "control"


@pytest.fixture
def ipsec(directory: Path) -> Iterator[UserspaceIPsec]:
    with open_process_ipsec(device="queue") as opened:
        yield opened


def only(directory: Path) -> Path:
    (path,) = directory.iterdir()
    return path


@contextlib.contextmanager
def connected(path: Path) -> Iterator[io.BufferedRWPair]:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(str(path))
        with sock.makefile("rwb") as file:
            yield file


def ask(path: Path, request: str) -> list[dict[str, Any]]:
    with connected(path) as file:
        assert json.loads(file.readline())["protocol"] == 1
        file.write(json.dumps({"request": request}).encode() + b"\n")
        file.flush()
        return [json.loads(line) for line in file]


def test_sas_and_policies_are_shown_without_keys(directory: Path, ipsec: UserspaceIPsec) -> None:
    association = sa(Direction.OUT)
    ipsec.add_sa(association)
    ipsec.add_policy(policy(Direction.OUT))
    *rows, end = ask(only(directory), "sas")
    assert end == {"end": True}
    assert [row["spi"] for row in rows] == [f"0x{association.spi:08x}"]
    shown = json.dumps(rows)
    for key in (association.encryption_key, association.encryption_key[:-4]):
        assert bytes(key).hex() not in shown
    (row, _) = ask(only(directory), "policies")
    assert row["direction"] == "out"
    (row, _) = ask(only(directory), "engine")
    assert row["datapath"] == ipsec.datapath


def test_the_greeting_names_process_and_namespace(directory: Path, ipsec: UserspaceIPsec) -> None:
    with connected(only(directory)) as file:
        greeting = json.loads(file.readline())
    assert greeting["pid"] == os.getpid()
    assert {"sas", "policies", "engine", "events"} <= set(greeting["requests"])
    if sys.platform == "linux":
        assert greeting["netns"] == os.stat("/proc/self/ns/net").st_ino


def test_events_are_streamed_until_the_engine_closes(directory: Path) -> None:
    with open_process_ipsec(device="queue") as ipsec, connected(only(directory)) as file:
        file.readline()
        file.write(b'{"request": "events"}\n')
        file.flush()
        assert json.loads(file.readline()) == {"listening": True}
        sa_id = ipsec.add_sa(sa(Direction.OUT, lifetime=Lifetime(soft_seconds=1, hard_seconds=1000)))
        event = json.loads(file.readline())
        assert (event["event"], event["spi"]) == ("soft expire", f"0x{sa_id.spi:08x}")
        ipsec.close()
        assert file.readline() == b""


def test_modes_and_the_end(directory: Path) -> None:
    threads = threading.active_count()
    with open_process_ipsec(device="queue"):
        path = only(directory)
        assert path.name == f"{os.getpid()}-0.sock"
        assert path.lstat().st_mode & 0o777 == 0o600
        assert directory.stat().st_mode & 0o777 == 0o700
    assert list(directory.iterdir()) == []
    deadline = time.monotonic() + 5
    while threading.active_count() > threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() <= threads


def test_every_engine_has_a_socket(directory: Path, ipsec: UserspaceIPsec) -> None:
    from natcompat.esp.device.queue import QueueDevice

    with UserspaceIPsec(QueueDevice()):
        assert sorted(path.name for path in directory.iterdir()) == [
            f"{os.getpid()}-{number}.sock" for number in (0, 1)
        ]
    assert [path.name for path in directory.iterdir()] == [f"{os.getpid()}-0.sock"]


# --- who gets none ---------------------------------------------------------------------------------


def test_none_means_none(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATCOMPAT_CONTROL", "none")
    with open_process_ipsec(device="queue"):
        assert not directory.exists()


@pytest.mark.parametrize("value", ["no", "control", "./control"])
def test_a_wrong_setting_is_refused_and_leaves_nothing(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATCOMPAT_CONTROL", value)
    threads = threading.active_count()
    with pytest.raises(NatCompatError, match="NATCOMPAT_CONTROL") as caught:
        open_process_ipsec(device="queue")
    assert "none" in caught.value.remedy
    assert threading.active_count() == threads
    monkeypatch.undo()
    open_process_ipsec(device="queue").close()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: (path.mkdir(), path.chmod(0o755)),
        lambda path: path.write_text("a file"),
        lambda path: path.symlink_to("/tmp"),
        lambda path: path.symlink_to(path.name),
    ],
    ids=["others may look", "a file", "a link", "a loop"],
)
def test_ipsec_works_without_a_directory_for_the_socket(
    directory: Path, spoil: Callable[[Path], object]
) -> None:
    spoil(directory)
    with open_process_ipsec(device="queue") as ipsec:
        ipsec.add_sa(sa(Direction.OUT))
    assert not directory.is_dir() or directory.is_symlink() or list(directory.iterdir()) == []


@becomes_nobody
def test_other_users_are_not_answered(directory: Path, ipsec: UserspaceIPsec) -> None:
    """Even if somebody opens the directory and the socket to them."""
    path = only(directory)
    path.chmod(0o777)
    for parent in path.parents:
        if parent.stat().st_uid != os.geteuid() or parent.parent == parent:
            break
        if not parent.stat().st_mode & 0o001:
            parent.chmod(0o711)
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.setgid(NOBODY)
        os.setuid(NOBODY)
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(10)
            try:
                sock.connect(str(path))
                answer = sock.recv(100)
            except OSError as error:
                answer = repr(error).encode()
        os.write(writer, b"<" + answer + b">")
        os._exit(0)
    os.waitpid(child, 0)
    assert os.read(reader, 1000) in (b"<>", b"<ConnectionResetError(104, 'Connection reset by peer')>")
    os.close(reader)
    os.close(writer)


# --- bounds ----------------------------------------------------------------------------------------


def fail() -> list[dict[str, int]]:
    raise RuntimeError("a fault of the engine")


@pytest.fixture
def control(directory: Path) -> Iterator[ControlSocket]:
    served = ControlSocket({"many": lambda: ({"n": n} for n in range(MOST_ROWS + 5)), "bad": fail})
    served.start()
    yield served
    served.close()


def test_an_answer_is_bounded(directory: Path, control: ControlSocket) -> None:
    rows = ask(only(directory), "many")
    assert len(rows) == MOST_ROWS + 1
    assert rows[-1] == {"end": True, "truncated": True}


@pytest.mark.parametrize(
    "request_line",
    [
        b"\n",
        b"[]\n",
        b'{"request": 3}\n',
        b'{"request": "delete"}\n',
        b"\xff\xfe\n",
        b"[" * (LONGEST_REQUEST - 1) + b"\n",
        b"x" * (LONGEST_REQUEST * 3),
        b'{"request": "bad"}\n',
    ],
)
def test_any_request_ends_and_harms_nothing(
    directory: Path, control: ControlSocket, request_line: bytes
) -> None:
    with connected(only(directory)) as file:
        file.readline()
        with contextlib.suppress(OSError):
            file.write(request_line)
            file.flush()
            assert len(file.read()) < 200
    assert ask(only(directory), "many")[0] == {"n": 0}


def test_clients_are_bounded_in_number_and_time(
    directory: Path, control: ControlSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Those that say nothing hold their places for a while, and no longer."""
    monkeypatch.setattr(control_socket, "PATIENCE", 0.5)
    path = only(directory)
    with contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connected(path)) for _ in range(MOST_CLIENTS)]
        for file in silent:
            assert file.readline()
        with connected(path) as refused, contextlib.suppress(ConnectionResetError):
            assert refused.readline() == b""
        for file in silent:
            assert file.readline() == b""
    assert len(ask(path, "many")) > 1


def test_a_client_that_does_not_read_is_cut_off(
    directory: Path, control: ControlSocket, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(control_socket, "PATIENCE", 0.3)
    with connected(only(directory)) as file:
        file.write(b'{"request": "many"}\n')
        file.flush()
        time.sleep(1.5)
        read = file.read()
    assert not read.endswith(b'"truncated": true}\n')


def test_close_does_not_wait_for_clients(directory: Path, control: ControlSocket) -> None:
    with connected(only(directory)) as silent, connected(only(directory)) as slow:
        silent.readline()
        slow.write(b'{"request": "many"}\n')
        slow.flush()
        time.sleep(0.2)
        began = time.monotonic()
        control.close()
        assert time.monotonic() - began < 2
    assert list(directory.iterdir()) == []


def test_descriptors_above_1024_are_served(directory: Path) -> None:
    """select() knows none of those; a daemon with many sockets has them."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    if before[1] < 3000:
        pytest.skip("the limit of descriptors is too low")
    resource.setrlimit(resource.RLIMIT_NOFILE, (3000, before[1]))
    held = [os.open(os.devnull, os.O_RDONLY) for _ in range(1100)]
    try:
        with open_process_ipsec(device="queue") as ipsec:
            ipsec.add_sa(sa(Direction.OUT))
            assert len(ask(only(directory), "sas")) == 2
    finally:
        for descriptor in held:
            os.close(descriptor)
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


# --- what processes leave --------------------------------------------------------------------------

PROGRAM = """
import sys, time
from natcompat.esp.userspace import open_process_ipsec
with open_process_ipsec(device="queue"):
    print("ready", flush=True)
    time.sleep(60)
"""


@contextlib.contextmanager
def other_process(directory: Path) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdout=subprocess.PIPE,
        text=True,
        env=environment({"NATCOMPAT_CONTROL": str(directory)}),
    )
    assert process.stdout is not None
    with process:
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_what_a_killed_process_left_is_removed_and_nothing_else(directory: Path) -> None:
    with other_process(directory) as living, other_process(directory) as dead:
        dead.kill()
        dead.wait()
        names = {f"{living.pid}-0.sock", f"{dead.pid}-0.sock"}
        assert {path.name for path in directory.iterdir()} == names
        assert [path.name for path in stale(directory)] == [f"{dead.pid}-0.sock"]
        (directory / "notes.txt").write_text("somebody's")
        with open_process_ipsec(device="queue"):
            left = {path.name for path in directory.iterdir()}
        assert left == {f"{living.pid}-0.sock", f"{os.getpid()}-0.sock", "notes.txt"}


def test_a_forked_child_serves_and_removes_nothing(directory: Path, ipsec: UserspaceIPsec) -> None:
    path = only(directory)
    child = os.fork()
    if not child:
        try:
            ipsec.close()
        finally:
            signal.pause()
    try:
        ipsec.add_sa(sa(Direction.OUT))
        assert len(ask(path, "sas")) == 2
        ipsec.close()
        assert not path.exists()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def test_expiries_have_the_form_that_the_commands_document() -> None:
    from natcompat.ipsec.describe import describe_event

    address: IPAddress = sa(Direction.OUT).destination
    row = describe_event(Expire(sa_id=sa(Direction.OUT).sa_id, reqid=7, hard=True))
    assert row == {"event": "hard expire", "spi": "0xc0de0001", "destination": str(address), "reqid": 7}
