"""Sends on an endpoint: those of a plain socket, with the marker in front of every datagram."""

from __future__ import annotations

import array
import errno
import socket
import struct
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from natcompat import NatCompatError, set_nat_t_endpoint
from natcompat.contract import LARGEST_PAYLOAD
from natcompat.endpoint.state import state_of
from tests.support.pairs import MARKER, Pair, in_thread, outcome, until

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="flags and options of Linux")
MORE, DONTWAIT = getattr(socket, "MSG_MORE", 0), getattr(socket, "MSG_DONTWAIT", 0)
UDP_CORK, UDP_SEGMENT, UDP_GRO = 1, 103, 104  # include/uapi/linux/udp.h
SO_ZEROCOPY, MSG_ZEROCOPY = 60, 0x4000000  # include/uapi/asm-generic/socket.h, include/linux/socket.h

Operation = Callable[[socket.socket, Any], Any]


CONNECTED: dict[str, Operation] = {
    "send": lambda sock, _: sock.send(b"message"),
    "send-nothing": lambda sock, _: sock.send(b""),
    "send-dontwait": lambda sock, _: sock.send(b"message", DONTWAIT),
    "send-bytearray": lambda sock, _: sock.send(bytearray(b"message")),
    "send-view": lambda sock, _: sock.send(memoryview(b"a message")[2:]),
    "send-array-of-ints": lambda sock, _: sock.send(array.array("I", range(5))),
    "send-four-zero-bytes": lambda sock, _: sock.send(MARKER),
    "sendall": lambda sock, _: sock.sendall(b"message"),
    "sendall-nothing": lambda sock, _: sock.sendall(b""),
    "sendall-dontwait": lambda sock, _: sock.sendall(b"message", DONTWAIT),
    "sendmsg": lambda sock, _: sock.sendmsg([b"mes", b"sage"]),
    "sendmsg-nothing": lambda sock, _: sock.sendmsg([]),
    "sendmsg-no-address": lambda sock, _: sock.sendmsg([b"message"], (), 0, None),
    "makefile": lambda sock, _: sock.makefile("wb", buffering=0).write(b"message"),
    "send-pieces": lambda sock, _: (sock.send(b"mes", MORE), sock.send(b"s", MORE), sock.send(b"age")),
    "sendmsg-pieces": lambda sock, _: (sock.sendmsg([b"mes"], (), MORE), sock.sendmsg([b"s", b"age"])),
}
ANYWHERE: dict[str, Operation] = {
    "sendto": lambda sock, address: sock.sendto(b"message", address),
    "sendto-flags": lambda sock, address: sock.sendto(b"message", 0, address),
    "sendto-dontwait": lambda sock, address: sock.sendto(b"message", DONTWAIT, address),
    "sendto-nothing": lambda sock, address: sock.sendto(b"", address),
    "sendto-one-byte": lambda sock, address: sock.sendto(b"\xff", address),
    "sendto-bytearray": lambda sock, address: sock.sendto(bytearray(b"message"), address),
    "sendto-view": lambda sock, address: sock.sendto(memoryview(b"a message")[2:], address),
    "sendto-array-of-ints": lambda sock, address: sock.sendto(array.array("I", range(5)), address),
    "sendto-large": lambda sock, address: sock.sendto(bytes(30000), address),
    "sendto-by-name": lambda sock, address: sock.sendto(b"message", ("localhost", *address[1:])),
    "sendmsg-to": lambda sock, address: sock.sendmsg([b"mes", b"", b"sage"], (), 0, address),
    "sendmsg-views": lambda sock, address: sock.sendmsg(
        [memoryview(b"mes"), bytearray(b"sage"), array.array("H", [1])], (), 0, address
    ),
    "sendmsg-generator": lambda sock, address: sock.sendmsg((b"x" for _ in range(5)), iter(()), 0, address),
    "sendmsg-1023-buffers": lambda sock, address: sock.sendmsg([b"xy"] * 1023, (), 0, address),
    "sendmsg-1024-buffers": lambda sock, address: sock.sendmsg([b"xy"] * 1024, (), 0, address),
    "sendmsg-1025-buffers": lambda sock, address: sock.sendmsg([b"xy"] * 1025, (), 0, address),
    "sendto-pieces": lambda sock, address: (
        sock.sendto(b"mes", MORE, address),
        sock.sendto(b"", MORE, address),
        sock.sendto(b"sage", address),
    ),
    "sendmsg-to-pieces": lambda sock, address: (
        sock.sendmsg([b"m", b"es"], (), MORE, address),
        sock.sendto(b"sage", address),
    ),
    "first-piece-empty": lambda sock, address: (
        sock.sendto(b"", MORE, address),
        sock.sendto(b"message", address),
    ),
    "pieces-that-grow-too-large": lambda sock, address: (
        sock.sendto(bytes(60000), MORE, address),
        outcome(lambda: sock.sendto(bytes(60000), address)),
        sock.sendto(b"the next datagram", address),
    ),
    "a-piece-that-no-datagram-holds": lambda sock, address: (
        sock.sendto(b"mes", MORE, address),
        outcome(lambda: sock.sendto(bytes(70000), address)),
        outcome(lambda: sock.sendmsg([bytes(40000)] * 2, (), 0, address)),
        outcome(lambda: sock.sendto("text", address)),  # type: ignore[call-overload]
        sock.sendto(b"sage", address),
    ),
}
MISTAKES: dict[str, Operation] = {
    "send-text": lambda sock, _: sock.send("text"),  # type: ignore[arg-type]
    "send-none": lambda sock, _: sock.send(None),  # type: ignore[arg-type]
    "send-nothing-at-all": lambda sock, _: sock.send(),  # type: ignore[call-arg]
    "send-timeout": lambda sock, _: sock.send(b"message", timeout=5),  # type: ignore[call-arg]
    "send-flags-of-text": lambda sock, _: sock.send(b"message", "flags"),  # type: ignore[arg-type]
    "sendall-number": lambda sock, _: sock.sendall(5),  # type: ignore[arg-type]
    "sendto-text": lambda sock, address: sock.sendto("text", address),  # type: ignore[call-overload]
    "sendto-text-flags": lambda sock, address: sock.sendto("text", DONTWAIT, address),  # type: ignore[call-overload]
    "sendto-list": lambda sock, address: sock.sendto([1], address),  # type: ignore[call-overload]
    "sendto-nowhere": lambda sock, _: sock.sendto(b"message"),  # type: ignore[call-overload]
    "sendto-none": lambda sock, _: sock.sendto(b"message", None),  # type: ignore[call-overload]
    "sendto-flags-none": lambda sock, _: sock.sendto(b"message", 0, None),  # type: ignore[call-overload]
    "sendto-flags-dontwait-none": lambda sock, _: sock.sendto(b"message", DONTWAIT, None),  # type: ignore[call-overload]
    "sendto-flags-of-text": lambda sock, address: sock.sendto(b"m", "0", address),  # type: ignore[call-overload]
    "sendto-too-much": lambda sock, address: sock.sendto(b"m", 0, address, 0),  # type: ignore[call-overload]
    "sendto-bad-port": lambda sock, address: sock.sendto(b"message", (address[0], 70000)),
    "sendto-bad-address": lambda sock, _: sock.sendto(b"message", (1, 2)),
    "sendto-other-family": lambda sock, _: sock.sendto(b"message", "/a/path"),
    "sendmsg-number": lambda sock, _: sock.sendmsg(5),  # type: ignore[arg-type]
    "sendmsg-text": lambda sock, address: sock.sendmsg(["text"], (), 0, address),  # type: ignore[list-item]
    "sendmsg-bytes": lambda sock, address: sock.sendmsg(b"bytes", (), 0, address),  # type: ignore[arg-type]
    "sendmsg-ancillary-number": lambda sock, _: sock.sendmsg([b"m"], 5),  # type: ignore[arg-type]
    "sendmsg-ancillary-of-numbers": lambda sock, _: sock.sendmsg([b"m"], [5]),  # type: ignore[list-item]
    "sendmsg-ancillary-too-short": lambda sock, _: sock.sendmsg([b"m"], [(1, 2)]),  # type: ignore[list-item]
    "sendmsg-unknown-ancillary": lambda sock, address: sock.sendmsg(
        [b"m"], [(socket.IPPROTO_IP, 250, b"1234"), (socket.IPPROTO_IPV6, 250, b"1234")], 0, address
    ),
}


