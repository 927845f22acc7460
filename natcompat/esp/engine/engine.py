"""ESP in this process as one `natcompat.ipsec.IPsec`, and what carries packets through it.

Nothing here does I/O: who owns the sockets and the packet device calls `open_burst` and
`seal_burst` and sends what comes out. Bursts are the seam behind which another data path may sit.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from ipaddress import IPv4Interface, IPv6Interface, ip_address
from typing import Final, Self

from natcompat.contract import NAT_KEEPALIVE
from natcompat.errors import NatCompatError, get_logger
from natcompat.esp.engine.association import HARD, MOVED, SOFT, Address, Association, Outbound
from natcompat.esp.engine.control import KEEPALIVE, Control, Larval
from natcompat.esp.engine.databases import PolicyEntry
from natcompat.esp.engine.events import EspEvents
from natcompat.esp.engine.packet import Flow, address_of
from natcompat.esp.engine.portable import DataPath, DataPathFactory, PortableDataPath, Sealed
from natcompat.esp.engine.results import DROPPED, Destination, Dropped, Opened, Packet, Reason
from natcompat.esp.engine.timer import Timer
from natcompat.ipsec import (
    Acquire,
    Event,
    Expire,
    IPAddress,
    MappingChange,
    Mode,
    SaId,
    SecurityAssociation,
    TrafficSelector,
)

_log = get_logger()

ACQUIRE_INTERVAL: Final = 10.0
"""Seconds between two acquires of one policy."""

LONGEST_QUEUE: Final = 1024
"""Opened packets that wait for `received` where there is no `deliver`."""

_MOST_PER_TICK: Final = 1000


class EspEngine(Control):
    """Security associations, policies, and the packets that go by them.

    `deliver` takes the packets that `inbound` opened; without it they wait in `received`.
    `transmit` takes what the engine sends of its own accord: (payload, destination) pairs,
    NAT-keepalives. With `timer` a thread sees to lifetimes and keepalives as long as there are
    any; without it the owner calls `tick`. `follow_mapping`: where an authentic packet of an SA
    comes from is where its answers go, without asking (RFC 7296, 2.23); else it is only reported.
    `datapath` makes what carries packets.

    All methods may be called from any thread. A forked child has the object and cannot use it:
    two processes would use one nonce. Verbs raise EINVAL there, packets are dropped.
    """

    def __init__(
        self,
        *,
        deliver: Callable[[list[Opened]], object] | None = None,
        transmit: Callable[[list[Sealed]], object] | None = None,
        timer: bool = True,
        follow_mapping: bool = False,
        datapath: DataPathFactory = PortableDataPath,
    ) -> None:
        self._timer = Timer(self._run_timer) if timer else None
        super().__init__(
            keepalives=transmit is not None or not timer,
            path=lambda associations, policies: datapath(associations, policies, self._report, self._acquire),
            wake_at=self._wake_timer,
        )
        self._deliver = deliver
        self._transmit = transmit
        self._follow = follow_mapping
        self._listeners: tuple[EspEvents, ...] = ()
        self._acquires = 0
        self._received: deque[Opened] = deque()

    def add_address(self, address: str | IPAddress | IPv4Interface | IPv6Interface) -> None:
        """Raise EOPNOTSUPP: an engine without a device of its own assigns no inner addresses."""
        raise NatCompatError(
            errno.EOPNOTSUPP,
            "this ESP engine has no device that could have an inner address",
            'Use open_ipsec("userspace") with a TUN, or assign the address yourself',
        )

    def remove_address(self, address: str | IPAddress | IPv4Interface | IPv6Interface) -> None:
        """Raise EADDRNOTAVAIL, likewise."""
        raise NatCompatError(errno.EADDRNOTAVAIL, "this ESP engine has no inner addresses")

    # -- packets

    def open(self, packet: Packet, source: Address, traffic_class: int = 0) -> Opened | Dropped:
        """Return what the ESP packet that came from `source` holds; never raises on bad packets.

        `traffic_class`: of the outer header, if the caller knows it; its ECN field goes inside.
        """
        return self.open_burst([(packet, source)], [traffic_class])[0]

    def open_burst(
        self, burst: Iterable[tuple[Packet, Address]], traffic_classes: Sequence[int] | None = None
    ) -> list[Opened | Dropped]:
        """Return what each ESP packet of `burst` holds, in order, or why it holds nothing."""
        unusable = self._unusable()
        if unusable is None:
            return self._path.open_burst(burst, traffic_classes)
        return [unusable for _ in burst]

    def seal(self, inner: Packet) -> list[Sealed] | Dropped:
        """Return the ESP packets that carry `inner`, an IP packet, with their destinations."""
        sealed = self.seal_burst([inner])[0]
        return sealed if isinstance(sealed, Dropped) else [sealed]

    def seal_burst(self, burst: Iterable[Packet]) -> list[Sealed | Dropped]:
        """Return for each inner packet of `burst` the ESP packet and its destination, or a reason."""
        unusable = self._unusable()
        if unusable is None:
            return self._path.seal_burst(burst)
        return [unusable for _ in burst]

    def seal_dummy(self, sa_id: SaId, length: int) -> Sealed | Dropped:
        """Return a dummy packet of an outbound SA, to hide when there is traffic (RFC 4303, 2.6)."""
        unusable = self._unusable()
        if unusable is not None:
            return unusable
        association = self._find(sa_id)
        if not isinstance(association, Outbound):
            raise NatCompatError(errno.ESRCH, f"{sa_id} is no outbound SA")
        sealed = association.seal_dummy(length, time.time())
        if association.due:
            self._report(association)
        return sealed

    def inbound(self, burst: list[tuple[memoryview, Address]]) -> None:
        """Take diverted ESP, as the `esp` of `natcompat.set_nat_t_endpoint`."""
        opened = [each for each in self.open_burst(burst) if isinstance(each, Opened)]
        if self._deliver is not None:
            if opened:
                self._deliver(opened)
            return
        with self._lock:
            room = LONGEST_QUEUE - len(self._received)
            self._received.extend(opened[:room])
        self._path.count([DROPPED[Reason.QUEUE]] * (len(opened) - room))

    def received(self) -> list[Opened]:
        """Return what `inbound` has opened since the last call, where there is no `deliver`."""
        with self._lock:
            packets = list(self._received)
            self._received.clear()
            return packets

    def counters(self) -> Mapping[Reason, int]:
        """Return how many packets went no further, by reason; reasons without a packet are missing."""
        return self._path.counters()

    @property
    def path(self) -> DataPath:
        """What carries packets by the databases."""
        return self._path

    def count(self, reason: Reason, packets: int) -> None:
        """Count `packets` that whoever carries them had to drop for `reason`."""
        if packets > 0:
            self._path.count([DROPPED[reason]] * packets)

    def outbound_sa(self, spi: int, destination: Destination) -> SecurityAssociation | None:
        """Return the SA that sealed a packet with `spi` to `destination`; None: it is gone."""
        with self._usable():
            found = self._associations.find(SaId(spi=spi, destination=ip_address(destination[0])))
            return found.sa if found is not None else None

    def _unusable(self) -> Dropped | None:
        if os.getpid() != self._pid:
            return DROPPED[Reason.FORKED]
        return DROPPED[Reason.CLOSED] if self._closed else None

    # -- events

    def events(self) -> EspEvents:
        """Start listening for acquires, expiries and mapping changes."""
        with self._usable():
            listener = EspEvents(self._forget_listener, self._still_due)
            self._listeners = (*self._listeners, listener)
            return listener

    def _forget_listener(self, listener: EspEvents) -> None:
        with self._lock:
            self._listeners = tuple(each for each in self._listeners if each is not listener)

    def _emit(self, event: Event) -> None:
        for listener in self._listeners:
            listener.put(event)

    def _still_due(self) -> list[Event]:
        with self._usable():
            for entry in self._policies:
                entry.acquired = float("-inf")
            return [
                Expire(sa_id=each.sa.sa_id, reqid=each.sa.reqid, hard=False)
                for each in self._associations
                if each.soft
            ]

    def _acquire(self, entry: PolicyEntry, flow: Flow) -> bool:
        """Tell whoever listens that `flow` needs an SA, not too often for one policy.

        Returns True, and tells nobody, if there is one after all: it was just being moved.
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

    def _report(self, association: Association) -> None:
        """Act on what is due of `association`. Called without its lock."""
        due, moved = association.take_due()
        with self._lock:
            sa = association.sa
            if due & SOFT and not due & HARD:
                self._emit(Expire(sa_id=sa.sa_id, reqid=sa.reqid, hard=False))
            if due & HARD:
                self._retire(association)
                self._emit(Expire(sa_id=sa.sa_id, reqid=sa.reqid, hard=True))
            if due & MOVED:
                self._report_move(association, *moved)

    def _report_move(self, association: Association, address: IPAddress, port: int) -> None:
        sa, ports = association.sa, association.encapsulation
        self._emit(
            MappingChange(
                sa_id=sa.sa_id,
                reqid=sa.reqid,
                old_address=sa.source,
                old_port=ports.remote_port,
                new_address=address,
                new_port=port,
            )
        )
        if not self._follow or address.version != sa.source.version:
            return
        # the policies stay as they are, so the links do
        changed = replace(ports, remote_port=port)
        self._move(association, replace(sa, source=address, encapsulation=changed), association.link)
        for each in self._associations:
            answer = each.sa
            if (
                isinstance(each, Outbound)
                and (answer.reqid, answer.destination) == (sa.reqid, sa.source)
                and each.encapsulation.remote_port == ports.remote_port
            ):
                with contextlib.suppress(NatCompatError):  # the name is taken: this one stays
                    changed = replace(each.encapsulation, remote_port=port)
                    moved_answer = replace(answer, destination=address, encapsulation=changed)
                    self._move(each, moved_answer, each.link)

    # -- time

    def tick(self, now: float | None = None) -> list[Sealed]:
        """Expire what is due, and return the keepalives that are: (payload, destination) pairs.

        `now` is on the monotonic clock. Only for engines without `timer`.
        """
        now = time.monotonic() if now is None else now
        keepalives: list[Sealed] = []
        with self._usable():
            for _ in range(_MOST_PER_TICK):
                item = self._deadlines.take(now)
                if item is None:
                    break
                if not self._meant(item):
                    continue
                if isinstance(item, Larval):
                    del self._larval[item.sa_id.spi]
                    continue
                association, kind = item
                if kind == KEEPALIVE:
                    self._keep_alive(association, now, keepalives)
                else:
                    association.expire(hard=kind == HARD)
                    self._report(association)
        return keepalives

    def _keep_alive(self, association: Outbound, now: float, keepalives: list[Sealed]) -> None:
        interval = association.sa.nat_keepalive or 0
        usage = association.usage()
        idle = time.time() - (usage.last_used or usage.added)
        if 0 <= idle < interval:  # negative: the clock was set back
            self._schedule(now + interval - idle, (association, KEEPALIVE))
            return
        keepalives.append((NAT_KEEPALIVE, association.destination(0, False)))
        self._schedule(now + interval, (association, KEEPALIVE))

    def next_deadline(self) -> float | None:
        """Return when `tick` has something to do, on the monotonic clock."""
        with self._lock:
            return self._deadlines.next

    def _wake_timer(self, deadline: float) -> None:
        if self._timer is not None:
            self._timer.wake_at(deadline)

    def _run_timer(self) -> float | None:
        try:
            keepalives = self.tick()
            if keepalives and self._transmit is not None:
                self._transmit(keepalives)
        except Exception:  # noqa: BLE001
            if not self._closed:  # whatever the owner's function does, SAs must go on to expire
                _log.exception("sending NAT-keepalives failed")
        return self.next_deadline()

    # -- the end

    def close(self) -> None:
        """Forget all SAs and policies, end the timer, close what listens. They lived in this object."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._closed:
                return
            super().flush_sas()
            super().flush_policies()  # routes that follow them are closed by who has them
            self._closed = True
            listeners = self._listeners
        if self._timer is not None:
            self._timer.close()
        for listener in listeners:
            listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
