"""Carriers between TUNs and endpoints, each path alike: what TCP, IKE, SAs and the ends of things see."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import gc
import os
import select
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

from natcompat import NatCompatError, set_nat_t_endpoint
from natcompat.esp import choice as datapaths
from natcompat.esp.device.tun import TunDevice
from natcompat.esp.userspace import UserspaceIPsec
from natcompat.ipsec import (
    Direction,
    Encr,
    Expire,
    Lifetime,
    MappingChange,
    Policy,
    SaId,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)
from tests.support.linux import LINUX, ip, isolated, readable, set_up, wait_until

pytestmark = LINUX

PATHS = pytest.mark.parametrize("path", [each.name for each in datapaths.probe() if each.viable])
IN_C = pytest.mark.skipif(
    not any(each.name == "c" and each.viable for each in datapaths.probe()), reason="no data path in C here"
)
KEYS = os.urandom(20), os.urandom(20)
OUTER = "127.0.0.1", "127.0.0.2"
_CLONE_NEWNET = 0x40000000  # linux/sched.h

Result = TypeVar("Result")


def _enter(namespace: int | None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) if namespace is None else libc.setns(namespace, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "network namespace")


def elsewhere(namespace: int | None, function: Callable[[], Result]) -> Result:
    """Run `function` in a thread that is in `namespace`; None: a new one."""
    results: list[Result] = []

    def run() -> None:
        _enter(namespace)
        results.append(function())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


class End:
    """A socket with the option on loopback, ESP in this process, and a TUN in a namespace of its own."""

    def __init__(
        self, number: int, path: str, backend: str = "userspace", host: str | None = None, **options: Any
    ) -> None:
        self.inner = {4: f"10.9.0.{number + 1}", 6: f"fd09::{number + 1}"}
        self.number = number
        self.ids: dict[int, SaId] = {}
        self.tun = elsewhere(None, lambda: self._make_tun(path))
        self.ipsec = UserspaceIPsec(self.tun, datapath=path, **options)
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.settimeout(20)
        self.sock.bind((OUTER[number] if host is None else host, 0))
        self.endpoint = set_nat_t_endpoint(self.sock, backend=backend, esp=self.ipsec)
        self.port: int = self.sock.getsockname()[1]

    def _make_tun(self, path: str) -> TunDevice:
        self.namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        tun = TunDevice("inner", mtu=1400, vnet_header=path == "c")
        for address in (f"{self.inner[4]}/24", f"{self.inner[6]}/64"):
            subprocess.run(
                ["ip", "address", "add", address, "dev", "inner", *(["nodad"] if ":" in address else [])],
                check=True,
            )
        return tun

    def install(self, peer: End, **changes: Any) -> None:
        """Install SAs and policies with the other end."""
        for direction in Direction:
            order = 1 if direction is Direction.OUT else -1
            source, destination = (OUTER[self.number], OUTER[peer.number])[::order]
            for inside in ("10.9.0.0/24", "fd09::/64"):
                self.ipsec.add_policy(
                    Policy(
                        direction=direction,
                        selector=TrafficSelector(source=inside, destination=inside),
                        source=source,
                        destination=destination,
                        reqid=7,
                    )
                )
            self.add_sa(peer, direction, **changes)

    def add_sa(self, peer: End, direction: Direction, spi: int = 0xC0DE0000, **changes: Any) -> None:
        order = 1 if direction is Direction.OUT else -1
        source, destination = (OUTER[self.number], OUTER[peer.number])[::order]
        sender = self.number if direction is Direction.OUT else peer.number
        arguments: dict[str, Any] = {
            "spi": spi + sender,
            "source": source,
            "destination": destination,
            "direction": direction,
            "encryption": Encr.AES_GCM_16,
            "encryption_key": KEYS[sender] if spi == 0xC0DE0000 else bytes((spi + sender & 0xFF,)) * 20,
            "replay_window": 1024,
            "reqid": 7,
            "encapsulation": UDPEncapsulation(local_port=self.port, remote_port=peer.port),
            **changes,
        }
        self.ids[spi + sender] = self.ipsec.add_sa(SecurityAssociation(**arguments))

    def socket(self, kind: int, version: int = 4) -> socket.socket:
        """Return a socket at the inner address."""

        def make() -> socket.socket:
            made = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, kind)
            made.settimeout(20)
            made.bind((self.inner[version], 0))
            return made

        return elsewhere(self.namespace, make)

    def close(self) -> None:
        self.endpoint.close()
        self.ipsec.close()
        self.sock.close()
        os.close(self.namespace)


@contextlib.contextmanager
def tunnel(path: str, *, install: bool = True, **options: Any) -> Iterator[tuple[End, End]]:
    set_up("lo")
    with contextlib.ExitStack() as stack:
        near = End(0, path, **options)
        stack.callback(near.close)
        far = End(1, path)
        stack.callback(far.close)
        if install:
            near.install(far)
            far.install(near)
        yield near, far


def transfer(sender: End, receiver: End, data: bytes, version: int = 4) -> None:
    """Send `data` by TCP, and see that it arrives."""
    with receiver.socket(socket.SOCK_STREAM, version) as listener:
        listener.listen()
        with sender.socket(socket.SOCK_STREAM, version) as client:
            client.connect(listener.getsockname()[:2])
            accepted, _ = listener.accept()
            with accepted:
                accepted.settimeout(20)

                def send() -> None:
                    client.sendall(data)
                    client.shutdown(socket.SHUT_WR)

                thread = threading.Thread(target=send)
                thread.start()
                got = b"".join(iter(lambda: accepted.recv(1 << 20), b""))
                thread.join()
                assert got == data


@contextlib.contextmanager
def datagrams(sender: End, receiver: End) -> Iterator[tuple[Callable[[], bool], socket.socket]]:
    """What sends a datagram and tells whether one arrived."""
    with sender.socket(socket.SOCK_DGRAM) as source, receiver.socket(socket.SOCK_DGRAM) as target:
        source.connect(target.getsockname())

        def passes() -> bool:
            source.send(b"natcompat")
            if not readable(target, 0.02):
                return False
            return target.recv(2048) == b"natcompat"

        yield passes, source


@PATHS
@isolated(network=True)
def test_tcp_crosses_whole_and_everything_is_counted(path: str) -> None:
    with tunnel(path) as (near, far):
        data = os.urandom(1 << 16) * 16
        for version in (4, 6):
            transfer(near, far, data, version)
            transfer(far, near, data, version)
        near.sock.sendto(b"IKE", far.sock.getsockname())
        assert far.sock.recvfrom(100) == (b"IKE", near.sock.getsockname())
        stats = far.endpoint.stats()
        assert (stats.datapath or "").split()[0] == path
        assert stats.esp > 1500
        assert (stats.errors, stats.ike) == (0, 1)
        usage = far.ipsec.get_sa(far.ids[0xC0DE0000])
        assert usage.packets == stats.esp


@PATHS
@isolated(network=True)
def test_keepalives_and_runts_are_counted(path: str) -> None:
    with tunnel(path) as (near, _), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        for payload in (b"\xff", b"", b"\0", b"\xff\xff"):
            peer.sendto(payload, near.sock.getsockname())
        wait_until(lambda: near.endpoint.stats().runts == 3)
        assert near.endpoint.stats().keepalives == 1


@PATHS
@isolated(network=True)
def test_sas_are_replaced_under_load(path: str) -> None:
    with tunnel(path) as (near, far), datagrams(near, far) as (passes, _):
        wait_until(passes)
        ended = threading.Event()
        with near.socket(socket.SOCK_DGRAM) as source, far.socket(socket.SOCK_DGRAM) as target:

            def load() -> None:
                while not ended.is_set():
                    source.sendto(bytes(1000), target.getsockname())

            thread = threading.Thread(target=load)
            thread.start()
            try:
                for number in range(1, 21):
                    for end, peer in ((far, near), (near, far)):
                        for direction in Direction:
                            end.add_sa(peer, direction, spi=0xC0DE0000 + 2 * number)
                    for end in (near, far):
                        for spi in (0xC0DE0000 + 2 * number - 2, 0xC0DE0001 + 2 * number - 2):
                            end.ipsec.delete_sa(end.ids[spi])
            finally:
                ended.set()
                thread.join()
        wait_until(passes, "nothing passes by the newest SAs")


@PATHS
@isolated(network=True)
def test_limits_are_told_and_kept(path: str) -> None:
    with tunnel(path, install=False) as (near, far):
        near.install(far, lifetime=Lifetime(soft_packets=20, hard_packets=40))
        far.install(near)
        with near.ipsec.events() as events, datagrams(near, far) as (passes, source):
            found: list[Any] = []

            def expired() -> bool:
                with contextlib.suppress(OSError):
                    passes()
                found.extend(each for each in events.read() if isinstance(each, Expire))
                return any(each.hard for each in found)

            wait_until(expired, seconds=20)
            assert [each.hard for each in found if each.sa_id.spi == 0xC0DE0000] == [False, True]
            assert source.fileno() >= 0


@PATHS
@isolated(network=True)
def test_a_peer_that_moves_is_reported(path: str) -> None:
    with tunnel(path) as (near, far), datagrams(near, far) as (passes, _):
        wait_until(passes)
        with far.ipsec.events() as events:
            moved = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
            moved.bind((OUTER[0], 0))
            old = near.endpoint
            old.close()
            with moved:
                sealed = near.ipsec.seal(example(near, far))
                assert isinstance(sealed, list)
                moved.sendto(sealed[0][0], far.sock.getsockname())
                assert select.select([events], [], [], 10)[0]
                (change,) = events.read()
                assert isinstance(change, MappingChange)
                assert change.new_port == moved.getsockname()[1]


def example(near: End, far: End) -> bytes:
    """Return an inner packet."""
    from scapy.layers.inet import IP, UDP

    return bytes(IP(src=near.inner[4], dst=far.inner[4]) / UDP(sport=1, dport=2) / b"natcompat")


class Interrupted:
    """The module in C, in which something happens before, or after, one of its functions."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from natcompat.esp.carrier import native as native_carrier
        from natcompat.esp.datapath import compiled as _datapath

        self.module: Any = _datapath.lib
        monkeypatch.setattr(native_carrier, "lib", self)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