def wire(sock: socket.socket) -> list[bytes]:
    """Return every datagram that a plain socket has received."""
    payloads = []
    sock.settimeout(0)
    while True:
        try:
            payloads.append(sock.recv(70000))
        except BlockingIOError:
            return payloads


def compare(pair: Pair, operation: Operation, *, connected: bool) -> None:
    plain = pair.plain()
    expected_at, got_at = pair.plain(), pair.plain()
    for sock, to in ((plain, expected_at), (pair.app, got_at)):
        if connected:
            sock.connect(to.getsockname())
    expected = outcome(lambda: operation(plain, expected_at.getsockname()))
    assert outcome(lambda: operation(pair.app, got_at.getsockname())) == expected
    payloads = wire(expected_at)
    assert wire(got_at) == [MARKER + payload for payload in payloads]
    assert pair.endpoint.stats().markers_inserted == len(payloads)


@pytest.mark.parametrize("connected", [False, True], ids=["unconnected", "connected"])
@pytest.mark.parametrize("operation", ANYWHERE.values(), ids=ANYWHERE.keys())
def test_a_send_to_an_address_has_the_marker(pair: Pair, operation: Operation, connected: bool) -> None:
    compare(pair, operation, connected=connected)


@pytest.mark.parametrize("connected", [False, True], ids=["unconnected", "connected"])
@pytest.mark.parametrize("operation", CONNECTED.values(), ids=CONNECTED.keys())
def test_a_send_to_the_peer_has_the_marker(pair: Pair, operation: Operation, connected: bool) -> None:
    """Without a peer every send fails as on a plain socket."""
    compare(pair, operation, connected=connected)


