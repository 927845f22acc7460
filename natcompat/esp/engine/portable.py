"""The portable data path: bursts of packets in, bursts of packets or reasons out.

`DataPath` is the seam. The engine keeps the databases and the rules; a path only carries packets by
them. This one is pure Python on `cryptography`, and the reference for any other.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import ip_address
from itertools import count, groupby, repeat
from typing import Any, Final, NamedTuple, Protocol, TypeAlias

from natcompat.esp.engine.association import Address, Association, Inbound, Link, Outbound
from natcompat.esp.engine.crypto import HEADER_LENGTH
from natcompat.esp.engine.databases import AssociationDatabase, PolicyDatabase, PolicyEntry, allows
from natcompat.esp.engine.packet import LONGEST_RUN, Flow, FlowKey, expand, runs
from natcompat.esp.engine.portable_inbound import PortableInbound
from natcompat.esp.engine.portable_outbound import PortableOutbound
from natcompat.esp.engine.results import DROPPED, Destination, Dropped, Opened, Packet, Reason
from natcompat.ipsec import Action, Direction, SecurityAssociation

MOST_FLOWS: Final = 16384
"""Flows whose way is remembered; more, and it is found again."""

_new = tuple.__new__
"""Makes named tuples without their constructor, which takes twice as long."""

Sealed: TypeAlias = tuple[bytes, Destination]


class DataPath(Protocol):
    """What carries packets, and keeps the state of SAs. Any thread may call it."""

    def inbound(self, sa: SecurityAssociation, link: Link, sequence: int) -> Inbound:
        """Return an SA that opens packets; all numbers up to `sequence` have been received."""
        ...

    def outbound(self, sa: SecurityAssociation, link: Link, sequence: int, permitted: int | None) -> Outbound:
        """Return an SA that seals packets, from the number after `sequence` on."""
        ...

    def counter(self, start: int) -> Any:
        """Return what counts IVs from `start` on, modulo 2**64, for `Outbound.draw_ivs`."""
        ...

    def open_burst(
        self, burst: Iterable[tuple[Packet, Address]], traffic_classes: Sequence[int] | None
    ) -> list[Opened | Dropped]:
        """Return what each ESP packet of `burst` holds, in order."""
        ...

    def seal_burst(self, burst: Iterable[Packet]) -> list[Sealed | Dropped]:
        """Return the ESP packet for each inner packet of `burst`, in order."""
        ...

    def forget(self, changed: Association | None = None) -> None:
        """The databases have changed: what was derived from them is void.

        `changed`: which SA it was that was added, moved or retired, if it was one.
        """
        ...

    def hand_up_unprotected(self) -> None:
        """Return every packet that no policy protects from `seal_burst`, rather than drop it on the way."""
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
"""The databases; what is called with an SA of which something is due, and for packets without an SA."""


class Way(NamedTuple):
    """What becomes of the packets of an outbound flow."""

    association: Outbound | None
    entry: PolicyEntry | None
    dropped: Dropped


_ATTEMPTS: Final = 8
"""How often a packet looks for its SA while that is moved or replaced."""


class PortableDataPath:
    """A `DataPath` that works everywhere."""

    def __init__(
        self,
        associations: AssociationDatabase,
        policies: PolicyDatabase,
        report: Callable[[Association], None],
        acquire: Callable[[PolicyEntry, Flow], bool],
    ) -> None:
        self._associations = associations
        self._policies = policies
        self._report = report
        self._acquire = acquire
        self._drops: Counter[Reason] = Counter()
        self._lock = threading.Lock()
        self.forget()

    def inbound(self, sa: SecurityAssociation, link: Link, sequence: int) -> Inbound:
        """Return an SA that opens packets."""
        return PortableInbound(sa, link, sequence)

    def outbound(self, sa: SecurityAssociation, link: Link, sequence: int, permitted: int | None) -> Outbound:
        """Return an SA that seals packets."""
        return PortableOutbound(sa, link, sequence, permitted)

    def counter(self, start: int) -> Any:
        """Return an iterator without an end; no two threads get the same number from it."""
        return count(start)

    def forget(self, changed: Association | None = None) -> None:
        """Find the ways of all flows again. Who is finding one now keeps it to himself."""
        self._admitted: dict[FlowKey, tuple[Inbound, PolicyEntry | None]] = {}
        self._ways: dict[FlowKey, Way] = {}

    def hand_up_unprotected(self) -> None:
        """Do nothing: this path returns what becomes of every packet."""

    def counters(self) -> Mapping[Reason, int]:
        """Return how many packets went no further, by reason."""
        with self._lock:
            return dict(self._drops)

    def count(self, results: Iterable[object]) -> None:
        """Count the drops among `results`."""
        dropped = [each.reason for each in results if isinstance(each, Dropped)]
        if dropped:
            with self._lock:
                self._drops.update(dropped)

    def open_burst(
        self, burst: Iterable[tuple[Packet, Address]], traffic_classes: Sequence[int] | None = None
    ) -> list[Opened | Dropped]:
        """Return what each ESP packet of `burst` holds, in order."""
        now = time.time()
        results: list[Opened | Dropped] = []
        run: list[bytes] = []
        spi, origin, outer = b"", (), 0
        classes: Iterable[int] = repeat(0) if traffic_classes is None else traffic_classes
        for (each, source), traffic_class in zip(burst, classes, strict=traffic_classes is not None):
            packet = each if isinstance(each, bytes) else bytes(each)
            short = len(packet) < HEADER_LENGTH
            other = short or packet[:4] != spi or source != origin or traffic_class != outer
            if other or len(run) == LONGEST_RUN:
                self._open_run(run, origin, outer, now, results)
                run = []
                if short:
                    results.append(DROPPED[Reason.SHORT])
                    continue
                spi, origin, outer = packet[:4], source, traffic_class
            run.append(packet)
        self._open_run(run, origin, outer, now, results)
        self.count(results)
        return results

    def _open_run(
        self, run: list[bytes], source: Address, traffic_class: int, now: float, to: list[Opened | Dropped]
    ) -> None:
        """Open packets with one SPI, from one source, with one traffic class."""
        while run:
            found = self._associations.inbound.get(int.from_bytes(run[0][:4]))
            if found is None:
                to += [DROPPED[Reason.NO_SA]] * len(run)
                return
            association = found[0] if len(found) == 1 else _choose(found, source)
            opened = association.open_run(run, source, traffic_class, now)
            sa = association.sa  # as it brought them, wherever it moves now
            if association.due:
                self._report(association)
            for kind, results in groupby(opened, type):
                if kind is Dropped:
                    to.extend(results)  # type: ignore[arg-type]
                    continue
                for key, inner in runs(results):  # type: ignore[arg-type]
                    dropped = self._enter(association, key, now)
                    if dropped is None:
                        to += [_new(Opened, (each, sa)) for each in inner]
                    else:
                        to += [dropped] * len(inner)
            run = run[len(opened) :]

    def _enter(self, association: Inbound, key: FlowKey | None, now: float) -> Dropped | None:
        """Return why a flow that `association` brought may not enter."""
        if key is None:
            return DROPPED[Reason.MALFORMED]
        admitted: tuple[Inbound, PolicyEntry | None] | None = self._admitted.get(key)
        if admitted is None or admitted[0] is not association:
            admitted = self._admit(association, key)
            if admitted is None:
                return DROPPED[Reason.SELECTOR]
        if admitted[1] is not None:
            admitted[1].last_used = now
        return None

    def _admit(self, association: Inbound, key: FlowKey) -> tuple[Inbound, PolicyEntry | None] | None:
        """Return the SA and the policy that let the flow in, or None: it came by the wrong SA."""
        admitted = self._admitted
        found = self._admission(association, expand(key))
        if found is not None:
            if len(admitted) >= MOST_FLOWS:
                admitted.clear()
            admitted[key] = found
        return found

    def _admission(self, association: Inbound, flow: Flow) -> tuple[Inbound, PolicyEntry | None] | None:
        if association.sa.selectors:
            return (association, None) if allows(association.sa.selectors, flow) else None
        entry = self._policies.look_up(Direction.IN, flow)
        if entry is None or entry.policy.action is not Action.PROTECT or entry.link != association.link:
            return None
        return association, entry

    def seal_burst(self, burst: Iterable[Packet]) -> list[Sealed | Dropped]:
        """Return the ESP packet for each inner packet of `burst`, in order."""
        now = time.time()
        results: list[Sealed | Dropped] = []
        for key, run in runs(burst):
            while run:
                sealed = self._seal_run(key, run, now)
                results += sealed
                run = run[len(sealed) :]
        self.count(results)
        return results

    def _seal_run(self, key: FlowKey | None, run: list[bytes], now: float) -> list[Sealed | Dropped]:
        """Seal packets of one flow, one at the least."""
        if key is None:
            return [DROPPED[Reason.MALFORMED]] * len(run)
        for _ in range(_ATTEMPTS):
            association, entry, dropped = self._ways.get(key) or self._find_way(key)
            if entry is not None:
                entry.last_used = now
            if association is None:
                if dropped.reason is Reason.ACQUIRE and entry is not None:
                    if self._acquire(entry, expand(key)):
                        self.forget()
                        continue
                    dropped = DROPPED[Reason.BYPASS if entry.policy.optional else Reason.ACQUIRE]
                return [dropped] * len(run)
            sealed = association.seal_run(run, now)
            if association.due:
                self._report(association)
            if sealed[0] is not DROPPED[Reason.NO_SA]:
                return sealed
            self.forget()  # the SA ended while we held it
        return [DROPPED[Reason.ACQUIRE]]

    def _find_way(self, key: FlowKey) -> Way:
        ways = self._ways
        way = self._way(expand(key))
        if len(ways) >= MOST_FLOWS:
            ways.clear()
        ways[key] = way
        return way

    def _way(self, flow: Flow) -> Way:
        entry = self._policies.look_up(Direction.OUT, flow)
        if entry is None:
            return Way(None, None, DROPPED[Reason.NO_POLICY])
        policy = entry.policy
        if policy.action is Action.DISCARD:
            return Way(None, entry, DROPPED[Reason.DISCARD])
        if policy.action is Action.BYPASS:
            return Way(None, entry, DROPPED[Reason.BYPASS])
        return Way(self._associations.outbound_for(entry, flow), entry, DROPPED[Reason.ACQUIRE])


def _choose(found: tuple[Inbound, ...], source: Address) -> Inbound:
    """Return the SA that the peer at `source` means, of several with one SPI and other destinations."""
    try:
        address = ip_address(str(source[0]).partition("%")[0])
    except (ValueError, IndexError):
        return found[0]
    address = getattr(address, "ipv4_mapped", None) or address
    return next((each for each in found if each.sa.source == address), found[0])
