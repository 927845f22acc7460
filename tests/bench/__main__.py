"""What natcompat costs, each figure beside the bare socket's in the same run: ``make bench-sockets``.

Ratios and not times: the subjects of one round run interleaved, in an order that changes, and what is
printed is the median over the rounds. Exit status 1 if a bar is missed.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console
from rich.table import Table

from natcompat import Viability, set_nat_t_endpoint
from natcompat.backends.base import Backend
from natcompat.backends.linux import LinuxBackend
from natcompat.kernel.xfrm.bypass import bypass

ROOT: Final = Path(__file__).resolve().parents[2]
PAYLOAD: Final = b"\xa5" * 1400


@dataclass(frozen=True, slots=True)
class Result:
    """One line of the table."""

    what: str
    on: str
    figure: float
    unit: str
    bar: float | None = None
    remark: str = ""

    @property
    def kept(self) -> bool:
        """Whether the figure is within its bar."""
        return self.bar is None or self.figure <= self.bar


# --- sending and receiving --------------------------------------------------------------------------


class LinuxSocketHalf(LinuxBackend):
    """Also where no SA can be installed; the socket costs the same."""

    def viability(self) -> Viability:
        """Say yes."""
        return Viability(self.name, True)


Pair = Callable[[socket.socket, Any], object]


def _through_buffer(buffer: bytearray) -> Pair:
    return lambda sock, peer: (sock.sendto(PAYLOAD, peer), sock.recv_into(buffer))


PAIRS: Final[dict[str, Pair]] = {
    "sendto + recvfrom": lambda sock, peer: (sock.sendto(PAYLOAD, peer), sock.recvfrom(2048)),
    "sendto + recv": lambda sock, peer: (sock.sendto(PAYLOAD, peer), sock.recv(2048)),
    "sendto + recv_into": _through_buffer(bytearray(2048)),
    "sendto + recvmsg": lambda sock, peer: (sock.sendto(PAYLOAD, peer), sock.recvmsg(2048)),
    "sendmsg + recvfrom": lambda sock, peer: (sock.sendmsg([PAYLOAD], [], 0, peer), sock.recvfrom(2048)),
    "send + recvfrom": lambda sock, _: (sock.send(PAYLOAD), sock.recvfrom(2048)),
}
BARE: Final = "bare"
EXEMPT: Final = "exempt"  # from the kernel's IPsec policies, as far as this process may
BARRED: Final = {"sendto + recvfrom": 1.3}

SUBJECTS: Final[dict[str, tuple[str | Backend, bool]]] = {
    # name: (backend, whether ESP is consumed in the process)
    "userspace, steering": ("userspace", True),
    "userspace, filter": ("userspace", False),
    "userspace:in-line": ("userspace:in-line", True),
    **({"linux": (LinuxSocketHalf(), False)} if sys.platform == "linux" else {}),
}


def bench_pairs(rounds: int, count: int) -> Iterator[Result]:
    """Send 1400 bytes from a socket to itself and receive them, with the option and without."""
    for method, pair in PAIRS.items():
        with contextlib.ExitStack() as opened:
            socks: dict[str, socket.socket] = {}
            for subject in (BARE, EXEMPT, *SUBJECTS):
                sock = socks[subject] = opened.enter_context(socket.socket(type=socket.SOCK_DGRAM))
                sock.bind(("127.0.0.1", 0))
                if subject == EXEMPT:
                    with contextlib.suppress(OSError):
                        bypass(sock)
                elif subject != BARE:
                    backend, consumed = SUBJECTS[subject]
                    set_nat_t_endpoint(sock, backend=backend, esp=(lambda *_: None) if consumed else None)
                if method.startswith("send +"):
                    sock.connect(sock.getsockname())
            took: dict[str, list[float]] = {subject: [] for subject in socks}
            for _ in range(rounds):
                for subject in random.sample(list(socks), len(socks)):
                    sock = socks[subject]
                    took[subject].append(_time(pair, sock, sock.getsockname(), count))
            yield Result(method, BARE, statistics.median(took[BARE]) * 1e6, "us")
            yield _ratio(method, EXEMPT, took, BARE)
            if "linux" in SUBJECTS:
                yield _ratio(method, "linux", took, BARE)
            for subject in SUBJECTS:
                # every IKE daemon exempts its socket, which the linux backend does for it
                yield _ratio(
                    method, subject, took, EXEMPT if subject == "linux" else BARE, BARRED.get(method)
                )


def _ratio(
    method: str, subject: str, took: dict[str, list[float]], floor: str, bar: float | None = None
) -> Result:
    ratios = [ours / theirs for ours, theirs in zip(took[subject], took[floor], strict=True)]
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    return Result(method, subject, statistics.median(ratios), f"x {floor}", bar, spread)


def _time(pair: Pair, sock: socket.socket, address: Any, count: int) -> float:
    for _ in range(50):
        pair(sock, address)
    repeat = range(count)
    begun = time.thread_time()  # what others do on this machine is not in it; nothing here waits
    for _ in repeat:
        pair(sock, address)
    return (time.thread_time() - begun) / count


# --- importing ------------------------------------------------------------------------------------


def bench_import(rounds: int) -> Iterator[Result]:
    """Import in fresh interpreters, in turns."""
    modules = ("socket", "natcompat")
    took: dict[str, list[float]] = {module: [] for module in modules}
    for _ in range(rounds + 1):  # the first writes the byte code
        for module in random.sample(modules, 2):
            code = (
                f"import sys, time; sys.path.insert(0, {str(ROOT)!r}); begun = time.perf_counter(); "
                f"import {module}; print(time.perf_counter() - begun)"
            )
            run = subprocess.run(
                [sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True
            )
            took[module].append(float(run.stdout))
    bare = statistics.median(took["socket"][1:])
    yield Result("import", "socket", bare * 1e3, "ms")
    ratios = [ours / theirs for ours, theirs in zip(took["natcompat"][1:], took["socket"][1:], strict=True)]
    yield Result("import", "natcompat", statistics.median(ratios), "x socket", 1.5)


# --- a flood of ESP ---------------------------------------------------------------------------------

IKE_MESSAGES: Final = 200
_SLOW: Final = 20e-6  # seconds of work per ESP packet
_FLOOD: Final = """
import socket, sys, time
sock = socket.socket(type=socket.SOCK_DGRAM)
packet = b"\\xc0\\xde\\0\\1" + bytes(1396)
end = time.monotonic() + float(sys.argv[2])
sent = 0
while time.monotonic() < end:
    for _ in range(64):
        sock.sendto(packet, ("127.0.0.1", int(sys.argv[1])))
    sent += 64
