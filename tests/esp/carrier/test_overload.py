"""More ESP than this process can take costs ESP, and no IKE."""

from __future__ import annotations

import contextlib
import os
import pickle
import shutil
import socket
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from natcompat import NON_ESP_MARKER, set_nat_t_endpoint
from natcompat.esp import choice as datapaths
from natcompat.esp.device.queue import QueueDevice
from natcompat.esp.device.tun import TunDevice
from natcompat.esp.engine.results import Reason
from natcompat.esp.userspace import UserspaceIPsec
from natcompat.ipsec import Direction, Encr, Integ
from tests.support import flooder
from tests.support.esp import INNER, OUTER, SPI, ip_packet, keys, native_providers, sa, udp
from tests.support.linux import LINUX, ike, ip, isolated, set_up
from tests.support.pairs import in_thread, until
from tests.support.tunnel_ends import question, two_ends
from tests.support.tunnels import elsewhere

pytestmark = LINUX

SECONDS = 2.0


@pytest.fixture(params=["python", "c"])
def stack(request: pytest.FixtureRequest) -> Iterator[contextlib.ExitStack]:
    if request.param == "c" and not native_providers():
        pytest.skip("the C data path is not built: python ffi/build_datapath.py")
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as stack:
        patch.setenv(datapaths.ENVIRONMENT_VARIABLE, request.param)
        yield stack


def lost_before_any_socket() -> int:
    """Return how many packets this machine has dropped since their CPU had too many."""
    lines = Path("/proc/net/softnet_stat").read_text().splitlines()
    return sum(int(line.split()[1], 16) for line in lines)


@pytest.mark.parametrize("version", [4, 6], ids=["v4", "v6"])
def test_every_ike_message_arrives_while_esp_is_flooded(stack: contextlib.ExitStack, version: int) -> None:
    """In the flow of the ESP itself, as a peer sends it, and more of that than anybody can take."""
    near, far = two_ends(stack, version=version, devices=(QueueDevice(), QueueDevice(limit=16)))
    packets = near.ipsec.seal_burst([question(payload=udp(bytes(500)))] * 1024)
    authentic = [each[0] for each in packets if isinstance(each[0], bytes)]
    before = lost_before_any_socket()
    heard: list[bytes] = []

    def listen() -> None:
        while (message := far.sock.recv(100)) != b"the end":
            heard.append(message)

    listening = in_thread(listen)
    done = subprocess.run(
        [sys.executable, flooder.__file__],
        input=pickle.dumps((far.sock.getsockname()[:2], authentic, SECONDS)),
        capture_output=True,
        check=True,
        timeout=60,
    )
    near.sock.sendto(b"the end", far.sock.getsockname())
    listening()
    sent = int(done.stdout)
    lost = lost_before_any_socket() - before
    assert sent > 10
    assert len(set(heard)) == len(heard) >= sent - lost

    stats, counters = far.endpoint.stats(), far.ipsec.counters()
    assert stats.mode == "steering"
    assert (stats.dropped_in_kernel, stats.errors) == (0, 0)
    assert stats.esp_dropped_in_kernel is not None
    assert stats.esp_dropped_in_kernel > 0, "it was no overload"
    # what was read and went no further is counted by reason; none of it was delivered
    assert set(counters) <= {
        Reason.REPLAYED,
        Reason.TOO_OLD,
        Reason.INTEGRITY,
        Reason.NO_SA,
        Reason.DEVICE,
        Reason.QUEUE,
    }
    assert Reason.QUEUE in counters or {Reason.INTEGRITY, Reason.NO_SA} <= set(counters)
    until(lambda: sum(far.ipsec.counters().values()) + len(far.device.inbound) == far.endpoint.stats().esp)
    assert len(far.device.inbound) <= 16


