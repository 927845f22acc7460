"""Receives on an endpoint: those of a plain socket to which IKE alone comes, without the marker."""

from __future__ import annotations

import array
import contextlib
import errno
import select
import socket
import struct
import sys
from functools import partial
from typing import Any

import pytest

from natcompat import set_nat_t_endpoint
from natcompat.backends import system_calls as system
from natcompat.backends.diversion import Diversion
from natcompat.endpoint.socket_class import NatTSocket
from tests.support.pairs import (
    DONTWAIT,
    ESP,
    IN_LINE,
    KINDS,
    LINUX,
    MARKER,
    MESSAGE,
    NOISE,
    PEEK,
    TRUNC,
    Kind,
    Operation,
    Pair,
    eagain,
    in_thread,
    of_kinds,
    outcome,
    until,
)


def into(buffer: Any, *arguments: Any, method: str = "recv_into") -> Operation:
    """Receive into a copy of `buffer`; return its contents with the result."""

    def receive(sock: socket.socket) -> Any:
        copy = array.array(buffer.typecode, buffer) if isinstance(buffer, array.array) else bytearray(buffer)
        return getattr(sock, method)(copy, *arguments), bytes(copy)

    return receive


def into_view(sock: socket.socket) -> Any:
    octets = bytearray(40)
    with memoryview(octets)[10:30] as view:
        return sock.recv_into(view), bytes(octets)


def into_many(sizes: list[int], *arguments: Any) -> Operation:
    def receive(sock: socket.socket) -> Any:
        buffers = [bytearray(b"." * size) for size in sizes]
        result = sock.recvmsg_into(buffers, *arguments)
        return result, buffers

    return receive


def start_and_length(size: int, flags: int) -> Operation:
    # CPython returns uninitialised memory beyond the buffer
    def receive(sock: socket.socket) -> Any:
        data = sock.recv(size, flags)
        return data[:size], len(data)

    return receive


SIZES = {"nothing": 0, "one-byte": 1, "the-marker": 4, "one-too-few": 19, "exactly": 20, "plenty": 70000}
OPERATIONS: dict[str, Operation] = (
    {f"recv-{name}": lambda sock, size=size: sock.recv(size) for name, size in SIZES.items()}
    | {f"recvfrom-{name}": lambda sock, size=size: sock.recvfrom(size) for name, size in SIZES.items()}
    | {f"recvmsg-{name}": lambda sock, size=size: sock.recvmsg(size) for name, size in SIZES.items()}
    | {f"recv_into-{name}": into(bytes(size)) for name, size in SIZES.items()}
    | {f"recvfrom_into-{name}": into(bytes(size), method="recvfrom_into") for name, size in SIZES.items()}
    | {
        "recv-peek": lambda sock: (sock.recv(50, PEEK), sock.recv(7, PEEK)),
        "recvfrom-peek": lambda sock: (sock.recvfrom(50, PEEK), sock.recvfrom(50, PEEK)),
        "recvmsg-peek": lambda sock: (sock.recvmsg(5, 0, PEEK), sock.recvmsg(50, 0, PEEK)),
        "recv_into-peek": into(bytes(8), 0, PEEK),
        "recv-dontwait": lambda sock: sock.recv(50, DONTWAIT),
        "recvfrom-dontwait": lambda sock: sock.recvfrom(50, DONTWAIT),
        "recv-trunc": start_and_length(5, TRUNC),
        "recv-trunc-with-room": start_and_length(50, TRUNC),
        "recv-trunc-peek": start_and_length(5, TRUNC | PEEK),
        "recv_into-trunc": into(bytes(5), 0, TRUNC),
        "recv_into-trunc-part": into(bytes(15), 5, TRUNC),
        "recvfrom_into-trunc-part": into(bytes(15), 5, TRUNC, method="recvfrom_into"),
        "recvmsg-trunc": lambda sock: sock.recvmsg(5, 0, TRUNC)[1:],
        "recv_into-part": into(bytes(50), 10),
        "recv_into-array-of-ints": into(array.array("I", range(10))),
        "recv_into-part-of-a-view": into_view,
        "recvfrom_into-part": into(bytes(50), 10, method="recvfrom_into"),
        "recvmsg_into-nothing": into_many([]),
        "recvmsg_into-empty-buffers": into_many([0, 0]),
        "recvmsg_into-one": into_many([50]),
        "recvmsg_into-many": into_many([3, 0, 7, 50, 4]),
        "recvmsg_into-too-little": into_many([3, 7]),
        "recvmsg_into-trunc": into_many([3, 7], 0, TRUNC),
        "recvmsg_into-peek": into_many([3, 7], 0, PEEK),
        "makefile": lambda sock: sock.makefile("rb", buffering=0).read(50),
        "makefile-readinto": lambda sock: into(bytes(50), method="readinto")(
            sock.makefile("rb", buffering=0)
        ),
    }
)
MISTAKES: dict[str, Operation] = {
    "recv-negative": lambda sock: sock.recv(-1),
    "recv-very-negative": lambda sock: sock.recv(-100),
    "recv-negative-peek": lambda sock: sock.recv(-1, PEEK),
    "recv-text": lambda sock: sock.recv("1500"),  # type: ignore[arg-type]
    "recv-none": lambda sock: sock.recv(None),  # type: ignore[arg-type]
    "recv-nothing": lambda sock: sock.recv(),  # type: ignore[call-arg]
    "recv-by-keyword": lambda sock: sock.recv(bufsize=5),  # type: ignore[call-arg]
    "recv-flags-of-text": lambda sock: sock.recv(5, "PEEK"),  # type: ignore[arg-type]
    "recvfrom-negative": lambda sock: sock.recvfrom(-1),
    "recvfrom-text": lambda sock: sock.recvfrom("1500"),  # type: ignore[arg-type]
    "recv_into-read-only": lambda sock: sock.recv_into(bytes(50)),
    "recv_into-text": lambda sock: sock.recv_into("text"),  # type: ignore[arg-type]
    "recv_into-negative": lambda sock: sock.recv_into(bytearray(50), -1),
    "recv_into-more-than-fits": lambda sock: sock.recv_into(bytearray(50), 51),
    "recv_into-scattered-view": lambda sock: sock.recv_into(memoryview(bytearray(50))[::2]),
    "recvfrom_into-read-only": lambda sock: sock.recvfrom_into(memoryview(b"read-only")),
    "recvfrom_into-negative": lambda sock: sock.recvfrom_into(bytearray(50), -1),
    "recvfrom_into-more-than-fits": lambda sock: sock.recvfrom_into(bytearray(50), 51),
    "recvmsg-negative": lambda sock: sock.recvmsg(-1),
    "recvmsg-negative-ancillary": lambda sock: sock.recvmsg(50, -1),
    "recvmsg_into-no-list": lambda sock: sock.recvmsg_into(5),  # type: ignore[arg-type]
    "recvmsg_into-read-only": lambda sock: sock.recvmsg_into([bytearray(5), b"read-only"]),
    "recvmsg_into-text": lambda sock: sock.recvmsg_into(["text"]),  # type: ignore[list-item]
}


