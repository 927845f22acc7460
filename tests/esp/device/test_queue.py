"""The packet devices without TUN: order, bounds, who is woken when, and from which threads."""

from __future__ import annotations

import asyncio
import gc
import os
import select
import sys
import threading
from collections.abc import Callable, Sequence

import pytest

from natcompat.esp.device import queue as device_module
from natcompat.esp.device.queue import CallbackDevice, PacketQueue, QueueDevice
from natcompat.ipsec.device import PacketDevice
from tests.support.esp import inner


def packets(count: int, start: int = 0) -> list[bytes]:
    return [inner(payload=b"%06d" % number) for number in range(start, start + count)]


def readable(what: PacketQueue | PacketDevice) -> bool:
    return bool(select.select([what], [], [], 0)[0])


@pytest.fixture(params=["eventfd", "socket pair"])
def signal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Either kind of descriptor, as far as this system has both."""
    if request.param == "socket pair":
        monkeypatch.delattr(os, "eventfd", raising=False)
    elif not hasattr(os, "eventfd"):
        pytest.skip("this system has no eventfd")


@pytest.fixture(params=[QueueDevice, lambda **keywords: CallbackDevice(lambda burst: None, **keywords)])
def make(request: pytest.FixtureRequest) -> Callable[..., QueueDevice | CallbackDevice]:
    """Either device."""
    function: Callable[..., QueueDevice | CallbackDevice] = request.param
    return function


def send(device: QueueDevice | CallbackDevice, burst: Sequence[bytes]) -> int:
    if isinstance(device, CallbackDevice):
        return device.send(burst)
    return sum(device.put(packet) for packet in burst)


def test_they_are_packet_devices(make: Callable[..., QueueDevice | CallbackDevice]) -> None:
    with make(mtu=1280) as made:
        device: PacketDevice = made
        assert device.mtu == 1280


@pytest.mark.usefixtures("signal")
def test_readable_while_there_is_something(make: Callable[..., QueueDevice | CallbackDevice]) -> None:
    with make() as device:
        assert not readable(device)
        assert device.read_burst() == []
        sent = packets(5)
        for _ in range(2):
            assert send(device, sent) == 5
            assert readable(device)
            assert device.read_burst(most=2) == sent[:2]
            assert readable(device)
            assert device.read_burst(most=3) == sent[2:]
            assert not readable(device)


def test_readable_for_what_came_before_somebody_asked(
    make: Callable[..., QueueDevice | CallbackDevice],
) -> None:
    with make() as device:
        send(device, packets(1))
        assert readable(device)


def test_a_full_queue_drops_and_counts(make: Callable[..., QueueDevice | CallbackDevice]) -> None:
    with make(limit=3) as device:
        sent = packets(5)
        assert send(device, sent) == 3
        assert device.outbound.drops == 2
        assert device.read_burst() == sent[:3]
        assert send(device, sent[3:]) == 2
        assert device.read_burst() == sent[3:]


def test_opened_packets_come_in_order_and_the_rest_is_dropped() -> None:
    with QueueDevice(limit=3) as device:
        opened = packets(5)
        assert device.write_burst(opened) == 3
        assert device.inbound.drops == 2
        assert device.get() == opened[0]
        assert device.receive() == opened[1:3]
        assert device.get(timeout=0) is None
        assert device.write_burst(opened[3:]) == 2
        assert [device.get(), device.get()] == opened[3:]


@pytest.mark.usefixtures("signal")
def test_opened_packets_can_be_waited_for_with_select() -> None:
    with QueueDevice() as device:
        assert not readable(device.inbound)
        device.write_burst(packets(2))
        assert readable(device.inbound)
        device.get()
        assert readable(device.inbound)
        device.get()
        assert not readable(device.inbound)


def test_a_thread_that_waits_gets_the_packet() -> None:
    got: list[bytes | None] = []
    with QueueDevice() as device:
        thread = threading.Thread(target=lambda: got.append(device.get(timeout=30)))
        thread.start()
        device.write_burst(packets(1))
        thread.join()
    assert got == packets(1)


def test_close_wakes_threads_that_wait_for_packets() -> None:
    got: list[bytes | None] = []
    device = QueueDevice()
    threads = [threading.Thread(target=lambda: got.append(device.get())) for _ in range(3)]
    for thread in threads:
        thread.start()
    device.close()
    for thread in threads:
        thread.join(30)
    assert got == [None] * 3


@pytest.mark.usefixtures("signal")
def test_close_wakes_threads_that_wait_for_the_descriptor() -> None:
    woken: list[tuple[list[int], list[bytes]]] = []
    device = QueueDevice()
    descriptor = device.fileno()
    waiting = threading.Event()

    def wait() -> None:
        waiting.set()
        ready = select.select([descriptor], [], [], 60)[0]
        woken.append((ready, device.read_burst()))

    thread = threading.Thread(target=wait)
    thread.start()
    waiting.wait()
    device.close()
    thread.join(30)
    assert woken == [([descriptor], [])]
    assert device.fileno() == -1, "who was woken has noticed"


def test_after_close_nothing_is_taken_and_the_rest_can_still_be_read(
    make: Callable[..., QueueDevice | CallbackDevice],
) -> None:
    device = make()
    device.fileno()
    sent = packets(3)
    send(device, sent)
    device.close()
    device.close()
    assert send(device, sent) == 0
    assert device.write_burst(sent) == 0
    assert readable(device)
    assert device.read_burst(most=2) == sent[:2]
    assert readable(device)
    assert device.read_burst() == sent[2:]
    assert device.fileno() == -1


def test_what_was_opened_can_be_read_after_close() -> None:
    device = QueueDevice()
    device.write_burst(packets(2))
    device.close()
    assert [device.get(), device.get(), device.get()] == [*packets(2), None]
    assert device.fileno() == -1, "none is made for what is closed"


@pytest.mark.usefixtures("signal")
def test_no_descriptor_is_left(make: Callable[..., QueueDevice | CallbackDevice]) -> None:
    def made() -> set[int]:
        device = make()
        descriptor = device.fileno()
        device.close()
        return {descriptor}

    (descriptor,) = made()
    gc.collect()
    with pytest.raises(OSError, match=r"."):
        os.fstat(descriptor)


def test_delivery_in_bursts() -> None:
    delivered: list[list[bytes]] = []
    with CallbackDevice(delivered.append) as device:
        assert device.write_burst(tuple(packets(3))) == 3
        assert device.write_burst([]) == 0
        assert device.write_burst(packets(2, start=3)) == 2
    assert delivered == [packets(3), packets(2, start=3)]


def test_what_the_callback_raises_goes_no_further(caplog: pytest.LogCaptureFixture) -> None:
    def deliver(burst: list[bytes]) -> None:
        raise RuntimeError(f"{len(burst)} too many")

    with CallbackDevice(deliver) as device:
        assert device.write_burst(packets(2)) == 0
        assert device.errors == 1
    assert "2 too many" in caplog.text


def test_what_is_no_packet_is_the_callers_mistake() -> None:
    with QueueDevice() as device:
        with pytest.raises(ValueError, match="65536 bytes"):
            device.put(bytes(65536))
        with pytest.raises(ValueError, match="limit"):
            QueueDevice(limit=0)


def test_a_buffer_that_changes_later_does_not_matter() -> None:
    with QueueDevice() as device:
        buffer = bytearray(packets(1)[0])
        device.put(buffer)
        buffer[:] = bytes(len(buffer))
        assert device.read_burst() == packets(1)


def test_many_threads_lose_and_double_nothing() -> None:
    writers, each = 4, 500
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    got: list[bytes] = []
    try:
        with QueueDevice(limit=writers * each) as device:

            def write(start: int) -> None:
                for packet in packets(each, start):
                    assert device.put(packet)

            threads = [threading.Thread(target=write, args=(number * each,)) for number in range(writers)]
            for thread in threads:
                thread.start()
            while len(got) < writers * each:
                assert select.select([device], [], [], 30)[0], "packets wait and nobody says so"
                got += device.read_burst(most=7)
            for thread in threads:
                thread.join()
            assert not readable(device)
    finally:
        sys.setswitchinterval(interval)
    assert sorted(got) == packets(writers * each)
    for number in range(writers):
        mine = [p for p in got if number * each <= int(p[-6:]) < (number + 1) * each]
        assert mine == sorted(mine), "those of one thread stay in order"


def test_the_default_fits_ethernet() -> None:
    assert device_module.DEFAULT_MTU == QueueDevice().mtu == 1400


def test_a_callback_runs_in_its_event_loop() -> None:
    async def deliver_two_bursts() -> None:
        here, loop = threading.get_ident(), asyncio.get_running_loop()
        delivered: list[bytes] = []
        threads: set[int] = set()
        ready = asyncio.Event()

        def deliver(packets: list[bytes]) -> None:
            threads.add(threading.get_ident())
            delivered.extend(packets)
            if len(delivered) == 4:
                ready.set()
                raise ValueError("the program's fault")

        with CallbackDevice(deliver, limit=4, loop=loop) as device:
            assert await asyncio.to_thread(device.write_burst, [b"1", b"2"]) == 2
            assert await asyncio.to_thread(device.write_burst, [b"3", b"4"]) == 2
            await ready.wait()
            await asyncio.sleep(0)
            assert (delivered, threads, device.errors) == ([b"1", b"2", b"3", b"4"], {here}, 1)

            taken = device.write_burst([b"%d" % number for number in range(9)])
            assert taken == 4, "the loop is busy: what is too much is dropped"
        await asyncio.sleep(0)
        assert len(delivered) == 4, "nothing is delivered after close"
        assert device.write_burst([b"5"]) == 0

    asyncio.run(deliver_two_bursts())


def test_a_callback_whose_loop_is_closed_takes_nothing() -> None:
    loop = asyncio.new_event_loop()
    with CallbackDevice(lambda burst: None, loop=loop) as device:
        loop.close()
        assert device.write_burst([b"1"]) == 0
