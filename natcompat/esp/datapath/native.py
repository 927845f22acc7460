"""The data path in C (`ffi/`): bursts without the GIL, the state of SAs and a memory of flows in C.

Python decides about the first packet of a flow, and does what C does not: transforms that C lacks, transport
mode, an SPI that several SAs share. The results are those of the portable path.
"""

from __future__ import annotations

import errno
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from struct import Struct
from typing import Any, Final, TypeVar

from natcompat.errors import NatCompatError
from natcompat.esp.datapath.compiled import ffi, lib
from natcompat.esp.datapath.native_association import (
    NOWHERE,
    RESULTS,
    NativeAssociation,
    NativeInbound,
    NativeOutbound,
    Register,
    endpoint_of,
    pack_flow,
    unzeroed,
)
from natcompat.esp.engine import process
from natcompat.esp.engine.association import UNLIMITED, Address, Association, Inbound, Link, Outbound
from natcompat.esp.engine.data_path import Admission, Sealed, Way
from natcompat.esp.engine.databases import AssociationDatabase, PolicyDatabase, PolicyEntry
from natcompat.esp.engine.packet import Flow, FlowKey, expand, flow_key, runs
from natcompat.esp.engine.portable import PortableDataPath
from natcompat.esp.engine.results import DROPPED, Destination, Dropped, Opened, Packet, Reason
from natcompat.ipsec import Mode, SecurityAssociation

_VIEW: Final = Struct("=QIIBBB5x")
"""struct esp_view"""
if len(Reason) + 1 != lib.ESP_REASONS:
    raise ImportError("natcompat.esp.datapath.compiled was built from other sources; build it again")

_NUMBERS: Final = {reason: number for number, reason in enumerate(Reason, 1)}
_LARGEST: Final = UNLIMITED - 1
_STANDING: Final = frozenset({Reason.NO_POLICY, Reason.DISCARD, Reason.BYPASS})
"""Reasons that C may give by itself: they hold until the policies change."""
_MOST_REMEMBERED: Final = 4096
"""Addresses that packets came from, destinations that they go to."""

_new = tuple.__new__
_N = TypeVar("_N", bound=NativeAssociation)


