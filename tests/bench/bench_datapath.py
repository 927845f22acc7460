"""How fast ESP in user space is beside its peers, over veth between two network namespaces.

    make bench-datapath                                     as root; installs the peers
    python tests/bench/bench_datapath.py --only tcp --rounds 3
    python tests/bench/bench_datapath.py --write            also writes docs/datapath.md and its plot

Designs take turns within each round, and medians of the rounds are compared: a machine whose speed changes
changes all of them. All run with the priority -20; both ends, the load and its receiver share the processors.
AES-128-GCM-16 (ChaCha20-Poly1305 of WireGuard), inner MTU 1400. All traffic stays in namespaces of its own,
which go when it ends, however that is.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench import tunnels
from tests.bench.tunnel_end import CROWD, OUTER
from tests.bench.tunnels import Design, Libipsec, Natcompat, WireGuard, run

ROOT: Final = Path(__file__).parents[2]
MANY: Final = 100_000
LOSSLESS: Final = 0.005
"""The share of datagrams that may be lost at a rate that is called lossless."""
LARGE, SMALL = 1372, 64
"""Bytes of UDP payload."""

BARS: Final[dict[str, tuple[float, bool] | None]] = {
    # name: bar, whether more is better; None: reported only
    "TCP / kernel-libipsec": (12, True),
    "TCP per CPU second of both ends / kernel-libipsec": (15, True),
    "TCP / bare veth": (0.35, True),
    "TCP with libcrypto / kernel-libipsec": (8, True),
    "TCP / wireguard-go": (9, True),
    "TCP by the data path in Python / kernel-libipsec": (1.5, True),
    "crypto's share of the path's CPU time": (0.15, False),
    f"goodput at twice the lossless rate / lossless rate, {LARGE} B": (0.9, True),
    f"goodput at twice the lossless rate / lossless rate, {SMALL} B": (0.9, True),
    f"lossless packets per second, {SMALL} B / kernel-libipsec": (2, True),
    f"packets per second with {MANY:,} pairs of SAs / 64": (0.9, True),
    "TCP without segmentation on the veth / kernel-libipsec": (5, True),
    "TCP from a peer without UDP checksums / kernel-libipsec": (2.5, True),
    "IKE messages lost of 1,000 while ESP is offered twice what is lossless": (0, False),
    "IKE messages lost likewise, the data path in Python": (0, False),
    "two ESP threads on two SAs / one, packets per second": None,
}


class Bench:
    """What is measured, by name: samples of all rounds."""

    def __init__(self, seconds: float, directory: Path) -> None:
        self.seconds = seconds
        self.samples: dict[str, list[float]] = {}
        self.notes: dict[str, Any] = {}
        self._load = str(directory / "udp_load")
        run("gcc", "-O2", "-o", self._load, str(Path(__file__).with_name("udp_load.c")))

    def note(self, name: str, value: float) -> None:
        """Keep a sample, and show it."""
        self.samples.setdefault(name, []).append(value)
        print(f"  {name}: {value:,.3g}" if value < 1 else f"  {name}: {value:,.0f}", file=sys.stderr)

    def median(self, name: str) -> float:
        """Return the median of the rounds; 0 if it was not measured."""
        return statistics.median(self.samples[name]) if self.samples.get(name) else 0.0

    # --- TCP

    def tcp(self, design: Design, name: str) -> None:
        """Measure TCP from the first end to the second, in Mbit/s, and per CPU second of the ends."""
        server = design.start(1, "iperf3", "-s", "-1", "-B", design.target, stdout=subprocess.DEVNULL)
        time.sleep(0.3)  # iperf3 has no other way to say that it listens
        before = design.cpu()
        command = design.command(0, "iperf3", "-c", design.target, "-t", str(self.seconds), "-J")
        done = subprocess.run(command, capture_output=True, text=True, timeout=self.seconds + 30, check=False)
        cpu = design.cpu() - before
        with contextlib.suppress(subprocess.TimeoutExpired):
            server.wait(timeout=5)
        try:
            rate = json.loads(done.stdout)["end"]["sum_received"]["bits_per_second"] / 1e6
        except (ValueError, KeyError):
            print(f"  {name}: iperf3 failed: {done.stdout[-200:]}{done.stderr[-200:]}", file=sys.stderr)
            return
        self.note(f"{name}, Mbit/s", rate)
        if cpu > 0:
            self.note(f"{name}, Mbit per CPU second", rate * self.seconds / cpu)

    def crypto_share(self, design: Natcompat) -> None:
        """Measure the share of the ciphers' library of the processor time of both ends, with perf."""
        with tempfile.TemporaryDirectory() as directory:
            data = f"{directory}/perf.data"
            pids = ",".join(map(str, design.carriers()))
            record = ["perf", "record", "-q", "-e", "cpu-clock", "-F", "1999", "-o", data, "-p", pids]
            try:
                process = subprocess.Popen(
                    [*record, "--", "sleep", str(self.seconds)], stderr=subprocess.DEVNULL
                )
            except FileNotFoundError:
                return
            self.tcp(design, "natcompat under perf")
            process.wait(timeout=30)
            report = ["perf", "report", "-i", data, "--no-children", "-g", "none", "--sort", "dso", "-q"]
            lines = subprocess.run(report, capture_output=True, text=True, check=False).stdout.splitlines()
        shares = {line.split()[1]: float(line.split()[0].rstrip("%")) for line in lines if "%" in line}
        self.notes["shares of CPU time by library, %"] = dict(list(shares.items())[:6])
        self.note(
            "crypto's share",
            sum(share for name, share in shares.items() if "IPSec_MB" in name or "libcrypto" in name) / 100,
        )

    # --- UDP

    def udp(
        self,
        design: Design,
        size: int,
        rate: float,
        *,
        spread: tuple[int, int] | None = None,
        seconds: float = 1.5,
    ) -> tuple[float, float]:
        """Offer datagrams; return how many were sent, and received, per second."""
        target = design.target if spread is None else str(CROWD)
        counter = design.start(1, self._load, "count", "7777", str(seconds + 0.7), stdout=subprocess.PIPE)
        assert counter.stdout is not None
        counter.stdout.readline()
        more = () if spread is None else map(str, spread)
        command = design.command(
            0, self._load, "send", target, "7777", str(size), str(int(rate)), str(seconds), *more
        )
        sent = int(run(*command))
        received = int(counter.communicate(timeout=seconds + 10)[0])
        return sent / seconds, received / seconds

    def lossless(self, design: Design, name: str, size: int) -> float:
        """Find the highest rate at which almost nothing is lost, and note it."""
        low, high = 0.0, 8000.0
        while high < 2e6 and self._passes(design, size, high):
            low, high = high, high * 2
        for _ in range(4):
            middle = (low + high) / 2
            if self._passes(design, size, middle):
                low = middle
            else:
                high = middle
        self.note(f"{name}, lossless pps, {size} B", low)
        return low

    def _passes(self, design: Design, size: int, rate: float) -> bool:
        """Tell whether nothing is lost; what else runs here may spoil a try, not three."""
        for _ in range(3):
            sent, received = self.udp(design, size, rate)
            if sent >= 0.9 * rate and received >= (1 - LOSSLESS) * sent:
                return True
        return False

    def overload(self, design: Design, name: str, size: int, lossless: float) -> None:
        """Note what arrives of twice as much as is lossless."""
        if lossless:
            _, received = self.udp(design, size, 2 * lossless)
            self.note(f"{name}, goodput at twice the lossless rate, {size} B", received / lossless)

    def ike(self, design: Natcompat, lossless: float) -> None:
        """Send IKE among twice as much ESP as is lossless, with GRO on the veth; note how much is lost.

        GRO asks one socket of the port, by the flow's hash, whether to coalesce; the notes tell what it did.
        """
        # GRO leaves alone what comes in one piece, and looks at one socket of the port only
        run(*design.command(0, "ethtool", "-K", "wire", "tx-udp-segmentation", "off"))
        run(*design.command(1, "ethtool", "-K", "wire", "gro", "on", "rx-udp-gro-forwarding", "on"))
        design.say(1)
        before, softnet = design.answer(1), dropped_in_softnet()
        counter = design.start(1, self._load, "count", "7777", "6", stdout=subprocess.PIPE)
        load = design.start(
            0, self._load, "send", design.target, "7777", str(LARGE), str(int(2 * lossless)), "5",
            stdout=subprocess.PIPE,
        )  # fmt: skip
        time.sleep(0.5)
        design.say(0, f"ike {OUTER[1]} 1000")
        design.answer(0)
        for process in (load, counter):
            process.communicate(timeout=30)
        design.say(1)
        after = design.answer(1)
        lost, softnet = 1000 - (after["ike"] - before["ike"]), dropped_in_softnet() - softnet
        self.note(f"{design.name}, IKE lost", lost)
        self.notes[f"{design.name}, IKE under load"] = {
            "lost": lost,
            "handed back": after["handed_back"] - before["handed_back"],
            "drops of softnet_stat": softnet,
            "drops of the queue of ESP": after["queue_drops"] - before["queue_drops"],
        }


