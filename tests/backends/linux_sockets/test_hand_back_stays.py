"""IKE that is handed back never leaves the host, whatever routes, rules, netfilter and socket options say."""

from __future__ import annotations

import contextlib
import select
import socket
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from natcompat import NON_ESP_MARKER, NatTEndpoint, set_nat_t_endpoint
from natcompat.backends.linux_sockets import features, options
from natcompat.endpoint.state import state_of
from tests.support.linux import ESP, LINUX, Collector, at, ike, ip, isolated, readable, send_ike, set_up, udp
from tests.support.steering import GRO, glued_or_early, peer_behind_veth, steered, veth_pair

pytestmark = LINUX

_ETH_P_ALL = 3  # include/uapi/linux/if_ether.h
_OUTGOING = 4  # PACKET_OUTGOING, include/uapi/linux/if_packet.h
HERE = {4: "192.0.2.1", 6: "2001:db8::1"}


def nft(*rules: str) -> None:
    for rule in rules:
        subprocess.run(["nft", rule], check=True)


def local_traffic_has_a_table_of_its_own() -> None:
    """Make everything that this host sends go by the wire, even to its own addresses."""
    for family in ("-4", "-6"):
        ip(family, "rule", "add", "pref", "10", "iif", "lo", "lookup", "77")
        ip(family, "rule", "add", "pref", "20", "lookup", "local")
        ip(family, "rule", "del", "pref", "0")
    ip("route", "add", "default", "via", "192.0.2.2", "table", "77")
    ip("-6", "route", "add", "default", "via", "2001:db8::2", "dev", "here", "table", "77")


def netfilter_changes_the_destination() -> None:
    nft("add table inet t", "add chain inet t o { type nat hook output priority -100; }")
    nft("add rule inet t o meta nfproto ipv4 udp dport 4500 dnat ip to 198.51.100.9")
    nft("add rule inet t o meta nfproto ipv6 udp dport 4500 dnat ip6 to 2001:db8:1::9")


def netfilter_sets_a_mark_with_a_table_of_its_own() -> None:
    local_traffic_has_a_table_of_its_own()
    nft("add table inet t", "add chain inet t o { type route hook output priority -150; }")
    nft("add rule inet t o udp dport 4500 meta mark set 5")
    ip("rule", "add", "pref", "1", "fwmark", "5", "lookup", "77")
    ip("-6", "rule", "add", "pref", "1", "fwmark", "5", "lookup", "77")


def the_address_is_of_a_bridge() -> None:
    ip("link", "add", "br0", "type", "bridge")
    ip("link", "set", "br0", "up")
    ip("address", "del", "192.0.2.1/24", "dev", "here")
    ip("-6", "address", "del", "2001:db8::1/64", "dev", "here")
    ip("link", "set", "here", "master", "br0")
    ip("address", "add", "192.0.2.1/24", "dev", "br0")
    ip("-6", "address", "add", "2001:db8::1/64", "dev", "br0", "nodad")


def nothing_special() -> None:
    pass


SITUATIONS = [
    nothing_special,
    local_traffic_has_a_table_of_its_own,
    netfilter_changes_the_destination,
    netfilter_sets_a_mark_with_a_table_of_its_own,
    the_address_is_of_a_bridge,
]
in_situations = pytest.mark.parametrize("situation", SITUATIONS, ids=lambda make: make.__name__)


@contextlib.contextmanager
def sent_by(device: str) -> Iterator[Callable[[], list[bytes]]]:
    """Return a function that returns the packets that left by `device` since the beginning."""
    packets: list[bytes] = []
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(_ETH_P_ALL)) as capture:
        capture.bind((device, _ETH_P_ALL))

        def sent() -> list[bytes]:
            while select.select([capture], [], [], 0.05)[0]:
                packet, address = capture.recvfrom(65535)
                if address[2] == _OUTGOING:
                    packets.append(packet)
            return packets

        yield sent


