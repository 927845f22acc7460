"""Steering of sockets bound to a device, of broadcast and multicast, and across network namespaces."""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest

from natcompat import NON_ESP_MARKER, set_nat_t_endpoint
from natcompat.backends.linux_sockets import features, options
from natcompat.esp.device.tun import TunDevice
from natcompat.esp.userspace import UserspaceIPsec
from tests.support.esp import native_providers
from tests.support.linux import (
    ESP,
    FAMILIES,
    LINUX,
    Collector,
    at,
    check_demultiplexing,
    closed,
    ike,
    ip,
    isolated,
    readable,
    send_ike,
    set_up,
    state,
    udp,
    wait_until,
)
from tests.support.steering import (
    glued_or_early,
    peer_behind_veth,
    steered,
    unshare_network,
    veth_pair,
)

pytestmark = LINUX


@isolated(network=True)
@pytest.mark.parametrize("when", ["before bind", "before the option", "after the option"])
def test_a_socket_bound_to_a_device(when: str) -> None:
    veth_pair()
    consumer = Collector()
    to_device = (socket.SOL_SOCKET, options.SO_BINDTODEVICE, b"here")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, peer_behind_veth() as peer:
        sock.settimeout(5)
        if when == "before bind":
            sock.setsockopt(*to_device)
        sock.bind(("0.0.0.0", 0))
        if when == "before the option":
            sock.setsockopt(*to_device)
        endpoint = steered(sock, consumer)
        if when == "after the option":
            sock.setsockopt(*to_device)
            assert endpoint.mode == "steering"
        address = at(sock, "192.0.2.1")
        check_demultiplexing(sock, consumer, peer, address)
        closed(endpoint)
        peer.sendto(ESP, address)
        assert sock.recv(64) == ESP


@isolated(network=True)
@pytest.mark.parametrize("on_device", [False, True], ids=["any device", "bound to a device"])
def test_broadcast_reaches_each_side_once(on_device: bool) -> None:
    """The kernel gives a copy to every socket of the port; only one of them counts."""
    veth_pair()
    consumer = Collector()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock, peer_behind_veth() as peer:
        sock.settimeout(5)
        if on_device:
            sock.setsockopt(socket.SOL_SOCKET, options.SO_BINDTODEVICE, b"here")
        sock.bind(("0.0.0.0", 0))
        endpoint = steered(sock, consumer)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        address = at(sock, "192.0.2.255")
        for payload in (NON_ESP_MARKER + ike(1), ESP, NON_ESP_MARKER + ike(2), ESP):
            peer.sendto(payload, address)
        assert [sock.recv(64), sock.recv(64)] == [ike(1), ike(2)]
        consumer.wait_for(2)
        # the engine has had its copies of all four when a last packet has come through its queue
        peer.sendto(ESP, at(sock, "192.0.2.1"))
        consumer.wait_for(3)
        assert not readable(sock)
        assert (endpoint.stats().handed_back, endpoint.stats().errors) == (0, 0)


@isolated(network=True)
@FAMILIES
def test_multicast_reaches_each_side_once(family: socket.AddressFamily) -> None:
    veth_pair()
    here = socket.if_nametoindex("here")
    consumer = Collector()
    with (
        udp(family, "::" if family == socket.AF_INET6 else "0.0.0.0") as sock,
        socket.socket(family, socket.SOCK_DGRAM) as peer,
    ):
        if family == socket.AF_INET6:
            group = socket.inet_pton(family, "ff02::4500")
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_JOIN_GROUP, group + struct.pack("@I", here))
            address: Any = ("ff02::4500", sock.getsockname()[1], 0, here)
        else:
            member = socket.inet_aton("224.0.0.250") + struct.pack(
                "@4si", socket.inet_aton("192.0.2.1"), here
            )
            sock.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
            peer.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, member)
            address = ("224.0.0.250", sock.getsockname()[1])
        endpoint = steered(sock, consumer)
        for payload in (NON_ESP_MARKER + ike(1), ESP):
            peer.sendto(payload, address)
        assert sock.recv(64) == ike(1)
        consumer.wait_for(1)
        peer.sendto(ESP, at(sock))
        consumer.wait_for(2)
        assert not readable(sock)
        assert (endpoint.stats().handed_back, endpoint.stats().errors) == (0, 0)


@isolated(network=True)
def test_a_socket_of_another_network_namespace_is_served_in_line() -> None:
    """The engine would be made in this one and join nothing."""
    set_up("lo")
    consumer = Collector()
    with udp() as sock, udp() as peer:
        before = state(sock)
        unshare_network()
        set_up("lo")
        endpoint = set_nat_t_endpoint(sock, backend="userspace", esp=consumer)
        assert endpoint.mode == "in line"
        assert "joining the application's port was refused" in endpoint.reason
        peer.sendto(ESP, at(sock))
        send_ike(peer, at(sock), 1)
        assert sock.recv(64) == ike(1)
        assert [packet for packet, _ in consumer.packets] == [ESP]
        closed(endpoint)
        assert {**state(sock), "alone": True} == before  # /proc/net is of the other namespace


@isolated(network=True)
def test_without_loopback_steering_is_believed_and_works() -> None:
    """Nothing can be proven while lo is down; between network namespaces it works all the same."""
    ip("link", "add", "here", "type", "veth", "peer", "there")
    ip("address", "add", "192.0.2.1/24", "dev", "here")
    ip("link", "set", "here", "up")
    assert features.steering_refused() == ""
    assert features.filter_refused() == ""
    consumer = Collector()
    with udp(host="192.0.2.1") as sock, peer_behind_veth() as peer:
        steered(sock, consumer)
        check_demultiplexing(sock, consumer, peer, at(sock, "192.0.2.1"))


@isolated(network=True)
@pytest.mark.parametrize("path", ["python", "c"])
def test_a_socket_bound_to_a_device_is_read_by_the_data_path(path: str) -> None:
    """Without a way back, IKE that comes to the ESP socket is counted by either data path."""
    if path == "c" and not native_providers():
        pytest.skip("the C data path is not built: python ffi/build_datapath.py")
    veth_pair()
    with (
        UserspaceIPsec(TunDevice(vnet_header=path == "c"), datapath=path) as ipsec,
        udp(host="0.0.0.0") as sock,
        peer_behind_veth() as peer,
    ):
        sock.setsockopt(socket.SOL_SOCKET, options.SO_BINDTODEVICE, b"here")
        endpoint = steered(sock, ipsec)
        attachment: Any = endpoint._switch.attachment()
        reader = type(attachment._steering._reader).__module__
        assert (reader == "natcompat.esp.carrier.native") == (path == "c")
        address = at(sock, "192.0.2.1")
        for payload in (ESP, ESP, b"\xff", NON_ESP_MARKER + ike(1)):
            peer.sendto(payload, address)
        assert sock.recv(64) == ike(1)
        wait_until(lambda: (endpoint.stats().esp, endpoint.stats().keepalives) == (2, 1))
        glued_or_early(endpoint, sock, address, peer)
        assert (endpoint.stats().handed_back, endpoint.stats().errors) == (0, 1)
        assert not readable(sock)
