"""The interface of an installed SA: `Inbound` opens packets, `Outbound` seals them, on either data path."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Final, NoReturn, SupportsIndex, TypeAlias

from natcompat.esp.engine.results import Destination, Dropped
from natcompat.ipsec import Direction, IPAddress, Mode, Policy, SecurityAssociation, Usage

SOFT, HARD, MOVED = 1, 2, 4
"""Bits of what is due: the soft limit is reached, the hard limit is reached, the peer has moved."""

UNLIMITED: Final = 1 << 64

Link: TypeAlias = tuple[Mode, int, IPAddress | None, IPAddress | None]
"""What ties an SA to policies: mode, reqid, outer addresses; inbound transport mode has none."""

Pair: TypeAlias = tuple[Mode, int, IPAddress, IPAddress, int, int]
"""What ties the SAs of both directions: mode, reqid, local and peer address, local and remote port (or 0).

As the owner installed the SA, not where the peer has moved since: what a peer claims chooses no pair.
"""

Address: TypeAlias = tuple[Any, ...]
"""A socket address."""


def link_of(item: SecurityAssociation | Policy) -> Link:
    """Return the link of an SA or a policy.

    In transport mode policies do not name the outer addresses: they are those of the packet.
    """
    if item.mode is Mode.TUNNEL:
        return item.mode, item.reqid, item.source, item.destination
    if isinstance(item, SecurityAssociation) and item.direction is Direction.OUT:
        return item.mode, item.reqid, None, item.destination
    return item.mode, item.reqid, None, None


def ports_of(sa: SecurityAssociation) -> tuple[int, int]:
    """Return local and remote port of the encapsulation; zeros for ESP without UDP."""
    ports = sa.encapsulation
    return (0, 0) if ports is None else (ports.local_port, ports.remote_port)


def pair_of(sa: SecurityAssociation) -> Pair:
    """Return the pair of an SA."""
    ends = (sa.source, sa.destination) if sa.direction is Direction.OUT else (sa.destination, sa.source)
    return sa.mode, sa.reqid, *ends, *ports_of(sa)


class Association(ABC):
    """An installed SA of either direction. Any thread may call it. It holds keys: no copies, no pickles."""

    __slots__ = ("_link", "_pair", "largest_number", "sa", "without_policies")

    sa: SecurityAssociation

    def __init__(self, sa: SecurityAssociation, link: Link) -> None:
        self.without_policies: bool = False
        """Whether packets may pass that no policy covers, as the owner asked."""
        self.largest_number: int = UNLIMITED
        """Outbound: the highest sequence number for which there is an IV."""
        self._pair: Pair | None = None
        self.place(sa, link)

    @property
    def link(self) -> Link:
        """The key that links this SA to policies; it stays when the SA moves and the policies do not."""
        return self._link or link_of(self.sa)  # not kept: there may be very many SAs

    @property
    def pair(self) -> Pair:
        """The key that links this SA to those of the other direction; it stays when the peer moves."""
        return self._pair or pair_of(self.sa)

    @property
    @abstractmethod
    def due(self) -> int:
        """Return what the engine has to act on: bits SOFT, HARD, MOVED."""

    @property
    @abstractmethod
    def gone(self) -> bool:
        """Whether this SA is over."""

    @property
    @abstractmethod
    def soft(self) -> bool:
        """Whether this SA has reached a soft limit."""

    @property
    @abstractmethod
    def moved(self) -> bool:
        """Whether the newest authentic packet came from another address than that of the SA."""

    def place(self, sa: SecurityAssociation, link: Link) -> None:
        """Take the addresses and ports of `sa`, which is otherwise equal to the SA so far."""
        self.sa = sa
        self._link = None if link == link_of(sa) else link

    def follow(self, sa: SecurityAssociation) -> None:
        """Take the addresses and ports to which the peer has moved. Link and pair stay as installed."""
        link, self._pair = self.link, self.pair
        self.place(sa, link)

    def settle(self) -> None:
        """Take the present addresses and ports as those that the owner installed."""
        self._pair = None

    @abstractmethod
    def expire(self, *, hard: bool) -> None:
        """Note that a limit is reached; at the hard limit this SA is over."""

    @abstractmethod
    def take_due(self) -> tuple[int, Address]:
        """Return the bits of `due`, and with MOVED the new (address, port); clear them."""

    @abstractmethod
    def retire(self) -> None:
        """End this SA, and wipe its keys as far as this data path can."""

    @abstractmethod
    def usage(self) -> Usage:
        """Return the counters."""

    def __reduce_ex__(self, _: SupportsIndex) -> NoReturn:
        raise TypeError("an installed SA is neither copied nor pickled: two would use one nonce")


class Inbound(Association):
    """An SA that opens packets."""

    __slots__ = ()

    @abstractmethod
    def open_run(
        self, run: Sequence[bytes], source: Address, traffic_class: int, now: float
    ) -> list[bytes | Dropped]:
        """Return the inner packets of the first of `run`, at least one; the caller asks again for the rest.

        All have 8 bytes or more, and came from one source with one traffic class.
        """


class Outbound(Association):
    """An SA that seals packets."""

    __slots__ = ()

    @abstractmethod
    def draw_ivs(self, first: int) -> None:
        """Count IVs from `first` on, modulo 2**64; called before the first packet."""

    @abstractmethod
    def permit(self, number: int) -> None:
        """Allow sequence numbers up to `number`; numbers that are allowed already stay so."""

    @abstractmethod
    def seal_run(self, run: Sequence[bytes], now: float) -> list[tuple[bytes, Destination] | Dropped]:
        """Return the ESP packets for the first of `run`, at least one; the caller asks again for the rest.

        `run` is one of those that `natcompat.esp.engine.packet.runs` cuts: IP packets whose lengths
        are right.
        """

    @abstractmethod
    def seal_dummy(self, length: int, now: float) -> tuple[bytes, Destination] | Dropped:
        """Return a dummy packet with `length` bytes of payload (RFC 4303, 2.6)."""

    def destination(self, traffic_class: int, dont_fragment: bool) -> Destination:
        """Return the destination of packets with these outer fields; port 0 for ESP without UDP."""
        local_port, remote_port = ports_of(self.sa)
        return Destination(
            str(self.sa.destination),
            remote_port,
            local_port=local_port,
            source=str(self.sa.source),
            traffic_class=traffic_class,
            dont_fragment=dont_fragment,
        )
