"""`DataPath`: the seam between the engine, which has the databases, and the code that carries packets."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol, TypeAlias

from natcompat.esp.engine.association import Address, Association, Inbound, Link, Outbound
from natcompat.esp.engine.databases import AssociationDatabase, PolicyDatabase, PolicyEntry
from natcompat.esp.engine.endpoints import LocalEndpoints
from natcompat.esp.engine.packet import Flow
from natcompat.esp.engine.results import Destination, Dropped, Opened, Packet, Reason
from natcompat.ipsec import SecurityAssociation

Sealed: TypeAlias = tuple[bytes, Destination]
"""An ESP packet and its destination."""


class DataPath(Protocol):
    """Carries packets by the databases, and keeps the state of SAs. Any thread may call it."""

    def inbound(self, sa: SecurityAssociation, link: Link, sequence: int) -> Inbound:
        """Return an SA that opens packets; all numbers up to `sequence` have been received."""
        ...

    def outbound(self, sa: SecurityAssociation, link: Link, sequence: int, permitted: int | None) -> Outbound:
        """Return an SA that seals packets, from the number after `sequence` on."""
        ...

    def open_burst(
        self, burst: Iterable[tuple[Packet, Address]], traffic_classes: Sequence[int] | None
    ) -> list[Opened | Dropped]:
        """Return the inner packet of each ESP packet of `burst`, or why there is none, in order."""
        ...

    def seal_burst(self, burst: Iterable[Packet]) -> list[Sealed | Dropped]:
        """Return the ESP packet for each inner packet of `burst`, or why there is none, in order."""
        ...

    def forget(self, changed: Association | None = None) -> None:
        """Forget what was derived from the databases, which have changed.

        `changed`: the SA that was added, moved or retired, if it was one.
        """
        ...

    def moved(self, association: Association) -> None:
        """Forget the destination of an SA whose peer has moved; its policies and flows are what they were."""
        ...

    def protect_endpoints(self, endpoints: LocalEndpoints) -> None:
        """Drop opened packets for the ports of `endpoints` from now on."""
        ...

    def hand_up_unprotected(self) -> None:
        """Return every packet that no policy protects from `seal_burst`, rather than drop it on the way."""
        ...

    def fault(self, kind: str, error: Exception) -> None:
        """Count and log an error that a packet caused."""
        ...

    def count(self, results: Iterable[object]) -> None:
        """Count the drops among `results`, made elsewhere."""
        ...

    def counters(self) -> Mapping[Reason, int]:
        """Return how many packets went no further, by reason."""
        ...


DataPathFactory: TypeAlias = Callable[
    [
        AssociationDatabase,
        PolicyDatabase,
        Callable[[Association], None],
        Callable[[PolicyEntry, Flow], bool],
    ],
    DataPath,
]
"""Takes the databases, what to call with an SA of which something is due, and with a policy without an SA."""


class Way(NamedTuple):
    """The decision about an outbound flow: its SA, its policy, and why packets are dropped without an SA."""

    association: Outbound | None
    entry: PolicyEntry | None
    dropped: Dropped


class Admission(NamedTuple):
    """The decision about an inbound flow that an SA brought: its policy, or the reason of the drop."""

    entry: PolicyEntry | None
    dropped: Dropped | None
