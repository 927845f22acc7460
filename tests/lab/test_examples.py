"""docs/examples/kernel_tunnel.py makes a tunnel, follows the NAT, rekeys under traffic, and cleans up."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.topology import Host, Network, wait_for

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "kernel_tunnel.py"


@contextmanager
def running(host: Host, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        ["ip", "netns", "exec", host.name, sys.executable, str(EXAMPLE), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def expect(process: subprocess.Popen[str], words: str) -> None:
    assert process.stdout is not None
    said = ""
    for line in process.stdout:
        said += line
        if words in line:
            return
    raise AssertionError(f"waited for {words!r}, but it said: {said}")


def tell(process: subprocess.Popen[str], command: str) -> None:
    assert process.stdin is not None
    process.stdin.write(f"{command}\n")
    process.stdin.flush()


@pytest.mark.kernel_esp
def test_a_tunnel_from_beginning_to_end(network: Network) -> None:
    near, far = network.initiator, network.responder
    with running(far, "responder", far.address, far.inner) as responder:
        expect(responder, "ready")
        with running(near, "initiator", near.address, near.inner, far.address, far.inner) as initiator:
            for end in (initiator, responder):
                expect(end, "tunnel is up")
            assert near.ping(far.inner) == 3
            assert [installed.usage.packets for installed in near.ipsec.list_sas()] == [3, 3]
            network.nat("21000-21999")
            assert near.ping(far.inner, "-W", "1", count=1) in (0, 1)  # from the new port: now it is known
            expect(responder, "peer moved to 203.0.113.1 port 21")
            assert near.ping(far.inner) == 3
            tell(initiator, "rekey")
            for end in (initiator, responder):
                expect(end, "old SAs are gone")
            assert near.ping(far.inner) == 3
            tell(initiator, "quit")
            assert initiator.wait(30) == 0
        tell(responder, "quit")
        assert responder.wait(30) == 0
    for host in (near, far):
        wait_for("empty databases", lambda host=host: not host.ipsec.list_sas())  # type: ignore[misc]
        assert host.ipsec.list_policies() == []
