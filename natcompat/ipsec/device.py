"""`PacketDevice`: where ESP in this process takes inner packets from, and delivers them to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from natcompat.ipsec.associations import SecurityAssociation


class PacketDevice(Protocol):
    """Takes and delivers inner packets. Methods may be called from any thread, and never wait."""

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


@runtime_checkable
class SaDevice(Protocol):
    """Optional part of a `PacketDevice` that wants to know which SA brought a packet.

    Two clients behind one NAT may have the same inner addresses (RFC 3948, 5.2): the SA tells them apart.
    """

    def deliver(self, packet: bytes, sa: SecurityAssociation) -> bool:
        """Take one opened IP packet and the SA that brought it, in the place of `write_burst`.

        Returns False if the packet was dropped, which the caller counts. Never waits, never raises.
        """
        ...