def test_the_other_direction_and_the_end_have_their_turn(stack: contextlib.ExitStack) -> None:
    """While it is flooded an end sends, too, and can be closed."""
    near, far = two_ends(stack)
    packets = near.ipsec.seal_burst([question(payload=udp(bytes(500)))] * 64)
    authentic = [each[0] for each in packets if isinstance(each[0], bytes)]
    with subprocess.Popen(
        [sys.executable, flooder.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        process.stdin.write(pickle.dumps((far.sock.getsockname(), authentic, 60.0)))
        process.stdin.close()
        try:
            until(lambda: (far.endpoint.stats().esp_dropped_in_kernel or 0) > 0, 30)
            answers = [ip_packet(*INNER[4][::-1], udp(b"%d" % number)) for number in range(20)]
            for packet in answers:
                far.device.put(packet)
            assert [near.device.get(30) for _ in answers] == answers
            far.ipsec.close()
            far.endpoint.close()
        finally:
            process.kill()


SIZE = 1000
"""Bytes of UDP payload, of ESP and IKE alike: what has one size is coalesced."""
TRAIN = 40
"""Datagrams that are sent at once."""
MESSAGES = 1000
MOST_BEHIND = 20_000
"""ESP packets in the queue: many times what is shed from on, a third of what it holds."""


def can_force_buffers() -> bool:
    """Tell whether the kernel gives this user queues of more than net.core.rmem_max."""
    with socket.socket(type=socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, 33, 1 << 26)  # SO_RCVBUFFORCE, asm-generic/socket.h
        return True
    return False


def send_train(sock: socket.socket, datagrams: list[bytes]) -> None:
    """Send what the device cuts, and the peer's may glue together again."""
    sock.sendmsg(datagrams, [(socket.IPPROTO_UDP, flooder.UDP_SEGMENT, struct.pack("=H", SIZE))])


@pytest.mark.parametrize(
    "path",
    [
        "python",
        pytest.param(
            "c",
            marks=pytest.mark.skipif(
                not native_providers(), reason="the C data path is not built: python ffi/build_datapath.py"
            ),
        ),
    ],
)
@pytest.mark.skipif(shutil.which("ethtool") is None, reason="there is no ethtool")
@pytest.mark.skipif(not can_force_buffers(), reason="a queue that takes a flood is root's to have")
@pytest.mark.parametrize("flows", ["one flow", "two flows"])
@isolated(network=True)
def test_every_ike_message_arrives_that_is_glued_to_more_esp_than_is_taken(flows: str, path: str) -> None:
    """What is coalesced goes into the queue, or is dropped, as a whole: the IKE with the ESP around it.

    Over veth, with GRO, from another namespace. In two flows half of the ESP comes by one that the kernel
    does not coalesce.
    """
    # all on one processor: the load takes at least half of it, and the loop never waits for longer than that
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    local, remote = OUTER[4]
    home = str(os.getpid())

    def make_peer() -> int:
        ip("link", "add", "wire", "type", "veth", "peer", "name", "wire", "netns", home)
        ip("address", "add", f"{remote}/24", "dev", "wire")
        set_up("wire")
        subprocess.run(["ethtool", "-K", "wire", "tx-udp-segmentation", "off"], check=True)
        return os.open("/proc/thread-self/ns/net", os.O_RDONLY)

    def peer_socket(port: int) -> socket.socket:
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.bind((remote, port))
        made.connect((local, 4500))
        return made

    with contextlib.ExitStack() as stack:
        namespace = elsewhere(None, make_peer)
        stack.callback(os.close, namespace)
        ip("address", "add", f"{local}/24", "dev", "wire")
        for device in ("wire", "lo"):
            set_up(device)
        subprocess.run(["ethtool", "-K", "wire", "gro", "on", "rx-udp-gro-forwarding", "on"], check=True)
        ipsec = UserspaceIPsec(TunDevice("inner", vnet_header=True), datapath=path)
        stack.callback(ipsec.close)
        application = stack.enter_context(socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
        application.settimeout(20)
        application.setsockopt(
            socket.SOL_SOCKET, 33, 1 << 22
        )  # SO_RCVBUFFORCE: it may wait for its turn, too
        application.bind((local, 4500))
        endpoint = set_nat_t_endpoint(application, backend="userspace", esp=ipsec)
        stack.callback(endpoint.close)
        ipsec.add_sa(sa(Direction.IN, **keys(Encr.AES_CTR, Integ.HMAC_SHA2_512_256)))  # it takes its time
        esp = (
            SPI.to_bytes(4) + b"\x7f" + bytes(SIZE - 5)
        )  # of the future: no replay, so all of it is looked at

        # GRO asks one socket of the port, by a hash of the flow: ESP's, which coalesces, or the application's
        peers: dict[bool, socket.socket] = {}
        for port in range(20000, 20100):
            peer = stack.enter_context(elsewhere(namespace, lambda: peer_socket(port)))  # noqa: B023
            before = endpoint.stats()
            send_train(peer, [esp, esp, NON_ESP_MARKER.ljust(SIZE, b"?"), esp])
            application.recv(2048)
            until(lambda: endpoint.stats().esp == before.esp + 3)  # noqa: B023 - behind what was handed back
            peers.setdefault(endpoint.stats().handed_back > before.handed_back, peer)
            if len(peers) == 2:
                break
        glued, other = peers[True], peers[flows == "one flow"]

        heard: set[bytes] = set()

        def listen() -> None:
            while (message := application.recv(2048)) != b"the end":
                heard.add(message[:10])

        listening = in_thread(listen)
        softnet, start, sent = lost_before_any_socket(), endpoint.stats(), 0

        def behind() -> int:
            """Return how much ESP still waits. More than the kernel holds is no matter of shedding."""
            stats = endpoint.stats()
            dropped = (stats.esp_dropped_in_kernel or 0) - (start.esp_dropped_in_kernel or 0)
            return sent - (stats.esp - start.esp) - dropped

        for number in range(MESSAGES):
            message = NON_ESP_MARKER + ike(number, SIZE - len(NON_ESP_MARKER))
            send_train(glued, [esp * (TRAIN // 2), message, esp * (TRAIN - TRAIN // 2 - 1)])
            send_train(other, [esp * TRAIN])
            sent += 2 * TRAIN - 1
            if number % 10 == 9 and behind() > MOST_BEHIND:
                until(lambda: behind() < MOST_BEHIND // 2)
        lost = lost_before_any_socket() - softnet
        with contextlib.suppress(AssertionError):  # which has no more to say
            until(lambda: len(heard) >= MESSAGES - lost, 20)
        glued.send(NON_ESP_MARKER + b"the end")
        listening()
        assert len(heard) >= MESSAGES - lost, (len(heard), lost, endpoint.stats(), ipsec.counters())
        assert endpoint.stats().errors == 0
        dropped = ipsec.counters().get(Reason.QUEUE, 0) + (endpoint.stats().esp_dropped_in_kernel or 0)
        assert dropped > MESSAGES, "it was no overload"

        def opened_alone(size: int) -> bool:
            """Send ESP of nobody's, and tell whether such has been looked at since the overload."""
            glued.send((SPI + 1).to_bytes(4) + bytes(size - 4))
            return ipsec.counters().get(Reason.NO_SA, 0) > strangers

        for size in (SIZE, 100):
            strangers = ipsec.counters().get(Reason.NO_SA, 0)
            until(lambda: opened_alone(size))  # noqa: B023 - when the queue has been emptied