@pytest.mark.parametrize("connected", [False, True], ids=["unconnected", "connected"])
@pytest.mark.parametrize("operation", MISTAKES.values(), ids=MISTAKES.keys())
def test_an_invalid_send_raises_as_on_a_plain_socket(
    pair: Pair, operation: Operation, connected: bool
) -> None:
    compare(pair, operation, connected=connected)


OBSERVED = {
    "fast": lambda sock, address: sock.sendto(b"message", address),
    "flags": lambda sock, address: sock.sendto(b"message", DONTWAIT, address),
}


@pytest.mark.parametrize("operation", OBSERVED.values(), ids=OBSERVED.keys())
def test_an_observer_of_sends_changes_nothing(pair: Pair, operation: Operation) -> None:
    destinations: list[Any] = []
    end = pair.endpoint.observe_sends(destinations.append)
    compare(pair, operation, connected=False)
    end()
    assert len(destinations) == 1


@pytest.mark.parametrize("operation", MISTAKES.values(), ids=MISTAKES.keys())
def test_an_observer_of_sends_hides_no_error(pair: Pair, operation: Operation) -> None:
    end = pair.endpoint.observe_sends(lambda destination: None)
    compare(pair, operation, connected=True)
    end()


class Summing(bytearray):
    """A bytes-like object with another meaning of +."""

    def __radd__(self, other: object) -> bytes:
        return b"not a concatenation"


