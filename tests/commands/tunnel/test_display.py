"""What a running tunnel tells, in lines and in JSON."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from natcompat.commands.tunnel.display import Reporter, reporter
from natcompat.commands.tunnel.file import read_tunnel
from natcompat.ipsec import Direction, Expire
from tests.commands.tunnel.making import TUNNEL, write
from tests.support.esp import sa

ROWS = [{"SPI": "0x00001001", "way": "out", "packets": 3, "drops": 0}]


def tell(to: Reporter, path: Path) -> None:
    to.up(read_tunnel(path), "natcompat0", 1400)
    to.counters(ROWS, {"no_policy": 2, "short": 1})
    to.counters(ROWS, {})
    to.event(Expire(sa_id=sa(Direction.OUT).sa_id, reqid=0, hard=False))
    to.warn("the disk is full.")
    to.down(143)
    to.close()


def test_lines(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stream = io.StringIO()
    text = TUNNEL.replace("spi = 0x1002", "spi = 0x1002\nreplay_window = 0")
    tell(reporter(stream, as_json=False), write(tmp_path, text))
    lines = stream.getvalue().splitlines()
    assert lines[0].endswith("backend userspace, device natcompat0 with MTU 1400")
    assert lines[1].split() == ["SPI", "way", "packets", "drops"]
    assert "dropped: 2 no_policy, 1 short" in lines
    assert sum(line.startswith("0x00001001") for line in lines) == 2
    assert "soft expire  spi 0xc0de0001" in stream.getvalue()
    assert lines[-1].endswith("going down")
    warnings = capsys.readouterr().err.splitlines()
    assert "no replay window" in warnings[0]
    assert warnings[1] == "natcompat: the disk is full."


def test_json(tmp_path: Path) -> None:
    stream = io.StringIO()
    tell(reporter(stream, as_json=True), write(tmp_path))
    said = [json.loads(line) for line in stream.getvalue().splitlines()]
    events = ["up", "counters", "counters", "soft expire", "warning", "down"]
    assert [each["event"] for each in said] == events
    assert all(isinstance(each["time"], float) for each in said)
    assert said[0]["device"] == {
        "name": "natcompat0",
        "addresses": ["10.1.0.1/16"],
        "routes": ["10.2.0.0/16"],
        "mtu": 1400,
        "lockdown": False,
    }
    assert (said[1]["sas"], said[1]["drops"]) == (ROWS, {"no_policy": 2, "short": 1})
    assert said[3]["spi"] == "0xc0de0001"
    assert (said[4]["text"], said[5]["status"]) == ("the disk is full.", 143)
