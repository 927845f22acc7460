"""More ESP than this process can take costs ESP, and no IKE."""

from __future__ import annotations

import contextlib
import pickle
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from natcompat.esp import datapaths
from natcompat.esp.device import QueueDevice
from natcompat.esp.results import Reason
from tests.esp import flooder
from tests.esp.ends import question, two_ends
from tests.esp.making import INNER, ip_packet, native_providers, udp
from tests.linux_support import LINUX
from tests.pairs import in_thread, until

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
    assert set(counters) <= {Reason.REPLAYED, Reason.TOO_OLD, Reason.INTEGRITY, Reason.NO_SA, Reason.DEVICE}
    assert counters[Reason.INTEGRITY]
    assert counters[Reason.NO_SA]
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
