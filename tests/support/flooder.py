"""Floods an endpoint with ESP, and says IKE in between: ``python flooder.py`` in a process of its own.

On stdin, pickled: where to, authentic ESP packets, how long. On stdout: how many IKE messages were sent.
Needs nothing but the standard library, so that it starts at once.
"""

from __future__ import annotations

import contextlib
import pickle
import socket
import struct
import sys
import time
from typing import Any

UDP_SEGMENT = 103  # linux/udp.h
IKE_INTERVAL = 0.01


def flood(sock: socket.socket, address: tuple[Any, ...], authentic: list[bytes], seconds: float) -> int:
    """Send as much as will go: authentic packets (then replays), tampered ones, garbage; and IKE."""
    size = len(authentic[0])
    runs = []
    for start in range(0, len(authentic), 32):
        run = authentic[start : start + 32]
        runs += [run, [each[:4] + b"\x7f" + each[5:] for each in run]]  # of the future: no replays
    runs.append([b"\1\2\3\4" + bytes(size - 4)] * 32)
    segments = [(socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", size))]
    sent, number = 0, 0
    begun = due = time.monotonic()
    while (now := time.monotonic()) < begun + seconds:
        with contextlib.suppress(BlockingIOError):
            sock.sendmsg(runs[number % len(runs)], segments, 0, address)
        number += 1
        if now >= due:
            due = now + IKE_INTERVAL
            sock.sendto(bytes(4) + b"IKE %d" % sent, address)
            sent += 1
    return sent


if __name__ == "__main__":
    to, packets, how_long = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the test
    with socket.socket(socket.AF_INET6 if ":" in to[0] else socket.AF_INET, socket.SOCK_DGRAM) as made:
        made.bind(("::" if ":" in to[0] else "0.0.0.0", 0))
        print(flood(made, to, packets, how_long))
