"""Keys in C: in memory that no core dump shows, wiped when their SA ends, useless in a forked child."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import pytest

from natcompat.esp.engine import EspEngine
from natcompat.ipsec import Direction
from tests.support.esp import native_providers, sa

pytestmark = pytest.mark.skipif(
    not native_providers(), reason="the C data path is not built: python ffi/build_datapath.py"
)


def undumped() -> int:
    """Return the bytes of this process's memory that core dumps leave out (VmFlags dd, proc(5))."""
    total = size = 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if match := re.match(r"Size: +(\d+) kB", line):
            size = int(match[1])
        elif line.startswith("VmFlags:") and " dd" in line:
            total += size * 1024
    return total


def engine() -> EspEngine:
    from natcompat.esp.datapath.native import NativeDataPath

    return EspEngine(timer=False, datapath=NativeDataPath)


def test_keys_are_in_no_core_dump() -> None:
    with engine() as ipsec:
        ipsec.add_sa(sa(Direction.IN))
        before = undumped()
        assert before > 0
        for number in range(1, 2000):
            ipsec.add_sa(sa(Direction.IN, spi=0x1000 + number, encryption_key=number.to_bytes(20)))
        assert undumped() - before > 2000 * 500, "GCM's tables alone have more than that"


def test_memory_is_used_again() -> None:
    """SAs that come and go take no more memory than those that are there at once."""
    with engine() as ipsec:
        for number in range(20):
            ipsec.add_sa(sa(Direction.IN, spi=0x1000 + number, encryption_key=number.to_bytes(20)))
        before = undumped()
        for number in range(5000):
            spi = 0x5000 + number
            ipsec.delete_sa(ipsec.add_sa(sa(Direction.IN, spi=spi, encryption_key=spi.to_bytes(20))))
        assert undumped() == before


def test_a_forked_child_is_another_process() -> None:
    """Whatever its number is: the stamp is in a page that is empty after fork."""
    from natcompat.esp.datapath import compiled

    lib: Any = compiled.lib
    mine = lib.esp_process_stamp()
    assert mine == lib.esp_process_stamp()
    readable, writable = os.pipe()
    child = os.fork()
    if not child:
        os.write(writable, f"{lib.esp_process_stamp()} {lib.esp_process_stamp()}".encode())
        os._exit(0)
    first, second = os.read(readable, 100).split()
    os.waitpid(child, 0)
    os.close(readable)
    os.close(writable)
    assert first == second != str(mine).encode()
    assert lib.esp_process_stamp() == mine
