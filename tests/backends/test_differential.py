"""Random and edge-case datagrams on real sockets against the contract, in both directions.

Some thousands by default; ``NATCOMPAT_DATAGRAMS=100000`` or ``make conformance`` for the full count.
What is expected is worked out here from RFC 3948's sentences, not by the classifier under test.
"""

from __future__ import annotations

import errno
import os
import random
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any, Final

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from natcompat.contract import LARGEST_PAYLOAD, TABLE, Duty, Performer, Row, Verdict, classify
from natcompat.endpoint.endpoint import NatTEndpoint
from natcompat.testing.harness import PATIENCE, RECEIVES, SENDS, Bench, EndpointHarness, Service
from tests.backends.test_conformance import OURS

DATAGRAMS: Final = int(os.environ.get("NATCOMPAT_DATAGRAMS", "4000"))
BATCH: Final = 50
_EACH_WAY: Final = 2
_UNCONNECTED: Final = sorted(name for name in SENDS if name.startswith(("sendto", "sendmsg")))
_QUEUE_ROOM: Final = 200_000  # bytes of the kernel's memory that are in flight at most

# --- what is sent ---------------------------------------------------------------------------------

_EDGES: Final = sorted(
    {
        near
        for size in (4, 8, 9, 20, 28, 46, 512, 1024, 1280, 1400, 1472, 1500, 2048, 4096, 9000, 16384, 32768)
        for near in (size - 1, size, size + 1)
    }
    | {65499, 65502, 65503}
)


@st.composite
def _filled(draw: st.DrawFn) -> bytes:
    """A few drawn bytes and a filler, so that size costs no entropy: sizes around edges."""
    head = draw(st.binary(max_size=12))
    size = draw(st.sampled_from(_EDGES) | st.integers(0, 1600))
    filler = random.Random(size ^ len(head)).randbytes(size)
    return (head + filler)[:size]


_flipped = st.builds(
    lambda bit, rest: (1 << bit).to_bytes(4, "big") + rest, st.integers(0, 31), st.binary(max_size=40)
)
_zeros = st.builds(lambda count, rest: bytes(count) + rest, st.integers(0, 12), st.binary(max_size=12))
_led = st.builds(lambda rest: bytes(4) + rest, _filled()).map(lambda payload: payload[:65507])

payloads = st.one_of(
    st.binary(max_size=8),
    st.integers(0, 8).map(lambda count: b"\xff" * count),
    _zeros,
    _flipped,
    _filled(),
    _led,
    st.sampled_from([row.payload for row in TABLE]),
)
messages = payloads | st.sampled_from([65503, 65504, 65505, 65507]).map(bytes)
batches = st.lists(payloads, min_size=BATCH, max_size=BATCH)
outgoing_batches = st.lists(messages, min_size=BATCH, max_size=BATCH)


# --- what the contract says of it -------------------------------------------------------------------


def verdict_by_the_rfc(payload: bytes) -> Verdict:
    """RFC 3948, 2.1 to 2.3, and the sentence of udp(4P) on what is too short to be anything."""
    if payload == b"\xff":
        return Verdict.KEEPALIVE
    if len(payload) < 4:
        return Verdict.RUNT
    return Verdict.IKE if not any(payload[:4]) else Verdict.ESP


@given(payloads | st.binary())
def test_classify_agrees_with_the_rfc(payload: bytes) -> None:
    expected = verdict_by_the_rfc(payload)
    assert classify(payload) is expected
    assert classify(bytearray(payload)) is expected
    assert classify(memoryview(payload)) is expected


@pytest.mark.parametrize("row", TABLE, ids=[row.name for row in TABLE])
def test_the_table_agrees_with_the_rfc(row: Row) -> None:
    assert row.verdict is verdict_by_the_rfc(row.payload)
    assert row.delivered == (row.payload[4:] if row.verdict is Verdict.IKE else None)


# --- through sockets --------------------------------------------------------------------------------


def chunks(batch: list[bytes]) -> Iterator[list[bytes]]:
    """Cut `batch` into pieces that fit the queues, whose room the kernel counts by what it allocates."""
    chunk: list[bytes] = []
    room = _QUEUE_ROOM
    for payload in batch:
        cost = (1 << (len(payload) + 512).bit_length()) + 1024
        if chunk and cost > room:
            yield chunk
            chunk, room = [], _QUEUE_ROOM
        chunk.append(payload)
        room -= cost
    yield chunk


def counted(endpoint: NatTEndpoint) -> dict[Verdict | str, int]:
    stats = endpoint.stats()
    return {
        Verdict.IKE: stats.ike,
        Verdict.ESP: stats.esp,
        Verdict.KEEPALIVE: stats.keepalives,
        Verdict.RUNT: stats.runts,
        "dropped in kernel": stats.dropped_in_kernel or 0,
        "markers": stats.markers_inserted,
        "lost or failed": stats.errors + stats.handed_back + (stats.esp_dropped_in_kernel or 0),
    }


