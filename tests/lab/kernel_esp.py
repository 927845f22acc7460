"""The kernel's ESP with both its ends in this process: a gateway, and a peer that is plain UDP sockets.

    behind the gateway (a TUN device) -- "here", whose kernel does ESP -- veth -- "there", UDP sockets

Addresses are those of the conformance suite. What is for a tunnel goes in and out by the TUN device, so
the kernel forwards it; what is for transport mode comes from UDP sockets "here".
"""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import subprocess
import time
from collections.abc import Iterable
from contextlib import ExitStack
from ipaddress import ip_address
from typing import Any

from natcompat.esp.engine.packet import checksum
from natcompat.kernel.xfrm.bypass import bypass
from natcompat.kernel.xfrm.probe import UDP_ENCAP, UDP_ENCAP_ESPINUDP
from natcompat.testing.ipsec.harness import NETWORKS, OUTER, PATIENCE
from natcompat.testing.ipsec.traffic import PEER_PORTS, udp_packet
from tests.lab.topology import inside

TUNSETIFF, IFF_TUN, IFF_NO_PI = 0x400454CA, 0x0001, 0x1000  # linux/if_tun.h
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}

SETUP = """
for name in here there; do ip netns add $name; ip -n $name link set lo up; done
ip link add gate netns here address 02:00:00:00:00:01 type veth \
  peer name gate netns there address 02:00:00:00:00:02
ip netns exec here sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1 \
  net.ipv4.conf.all.rp_filter=0 net.ipv4.conf.default.rp_filter=0
"""


class KernelEsp:
    """The two namespaces, and what is open in them."""

    def __init__(self) -> None:
        with ExitStack() as stack:
            stack.callback(self._remove)
            subprocess.run(["sh", "-ec", SETUP], check=True)
            with inside("here"):
                self._tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
                stack.callback(os.close, self._tun)
                fcntl.ioctl(self._tun, TUNSETIFF, struct.pack("16sH22x", b"lan", IFF_TUN | IFF_NO_PI))
                self._statistics = stack.enter_context(open("/proc/thread-self/net/xfrm_stat"))
            subprocess.run(["sh", "-ec", "\n".join(self._commands())], check=True)
            # ESP, and who talks in transport mode: by port
            self._here: dict[tuple[int, int], socket.socket] = {}
            self._there: dict[tuple[int, int], socket.socket] = {}
            for version in OUTER:
                for port in (4500, 7001, 7002):
                    self._here[version, port] = stack.enter_context(self._udp("here", version, 0, port))
                sock = self._here[version, 4500]
                sock.setsockopt(socket.IPPROTO_UDP, UDP_ENCAP, UDP_ENCAP_ESPINUDP)
                bypass(sock)
                for port in PEER_PORTS:
                    self._there[version, port] = stack.enter_context(self._udp("there", version, 1, port))
            self._stack = stack.pop_all()

    @staticmethod
    def _remove() -> None:
        for name in ("here", "there"):
            subprocess.run(["ip", "netns", "delete", name], check=False)

    @staticmethod
    def _commands() -> Iterable[str]:
        yield "ip -n here link set lan up"
        for side, name in enumerate(("here", "there")):
            yield f"ip -n {name} link set gate up"
            for version, outer in OUTER.items():
                flags = "/30" if version == 4 else "/126 nodad"
                yield f"ip -n {name} address add {outer[side]}{flags} dev gate"
                # resolved for good: policies of transport mode are for neighbour discovery, too
                address = f"02:00:00:00:00:0{2 - side}"
                yield f"ip -n {name} neighbour add {outer[1 - side]} lladdr {address} dev gate nud permanent"
        for version, (near, _) in NETWORKS.items():
            yield f"ip -n here -{version} route add {near} dev lan"
            yield f"ip -n here -{version} route add default via {OUTER[version][1]}"

    @staticmethod
    def _udp(name: str, version: int, side: int, port: int) -> socket.socket:
        with inside(name):
            sock = socket.socket(FAMILY[version], socket.SOCK_DGRAM)
        sock.bind((OUTER[version][side], port))
        sock.setblocking(False)
        return sock

    def close(self) -> None:
        """Remove it all."""
        self._stack.close()

    def drops(self) -> int:
        """Return how many packets XFRM has dropped, for whatever reason."""
        self._statistics.seek(0)
        return sum(int(line.split()[1]) for line in self._statistics)

    def seal(self, inner: bytes) -> list[bytes]:
        """Send an inner packet; return the UDP payloads that arrive at the peer."""
        before = self.drops()
        version = inner[0] >> 4
        destination = inner[16:20] if version == 4 else inner[24:40]
        if destination == ip_address(OUTER[version][1]).packed:
            header = 20 if version == 4 else 40
            source_port, port = struct.unpack_from("!HH", inner, header)
            peer = (OUTER[version][1], port)
            try:
                self._here[version, source_port].sendto(inner[header + 8 :], peer)
            except OSError:
                assert self.drops() != before
        else:
            os.write(self._tun, hop(inner, 1))  # forwarding takes it off again
        return self._wait(list(self._there.values()), before)

    def deliver(self, packet: bytes, source: tuple[str, int]) -> list[bytes]:
        """Send a UDP payload from `source`, the peer; return the inner packets that arrive."""
        before = self.drops()
        self._send(packet, source)
        return self._wait([self._tun, self._here[4, 7002], self._here[6, 7002]], before)

    def deliver_all(self, packets: Iterable[bytes], source: tuple[str, int], *, last: bytes) -> list[bytes]:
        """Send UDP payloads from `source`; return the inner packets that leave a tunnel, up to `last`."""
        for packet in packets:
            self._send(packet, source)
        found: list[bytes] = []
        while not found or found[-1] != last:
            assert select.select([self._tun], [], [], PATIENCE)[0], found
            inner = self._take(self._tun)
            found += [] if inner is None else [inner]
        return found

    def _send(self, packet: bytes, source: tuple[str, int]) -> None:
        version = ip_address(source[0]).version
        self._there[version, source[1]].sendto(packet, (OUTER[version][0], 4500))

    def _wait(self, places: list[Any], before: int) -> list[bytes]:
        """Return what arrives, or nothing when XFRM has dropped something since `before`."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline:
            taken = [self._take(each) for each in select.select(places, [], [], 0)[0]]
            found = [each for each in taken if each is not None]
            if found or self.drops() != before:
                return found
            select.select(places, [], [], 0.01)
        raise AssertionError("a packet has neither arrived nor been counted as dropped")

    def _take(self, place: Any) -> bytes | None:
        """Return what is there, but for what IPv6 sends into a device of its own accord."""
        if place is self._tun:
            packet = os.read(self._tun, 65535)
            return None if packet[0] >> 4 == 6 and packet[24] == 0xFF else hop(packet, 1)
        payload, source = place.recvfrom(65535)
        if place in self._there.values():
            return bytes(payload)
        return udp_packet(source[0], place.getsockname()[0], payload)


def hop(packet: bytes, count: int) -> bytes:
    """Return `packet` with its hop limit (TTL) raised by `count`."""
    changed = bytearray(packet)
    if packet[0] >> 4 == 6:
        changed[7] += count
        return bytes(changed)
    changed[8] += count
    changed[10:12] = bytes(2)
    changed[10:12] = checksum(bytes(changed[: (packet[0] & 15) * 4])).to_bytes(2)
    return bytes(changed)
