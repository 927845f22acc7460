"""Carriers between TUNs and endpoints, each path alike: what TCP, IKE, SAs and the ends of things see."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import subprocess
import threading
import time
from typing import Any

import pytest

from natcompat import set_nat_t_endpoint
from natcompat.esp import choice as datapaths
from natcompat.ipsec import (
    Direction,
    Expire,
    Lifetime,
    MappingChange,
)
from tests.support.linux import LINUX, ip, isolated, readable, set_up, wait_until
from tests.support.tunnels import OUTER, PATHS, datagrams, elsewhere, example, transfer, tunnel

pytestmark = LINUX


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

    native_carrier.receiving_threads = lambda: 2
    with tunnel("c") as (near, far), datagrams(near, far) as (passes, _):
        assert near.ipsec.carrier.threads == 2  # type: ignore[attr-defined]
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
