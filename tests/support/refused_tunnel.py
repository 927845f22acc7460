"""A tunnel in C over TUNs that refuse coalesced packets; test_refusals.py runs it with the preload library.

Sends bytes over TCP, IPv4 and IPv6, and runs of UDP datagrams, and prints as JSON what was refused and lost.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from typing import Any

from natcompat.esp.carrier.native import NativeCarrier
from tests.support.tunnels import End, transfer, tunnel


def runs_of_datagrams(sender: End, receiver: End, version: int) -> int:
    """Send runs that the kernel segments (UDP_SEGMENT), and return how many datagrams arrive."""
    arrived = 0
    with (
        sender.socket(socket.SOCK_DGRAM, version) as source,
        receiver.socket(socket.SOCK_DGRAM, version) as target,
    ):
        source.setsockopt(socket.IPPROTO_UDP, 103, 1000)
        source.connect(target.getsockname()[:2])
        target.settimeout(2)
        for _ in range(20):
            source.send(os.urandom(20_000))
            for _ in range(20):
                arrived += len(target.recv(2048)) == 1000
    return arrived


def main() -> None:
    """Run from the command line; an argument: how many bytes of TCP."""
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    logging.getLogger("natcompat").addHandler(Kept())
    data = os.urandom(int(sys.argv[1]))
    with tunnel("c") as (near, far):
        result: dict[str, Any] = {}
        for version in (4, 6):
            begun = time.perf_counter()
            transfer(near, far, data, version)
            result[f"tcp{version}"] = time.perf_counter() - begun
            result[f"udp{version}"] = runs_of_datagrams(near, far, version)
        carrier = far.ipsec.carrier
        assert isinstance(carrier, NativeCarrier)
        result["refused"] = carrier.refused_offloads
        result["unwritten"] = sum(
            count for reason, count in far.ipsec.counters().items() if reason.value == "device"
        )
    result["lines"] = [line for line in lines if "refuses coalesced" in line]
    print(json.dumps(result))


if __name__ == "__main__":
    main()