@IN_C
@isolated(network=True)
def test_what_becomes_due_while_events_are_taken_is_told() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch, tunnel("c") as (near, _):
        elsewhere(near.namespace, lambda: ip("link", "set", "inner", "down"))  # nothing else wakes it
        module: Any = Interrupted(monkeypatch)
        association = near.ipsec._find(near.ids[0xC0DE0000])
        carrier: Any = near.ipsec.carrier
        descriptor = module.loop_event_descriptor(carrier.loop)
        pending = [association]

        def next_event(*arguments: Any) -> int:
            if pending:  # a packet in another thread reaches a limit, and the loop wakes Python
                pending.pop().expire(hard=False)
                os.eventfd_write(descriptor, 1)
            return int(module.module.loop_next_event(*arguments))

        module.loop_next_event = next_event
        with near.ipsec.events() as events:
            os.eventfd_write(descriptor, 1)
            assert select.select([events], [], [], 10)[0], "nobody was told"
            assert isinstance(events.read()[0], Expire)


@IN_C
@isolated(network=True)
def test_counters_are_read_while_the_loop_is_there() -> None:
    with pytest.MonkeyPatch.context() as monkeypatch, tunnel("c") as (near, _):
        module: Any = Interrupted(monkeypatch)
        inside, freed = threading.Event(), threading.Event()
        early: list[bool] = []

        def read_counters(*arguments: Any) -> None:
            if not inside.is_set():
                inside.set()
                early.append(freed.wait(0.3))
            if not freed.is_set():
                module.module.loop_read_counters(*arguments)

        def free(loop: Any) -> None:
            freed.set()
            module.module.loop_free(loop)

        module.loop_read_counters, module.loop_free = read_counters, free
        reader = threading.Thread(target=near.ipsec.counters)
        reader.start()
        assert inside.wait(10)
        near.ipsec.close()
        reader.join()
        assert freed.is_set()
        assert early == [False]


