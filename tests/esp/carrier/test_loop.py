"""The C loop between real TUNs and sockets: bulk traffic, IKE glued to ESP, full rings, what vanishes."""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from natcompat import NON_ESP_MARKER
from natcompat.backends.hand_back import HandBack
from natcompat.backends.linux_sockets import filters
from natcompat.backends.linux_sockets.loopback import LoopbackWay
from tests.support.c_loop import (
    IP_RECVTOS,
    UDP_SEGMENT,
    End,
    c_hand_back,
    esp_socket,
    ffi,
    lib,
    tunnel,
)
from tests.support.linux import LINUX, ike, ip, isolated, send_ike, set_up, wait_until

pytestmark = LINUX


def transfer(sender: End, receiver: End, version: int, data: bytes) -> bytes:
    """Send `data` by TCP, and return what came out."""
    with receiver.tcp_socket(version) as listener:
        listener.listen()
        with sender.tcp_socket(version) as client:
            client.connect(listener.getsockname()[:2])
            accepted, _ = listener.accept()
            with accepted:
                accepted.settimeout(20)

                def send() -> None:
                    client.sendall(data)
                    client.shutdown(socket.SHUT_WR)

                thread = threading.Thread(target=send)
                thread.start()
                pieces = []
                while piece := accepted.recv(1 << 20):
                    pieces.append(piece)
                thread.join()
                return b"".join(pieces)


def gso(sock: socket.socket, pieces: list[bytes], address: Any) -> None:
    """Send datagrams of one size as the one that the kernel would make of them by GRO."""
    size = struct.pack("=H", len(pieces[0]))
    sock.sendmsg([b"".join(pieces)], [(socket.IPPROTO_UDP, UDP_SEGMENT, size)], 0, address)


@pytest.mark.parametrize("threads", [1, 2])
@isolated(network=True)
def test_tcp_crosses_in_large_pieces_and_whole(threads: int) -> None:
    set_up("lo")
    with tunnel(threads=threads) as (one, two):
        data = os.urandom(1 << 16) * 64
        for version in (4, 6):
            for sender, receiver in ((one, two), (two, one)):
                got = transfer(sender, receiver, version, data)
                assert hashlib.sha256(got).digest() == hashlib.sha256(data).digest()
        counters = one.counters()
        # what made it quick was used: fewer frames than packets, fewer calls than ESP
        assert counters["packets"] > 4 * counters["frames"]
        assert counters["sent"] > 4 * counters["send_calls"]
        assert counters["opened"] > 4 * counters["written"]
        assert counters["opened"] > counters["merged"] > 0
        assert counters["bad_checksums"] == counters["malformed"] == counters["unsent"] == 0


@isolated(network=True)
def test_udp_crosses_in_order_and_whole() -> None:
    set_up("lo")
    with tunnel() as (one, two), one.udp_socket() as sender, two.udp_socket() as receiver:
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        sender.connect(receiver.getsockname())
        sender.send(b"through Python")
        assert receiver.recv(2048) == b"through Python"
        wait_until(lambda: len(two.events) and len(one.events), "nothing came up")
        sizes = [0, 1, 64, 65, 500, 1372] * 20
        for number, size in enumerate(sizes):
            sender.send(struct.pack("!I", number).ljust(4 + min(size, 1368), b"u"))
        for number in range(len(sizes)):
            got = receiver.recv(2048)
            assert struct.unpack_from("!I", got) == (number,)
            assert len(got) == 4 + min(sizes[number], 1368)
        # a train that the kernel left for us to cut
        gso(sender, [bytes([65 + number]) * 1000 for number in range(20)], receiver.getsockname())
        assert [receiver.recv(2048)[0] for _ in range(20)] == list(range(65, 85))