def compare(pair: Pair, operation: Operation) -> None:
    """Compare a plain socket that gets `MESSAGE` with an endpoint that gets noise before it."""
    plain = pair.plain()
    for message in (MESSAGE, b"next"):
        pair.peer.sendto(message, plain.getsockname())
        pair.noise()
        pair.ike(message)
    expected = outcome(lambda: operation(plain))
    assert outcome(lambda: operation(pair.app)) == expected
    # the same datagrams are left
    for sock in (plain, pair.app):
        sock.settimeout(0)
    for _ in range(3):
        assert outcome(lambda: pair.app.recvfrom(100)) == outcome(lambda: plain.recvfrom(100))
    pair.expect_esp([payload for payload in NOISE * 2 if len(payload) >= 4])


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_a_receive_does_what_it_does_on_a_plain_socket(pair: Pair, operation: Operation) -> None:
    compare(pair, operation)


@pytest.mark.parametrize("operation", MISTAKES.values(), ids=MISTAKES.keys())
def test_an_invalid_receive_raises_as_on_a_plain_socket_and_takes_nothing(
    pair: Pair, operation: Operation
) -> None:
    compare(pair, operation)


@pytest.mark.parametrize("operation", OPERATIONS.values(), ids=OPERATIONS.keys())
def test_a_receive_on_a_closed_socket_raises_as_on_a_plain_socket(kind: Kind, operation: Operation) -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair(kind, socket.AF_INET, stack)
        plain = pair.plain()
        plain.close()
        pair.app.close()
        assert outcome(lambda: operation(pair.app)) == outcome(lambda: operation(plain))


class Number:
    """An object that serves as an int."""

    def __index__(self) -> int:
        return 5


def test_a_size_may_be_any_object_with_an_index(pair: Pair) -> None:
    pair.ike(MESSAGE)
    pair.ike(MESSAGE)
    assert pair.app.recvmsg(Number())[0] == MESSAGE[:5]  # type: ignore[arg-type]
    assert pair.app.recvfrom(True)[0] == MESSAGE[:1]


