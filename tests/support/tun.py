"""TUN devices in tests: their MTU, their packets, the interfaces of the system."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import time
from collections.abc import Callable

import pytest

from natcompat.esp.device.tun import PATH, TunDevice

TUN = pytest.mark.skipif(
    not os.access(PATH, os.R_OK | os.W_OK), reason=f"there is no {PATH} that may be opened (modprobe tun)"
)


def interfaces() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


def mtu_of(name: str) -> int:
    """Return the MTU that the kernel has for an interface."""
    with socket.socket(type=socket.SOCK_DGRAM) as sock:  # /sys may be of another network namespace
        answer = fcntl.ioctl(
            sock, 0x8921, struct.pack("16s24x", name.encode())
        )  # SIOCGIFMTU, linux/sockios.h
    return int(struct.unpack_from("i", answer, 16)[0])


def read_until(
    device: TunDevice, wanted: Callable[[bytes], object], seconds: float = 10
) -> tuple[bytes, list[bytes]]:
    """Return the first packet that is `wanted`, and the packets before it."""
    others: list[bytes] = []
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        select.select([device], [], [], max(0, deadline - time.monotonic()))
        for packet in device.read_burst(most=1):
            if wanted(packet):
                return packet, others
            others.append(packet)
    raise AssertionError(f"it did not come, but {others}")
