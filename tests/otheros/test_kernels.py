"""The models do what the table of their kernels says; the conformance suite runs over every one."""

from __future__ import annotations

import re
import socket
import sys

import pytest

from natcompat.contract import TABLE, Verdict, classify
from tests.otheros.conftest import MakeModel
from tests.otheros.kernels import ENDLESS, KERNELS, Fate
from tests.otheros.running import free_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the models run on Linux")


# What the application gets of each row, by a socket on which nobody but the modelled kernel works.
BARE = """
import select, socket, struct, ctypes
from natcompat.contract import TABLE
from tests.otheros.kernels import KERNELS
kernel, port = KERNELS[sys.argv[1]], int(sys.argv[2])
for version in (4, 6):
    family, host = ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1"))[version == 6]
    with socket.socket(family, socket.SOCK_DGRAM) as sock, socket.socket(family, socket.SOCK_DGRAM) as peer:
        sock.bind((host, port))
        try:
            if kernel.option:
                sock.setsockopt(17, kernel.option, kernel.value)
        except OSError as error:
            print(version, "option", error.errno)
            continue
        for row in TABLE:
            peer.sendto(row.payload, sock.getsockname())
            # it is delivered before sendto() returns, on loopback
            woke = bool(select.select([sock], [], [], 0)[0])
            got = sock.recv(65536)[:40].hex() or "-" if woke else "gone"
            print(version, row.payload[:40].hex() or "-", len(row.payload), got)
"""


@pytest.mark.parametrize("system", KERNELS)
def test_a_model_delivers_by_its_table(make_model: MakeModel, system: str) -> None:
    kernel = KERNELS[system]
    port = 0 if kernel.option else free_port()
    done = make_model(system).run(BARE, system, str(port), port=port)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    for version in (4, 6):
        if version == 6 and kernel.option and socket.AF_INET6 not in kernel.families:
            assert f"6 option {97}" in lines  # EAFNOSUPPORT
            continue
        for row in TABLE:
            fate = kernel.fate(row.payload, version)
            left = {Fate.RAW: row.payload, Fate.STRIP: row.payload[4:]}.get(fate)
            got = "gone" if left is None else left[:40].hex() or "-"
            assert f"{version} {row.payload[:40].hex() or '-'} {len(row.payload)} {got}" in lines


@pytest.mark.parametrize("system", KERNELS)
def test_every_payload_has_a_rule_and_every_rule_a_source(system: str) -> None:
    kernel = KERNELS[system]
    payloads = (
        [bytes(size) for size in range(10)] + [b"\xff" * size for size in range(1, 10)] + [b"\1" * ENDLESS]
    )
    for payload in payloads:
        assert any(rule.matches(payload) for rule in kernel.rules)
    for rule in kernel.rules:
        assert re.search(r"\(\), \w+\.c: .", rule.source)
        assert any(rule.matches(payload) for payload in payloads)


@pytest.mark.parametrize("system", KERNELS)
def test_no_kernel_takes_ike_or_delivers_less_than_the_contract(system: str) -> None:
    """What a kernel leaves to the process it leaves whole."""
    for row in TABLE:
        fate = KERNELS[system].fate(row.payload, 4)
        if classify(row.payload) is Verdict.IKE:
            assert fate in (Fate.RAW, Fate.STRIP)
        else:
            assert fate is not Fate.STRIP


def conformance(make_model: MakeModel, system: str, least: int, **options: object) -> None:
    done = make_model(system).pytest("conformance.py", **options)
    assert done.returncode == 0, done.stdout + done.stderr
    summary = done.stdout.splitlines()[-1]
    match = re.fullmatch(r"(\d+) passed in [\d.]+s", summary)
    assert match is not None, done.stdout
    assert int(match[1]) >= least


@pytest.mark.parametrize("system", KERNELS)
def test_conformance(make_model: MakeModel, system: str) -> None:
    kernel = KERNELS[system]
    port = free_port() if system == "openbsd" else 0  # macOS takes the port of the socket
    conformance(make_model, system, 60 if kernel.families == (socket.AF_INET,) else 120, port=port)


@pytest.mark.parametrize(("system", "kernel"), [("macos", "no-sa"), ("openbsd", "no-udpencap")])
def test_conformance_of_a_kernel_in_another_state(make_model: MakeModel, system: str, kernel: str) -> None:
    """macOS before the first SA; OpenBSD where the administrator has switched ESP-in-UDP off."""
    port = free_port() if system == "openbsd" else 0
    conformance(make_model, system, 120, kernel=kernel, port=port)


def test_the_suite_fails_a_model_that_leaks(make_model: MakeModel) -> None:
    """The suite is not blind to what is modelled: of Solaris the process would mend nothing."""
    done = make_model("solaris").pytest("conformance.py", kernel="no-demultiplexing")
    assert done.returncode == 1
    assert "test_inbound[solaris-IPv4-SPI alone]" in done.stdout


ON_A_LOOP = """
import asyncio, os, socket
from natcompat import set_nat_t_endpoint

class Protocol(asyncio.DatagramProtocol):
    def __init__(self, received):
        self.received = received
    def datagram_received(self, data, source):
        self.received.put_nowait((data, source))

async def main():
    received = asyncio.Queue()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        for each, port in ((sock, int(os.environ["NATCOMPAT_MODEL_PORT"])), (peer, 0)):
            each.bind(("127.0.0.1", port))
            each.settimeout(5)
        endpoint = set_nat_t_endpoint(sock)
        assert endpoint.backend == os.environ["NATCOMPAT_MODEL"]
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: Protocol(received), sock=sock)
        address = sock.getsockname()
        for payload in (b"\\xff", b"", b"ESP packet", bytes(4) + b"IKE"):
            peer.sendto(payload, address)
        assert await asyncio.wait_for(received.get(), 5) == (b"IKE", peer.getsockname())
        transport.sendto(b"answer", peer.getsockname())
        assert await asyncio.to_thread(peer.recv, 64) == bytes(4) + b"answer"
        assert received.empty()
        transport.close()

asyncio.run(main())
"""


@pytest.mark.parametrize("system", KERNELS)
def test_on_an_event_loop(make_model: MakeModel, system: str) -> None:
    done = make_model(system).run(ON_A_LOOP, port=free_port() if system == "openbsd" else 0)
    assert done.returncode == 0, done.stderr
