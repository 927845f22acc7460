"""``natcompat tunnel`` with ESP in user space, between two hosts through a NAT."""

from __future__ import annotations

import fcntl
import itertools
import os
import random
import signal
import socket
import struct
import subprocess
import tempfile
import termios
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path

import pytest

from natcompat.commands.tunnel.reserve import BLOCK
from natcompat.commands.verify.namespaces import Namespace, Topology
from natcompat.esp import choice as datapaths
from tests.commands.tunnel.making import TUNNEL, put, write
from tests.commands.tunnel.running import FAR, NEAR, Wire, examples, inside, left, ping, run, topology, tunnel
from tests.support.linux import LINUX, wait_until
from tests.support.running import COMMAND, NOBODY, as_nobody, becomes_nobody, environment, run_on_terminal
from tests.support.tun import TUN

pytestmark = [LINUX, TUN]
DATAPATHS = [each.name for each in datapaths.probe() if each.viable]


@pytest.fixture(scope="module")
def network() -> Iterator[Topology]:
    with topology() as made:
        yield made


def transfer(client: Namespace, server: Namespace, octets: int) -> int:
    """Send `octets` by TCP from one inside address to the other; return how many arrived."""
    received = 0
    with server.socket(socket.AF_INET, socket.SOCK_STREAM) as listener:
        listener.settimeout(60)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((FAR, 7000))
        listener.listen()
        with client.socket(socket.AF_INET, socket.SOCK_STREAM) as sender:
            sender.settimeout(60)
            sender.connect((FAR, 7000))
            accepted, address = listener.accept()
            assert address[0] == NEAR

            def send() -> None:
                sender.sendall(random.Random(1).randbytes(octets))
                sender.close()

            thread = threading.Thread(target=send)
            thread.start()
            with accepted:
                accepted.settimeout(60)
                while piece := accepted.recv(1 << 18):
                    received += len(piece)
            thread.join()
    return received


@pytest.mark.parametrize("datapath", DATAPATHS)
def test_the_examples_make_a_tunnel(
    network: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, datapath: str
) -> None:
    """Ping and TCP in both directions, and nothing is left when it ends."""
    monkeypatch.setenv(datapaths.ENVIRONMENT_VARIABLE, datapath)
    near, far = network.initiator, network.responder
    first, second = examples(tmp_path)
    before = [left(network, host) for host in (near, far)]
    with (
        Wire(network.router, "outside") as wire,
        tunnel(network, far, second, "--create-state") as responder,
        tunnel(network, near, first, "--create-state") as initiator,
    ):
        assert ping(network, near, FAR, count=1) in (0, 1), "the responder learns the port of the NAT"
        responder.until("mapping change")
        assert ping(network, near, FAR) == 3
        assert ping(network, far, NEAR) == 3
        assert ping(network, near, FAR, "-s", "4000") == 3, "larger than the device's MTU"
        assert transfer(near, far, 3_000_000) == 3_000_000
        for end in (initiator, responder):
            sas = end.counters(lambda sa: sa["packets"] > 15)
            assert [sa["drops"] for sa in sas.values()] == [0, 0]
        assert initiator.end(signal.SIGTERM) == 128 + signal.SIGTERM
        assert responder.end(signal.SIGINT) == 128 + signal.SIGINT
    assert {spi for spi, _, _ in wire.packets} == {0x00C0DE01, 0x00C0DE02}
    assert [left(network, host) for host in (near, far)] == before


def test_ipv6_outside_and_both_inside(network: Topology, tmp_path: Path) -> None:
    """Other transforms, extended sequence numbers, and no device at the far end but one that counts."""
    near, far = network.initiator, network.responder
    first, second = examples(tmp_path)
    for path in (first, second):
        text = path.read_text().replace("192.168.1.2", "fd00:1::2").replace("203.0.113", "2001:db8:113:")
        text = text.replace("113:.", "113::").replace("AES_GCM_16", "CHACHA20_POLY1305")
        text = text.replace("[[sa]]", "[[sa]]\nesn = true").replace('/16"]', '/16", "fd00:a::1/64"]', 1)
        for direction, ends in (
            ("out", ("fd00:a::/64", "fd00:b::/64")),
            ("in", ("fd00:b::/64", "fd00:a::/64")),
        ):
            text += f'\n[[policy]]\ndirection = "{direction}"\n'
            text += 'source = "{}"\ndestination = "{}"\n'.format(*ends)
        if path is second:
            text = text.replace("fd00:a", "fd00:c").replace("fd00:b", "fd00:a").replace("fd00:c", "fd00:b")
        put(path, text)
    with (
        tunnel(network, far, second, "--create-state") as responder,
        tunnel(network, near, first, "--create-state"),
    ):
        ping(network, near, FAR, count=1)
        responder.until("mapping change")
        assert ping(network, near, FAR) == 3
        assert ping(network, near, "fd00:b::1") == 3
        assert ping(network, far, "fd00:a::1") == 3
        assert responder.end() == 128 + signal.SIGTERM
    text = second.read_text()
    put(second, text.replace("[device]", '[device]\nkind = "none"').replace("addresses", "# addresses"))
    with tunnel(network, far, second) as responder, tunnel(network, near, first):
        assert ping(network, near, FAR, "-W", "1", count=2) == 0
        sas = responder.counters(lambda sa: sa["packets"] >= 2 or sa["way"] == "out")
        assert sas["out"]["packets"] == 0


