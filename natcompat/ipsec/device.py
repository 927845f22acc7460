"""`PacketDevice`: where ESP in this process takes inner packets from, and delivers them to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class PacketDevice(Protocol):
    """Where inner packets come from and go to. Methods may be called from any thread, and never wait."""

    mtu: int
    """Of the inner packets that it hands out and takes, in bytes."""

    def fileno(self) -> int:
        """Return a descriptor that is readable while `read_burst` has something; -1 after `close`."""
        ...

    def read_burst(self, most: int = 64) -> list[bytes]:
        """Return whole IP packets that are to be sealed, oldest first; none when there is none."""
        ...

    def write_burst(self, packets: Sequence[bytes]) -> int:
        """Take opened IP packets; return how many were taken. The rest is dropped, which the caller counts.

        Never raises for what is in a packet.
        """
        ...

    def close(self) -> None:
        """End it, and wake who waits on its descriptor. May be repeated."""
        ...