def nothing_of_it(packets: list[bytes], endpoint: NatTEndpoint, sock: socket.socket) -> bool:
    state = state_of(sock)
    assert state is not None
    tag = state.envelope_prefix[len(NON_ESP_MARKER) :]
    return not any(tag in packet or ike(7) in packet for packet in packets)


@isolated(network=True)
@in_situations
@pytest.mark.parametrize(
    ("host", "version"),
    [("192.0.2.1", 4), ("0.0.0.0", 4), ("::", 6), ("::", 4)],
    ids=["an IPv4 address", "any IPv4 address", "any IPv6 address", "dual stack"],
)
def test_ike_returns_by_lo_and_leaves_by_no_device(
    host: str, version: int, situation: Callable[[], None]
) -> None:
    veth_pair()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with udp(family, host, 4500) as sock, peer_behind_veth(version) as peer, sent_by("here") as sent:
        situation()
        endpoint = steered(sock, Collector(coalesce=True))
        assert (endpoint.hand_back, endpoint.hand_back_reason) == ("loopback", "")
        destination = HERE[version]
        info = (
            (socket.IPPROTO_IPV6, socket.IPV6_RECVPKTINFO)
            if family == socket.AF_INET6
            else (socket.IPPROTO_IP, options.IP_PKTINFO)
        )
        sock.setsockopt(*info, 1)
        glued_or_early(endpoint, sock, (destination, 4500), peer)
        stats = endpoint.stats()
        assert nothing_of_it(sent(), endpoint, sock)
        if situation is netfilter_changes_the_destination and not readable(sock, 0.2):
            assert stats.handed_back + stats.errors == 1
            return  # another address has no socket, or over IPv6 no route by lo: lost, but shown to nobody
        assert (stats.handed_back, stats.errors) == (1, 0)
        message, ancillary, _, source = sock.recvmsg(2048, 256)
        assert message == ike(7)
        mapped = "::ffff:" if family == socket.AF_INET6 and version == 4 else ""
        assert source[0] == mapped + {4: "192.0.2.2", 6: "2001:db8::2"}[version]
        # the message's own destination and interface, not those of its envelope
        device = socket.if_nametoindex("br0" if situation is the_address_is_of_a_bridge else "here")
        ((_, _, data),) = [entry for entry in ancillary if entry[1] in (8, 50)]
        if family == socket.AF_INET6:
            assert data == socket.inet_pton(family, mapped + destination) + device.to_bytes(4, "little")
        else:
            assert data == device.to_bytes(4, "little") + 2 * socket.inet_aton(destination)


@isolated(network=True)
@in_situations
@pytest.mark.parametrize(
    ("host", "device", "reason"),
    [
        ("2001:db8::1", b"", "2001:db8::1 is not reached by lo"),
        ("::", b"here", "bound to a device"),
        ("0.0.0.0", b"here", "bound to a device"),
    ],
    ids=["an IPv6 address", "a device, IPv6", "a device, IPv4"],
)
def test_where_no_way_by_lo_exists_nothing_is_coalesced_and_stray_ike_is_counted(
    host: str, device: bytes, reason: str, situation: Callable[[], None]
) -> None:
    veth_pair()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    version = 6 if family == socket.AF_INET6 else 4
    consumer = Collector(coalesce=True)
    with udp(family, host, 4500) as sock, peer_behind_veth(version) as peer, sent_by("here") as sent:
        situation()
        if device:
            bridge = situation is the_address_is_of_a_bridge
            sock.setsockopt(socket.SOL_SOCKET, options.SO_BINDTODEVICE, b"br0" if bridge else device)
        endpoint = steered(sock, consumer)
        assert endpoint.hand_back == "none"
        assert reason in endpoint.hand_back_reason
        esp_socket: Any = getattr(endpoint._switch.attachment(), "esp_socket", None)
        assert esp_socket.getsockopt(*GRO) == 0
        address = (HERE[version], 4500)
        glued_or_early(endpoint, sock, address, peer)
        assert (endpoint.stats().handed_back, endpoint.stats().errors) == (0, 1)
        assert nothing_of_it(sent(), endpoint, sock)
        send_ike(peer, address, 8)
        peer.sendto(ESP, address)
        assert sock.recv(64) == ike(8)
        assert consumer.wait_for(1)[0][0] == ESP