def has_passed(wire: Wire, packets: int) -> bool:
    return wire.count(0x00C0DE01) > packets


@pytest.mark.parametrize("datapath", DATAPATHS)
def test_no_iv_is_used_twice(
    network: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, datapath: str
) -> None:
    """Killed while it sends, again and again, and started anew: on the wire nothing repeats."""
    monkeypatch.setenv(datapaths.ENVIRONMENT_VARIABLE, datapath)
    near, far = network.initiator, network.responder
    first, second = examples(tmp_path)
    with ExitStack() as stack:
        wire = stack.enter_context(Wire(network.router, "inside"))
        responder = stack.enter_context(tunnel(network, far, second, "--create-state"))
        for life in range(5):
            options = [] if life else ["--create-state"]
            with tunnel(network, near, first, *options) as initiator:
                enough = wire.count(0x00C0DE01) + 60
                with subprocess.Popen(
                    [*inside(network, near), "ping", "-q", "-i", "0.002", FAR], stdout=subprocess.DEVNULL
                ) as load:
                    try:
                        wait_until(partial(has_passed, wire, enough), seconds=30)
                        if life == 2:  # one that ends in order, among those that are killed
                            assert initiator.end() == 128 + signal.SIGTERM
                        initiator.process.kill()
                        initiator.process.wait()
                    finally:
                        load.terminate()
        with tunnel(network, near, first):
            assert ping(network, near, FAR) == 3, "the peer has taken every restart"
        assert responder.end() == 128 + signal.SIGTERM
        assert wire.drops() == 0
    outbound = [(sequence, iv) for spi, sequence, iv in wire.packets if spi == 0x00C0DE01]
    assert len(outbound) > 300
    assert len({sequence for sequence, _ in outbound}) == len(outbound)
    assert len({iv for _, iv in outbound}) == len(outbound)
    numbers = [sequence for sequence, _ in outbound]
    jumps = [after - before for before, after in itertools.pairwise(numbers) if after > before + BLOCK // 2]
    assert len(jumps) == 4, "those that were killed left a block behind, the one that ended did not"
    assert min(numbers) == 1


def test_a_replay_after_a_restart(network: Topology, tmp_path: Path) -> None:
    """What a receiver has taken before it ended, it does not take again."""
    near, far = network.initiator, network.responder
    first, second = examples(tmp_path)
    with tunnel(network, near, first, "--create-state") as initiator:
        with tunnel(network, far, second, "--create-state") as responder:
            ping(network, near, FAR, count=1)
            responder.until("mapping change")
            assert ping(network, near, FAR) == 3
            responder.end()
        assert initiator.end() == 128 + signal.SIGTERM
    state = tmp_path / "tunnel.state"
    recorded = state.read_text()
    state.unlink()  # as one does who does not read: the numbers begin at 1 again
    with (
        tunnel(network, far, second) as responder,
        tunnel(network, near, first, "--create-state") as initiator,
    ):
        assert ping(network, near, FAR, "-W", "1", count=2) == 0
        sas = responder.counters(lambda sa: sa["drops"] >= 2 or sa["way"] == "out")
        assert sas["in"]["packets"] == 0
    assert recorded != state.read_text()


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT, signal.SIGTERM])
def test_signals(network: Topology, tmp_path: Path, number: signal.Signals) -> None:
    first, _ = examples(tmp_path)
    with tunnel(network, network.initiator, first, "--create-state") as running:
        running.process.send_signal(number)
        assert running.until("down")["status"] == 128 + number
        assert running.process.wait(30) == 128 + number


def test_a_reader_that_does_not_read(network: Topology, tmp_path: Path) -> None:
    """A full pipe keeps no signal from ending it."""
    first, _ = examples(tmp_path)
    before = left(network, network.initiator)
    with tunnel(
        network, network.initiator, first, "--create-state", "--interval", "0.1", up=False
    ) as running:
        assert running.process.stdout is not None
        fcntl.fcntl(running.process.stdout, 1031, 4096)  # F_SETPIPE_SZ
        running.until("up")
        round_ = len(running.process.stdout.readline())
        pipe = running.process.stdout.fileno()

        def is_full() -> bool:
            waiting = struct.unpack("i", fcntl.ioctl(pipe, termios.FIONREAD, bytes(4)))[0]
            return bool(waiting > 4096 - round_)

        wait_until(is_full, seconds=30)
        assert running.end() == 128 + signal.SIGTERM
    assert left(network, network.initiator) == before


