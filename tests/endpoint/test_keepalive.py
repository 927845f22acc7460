"""NAT-keepalives: one byte FF to peers without traffic for the interval (RFC 3948, 2.3 and 4)."""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import natcompat
from natcompat import NAT_KEEPALIVE, NON_ESP_MARKER, Keepalive, NatTEndpoint, set_nat_t_endpoint
from natcompat.endpoint.keepalive import DEFAULT_INTERVAL, KernelKeepalive

SOON = 0.05  # seconds: an interval that tests can wait for
NEVER = 3600.0
PATIENCE = 10.0


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"waited in vain until {what}"
        time.sleep(0.002)


def timer_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "natcompat-keepalive"]


def wire(peer: socket.socket, count: int) -> list[bytes]:
    """Return the next `count` payloads that reach `peer`."""
    return [peer.recv(100) for _ in range(count)]


def silent(peer: socket.socket, seconds: float) -> bool:
    return not select.select([peer], [], [], seconds)[0]


class Application:
    """An endpoint and a number of peers."""

    def __init__(self, family: int = socket.AF_INET) -> None:
        self.host = "::1" if family == socket.AF_INET6 else "127.0.0.1"
        self.family = family
        self.opened: list[socket.socket] = []
        self.sock = self.peer()
        self.endpoint: NatTEndpoint = set_nat_t_endpoint(self.sock)

    def peer(self) -> socket.socket:
        sock = socket.socket(self.family, socket.SOCK_DGRAM)
        self.opened.append(sock)
        sock.bind((self.host, 0))
        sock.settimeout(PATIENCE)
        return sock

    def close(self) -> None:
        for sock in self.opened:
            sock.close()


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def application(request: pytest.FixtureRequest) -> Iterator[Application]:
    before = timer_threads()
    made = Application(request.param)
    yield made
    made.close()
    assert timer_threads() == before, "a timer outlived its Keepalive"


def test_the_default_interval_is_that_of_the_rfc(application: Application) -> None:
    assert DEFAULT_INTERVAL == 20
    assert natcompat.Keepalive is Keepalive