# --- ancillary data, flags and errors -------------------------------------------------------------


@LINUX
def test_ancillary_data_is_that_of_the_ike_message(pair: Pair) -> None:
    v6 = pair.family == socket.AF_INET6
    level = socket.IPPROTO_IPV6 if v6 else socket.IPPROTO_IP
    received = (
        (socket.IPV6_RECVPKTINFO, socket.IPV6_RECVHOPLIMIT, socket.IPV6_RECVTCLASS)
        if v6
        else (8, 12, 13)  # IP_PKTINFO, IP_RECVTTL, IP_RECVTOS; include/uapi/linux/in.h
    )
    for option in received:
        pair.app.setsockopt(level, option, 1)
    ttl, tos = (socket.IPV6_UNICAST_HOPS, socket.IPV6_TCLASS) if v6 else (socket.IP_TTL, socket.IP_TOS)
    plain = pair.plain()
    for option in received:
        plain.setsockopt(level, option, 1)
    pair.noise()  # with other values than those of the IKE message
    pair.peer.setsockopt(level, ttl, 33)
    pair.peer.setsockopt(level, tos, 0x20)
    pair.ike(MESSAGE)
    pair.peer.sendto(MESSAGE, plain.getsockname())
    expected = plain.recvmsg(100, 500)
    assert len(expected[1]) == 3
    assert pair.app.recvmsg(100, 500) == expected
    pair.ike(MESSAGE)
    pair.peer.sendto(MESSAGE, plain.getsockname())
    buffers = [bytearray(7), bytearray(50)]
    assert pair.app.recvmsg_into(buffers, 500) == (len(MESSAGE), *plain.recvmsg(100, 500)[1:])
    assert b"".join(buffers).startswith(MESSAGE)


@LINUX
def test_truncated_ancillary_data_sets_msg_ctrunc(pair: Pair) -> None:
    level = socket.IPPROTO_IPV6 if pair.family == socket.AF_INET6 else socket.IPPROTO_IP
    pair.app.setsockopt(level, socket.IPV6_RECVPKTINFO if level == socket.IPPROTO_IPV6 else 8, 1)
    pair.ike(MESSAGE)
    data, ancillary, flags, _ = pair.app.recvmsg(5)
    assert (data, ancillary) == (MESSAGE[:5], [])
    assert flags == socket.MSG_CTRUNC | socket.MSG_TRUNC


