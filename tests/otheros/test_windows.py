"""natcompat under a model of Python on Windows: `windows` takes away what is not there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.running import ROOT, environment

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the model takes away what Linux has")

ELSEWHERE = {
    "natcompat.backends.linux_sockets.features": "filters and steering are of Linux",
    "natcompat.backends.linux": "for Linux",
    "natcompat.backends.linux_sockets.steering": "steering is of Linux",
    "natcompat.esp.datapath.native": "the C data path is not built there",
    "natcompat.esp.datapath.native_association": "the C data path is not built there",
    "natcompat.esp.carrier.native": "the C data path is not built there",
    "natcompat.esp.device.host_traffic": "of Linux",
    "natcompat.esp.device.outer_path": "of Linux",
    "natcompat.esp.device.routes": "of Linux",
    "natcompat.esp.device.rtnetlink": "of Linux",
    "natcompat.esp.device.stale_rules": "of Linux",
    "natcompat.esp.device.tun": "TUN devices of Linux",
    "natcompat.esp.device.watch": "of Linux",
    "natcompat.kernel.xfrm.netlink": "of Linux",
}
"""Modules that cannot be imported there, and need not."""
FOR_PYROUTE2 = "natcompat.kernel.xfrm."
"""What declares messages of netlink."""


def run(code: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run `code` in a process that has become Windows."""
    start = "import sys\nimport click, rich.console, rich.table, rich.live, pytest\n"
    become = "from tests.otheros import windows\nwindows.become()\n" if "pytest.main" not in code else ""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", start + become + code, *arguments],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )


def succeeds(code: str, *arguments: str) -> str:
    done = run(code, *arguments)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_model_lacks_the_modules_that_windows_lacks() -> None:
    succeeds("""
import importlib, os, select, socket
assert not hasattr(socket, "SO_REUSEPORT") and not hasattr(socket, "AF_NETLINK")
assert not hasattr(socket, "MSG_DONTWAIT") and not hasattr(socket.socket, "recvmsg")
assert not hasattr(os, "fork") and not hasattr(select, "poll") and sys.platform == "win32"
for name in windows.MODULES:
    try:
        importlib.import_module(name)
    except ImportError:
        continue
    raise AssertionError(name)
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
    try:
        sock.getsockname()
    except OSError:
        pass
    else:
        raise AssertionError("an unbound socket has a name")
""")


def test_conformance() -> None:
    plugins = ("cacheprovider", "xdist", "cov", "hypothesispytest")
    options = ["-q", "--noconftest", "--color=no", "--timeout=0"]
    options += [word for plugin in plugins for word in ("-p", f"no:{plugin}")]
    target = str(Path(__file__).parent / "windows_conformance.py")
    said = succeeds("sys.exit(pytest.main(sys.argv[1:]))", *options, target)
    match = re.fullmatch(r"(\d+) passed in [\d.]+s", said.splitlines()[-1])
    assert match is not None, said
    assert int(match[1]) > 400


def test_every_module_that_is_needed_can_be_imported() -> None:
    said = succeeds("""
import importlib, pkgutil
import natcompat
for module in pkgutil.walk_packages(natcompat.__path__, "natcompat."):
    if not module.name.endswith("__main__"):
        try:
            importlib.import_module(module.name)
        except Exception as error:
            print(module.name, repr(error))
""")
    failed = {line.split()[0]: line for line in said.splitlines()}
    unexpected = [
        line for name, line in failed.items() if name not in ELSEWHERE and not name.startswith(FOR_PYROUTE2)
    ]
    assert not unexpected


def test_probe_and_doctor_and_verify() -> None:
    said = succeeds("""
import natcompat
from natcompat import backends
found = {each.backend: each for each in natcompat.probe()}
assert [name for name, each in found.items() if each.viable] == ["userspace", "userspace:in-line"]
assert all("this is win32" in found[name].reason for name in found if not found[name].viable)
assert backends.select().name == backends.select(hands_over_esp=True).name == "userspace"
from natcompat.commands.main import main
sys.argv = ["natcompat", "doctor"]
main()
""")
    assert "auto takes userspace here" in said
    succeeds("""
from natcompat.commands.main import main
sys.argv = ["natcompat", "verify", "--no-nat"]
main()
""")


def test_esp_goes_through_queues() -> None:
    """Two ends with the portable data path and queue devices: inner packets arrive, both ways."""
    succeeds(THROUGH_QUEUES)


THROUGH_QUEUES = """
import socket
from natcompat import open_ipsec, set_nat_t_endpoint
from natcompat.esp.device.queue import QueueDevice
from natcompat.esp.userspace import UserspaceIPsec
from natcompat.ipsec import (
    Direction, Encr, Mode, Policy, SecurityAssociation, TrafficSelector, UDPEncapsulation
)
LOOPBACK = "127.0.0.1"
NETWORKS = "10.1.0.0/16", "10.2.0.0/16"
INNER = (
    bytes.fromhex("4500001c000000004011") + bytes(2) + bytes([10, 1, 0, 1, 10, 2, 0, 1]) + bytes(8),
    bytes.fromhex("4500001c000000004011") + bytes(2) + bytes([10, 2, 0, 1, 10, 1, 0, 1]) + bytes(8),
)

def checked(packet):
    total = sum(int.from_bytes(packet[at : at + 2], "big") for at in range(0, 20, 2))
    total = (total & 0xFFFF) + (total >> 16)
    return packet[:10] + (~((total & 0xFFFF) + (total >> 16)) & 0xFFFF).to_bytes(2, "big") + packet[12:]

INNER = tuple(map(checked, INNER))
try:
    open_ipsec("userspace")  # a TUN, which Windows lacks
except OSError as error:
    assert 'device="queue"' in error.remedy
else:
    raise AssertionError
ends = open_ipsec("userspace", device="queue"), UserspaceIPsec(QueueDevice())
socks = [socket.socket(socket.AF_INET, socket.SOCK_DGRAM) for _ in ends]
for sock, end in zip(socks, ends):
    sock.bind((LOOPBACK, 0))
    sock.settimeout(10)
    set_nat_t_endpoint(sock, backend="userspace", esp=end)
ports = [sock.getsockname()[1] for sock in socks]
for here, end in enumerate(ends):
    there = 1 - here
    for direction, spi, source, destination in (
        (Direction.OUT, 0x1000 + here, here, there), (Direction.IN, 0x1000 + there, there, here)
    ):
        end.add_sa(SecurityAssociation(
            spi=spi, source=LOOPBACK, destination=LOOPBACK, direction=direction, mode=Mode.TUNNEL,
            encryption=Encr.AES_GCM_16, encryption_key=bytes(range(20)), reqid=1,
            encapsulation=UDPEncapsulation(local_port=ports[here], remote_port=ports[there]),
        ))
        end.add_policy(Policy(
            direction=direction, mode=Mode.TUNNEL, reqid=1, source=LOOPBACK, destination=LOOPBACK,
            selector=TrafficSelector(source=NETWORKS[source], destination=NETWORKS[destination]),
        ))
for here, end in enumerate(ends):
    there = 1 - here
    assert end.device.put(INNER[here])
    # ESP is demultiplexed in line: it is taken out of the queue by who receives IKE
    socks[here].settimeout(0)
    import time
    deadline = time.monotonic() + 20
    socks[there].settimeout(0.05)
    while (packet := ends[there].device.get(timeout=0)) is None and time.monotonic() < deadline:
        try:
            socks[there].recv(65535)
        except TimeoutError:
            pass
    assert packet == INNER[here], packet
for each in (*ends, *socks):
    each.close()
"""