print(sent)
"""
_IKE: Final = """
import socket, sys, time
sock = socket.socket(type=socket.SOCK_DGRAM)
for number in range(int(sys.argv[2])):
    sock.sendto(bytes(4) + b"IKE %d" % number, ("127.0.0.1", int(sys.argv[1])))
    time.sleep(0.01)
"""


def work(*_: object) -> None:
    """Be a consumer of ESP that takes its time."""
    end = time.perf_counter() + _SLOW
    while time.perf_counter() < end:
        pass


def bench_flood() -> Iterator[Result]:
    """Count the IKE messages that are lost while one process sends as much ESP as it can."""
    for subject, bar in (("userspace, steering", 0), ("userspace:in-line", None)):
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.bind(("127.0.0.1", 0))
            endpoint = set_nat_t_endpoint(sock, backend=SUBJECTS[subject][0], esp=work)
            sock.settimeout(0.5)
            port = str(sock.getsockname()[1])
            seconds = IKE_MESSAGES * 0.01 + 1.5
            flood = _child(_FLOOD, port, str(seconds))
            time.sleep(0.3)  # the queues are full now
            ike = _child(_IKE, port, str(IKE_MESSAGES))
            received = set()
            while True:
                try:
                    received.add(sock.recv(2048))
                except TimeoutError:
                    if ike.poll() is not None and flood.poll() is not None:
                        break
            sent = int(flood.communicate()[0])
            ike.communicate()
            lost = IKE_MESSAGES - len(received)
            remark = f"of {IKE_MESSAGES}, beside {sent} ESP; {endpoint.stats().esp} of them consumed"
            yield Result("IKE lost in a flood of ESP", subject, lost, "messages", bar, remark)


def _child(code: str, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-I", "-c", code, *arguments], stdout=subprocess.PIPE, text=True)


# --- the command ----------------------------------------------------------------------------------


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@click.option("--rounds", default=50, show_default=True, help="Rounds of each measurement.")
@click.option("--count", default=500, show_default=True, help="Pairs per round.")
def main(as_json: bool, rounds: int, count: int) -> None:
    """Measure, print, and exit with 1 if a bar is missed."""
    results = [*bench_pairs(rounds, count), *bench_import(rounds), *bench_flood()]
    if as_json:
        print(json.dumps([asdict(result) | {"kept": result.kept} for result in results], indent=2))
    else:
        table = Table("what", "on", "median", "bar", "remark", title=f"{os.uname().sysname} {sys.version}")
        for result in results:
            bar = "" if result.bar is None else f"{result.bar:g} {'kept' if result.kept else 'MISSED'}"
            table.add_row(result.what, result.on, f"{result.figure:.2f} {result.unit}", bar, result.remark)
        Console(width=None if sys.stdout.isatty() else 120).print(table)
    sys.exit(any(not result.kept for result in results))


if __name__ == "__main__":
    main()
