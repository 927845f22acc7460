"""Acquires, expiries and mapping changes, as the kernel sends them to whoever has registered."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Iterator
from typing import Protocol

from natcompat.errors import NatCompatError
from natcompat.ipsec import Acquire, Event, Expire, InstalledSA, MappingChange
from natcompat.ipsec.associations import SaId, UDPEncapsulation, wire_ports
from natcompat.ipsec.selectors import PROTOCOLS_WITH_PORTS, TrafficSelector
from natcompat.ipsec.values import Direction, IPAddress
from natcompat.kernel.events import RECEIVE_BUFFER, KernelEvents, Known, passed_soft_limit
from natcompat.kernel.pfkey import numbers as n
from natcompat.kernel.pfkey.dialects import Dialect
from natcompat.kernel.pfkey.messages import (
    Message,
    decode,
    read_address,
    read_port,
    read_sa,
)
from natcompat.kernel.pfkey.readback import record_of, required
from natcompat.kernel.pfkey.spd import ANY_PROTOCOL
from natcompat.kernel.pfkey.transport import PfKeySocket

MAPPING_INTERVAL = 5.0
"""Seconds between two reports of the same new mapping: the kernel gives one for every packet."""
_OVERHEAD = 1024
"""Bytes that a kernel counts for a message beside its own, at most."""
_MAPPINGS = 1024
"""Mapping changes that are remembered, so that they are not reported again too soon."""


class Database(Protocol):
    """The methods of `PfKeyIPsec` that events call."""

    known: dict[SaId, Known]

    def list_sas(self) -> list[InstalledSA]:
        """Return every SA."""
        ...

    def is_there(self, sa_id: SaId) -> bool:
        """Tell whether an SPI is reserved or in use, whatever an expiry of it says."""
        ...

    def wanted(self, message: Message) -> tuple[int, TrafficSelector | None]:
        """Return reqid and selector of the policy behind an acquire."""
        ...


class PfKeyEvents(KernelEvents):
    """A PF_KEY socket of its own that is registered for ESP.

    A kernel does not say that the queue was full. So when `read` finds it half full, or more, it reports
    `EventsLost`, and behind it what can be found out from the SAs themselves: soft limits that are passed,
    and hard expiries.
    """

    def __init__(self, dialect: Dialect, database: Database, *, receive_buffer: int = RECEIVE_BUFFER) -> None:
        """Listen."""
        super().__init__(database.known, database.is_there)
        self._dialect = dialect
        self._database = database
        self._queued = 0
        self._reported: dict[tuple[int, IPAddress, int, IPAddress, int], float] = {}
        self._pfkey = PfKeySocket(dialect, receive_buffer=receive_buffer)
        try:
            self._pfkey.request("Listening to PF_KEY", Message(n.SADB_REGISTER, dialect.esp))
            self._room = self._pfkey.socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF)
        except BaseException:
            self._pfkey.close()
            raise

    def fileno(self) -> int:
        """Return the descriptor to wait on; it may be readable for messages that are no events."""
        return self._pfkey.socket.fileno()

    def close(self) -> None:
        """Stop listening."""
        self._pfkey.close()

    def read(self) -> list[Event]:
        """Return what has happened since the last call, oldest first; never waits."""
        self._queued = 0
        return super().read()

    def _receive(self, found: list[Event]) -> bool:
        size = self._pfkey.socket.recv_into(self._pfkey.buffer)
        self._queued += size + _OVERHEAD
        try:
            message = decode(memoryview(self._pfkey.buffer)[:size])
            if not message.errno:
                found.extend(self._events(message))
        except ValueError:
            pass
        finally:
            self._pfkey.buffer[:size] = bytes(size)  # it may have been an SA of somebody's, with its keys
        return self._queued > self._room // 2

    def _events(self, message: Message) -> Iterator[Event]:
        if message.satype not in (0, self._dialect.esp):
            return
        if message.type == n.SADB_ACQUIRE:
            yield from self._acquire(message)
        elif message.type == n.SADB_EXPIRE:
            yield from self._expire(message)
        elif message.type == n.SADB_X_NAT_T_NEW_MAPPING and self._dialect.mapping_events:
            yield from self._mapping(message)

    def _acquire(self, message: Message) -> Iterator[Event]:
        if message.process == os.getpid():  # ours, or another's, that gives up an acquire
            return
        source = read_address(self._dialect, required(message, n.SADB_EXT_ADDRESS_SRC))
        destination = read_address(self._dialect, required(message, n.SADB_EXT_ADDRESS_DST))
        reqid, selector = self._database.wanted(message)
        if selector is None:  # whatever the prefix says: Solaris has 0 in it
            protocol = 0 if source.protocol == ANY_PROTOCOL else source.protocol
            ports = (source.port, destination.port) if protocol in PROTOCOLS_WITH_PORTS else (0, 0)
            selector = TrafficSelector(
                source=source.address,
                destination=destination.address,
                protocol=protocol,
                source_port=ports[0],
                destination_port=ports[1],
            )
        yield Acquire(
            source=source.address,
            destination=destination.address,
            reqid=reqid,
            selector=selector,
            sequence=message.sequence,
        )

    def _expire(self, message: Message) -> Iterator[Event]:
        record = record_of(self._dialect, message)
        hard = message.find(n.SADB_EXT_LIFETIME_HARD) is not None
        if not hard and message.find(n.SADB_EXT_LIFETIME_SOFT) is None:
            return  # Solaris: idle
        yield from self._expired(record.sa_id, record.reqid, hard=hard)

    def _mapping(self, message: Message) -> Iterator[Event]:
        """Understand HEADER, SA, old address, old port, *new* address, new port: the SA's own is missing."""
        spi = read_sa(required(message, n.SADB_EXT_SA)).spi
        old = read_address(self._dialect, required(message, n.SADB_EXT_ADDRESS_SRC)).address
        new = read_address(self._dialect, required(message, n.SADB_EXT_ADDRESS_DST)).address
        old_port = read_port(required(message, n.SADB_X_EXT_NAT_T_SPORT))
        new_port = read_port(required(message, n.SADB_X_EXT_NAT_T_DPORT))
        key = spi, old, old_port, new, new_port
        now = time.monotonic()
        if now - self._reported.get(key, float("-inf")) < MAPPING_INTERVAL:
            return
        if len(self._reported) >= _MAPPINGS:
            self._reported.clear()
        self._reported[key] = now
        for sa_id, reqid in self._named(spi, old, old_port):
            yield MappingChange(
                sa_id=sa_id,
                reqid=reqid,
                old_address=old,
                old_port=old_port,
                new_address=new,
                new_port=new_port,
            )

    def _named(self, spi: int, source: IPAddress, source_port: int) -> Iterator[tuple[SaId, int]]:
        """Yield the inbound SAs with this SPI from there: several only if this host has several addresses."""
        known = [
            (sa_id, each.reqid)
            for sa_id, each in list(self._known.items())
            if sa_id.spi == spi
            and _comes_from(each.source, each.encapsulation, each.direction, source, source_port)
        ]
        if known:
            yield from known
            return
        for found in self._database.list_sas():
            sa = found.association
            if (
                sa
                and sa.spi == spi
                and _comes_from(sa.source, sa.encapsulation, sa.direction, source, source_port)
            ):
                yield found.sa_id, sa.reqid

    def _find_out(self) -> Iterator[Event]:
        try:
            present = {each.sa_id: each for each in self._database.list_sas()}
        except NatCompatError:
            return
        for sa_id, found in present.items():
            sa = found.association
            if sa is not None and passed_soft_limit(sa.lifetime, found.usage):
                yield Expire(sa_id=sa_id, reqid=sa.reqid, hard=False)
        yield from self._missing(present)


def _comes_from(
    sa_source: IPAddress | None,
    encapsulation: UDPEncapsulation | None,
    direction: Direction,
    source: IPAddress,
    source_port: int,
) -> bool:
    if direction is Direction.OUT or encapsulation is None:
        return False
    return sa_source == source and wire_ports(encapsulation, direction)[0] == source_port
