"""Sockets that are steered, and devices between two network namespaces."""

from __future__ import annotations

import ctypes
import os
import socket
from typing import Any

from natcompat import NatTEndpoint, set_nat_t_endpoint
from natcompat.backends.linux_sockets import filters as bpf
from natcompat.backends.linux_sockets import options
from tests.support.linux import (
    Collector,
    ike,
    ip,
    send_ike,
    set_up,
    udp,
    wait_until,
)

V6ONLY = socket.IPPROTO_IPV6, socket.IPV6_V6ONLY
REUSEPORT = socket.SOL_SOCKET, socket.SO_REUSEPORT
RECVERR = socket.IPPROTO_IP, options.IP_RECVERR
GRO = socket.IPPROTO_UDP, options.UDP_GRO
ENCAP = socket.IPPROTO_UDP, options.UDP_ENCAP
UDP_SEGMENT = 103  # include/uapi/linux/udp.h


def steered(sock: socket.socket, consumer: Any = None) -> NatTEndpoint:
    """Set the option and assert that it is steering that serves it."""
    endpoint = set_nat_t_endpoint(
        sock, backend="userspace", esp=consumer if consumer is not None else Collector()
    )
    assert (endpoint.mode, endpoint.reason) == ("steering", "")
    return endpoint


def veth_pair() -> None:
    """Make the device ``here`` with 192.0.2.1 and 2001:db8::1, its other end ``there``; set lo up."""
    set_up("lo")
    ip("link", "add", "here", "type", "veth", "peer", "there")
    ip("address", "add", "192.0.2.1/24", "broadcast", "192.0.2.255", "dev", "here")
    ip("address", "add", "2001:db8::1/64", "dev", "here", "nodad")
    ip("address", "add", "198.51.100.1/24", "dev", "there")
    ip("link", "set", "here", "up")
    ip("link", "set", "there", "up")


def peer_behind_veth(version: int = 4) -> socket.socket:
    """Return a socket in a new network namespace, to which ``there`` goes as 192.0.2.2 and 2001:db8::2."""
    ours = os.open("/proc/self/ns/net", os.O_RDONLY)
    try:
        unshare_network()
        set_up("lo")
        theirs = os.open("/proc/self/ns/net", os.O_RDONLY)
        set_network(ours)
        ip("link", "set", "there", "netns", f"/proc/{os.getpid()}/fd/{theirs}")
        set_network(theirs)
        ip("address", "add", "192.0.2.2/24", "broadcast", "192.0.2.255", "dev", "there")
        ip("address", "add", "2001:db8::2/64", "dev", "there", "nodad")
        ip("link", "set", "there", "up")
        ip("route", "add", "default", "via", "192.0.2.1")
        peer = udp(socket.AF_INET6, "::") if version == 6 else udp(host="0.0.0.0")
        os.close(theirs)
        return peer
    finally:
        set_network(ours)
        os.close(ours)


def unshare_network() -> None:
    assert ctypes.CDLL(None, use_errno=True).unshare(0x40000000) == 0  # CLONE_NEWNET, linux/sched.h


def set_network(descriptor: int) -> None:
    assert ctypes.CDLL(None, use_errno=True).setns(descriptor, 0x40000000) == 0


def glued_or_early(
    endpoint: NatTEndpoint, sock: socket.socket, address: Any, peer: socket.socket, number: int = 7
) -> None:
    """Have the kernel give one IKE message to the engine, by a program that sends `ike` there."""
    seen = endpoint.stats().handed_back + endpoint.stats().errors
    with socket.socket(fileno=os.dup(sock.fileno())) as plain:
        first_word = int.from_bytes(ike()[:4], "big")
        program = ((0x20, 0, 0, 4), (0x15, 0, 1, first_word), (0x06, 0, 0, 1), (0x06, 0, 0, 0))
        bpf._attach(plain, bpf.SO_ATTACH_REUSEPORT_CBPF, program)
        send_ike(peer, address, number)
        wait_until(lambda: endpoint.stats().handed_back + endpoint.stats().errors > seen)
        bpf.attach_steering(plain, 1)