class TestInAThread:
    def test_keepalives_of_one_byte_without_a_marker_are_repeated(self, application: Application) -> None:
        peer = application.peer()
        with Keepalive(application.endpoint, interval=SOON) as keepalive:
            begin = time.monotonic()
            keepalive.add(peer.getsockname())
            assert wire(peer, 3) == [NAT_KEEPALIVE] * 3
            elapsed = time.monotonic() - begin
            assert elapsed >= 3 * 0.9 * SOON, "earlier than the jitter allows"
            until(lambda: keepalive.stats().sent >= 3, "three are counted")
            assert application.endpoint.stats().keepalives_sent >= 3
            assert application.endpoint.stats().markers_inserted == 0
            assert keepalive.stats().errors == 0

    def test_without_peers_there_is_no_thread(self, application: Application) -> None:
        with Keepalive(application.endpoint, interval=SOON):
            assert timer_threads() == []

    def test_all_peers_share_one_thread(self, application: Application) -> None:
        peers = [application.peer() for _ in range(50)]
        with Keepalive(application.endpoint, interval=SOON) as keepalive:
            for peer in peers:
                keepalive.add(peer.getsockname())
            assert len(timer_threads()) == 1
            for peer in peers:
                assert wire(peer, 2) == [NAT_KEEPALIVE] * 2
            assert keepalive.stats().peers == 50

    def test_every_peer_has_its_own_interval(self, application: Application) -> None:
        often, rarely = application.peer(), application.peer()
        with Keepalive(application.endpoint, interval=NEVER) as keepalive:
            keepalive.add(rarely.getsockname())
            keepalive.add(often.getsockname(), interval=SOON)  # due before the peer for which the timer waits
            assert wire(often, 3) == [NAT_KEEPALIVE] * 3
            assert silent(rarely, 0)

    def test_keepalives_to_the_connected_peer(self, application: Application) -> None:
        peer = application.peer()
        application.sock.connect(peer.getsockname())
        with Keepalive(application.endpoint, interval=SOON) as keepalive:
            keepalive.add()
            assert wire(peer, 2) == [NAT_KEEPALIVE] * 2

    def test_removed_peers_get_no_keepalives(self, application: Application) -> None:
        removed, kept = application.peer(), application.peer()
        with Keepalive(application.endpoint, interval=SOON) as keepalive:
            keepalive.add(removed.getsockname())
            keepalive.add(kept.getsockname())
            wire(removed, 1)
            keepalive.remove(removed.getsockname())
            keepalive.remove(removed.getsockname())
            wire(kept, 3)
            while not silent(removed, 0):  # keepalives under way
                removed.recv(1)
            wire(kept, 3)
            assert silent(removed, 0)
            assert keepalive.stats().peers == 1

    def test_removed_peers_take_no_memory(self, application: Application) -> None:
        with Keepalive(application.endpoint, interval=NEVER) as keepalive:
            for port in range(1, 5001):
                keepalive.add((application.host, port))
                keepalive.remove((application.host, port))
            assert len(keepalive._schedule._heap) < 200
            assert keepalive.stats().peers == 0

    def test_adding_again_replaces_the_interval(self, application: Application) -> None:
        peer = application.peer()
        with Keepalive(application.endpoint, interval=NEVER) as keepalive:
            keepalive.add(peer.getsockname())
            keepalive.add(peer.getsockname(), interval=SOON)
            assert wire(peer, 2) == [NAT_KEEPALIVE] * 2
            assert keepalive.stats().peers == 1

    def test_close_ends_the_thread_and_may_be_repeated(self, application: Application) -> None:
        keepalive = Keepalive(application.endpoint, interval=NEVER)
        keepalive.add(application.peer().getsockname())
        assert len(timer_threads()) == 1
        keepalive.close()
        assert timer_threads() == []
        keepalive.close()
        assert keepalive.closed
        with pytest.raises(natcompat.NatCompatError, match="have ended") as caught:
            keepalive.add(application.peer().getsockname())
        assert caught.value.errno == errno.EBADF

    def test_garbage_collection_ends_the_thread(self, application: Application) -> None:
        keepalive = Keepalive(application.endpoint, interval=NEVER)
        keepalive.add(application.peer().getsockname())
        [thread] = timer_threads()
        del keepalive
        gc.collect()
        thread.join(PATIENCE)
        assert not thread.is_alive()

    def test_the_end_of_the_endpoint_ends_the_keepalives(self, application: Application) -> None:
        peer = application.peer()
        keepalive = Keepalive(application.endpoint, interval=SOON)
        keepalive.add(peer.getsockname())
        wire(peer, 1)
        [thread] = timer_threads()
        application.sock.close()
        thread.join(PATIENCE)
        assert not thread.is_alive()
        assert keepalive.closed
        assert keepalive.stats().peers == 0

    def test_a_closed_endpoint_is_refused(self, application: Application) -> None:
        application.endpoint.close()
        with (
            Keepalive(application.endpoint) as keepalive,
            pytest.raises(natcompat.NatCompatError, match="open endpoint"),
        ):
            keepalive.add(("127.0.0.1", 4500))
        assert keepalive.closed

    @pytest.mark.parametrize("interval", [0, -1.0, float("nan"), float("inf")])
    def test_an_interval_must_be_positive_and_finite(self, application: Application, interval: float) -> None:
        with pytest.raises(ValueError, match="positive number of seconds"):
            Keepalive(application.endpoint, interval=interval)
        with (
            Keepalive(application.endpoint) as keepalive,
            pytest.raises(ValueError, match="positive number of seconds"),
        ):
            keepalive.add(("127.0.0.1", 4500), interval=interval)

    @pytest.mark.parametrize(
        ("address", "error"),
        [
            (("gateway.example", 4500), socket.gaierror),  # a look-up would block the timer
            (("not an address", 4500), socket.gaierror),
            (("127.0.0.1", 65536), OverflowError),
            (("127.0.0.1", -1), OverflowError),
        ],
        ids=["name", "nonsense", "port too large", "port negative"],
    )
    def test_an_invalid_address_is_refused(
        self, application: Application, address: Any, error: type[Exception]
    ) -> None:
        with Keepalive(application.endpoint) as keepalive:
            with pytest.raises(error):
                keepalive.add(address)
            assert keepalive.stats().peers == 0

    def test_an_address_of_the_other_family_is_refused(self, application: Application) -> None:
        other = ("127.0.0.1", 4500) if application.family == socket.AF_INET6 else ("::1", 4500, 0, 0)
        with Keepalive(application.endpoint) as keepalive, pytest.raises(socket.gaierror):
            keepalive.add(other)

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
    def test_a_forked_child_sends_no_keepalives(self, application: Application) -> None:
        peer = application.peer()
        with Keepalive(application.endpoint, interval=SOON) as keepalive:
            keepalive.add(peer.getsockname())
            wire(peer, 1)
            reading, writing = os.pipe()
            child = os.fork()
            if child == 0:
                answer = b"?"
                try:
                    refused = False
                    try:
                        keepalive.add(peer.getsockname())
                    except OSError:
                        refused = True
                    application.sock.sendto(b"IKE of the child", peer.getsockname())
                    if refused and keepalive.closed and not timer_threads() and not keepalive.stats().peers:
                        answer = b"closed"
                    keepalive.close()
                finally:
                    os.write(writing, answer)
                    os._exit(0)
            os.waitpid(child, 0)
            os.close(writing)
            with os.fdopen(reading, "rb") as pipe:
                assert pipe.read() == b"closed"
            while peer.recv(100) != NON_ESP_MARKER + b"IKE of the child":
                pass
            assert wire(peer, 2) == [NAT_KEEPALIVE] * 2, "the parent goes on"