@isolated(network=True)
def test_an_envelope_that_was_seen_forges_nothing() -> None:
    """Netfilter may be told to duplicate packets of lo onto the wire."""
    veth_pair()
    nft("add table ip t", "add chain ip t o { type filter hook output priority 0; }")
    nft("add rule ip t o udp dport 4500 dup to 192.0.2.2 device here")
    with udp(host="192.0.2.1", port=4500) as sock, peer_behind_veth() as peer, sent_by("here") as sent:
        endpoint = steered(sock)
        state = state_of(sock)
        assert state is not None
        glued_or_early(endpoint, sock, at(sock, "192.0.2.1"), peer)
        prefix = state.envelope_prefix
        (seen,) = [packet[packet.index(prefix) :] for packet in sent() if prefix in packet]
        source = seen[20:24]
        assert source == socket.inet_aton("192.0.2.2")
        assert sock.recvfrom(2048) == (ike(7), ("192.0.2.2", peer.getsockname()[1]))
        forged_source = seen[:20] + socket.inet_aton("203.0.113.9") + seen[24:]
        forged_message = seen.replace(b"IKE 000007", b"IKE 666666")
        forged_count = seen[:16] + (int.from_bytes(seen[16:20], "big") + 1).to_bytes(4, "big") + seen[20:]
        for forged in (seen, forged_source, forged_message, forged_count):
            peer.sendto(forged, at(sock, "192.0.2.1"))
            # no envelope: an ordinary datagram of whoever sent it
            assert sock.recvfrom(2048) == (forged[4:], ("192.0.2.2", peer.getsockname()[1]))


@isolated(network=True)
@pytest.mark.parametrize("when", ["before", "after"])
def test_esp_and_ike_by_tproxy_go_where_they_belong(when: str) -> None:
    """TPROXY looks sockets up without the packet: in a group it would give ESP to the application."""
    veth_pair()
    nft("add table ip t", "add chain ip t p { type filter hook prerouting priority -150; }")
    nft("add rule ip t p udp dport 4500 tproxy to :4500 meta mark set 1")
    ip("rule", "add", "pref", "1", "fwmark", "1", "lookup", "100")
    ip("route", "add", "local", "default", "dev", "lo", "table", "100")
    transparent = (socket.IPPROTO_IP, options.IP_TRANSPARENT, 1)
    consumer = Collector(coalesce=True)
    with udp(host="0.0.0.0", port=4500) as sock, peer_behind_veth() as peer, sent_by("here") as sent:
        if when == "before":
            sock.setsockopt(*transparent)
        endpoint = set_nat_t_endpoint(sock, backend="userspace", esp=consumer)
        if when == "after":
            sock.setsockopt(*transparent)
        assert endpoint.mode == "in line"
        assert "IP_TRANSPARENT" in endpoint.reason
        for number in range(40):  # to 40 addresses that this host does not have: many flows
            address = (f"203.0.113.{number}", 4500)
            send_ike(peer, address, number)
            peer.sendto(ESP, address)
        assert sorted(sock.recv(2048) for _ in range(40)) == [ike(number) for number in range(40)]
        peer.sendto(NON_ESP_MARKER + ike(40), ("203.0.113.1", 4500))
        assert sock.recv(2048) == ike(40)
        assert [packet for packet, _ in consumer.packets] == [ESP] * 40
        assert endpoint.stats().errors == 0
        assert not any(b"IKE" in packet for packet in sent())


@isolated(network=True)
def test_without_loopback_there_is_no_hand_back() -> None:
    assert features.hand_back_refused() != ""
    set_up("lo")
    assert features.hand_back_refused() == ""
