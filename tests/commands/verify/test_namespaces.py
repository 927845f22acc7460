"""The network between namespaces is real, and ends with whoever made it."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from natcompat.commands.verify import namespace_process
from natcompat.commands.verify.namespace_process import NAT_PORTS
from natcompat.commands.verify.namespaces import INITIATOR, RESPONDER, ROUTER_OUTSIDE, Topology
from natcompat.errors import NatCompatError
from tests.support.running import as_nobody, children, environment, wait_for_output, wait_until_gone

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are of Linux")

FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])


@pytest.fixture(scope="module")
def network() -> Iterator[Topology]:
    with topology() as made:
        yield made


def topology(nat: str | None = None) -> Topology:
    try:
        return Topology(nat)
    except NatCompatError as error:
        pytest.skip(f"no network can be made here: {error}")


def test_an_interpreter_that_cannot_be_run_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/nonexistent/python")
    with pytest.raises(NatCompatError, match="/nonexistent/python: No such file") as caught:
        Topology()
    assert caught.value.errno == errno.ENOENT
    assert "--no-nat" in caught.value.remedy


def bound(network: Topology, side: str, version: int, port: int = 0) -> socket.socket:
    namespace, address = {
        "initiator": (network.initiator, INITIATOR),
        "responder": (network.responder, RESPONDER),
    }[side]
    sock = namespace.socket(FAMILY[version])
    sock.settimeout(10)
    sock.bind((address[version], port))
    return sock


@VERSIONS
def test_the_nat_changes_address_and_port_and_lets_answers_in(network: Topology, version: int) -> None:
    with (
        bound(network, "initiator", version, 4500) as initiator,
        bound(network, "responder", version) as responder,
    ):
        initiator.sendto(b"question", responder.getsockname())
        data, mapped = responder.recvfrom(64)
        assert data == b"question"
        assert mapped[0] == ROUTER_OUTSIDE[version]
        assert NAT_PORTS[0] <= mapped[1] <= NAT_PORTS[1]
        responder.sendto(b"answer", mapped)
        assert initiator.recvfrom(64) == (b"answer", responder.getsockname())


@VERSIONS
def test_nobody_behind_the_nat_is_reached_unasked(network: Topology, version: int) -> None:
    with bound(network, "responder", version) as responder, bound(network, "initiator", version) as initiator:
        with contextlib.suppress(OSError):  # IPv6 has a route to nowhere, IPv4 none
            responder.sendto(b"hello", initiator.getsockname())
        initiator.sendto(b"first", responder.getsockname())
        _, mapped = responder.recvfrom(64)
        responder.sendto(b"second", mapped)
        assert initiator.recv(64) == b"second"


def test_sockets_stay_in_the_namespace_in_which_they_were_made(network: Topology) -> None:
    with bound(network, "responder", 4) as sock:
        here, there = _udp_sockets(), network.responder.call(_udp_sockets)
        local = f"{int.from_bytes(socket.inet_aton(RESPONDER[4]), sys.byteorder):08X}"
        port = f"{sock.getsockname()[1]:04X}"
        assert f"{local}:{port}" in there - here


def _udp_sockets() -> set[str]:
    with open("/proc/net/udp") as file:
        return {line.split()[1] for line in file.readlines()[1:]}


def test_sockets_among_arguments_and_results(network: Topology) -> None:
    with (
        bound(network, "initiator", 4) as peer,
        network.responder.call(_answer_socket, RESPONDER[4], peer) as sock,
    ):
        assert sock.gettimeout() == 3
        assert network.initiator.call(os.getpid) == network.initiator.pid != os.getpid()
        assert sock.recv(128) == b"from the namespace of the initiator, sent in the responder's process"


def _answer_socket(address: str, peer: socket.socket) -> socket.socket:
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((address, 0))
    sock.settimeout(3)
    with peer:
        peer.sendto(
            b"from the namespace of the initiator, sent in the responder's process", sock.getsockname()
        )
    return sock


def test_exceptions_come_back(network: Topology) -> None:
    with pytest.raises(ValueError, match="invalid literal") as caught:
        network.router.call(int, "four")
    assert "In the namespace:" in caught.value.__notes__[0]


def test_what_cannot_be_sent_is_an_error(network: Topology) -> None:
    with pytest.raises(TypeError, match="the answer cannot be sent"):
        network.router.call(os.scandir, "/")
    assert network.router.call(int, "4") == 4


def test_large_messages(network: Topology) -> None:
    assert network.router.call(bytes.upper, b"a" * 3_000_000) == b"A" * 3_000_000


@pytest.mark.parametrize("nat", ["nft", "iptables", "iptables-legacy"])
def test_either_tool_makes_the_nat(nat: str) -> None:
    if shutil.which(nat, path=f"{os.environ['PATH']}:/usr/sbin:/sbin") is None:
        pytest.skip(f"{nat} is not installed")
    with topology(nat) as network:
        assert network.nat == nat


def test_without_a_tool_the_remedy_is_named(network: Topology) -> None:
    with pytest.raises(NatCompatError, match=r"apt install nftables") as caught:
        network.router.call(_masquerade_without_tools)
    assert caught.value.errno == errno.ENOENT
    assert "nft is not installed; iptables is not installed; iptables-legacy is not" in str(caught.value)


def _masquerade_without_tools() -> None:
    paths = namespace_process._SYSTEM_PATH, os.environ["PATH"]
    namespace_process._SYSTEM_PATH = os.environ["PATH"] = "/nonexistent"  # type: ignore[misc]
    try:
        namespace_process.masquerade(None)
    finally:
        namespace_process._SYSTEM_PATH, os.environ["PATH"] = paths  # type: ignore[misc]


def test_no_name_is_left_and_everything_ends() -> None:
    names = set(os.listdir("/run/netns")) if os.path.isdir("/run/netns") else set()
    links = set(os.listdir("/sys/class/net"))
    descriptors = len(os.listdir("/proc/self/fd"))
    network = topology()
    pids = [network.router.pid, network.initiator.pid, network.responder.pid]
    assert len({os.stat(f"/proc/{pid}/ns/net").st_ino for pid in (*pids, os.getpid())}) == 4
    assert (set(os.listdir("/run/netns")) if os.path.isdir("/run/netns") else set()) == names
    assert set(os.listdir("/sys/class/net")) == links
    network.close()
    assert wait_until_gone(pids) == []
    assert len(os.listdir("/proc/self/fd")) == descriptors
    with pytest.raises(ConnectionError, match="is gone"):
        network.router.call(int)
    network.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT], ids=lambda each: each.name)
def test_nothing_survives_whoever_made_it(how: signal.Signals) -> None:
    topology().close()  # or skip
    script = (
        "import time\nfrom natcompat.commands.verify.namespaces import Topology\n"
        "with Topology() as t:\n"
        "    print(t.router.pid, t.initiator.pid, t.responder.pid, flush=True)\n"
        "    time.sleep(99)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    with process:
        wait_for_output(process)
        pids = [int(word) for word in re.findall(r"\d+", process.stdout.readline())]
        assert len(pids) == 3
        assert set(pids) <= set(children(process.pid))
        process.send_signal(how)
    assert wait_until_gone(pids) == []


def test_the_others_end_with_the_router() -> None:
    network = topology()
    os.kill(network.router.pid, signal.SIGKILL)
    assert wait_until_gone([network.initiator.pid, network.responder.pid]) == []
    network.close()


def test_an_ordinary_user_gets_it_in_a_user_namespace_or_the_reason() -> None:
    prefix = as_nobody()
    if not prefix:
        pytest.skip("no Python of this version is in an ordinary user's reach")
    script = (
        "from natcompat.commands.verify.namespaces import Topology\n"
        "try:\n"
        "    with Topology() as t: print(t.user_namespace)\n"
        "except OSError as error: print(error)"
    )
    done = subprocess.run(
        [*prefix, "-c", script], capture_output=True, text=True, check=True, env=environment(), timeout=60
    )
    assert done.stdout.startswith("True") or "user namespaces" in done.stdout or "/proc/sys" in done.stdout