class TestTraffic:
    """A peer with traffic within the interval gets no keepalive."""

    INTERVAL = 0.3

    @staticmethod
    def to_address(application: Application, keepalive: Keepalive, address: Any) -> None:
        application.sock.sendto(b"IKE", address)

    @staticmethod
    def by_sendmsg(application: Application, keepalive: Keepalive, address: Any) -> None:
        application.sock.sendmsg([b"I", b"KE"], [], 0, address)

    @staticmethod
    def to_short_address(application: Application, keepalive: Keepalive, address: Any) -> None:
        application.sock.sendto(b"IKE", address[:2])

    @staticmethod
    def connected(application: Application, keepalive: Keepalive, address: Any) -> None:
        application.sock.connect(address)
        application.sock.send(b"IKE")

    @staticmethod
    def by_alias(application: Application, keepalive: Keepalive, address: Any) -> None:
        with application.sock.dup() as alias:
            alias.sendto(b"IKE", address)

    @staticmethod
    def told(application: Application, keepalive: Keepalive, address: Any) -> None:
        keepalive.sent(address)
        with socket.socket(application.family, socket.SOCK_DGRAM) as elsewhere:
            elsewhere.sendto(NON_ESP_MARKER + b"IKE", address)  # for the ESP that `sent` notes

    @pytest.mark.parametrize(
        "send",
        [to_address, by_sendmsg, to_short_address, connected, by_alias, told],
        ids=lambda f: f.__name__,
    )
    def test_traffic_replaces_keepalives(
        self, application: Application, send: Callable[[Application, Keepalive, Any], None]
    ) -> None:
        peer, idle = application.peer(), application.peer()
        with Keepalive(application.endpoint, interval=self.INTERVAL) as keepalive:
            keepalive.add(peer.getsockname())
            keepalive.add(idle.getsockname())
            begin = time.monotonic()
            while keepalive.stats().skipped < 1:
                assert time.monotonic() < begin + PATIENCE
                send(application, keepalive, peer.getsockname())
                assert wire(peer, 1) == [NON_ESP_MARKER + b"IKE"], "no keepalive between the messages"
                time.sleep(0.01)
            assert wire(idle, 1) == [NAT_KEEPALIVE]
            last = time.monotonic()
            assert wire(peer, 1) == [NAT_KEEPALIVE], "and one when they stop"
            assert time.monotonic() - last > 0.5 * self.INTERVAL

    def test_two_keepalive_objects_share_an_endpoint(self, application: Application) -> None:
        peer = application.peer()
        seen: list[Any] = []
        end = application.endpoint.observe_sends(seen.append)
        with Keepalive(application.endpoint, interval=NEVER) as keepalive:
            keepalive.add(peer.getsockname())
            [entry] = keepalive._schedule.peers.values()
            before = entry.last_traffic
            application.sock.sendto(b"IKE", peer.getsockname())
            assert entry.last_traffic > before
        application.sock.sendto(b"IKE", peer.getsockname())
        assert seen == [peer.getsockname()] * 2
        end()
        end()
        application.sock.sendto(b"IKE", peer.getsockname())
        assert len(seen) == 2
        assert application.endpoint._state.note_sent is None, "the short way is open again"


class TestErrors:
    """An error of a send does not end the keepalives."""

    def test_an_error_is_counted_and_the_send_repeated(self, application: Application) -> None:
        peer = application.peer()
        with Keepalive(application.endpoint, interval=SOON) as keepalive:
            keepalive.add((application.host, 0))  # nothing can be sent to port 0
            keepalive.add(peer.getsockname())
            until(lambda: keepalive.stats().errors >= 2, "the error came again")
            wire(peer, 2)
            assert isinstance(keepalive.stats().last_error, OSError)
            assert not keepalive.closed

    def test_the_peer_of_an_unconnected_socket_is_an_error(self, application: Application) -> None:
        with Keepalive(application.endpoint, interval=SOON) as keepalive:
            keepalive.add()
            until(lambda: keepalive.stats().errors, "the error is counted")
            error = keepalive.stats().last_error
            assert isinstance(error, OSError)
            assert error.errno in (errno.EDESTADDRREQ, errno.ENOTCONN)
            peer = application.peer()
            application.sock.connect(peer.getsockname())
            assert wire(peer, 1) == [NAT_KEEPALIVE], "it was tried again"


