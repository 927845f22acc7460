"""docs/examples/client.py: a virtual address, a default route, a rekey under traffic, and nothing left."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.support.linux import LINUX
from tests.support.tun import TUN

pytestmark = [
    LINUX,
    TUN,
    pytest.mark.skipif(
        not hasattr(os, "geteuid") or os.geteuid() != 0 or not shutil.which("ping"),
        reason="makes network namespaces, and pings",
    ),
]

CLIENT = Path(__file__).parents[2] / "docs" / "examples" / "client.py"
HERE, THERE = "203.0.113.1", "203.0.113.2"


def run(*command: str) -> str:
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    """Two network namespaces with one link; a server 10.2.0.1 is behind the second."""
    names = f"natcompat-{os.getpid()}-client", f"natcompat-{os.getpid()}-gateway"
    with ExitStack() as stack:
        for name in names:
            run("ip", "netns", "add", name)
            stack.callback(run, "ip", "netns", "delete", name)
            run("ip", "-n", name, "link", "set", "lo", "up")
        client, gateway = names
        run("ip", "-n", client, "link", "add", "wan", "type", "veth", "peer", "name", "wan", "netns", gateway)
        for name, address, other in ((client, HERE, THERE), (gateway, THERE, HERE)):
            run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "wan")
            run("ip", "-n", name, "link", "set", "wan", "up")
            run("ip", "-n", name, "route", "add", "default", "via", other)
        run("ip", "-n", gateway, "address", "add", "10.2.0.1/32", "dev", "lo")
        yield names


class Program:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def expect(self, words: str) -> None:
        assert self.process.stdout is not None
        said = ""
        for line in self.process.stdout:
            said += line
            if words in line:
                return
        raise AssertionError(f"waited for {words!r}, but it said: {said}")

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{command}\n")
        self.process.stdin.flush()


@contextmanager
def running(namespace: str, *arguments: str) -> Iterator[Program]:
    process = subprocess.Popen(
        ["ip", "netns", "exec", namespace, sys.executable, str(CLIENT), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
        env={**os.environ, "NATCOMPAT_BACKEND": "userspace"},
    )
    try:
        yield Program(process)
    finally:
        process.kill()
        process.communicate()


def ping(namespace: str, count: int, interval: str) -> subprocess.Popen[str]:
    command = [
        "ip",
        "netns",
        "exec",
        namespace,
        "ping",
        "-c",
        str(count),
        "-i",
        interval,
        "-W",
        "2",
        "10.2.0.1",
    ]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def answered(pings: subprocess.Popen[str]) -> int:
    return pings.communicate(timeout=60)[0].count("bytes from")


def test_a_client_from_beginning_to_end(hosts: tuple[str, str]) -> None:
    client_host, gateway_host = hosts
    with running(gateway_host, "gateway", THERE) as gateway:
        gateway.expect("ready")
        with running(client_host, "client", HERE, THERE) as client:
            client.expect("connected as 10.9.0.10")
            gateway.expect("client is connected")
            assert "src 10.9.0.10" in run("ip", "-n", client_host, "route", "get", "10.2.0.1")
            assert answered(ping(client_host, 3, "0.2")) == 3
            pings = ping(client_host, 150, "0.01")
            for _ in range(3):
                client.tell("rekey")
                client.expect("rekeyed")
                gateway.expect("rekeyed")
            assert answered(pings) == 150
            client.tell("quit")
            assert client.process.wait(30) == 0
        gateway.tell("quit")
        assert gateway.process.wait(30) == 0
    for host in hosts:
        assert "10.9.0.10" not in run("ip", "-n", host, "address")
        assert "proto 78" not in run("ip", "-n", host, "rule")