def dropped_in_softnet() -> int:
    """Return how many packets this kernel dropped before any socket, in all namespaces."""
    return sum(int(line.split()[1], 16) for line in Path("/proc/net/softnet_stat").read_text().splitlines())


# --- what belongs together


def bench_tcp(bench: Bench, rounds: int) -> None:
    """TCP of all designs."""
    no_segments = Natcompat("natcompat, no segmentation on the veth")
    no_checksums = Natcompat("natcompat, no UDP checksums", no_checksum=True)
    designs: list[Design] = [
        Natcompat("natcompat, best ciphers"),
        Natcompat("natcompat, libcrypto", provider="libcrypto"),
        Natcompat("natcompat, Python", path="python"),
        no_segments,
        no_checksums,
        Libipsec(),
        WireGuard(),
        Design(),
    ]
    with contextlib.ExitStack() as stack:
        for design in designs:
            stack.enter_context(design)
        for end in range(2):
            run(*no_segments.command(end, "ethtool", "-K", "wire", "tx-udp-segmentation", "off"))
        for _ in range(rounds):
            for design in designs:
                bench.tcp(design, design.name)
        for _ in range(min(rounds, 3)):
            best = designs[0]
            assert isinstance(best, Natcompat)
            bench.crypto_share(best)


def bench_udp(bench: Bench, rounds: int) -> None:
    """Rates without loss, and twice as much; IKE meanwhile."""
    ours, peer = Natcompat("natcompat"), Libipsec()
    with ours, peer:
        for _ in range(rounds):
            for size in (LARGE, SMALL):
                for design, name in ((ours, "natcompat"), (peer, "kernel-libipsec")):
                    rate = bench.lossless(design, name, size)
                    bench.overload(design, name, size, rate)
        bench.ike(ours, max(bench.samples[f"natcompat, lossless pps, {LARGE} B"]))
    with Natcompat("natcompat, Python", path="python") as portable:
        bench.ike(portable, bench.lossless(portable, portable.name, LARGE))