@isolated(network=True)
def test_ike_that_is_glued_to_esp_reaches_the_application() -> None:
    set_up("lo")
    hand_back = HandBack(socket.AF_INET)
    with contextlib.ExitStack() as stack:
        application = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        application.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        application.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22)
        application.bind(("127.0.0.1", 0))
        application.settimeout(20)
        address = application.getsockname()
        hand_back.way = stack.enter_context(contextlib.closing(LoopbackWay(application)))
        end = End(1, esp_socket(port=address[1]), way=c_hand_back(hand_back))
        stack.callback(end.close)
        filters.attach_steering(application, 1)
        peer = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        peer.bind(("127.0.0.1", 0))
        end.install(peer.getsockname())
        esp = b"\0\0\x10\x02" + os.urandom(60)
        for number in range(0, 1000, 2):
            message = NON_ESP_MARKER + ike(number, 60)
            gso(peer, [esp, esp, message, esp], address)
            send_ike(peer, address, number + 1)
            if number % 100 == 0:  # not more than the queue holds
                end.wait_for("handed_back", number // 2 + 1)
        got: list[int] = []
        while len(got) < 1000:
            datagram, source = application.recvfrom(2048)
            opened = hand_back.open(datagram)
            if opened is not None:
                assert opened.destination == ("127.0.0.1", socket.if_nametoindex("lo"))
                assert hand_back.open(datagram) is None, "an envelope counts once"
                datagram, source = NON_ESP_MARKER + opened.message, opened.source
            assert source == peer.getsockname()
            got.append(int(datagram[8:14]))
        assert sorted(got) == list(range(1000))
        counters = end.counters()
        assert (counters["handed_back"], counters["errors"], counters["esp"]) == (500, 0, 1500)


@isolated(network=True)
def test_keepalives_and_runts_are_counted_and_go_nowhere() -> None:
    set_up("lo")
    with tunnel() as (one, _), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        for payload in (b"\xff", b"", b"\0", b"\xff\xff", b"\0\0\0", b"\xff\0\0", b"\1\1\1\1"):
            peer.sendto(payload, one.sock.getsockname())
        one.wait_for("runts", 5)
        counters = one.counters()
        assert [counters[name] for name in ("keepalives", "runts", "handed_back")] == [1, 5, 0]


@isolated(network=True)
def test_what_was_handed_back_does_not_go_round() -> None:
    """Nothing steers here, so what goes back to the port comes to the loop again."""
    set_up("lo")
    hand_back, sock = HandBack(socket.AF_INET), esp_socket()
    with contextlib.closing(LoopbackWay(sock)) as way, contextlib.ExitStack() as stack:
        hand_back.way = way
        one = End(1, sock, way=c_hand_back(hand_back))
        stack.callback(one.close)
        one.install(("127.0.0.1", 9))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
            send_ike(peer, one.sock.getsockname(), 1)
        one.wait_for("errors")
        counters = one.counters()
        assert (counters["handed_back"], counters["errors"]) == (1, 1)


def received_tos(sock: socket.socket) -> int:
    """Return the traffic class of the next datagram."""
    ancillary = sock.recvmsg(2048, 256)[1]
    return next(data[0] for level, kind, data in ancillary if (level, kind) == (0, socket.IP_TOS))


@isolated(network=True)
def test_the_traffic_class_and_df_of_the_inner_packet_are_on_the_outer() -> None:
    set_up("lo")
    outer = esp_socket(coalesce=False)
    outer.setsockopt(socket.IPPROTO_IP, IP_RECVTOS, 1)
    outer.settimeout(20)
    with outer, contextlib.ExitStack() as stack:
        end = End(1, esp_socket())
        stack.callback(end.close)
        end.install(outer.getsockname())
        with end.udp_socket() as sender:
            sender.connect(("10.9.0.2", 9))
            wait_until(lambda: sender.send(b"x") and end.counters()["sent"], "no way was found")
            for tos in (0xB8, 0, 0x28, 0xB8):
                sender.setsockopt(socket.IPPROTO_IP, socket.IP_TOS, tos)
                sender.send(b"tos")
                while received_tos(outer) != tos:  # until it times out
                    pass


@isolated(network=True)
def test_esp_leaves_from_the_address_of_the_sa_if_this_host_has_it() -> None:
    set_up("lo")
    outer = esp_socket(coalesce=False)
    outer.settimeout(20)
    with outer, contextlib.ExitStack() as stack:
        for local, seen in (("127.0.0.7", "127.0.0.7"), ("192.0.2.77", "127.0.0.1")):
            end = End(1, esp_socket(host="0.0.0.0"))
            stack.callback(end.close)
            end.install(outer.getsockname(), local)
            with end.udp_socket() as sender:
                sender.connect(("10.9.0.2", 9))
                wait_until(lambda: sender.send(b"x") and end.counters()["sent"], "no way was found")  # noqa: B023
                while outer.recvfrom(2048)[1] != (seen, end.sock.getsockname()[1]):  # until it times out
                    pass


@isolated(network=True)
def test_what_is_too_big_goes_up_whole_and_what_may_be_fragmented_goes() -> None:
    set_up("lo")
    ip("link", "set", "lo", "mtu", "1300")
    with tunnel() as (one, two), one.udp_socket() as sender, two.udp_socket() as receiver:
        sender.connect(receiver.getsockname())
        sender.setsockopt(socket.IPPROTO_IP, 10, 0)  # IP_MTU_DISCOVER: no DF
        wait_until(lambda: sender.send(b"x" * 1300) and two.counters()["written"], "fragments did not come")
        assert receiver.recv(2048) == b"x" * 1300
        assert lib.LOOP_TOO_BIG not in one.kinds()
        sender.setsockopt(socket.IPPROTO_IP, 10, 2)  # DF
        gso(sender, [bytes([65 + number]) * 1340 for number in range(5)], receiver.getsockname())
        wait_until(lambda: lib.LOOP_TOO_BIG in one.kinds(), "nothing came up")
        (packet,) = [packet for kind, packet in one.events if kind == lib.LOOP_TOO_BIG]
        assert (len(packet), packet[28:]) == (1368, b"A" * 1340)
        assert one.counters()["too_big"] == 5
        assert one.counters()["unsent"] == 0


@isolated(network=True)
def test_a_full_ring_loses_what_comes_and_keeps_what_is_there() -> None:
    """One sender fills half of the ring at most; the other half is for the others."""
    set_up("lo")
    with tunnel() as (one, two), one.udp_socket() as sender, two.udp_socket() as receiver:
        one.learning = False
        sender.connect(receiver.getsockname())
        while not one.counters()["events_lost"]:
            sender.send(bytes(1300))
        kept = one.counters()["events"]
        with one.udp_socket(6) as other:
            other.sendto(b"another host", (two.inner[6], 9))
            wait_until(lambda: one.counters()["events"] > kept, "another sender found no room")
        one.learning = True
        wait_until(lambda: len(one.events) >= kept, "the ring was not emptied")
        ours = [packet for kind, packet in one.events if packet[28:] == bytes(1300)]
        assert 350 < len(ours) <= (1 << 19) // 1328
        wait_until(lambda: sender.send(b"x") and one.counters()["sent"], "it did not go on")


@isolated(network=True)
def test_a_tun_that_is_down_or_gone_does_not_stop_the_rest() -> None:
    set_up("lo")
    with tunnel() as (one, two), one.udp_socket() as sender, two.udp_socket() as receiver:
        sender.connect(receiver.getsockname())
        wait_until(lambda: sender.send(b"x") and two.counters()["written"], "nothing came")
        two.inside(lambda: two.ip("link set inner down"))
        wait_until(lambda: sender.send(b"x") and two.counters()["unwritten"], "it was not down")
        two.inside(lambda: two.ip("link set inner up"))
        before = two.counters()["written"]
        wait_until(lambda: sender.send(b"x") and two.counters()["written"] > before, "it was not up again")
        assert lib.LOOP_TUN_GONE not in two.kinds()
        two.inside(lambda: two.ip("link delete inner"))
        wait_until(lambda: lib.LOOP_TUN_GONE in two.kinds(), "nobody noticed")
        before = two.counters()["esp"]
        wait_until(lambda: sender.send(b"x") and two.counters()["esp"] > before, "ESP was not read any more")
        assert [kind for kind, _ in two.events].count(lib.LOOP_TUN_GONE) == 1


@isolated(network=True)
def test_nothing_goes_to_what_has_the_number_of_a_tun_that_was_closed() -> None:
    set_up("lo")
    with tunnel() as (one, two), one.udp_socket() as sender, two.udp_socket() as receiver:
        sender.connect(receiver.getsockname())
        wait_until(lambda: sender.send(b"x") and two.counters()["written"], "nothing came")
        mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        with mine, theirs:
            os.dup2(theirs.fileno(), two.tun)
            before = two.counters()["opened"]
            wait_until(lambda: sender.send(b"x") and two.counters()["opened"] > before, "nothing came")
            mine.setblocking(False)
            with pytest.raises(BlockingIOError):
                mine.recv(100)


@isolated(network=True)
def test_sockets_come_and_go_under_load() -> None:
    set_up("lo")
    with tunnel() as (one, two), one.udp_socket() as sender, two.udp_socket() as receiver:
        sender.connect(receiver.getsockname())
        wait_until(lambda: sender.send(b"x") and two.counters()["written"], "nothing came")
        ended = threading.Event()

        def load() -> None:
            while not ended.is_set():
                sender.send(bytes(1000))

        thread = threading.Thread(target=load)
        thread.start()
        try:
            for _ in range(200):
                for end in (one, two):
                    lib.loop_remove_socket(end.loop, end.slot)
                    assert (
                        lib.loop_read_socket_counters(
                            end.loop, end.slot, ffi.new("struct loop_socket_counters *")
                        )
                        == 0
                    )
                    end.slot = end.add_socket()
                    assert end.slot >= 0
        finally:
            ended.set()
            thread.join()
        before = two.counters()["written"]
        wait_until(lambda: sender.send(b"x") and two.counters()["written"] > before, "it did not go on")
        lib.loop_remove_socket(one.loop, one.slot)
        wait_until(lambda: sender.send(b"x") and lib.LOOP_SEND in one.kinds(), "it was sent nevertheless")
        lib.loop_remove_socket(one.loop, one.slot)  # it is not there any more
        lib.loop_remove_socket(one.loop, -1)


@isolated(network=True)
def test_a_send_queue_that_stays_full_keeps_nobody_waiting() -> None:
    ip("link", "add", "outer", "type", "veth", "peer", "name", "nobody")
    ip("address", "add", "192.0.2.1/24", "dev", "outer")
    for device in ("outer", "nobody"):
        set_up(device)
    # ESP waits for a neighbour that is not there
    Path("/proc/sys/net/ipv4/neigh/outer/mcast_solicit").write_text("1000")
    with contextlib.ExitStack() as stack:
        end = End(1, esp_socket(host="192.0.2.1"))
        stack.callback(end.close)
        end.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
        end.install(("192.0.2.2", 4500))
        sender = stack.enter_context(end.udp_socket())
        sender.connect(("10.9.0.2", 9))
        ended = threading.Event()

        def load() -> None:
            while not ended.is_set():
                for size in range(40):  # of as many sizes, so that each is a message of its own
                    sender.send(bytes(size))

        thread = threading.Thread(target=load)
        thread.start()
        stack.callback(thread.join)
        stack.callback(ended.set)
        took = []
        for _ in range(5):
            end.wait_for("unsent")
            begun = time.monotonic()
            lib.loop_remove_socket(end.loop, end.slot)
            removed = time.monotonic()
            end.slot = end.add_socket()
            took += [removed - begun, time.monotonic() - removed]
        end.wait_for("unsent")
        begun = time.monotonic()
        assert lib.loop_stop(end.loop) == 0
        took.append(time.monotonic() - begun)
        assert max(took) < 0.5, took


@isolated(network=True)
def test_a_fork_leaves_it_alone_and_it_starts_again() -> None:
    set_up("lo")
    with tunnel() as (one, two), one.udp_socket() as sender, two.udp_socket() as receiver:
        sender.connect(receiver.getsockname())
        wait_until(lambda: sender.send(b"x") and two.counters()["written"], "nothing came")
        child = os.fork()
        if not child:
            lib.loop_abandon(two.loop)
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        before = two.counters()["written"]
        wait_until(lambda: sender.send(b"x") and two.counters()["written"] > before, "the fork disturbed it")
        assert lib.loop_stop(two.loop) == 0
        assert lib.loop_stop(two.loop) != 0
        before = two.counters()["written"]
        for _ in range(10):
            sender.send(b"x")
        assert two.counters()["written"] == before
        assert lib.loop_start(two.loop) == 0
        assert lib.loop_start(two.loop) != 0
        wait_until(lambda: sender.send(b"x") and two.counters()["written"] > before, "it did not start again")
