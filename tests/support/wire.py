"""One host in a network namespace of its own, and every packet that leaves it or comes to it."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import Any, NamedTuple, Self

from natcompat import open_ipsec, set_nat_t_endpoint
from natcompat.esp.engine.packet import checksum
from natcompat.esp.userspace import UserspaceIPsec
from natcompat.ipsec import (
    Action,
    Direction,
    Policy,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)
from tests.support.esp import ip_packet

US = {4: "192.0.2.1", 6: "2001:db8:1::1"}
GATEWAY = {4: "192.0.2.254", 6: "2001:db8:1::fe"}
PEER = "203.0.113.2"
SPI = 0xC0DE1234
NEAR = {4: "10.1.0.1", 6: "fd00:1::1"}
"""The inner address of this host."""
NEAR_NET = {4: "10.1.0.0/16", 6: "fd00:1::/64"}
FAR = {4: "10.2.0.1", 6: "fd00:2::1"}
FAR_NET = {4: "10.2.0.0/16", 6: "fd00:2::/64"}
BEHIND = {4: "10.1.7.7", 6: "fd00:1::77"}
"""A host behind this one, on lan0."""
STRANGER = {4: "198.51.100.7", 6: "2001:db8:7::7"}
EVERYTHING = {4: "0.0.0.0/0", 6: "::/0"}
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
TCP, UDP, ICMP = 6, 17, {4: 1, 6: 58}


class Seen(NamedTuple):
    """A packet on the wire."""

    protocol: int
    source: str
    destination: str
    destination_port: int
    packet: bytes


def sh(*commands: str) -> str:
    """Run shell commands; return what they print."""
    return "".join(
        subprocess.run(command, shell=True, check=True, capture_output=True, text=True).stdout  # noqa: S602
        for command in commands
    )


class Host:
    """The namespace of this process: uplink eth0 with a default route, and lan0 behind it."""

    def __init__(self) -> None:
        sh("ip link set lo up")
        for name, far in (("eth0", "wire"), ("lan0", "lan")):
            sh(
                f"ip link add {name} type veth peer name {far}",
                f"ip link set {far} arp off up",
                f"ip link set {name} arp off up",
            )
        for version in (4, 6):
            length = {4: 24, 6: 64}[version]
            sh(f"ip addr add {US[version]}/{length} dev eth0 {'nodad' * (version == 6)}")
            sh(f"ip -{version} route add default via {GATEWAY[version]} dev eth0 onlink")
            sh(f"ip -{version} route add {BEHIND[version]} dev lan0")
        sh("sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1")
        for name in ("all", "eth0", "lan0"):
            sh(f"sysctl -qw net.ipv4.conf.{name}.rp_filter=0")
        self.taps = {name: self._tap(name) for name in ("eth0", "lan0")}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for tap in self.taps.values():
            tap.close()

    @staticmethod
    def _tap(name: str) -> socket.socket:
        tap = socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM, socket.htons(0x0003))
        tap.bind((name, 0))
        tap.setblocking(False)
        return tap

    def left(self, seconds: float = 0.2, interface: str = "eth0") -> list[Seen]:
        """Return what left by an interface until nothing comes for `seconds`, but no IPv6 housekeeping."""
        tap, packets = self.taps[interface], []
        while select.select([tap], [], [], seconds)[0]:
            try:
                packet, address = tap.recvfrom(65535)
            except OSError as error:
                if error.errno != errno.ENETDOWN:  # which is told once
                    raise
                continue
            if address[2] == socket.PACKET_OUTGOING:
                seen = parse(packet)
                if seen is not None and not (
                    ":" in seen.source and ip_address(seen.destination).is_multicast
                ):
                    packets.append(seen)
        return packets

    def clear(self, *destinations: str, seconds: float = 0.2) -> list[Seen]:
        """Return the packets to `destinations` that left by eth0."""
        return [seen for seen in self.left(seconds) if seen.destination in destinations]

    def arrive(self, packet: bytes, interface: str = "eth0") -> None:
        """Let a packet come in by an interface."""
        name = {"eth0": "wire", "lan0": "lan"}[interface]
        mac = bytes.fromhex(
            sh(f"ip -o link show {interface}").split("link/ether ")[1].split()[0].replace(":", "")
        )
        with socket.socket(socket.AF_PACKET, socket.SOCK_DGRAM) as sock:
            sock.sendto(packet, (name, 0x0800 if packet[0] >> 4 == 4 else 0x86DD, 0, 0, mac))


def parse(packet: bytes) -> Seen | None:
    """Return what can be seen of a packet; None: it is no IP packet."""
    if packet[0] >> 4 == 4:
        head, protocol = (packet[0] & 15) * 4, packet[9]
        source, destination = packet[12:16], packet[16:20]
    elif packet[0] >> 4 == 6:
        head, protocol, source, destination = 40, packet[6], packet[8:24], packet[24:40]
    else:
        return None
    ports = struct.unpack_from("!HH", packet, head) if len(packet) >= head + 4 else (0, 0)
    port = ports[1] if protocol in (TCP, UDP) else 0
    return Seen(protocol, str(ip_address(source)), str(ip_address(destination)), port, packet)


def datagram(
    source: str, destination: str, port: int = 9, payload: bytes = b"in the clear", *, source_port: int = 1234
) -> bytes:
    """Return an IP packet with a UDP datagram and its checksum."""
    length = (8 + len(payload)).to_bytes(2)
    ports = source_port.to_bytes(2) + port.to_bytes(2)
    pseudo = ip_address(source).packed + ip_address(destination).packed + bytes((0, UDP)) + length
    octets = pseudo + ports + length + bytes(2) + payload
    udp = ports + length + checksum(octets + bytes(len(octets) % 2)).to_bytes(2) + payload
    return ip_packet(source, destination, udp)


def fragment(packet: bytes, offset: int, *, more: bool) -> bytes:
    """Return an IPv4 packet as the fragment at `offset` (bytes)."""
    head = bytearray(packet[:20])
    head[6:8] = ((0x2000 if more else 0) | offset // 8).to_bytes(2)
    head[2:4] = len(packet).to_bytes(2)
    head[10:12] = bytes(2)
    head[10:12] = checksum(bytes(head)).to_bytes(2)
    return bytes(head) + packet[20:]


def policy(direction: Direction = Direction.OUT, version: int = 4, **changes: Any) -> Policy:
    """Return a policy between this host's inner network and the far one."""
    ends = [changes.pop("near", NEAR_NET[version]), changes.pop("far", FAR_NET[version])]
    source, destination = ends if direction is Direction.OUT else ends[::-1]
    selector = {
        name: changes.pop(name) for name in ("protocol", "source_port", "destination_port") if name in changes
    }
    outer: dict[str, Any] = {}
    if changes.get("action", Action.PROTECT) is Action.PROTECT:
        source_end, destination_end = (US[4], PEER) if direction is Direction.OUT else (PEER, US[4])
        outer = {"source": source_end, "destination": destination_end}
    return Policy(
        direction=direction,
        selector=TrafficSelector(source=source, destination=destination, **selector),
        **{"reqid": 1, **outer, **changes},
    )


