"""The ESP of two processes in network namespaces of their own, with TUN devices and a NAT between them."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import os
import select
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import pytest

from natcompat import open_ipsec, set_nat_t_endpoint
from natcompat.commands.verify.namespaces import INITIATOR, RESPONDER, Topology
from natcompat.errors import NatCompatError
from natcompat.esp import choice as datapaths
from natcompat.esp.device.queue import QueueDevice
from natcompat.esp.device.routes import MARK
from natcompat.esp.device.tun import TunDevice
from natcompat.esp.engine.results import Reason
from natcompat.ipsec import Acquire, Direction, MappingChange
from tests.support.esp import INNER, native_providers, policy
from tests.support.linux import LINUX, isolated, nothing_left
from tests.support.pairs import in_thread, until
from tests.support.tun import TUN, interfaces, mtu_of
from tests.support.tunnel_ends import End, install

pytestmark = [LINUX, TUN]

VERSIONS = pytest.mark.parametrize("version", [4, 6], ids=["v4", "v6"])
FAMILY = {4: socket.AF_INET, 6: socket.AF_INET6}
SERVICE = 7000
# --- what runs in the namespaces: one end in the process of each

_here: dict[str, Any] = {}


def open_end(near: bool, version: int, **options: Any) -> None:
    """Open IPsec and the option, as a daemon does; the SAs come later."""
    stack = contextlib.ExitStack()
    sock = stack.enter_context(socket.socket(FAMILY[version], socket.SOCK_DGRAM))
    sock.settimeout(10)
    sock.bind(((INITIATOR if near else RESPONDER)[version], 4500))
    endpoint = set_nat_t_endpoint(sock, backend="userspace")
    ipsec = stack.enter_context(open_ipsec("userspace", **options))
    assert isinstance(ipsec.device, TunDevice)
    ipsec.device.add_address(INNER[version][0 if near else 1])
    _here.update(stack=stack, end=End(sock, endpoint, ipsec, {}), near=near, version=version)


def add_sas(remote_port: int, keys: tuple[bytes, bytes], *, sas: bool = True) -> None:
    """Install SAs and policies. The responder knows the peer as the NAT shows it."""
    end, near, version = _here["end"], _here["near"], _here["version"]
    peer = _here["peer"][0] if not near else RESPONDER[version]
    end.ids = install(
        end.ipsec,
        near=near,
        addresses=(end.sock.getsockname()[0], peer),
        local_port=4500,
        remote_port=remote_port,
        inner_version=version,
        keys=keys,
    )
    if not sas:
        end.ipsec.flush_sas()


def say_hello(version: int) -> None:
    _here["end"].sock.sendto(b"hello", (RESPONDER[version], 4500))


def hear_hello() -> int:
    """Return the port from which the peer comes."""
    message, source = _here["end"].sock.recvfrom(100)
    assert message == b"hello"
    _here["peer"] = source
    return int(source[1])


def serve() -> None:
    """Return what connects a digest of what it sends, and then as much of our own."""
    version = _here["version"]
    listener = socket.create_server((INNER[version][1], SERVICE), family=FAMILY[version])
    listener.settimeout(60)

    def run() -> None:
        with listener, listener.accept()[0] as sock:
            sock.settimeout(60)
            digest = hashlib.sha256()
            total = 0
            while data := sock.recv(1 << 16):
                digest.update(data)
                total += len(data)
            sock.sendall(digest.digest() + bytes(range(256)) * (total // 256))

    threading.Thread(target=run, daemon=True).start()


def transfer(size: int) -> tuple[bool, bool]:
    """Send `size` bytes and receive as many; return whether each side got what the other sent."""
    version = _here["version"]
    data = os.urandom(size)
    with socket.create_connection((INNER[version][1], SERVICE), timeout=60) as sock:
        assert sock.getsockname()[0] == INNER[version][0]
        sock.sendall(data)
        sock.shutdown(socket.SHUT_WR)
        answer = bytearray()
        while piece := sock.recv(1 << 16):
            answer += piece
    return answer[:32] == hashlib.sha256(data).digest(), answer[32:] == bytes(range(256)) * (size // 256)


def start_transfer(size: int) -> None:
    _here["transfer"] = in_thread(functools.partial(transfer, size))


def finish_transfer() -> tuple[bool, bool]:
    result: tuple[bool, bool] = _here.pop("transfer")()
    return result


def choose_datapath(name: str) -> None:
    os.environ[datapaths.ENVIRONMENT_VARIABLE] = name


def ping() -> int:
    version = _here["version"]
    command = ["ping", f"-{version}", "-c", "3", "-i", "0.2", "-W", "5", INNER[version][1]]
    return subprocess.run(command, check=False, capture_output=True).returncode


def knock() -> None:
    """Send something into the tunnel that nobody answers."""
    version = _here["version"]
    with socket.socket(FAMILY[version], socket.SOCK_DGRAM) as sock:
        sock.sendto(b"knock", (INNER[version][1], 9))


def listen() -> None:
    _here["events"] = _here["stack"].enter_context(_here["end"].ipsec.events())


def next_event() -> Any:
    events = _here["events"]
    assert select.select([events], [], [], 20)[0], "no event came"
    return events.read()[0]


def report() -> Mapping[str, Any]:
    end = _here["end"]
    return {
        "mode": end.endpoint.mode,
        "stats": end.endpoint.stats(),
        "drops": {reason.value: packets for reason, packets in end.ipsec.counters().items()},
        "device": end.ipsec.device.name,
        "mark": end.sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK),
        "error": str(end.ipsec.carrier.last_error),
    }


def close_end() -> set[str]:
    """Close IPsec; return what the socket is then, and which interfaces there are."""
    end = _here["end"]
    end.ipsec.close()
    left = {end.endpoint.mode, f"mark {end.sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK)}"}
    _here["stack"].close()
    _here.clear()
    rules = subprocess.run(["ip", "rule"], check=True, capture_output=True, text=True).stdout
    return left | interfaces() | {line for line in rules.splitlines() if "fwmark" in line}


def set_mtu(name: str, mtu: int) -> None:
    """Of a link; what is longer is answered with ICMP."""
    subprocess.run(["ip", "link", "set", name, "mtu", str(mtu)], check=True)


def answers(size: int, *more: str) -> bool:
    """Tell whether a ping of an IP packet of `size` bytes is answered."""
    version = _here["version"]
    length = size - (28 if version == 4 else 48)
    command = ["ping", f"-{version}", "-c", "1", "-W", "1", "-s", str(length), *more, INNER[version][1]]
    return subprocess.run(command, check=False, capture_output=True).returncode == 0


def forget_paths() -> None:
    for family in ("-4", "-6"):
        subprocess.run(["ip", family, "route", "flush", "cache"], check=True)


def refuses_what_is_too_long() -> bool:
    assert not answers(1400, "-M", "do")
    return bool(_here["end"].ipsec.counters().get(Reason.PATH_MTU))


def forget_mappings() -> None:
    from pyroute2.netlink.nfnetlink.nfctsocket import NFCTSocket

    with NFCTSocket() as conntrack:
        conntrack.flush()


# --- the tests


@pytest.fixture(scope="module")
def network() -> Iterator[Topology]:
    try:
        made = Topology()
    except NatCompatError as error:
        pytest.skip(f"no network: {error}")
    with made:
        yield made


@contextlib.contextmanager
def tunnel(network: Topology, version: int = 4, *, sas: bool = True, **options: Any) -> Iterator[int]:
    """Make a tunnel; give the port that the NAT chose."""
    near, far = network.initiator.call, network.responder.call
    try:
        near(open_end, True, version)
        far(open_end, False, version, **options)
        near(say_hello, version)
        port = far(hear_hello)
        keys = os.urandom(20), os.urandom(20)
        near(add_sas, 4500, keys, sas=sas)
        far(add_sas, port, keys, sas=sas)
        yield port
    finally:
        for side in (network.initiator, network.responder):
            with contextlib.suppress(KeyError):  # it was not opened
                assert side.call(close_end) == {"filter", "mark 0", "lo", "uplink"}


@VERSIONS
def test_tcp_goes_through_the_tunnel(network: Topology, version: int) -> None:
    with tunnel(network, version):
        assert network.initiator.call(ping) == 0
        network.responder.call(serve)
        assert network.initiator.call(transfer, 3 << 20) == (True, True)
        for side in (network.initiator, network.responder):
            told = side.call(report)
            assert told["mode"] == "steering", told
            assert told["stats"].datapath in ("python", "c (ipsec-mb)", "c (libcrypto)")
            assert told["mark"] == MARK
            assert told["device"].startswith("natcompat")
            # of IPv6's own there are packets that no policy wants
            assert set(told["drops"]) <= {"no_policy", "device"}, told


@VERSIONS
@pytest.mark.parametrize("datapath", ["python", "c"])
def test_a_path_that_becomes_narrower_stops_nobody(network: Topology, datapath: str, version: int) -> None:
    """The router answers the outer packets with ICMP; the ends then tell who sends the inner ones."""
    if datapath == "c" and not native_providers():
        pytest.skip("the C data path is not built: python ffi/build_datapath.py")
    for side in (network.initiator, network.responder):
        side.call(choose_datapath, datapath)
    try:
        with tunnel(network, version):
            network.responder.call(serve)
            network.initiator.call(start_transfer, 2 << 20)
            network.router.call(set_mtu, "outside", 1340)
            network.responder.call(set_mtu, "uplink", 1340)
            assert network.initiator.call(finish_transfer) == (True, True)
            # with DF what is too long teaches, and what fits then passes
            until(functools.partial(network.initiator.call, refuses_what_is_too_long), 30)
            assert network.initiator.call(answers, 1270, "-M", "do")
            if version == 4:  # without it the outer packet is fragmented
                assert network.initiator.call(answers, 1390, "-M", "dont")
    finally:
        network.responder.call(set_mtu, "uplink", 1500)
        network.router.call(set_mtu, "outside", 1500)
        for side in (network.initiator, network.responder):
            side.call(choose_datapath, "auto")
            side.call(forget_paths)


def test_a_mapping_that_the_nat_forgets_is_reported(network: Topology) -> None:
    with tunnel(network) as port:
        network.responder.call(listen)
        network.initiator.call(knock)
        network.router.call(forget_mappings)
        network.initiator.call(knock)
        event = network.responder.call(next_event)
        assert isinstance(event, MappingChange)
        assert event.old_port == port != event.new_port
        # not followed: what the responder sends still goes to where nobody is
        assert network.responder.call(report)["stats"].mode == "steering"


def test_a_mapping_that_the_nat_forgets_is_followed_when_asked(network: Topology) -> None:
    with tunnel(network, follow_mapping=True):
        network.router.call(forget_mappings)
        assert network.initiator.call(ping) == 0
        network.responder.call(serve)
        assert network.initiator.call(transfer, 1 << 16) == (True, True)


def test_traffic_without_an_sa_asks_for_one(network: Topology) -> None:
    with tunnel(network, sas=False):
        network.initiator.call(listen)
        network.initiator.call(knock)
        event = network.initiator.call(next_event)
        assert isinstance(event, Acquire)
        assert (str(event.source), str(event.destination)) == (INITIATOR[4], RESPONDER[4])
        assert str(event.selector.destination) == f"{INNER[4][1]}/32"
        assert event.selector.destination_port == 9


# --- the device that open_ipsec() makes by itself


@isolated(network=True)
def test_the_device_has_routes_where_policies_want_them() -> None:
    """And addresses of this host as sources, and an MTU that the SAs can carry."""
    subprocess.run(["ip", "link", "set", "lo", "up", "mtu", "1400"], check=True)
    subprocess.run(["ip", "address", "add", "10.1.0.7/32", "dev", "lo"], check=True)
    with nothing_left(), open_ipsec("userspace") as ipsec:
        assert isinstance(ipsec.device, TunDevice)
        install(ipsec, near=True, addresses=("127.0.0.1", "127.0.0.2"), local_port=1, remote_port=1)
        route = routes_to("10.2.3.4")
        assert f"dev {ipsec.device.name}" in route
        assert "src 10.1.0.7" in route
        assert ipsec.device.mtu == mtu_of(ipsec.device.name) == 1338
        ipsec.flush_policies()
        assert ipsec.device.name not in routes_to("10.2.3.4")
    assert interfaces() == {"lo"}


@isolated(network=True)
def test_a_policy_whose_route_is_refused_is_not_there() -> None:
    with open_ipsec("userspace") as ipsec:
        assert isinstance(ipsec.device, TunDevice)
        ipsec.device.close()
        with pytest.raises(NatCompatError):
            ipsec.add_policy(policy(Direction.OUT))
        assert not ipsec.list_policies()


@isolated(network=True)
def test_sockets_of_ike_can_be_kept_out_of_it() -> None:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock,
        open_ipsec("userspace") as ipsec,
    ):
        ipsec.bypass(sock)
        assert sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK) == MARK


@isolated(network=True)
def test_a_child_does_not_keep_the_device() -> None:
    """The interface lives as long as somebody has it open, and a child that goes on is none of ours."""
    with open_ipsec("userspace") as ipsec:
        assert isinstance(ipsec.device, TunDevice)
        name = ipsec.device.name
        ours, theirs = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(theirs)
            ipsec.close()
            os.read(ours, 1)  # until its parent has closed it
            os._exit(0)
        assert name in interfaces()
        ipsec.carrier.close()  # as if this process had been killed
        os.close(ipsec.device.fileno())
        ipsec.device._descriptor = -1
        until(lambda: name not in interfaces())
    os.close(theirs)
    os.close(ours)
    assert os.waitpid(child, 0)[1] == 0


@isolated(ordinary_user=True)
def test_without_privilege_it_is_an_error_unless_a_queue_is_asked_for() -> None:
    for device in ("auto", "tun"):
        with pytest.raises(NatCompatError, match=r'CAP_NET_ADMIN.*device="queue"') as caught:
            open_ipsec("userspace", device=device)
        assert caught.value.errno == errno.EPERM
    with open_ipsec("userspace", device="queue") as ipsec:
        assert isinstance(ipsec.device, QueueDevice)
        assert not ipsec.features.host_traffic
        with pytest.raises(NatCompatError, match='device="tun"') as caught:
            ipsec.add_address("10.9.0.10/32")
        assert caught.value.errno == errno.EOPNOTSUPP


DAEMON = """
import socket, sys
from natcompat import open_ipsec, set_nat_t_endpoint
from natcompat.ipsec import Direction
from tests.support.esp import policy
sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
sock.bind(("127.0.0.1", 4500))
ipsec = open_ipsec("userspace")
set_nat_t_endpoint(sock, backend="userspace")
ipsec.add_policy(policy(Direction.OUT))
print("ready", flush=True)
sock.recv(100)
"""


@isolated(network=True)
def test_a_daemon_that_is_terminated_leaves_nothing() -> None:
    subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
    command = [sys.executable, "-c", DAEMON]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as daemon:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == "ready\n"
        assert interfaces() != {"lo"}
        daemon.terminate()
    assert interfaces() == {"lo"}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 4500))  # nobody holds it
    with open_ipsec("userspace"):  # takes the rule away that was left, which led to an empty table
        pass
    rules = subprocess.run(["ip", "rule"], check=True, capture_output=True, text=True).stdout
    assert "fwmark" not in rules


def routes_to(address: str) -> str:
    return subprocess.run(["ip", "route", "get", address], check=False, capture_output=True, text=True).stdout