def test_data_with_an_addition_operator_is_sent_as_bytes(pair: Pair) -> None:
    """The arrays of numpy define addition, and a plain socket sends them."""
    pair.app.sendto(Summing(b"message"), pair.peer.getsockname())
    assert pair.peer.recv(100) == MARKER + b"message"
    pair.app.connect(pair.peer.getsockname())
    pair.app.send(Summing(b"message"))
    assert pair.peer.recv(100) == MARKER + b"message"


def test_the_largest_message_leaves_room_for_the_marker(pair: Pair) -> None:
    largest = LARGEST_PAYLOAD[6 if pair.family == socket.AF_INET6 else 4]
    pair.peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    pair.app.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    address = pair.peer.getsockname()
    sends: list[Callable[[bytes], Any]] = [
        lambda data: pair.app.sendto(data, address),
        lambda data: pair.app.sendto(data, DONTWAIT, address),
        lambda data: pair.app.sendmsg([data[:5], data[5:]], (), 0, address),
    ]
    for send in sends:
        assert send(bytes(largest)) == largest
        assert pair.peer.recv(70000) == MARKER + bytes(largest)
        for size in (largest + 1, 65535, 65536, 70000):
            with pytest.raises(OSError, match="Message too long") as caught:
                send(bytes(size))
            assert caught.value.errno == errno.EMSGSIZE
    assert largest == (65523 if pair.family == socket.AF_INET6 else 65503)
    assert pair.endpoint.stats().markers_inserted == len(sends)
    assert wire(pair.peer) == []


@pytest.mark.parametrize("send", ["send", "sendto", "sendmsg", "keepalive"])
def test_a_first_send_binds_the_socket_and_attaches_it(pair: Pair, send: str) -> None:
    app = pair.plain(bound=False)
    endpoint = pair.switch_on(app)
    to = pair.peer.getsockname()
    operations: dict[str, Callable[[], Any]] = {
        "send": lambda: outcome(lambda: app.send(b"message")),
        "sendto": lambda: app.sendto(b"message", to),
        "sendmsg": lambda: app.sendmsg([b"message"], (), 0, to),
        "keepalive": lambda: endpoint.send_keepalive(to),
    }
    operations[send]()
    assert app.getsockname()[1]
    if send == "keepalive":
        assert pair.peer.recv(100) == b"\xff"
    elif send != "send":
        assert pair.peer.recv(100) == MARKER + b"message"
    address = (pair.host, app.getsockname()[1])
    pair.noise()
    for payload in (b"\1\2\3\4", b"", MARKER + b"answer"):
        pair.peer.sendto(payload, address)
    assert app.recvfrom(100) == (b"answer", pair.peer.getsockname())
    assert endpoint.mode == pair.endpoint.mode


def test_a_bind_by_another_object_is_found_by_the_first_send(pair: Pair) -> None:
    app = pair.plain(bound=False)
    endpoint = pair.switch_on(app)
    with socket.socket(fileno=app.fileno()) as alias:
        alias.bind((pair.host, 0))
        alias.detach()
    app.sendto(b"message", pair.peer.getsockname())
    assert pair.peer.recvfrom(100) == (MARKER + b"message", app.getsockname())
    assert endpoint.mode == pair.endpoint.mode


def test_the_first_sends_of_two_threads_both_succeed(pair: Pair) -> None:
    for _ in range(10):
        app = pair.plain(bound=False)
        pair.switch_on(app)
        waits = [in_thread(partial(app.sendto, b"message", pair.peer.getsockname())) for _ in range(3)]
        assert [wait() for wait in waits] == [7] * 3
        received = [pair.peer.recvfrom(100) for _ in range(3)]
        assert {payload for payload, _ in received} == {MARKER + b"message"}
        assert {source[1] for _, source in received} == {app.getsockname()[1]}
        app.close()


# --- ancillary data and options -------------------------------------------------------------------