def outbound_sa() -> SecurityAssociation:
    """Return the SA towards the peer."""
    return SecurityAssociation(
        spi=SPI,
        source=US[4],
        destination=PEER,
        direction=Direction.OUT,
        encryption=20,
        encryption_key=bytes(range(20)),
        reqid=1,
        encapsulation=UDPEncapsulation(local_port=4500, remote_port=4500),
    )


@contextlib.contextmanager
def protected(
    *, sa: bool = True, address: bool = True, host: Host | None = None, **options: Any
) -> Iterator[tuple[Host, UserspaceIPsec]]:
    """A host with IPsec in this process, an endpoint, an SA to the peer, and no policy yet."""
    with contextlib.ExitStack() as stack:
        if host is None:
            host = stack.enter_context(Host())
        sock = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        sock.bind((US[4], 4500))
        set_nat_t_endpoint(sock, backend="userspace")
        with open_ipsec("userspace", **options) as ipsec:
            assert isinstance(ipsec, UserspaceIPsec)
            if address:
                for version in (4, 6):
                    ipsec.add_address(NEAR[version])
            if sa:
                ipsec.add_sa(outbound_sa())
            host.left(0.1)
            yield host, ipsec


def send(destination: str, source: str = "", port: int = 9, *, device: str = "", count: int = 3) -> int:
    """Send UDP datagrams as an application does; return how many the system took."""
    version = ip_address(destination).version
    taken = 0
    with socket.socket(FAMILY[version], socket.SOCK_DGRAM) as sock:
        if source:
            try:
                sock.bind((source, 0))
            except OSError:  # the address was just taken away
                return 0
        if device:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, device.encode())
        for _ in range(count):
            with contextlib.suppress(OSError):  # refused is as good as dropped
                sock.sendto(b"inner plaintext", (destination, port))
                taken += 1
    return taken


def wait_for(condition: Callable[[], object], what: str, seconds: float = 1.0) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s"
        time.sleep(0.01)
