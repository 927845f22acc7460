"""`Reporting`: events of the ESP engine, and its own actions when an SA expires or moves."""

from __future__ import annotations

import logging
import time
from dataclasses import replace
from typing import Any, Final

from natcompat.esp.engine.association import (
    HARD,
    MOVED,
    SOFT,
    Association,
    Inbound,
    ports_of,
)
from natcompat.esp.engine.control import Control
from natcompat.esp.engine.databases import PolicyEntry
from natcompat.esp.engine.events import EspEvents
from natcompat.esp.engine.faults import FAULTS
from natcompat.esp.engine.packet import Flow, address_of
from natcompat.ipsec import (
    Acquire,
    Event,
    Expire,
    IPAddress,
    MappingChange,
    Mode,
    SecurityAssociation,
    TrafficSelector,
)

ACQUIRE_INTERVAL: Final = 10.0
"""Seconds between two acquires of one policy."""


class Reporting(Control):
    """Control that tells listeners of expiries, moves and missing SAs, and follows moves where it shall."""

    def __init__(self, *, follow_mapping: bool, **options: Any) -> None:
        """`options`: those of `EngineState`."""
        super().__init__(**options)
        self._follow = follow_mapping
        self._listeners: tuple[EspEvents, ...] = ()
        self._acquires = 0
        self._mappings: dict[Association, MappingChange] = {}
        """The newest of each SA whose peer is elsewhere, for listeners who lost events."""

    def events(self) -> EspEvents:
        """Start listening for acquires, expiries, mapping changes, silent peers and integrity failures."""
        with self._usable():
            listener = EspEvents(self._forget_listener, self._still_due)
            self._listeners = (*self._listeners, listener)
            return listener

    def _forget_listener(self, listener: EspEvents) -> None:
        with self._lock:
            self._listeners = tuple(other for other in self._listeners if other is not listener)

    def _emit(self, event: Event) -> None:
        for listener in self._listeners:
            listener.put(event)

    def _still_due(self, expired: list[Expire]) -> list[Event]:
        """Return the events that still hold, for a listener that lost some, `expired` among them."""
        with self._usable():
            for entry in self._policies:
                entry.acquired = float("-inf")
            gone: list[Event] = [event for event in expired if self._associations.find(event.sa_id) is None]
            soft: list[Event] = [
                Expire(sa_id=association.sa.sa_id, reqid=association.sa.reqid, hard=False)
                for association in self._associations
                if association.soft
            ]
            moved: list[Event] = [
                event
                for association, event in self._mappings.items()
                if association.moved or _leads_to(event, association.sa)
            ]
            return [*gone, *soft, *moved]

    def _retire(self, association: Association) -> None:
        super()._retire(association)
        self._mappings.pop(association, None)

    # -- SAs that are missing

    def _acquire(self, entry: PolicyEntry, flow: Flow) -> bool:
        """Tell listeners that `flow` needs an SA, at most once in `ACQUIRE_INTERVAL` for one policy.

        Return True, and tell nobody, if there is an SA after all: it was just being moved.
        """
        policy, now = entry.policy, time.monotonic()
        with self._lock:
            if self._associations.outbound_for(entry, flow) is not None:
                return True
            if not self._listeners or now - entry.acquired < ACQUIRE_INTERVAL:
                return False
            entry.acquired = now
            self._acquires += 1
            sequence = self._acquires
        addresses = [address_of(flow.version, flow.source), address_of(flow.version, flow.destination)]
        selector = TrafficSelector(
            source=addresses[0],
            destination=addresses[1],
            protocol=flow.protocol,
            source_port=flow.source_port,
            destination_port=flow.destination_port,
        )
        if policy.mode is Mode.TUNNEL and policy.source is not None and policy.destination is not None:
            addresses = [policy.source, policy.destination]
        self._emit(
            Acquire(
                source=addresses[0],
                destination=addresses[1],
                reqid=policy.reqid,
                selector=selector,
                sequence=sequence,
            )
        )
        return False

    # -- SAs that expire or move

    def _report(self, association: Association) -> None:
        """Act on what is due of `association`. Called without its lock."""
        due, moved_to = association.take_due()
        with self._lock:
            sa = association.sa
            if due & SOFT and not due & HARD:
                self._emit(Expire(sa_id=sa.sa_id, reqid=sa.reqid, hard=False))
            if due & HARD:
                self._retire(association)
                self._emit(Expire(sa_id=sa.sa_id, reqid=sa.reqid, hard=True))
            elif due & MOVED and isinstance(association, Inbound):
                self._report_move(association, *moved_to)

    def _report_move(self, association: Inbound, address: IPAddress, port: int) -> None:
        """Tell listeners that the peer of an SA has moved, and follow it if the owner wants that.

        The UDP header is not authenticated: anybody on the path may have written `address` and `port`. So the
        SA that authenticated the packet and those that answer it move, and no others.
        """
        sa = association.sa
        problem = self._implausible(sa, address, port)
        if problem:
            FAULTS.note("a peer seems to have moved, and is not followed", f"{sa.sa_id}: {problem}")
            return
        event = MappingChange(
            sa_id=sa.sa_id,
            reqid=sa.reqid,
            old_address=sa.source,
            old_port=ports_of(sa)[1],
            new_address=address,
            new_port=port,
        )
        if self._follow and address.version == sa.source.version:
            self._follow_move(association, address, port)
        self._mappings[association] = event
        FAULTS.note(f"{sa.sa_id}: the peer has moved", f"to {address} port {port}", level=logging.INFO)
        self._emit(event)

    def _implausible(self, sa: SecurityAssociation, address: IPAddress, port: int) -> str:
        """Return why no peer can be at an address and port, or nothing."""
        if sa.encapsulation is None:
            return "ESP without UDP passes no NAT"
        if not 0 < port <= 65535:
            return f"port {port}"
        if address.is_multicast or address.is_unspecified or address == _BROADCAST:
            return f"{address} is no host"
        if address.is_loopback and not sa.source.is_loopback:
            return f"{address} is a loopback address"
        if self._associations.is_local(address) and not self._associations.is_local(sa.source):
            return f"{address} is an address of this host"
        return ""

    def _follow_move(self, association: Inbound, address: IPAddress, port: int) -> None:
        """Move an SA and those that answer it. Policies, links and pairs stay as they were installed."""
        answering = self._associations.answering(association)
        association.follow(_moved(association.sa, port, source=address))
        self._path.moved(association)
        for outbound in answering:
            answer = _moved(outbound.sa, port, destination=address)
            if answer.sa_id != outbound.sa.sa_id and self._associations.find(answer.sa_id) is not None:
                continue  # another SA has this name: this one stays where it is
            outbound.follow(answer)
            self._path.moved(outbound)


_BROADCAST: Final = address_of(4, 0xFFFF_FFFF)


def _moved(sa: SecurityAssociation, port: int, **peer: IPAddress) -> SecurityAssociation:
    ports = sa.encapsulation
    return replace(sa, encapsulation=None if ports is None else replace(ports, remote_port=port), **peer)  # type: ignore[arg-type]


def _leads_to(event: MappingChange, sa: SecurityAssociation) -> bool:
    """Tell whether an SA has followed `event`, and is there still."""
    return (sa.source, ports_of(sa)[1]) == (event.new_address, event.new_port)
