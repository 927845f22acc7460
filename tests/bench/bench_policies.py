"""What policies cost: adding one, a packet that one covers, and a packet to somebody else's network.

    python -m tests.bench.bench_policies [--json] [--counts 1 1000 10000]

Needs root, Linux and a TUN device; it works in network namespaces of its own. Packets: the processor time
that one `send()` of 100 bytes from a connected UDP socket takes its thread. Samples of the two contenders
alternate, and the ratio is the median of their ratios, so a machine whose speed changes changes both.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import socket
import statistics
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

from natcompat import open_ipsec
from natcompat.ipsec import IPsec, Policy
from tests.support.wire import NEAR, STRANGER, US, Host, outbound_sa, policy

_CLONE_NEWNET = 0x4000_0000
_SENDS = 500
"""`send()` calls in one sample."""

LIMITS = {"add_policy_ms": 5.0, "covered_ratio": 1.5, "stranger_ratio": 1.2}
"""Milliseconds for one more; the cost beside that with one policy; beside a host without natcompat."""

COVERED = ("10.2.0.0", 1000)
"""What the first of `port_policies` covers."""


def port_policies(count: int) -> Iterator[Policy]:
    """Yield policies with ports, each for another host."""
    for number in range(count):
        host = f"10.2.{number >> 8}.{number & 0xFF}"
        yield policy(near=NEAR[4], far=host, protocol=17, destination_port=1000 + number % 60000)


def connected(source: str, destination: str, port: int) -> socket.socket:
    """Return a UDP socket."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((source, 0))
    sock.connect((destination, port))
    return sock


def new_namespace() -> Host:
    """Move this thread into a network namespace with an uplink."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
        code = ctypes.get_errno()
        raise OSError(code, f"a network namespace: {os.strerror(code)}")
    return Host()


def elsewhere(*address: Any) -> tuple[Host, socket.socket]:
    """Return a host that natcompat never touches, and a socket there."""
    made: list[tuple[Host, socket.socket]] = []

    def make() -> None:
        host = new_namespace()
        made.append((host, connected(*address)))

    thread = threading.Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


def sample(sock: socket.socket) -> float:
    """Return what one `send()` costs, in nanoseconds."""
    payload = bytes(100)
    begin = time.thread_time_ns()
    for _ in range(_SENDS):
        sock.send(payload)
    return (time.thread_time_ns() - begin) / _SENDS


def compare(sock: socket.socket, other: socket.socket, samples: int) -> tuple[float, float]:
    """Return the median cost of a send by `sock`, and of its ratio to that of one by `other`."""
    costs, ratios = [], []
    for number in range(samples + 2):
        mine, theirs = sample(sock), sample(other)
        if number >= 2:  # warm
            costs.append(mine)
            ratios.append(mine / theirs)
    return statistics.median(costs), statistics.median(ratios)


def measure(counts: Sequence[int], samples: int) -> list[dict[str, Any]]:
    """Return one row for each number of policies."""
    rows: list[dict[str, Any]] = []
    bare_host, bare = elsewhere(US[4], STRANGER[4], 9)
    one_covered: float | None = None
    with bare_host, bare:
        for count in counts:
            with open_ipsec("userspace") as ipsec:
                ipsec.add_address(NEAR[4])
                ipsec.add_sa(outbound_sa())
                add_ms = add_all(ipsec, count)
                with connected(US[4], STRANGER[4], 9) as stranger, connected(NEAR[4], *COVERED) as covered:
                    stranger_ns, stranger_ratio = compare(stranger, bare, samples)
                    covered_ns, covered_to_bare = compare(covered, bare, samples)
            one_covered = one_covered or covered_to_bare
            rows.append(
                {
                    "policies": count,
                    "add_policy_ms": round(add_ms, 3),
                    "covered_ns": round(covered_ns),
                    "covered_ratio": round(covered_to_bare / one_covered, 3),
                    "stranger_ns": round(stranger_ns),
                    "stranger_ratio": round(stranger_ratio, 3),
                }
            )
    return rows


def add_all(ipsec: IPsec, count: int) -> float:
    """Add policies; return what one takes, the median of the last hundred, in milliseconds."""
    times = []
    for added in port_policies(count):
        begin = time.perf_counter()
        ipsec.add_policy(added)
        times.append((time.perf_counter() - begin) * 1000)
    return statistics.median(times[-100:])


def failures(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return which limits are exceeded with 1,000 policies."""
    return [
        f"{name} {row[name]} > {limit}"
        for row in rows
        if row["policies"] == 1000
        for name, limit in LIMITS.items()
        if row[name] > limit
    ]


def main() -> int:
    """Measure, print, and return 1 where a limit is exceeded."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--counts", type=int, nargs="*", default=[1, 1000, 10000])
    parser.add_argument("--samples", type=int, default=41)
    arguments = parser.parse_args()
    with new_namespace():
        rows = measure(arguments.counts, arguments.samples)
    failed = failures(rows)
    if arguments.json:
        print(json.dumps({"rows": rows, "failed": failed}))
    else:
        for row in rows:
            print(", ".join(f"{key} {value}" for key, value in row.items()))
        print("\n".join(failed) or "within the limits")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