def bench_many(bench: Bench, rounds: int) -> None:
    """As much as goes through 64 flows, with few SAs and with many."""
    few, many = Natcompat("64 pairs of SAs", pairs=64), Natcompat(f"{MANY:,} pairs of SAs", pairs=MANY)
    with few, many:
        for _ in range(rounds):
            for design, stride in ((few, 1), (many, MANY // 64)):
                bench.udp(design, SMALL, 1000, spread=(64, stride), seconds=0.2)  # ways are found
                _, received = bench.udp(design, SMALL, 300_000, spread=(64, stride))
                bench.note(f"{design.name}, pps, {SMALL} B", received)


def bench_threads(bench: Bench, rounds: int) -> None:
    """As much as two threads open of two SAs, whose SPIs are steered to either, and one thread of both."""
    one, two = (
        Natcompat("one ESP thread", pairs=2, engines=1),
        Natcompat("two ESP threads", pairs=2, engines=2),
    )
    with one, two:
        for _ in range(rounds):
            for design in (one, two):
                bench.udp(design, SMALL, 1000, spread=(2, 1), seconds=0.2)  # ways are found
                _, received = bench.udp(design, SMALL, 600_000, spread=(2, 1))
                bench.note(f"{design.name}, two SAs, pps, {SMALL} B", received)


GROUPS: Final[dict[str, Callable[[Bench, int], None]]] = {
    "tcp": bench_tcp,
    "udp": bench_udp,
    "many": bench_many,
    "threads": bench_threads,
}


def ratios(bench: Bench) -> dict[str, float]:
    """Return what the bars are for, as far as it was measured."""
    peer = "strongSwan kernel-libipsec"
    tcp, per_cpu = "{}, Mbit/s", "{}, Mbit per CPU second"
    pairs = [
        ("TCP / kernel-libipsec", tcp.format("natcompat, best ciphers"), tcp.format(peer)),
        (
            "TCP per CPU second of both ends / kernel-libipsec",
            per_cpu.format("natcompat, best ciphers"),
            per_cpu.format(peer),
        ),
        ("TCP / bare veth", tcp.format("natcompat, best ciphers"), tcp.format("bare veth")),
        ("TCP with libcrypto / kernel-libipsec", tcp.format("natcompat, libcrypto"), tcp.format(peer)),
        ("TCP / wireguard-go", tcp.format("natcompat, best ciphers"), tcp.format("wireguard-go")),
        (
            "TCP by the data path in Python / kernel-libipsec",
            tcp.format("natcompat, Python"),
            tcp.format(peer),
        ),
        (
            f"lossless packets per second, {SMALL} B / kernel-libipsec",
            f"natcompat, lossless pps, {SMALL} B",
            f"kernel-libipsec, lossless pps, {SMALL} B",
        ),
        (
            f"packets per second with {MANY:,} pairs of SAs / 64",
            f"{MANY:,} pairs of SAs, pps, {SMALL} B",
            f"64 pairs of SAs, pps, {SMALL} B",
        ),
        (
            "two ESP threads on two SAs / one, packets per second",
            f"two ESP threads, two SAs, pps, {SMALL} B",
            f"one ESP thread, two SAs, pps, {SMALL} B",
        ),
        (
            "TCP without segmentation on the veth / kernel-libipsec",
            tcp.format("natcompat, no segmentation on the veth"),
            tcp.format(peer),
        ),
        (
            "TCP from a peer without UDP checksums / kernel-libipsec",
            tcp.format("natcompat, no UDP checksums"),
            tcp.format(peer),
        ),
    ]
    found = {
        name: bench.median(one) / bench.median(other)
        for name, one, other in pairs
        if bench.median(one) and bench.median(other)
    }
    for size in (LARGE, SMALL):
        name = f"goodput at twice the lossless rate / lossless rate, {size} B"
        if value := bench.median(f"natcompat, goodput at twice the lossless rate, {size} B"):
            found[name] = value
    if value := bench.median("crypto's share"):
        found["crypto's share of the path's CPU time"] = value
    for name, sample in (
        ("IKE messages lost of 1,000 while ESP is offered twice what is lossless", "natcompat, IKE lost"),
        ("IKE messages lost likewise, the data path in Python", "natcompat, Python, IKE lost"),
    ):
        if bench.samples.get(sample):
            found[name] = bench.median(sample)
    return {name: found[name] for name in BARS if name in found}


def machine() -> dict[str, Any]:
    """Return on what, and when, this was measured."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "kernel": platform.release(),
        "processors": f"{os.cpu_count()} x {models[0] if models else platform.machine()}",
        "load before": " ".join(Path("/proc/loadavg").read_text().split()[:3]),
    }


def table(result: dict[str, Any]) -> str:
    """Return the figures as Markdown."""
    about = result["machine"]
    lines = [
        f"{about['date']}, Linux {about['kernel']}, {about['processors']}, load average before: "
        f"{about['load before']}; medians of {result['rounds']} rounds.",
        "",
        "| | bar | measured |",
        "|---|---|---|",
    ]
    for name, value in result["ratios"].items():
        bar = BARS[name]
        wanted = f"{'>=' if bar[1] else '<='} {bar[0]:g}" if bar else ""
        lines.append(f"| {name} | {wanted} | {value:.3g} |")
    lines += ["", "| | median | lowest | highest |", "|---|---|---|---|"]
    for name, values in result["samples"].items():
        shown = (statistics.median(values), min(values), max(values))
        lines.append(
            f"| {name} | " + " | ".join(f"{v:,.0f}" if v >= 10 else f"{v:.3g}" for v in shown) + " |"
        )
    for name, note in result["notes"].items():
        lines += ["", f"{name}: " + ", ".join(f"{key} {value}" for key, value in note.items())]
    return "\n".join(lines) + "\n"


MARK: Final = "<!-- measured: what follows is written by make bench-datapath ARGS=--write -->\n"


def write(result: dict[str, Any]) -> None:
    """Put the table and the plot into docs/."""
    page = ROOT / "docs" / "datapath.md"
    head, _, _ = page.read_text().partition(MARK)
    page.write_text(head + MARK + "\n" + table(result))
    import matplotlib as mpl  # type: ignore[import-not-found,import-untyped,unused-ignore]

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "natcompat"
    from matplotlib import pyplot  # type: ignore[import-not-found,import-untyped,unused-ignore]

    rates = {
        name.removesuffix(", Mbit/s"): statistics.median(values)
        for name, values in result["samples"].items()
        if name.endswith(", Mbit/s") and "perf" not in name
    }
    ordered = sorted(rates.items(), key=lambda item: item[1])
    figure, axes = pyplot.subplots(figsize=(8, 0.45 * len(ordered) + 1))
    bars = axes.barh([name for name, _ in ordered], [value for _, value in ordered])
    axes.bar_label(bars, fmt="{:,.0f}", padding=3)
    axes.set_xlabel("Mbit/s of TCP")
    axes.margins(x=0.15)
    figure.tight_layout()
    figure.savefig(ROOT / "docs" / "datapath.svg", metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=GROUPS, action="append", help="a part of it; may be repeated")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=3, help="of each TCP transfer")
    parser.add_argument("--json", type=Path, help="where to write all samples")
    parser.add_argument("--write", action="store_true", help="write docs/datapath.md and docs/datapath.svg")
    options = parser.parse_args(arguments)
    if os.geteuid():
        raise SystemExit("network namespaces and TUN devices with names take root")
    packages = tunnels.missing()
    if packages:
        tunnels.install(packages)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was made is removed
    with contextlib.suppress(OSError):  # what else runs here shall matter less; the designs inherit it
        os.setpriority(os.PRIO_PROCESS, 0, -20)
    about = machine()
    with tempfile.TemporaryDirectory() as directory:
        bench = Bench(options.seconds, Path(directory))
        for name in options.only or GROUPS:
            print(f"[bench] {name}", file=sys.stderr)
            GROUPS[name](bench, options.rounds)
    result = {
        "machine": about,
        "rounds": options.rounds,
        "ratios": ratios(bench),
        "samples": bench.samples,
        "notes": bench.notes,
    }
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    if options.write:
        write(result)
    print(table(result))


if __name__ == "__main__":
    main()