def test_two_at_once(network: Topology, tmp_path: Path) -> None:
    first, _ = examples(tmp_path)
    with tunnel(network, network.initiator, first, "--create-state"):
        done = run(network, network.initiator, *COMMAND, "tunnel", str(first))
        assert done.returncode == 1
        assert "another tunnel has it" in done.stderr


def test_a_port_that_is_taken(network: Topology, tmp_path: Path) -> None:
    first, _ = examples(tmp_path)
    with network.initiator.socket(socket.AF_INET) as holder:
        holder.bind(("192.168.1.2", 4500))
        done = run(network, network.initiator, *COMMAND, "tunnel", "--create-state", str(first))
    assert done.returncode == 1
    assert "Address already in use" in done.stderr
    assert "natcompat doctor" in done.stderr


def test_a_device_that_cannot_be(network: Topology, tmp_path: Path) -> None:
    """Nothing is left of what was made before."""
    first, _ = examples(tmp_path)
    put(first, first.read_text().replace("[device]\n", '[device]\nname = "uplink"\n'))
    before = left(network, network.initiator)
    done = run(network, network.initiator, *COMMAND, "tunnel", "--create-state", str(first))
    assert done.returncode == 1
    assert "no TUN device (uplink)" in done.stderr
    assert "this end only receives" in done.stderr
    assert not (tmp_path / "tunnel.state").exists()
    assert left(network, network.initiator) == before


def test_expiry_ends_it(network: Topology, tmp_path: Path) -> None:
    first, _ = examples(tmp_path)
    text = first.read_text().replace("[[sa]]", "[[sa]]\nlifetime = { hard_seconds = 1 }")
    with tunnel(network, network.initiator, put(first, text), "--create-state") as running:
        running.until("hard expire")
        assert "expired" in running.until("warning")["text"]
        assert running.process.wait(30) == 1


def test_counters_in_a_pipe(network: Topology, tmp_path: Path) -> None:
    first, _ = examples(tmp_path)
    options = ("--create-state", "--interval", "0.1", "--count", "2")
    done = run(network, network.initiator, *COMMAND, "tunnel", *options, str(first))
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("Up: 192.168.1.2 port 4500 to 203.0.113.2 port 4500, backend userspace")
    assert done.stdout.count("0x00c0de01  out") == 2
    assert "\x1b" not in done.stdout


def test_on_a_terminal(network: Topology, tmp_path: Path) -> None:
    first, _ = examples(tmp_path)
    text = first.read_text().replace("[[sa]]", "[[sa]]\nreplay_window = 0")
    options = ("--create-state", "--interval", "0.1", "--count", "3", str(put(first, text)))
    status, shown = run_on_terminal(
        "tunnel", *options, width=160, prefix=tuple(inside(network, network.initiator))
    )
    assert status == 0
    assert "\x1b[" in shown
    for words in ("Up: 192.168.1.2", "0x00c0de01", "AES_GCM_16 256", "An inbound SA has no replay window"):
        assert words in shown


@becomes_nobody
def test_without_privilege() -> None:
    """What cannot be is said, with the remedy; what can be runs."""
    prefix = as_nobody()
    if not prefix:
        pytest.skip("an ordinary user has no Python here")
    text = TUNNEL.replace("192.0.2.1", "127.0.0.1").replace("192.0.2.2", "127.0.0.2")
    text = text.replace("[endpoint]", "[endpoint]\nlocal_port = 45670")
    with tempfile.TemporaryDirectory() as directory:
        path = write(Path(directory), text)
        for each in (path.parent, *path.parent.iterdir()):
            os.chown(each, NOBODY, NOBODY)

        def tunnel_as_nobody(*options: str) -> subprocess.CompletedProcess[str]:
            command = [*prefix, "-m", "natcompat", "tunnel", *options, str(path)]
            return subprocess.run(
                command, capture_output=True, text=True, timeout=60, env=environment(), check=False
            )

        done = tunnel_as_nobody("--create-state")
        assert done.returncode == 1
        assert "CAP_NET_ADMIN" in done.stderr
        assert 'kind = "none"' in done.stderr
        path.write_text(text.replace("[device]\naddresses", "[device]\nkind = 'none'\n# addresses"))
        done = tunnel_as_nobody("--create-state", "--count", "1")
        assert done.returncode == 0, done.stderr
        assert "nothing is sent" in done.stderr