@LINUX
def test_ancillary_data_goes_out_with_the_message(pair: Pair) -> None:
    v6 = pair.family == socket.AF_INET6
    level = socket.IPPROTO_IPV6 if v6 else socket.IPPROTO_IP
    pair.peer.setsockopt(level, socket.IPV6_RECVTCLASS if v6 else 13, 1)  # IP_RECVTOS
    tos = (level, socket.IPV6_TCLASS if v6 else socket.IP_TOS, struct.pack("=i", 0x48))
    assert pair.app.sendmsg([b"mes", b"sage"], [tos], 0, pair.peer.getsockname()) == 7
    data, ancillary, _, source = pair.peer.recvmsg(100, 100)
    assert (data, source) == (MARKER + b"message", pair.address)
    assert ancillary[0][2][0] == 0x48


@LINUX
def test_zerocopy_sends_the_buffer_itself(pair: Pair) -> None:
    pair.app.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
    message = bytearray(b"m" * 20000)
    address = pair.peer.getsockname()
    assert pair.app.sendto(message, MSG_ZEROCOPY, address) == len(message)
    assert pair.peer.recv(70000) == MARKER + message
    assert pair.app.sendmsg([message[:5], message[5:]], (), MSG_ZEROCOPY, address) == len(message)
    assert pair.peer.recv(70000) == MARKER + message
    # the error queue tells that the kernel has released the buffers 0 to 1
    notes: list[tuple[int, int]] = []

    def told() -> bool:
        note = outcome(lambda: pair.app.recvmsg(100, 200, socket.MSG_ERRQUEUE | DONTWAIT))
        if isinstance(note[0], bytes):
            notes.append(struct.unpack_from("=II", note[1][0][2], 8))
        return bool(notes) and notes[-1][1] == 1

    until(told)


REFUSED = {"cork": (socket.IPPROTO_UDP, UDP_CORK), "segment": (socket.IPPROTO_UDP, UDP_SEGMENT)}
refused_options = pytest.mark.parametrize("option", REFUSED.values(), ids=REFUSED.keys())


@LINUX
@refused_options
@pytest.mark.parametrize("value", [1, 500, struct.pack("=i", 1)], ids=["one", "more", "bytes"])
def test_options_that_join_or_split_datagrams_are_refused(
    pair: Pair, option: tuple[int, int], value: int | bytes
) -> None:
    with pytest.raises(NatCompatError, match="one by one") as caught:
        pair.app.setsockopt(*option, value)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert pair.app.getsockopt(*option) == 0


@LINUX
@refused_options
@pytest.mark.parametrize("value", [0, bytes(4)], ids=["zero", "bytes"])
def test_options_that_join_or_split_datagrams_may_be_cleared(
    pair: Pair, option: tuple[int, int], value: int | bytes
) -> None:
    pair.app.setsockopt(*option, value)
    assert pair.app.getsockopt(*option) == 0


@LINUX
@refused_options
def test_a_socket_with_such_an_option_is_refused(pair: Pair, option: tuple[int, int]) -> None:
    sock = pair.plain()
    sock.setsockopt(*option, 1)
    with pytest.raises(NatCompatError, match=r"UDP_(CORK|SEGMENT) excludes") as caught:
        pair.switch_on(sock)
    assert caught.value.errno == errno.EOPNOTSUPP
    assert type(sock) is socket.socket
    assert set_nat_t_endpoint(sock, False) is None
    assert sock.getsockopt(*option) == 1


@LINUX
def test_segmentation_by_ancillary_data_is_refused(pair: Pair) -> None:
    segment = (socket.IPPROTO_UDP, UDP_SEGMENT, struct.pack("=H", 100))
    with pytest.raises(NatCompatError, match="UDP_SEGMENT") as caught:
        pair.app.sendmsg([bytes(300)], [segment], 0, pair.peer.getsockname())
    assert caught.value.errno == errno.EOPNOTSUPP
    assert wire(pair.peer) == []


