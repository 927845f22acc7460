"""One installed SA, as the engine sees it: whichever data path keeps its state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final, TypeAlias

from natcompat.esp.engine.results import Destination, Dropped
from natcompat.ipsec import Direction, IPAddress, Mode, Policy, SecurityAssociation, UDPEncapsulation, Usage

SOFT, HARD, MOVED = 1, 2, 4
"""What may be due: the soft limit is reached, the hard one is, packets come from another address."""

UNLIMITED: Final = 1 << 64

Link: TypeAlias = tuple[Mode, int, IPAddress | None, IPAddress | None]
"""What ties an SA to policies: mode, reqid, outer addresses; inbound transport mode has none."""

Address: TypeAlias = tuple[Any, ...]
"""A socket address."""


def link_of(item: SecurityAssociation | Policy) -> Link:
    """Return what ties `item` to its counterparts.

    In transport mode policies do not name the outer addresses: they are those of the packet.
    """
    if item.mode is Mode.TUNNEL:
        return item.mode, item.reqid, item.source, item.destination
    if isinstance(item, SecurityAssociation) and item.direction is Direction.OUT:
        return item.mode, item.reqid, None, item.destination
    return item.mode, item.reqid, None, None


class Association(ABC):
    """What both directions have in common. Any thread may call it."""

    __slots__ = ("_link", "sa")

    sa: SecurityAssociation

    def __init__(self, sa: SecurityAssociation, link: Link) -> None:
        self.place(sa, link)

    @property
    def link(self) -> Link:
        """What ties this SA to policies, also when it has moved and they have not."""
        return self._link or link_of(self.sa)  # not kept: it weighs something

    @property
    def encapsulation(self) -> UDPEncapsulation:
        """The ports of this SA."""
        if self.sa.encapsulation is None:
            raise ValueError("encapsulation: this SA has none")
        return self.sa.encapsulation

    @property
    @abstractmethod
    def due(self) -> int:
        """What the engine should see to: SOFT, HARD, MOVED."""

    @property
    @abstractmethod
    def gone(self) -> bool:
        """Whether this SA is over."""

    @property
    @abstractmethod
    def soft(self) -> bool:
        """Whether it has reached a soft limit."""

    def place(self, sa: SecurityAssociation, link: Link) -> None:
        """Take the addresses and ports of `sa`, which is otherwise what it was."""
        self.sa = sa
        self._link = None if link == link_of(sa) else link

    @abstractmethod
    def expire(self, *, hard: bool) -> None:
        """Note that a limit is reached; at the hard one this SA is over."""

    @abstractmethod
    def take_due(self) -> tuple[int, Address]:
        """Return what is due and, with MOVED, the new (address, port); leave nothing."""

    @abstractmethod
    def retire(self) -> None:
        """End this SA."""

    @abstractmethod
    def usage(self) -> Usage:
        """Return the counters."""


class Inbound(Association):
    """An SA that opens packets."""

    __slots__ = ()

    @abstractmethod
    def open_run(
        self, run: Sequence[bytes], source: Address, traffic_class: int, now: float
    ) -> list[bytes | Dropped]:
        """Return the inner packets of `run`, of one at the least; who wants the others asks again.

        All have 8 bytes or more, and came from one source with one traffic class.
        """


class Outbound(Association):
    """An SA that seals packets."""

    __slots__ = ()

    @abstractmethod
    def draw_ivs(self, counter: Any) -> None:
        """Take IVs from what the data path made to count; called before the first packet."""

    @abstractmethod
    def permit(self, number: int) -> None:
        """Allow sequence numbers up to `number`; what is allowed already stays so."""

    @abstractmethod
    def seal_run(self, run: Sequence[bytes], now: float) -> list[tuple[bytes, Destination] | Dropped]:
        """Return the ESP packets for `run`, for one at the least; who wants the others asks again.

        `run` is one of those that `natcompat.esp.engine.packet.runs` cuts: IP packets whose lengths
        are right.
        """

    @abstractmethod
    def seal_dummy(self, length: int, now: float) -> tuple[bytes, Destination] | Dropped:
        """Return a dummy packet with `length` bytes of payload (RFC 4303, 2.6)."""

    def destination(self, traffic_class: int, dont_fragment: bool) -> Destination:
        """Return where packets with these outer fields go."""
        ports = self.encapsulation
        return Destination(
            str(self.sa.destination),
            ports.remote_port,
            local_port=ports.local_port,
            source=str(self.sa.source),
            traffic_class=traffic_class,
            dont_fragment=dont_fragment,
        )
