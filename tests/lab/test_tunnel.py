"""``natcompat tunnel`` on a kernel with ESP: the same file with either backend at either end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.lab.topology import Host, Network, wait_for

pytestmark = pytest.mark.kernel_esp

FILE = """
state = "{name}.state"
[endpoint]
local_address = "{local}"
remote_address = "{remote}"
follow_mapping = {follow}
[device]
addresses = ["{inner}/24"]
[[sa]]
spi = {out}
direction = "out"
encryption = "AES_CBC"
encryption_key = "{key_out}"
integrity = "HMAC_SHA2_256_128"
integrity_key = "{mac_out}"
esn = {esn}
nat_keepalive = 20
[[sa]]
spi = {into}
direction = "in"
encryption = "AES_CBC"
encryption_key = "{key_in}"
integrity = "HMAC_SHA2_256_128"
integrity_key = "{mac_in}"
esn = {esn}
[[policy]]
direction = "out"
source = "{near}"
destination = "{far}"
[[policy]]
direction = "in"
source = "{far}"
destination = "{near}"
"""


def write(directory: Path, network: Network, *, esn: bool) -> dict[str, Path]:
    """Write the files of both ends, with keys of their own."""
    keys = [os.urandom(32).hex() for _ in range(4)]
    one, two = ("10.101.0.0/24", "10.102.0.0/24")
    common = {"esn": str(esn).lower()}
    texts = {
        "initiator": FILE.format(
            name="initiator",
            local=network.initiator.address,
            remote=network.responder.address,
            follow="false",
            inner="10.101.0.1",
            out="0x2001",
            into="0x2002",
            key_out=keys[0],
            mac_out=keys[1],
            key_in=keys[2],
            mac_in=keys[3],
            near=one,
            far=two,
            **common,
        ),
        "responder": FILE.format(
            name="responder",
            local=network.responder.address,
            remote="203.0.113.1",
            follow="true",
            inner="10.102.0.1",
            out="0x2002",
            into="0x2001",
            key_out=keys[2],
            mac_out=keys[3],
            key_in=keys[0],
            mac_in=keys[1],
            near=two,
            far=one,
            **common,
        ),
    }
    for name, text in texts.items():
        (directory / f"{name}.toml").write_text(text)
        (directory / f"{name}.toml").chmod(0o600)
    return {name: directory / f"{name}.toml" for name in texts}


@contextmanager
def running(host: Host, path: Path, *options: str) -> Iterator[subprocess.Popen[str]]:
    inside = ["ip", "netns", "exec", host.name]
    command = [
        sys.executable,
        "-m",
        "natcompat",
        "tunnel",
        "--json",
        "--interval",
        "0.2",
        *options,
        str(path),
    ]
    # the log, on the standard error, is not JSON: this kernel has no nf_tables, and a warning says so
    with subprocess.Popen([*inside, *command], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def until(process: subprocess.Popen[str], event: str) -> dict[str, Any]:
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if not line.startswith("{"):
            break
        found: dict[str, Any] = json.loads(line)
        if found["event"] == event:
            return found
    raise AssertionError(f"no {event!r}: {said}{process.stdout.read()}")


def packets(process: subprocess.Popen[str]) -> dict[str, int]:
    return {sa["way"]: sa["packets"] for sa in until(process, "counters")["sas"]}


def left_behind(host: Host) -> dict[str, list[str]]:
    """Return what a tunnel could leave: SAs, policies, addresses, routes, rules, devices.

    Without what the kernel changes by itself: its own addresses of IPv6, and what has a time.
    """
    routes = ("route show table all", "-6 route show table all", "rule", "-6 rule")
    looks = ("xfrm state", "xfrm policy", "-o addr", "-o link", *routes)
    return {
        look: sorted(
            line
            for line in host.run("ip", *look.split()).stdout.splitlines()
            if not any(word in line for word in ("fe80", "ff00", "expires"))
        )
        for look in looks
    }


@pytest.mark.parametrize(
    ("near_backend", "far_backend", "esn"),
    [("linux", "linux", True), ("linux", "userspace", True), ("userspace", "linux", False)],
    ids=["kernel to kernel", "kernel to user space", "user space to kernel"],
)
def test_through_the_nat(
    network: Network, tmp_path: Path, near_backend: str, far_backend: str, esn: bool
) -> None:
    near, far = network.initiator, network.responder
    files = write(tmp_path, network, esn=esn)
    before = [left_behind(host) for host in (near, far)]
    with ExitStack() as stack:
        ends = []
        for host, path, backend in zip(
            (far, near), (files["responder"], files["initiator"]), (far_backend, near_backend), strict=True
        ):
            end = stack.enter_context(running(host, path, "--backend", backend, "--create-state"))
            assert until(end, "up")["backend"] == backend
            ends.append(end)
        responder, initiator = ends
        near.ping("10.102.0.1", "-W", "1", count=1)  # the responder learns the port of the NAT
        until(responder, "mapping change")
        assert near.ping("10.102.0.1") == 3
        for end in ends:
            wait_for("packets both ways", lambda end=end: min(packets(end).values()) >= 3)  # type: ignore[misc]
        # one end dies, and goes on behind what it had reserved: the other takes it
        initiator.kill()
        initiator.wait()
        again = stack.enter_context(running(near, files["initiator"], "--backend", near_backend))
        until(again, "up")
        assert near.ping("10.102.0.1") == 3
        for end, number in ((responder, signal.SIGINT), (again, signal.SIGTERM)):
            end.send_signal(number)
            assert end.wait(30) == 128 + number
    for host, expected in zip((near, far), before, strict=True):
        assert left_behind(host) == expected


def test_what_outlived_the_sas_of_one_that_was_killed_is_taken_away(network: Network, tmp_path: Path) -> None:
    """They have expired; policies, address and route are still there."""
    near = network.initiator
    path = write(tmp_path, network, esn=True)["initiator"]
    path.write_text(path.read_text().replace("[[sa]]\n", "[[sa]]\nlifetime = { hard_seconds = 4 }\n"))
    before = left_behind(near)
    with running(near, path, "--backend", "linux", "--create-state") as killed:
        until(killed, "up")
        killed.kill()
    assert len(near.run("ip", "xfrm", "policy").stdout.splitlines()) > 0
    wait_for("the SAs to expire", lambda: not near.run("ip", "xfrm", "state").stdout)
    with running(near, path, "--backend", "linux") as again:
        until(again, "up")
        again.terminate()
        assert again.wait(30) == 128 + signal.SIGTERM
    assert left_behind(near) == before
