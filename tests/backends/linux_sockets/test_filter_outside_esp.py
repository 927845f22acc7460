"""The filter that drops IKE which came out of a transport-mode SA passes every other IKE.

That it drops needs ESP in the kernel: tests/lab/test_ike_inside_an_sa.py.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from ipaddress import ip_address
from typing import Any

import pytest

from natcompat.backends.linux_sockets import filters as bpf
from natcompat.contract import NON_ESP_MARKER
from natcompat.esp.engine.packet import checksum
from tests.support.esp import ip_packet
from tests.support.linux import ESP, LINUX, ike, ip, isolated, readable, send_ike, udp
from tests.support.steering import UDP_SEGMENT, peer_behind_veth, veth_pair

pytestmark = LINUX


@isolated(network=True)
@pytest.mark.parametrize("device", ["veth", "bridge", "tun", "lo"])
@pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
def test_ike_outside_of_esp_passes_by_every_kind_of_device(version: int, device: str) -> None:
    """Fragments and datagrams of GSO, too: the filter looks at the header of the link."""
    veth_pair()
    host = {4: "192.0.2.1", 6: "2001:db8::1"}[version]
    family = socket.AF_INET if version == 4 else socket.AF_INET6
    with contextlib.ExitStack() as stack:
        if device == "lo":
            peer = stack.enter_context(udp(family))
            host = "127.0.0.1" if version == 4 else "::1"
        else:
            peer = stack.enter_context(peer_behind_veth(version))
        if device == "bridge":
            ip("link", "add", "br0", "type", "bridge")
            ip("link", "set", "here", "master", "br0")
            ip("link", "set", "br0", "up")
            ip("address", "add", "192.0.2.1/24", "dev", "br0")
            ip("address", "add", "2001:db8::1/64", "dev", "br0", "nodad")
            ip("address", "del", "192.0.2.1/24", "dev", "here")
            ip("address", "del", "2001:db8::1/64", "dev", "here")
        sock = stack.enter_context(udp(family, "0.0.0.0" if version == 4 else "::"))
        bpf.attach_filter(sock, bpf.IKE_OUTSIDE_ESP)
        if device == "tun":
            stack.enter_context(contextlib.closing(sent_by_tun(sock, version)))
            assert sock.recv(100) == NON_ESP_MARKER + ike(1)
            return
        address = (host, sock.getsockname()[1])
        peer.setsockopt(socket.IPPROTO_IP, 10, 0)  # IP_MTU_DISCOVER, IP_PMTUDISC_DONT: fragments
        for size in (0, 1, 28, 1400, 9000, 60000):
            send_ike(peer, address, 1, size=max(size, 11))
            assert sock.recv(65535) == NON_ESP_MARKER + ike(1, max(size, 11))
        segment = NON_ESP_MARKER + ike(1, 96)
        ancillary = [(socket.IPPROTO_UDP, UDP_SEGMENT, (100).to_bytes(2, "little"))]
        peer.sendmsg([segment * 5], ancillary, 0, address)
        assert [sock.recv(200) for _ in range(5)] == [segment] * 5
        for payload in (b"\xff", ESP):
            peer.sendto(payload, address)
        assert not readable(sock, 0.05)


def sent_by_tun(sock: socket.socket, version: int) -> Any:
    """Return a TUN that has brought IKE to `sock`: a device whose packets have no header of a link."""
    from natcompat.esp.device.tun import TunDevice

    tun = TunDevice()
    tun.add_address("198.18.1.1/24")
    tun.add_address("2001:db8:19::1/64")
    source, destination = (
        ("198.18.1.2", "198.18.1.1") if version == 4 else ("2001:db8:19::2", "2001:db8:19::1")
    )
    segment = udp_segment(NON_ESP_MARKER + ike(1), source, destination, sock.getsockname()[1])
    deadline = time.monotonic() + 10
    while not readable(sock, 0.05):  # the kernel may not have the address at once
        assert time.monotonic() < deadline
        tun.write_burst([ip_packet(source, destination, segment)])
    return tun


def udp_segment(payload: bytes, source: str, destination: str, port: int) -> bytes:
    """Return a UDP datagram with a checksum, which IPv6 asks for."""
    length = 8 + len(payload)
    header = struct.pack("!HHHH", 4500, port, length, 0)
    pseudo = b"".join(ip_address(host).packed for host in (source, destination)) + struct.pack(
        "!II", length, 17
    )
    return struct.pack("!HHHH", 4500, port, length, checksum(pseudo + header + payload) or 0xFFFF) + payload
