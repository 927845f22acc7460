"""Routing as the tests of packet devices see it: what the kernel answers, and policies to follow."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from typing import Any

import pytest

from natcompat.errors import NatCompatError
from natcompat.esp.device.rtnetlink import Rtnetlink
from natcompat.esp.device.tun import TunDevice
from natcompat.ipsec import Action, Direction, IPNetwork, Policy, TrafficSelector

VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["v4", "v6"])
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
EVERYTHING = {4: "0.0.0.0/0", 6: "::/0"}
INNER = {4: "10.1.0.1", 6: "fd00:9::1"}
ANYONE = {4: "198.51.100.7", 6: "2001:db8:7::7"}
PEER = {4: "203.0.113.2", 6: "2001:db8:113::2"}
UPLINK = {4: "192.0.2.1/24", 6: "2001:db8:1::1/64"}


def goes_to(address: str, mark: int = 0) -> str:
    """Return the name of the interface that packets take."""
    netlink = Rtnetlink()
    try:
        index = netlink.interface_to(ip_address(address), mark=mark)
    finally:
        netlink.close()
    return socket.if_indextoname(index) if index else ""


def rules() -> str:
    return "".join(
        subprocess.run(["ip", family, "rule"], check=True, capture_output=True, text=True).stdout
        for family in ("-4", "-6")
    )


def thrown(netlink: Rtnetlink) -> list[IPNetwork]:
    return [network for index, network, _ in netlink.routes() if not index]


@contextlib.contextmanager
def uplink(*versions: int) -> Iterator[TunDevice]:
    """A default route that is there before: by another TUN device, since that is at hand."""
    with TunDevice("uplink0") as device:
        for version in versions or (4, 6):
            device.add_address(UPLINK[version])
            device.add_route(EVERYTHING[version])
        yield device


LAN = "192.0.2.0/24"
ANY = "0.0.0.0/0"


def policy(destination: str, action: Action = Action.PROTECT, **changes: Any) -> Policy:
    """Return an outbound policy of this host."""
    version = ip_network(destination).version
    selector: dict[str, Any] = {"source": {4: "10.1.0.0/16", 6: "fd00:9::/64"}[version]}
    selector["destination"] = destination
    selector |= {
        name: changes.pop(name) for name in ("source", "protocol", "destination_port") if name in changes
    }
    outer: dict[str, Any] = {"reqid": 1}
    if action is Action.PROTECT:
        outer |= {"source": "192.0.2.1", "destination": PEER[4]}
    return Policy(
        direction=Direction.OUT, selector=TrafficSelector(**selector), action=action, **outer, **changes
    )


def forwarded(source: str, destination: str, interface: str) -> str:
    """Return the name of the interface that packets take which came in by another."""
    command = ["ip", "-oneline", "route", "get", destination, "from", source, "iif", interface]
    line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return line.partition(" dev ")[2].split()[0]


def out_of_memory(*_: object) -> None:
    raise NatCompatError(errno.ENOMEM, "no memory")


def drop_capabilities() -> None:
    """Take all capabilities from this process (capset(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = struct.pack("=Ii", 0x20080522, 0)  # _LINUX_CAPABILITY_VERSION_3, linux/capability.h
    assert libc.capset(header, bytes(24)) == 0, os.strerror(ctypes.get_errno())
