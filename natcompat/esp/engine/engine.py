"""`EspEngine`: ESP in this process as one `natcompat.ipsec.IPsec`, and bursts of packets through it.

The engine does no I/O: the owner of the sockets and of the packet device calls `open_burst` and `seal_burst`
and sends the results.
"""

from __future__ import annotations

import errno
import secrets
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from ipaddress import ip_address
from typing import Final, Self

from natcompat.contract import NAT_KEEPALIVE
from natcompat.errors import NatCompatError, get_logger
from natcompat.esp.engine import process
from natcompat.esp.engine.association import HARD, Address, Outbound
from natcompat.esp.engine.data_path import DataPath, DataPathFactory, Sealed
from natcompat.esp.engine.databases import allows
from natcompat.esp.engine.endpoints import LocalEndpoints, not_local
from natcompat.esp.engine.packet import Flow, expand, flow_key, inner_length
from natcompat.esp.engine.portable import PortableDataPath
from natcompat.esp.engine.results import DROPPED, Destination, Dropped, Opened, Packet, Reason
from natcompat.esp.engine.state import KEEPALIVE, Larval
from natcompat.esp.engine.timer import Timer
from natcompat.esp.engine.watching import INTERVAL as WATCH_INTERVAL
from natcompat.esp.engine.watching import Watching
from natcompat.ipsec import Action, Direction, IPAddress, SaId, SecurityAssociation

_log = get_logger()

LONGEST_QUEUE: Final = 1024
"""Opened packets that wait for `received` where there is no `deliver`."""

_MOST_PER_TICK: Final = 1000
_LONGEST_DUMMY: Final = 64
"""Bytes of payload of a dummy packet that is a keepalive; the length is random."""

_BY_ACTION: Final = {Action.DISCARD: Reason.DISCARD, Action.BYPASS: Reason.BYPASS}


