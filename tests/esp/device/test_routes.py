"""Routes into a TUN device that cover the peer, and the outer packets that must not take them."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from natcompat.commands.verify.namespaces import INITIATOR, RESPONDER, Topology
from natcompat.errors import NatCompatError
from natcompat.esp.carrier.path_mtu import kernel_path_mtu
from natcompat.esp.device.outer_path import refuse_loop
from natcompat.esp.device.routes import MARK, DeviceRoutes
from natcompat.esp.device.rtnetlink import MAIN_TABLE, Rtnetlink
from natcompat.esp.device.tun import TunDevice
from natcompat.esp.userspace import open_process_ipsec
from natcompat.ipsec import Action
from tests.support.linux import LINUX, isolated, nothing_left
from tests.support.routing import (
    ANYONE,
    EVERYTHING,
    FAMILY,
    INNER,
    LAN,
    PEER,
    VERSIONS,
    drop_capabilities,
    goes_to,
    out_of_memory,
    policy,
    rules,
    uplink,
)
from tests.support.tun import TUN, interfaces, read_until

pytestmark = [LINUX, TUN]


def is_to(address: str, packet: bytes) -> bool:
    packed = ip_address(address).packed
    return packet[16:20] == packed if packet[0] >> 4 == 4 else packet[24:40] == packed


# --- through a network ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> Iterator[Topology]:
    try:
        made = Topology()
    except NatCompatError as error:
        pytest.skip(f"no network: {error}")
    with made:
        yield made


@VERSIONS
def test_the_outer_packets_of_a_default_route_go_out_by_the_uplink(network: Topology, version: int) -> None:
    before = network.initiator.call(rules)
    with network.responder.socket(FAMILY[version]) as far:
        far.bind((RESPONDER[version], 4500))
        far.settimeout(10)
        network.initiator.call(_send_through, version, far)
    assert network.initiator.call(rules) == before
    assert network.initiator.call(interfaces) == {"lo", "uplink"}


def _send_through(version: int, far: socket.socket) -> None:
    """Runs on the initiator; `far` is the peer's."""
    peer = RESPONDER[version]
    with (
        TunDevice() as device,
        DeviceRoutes(device) as routes,
        socket.socket(FAMILY[version], socket.SOCK_DGRAM) as outer,
        socket.socket(FAMILY[version], socket.SOCK_DGRAM) as inner,
    ):
        outer.bind((INITIATOR[version], 4500))
        outer.settimeout(10)
        device.add_address(INNER[version])
        routes.add(EVERYTHING[version], source=INNER[version])
        assert goes_to(peer) == device.name

        outer.sendto(b"a loop", (peer, 4500))
        read_until(device, lambda each: is_to(peer, each) and each.endswith(b"a loop"))

        routes.exempt(outer)
        routes.check_peer(peer)
        inner.connect((ANYONE[version], 7))
        assert inner.getsockname()[0] == INNER[version]
        for number in range(5):
            inner.send(b"packet %d" % number)
            packet, others = read_until(device, lambda each: is_to(ANYONE[version], each))
            assert not any(is_to(peer, each) for each in others)
            outer.sendto(b"outer" + packet, (peer, 4500))
            arrived, source = far.recvfrom(2000)
            assert arrived == b"outer" + packet
            assert arrived.endswith(b"packet %d" % number)
            far.sendto(b"an answer", source)
            assert outer.recvfrom(100)[0] == b"an answer"
        assert not any(is_to(peer, each) for each in device.read_burst())

        routes.exempt(outer, False)
        outer.sendto(b"a loop", (peer, 4500))
        read_until(device, lambda each: is_to(peer, each))


# --- the tables, the rules and the mark ----------------------------------------------------------


@isolated(network=True)
def test_two_devices_share_the_mark_and_nothing_else() -> None:
    before = rules()
    with uplink(), TunDevice() as first, TunDevice() as second:
        with DeviceRoutes(first) as one:
            with DeviceRoutes(second) as other:
                one.add("0.0.0.0/1")
                one.add("::/1")
                other.add("0.0.0.0/0")
                other.add("128.0.0.0/1")
                assert one.table != other.table
                assert goes_to("10.0.0.1") == first.name
                assert goes_to("203.0.113.2") == second.name
                assert goes_to("2001:db8::1") == first.name
                for address in ("10.0.0.1", "203.0.113.2", "2001:db8::1"):
                    assert goes_to(address, mark=MARK) == "uplink0"
                    assert goes_to(address, mark=MARK | 0xCA6C) == "uplink0", "other bits do not matter"
                    assert goes_to(address, mark=0xCA6C) != "uplink0"
                one.check_peer("10.0.0.1")
                other.remove("128.0.0.0/1")
                assert goes_to("203.0.113.2") == second.name
                with pytest.raises(NatCompatError, match="already"):
                    other.add("0.0.0.0/0")
            assert goes_to("203.0.113.2") == "uplink0"
            assert goes_to("10.0.0.1") == first.name
            other.close()
        assert goes_to("10.0.0.1") == "uplink0"
    assert rules() == before