@LINUX
@of_kinds([kind for kind in KINDS if kind.backend != "linux"])
@pytest.mark.parametrize("size", [2, 100], ids=["too-small", "large"])
def test_the_error_queue_returns_what_was_sent_without_the_marker(pair: Pair, size: int) -> None:
    v6 = pair.family == socket.AF_INET6
    option = (socket.IPPROTO_IPV6, 25) if v6 else (socket.IPPROTO_IP, 11)  # IPV6_RECVERR, IP_RECVERR
    plain = pair.plain()
    deaf = pair.plain()
    closed_port = deaf.getsockname()
    deaf.close()
    for sock in (plain, pair.app):
        sock.setsockopt(*option, 1)
        sock.sendto(b"request", closed_port)
        until(partial(poll_error, sock))
    expected = plain.recvmsg(size, 500, socket.MSG_ERRQUEUE)
    received = pair.app.recvmsg(size, 500, socket.MSG_ERRQUEUE)
    assert received[0] == expected[0] == b"request"[:size]
    assert received[2:] == expected[2:]
    assert [item[:2] for item in received[1]] == [item[:2] for item in expected[1]]
    assert struct.unpack_from("=I", received[1][0][2])[0] == errno.ECONNREFUSED
    # a keepalive, which has no marker, returns whole
    outcome(lambda: pair.app.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
    pair.endpoint.send_keepalive(closed_port)
    until(lambda: poll_error(pair.app))
    assert pair.app.recvmsg(size, 500, socket.MSG_ERRQUEUE)[0] == b"\xff"


def poll_error(sock: socket.socket) -> bool:
    poller = select.poll()
    poller.register(sock, 0)
    return any(events & select.POLLERR for _, events in poller.poll(0))


def icmp_errors(pair: Pair, sock: socket.socket) -> list[Any]:
    deaf = pair.plain()
    sock.connect(deaf.getsockname())
    deaf.close()
    sock.setblocking(False)
    return [
        outcome(operation)
        for operation in (
            lambda: sock.send(b"request"),
            lambda: sock.recv(100),
            lambda: sock.send(b"request"),
            lambda: sock.send(b"request"),
            lambda: sock.recv(100),
        )
    ]


@of_kinds([kind for kind in KINDS if kind.backend != "linux"])
def test_icmp_errors_are_raised(pair: Pair) -> None:
    refused = OSError, errno.ECONNREFUSED
    assert icmp_errors(pair, pair.app) == [7, refused, 7, refused, eagain()]


@of_kinds([kind for kind in KINDS if kind.backend == "linux"])
def test_icmp_errors_are_those_of_a_plain_socket_with_udp_encap(pair: Pair) -> None:
    plain = pair.plain()
    plain.setsockopt(socket.IPPROTO_UDP, 100, 2)  # UDP_ENCAP, UDP_ENCAP_ESPINUDP; linux/udp.h
    assert icmp_errors(pair, pair.app) == icmp_errors(pair, plain)


# --- peeking --------------------------------------------------------------------------------------


@pytest.mark.parametrize("receive", ["recv", "recvfrom", "recvmsg"])
def test_a_peek_shows_ike_behind_esp_and_leaves_it(pair: Pair, receive: str) -> None:
    pair.noise()
    pair.ike(MESSAGE)
    arguments = (100, 0, PEEK) if receive == "recvmsg" else (100, PEEK)
    for _ in range(3):
        seen = getattr(pair.app, receive)(*arguments)
        assert MESSAGE in (seen, seen[0])
    assert pair.endpoint.stats().ike == 0
    assert pair.app.recv(100) == MESSAGE
    assert pair.endpoint.stats().ike == 1
    pair.expect_esp([payload for payload in NOISE if len(payload) >= 4])


@of_kinds(IN_LINE)
def test_peeks_and_receives_of_many_threads_lose_no_ike(pair: Pair) -> None:
    pair.app.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
    pair.app.settimeout(0.5)
    expected = {b"%d" % number for number in range(60)}

    def receive() -> list[bytes]:
        received: list[bytes] = []
        with contextlib.suppress(TimeoutError):
            while True:
                pair.app.recv(100, PEEK)
                received.append(pair.app.recv(100))
        return received

    threads = [in_thread(receive) for _ in range(3)]
    for message in sorted(expected):
        pair.peer.sendto(ESP, pair.address)
        pair.ike(message)
    received = [message for wait in threads for message in wait()]
    assert sorted(received) == sorted(expected)
    assert pair.endpoint.stats().esp == 60


# --- threads, several endpoints, both families ----------------------------------------------------


def keeps_up(pair: Pair, number: int) -> bool:
    return pair.endpoint.stats().ike > number - 20 and (not pair.kind.consumes or len(pair.esp) > number - 60)


def test_threads_receive_and_send_at_once_and_every_counter_is_exact(pair: Pair) -> None:
    count, threads = 150, 3
    wire: list[bytes] = []
    app, peer = pair.app, pair.peer
    app.settimeout(5)

    def receive() -> list[bytes]:
        return [app.recvfrom(100)[0] for _ in range(count)]

    def send() -> None:
        for number in range(count):
            app.sendto(b"%d" % number, peer.getsockname())
            wire.append(peer.recv(100))

    switch = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        receivers = [in_thread(receive) for _ in range(threads)]
        senders = [in_thread(send) for _ in range(threads)]
        for number in range(count * threads):
            if number % 3 == 0:
                pair.noise()
            pair.ike(b"%d" % number)
            # no queue may overflow
            until(partial(keeps_up, pair, number))
        received = [message for wait in receivers for message in wait()]
        for wait in senders:
            wait()
    finally:
        sys.setswitchinterval(switch)
    assert sorted(received) == sorted(b"%d" % number for number in range(count * threads))
    assert len(wire) == count * threads
    assert all(payload.startswith(MARKER) for payload in wire)
    stats = pair.endpoint.stats()
    assert (stats.ike, stats.markers_inserted) == (count * threads,) * 2
    noise = count * threads // 3
    esp = sum(len(payload) >= 4 for payload in NOISE) * noise
    if pair.kind.consumes:
        until(lambda: pair.endpoint.stats().esp == esp)
        until(lambda: len(pair.esp) == esp)
    if not pair.kind.exact:
        assert pair.endpoint.stats().esp == esp
    if not pair.kind.exact or pair.kind.consumes:
        stats = pair.endpoint.stats()
        assert (stats.keepalives, stats.runts, stats.errors) == (noise, 2 * noise, 0)


def test_two_endpoints_in_one_process_are_independent(pair: Pair) -> None:
    other = pair.plain()
    endpoint = pair.switch_on(other)
    assert type(other) is not type(pair.app)
    for number, sock in enumerate((pair.app, other, pair.app, other)):
        pair.peer.sendto(ESP, sock.getsockname())
        pair.peer.sendto(MARKER + b"%d" % number, sock.getsockname())
    assert [pair.app.recv(9), other.recv(9)] == [b"0", b"1"]
    endpoint.close()
    pair.ike(b"4")
    assert [pair.app.recv(9), pair.app.recv(9)] == [b"2", b"4"]
    assert (pair.endpoint.stats().ike, endpoint.stats().ike) == (3, 1)


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_a_dual_stack_socket_serves_both_families(kind: Kind) -> None:
    with contextlib.ExitStack() as stack:
        pair = Pair(kind, socket.AF_INET6, stack)
        app = stack.enter_context(socket.socket(socket.AF_INET6, socket.SOCK_DGRAM))
        app.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        app.bind(("::", 0))
        app.settimeout(5)
        set_nat_t_endpoint(app, backend=kind.take(), esp=(lambda *_: None) if kind.consumes else None)
        port = app.getsockname()[1]
        with socket.socket(type=socket.SOCK_DGRAM) as peer4:
            peer4.bind(("127.0.0.1", 0))
            for payload in (*NOISE, MARKER + b"four"):
                peer4.sendto(payload, ("127.0.0.1", port))
            message, source = app.recvfrom(100)
            assert (message, source[0]) == (b"four", "::ffff:127.0.0.1")
            app.sendto(b"answer", source)
            peer4.settimeout(5)
            assert peer4.recv(100) == MARKER + b"answer"
        pair.peer.sendto(MARKER + b"six", ("::1", port))
        assert app.recvfrom(100) == (b"six", pair.peer.getsockname())


# --- faults of other programs and of backends -----------------------------------------------------

SO_DETACH_FILTER = 27  # include/uapi/asm-generic/socket.h


@LINUX
@of_kinds([kind for kind in KINDS if kind.name == "filter"])
@pytest.mark.parametrize(
    ("receive", "size", "counted"),
    [
        (lambda sock: sock.recv(100), 64, "errors"),
        (lambda sock: sock.recvfrom(5)[0], 10_000, "errors"),
        (lambda sock: sock.recvfrom(5)[0], 64, "esp"),
        (lambda sock: sock.recvfrom(100)[0], 64, "esp"),
        (lambda sock: sock.recvmsg(100)[0], 10_000, "esp"),
    ],
    ids=["recv", "recvfrom-truncated", "recvfrom-little", "recvfrom", "recvmsg"],
)
def test_no_esp_is_delivered_after_another_program_removed_the_filter(
    pair: Pair, receive: Operation, size: int, counted: str
) -> None:
    pair.ike(b"first")
    assert pair.app.recv(100) == b"first"  # from here on the receive expects IKE alone
    with socket.socket(fileno=pair.app.fileno()) as alias:
        alias.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)
        alias.detach()
    pair.peer.sendto(ESP.ljust(size, b"e"), pair.address)
    pair.ike(b"later")
    assert receive(pair.app) in (b"later", b"later"[:5])
    stats = pair.endpoint.stats()
    assert (stats.errors, stats.esp) == ((1, 0) if counted == "errors" else (0, 1))


def test_ike_diverted_by_a_backend_is_an_error(caplog: pytest.LogCaptureFixture) -> None:
    diversion = Diversion(None, socket.AF_INET)
    assert not diversion.wanted
    diversion.take([(memoryview(MARKER + b"IKE"), ("127.0.0.1", 500))])
    assert (diversion.counters.errors, diversion.counters.ike) == (1, 0)
    assert "the backend diverted it as ESP" in caplog.text


class WithoutRecvmsg:
    """A model of a socket on Windows, which has no ``recvmsg``."""

    def recvfrom(self, size: int, flags: int) -> tuple[bytes, Any]:
        return b"message"[:size], ("127.0.0.1", 500)


def test_without_recvmsg_there_is_no_ancillary_data() -> None:
    root: Any = WithoutRecvmsg
    expected: Any = b"mess", [], 0, ("127.0.0.1", 500)
    assert system.receive(root, WithoutRecvmsg(), 4, 100, 0) == expected


def test_the_socket_class_has_no_helper_that_an_application_could_override() -> None:
    helpers = {name for name in vars(NatTSocket) if name.startswith("_") and not name.startswith("__")}
    assert helpers <= {"_real_close", "_nat_t"}  # a method of socket.socket, and the state
