"""Listening to a kernel that waits for no listener: a full queue loses events."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Container, Iterator
from typing import NamedTuple, Self

from natcompat.ipsec import (
    Direction,
    Event,
    EventsLost,
    Expire,
    IPAddress,
    Lifetime,
    SaId,
    UDPEncapsulation,
    Usage,
)

RECEIVE_BUFFER = 4 << 20
"""Bytes of queue that are asked for: about 2000 acquires."""
_BURST = 256
"""Messages that one `read` takes at most, so that a flood of events does not keep it forever."""


class Known(NamedTuple):
    """The facts that natcompat keeps of an SA that it has installed."""

    reqid: int
    direction: Direction
    source: IPAddress | None = None
    encapsulation: UDPEncapsulation | None = None
    """For a kernel whose mapping changes do not name the SA; None with XFRM."""


class KernelEvents(ABC):
    """A socket of its own. One thread reads at a time."""

    def __init__(self, known: dict[SaId, Known], is_there: Callable[[SaId], bool]) -> None:
        """`known` are the SAs to be missed.

        `is_there` tells whether an SPI is reserved or in use, whatever an expiry of it says.
        """
        self._known = known
        self._is_there = is_there

    @abstractmethod
    def fileno(self) -> int:
        """Return the descriptor to wait on; it may be readable for messages that are no events."""

    @abstractmethod
    def close(self) -> None:
        """Stop listening."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def read(self) -> list[Event]:
        """Return what has happened since the last call, oldest first; never waits."""
        found: list[Event] = []
        lost = False
        for _ in range(_BURST):
            try:
                lost |= self._receive(found)
            except BlockingIOError:
                break
        if lost:
            found.append(EventsLost())
            found.extend(self._find_out())
        return found

    @abstractmethod
    def _receive(self, found: list[Event]) -> bool:
        """Add to `found` what is next, and tell whether events were lost. BlockingIOError: nothing is."""

    @abstractmethod
    def _find_out(self) -> Iterator[Event]:
        """Compare the SAs that are there with those that should be, after events may have been lost."""

    def _expired(self, sa_id: SaId, reqid: int, *, hard: bool) -> Iterator[Event]:
        # The kernel gives up its larval SA after a while; natcompat keeps the SPI reserved, and may
        # have completed the SA since.
        if not sa_id.spi or (hard and self._is_there(sa_id)):
            return
        known = self._known.get(sa_id)
        if hard:
            self._known.pop(sa_id, None)
        yield Expire(sa_id=sa_id, reqid=reqid or (known.reqid if known else 0), hard=hard)

    def _missing(self, present: Container[SaId]) -> Iterator[Event]:
        """Yield the expiries of the SAs that should be `present`, and are not."""
        for sa_id, known in list(self._known.items()):
            if sa_id not in present:
                self._known.pop(sa_id, None)
                yield Expire(sa_id=sa_id, reqid=known.reqid, hard=True)


def passed_soft_limit(lifetime: Lifetime, usage: Usage) -> bool:
    """Whether an SA with this `usage` is due for a rekey."""
    due = (
        (lifetime.soft_seconds, time.time() - usage.added),
        (lifetime.soft_bytes, usage.octets),
        (lifetime.soft_packets, usage.packets),
    )
    return any(limit is not None and used >= limit for limit, used in due)
