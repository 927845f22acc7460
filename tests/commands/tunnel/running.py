"""Tunnels that run, as a user starts them, between network namespaces."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from natcompat.commands.verify.namespaces import Namespace, Topology
from natcompat.errors import NatCompatError
from tests.commands.tunnel.making import put
from tests.support.running import COMMAND, environment

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"
NEAR, FAR = "10.1.0.1", "10.2.0.1"
"""Inside addresses of the examples."""


@contextmanager
def topology() -> Iterator[Topology]:
    """Return the two hosts and the NAT; skip where there can be none."""
    try:
        made = Topology()
    except NatCompatError as error:
        pytest.skip(str(error))
    with made:
        yield made


def examples(directory: Path, transforms: str = "") -> tuple[Path, Path]:
    """Write the examples of the documentation with fresh keys; return the paths of both ends."""
    for key in ("to-peer.key", "from-peer.key"):
        put(directory / key, os.urandom(36).hex())
    names = ("tunnel.toml", "tunnel-peer.toml")
    first, second = (put(directory / name, (EXAMPLES / name).read_text()) for name in names)
    return first, second


def inside(network: Topology, host: Namespace) -> list[str]:
    """Return the start of a command that runs on `host`."""
    user = ["--user", "--preserve-credentials"] if network.user_namespace else []
    return ["nsenter", f"--target={host.pid}", *user, "--net", "--"]


def run(network: Topology, host: Namespace, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a program on `host`."""
    return subprocess.run(
        [*inside(network, host), *command], capture_output=True, text=True, timeout=60, check=False
    )


def ping(network: Topology, host: Namespace, address: str, *options: str, count: int = 3) -> int:
    """Return how many of `count` pings were answered."""
    done = run(network, host, "ping", "-n", "-c", str(count), "-i", "0.05", "-W", "5", *options, address)
    return sum("bytes from" in line for line in done.stdout.splitlines())


class Running:
    """A tunnel in the foreground of somebody else."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process

    def until(self, event: str) -> dict[str, Any]:
        """Return the next event of this name; fail with what was said if none comes."""
        assert self.process.stdout is not None
        said = ""
        for line in self.process.stdout:
            said += line
            if not line.startswith("{"):
                break
            found: dict[str, Any] = json.loads(line)
            if found["event"] == event:
                return found
        raise AssertionError(f"no {event!r}: {said}{self.process.stdout.read()}")

    def counters(self, wanted: Callable[[dict[str, Any]], object]) -> dict[str, Any]:
        """Return SAs by direction, as soon as both are as `wanted`."""
        while True:
            sas = {sa["way"]: sa for sa in self.until("counters")["sas"]}
            if all(map(wanted, sas.values())):
                return sas

    def end(self, number: int = signal.SIGTERM) -> int:
        """End it by a signal; return its status."""
        self.process.send_signal(number)
        return self.process.wait(30)


@contextmanager
def tunnel(
    network: Topology, host: Namespace, path: Path, *options: str, up: bool = True
) -> Iterator[Running]:
    """Run ``natcompat tunnel`` on `host`."""
    arguments = ["tunnel", "--json", "--interval", "0.1", *options, str(path)]
    with subprocess.Popen(
        [*inside(network, host), *COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment(),
    ) as process:
        running = Running(process)
        try:
            if up:
                running.until("up")
            yield running
        finally:
            process.kill()


def left(network: Topology, host: Namespace) -> dict[str, str]:
    """Return what a tunnel could leave behind on `host`."""
    looks = ("-o link", "-o addr", "rule", "-6 rule", "route show table all", "-6 route show table all")
    found = {look: run(network, host, "ip", *look.split()).stdout for look in looks}
    found["sockets"] = host.call(Path.read_text, Path("/proc/self/net/udp"))
    return {
        look: "\n".join(
            sorted(line for line in text.splitlines() if "fe80" not in line and "ff00" not in line)
        )
        for look, text in found.items()
    }


class Wire:
    """What passes an interface: ESP in UDP over IPv4, as (SPI, sequence number, IV)."""

    def __init__(self, host: Namespace, interface: str) -> None:
        self._sock = host.socket(socket.AF_PACKET, socket.SOCK_RAW)
        with contextlib.suppress(OSError):
            self._sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 25)  # SO_RCVBUFFORCE
        self._sock.bind((interface, 3))  # ETH_P_ALL: what goes out, too
        self._sock.settimeout(0.1)
        self.packets: list[tuple[int, int, bytes]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                frame = self._sock.recv(65535)
            except TimeoutError:
                if self._ended.is_set():
                    return
                continue
            packet = frame[14:]
            if frame[12:14] != b"\x08\0":
                continue
            start = (packet[0] & 15) * 4
            if packet[9] != socket.IPPROTO_UDP or packet[6:8] not in (b"\0\0", b"\x40\0"):
                continue
            payload = packet[start + 8 : start + struct.unpack_from("!H", packet, start + 4)[0]]
            if len(payload) > 16 and payload[:4] != bytes(4):
                spi, sequence = struct.unpack_from("!II", payload)
                self.packets.append((spi, sequence, payload[8:16]))

    def count(self, spi: int) -> int:
        """Return how many packets of an SA have passed."""
        return sum(each[0] == spi for each in list(self.packets))

    def drops(self) -> int:
        """Return how many packets were not seen, since this was too slow."""
        answer = self._sock.getsockopt(263, 6, 8)  # SOL_PACKET, PACKET_STATISTICS
        return int(struct.unpack("=II", answer)[1])

    def close(self) -> None:
        """Look no more, when all that has come is seen."""
        self._ended.set()
        self._thread.join()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        self._sock.close()