class NativeDataPath(PortableDataPath):
    """A `DataPath` in C, and in Python what C does not do.

    `provider`: "ipsec-mb" or "libcrypto"; None: whichever is faster, for each transform.
    """

    def __init__(
        self,
        associations: AssociationDatabase,
        policies: PolicyDatabase,
        report: Callable[[Association], None],
        acquire: Callable[[PolicyEntry, Flow], bool],
        *,
        provider: str | None = None,
    ) -> None:
        """ENOSYS: there is no such library here, or this processor is not one of its."""
        path = lib.esp_path_new(ffi.NULL if provider is None else provider.encode())
        if not path:
            raise NatCompatError(errno.ENOSYS, f"the C data path has no {provider or 'ciphers'} here")
        self._path = ffi.gc(path, lib.esp_path_release)
        self._register = Register()
        self._spare = 0
        self._standing = _STANDING
        self._others: Callable[[], Mapping[Reason, int]] = dict
        self._metered: dict[PolicyEntry, None] = {}
        self._peers: dict[Address, bytes] = {}
        self._destinations: dict[int, dict[tuple[int, int], Destination]] = {}  # by serial; class and DF
        super().__init__(associations, policies, report, acquire)

    @property
    def path(self) -> Any:
        """The C structure (`struct esp_path *`), for a loop in C, which may outlive this object."""
        return self._path

    def providers(self, sa: SecurityAssociation) -> str | None:
        """Return the library that does the ciphers of `sa`; None: Python does all of it."""
        if sa.mode is not Mode.TUNNEL:
            return None
        name = lib.esp_provider(self._path, sa.encryption, sa.integrity, len(sa.encryption_key))
        return ffi.string(name).decode() if name else None

    def hand_up_unprotected(self) -> None:
        """Have C hand up packets that no policy protects."""
        self._standing = frozenset({Reason.DISCARD})

    # -- SAs

    def inbound(self, sa: SecurityAssociation, link: Link, sequence: int) -> Inbound:
        """Return an SA that opens packets."""
        native = self._make(lib.esp_inbound_new, NativeInbound, sa, link, sequence, None)
        return native or super().inbound(sa, link, sequence)

    def outbound(self, sa: SecurityAssociation, link: Link, sequence: int, permitted: int | None) -> Outbound:
        """Return an SA that seals packets."""
        made = self._make(lib.esp_outbound_new, NativeOutbound, sa, link, sequence, permitted)
        self._spare = max(self._spare, sa.tfc)
        return made or super().outbound(sa, link, sequence, permitted)

    def _make(
        self,
        new: Callable[[Any, Any], Any],
        kind: Callable[[Any, SecurityAssociation, Link], _N],
        sa: SecurityAssociation,
        link: Link,
        sequence: int,
        permitted: int | None,
    ) -> _N | None:
        if self.providers(sa) is None:
            return None
        lifetime = sa.lifetime
        key, mac_key = (ffi.from_buffer("uint8_t[]", each) for each in (sa.encryption_key, sa.integrity_key))
        serial = self._register.take()
        parameters = ffi.new(
            "struct esp_parameters *",
            {
                "serial": serial,
                "spi": sa.spi,
                "encryption": sa.encryption,
                "integrity": sa.integrity,
                "esn": sa.esn,
                "copy_dscp": sa.copy_dscp,
                "copy_ecn": sa.copy_ecn,
                "copy_df": sa.copy_df,
                "tfc": sa.tfc,
                "replay_window": sa.replay_window,
                "sequence": min(sequence, _LARGEST),
                "permitted": _LARGEST if permitted is None else min(permitted, _LARGEST),
                "soft_packets": lifetime.soft_packets or 0,
                "hard_packets": lifetime.hard_packets or 0,
                "soft_bytes": lifetime.soft_bytes or 0,
                "hard_bytes": lifetime.hard_bytes or 0,
                "key": key,
                "key_length": len(key),
                "mac_key": mac_key,
                "mac_key_length": len(mac_key),
                "added": time.time(),
            },
        )
        state = new(self._path, parameters)
        if not state:
            self._register.give_back(serial)
            raise MemoryError
        association = kind(state, sa, link)
        self._register.put(serial, association)
        return association

    def forget(self, changed: Association | None = None) -> None:
        """Forget all decisions, and tell C which SA has an SPI now."""
        metered, self._metered = self._metered, {}  # threads that learn from now on use the new one
        lib.esp_forget(self._path)
        metered.clear()  # from here on C writes into none of them
        self._destinations = {}
        super().forget()
        if isinstance(changed, Inbound):
            self._index(changed.sa.spi)
        if isinstance(changed, NativeAssociation) and changed.gone:
            self._register.give_back(changed.serial)

    def moved(self, association: Association) -> None:
        """Forget the destination of an SA whose peer has moved."""
        if isinstance(association, NativeAssociation):
            self._destinations.pop(association.serial, None)

    def _index(self, spi: int) -> None:
        candidates = self._associations.inbound.get(spi, ())
        only = candidates[0] if len(candidates) == 1 else None
        state = only.state if isinstance(only, NativeInbound) else ffi.NULL
        if not lib.esp_index(self._path, spi, state, bool(candidates)):
            raise MemoryError

    def counters(self) -> Mapping[Reason, int]:
        """Return how many packets went no further, by reason."""
        counted = ffi.new("uint64_t[]", lib.ESP_REASONS)
        lib.esp_counters(self._path, counted)
        in_c = Counter({reason: counted[number] for reason, number in _NUMBERS.items() if counted[number]})
        return dict(in_c + Counter(super().counters()) + Counter(self._others()))

    def count_also(self, others: Callable[[], Mapping[Reason, int]]) -> None:
        """Add the counts that `others` returns, those of a loop in C, to `counters`."""
        self._others = others

    def see_to_due(self) -> None:
        """Act on what is due of SAs."""
        while serial := lib.esp_due_next(self._path):
            association = self._register.get(serial)
            if association is not None:
                self._report_due(association)

    # -- flows

    def _meter(self, entry: PolicyEntry | None) -> Any:
        if entry is None:
            return ffi.NULL
        if entry.meter is None:
            entry.meter = ffi.new("double *")
        self._metered[entry] = None
        return entry.meter

    def _admit(self, association: Inbound, key: FlowKey) -> Admission:
        if not isinstance(association, NativeInbound):
            return super()._admit(association, key)
        generation = lib.esp_generation(self._path)  # before the databases are looked at
        flow = expand(key)
        admission = self._admission(association, flow)
        meter = self._meter(admission.entry)
        verdict = _NUMBERS[admission.dropped.reason] if admission.dropped else 0
        lib.esp_admit(self._path, generation, pack_flow(flow), association.state, meter, verdict)
        return admission

    def _find_way(self, key: FlowKey) -> Way:
        generation, ways = lib.esp_generation(self._path), self._ways
        flow = expand(key)
        way = self._way(flow)
        association, entry, dropped = way
        if isinstance(association, NativeOutbound):
            meter = self._meter(entry)
            lib.esp_way(self._path, generation, pack_flow(flow), association.state, meter, 0)
            return way
        if association is None and dropped.reason in self._standing:
            meter, verdict = self._meter(entry), _NUMBERS[dropped.reason]
            lib.esp_way(self._path, generation, pack_flow(flow), ffi.NULL, meter, verdict)
            return way
        ways.learn(association or entry, key, way)
        return way

    # -- packets

    def open_burst(
        self, burst: Iterable[tuple[Packet, Address]], traffic_classes: Sequence[int] | None = None
    ) -> list[Opened | Dropped]:
        """Return the inner packet of each ESP packet of `burst`, or why there is none, in order."""
        now, items = time.time(), list(burst)
        if traffic_classes is not None and len(traffic_classes) != len(items):
            raise ValueError("traffic_classes: not as many as packets")
        packets = [packet for packet, _ in items]
        joined = bytearray().join(packets)
        lengths = array("I", map(len, packets))
        peers = b"".join([self._peer(source) for _, source in items])
        classes = None if traffic_classes is None else bytes([field & 0xFF for field in traffic_classes])
        views = unzeroed("struct esp_view[]", len(items) or 1)
        data, sizes = ffi.from_buffer("uint8_t[]", joined), ffi.from_buffer("uint32_t[]", lengths)
        sources = ffi.from_buffer("struct esp_endpoint[]", peers)
        fields = ffi.NULL if classes is None else ffi.from_buffer("uint8_t[]", classes)
        window, start, done = memoryview(joined), 0, 0
        results: list[Opened | Dropped] = []
        append, named = results.append, self._register.get
        while done < len(items):
            step = lib.esp_open_joined(
                self._path,
                data + start,
                sizes + done,
                sources + done,
                fields + done if classes else fields,
                len(items) - done,
                now,
                views,
            )
            association, inner, sa = None, b"", None
            for serial, at, length, result, _, _ in _VIEW.iter_unpack(ffi.buffer(views, step * _VIEW.size)):
                if result in RESULTS:
                    append(RESULTS[result])
                elif result != lib.ESP_UP:
                    association, inner = named(serial), bytes(window[start + at : start + at + length])
                    if association is None:
                        append(DROPPED[Reason.NO_SA])  # it ended just now
                        continue
                    sa = association.sa
                    if not result:
                        append(_new(Opened, (inner, sa)))
            if lib.esp_due_pending(self._path):
                self.see_to_due()
            if len(results) < done + step:  # the last one waits for Python
                if isinstance(association, Inbound) and sa is not None and result == lib.ESP_ADMIT:
                    append(self._decide(association, sa, inner, now))
                else:
                    one = None if traffic_classes is None else [traffic_classes[len(results)]]
                    results += super().open_burst([items[len(results)]], one)
            start += sum(lengths[done : done + step])
            done += step
        return results

    def _decide(
        self, association: Inbound, sa: SecurityAssociation, inner: bytes, now: float
    ) -> Opened | Dropped:
        """Return the decision about an inner packet that `sa` brought, whose flow C does not know yet."""
        dropped = self._enter(association, flow_key(inner), now)
        if dropped is None:
            return Opened(inner, sa)
        self.count((dropped,))
        return dropped

    def admit(self, serial: int, inner: bytes, now: float) -> Opened | Dropped:
        """Return the decision about an inner packet that C opened by the SA with `serial` (ESP_ADMIT)."""
        association = self._register.get(serial)
        if isinstance(association, Inbound):
            return self._decide(association, association.sa, inner, now)
        self.count([DROPPED[Reason.NO_SA]])
        return DROPPED[Reason.NO_SA]

    def destination_of(self, serial: int, traffic_class: int, dont_fragment: bool) -> Destination | None:
        """Return the destination of a packet that C sealed by the SA with `serial`; None: it is over."""
        return self._destination(serial, (traffic_class, dont_fragment))

    def _peer(self, source: Address) -> bytes:
        try:
            endpoint = self._peers.get(source)
            if endpoint is None:
                if len(self._peers) >= _MOST_REMEMBERED:
                    self._peers.clear()
                self._peers[source] = endpoint = endpoint_of(source)
        except TypeError:  # not even hashable
            return NOWHERE
        return endpoint

    def seal_burst(self, burst: Iterable[Packet]) -> list[Sealed | Dropped]:
        """Return the ESP packet for each inner packet of `burst`, or why there is none, in order."""
        now, packets = time.time(), list(burst)
        joined = b"".join(packets)
        lengths = array("I", map(len, packets))
        spare = self._spare  # it may grow while C works, and `room` does not
        room = len(joined) + len(packets) * (spare + lib.ESP_ROOM)
        sealed, views = unzeroed("uint8_t[]", room or 1), unzeroed("struct esp_view[]", len(packets) or 1)
        data, sizes = ffi.from_buffer("uint8_t[]", joined), ffi.from_buffer("uint32_t[]", lengths)
        output, start, done = ffi.buffer(sealed), 0, 0
        results: list[Sealed | Dropped] = []
        append, last = results.append, 0
        known: dict[tuple[int, int], Destination] = {}
        while done < len(packets):
            if process.WORD[0] != self._process:  # a signal handler forked, and this is the child
                results += [DROPPED[Reason.FORKED]] * (len(packets) - len(results))
                break
            step = lib.esp_seal_joined(
                self._path,
                data + start,
                sizes + done,
                len(packets) - done,
                now,
                sealed,
                room,
                spare,
                views,
            )
            for serial, at, length, result, *outer in _VIEW.iter_unpack(ffi.buffer(views, step * _VIEW.size)):
                if result in RESULTS:
                    append(RESULTS[result])
                elif not result:
                    if serial != last:
                        last, known = serial, self._destinations.get(serial) or {}
                    destination = known.get((*outer,)) or self._destination(serial, (*outer,))
                    append(
                        (output[at : at + length], destination)
                        if destination
                        else self._seal_alone(packets[len(results)], now)  # its SA ended just now
                    )
            if lib.esp_due_pending(self._path):
                self.see_to_due()
            if len(results) < done + step:
                append(self._seal_alone(packets[len(results)], now))
            start += sum(lengths[done : done + step])
            done += step
        return results

    def _seal_alone(self, packet: Packet, now: float) -> Sealed | Dropped:
        ((key, run),) = runs([packet])
        sealed = self._seal_run_safely(key, run, now)
        self.count(sealed)
        return sealed[0]

    def _destination(self, serial: int, outer: tuple[int, int]) -> Destination | None:
        association = self._register.get(serial)
        if not isinstance(association, Outbound):
            return None
        destinations = self._destinations.get(serial)
        if destinations is None:
            if len(self._destinations) >= _MOST_REMEMBERED:
                self._destinations.clear()
            destinations = self._destinations[serial] = {}
        traffic_class, dont_fragment = outer
        destination = association.destination(traffic_class, bool(dont_fragment))
        destinations[outer] = destination
        return destination
