"""The portable data path: pure Python on `cryptography`, and the reference for the path in C."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import ip_address
from itertools import groupby, repeat
from typing import Final

from natcompat.esp.engine import process
from natcompat.esp.engine.association import Address, Association, Inbound, Link, Outbound
from natcompat.esp.engine.crypto import HEADER_LENGTH
from natcompat.esp.engine.data_path import Admission, Sealed, Way
from natcompat.esp.engine.databases import AssociationDatabase, PolicyDatabase, PolicyEntry, allows
from natcompat.esp.engine.endpoints import LocalEndpoints
from natcompat.esp.engine.faults import FAULTS
from natcompat.esp.engine.flows import FlowMemory
from natcompat.esp.engine.packet import LONGEST_RUN, Flow, FlowKey, expand, runs
from natcompat.esp.engine.portable_inbound import PortableInbound
from natcompat.esp.engine.portable_outbound import PortableOutbound
from natcompat.esp.engine.results import DROPPED, Dropped, Opened, Packet, Reason
from natcompat.ipsec import Action, Direction, SecurityAssociation

_new = tuple.__new__
"""Makes named tuples without their constructor, which takes twice as long."""

_ATTEMPTS: Final = 8
"""How often the SA of a packet is looked up while SAs are moved or replaced."""


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
        self._process = process.identity()
        self._endpoints = LocalEndpoints()
        self.forget()

    def inbound(self, sa: SecurityAssociation, link: Link, sequence: int) -> Inbound:
        """Return an SA that opens packets."""
        return PortableInbound(sa, link, sequence)

    def outbound(self, sa: SecurityAssociation, link: Link, sequence: int, permitted: int | None) -> Outbound:
        """Return an SA that seals packets."""
        return PortableOutbound(sa, link, sequence, permitted)

    def forget(self, changed: Association | None = None) -> None:
        """Forget all decisions. A thread that is deciding now puts its decision into the old memory."""
        self._admitted: FlowMemory[tuple[Inbound, FlowKey], Admission] = FlowMemory()
        self._ways: FlowMemory[FlowKey, Way] = FlowMemory()

    def moved(self, association: Association) -> None:
        """Do nothing: an SA knows its destination, and the decisions about flows are what they were."""

    def protect_endpoints(self, endpoints: LocalEndpoints) -> None:
        """Drop opened packets for the ports of `endpoints` from now on."""
        self._endpoints = endpoints
        self.forget()

    def fault(self, kind: str, error: Exception) -> None:
        """Count and log an error that a packet caused."""
        self.count((DROPPED[Reason.FAULT],))
        FAULTS.note(kind, type(error).__name__, error=error)

    def hand_up_unprotected(self) -> None:
        """Do nothing: this path returns what becomes of every packet."""

    def counters(self) -> Mapping[Reason, int]:
        """Return how many packets went no further, by reason."""
        with self._lock:
            return dict(self._drops)

    def count(self, results: Iterable[object]) -> None:
        """Count the drops among `results`."""
        dropped = [result.reason for result in results if isinstance(result, Dropped)]
        if dropped:
            with self._lock:
                self._drops.update(dropped)

    def open_burst(
        self, burst: Iterable[tuple[Packet, Address]], traffic_classes: Sequence[int] | None = None
    ) -> list[Opened | Dropped]:
        """Return the inner packet of each ESP packet of `burst`, or why there is none, in order."""
        now = time.time()
        results: list[Opened | Dropped] = []
        run: list[bytes] = []
        spi, origin, outer = b"", (), 0
        classes: Iterable[int] = repeat(0) if traffic_classes is None else traffic_classes
        for (item, source), traffic_class in zip(burst, classes, strict=traffic_classes is not None):
            packet = item if isinstance(item, bytes) else bytes(item)
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
            start = len(to)
            try:
                run = run[self._open_some(run, source, traffic_class, now, to) :]
            except Exception as error:  # noqa: BLE001 - one bad packet costs one packet
                FAULTS.note("opening an ESP packet failed", type(error).__name__, error=error)
                del to[start:]
                to.append(DROPPED[Reason.FAULT])
                run = run[1:]

    def _open_some(
        self, run: list[bytes], source: Address, traffic_class: int, now: float, to: list[Opened | Dropped]
    ) -> int:
        """Open the first packets of `run`, and return how many."""
        candidates = self._associations.inbound.get(int.from_bytes(run[0][:4]))
        if candidates is None:
            to += [DROPPED[Reason.NO_SA]] * len(run)
            return len(run)
        association = candidates[0] if len(candidates) == 1 else _choose(candidates, source)
        opened = association.open_run(run, source, traffic_class & 0xFF, now)
        sa = association.sa  # as it brought them, wherever it moves now
        if association.due:
            self._report_due(association)
        for kind, results in groupby(opened, type):
            if kind is Dropped:
                to.extend(results)  # type: ignore[arg-type]
                continue
            for key, inner in runs(results):  # type: ignore[arg-type]
                dropped = self._enter(association, key, now)
                if dropped is None:
                    to += [_new(Opened, (packet, sa)) for packet in inner]
                else:
                    to += [dropped] * len(inner)
        return len(opened)

    def _report_due(self, association: Association) -> None:
        """Let the engine act on what is due of an SA; packets do not suffer from errors of that."""
        try:
            self._report(association)
        except Exception as error:  # noqa: BLE001
            self.fault("acting on an SA that is due failed", error)

    def _enter(self, association: Inbound, key: FlowKey | None, now: float) -> Dropped | None:
        """Return why a flow that `association` brought may not enter; None: it may."""
        if key is None:
            return DROPPED[Reason.MALFORMED]
        try:
            admission = self._admitted.decisions.get((association, key)) or self._admit(association, key)
        except Exception as error:  # noqa: BLE001 - one bad packet costs one packet
            FAULTS.note("deciding about a flow failed", type(error).__name__, error=error)
            return DROPPED[Reason.FAULT]
        entry, dropped = admission
        if entry is not None:
            entry.last_used = now
        return dropped

    def _admit(self, association: Inbound, key: FlowKey) -> Admission:
        """Decide about a flow that `association` brought, and remember the decision."""
        admitted = self._admitted
        admission = self._admission(association, expand(key))
        admitted.learn(association, (association, key), admission)
        return admission

    def _admission(self, association: Inbound, flow: Flow) -> Admission:
        """Decide whether `association` may bring `flow` (RFC 4301, 5.2).

        The first IN policy by priority decides, whether or not the SA has selectors. As in XFRM, but for
        three cases, in which this one drops: transport mode that no policy covers, transport mode under
        BYPASS, and a policy without a reqid that covers an SA with one.
        """
        if not allows(association.sa.selectors, flow):
            return _NOT_FOR_THIS_SA
        entry = self._policies.look_up(Direction.IN, flow)
        if entry is None:
            if not association.without_policies:
                return _NOT_FOR_THIS_SA
        elif entry.policy.action is not Action.PROTECT or entry.link != association.link:
            return _NOT_FOR_THIS_SA
        if flow in self._endpoints:
            return _FOR_AN_ENDPOINT
        return Admission(entry, None)

    def seal_burst(self, burst: Iterable[Packet]) -> list[Sealed | Dropped]:
        """Return the ESP packet for each inner packet of `burst`, or why there is none, in order."""
        now = time.time()
        results: list[Sealed | Dropped] = []
        for key, run in runs(burst):
            while run:
                sealed = self._seal_run_safely(key, run, now)
                results += sealed
                run = run[len(sealed) :]
        self.count(results)
        return results

    def _seal_run_safely(self, key: FlowKey | None, run: list[bytes], now: float) -> list[Sealed | Dropped]:
        """Seal packets of one flow, at least one; one that raises costs itself."""
        try:
            return self._seal_run(key, run, now)
        except Exception as error:  # noqa: BLE001 - one bad packet costs one packet
            FAULTS.note("sealing a packet failed", type(error).__name__, error=error)
            return [DROPPED[Reason.FAULT]]

    def _seal_run(self, key: FlowKey | None, run: list[bytes], now: float) -> list[Sealed | Dropped]:
        """Seal packets of one flow, at least one."""
        if key is None:
            return [DROPPED[Reason.MALFORMED]] * len(run)
        for _ in range(_ATTEMPTS):
            if process.WORD[0] != self._process:  # a signal handler forked, and this is the child
                return [DROPPED[Reason.FORKED]] * len(run)
            association, entry, dropped = self._ways.decisions.get(key) or self._find_way(key)
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
                self._report_due(association)
            if sealed[0] is not DROPPED[Reason.NO_SA]:
                return sealed
            self.forget()  # the SA ended while we held it
        return [DROPPED[Reason.ACQUIRE]]

    def _find_way(self, key: FlowKey) -> Way:
        ways = self._ways
        way = self._way(expand(key))
        ways.learn(way.association or way.entry, key, way)
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


_NOT_FOR_THIS_SA: Final = Admission(None, DROPPED[Reason.SELECTOR])
_FOR_AN_ENDPOINT: Final = Admission(None, DROPPED[Reason.ENDPOINT])


def _choose(candidates: tuple[Inbound, ...], source: Address) -> Inbound:
    """Return the SA of the peer at `source`, of several with one SPI and different destinations."""
    try:
        address = ip_address(str(source[0]).partition("%")[0])
    except (ValueError, IndexError, TypeError):
        return candidates[0]
    address = getattr(address, "ipv4_mapped", None) or address
    return next((candidate for candidate in candidates if candidate.sa.source == address), candidates[0])