def check_counters(endpoint: NatTEndpoint, batch: list[bytes], before: dict[Verdict | str, int]) -> None:
    """Every datagram of `batch`, and one message per chunk, is in exactly one counter."""
    lost = [verdict for verdict in Verdict if verdict is not Verdict.IKE]
    expected = dict.fromkeys(Verdict, 0)
    for payload in batch:
        expected[verdict_by_the_rfc(payload)] += 1
    deadline = time.monotonic() + PATIENCE
    while True:
        grown = {name: count - before[name] for name, count in counted(endpoint).items()}
        # the thread that ESP is steered to counts, too, and may be behind
        behind = any(grown[verdict] < expected[verdict] for verdict in lost)
        if endpoint.mode != "steering" or not behind or time.monotonic() > deadline:
            break
        time.sleep(0.001)
    assert grown["lost or failed"] == 0, grown
    assert grown[Verdict.IKE] == expected[Verdict.IKE] + len(list(chunks(batch)))
    performers = {endpoint.duties[Duty.DROP_RUNTS], endpoint.duties[Duty.DIVERT_ESP]}
    if Performer.KERNEL in performers:  # it takes keepalives and ESP without telling
        assert grown["dropped in kernel"] <= sum(expected[verdict] for verdict in lost)
    elif Performer.FILTER in performers:  # it counts in one number what it drops
        uncounted = sum(expected[verdict] - grown[verdict] for verdict in lost)
        assert grown["dropped in kernel"] == uncounted
    else:
        assert {verdict: grown[verdict] for verdict in lost} == {
            verdict: expected[verdict] for verdict in lost
        }
        assert grown["dropped in kernel"] == 0


def receive_chunk(bench: Bench, chunk: list[bytes], receive: Callable[[socket.socket], bytes]) -> None:
    """Send `chunk` to the application: IKE in order with its content, ESP likewise, nothing else."""
    bench.send(*chunk)
    received = bench.delivered(receive)
    assert received == [payload[4:] for payload in chunk if verdict_by_the_rfc(payload) is Verdict.IKE]
    if bench.service.consumed:
        esp = [payload for payload in chunk if verdict_by_the_rfc(payload) is Verdict.ESP]
        source = bench.peer.getsockname()
        assert bench.esp.wait_for(len(esp)) == [(payload, source) for payload in esp]
        bench.esp.packets.clear()


def send_message(bench: Bench, message: bytes, send: Callable[[socket.socket, bytes, Any], object]) -> bool:
    """Send `message`; True if it went, and False if it is too long and was refused."""
    largest = LARGEST_PAYLOAD[6 if bench.sock.family == socket.AF_INET6 else 4]
    if len(message) <= largest:
        send(bench.sock, message, bench.peer.getsockname())
        return True
    with pytest.raises(OSError) as refused:  # noqa: PT011 - the errno is what matters
        send(bench.sock, message, bench.peer.getsockname())
    assert refused.value.errno == errno.EMSGSIZE
    return False


def start_afresh(bench: Bench) -> None:
    """Take what a failed example left behind, so that a smaller one starts with empty queues."""
    for sock in (bench.sock, bench.peer):
        sock.setblocking(False)
        try:
            while True:
                sock.recv(1)
        except BlockingIOError:
            sock.settimeout(5)
    bench.esp.packets.clear()


compared: list[int] = []


@pytest.fixture(scope="module", autouse=True)
def report() -> Iterator[None]:
    """Say at the end how many datagrams it were; ``pytest -s`` shows it."""
    begun = time.monotonic()
    yield
    seconds = time.monotonic() - begun
    print(f"\n{sum(compared)} datagrams compared with the contract in {seconds:.0f} s")


class TestDifferential(EndpointHarness):
    backends = OURS

    def examples(self) -> settings:
        """Return as many examples as fall to one of the tests."""
        tests = _EACH_WAY * len(self.families) * len(self.services())
        return settings(
            max_examples=max(1, -(-DATAGRAMS // (tests * BATCH))),
            deadline=None,
            suppress_health_check=list(HealthCheck),
            print_blob=True,
        )

    def test_inbound(self, service: Service, family: int) -> None:
        with self.bench(service, family) as bench:
            bench.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            endpoint = bench.switch_on()

            @self.examples()
            @given(batches, st.sampled_from(sorted(RECEIVES)))
            def compare(batch: list[bytes], receive: str) -> None:
                start_afresh(bench)
                before = counted(endpoint)
                for chunk in chunks(batch):
                    receive_chunk(bench, chunk, RECEIVES[receive])
                check_counters(endpoint, batch, before)
                compared.append(len(batch))

            compare()

    def test_outbound(self, service: Service, family: int) -> None:
        with self.bench(service, family) as bench:
            bench.peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
            endpoint = bench.switch_on()

            @self.examples()
            @given(outgoing_batches, st.sampled_from(_UNCONNECTED))
            def compare(batch: list[bytes], send: str) -> None:
                start_afresh(bench)
                before = counted(endpoint)["markers"]
                went = []
                for chunk in chunks(batch):
                    sent = [message for message in chunk if send_message(bench, message, SENDS[send])]
                    assert [bench.peer.recv(65535) for _ in sent] == [bytes(4) + message for message in sent]
                    went += sent
                assert counted(endpoint)["markers"] - before == len(went)
                compared.append(len(batch))

            compare()
