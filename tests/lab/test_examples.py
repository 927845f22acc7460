"""The examples with kernel ESP: a tunnel that follows the NAT, and a client with a default route."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.lab.topology import Host, Network, wait_for

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"


@contextmanager
def running(
    host: Host, *arguments: str, example: str = "kernel_tunnel.py"
) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        ["ip", "netns", "exec", host.name, sys.executable, str(EXAMPLES / example), *arguments],
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


@pytest.mark.kernel_esp
def test_a_client_with_a_default_route(network: Network) -> None:
    """The same program as in tests/docs/test_client.py, which runs it on the user-space ESP."""
    near, far = network.initiator, network.responder
    network.nat("20000-20999")
    with running(far, "gateway", far.address, example="client.py") as gateway:
        expect(gateway, "ready")
        with running(near, "client", near.address, far.address, example="client.py") as client:
            expect(client, "connected as 10.9.0.10")
            expect(gateway, "client is connected")
            assert "src 10.9.0.10" in near.run("ip", "route", "get", far.inner).stdout
            assert near.ping(far.inner) == 3
            assert [sa.usage.packets for sa in near.ipsec.list_sas()] == [3, 3]
            network.nat("21000-21999")
            assert near.ping(far.inner, "-W", "1", count=1) in (0, 1)  # from the new port: now it is known
            expect(gateway, "peer moved to 203.0.113.1 port 21")
            assert near.ping(far.inner) == 3
            tell(client, "rekey")
            for end in (client, gateway):
                expect(end, "rekeyed")
            assert near.ping(far.inner) == 3
            tell(client, "quit")
            assert client.wait(30) == 0
        tell(gateway, "quit")
        assert gateway.wait(30) == 0
    assert "10.9.0.10" not in near.run("ip", "address").stdout
    for host in (near, far):
        wait_for("empty databases", lambda host=host: not host.ipsec.list_sas())  # type: ignore[misc]
        assert host.ipsec.list_policies() == []