@isolated(network=True)
def test_which_of_two_routes_wins() -> None:
    before = rules()
    with uplink() as link, TunDevice() as device:
        link.add_route("198.51.100.0/24")
        with DeviceRoutes(device) as routes:
            routes.add("0.0.0.0/0")
            assert goes_to("198.51.100.7") == device.name, "nobody can take it out of the tunnel"
            assert goes_to("203.0.113.2") == device.name
        with DeviceRoutes(device, prefer_main=True) as routes:
            routes.add("0.0.0.0/0")
            assert goes_to("198.51.100.7") == "uplink0"
            assert goes_to("192.0.2.7") == "uplink0", "the own link stays in reach"
            assert goes_to("203.0.113.2") == device.name
            assert goes_to("203.0.113.2", mark=MARK) == "uplink0"
    assert rules() == before


@isolated(network=True)
def test_other_bits_of_the_mark_stay() -> None:
    with (
        TunDevice() as device,
        DeviceRoutes(device) as routes,
        socket.socket(type=socket.SOCK_DGRAM) as sock,
    ):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 0xCA6C)
        routes.exempt(sock)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == MARK | 0xCA6C
        routes.exempt(sock, False)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == 0xCA6C


@isolated(network=True)
def test_the_path_mtu_is_that_of_the_way_that_the_socket_takes() -> None:
    with (
        uplink() as link,
        TunDevice(mtu=1300) as device,
        DeviceRoutes(device) as routes,
        socket.socket(type=socket.SOCK_DGRAM) as marked,
        socket.socket(type=socket.SOCK_DGRAM) as bound,
    ):
        link.mtu = 1480
        routes.add("0.0.0.0/0")
        routes.exempt(marked)
        bound.setsockopt(socket.SOL_SOCKET, 25, b"uplink0\0")  # SO_BINDTODEVICE
        assert kernel_path_mtu(PEER[4]) == 1300
        assert kernel_path_mtu(PEER[4], marked) == kernel_path_mtu(PEER[4], bound) == 1480


def _set(name: str, value: int) -> None:
    with open(f"/proc/sys/net/ipv4/conf/{name}", "w") as file:
        file.write(str(value))


@isolated(network=True)
def test_what_would_keep_the_peer_away_is_named() -> None:
    with TunDevice() as device, DeviceRoutes(device) as routes:
        routes.add("0.0.0.0/0")
        with pytest.raises(NatCompatError, match="there is none to") as caught:
            routes.check_peer(PEER[4])
        assert caught.value.errno == errno.ENETUNREACH
        with uplink():
            routes.check_peer(PEER[4])
            _set("uplink0/rp_filter", 1)
            with pytest.raises(
                NatCompatError, match=r"sysctl -w net\.ipv4\.conf\.uplink0\.rp_filter=2"
            ) as caught:
                routes.check_peer(PEER[4])
            assert caught.value.errno == errno.EHOSTUNREACH
            _set("uplink0/rp_filter", 2)
            routes.check_peer(PEER[4])
            routes.check_peer(PEER[6])  # which no route covers
            assert routes.covers(PEER[4])
            assert not routes.covers(PEER[6])
        device.add_route("0.0.0.0/0")  # somebody does it by hand
        with pytest.raises(NatCompatError, match="would go into natcompat0") as caught:
            routes.check_peer(PEER[4])
        assert caught.value.errno == errno.ELOOP