class EspEngine(Watching):
    """Security associations, policies, and the packets that go by them.

    `deliver` takes the packets that `inbound` opened; without it they wait in `received`. `transmit` takes
    packets that the engine sends of its own accord, as (payload, destination) pairs: NAT-keepalives and dummy
    packets. With `timer` a thread acts on lifetimes and keepalives while there are any; without it the owner
    calls `tick`. `follow_mapping`: answers go to the address that an authentic packet of the SA came from
    (RFC 7296, 2.23); else a move is only reported. `raw_esp`: the owner carries ESP without UDP (protocol
    50), so SAs may have no encapsulation; their packets have port 0. `silence`: seconds without an authentic
    packet from a peer to whom this end sends, after which `PeerSilent` is reported; None: never. `datapath`
    makes the data path.

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
        raw_esp: bool = False,
        silence: float | None = None,
        datapath: DataPathFactory = PortableDataPath,
    ) -> None:
        self._timer = Timer(self._run_timer) if timer else None
        super().__init__(
            follow_mapping=follow_mapping,
            silence=silence,
            keepalives=transmit is not None or not timer,
            raw_esp=raw_esp,
            path=lambda associations, policies: datapath(associations, policies, self._report, self._acquire),
            wake_at=self._wake_timer,
        )
        self._deliver = deliver
        self._transmit = transmit
        self._received: deque[Opened] = deque()

    # -- packets

    def open(self, packet: Packet, source: Address, traffic_class: int = 0) -> Opened | Dropped:
        """Return the inner packet of an ESP packet that came from `source`; never raises on bad packets.

        `traffic_class`: of the outer header, if the caller knows it; its ECN field goes inside.
        """
        return self.open_burst([(packet, source)], [traffic_class])[0]

    def open_burst(
        self, burst: Iterable[tuple[Packet, Address]], traffic_classes: Sequence[int] | None = None
    ) -> list[Opened | Dropped]:
        """Return the inner packet of each ESP packet of `burst`, or why there is none, in order."""
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
        association = self._find_outbound(sa_id)
        sealed = association.seal_dummy(length, time.time())
        if association.due:
            self._report(association)
        return sealed

    def send_dummy(self, sa_id: SaId) -> None:
        """Send a dummy packet by an outbound SA: a keepalive that the peer can authenticate (RFC 4303, 2.6).

        A peer behind this end's NAT learns a new mapping from it, and drops it without a word. ESRCH: there
        is no such outbound SA. EOPNOTSUPP: this engine has nothing to send with.
        """
        if self._transmit is None:
            raise NatCompatError(
                errno.EOPNOTSUPP, "this engine has nothing to send dummy packets with", "Use seal_dummy"
            )
        with self._usable():
            sealed = self.seal_dummy(sa_id, secrets.randbelow(_LONGEST_DUMMY + 1))
        if isinstance(sealed, Dropped):
            self._path.count((sealed,))
            raise NatCompatError(errno.ENOBUFS, f"no dummy packet left by {sa_id}: {sealed.reason.value}")
        self._transmit([sealed])

    def seal_with(self, sa_id: SaId, inner: Packet) -> list[Sealed] | Dropped:
        """Return the ESP packet that carries `inner` by the named SA, whatever other SA is newer.

        For answers to one of several peers that policies cannot tell apart, as two clients behind one NAT in
        transport mode (RFC 3948, 5.2): `Opened.sa` says who asked. The policies decide as they do for `seal`:
        the first that covers the packet has to be a PROTECT policy of this SA; without any the SA has to be
        one that was added `without_policies`. ESRCH: there is no such outbound SA.
        """
        unusable = self._unusable()
        if unusable is not None:
            return unusable
        association = self._find_outbound(sa_id)
        packet, now = bytes(inner), time.time()
        results = self._seal_with(association, packet, now)
        if association.due:
            self._report(association)
        if isinstance(results, Dropped):
            self._path.count((results,))
            return results
        return [results]

    def _seal_with(self, association: Outbound, packet: bytes, now: float) -> Sealed | Dropped:
        key = flow_key(packet) if inner_length(packet) == len(packet) > 0 else None
        if key is None:
            return DROPPED[Reason.MALFORMED]
        flow = expand(key)
        entry = self._policies.look_up(Direction.OUT, flow)
        if entry is None:
            if not association.without_policies:
                return DROPPED[Reason.NO_POLICY]
            if not allows(association.sa.selectors, flow):
                return DROPPED[Reason.SELECTOR]
        else:
            entry.last_used = now
            if entry.policy.action is not Action.PROTECT:
                return DROPPED[_BY_ACTION[entry.policy.action]]
            if not self._associations.serves(association, entry, flow):
                return DROPPED[Reason.SELECTOR]
        return association.seal_run([packet], now)[0]

    def check_clear(self, packet: Packet) -> Dropped | None:
        """Return why an inbound packet in the clear must be dropped; None: it may pass (RFC 4301, 5.2).

        For devices that hand packets from the wire to applications themselves (queues). An IN policy that
        protects or discards the packet forbids it, unless the policy is `optional`. Drops are counted.
        """
        unusable = self._unusable()
        if unusable is None and self._policies.has_policies(Direction.IN):
            data = bytes(packet)
            key = flow_key(data) if 0 < inner_length(data) <= len(data) else None
            unusable = DROPPED[Reason.MALFORMED] if key is None else self._check_clear(expand(key))
        if unusable is not None:
            self._path.count((unusable,))
        return unusable

    def _check_clear(self, flow: Flow) -> Dropped | None:
        entry = self._policies.look_up(Direction.IN, flow)
        if entry is None or entry.policy.action is Action.BYPASS:
            return None
        if entry.policy.action is Action.PROTECT and entry.policy.optional:
            return None
        return DROPPED[Reason.CLEARTEXT]

    def protect_endpoints(
        self,
        endpoints: Iterable[tuple[IPAddress, int]],
        is_local: Callable[[IPAddress], bool] = not_local,
    ) -> None:
        """Drop packets that an SA brings for the UDP sockets with these addresses and ports, from now on.

        IKE and ESP-in-UDP do not travel inside ESP; Solaris drops them as well (kstat esp_nat_t_ipsec).
        Dropped packets count as `Reason.ENDPOINT`. The unspecified address stands for every address of this
        host: `is_local` is asked for the destination of a flow, once for each flow.
        """
        with self._usable():
            self._path.protect_endpoints(LocalEndpoints(endpoints, is_local))

    def inbound(self, burst: list[tuple[memoryview, Address]]) -> None:
        """Take diverted ESP, as the `esp` of `natcompat.set_nat_t_endpoint`."""
        opened = [result for result in self.open_burst(burst) if isinstance(result, Opened)]
        if self._deliver is not None:
            if opened:
                self._deliver(opened)
            return
        with self._lock:
            room = LONGEST_QUEUE - len(self._received)
            self._received.extend(opened[:room])
        self._path.count([DROPPED[Reason.QUEUE]] * (len(opened) - room))

    def received(self) -> list[Opened]:
        """Return the packets that `inbound` has opened since the last call, where there is no `deliver`."""
        with self._lock:
            packets = list(self._received)
            self._received.clear()
            return packets

    def counters(self) -> Mapping[Reason, int]:
        """Return how many packets went no further, by reason; reasons without a packet are missing."""
        return self._path.counters()

    @property
    def path(self) -> DataPath:
        """The data path."""
        return self._path

    def count(self, reason: Reason, packets: int) -> None:
        """Count packets that their carrier had to drop for `reason`."""
        if packets > 0:
            self._path.count([DROPPED[reason]] * packets)

    def outbound_sa(self, spi: int, destination: Destination) -> SecurityAssociation | None:
        """Return the SA that sealed a packet with `spi` to `destination`; None: it is gone."""
        with self._usable():
            association = self._associations.find(SaId(spi=spi, destination=ip_address(destination[0])))
            return association.sa if association is not None else None

    def _unusable(self) -> Dropped | None:
        if process.WORD[0] != self._process or self.is_copy:
            return DROPPED[Reason.FORKED]
        return DROPPED[Reason.CLOSED] if self._closed else None

    # -- time

    def tick(self, now: float | None = None) -> list[Sealed]:
        """Expire SAs that are due, and return the keepalives that are due: (payload, destination) pairs.

        `now` is on the monotonic clock. Only for engines without `timer`.
        """
        now = time.monotonic() if now is None else now
        keepalives: list[Sealed] = []
        process.notice_restore()
        with self._usable():
            if now >= self._next_watch:
                self._watch(now)
            for _ in range(_MOST_PER_TICK):
                item = self._deadlines.take(now)
                if item is None:
                    break
                if not self._still_meant(item):
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
            if not self._closed:  # SAs must go on to expire, even if the owner's function raises
                _log.exception("sending NAT-keepalives failed")
        deadline = self.next_deadline()
        if not self._associations:
            return deadline
        watch = time.monotonic() + WATCH_INTERVAL
        return watch if deadline is None else min(deadline, watch)

    # -- the end

    def close(self) -> None:
        """Forget all SAs and policies, wipe their keys, end the timer, and close all listeners."""
        if self.is_copy:
            return
        with self._lock:
            if self._closed:
                return
            super().flush_sas()
            super().flush_policies()  # a subclass closes the routes that follow them
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
