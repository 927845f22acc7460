"""`natcompat sad`, `spd`, `events` and `top` on what is really installed."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from natcompat.commands import ipsec as ipsec_cli
from natcompat.commands.ipsec.lines import policy_columns, sa_columns
from natcompat.commands.main import natcompat
from natcompat.ipsec import Direction, Lifetime, Policy, TrafficSelector, UDPEncapsulation
from natcompat.ipsec.describe import describe_selector
from natcompat.kernel.xfrm.kernel import XfrmIPsec
from tests.kernel.xfrm.test_probe import as_nobody
from tests.lab.making import cbc, make, tunnel
from tests.lab.topology import wait_for
from tests.support.running import becomes_nobody, run_on_terminal

KEY = bytes(range(1, 21)).hex()


def call(*arguments: str) -> Result:
    return CliRunner().invoke(natcompat, arguments, catch_exceptions=False)


@pytest.fixture
def populated(ipsec: XfrmIPsec) -> XfrmIPsec:
    ipsec.add_sa(make(0x1001, encapsulation=UDPEncapsulation(local_port=4500, remote_port=34567), mark=3))
    ipsec.add_sa(cbc(0x1002, lifetime=Lifetime(hard_seconds=1000)))
    ipsec.allocate_spi("192.0.2.2", "192.0.2.1")
    ipsec.add_policy(tunnel())
    ipsec.add_policy(tunnel(Direction.OUT))
    return ipsec


@pytest.mark.kernel_esp
def test_sad_as_json(populated: XfrmIPsec) -> None:
    rows = {row["spi"]: row for row in json.loads(call("sad", "--json").output)}
    assert len(rows) == 3
    first = rows["0x00001001"]
    assert (first["encryption"], first["encryption_bits"], first["mark"]) == (
        "AES_GCM_16",
        128,
        "0x3/0xffffffff",
    )
    assert (first["local_port"], first["remote_port"]) == (4500, 34567)
    second = rows["0x00001002"]
    assert (second["integrity"], second["lifetime"]) == ("HMAC_SHA2_256_128", {"hard_seconds": 1000})
    assert [row["state"] for row in rows.values()].count("larval") == 1


@pytest.mark.kernel_esp
@pytest.mark.parametrize("command", ["sad", "spd", "top --count 1"])
def test_plain_text_has_no_keys_and_no_escapes(populated: XfrmIPsec, command: str) -> None:
    output = call(*command.split()).output
    assert len(output.splitlines()) >= 3
    assert KEY not in output.replace(" ", "")
    assert "\x1b" not in output


@pytest.mark.kernel_esp
def test_keys_only_when_asked_for_by_root(populated: XfrmIPsec) -> None:
    assert KEY not in call("sad", "--json").output
    assert KEY in call("sad", "--json", "--show-keys").output
    assert KEY in call("sad", "--show-keys").output
    status, output = as_nobody(lambda: _status(call("sad", "--show-keys")))
    assert status == 1
    assert "root only" in output


def _status(result: Result) -> list[Any]:
    return [result.exit_code, result.output]


@pytest.mark.kernel_esp
def test_spd(populated: XfrmIPsec) -> None:
    rows = json.loads(call("spd", "--json").output)
    assert [row["direction"] for row in rows] == ["in", "out"]
    assert rows[0]["selector"] == "10.2.0.0/24 to 10.1.0.0/16"
    text = call("spd").output
    assert "192.0.2.1 to 192.0.2.2" in text
    assert "never" in text


@pytest.mark.kernel_esp
@pytest.mark.parametrize("json_output", [True, False], ids=["JSON", "plain"])
def test_events(ipsec: XfrmIPsec, json_output: bool) -> None:
    timer = threading.Timer(
        0.5, lambda: ipsec.add_sa(make(lifetime=Lifetime(soft_seconds=1, hard_seconds=2)))
    )
    timer.start()
    output = call("events", "--count", "2", "--timeout", "30", *["--json"] * json_output).output
    timer.join()
    if json_output:
        found = [json.loads(line) for line in output.splitlines()]
        assert [each["event"] for each in found] == ["soft expire", "hard expire"]
        assert found[0]["spi"] == "0xc0de0001"
    else:
        assert "hard expire  spi 0xc0de0001" in output


@pytest.mark.kernel_esp
def test_nothing_to_report_in_time() -> None:
    assert call("events", "--timeout", "0.2").output == ""


@pytest.mark.kernel_esp
@pytest.mark.parametrize("command", ["sad", "spd", "top --count 2 --interval 0.1"])
def test_tables_on_a_terminal(populated: XfrmIPsec, command: str) -> None:
    status, shown = run_on_terminal(*command.split(), width=200)
    assert status == 0, shown
    assert "┃" in shown
    assert KEY not in shown


@pytest.mark.kernel_esp
@pytest.mark.parametrize("width", [40, 60, 80])
def test_narrow_terminals_break_no_values(populated: XfrmIPsec, width: int) -> None:
    for command, columns in (("sad", sa_columns), ("spd", policy_columns)):
        status, shown = run_on_terminal(command, width=width)
        assert status == 0, shown
        values = [columns(row).values() for row in json.loads(call(command, "--json").output)]
        words = {word for row in values for value in row for word in str(value).split()}
        assert [word for word in sorted(words) if word not in shown] == []


@pytest.mark.kernel_esp
@pytest.mark.parametrize("command", ["sad", "spd"])
def test_nothing_is_said_to_be_nothing(ipsec: XfrmIPsec, command: str) -> None:
    status, shown = run_on_terminal(command)
    assert status == 0
    assert shown.strip().endswith(": none in this network namespace")
    assert (call(command).output, json.loads(call(command, "--json").output)) == ("", [])


@pytest.mark.kernel_esp
def test_every_key_is_documented(populated: XfrmIPsec) -> None:
    keys = {key for row in json.loads(call("sad", "--json", "--show-keys").output) for key in row}
    keys |= {key for row in json.loads(call("spd", "--json").output) for key in row}
    keys |= {key for row in json.loads(call("top", "--json", "--count", "1").output) for key in row}
    assert len(keys) > 40
    assert [key for key in sorted(keys) if f"``{key}``" not in (ipsec_cli.__doc__ or "")] == []


@pytest.mark.skipif(os.geteuid() != 0, reason="opening XFRM takes root")
@pytest.mark.parametrize(
    ("command", "started"),
    [("events", ""), ("top --interval 0.1", "Busiest"), ("top --json --interval 0.1", "[]")],
    ids=["events", "live view", "JSON"],
)
def test_interrupted_it_ends_without_a_word(command: str, started: str) -> None:
    terminal, end = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "natcompat", *command.split()],
        stdin=end,
        stdout=end,
        stderr=end,
        env={**os.environ, "TERM": "xterm-256color"},
    )
    os.close(end)
    shown = b""
    try:
        if started:
            while started.encode() not in shown:
                shown += os.read(terminal, 4096)
        else:  # until it waits for events
            waits = Path(f"/proc/{process.pid}/wchan")
            wait_for("the wait", lambda: "poll" in waits.read_text() or "select" in waits.read_text(), 60)
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(OSError):
            while chunk := os.read(terminal, 4096):
                shown += chunk
        assert process.wait(30) == 130
    finally:
        process.kill()
        process.wait(30)
        os.close(terminal)
    assert b"Traceback" not in shown
    assert b"Aborted" not in shown


@pytest.mark.parametrize("command", ["sad", "spd", "events", "top"])
def test_help_says_what_it_takes_and_how_it_ends(command: str) -> None:
    text = call(command, "--help").output
    for part in ("CAP_NET_ADMIN", "Exit status:", "Examples:", f"natcompat {command}"):
        assert part in text


@pytest.mark.kernel_esp
def test_top_counts(ipsec: XfrmIPsec) -> None:
    ipsec.add_sa(make())
    lines = [
        json.loads(line)
        for line in call("top", "--json", "--count", "2", "--interval", "0.1").output.splitlines()
    ]
    assert [line[0]["packets/s"] for line in lines] == [0, 0]


@becomes_nobody
def test_without_privilege_there_is_one_sentence() -> None:
    status, output = as_nobody(lambda: _status(call("sad")))
    assert status == 1
    assert output.startswith("Error: ")
    assert "CAP_NET_ADMIN" in output
    assert "Traceback" not in output


def test_selectors_in_words() -> None:
    selector = TrafficSelector(
        source="10.0.0.0/8", destination="10.1.0.1", protocol=6, source_port=80, destination_port=90
    )
    assert describe_selector(selector) == "10.0.0.0/8 port 80 to 10.1.0.1 port 90 tcp"
    policy = Policy(direction=Direction.IN, selector=selector, source="192.0.2.1", destination="192.0.2.2")
    assert policy.selector is selector