@IN_C
@isolated(network=True)
def test_nothing_is_left_of_a_loop_that_does_not_start() -> None:
    with TunDevice(vnet_header=True) as device, pytest.MonkeyPatch.context() as monkeypatch:
        module: Any = Interrupted(monkeypatch)
        module.loop_start = lambda _: errno.EAGAIN
        before = os.listdir("/proc/self/fd")
        with pytest.raises(NatCompatError, match="cannot be started"):
            UserspaceIPsec(device, datapath="c")
        gc.collect()
        assert os.listdir("/proc/self/fd") == before


@IN_C
@isolated(network=True)
def test_it_may_be_closed_by_several_threads_at_once() -> None:
    for _ in range(10):
        with tunnel("c") as (near, far):
            near.sock.sendto(b"IKE", far.sock.getsockname())
            closers = [
                threading.Thread(target=end.ipsec.carrier.close) for end in (near, far) for _ in range(3)
            ]
            closers += [threading.Thread(target=end.endpoint.close) for end in (near, far)]
            for closer in closers:
                closer.start()
            for closer in closers:
                closer.join()


@PATHS
@isolated(network=True)
def test_what_c_does_not_do_python_does(path: str) -> None:
    """SAs that only the portable path has: all goes up, and comes out just the same."""
    if path == "c":
        from natcompat.esp.datapath.native import NativeDataPath

        NativeDataPath.providers = lambda *_: None  # type: ignore[method-assign]
    with tunnel(path) as (near, far):
        transfer(near, far, os.urandom(1 << 18))