class Kernel:
    """A model of a kernel that sends keepalives by itself."""

    def __init__(self, answer: bool | OSError) -> None:
        self.answer = answer
        self.calls: list[tuple[Any, ...]] = []

    def take_over(self, address: Any, interval: float) -> bool:
        self.calls.append(("take over", address, interval))
        if isinstance(self.answer, OSError):
            raise self.answer
        return self.answer

    def release(self, address: Any) -> None:
        self.calls.append(("release", address))


class TestKernel:
    def test_a_kernel_that_takes_a_peer_over_sends_its_keepalives(self, application: Application) -> None:
        kernel: KernelKeepalive = Kernel(True)
        assert isinstance(kernel, Kernel)
        address = application.peer().getsockname()
        with Keepalive(application.endpoint, interval=SOON) as keepalive:
            keepalive.add(address, kernel=kernel)
            assert kernel.calls == [("take over", address, SOON)]
            assert (keepalive.stats().peers, keepalive.stats().by_kernel) == (1, 1)
            assert timer_threads() == [], "nothing is left to do here"
            keepalive.remove(address)
            assert kernel.calls[1:] == [("release", address)]
            keepalive.add(address, kernel=kernel)
        assert kernel.calls[3:] == [("release", address)], "given back at the end"

    @pytest.mark.parametrize(
        ("answer", "errors"), [(False, 0), (OSError(errno.EOPNOTSUPP, "no"), 1)], ids=["no", "error"]
    )
    def test_a_kernel_that_refuses_a_peer_leaves_it_to_the_process(
        self, application: Application, answer: bool | OSError, errors: int
    ) -> None:
        kernel = Kernel(answer)
        peer = application.peer()
        with Keepalive(application.endpoint, interval=SOON) as keepalive:
            keepalive.add(peer.getsockname(), kernel=kernel)
            assert wire(peer, 2) == [NAT_KEEPALIVE] * 2
            assert keepalive.stats().errors == errors
            assert keepalive.stats().by_kernel == 0
        assert len(kernel.calls) == 1, "what was not taken over is not given back"


@pytest.fixture(params=["asyncio", "uvloop"])
def new_loop(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(request.param).new_event_loop


class TestOnALoop:
    def run(self, new_loop: Callable[[], asyncio.AbstractEventLoop], main: Any) -> None:
        with asyncio.Runner(loop_factory=new_loop) as runner:
            runner.run(main)

    def test_a_loop_needs_no_thread(self, application: Application, new_loop: Any) -> None:
        peers = [application.peer() for _ in range(3)]

        async def main() -> None:
            loop = asyncio.get_running_loop()
            with Keepalive(application.endpoint, interval=SOON, loop=loop) as keepalive:
                for peer in peers:
                    peer.setblocking(False)
                    keepalive.add(peer.getsockname())
                for peer in peers:
                    for _ in range(3):
                        readable = asyncio.Event()
                        loop.add_reader(peer.fileno(), readable.set)
                        await asyncio.wait_for(readable.wait(), PATIENCE)
                        assert peer.recv(100) == NAT_KEEPALIVE
                        loop.remove_reader(peer.fileno())
                assert timer_threads() == []

        self.run(new_loop, main())

    def test_a_peer_can_be_added_from_another_thread(self, application: Application, new_loop: Any) -> None:
        peer = application.peer()

        async def main() -> None:
            loop = asyncio.get_running_loop()
            with Keepalive(application.endpoint, interval=SOON, loop=loop) as keepalive:
                await asyncio.to_thread(keepalive.add, peer.getsockname())
                assert await asyncio.to_thread(wire, peer, 2) == [NAT_KEEPALIVE] * 2

        self.run(new_loop, main())

    def test_the_end_of_the_loop_ends_the_keepalives(self, application: Application, new_loop: Any) -> None:
        async def main() -> Keepalive:
            return Keepalive(application.endpoint, interval=NEVER, loop=asyncio.get_running_loop())

        with asyncio.Runner(loop_factory=new_loop) as runner:
            keepalive = runner.run(main())
        keepalive.add(application.peer().getsockname())
        assert keepalive.closed
        keepalive.close()

    def test_garbage_collection_ends_the_timer_of_the_loop(
        self, application: Application, new_loop: Any
    ) -> None:
        async def main() -> None:
            keepalive = Keepalive(application.endpoint, interval=NEVER, loop=asyncio.get_running_loop())
            keepalive.add(application.peer().getsockname())
            schedule = keepalive._schedule
            del keepalive
            gc.collect()
            assert schedule.ended
            assert application.endpoint._state.note_sent is None

        self.run(new_loop, main())
