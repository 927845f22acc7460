"""The carrier in C: what becomes due, its counters, and its beginning and end."""

from __future__ import annotations

import errno
import gc
import os
import select
import threading
from typing import Any

import pytest

from natcompat import NatCompatError
from natcompat.esp.device.tun import TunDevice
from natcompat.esp.userspace import UserspaceIPsec
from natcompat.ipsec import (
    Expire,
)
from tests.support.linux import LINUX, ip, isolated
from tests.support.tunnels import IN_C, elsewhere, tunnel

pytestmark = LINUX


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
