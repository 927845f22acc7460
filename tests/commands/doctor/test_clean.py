"""``natcompat doctor --clean`` removes what killed processes left, and asks nothing of what lives."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from natcompat.commands.doctor import data_path
from natcompat.commands.verify.namespaces import Namespace, Topology
from natcompat.errors import NatCompatError
from natcompat.esp.device.offloads import OFFLOADS
from tests.commands.tunnel.running import inside, run, topology
from tests.support.linux import LINUX
from tests.support.running import COMMAND, as_nobody, environment
from tests.support.running import run as run_here
from tests.support.tun import TUN

pytestmark = [LINUX, TUN]

PROGRAM = """
import sys, time
from natcompat import open_ipsec
from natcompat.ipsec import Direction, Policy, TrafficSelector
ipsec = open_ipsec("userspace", device="tun", lockdown=sys.argv[1] == "lockdown")
selector = TrafficSelector(source=sys.argv[2], destination=sys.argv[3])
ends = {"source": "192.0.2.1", "destination": "192.0.2.2"}
ipsec.add_policy(Policy(direction=Direction.OUT, selector=selector, **ends))
print("ready", flush=True)
time.sleep(100)
"""


@pytest.fixture
def network() -> Iterator[Topology]:
    with topology() as made:
        yield made


@contextlib.contextmanager
def process(
    network: Topology, host: Namespace, control: Path, lockdown: bool, networks: tuple[str, str]
) -> Iterator[subprocess.Popen[str]]:
    arguments = ["lockdown" if lockdown else "open", *networks]
    with subprocess.Popen(
        [*inside(network, host), sys.executable, "-c", PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        text=True,
        env=environment({"NATCOMPAT_CONTROL": str(control)}),
    ) as made:
        assert made.stdout is not None
        assert made.stdout.readline() == "ready\n"
        try:
            yield made
        finally:
            made.kill()


def tables(network: Topology, host: Namespace) -> list[str]:
    listed = run(network, host, "nft", "list", "tables").stdout
    return [line for line in listed.splitlines() if "natcompat" in line]


def rules(network: Topology, host: Namespace) -> str:
    return run(network, host, "ip", "rule").stdout


def test_what_is_left_goes_and_what_lives_stays(
    network: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    control = tmp_path / "control"
    monkeypatch.setenv("NATCOMPAT_CONTROL", str(control))
    host = network.responder
    before = rules(network, host)

    def clean() -> dict[str, Any]:
        done = run(network, host, *COMMAND, "doctor", "--clean", "--json")
        report: dict[str, Any] = json.loads(done.stdout)
        assert (done.returncode, report["errors"]) == (0, [])
        removed: dict[str, Any] = report["removed"]
        return removed

    with process(network, host, control, False, ("10.1.0.0/16", "10.2.0.0/16")) as living:
        with process(network, host, control, True, ("10.3.0.0/16", "10.4.0.0/16")) as dead:
            assert len(tables(network, host)) == 2
            assert clean() == {"guards": [], "rules": 0, "control_sockets": []}, "both live"
            dead.kill()
            dead.wait()
        assert len(tables(network, host)) == 2, "lockdown outlives its process"
        removed = clean()
        assert len(removed["guards"]) == 1
        assert removed["control_sockets"] == [str(control / f"{dead.pid}-0.sock")]
        assert len(tables(network, host)) == 1
        assert [path.name for path in control.iterdir()] == [f"{living.pid}-0.sock"]
        assert living.poll() is None
    shown = run(network, host, *COMMAND, "doctor", "--clean").stdout
    assert "removed" in shown
    assert rules(network, host) == before
    assert tables(network, host) == []
    assert "nothing behind" in run(network, host, *COMMAND, "doctor", "--clean").stdout


def test_without_privilege_the_reason_is_told() -> None:
    prefix = as_nobody()
    if not prefix:
        pytest.skip("becomes an ordinary user")
    done = run_here("doctor", "--clean", prefix=prefix, env={"NATCOMPAT_CONTROL": "none"})
    assert done.returncode in (0, 1)
    assert "Traceback" not in done.stderr
    if done.returncode:
        assert "CAP_NET_ADMIN" in done.stdout


# --- the rest of the report ------------------------------------------------------------------------


def test_every_offload_is_named_with_its_state(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NATCOMPAT_OFFLOADS", raising=False)
    states = data_path.offloads("c")
    assert states.keys() == OFFLOADS.keys()
    assert states["csum"] == "on"
    monkeypatch.setenv("NATCOMPAT_OFFLOADS", "-udp-gro,-gso")
    limited = data_path.offloads("c")
    assert {name for name, state in limited.items() if "NATCOMPAT_OFFLOADS" in state} == {"udp-gro", "gso"}
    assert set(data_path.offloads("python").values()) == {"the data path in Python has none"}
    monkeypatch.setenv("NATCOMPAT_OFFLOADS", "no-such")
    assert all("no-such" in state for state in data_path.offloads("c").values())


def test_a_missing_guard_is_said_to_be_weaker(monkeypatch: pytest.MonkeyPatch) -> None:
    from natcompat.esp.device import guard

    assert data_path.guard()["usable"]

    def refuse(*_: object, **__: object) -> None:
        raise NatCompatError(93, "Protocol not supported", "Load the module nf_tables")

    monkeypatch.setattr(guard, "Guard", refuse)
    found = data_path.guard()
    assert found["usable"] is False
    assert "weaker" in found["reason"]
    assert found["remedy"] == "Load the module nf_tables"


def test_the_hand_back_is_named() -> None:
    assert data_path.hand_back()["way"] == "loopback"
    assert "hand-back" in run_here("doctor").stdout