@LINUX
def test_options_set_by_the_backend_read_as_the_application_set_them(pair: Pair) -> None:
    gro, port = (socket.IPPROTO_UDP, UDP_GRO), (socket.SOL_SOCKET, socket.SO_REUSEPORT)
    assert pair.app.getsockopt(*port) == 0
    assert pair.app.getsockopt(*port, 4) == bytes(4)
    for value in (1, 0, True, struct.pack("=i", 1)):
        pair.app.setsockopt(*gro, value)
        expected = 1 if isinstance(value, bytes) else int(value)
        assert pair.app.getsockopt(*gro) == expected
        assert pair.app.getsockopt(*gro, 4) == struct.pack("=i", expected)
        assert pair.app.getsockopt(*gro, 2) == struct.pack("=i", expected)[:2]
    assert set_nat_t_endpoint(pair.app, False) is None
    assert pair.app.getsockopt(*gro) == 1
    assert pair.app.getsockopt(*port) == 0


OPTION_MISTAKES: dict[str, Callable[[socket.socket], Any]] = {
    "set-text": lambda sock: sock.setsockopt(17, UDP_GRO, "1"),  # type: ignore[call-overload]
    "set-float": lambda sock: sock.setsockopt(17, UDP_GRO, 1.5),  # type: ignore[call-overload]
    "set-nothing": lambda sock: sock.setsockopt(17, UDP_GRO),  # type: ignore[call-overload]
    "set-short": lambda sock: sock.setsockopt(17, UDP_GRO, b"1"),
    "set-none": lambda sock: sock.setsockopt(17, UDP_GRO, None, 2),
    "set-unknown": lambda sock: sock.setsockopt(17, 250, 1),
    "get-unknown": lambda sock: sock.getsockopt(17, 250),
    "get-negative": lambda sock: sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, -1),
    "get-huge": lambda sock: sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 5000),
    "get-zero": lambda sock: sock.getsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0),
}


@LINUX
@pytest.mark.parametrize("operation", OPTION_MISTAKES.values(), ids=OPTION_MISTAKES.keys())
def test_an_invalid_option_raises_as_on_a_plain_socket(
    pair: Pair, operation: Callable[[socket.socket], Any]
) -> None:
    assert outcome(lambda: operation(pair.app)) == outcome(lambda: operation(pair.plain()))


# --- connecting -----------------------------------------------------------------------------------

CONNECTS: dict[str, Operation] = {
    "connect": lambda sock, address: sock.connect(address),
    "connect_ex": lambda sock, address: sock.connect_ex(address),
    "connect-twice": lambda sock, address: (sock.connect_ex(address), sock.connect_ex(address)),
    "connect-nowhere": lambda sock, _: sock.connect(("a..b", 1)),
    "connect_ex-nowhere": lambda sock, _: sock.connect_ex(("a..b", 1)),
    "connect-text": lambda sock, _: sock.connect("text"),
    "connect_ex-text": lambda sock, _: sock.connect_ex("text"),
    "bind-again": lambda sock, _: sock.bind(sock.getsockname()),
    "bind-text": lambda sock, _: sock.bind("text"),
}


@pytest.mark.parametrize("operation", CONNECTS.values(), ids=CONNECTS.keys())
def test_connect_and_bind_do_what_they_do_on_a_plain_socket(pair: Pair, operation: Operation) -> None:
    plain = pair.plain()
    address = pair.peer.getsockname()
    expected = outcome(lambda: operation(plain, address))
    assert outcome(lambda: operation(pair.app, address)) == expected
    peers = [outcome(sock.getpeername) for sock in (plain, pair.app)]
    assert peers[0] == peers[1]
    pair.noise()
    pair.ike(b"still served")
    assert pair.app.recv(100) == b"still served"
    pair.app.sendto(b"message", address)
    assert pair.peer.recv(100) == MARKER + b"message"


def test_msg_more_ends_with_the_datagram(pair: Pair) -> None:
    pair.app.connect(pair.peer.getsockname())
    state = state_of(pair.app)
    assert state is not None
    pair.app.send(b"a", MORE)
    assert state.message_open == bool(MORE)
    pair.app.send(b"b")
    assert not state.message_open