@isolated(network=True)
def test_nothing_is_left_of_what_failed_half_way() -> None:
    before = rules()
    with nothing_left(), TunDevice() as device:
        with DeviceRoutes(device) as routes, pytest.raises(ValueError, match="host bits"):
            routes.add("10.1.0.1/8")
        with DeviceRoutes(device) as routes:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(Rtnetlink, "add_rule", out_of_memory)
                with pytest.raises(NatCompatError, match="no memory"):
                    routes.add("0.0.0.0/0")
            routes.add("0.0.0.0/0")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Rtnetlink, "add_rule", out_of_memory)
            with pytest.raises(NatCompatError, match="no memory"):
                DeviceRoutes(device)
    assert rules() == before


def _no_rules(*_: object) -> None:
    raise NatCompatError(errno.EOPNOTSUPP, "Operation not supported")


# --- where outer packets cannot be kept out -------------------------------------------------------


@isolated(network=True)
def test_without_rules_a_route_that_covers_the_peer_is_refused() -> None:
    with uplink(), TunDevice() as device, pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rtnetlink, "add_rule", _no_rules)
        with DeviceRoutes(device) as routes, socket.socket(type=socket.SOCK_DGRAM) as sock:
            assert "no rules" in routes.refusal
            assert routes.table == MAIN_TABLE
            with pytest.raises(
                NatCompatError, match=r"covers the peer 203\.0\.113\.2.*Route smaller networks"
            ):
                routes.add("203.0.0.0/8", peers=[PEER[4]])
            with pytest.raises(NatCompatError, match="would loop"):
                routes.follow([policy("10.2.0.0/16"), policy("203.0.0.0/8"), policy(LAN, Action.BYPASS)])
            assert goes_to("10.2.0.1") == "uplink0"
            routes.add("10.2.0.0/16", peers=[PEER[4]])
            routes.exempt(sock)
            assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == 0
            assert goes_to("10.2.0.1") == device.name
            assert goes_to(PEER[4]) == "uplink0"
            routes.check_peer(PEER[4])
            routes.add("203.0.113.0/24")  # whom it covers was not said
            with pytest.raises(NatCompatError, match="Route smaller networks"):
                routes.check_peer(PEER[4])
        assert goes_to("10.2.0.1") == "uplink0"


@isolated(network=True)
def test_without_privilege_the_route_is_refused_and_the_error_names_it() -> None:
    with TunDevice() as device, DeviceRoutes(device) as routes:
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            drop_capabilities()
            with pytest.raises(NatCompatError, match="CAP_NET_ADMIN") as caught:
                routes.exempt(sock)
            assert caught.value.errno == errno.EPERM
        with pytest.raises(NatCompatError, match="CAP_NET_ADMIN") as caught:
            routes.add("0.0.0.0/0")
        assert caught.value.errno == errno.EPERM
        with pytest.raises(NatCompatError, match="CAP_NET_ADMIN"):
            DeviceRoutes(device)
    assert interfaces() == {"lo"}, "the descriptor is enough to remove it"


@isolated(network=True)
def test_without_privilege_any_more_it_still_ends() -> None:
    """A daemon may have given them up: then the routes go with the interface, and nothing else stays."""
    with open_process_ipsec() as ipsec:
        ipsec.add_policy(policy("10.2.0.0/16"))
        drop_capabilities()
        with pytest.raises(NatCompatError, match="CAP_NET_ADMIN"):
            ipsec.add_policy(policy("10.3.0.0/16"))
        with pytest.raises(NatCompatError, match="CAP_NET_ADMIN"):
            ipsec.delete_policy(policy("10.2.0.0/16"))
        assert [each.policy for each in ipsec.list_policies()] == [policy("10.2.0.0/16")]
    with pytest.raises(NatCompatError, match="closed"):
        ipsec.list_policies()
    assert interfaces() == {"lo"}


@pytest.mark.parametrize(
    ("network", "peers", "loops"),
    [
        ("0.0.0.0/0", ["203.0.113.2"], True),
        ("0.0.0.0/0", ["2001:db8::1"], False),
        ("::/0", ["2001:db8::1"], True),
        ("203.0.113.0/24", ["192.0.2.1", "203.0.113.2"], True),
        ("203.0.113.0/24", ["203.0.114.2"], False),
        ("203.0.113.0/24", ["::ffff:203.0.113.2"], True),
        ("10.0.0.0/8", [], False),
    ],
)
def test_which_routes_cover_a_peer(network: str, peers: list[str], loops: bool) -> None:
    if loops:
        with pytest.raises(NatCompatError, match="would loop") as caught:
            refuse_loop(network, peers)
        assert caught.value.errno == errno.ELOOP
    else:
        refuse_loop(network, peers)
