"""TUN devices that refuse coalesced packets, all or some kinds: nothing is lost, and the kind is given up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.linux import LINUX, isolated
from tests.support.running import ROOT, environment
from tests.support.tunnels import IN_C

pytestmark = [LINUX, IN_C]


@pytest.fixture(scope="module")
def refusing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library that makes a TUN refuse, built once."""
    if shutil.which("gcc") is None:
        pytest.skip("gcc is not installed: apt-get install gcc")
    library = tmp_path_factory.mktemp("refuse") / "refuse.so"
    source = ROOT / "tests" / "support" / "refuse_coalesced.c"
    command = ["gcc", "-shared", "-fPIC", "-O2", "-o", str(library), str(source), "-ldl"]
    subprocess.run(command, check=True)
    return library


def run(library: Path, refuse: str, octets: int = 4_000_000) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.support.refused_tunnel", str(octets)],
        env=environment({**os.environ, "LD_PRELOAD": str(library), "REFUSE": refuse}),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


CASES = {
    "everything": ("all:22", {"TCP over IPv4", "TCP over IPv6", "UDP over IPv4", "UDP over IPv6"}),
    "UDP, by EIO": ("udp:5", {"UDP over IPv4", "UDP over IPv6"}),
    "TCP over IPv4, by EOPNOTSUPP": ("tcp4:95", {"TCP over IPv4"}),
    "nothing": ("", set[str]()),
}


@pytest.mark.parametrize(("refuse", "kinds"), CASES.values(), ids=CASES)
@isolated(network=True)
def test_what_is_refused_is_written_one_by_one(refusing: Path, refuse: str, kinds: set[str]) -> None:
    result = run(refusing, refuse)
    assert (result["udp4"], result["udp6"]) == (400, 400)
    assert set(result["refused"]) == kinds
    assert result["unwritten"] == 0
    assert len(result["lines"]) == len(kinds), "one line for each kind"