@PATHS
@isolated(network=True)
def test_an_endpoint_in_line_serves_as_well(path: str) -> None:
    with tunnel(path, backend="userspace:in-line") as (near, far):
        near.sock.setblocking(False)
        ended = threading.Event()

        def receive() -> None:  # as an application does, whose receives take ESP along
            while not ended.is_set():
                if readable(near.sock, 0.01):
                    with contextlib.suppress(BlockingIOError):
                        near.sock.recv(100)

        thread = threading.Thread(target=receive)
        thread.start()
        try:
            transfer(near, far, os.urandom(1 << 18))
        finally:
            ended.set()
            thread.join()


@PATHS
@isolated(network=True)
def test_what_the_path_does_not_take_is_told_to_its_sender(path: str) -> None:
    set_up("lo")
    ip("link", "set", "lo", "mtu", "1300")
    with tunnel(path) as (near, far), datagrams(near, far) as (passes, source):
        wait_until(passes)
        source.setsockopt(socket.IPPROTO_IP, 10, 2)  # IP_MTU_DISCOVER: DF

        def refused() -> bool:
            try:
                source.send(bytes(1350))
            except OSError as error:
                return error.errno == 90  # EMSGSIZE, of Linux
            return False

        wait_until(refused, "its sender did not learn of it")
        transfer(near, far, os.urandom(1 << 18))


@PATHS
@isolated(network=True)
def test_endpoints_outlive_it_and_it_outlives_them(path: str) -> None:
    with tunnel(path) as (near, far), datagrams(near, far) as (passes, _):
        wait_until(passes)
        far.endpoint.close()
        assert not passes()
        far.endpoint = set_nat_t_endpoint(far.sock, backend="userspace", esp=far.ipsec)
        wait_until(passes, "it did not come back")
        far.ipsec.close()
        before = far.endpoint.stats().esp
        wait_until(lambda: passes() or far.endpoint.stats().esp > before, "nobody reads ESP any more")
        near.sock.sendto(b"IKE", far.sock.getsockname())
        assert far.sock.recvfrom(100)[0] == b"IKE"


@PATHS
@isolated(network=True)
def test_it_stops_in_milliseconds(path: str) -> None:
    with tunnel(path) as (near, far), datagrams(near, far) as (passes, _):
        wait_until(passes)
        begun = time.monotonic()
        far.ipsec.carrier.close()
        assert time.monotonic() - begun < 0.5, "tens of milliseconds, on a machine that does much else"
        assert not passes()


@PATHS
@isolated(network=True)
def test_a_forked_child_leaves_it_to_its_parent(path: str) -> None:
    with tunnel(path) as (near, far), datagrams(near, far) as (passes, _):
        wait_until(passes)
        child = os.fork()
        if not child:
            status = 1
            with contextlib.suppress(BaseException):
                near.close()
                far.ipsec.close()
                status = 0
            os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        wait_until(passes, "the child took something away")


@PATHS
@isolated(network=True)
def test_a_tun_that_vanishes_ends_nothing_else(path: str) -> None:
    with tunnel(path) as (near, far), datagrams(near, far) as (passes, _):
        wait_until(passes)
        elsewhere(far.namespace, lambda: subprocess.run(["ip", "link", "delete", "inner"], check=True))
        before = far.endpoint.stats().esp
        wait_until(lambda: passes() or far.endpoint.stats().esp > before + 3)
        near.sock.sendto(b"IKE", far.sock.getsockname())
        assert far.sock.recvfrom(100)[0] == b"IKE"


@isolated(network=True)
def test_several_threads_share_the_sas() -> None:
    if "c" not in {each.name for each in datapaths.probe() if each.viable}:
        pytest.skip("the C data path is not built here")
    from natcompat.esp.carrier import native as native_carrier

    native_carrier._engines = lambda: 2
    with tunnel("c") as (near, far), datagrams(near, far) as (passes, _):
        assert near.ipsec.engines == 2
        wait_until(passes)
        for number in range(1, 4):  # the program sends their SPIs to either socket
            for end, peer in ((far, near), (near, far)):
                for direction in Direction:
                    end.add_sa(peer, direction, spi=0xC0DE0000 + 3 * number)
            wait_until(passes, "the newest SA does not work")
            transfer(near, far, os.urandom(1 << 16) * 4)
        stats = far.endpoint.stats()
        packets = [
            far.ipsec.get_sa(sa_id).packets for sa_id in far.ids.values() if sa_id.spi % 3 == 0xC0DE0000 % 3
        ]
        assert sum(packets) == stats.esp
        assert all(packets)
