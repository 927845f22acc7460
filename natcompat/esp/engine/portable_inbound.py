"""One inbound SA in Python: replay check, integrity check, decapsulation."""

from __future__ import annotations

from collections.abc import Sequence
from ipaddress import IPv6Address, ip_address

from natcompat.esp.engine import packet as packets
from natcompat.esp.engine.association import (
    MOVED,
    Address,
    Inbound,
    Link,
    ports_of,
)
from natcompat.esp.engine.faults import FAULTS
from natcompat.esp.engine.portable_association import HEADER, INNER_VERSIONS, PortableAssociation
from natcompat.esp.engine.replay import ReplayWindow
from natcompat.esp.engine.results import DROPPED, Dropped, Reason
from natcompat.ipsec import IPAddress, SecurityAssociation


class PortableInbound(PortableAssociation, Inbound):
    """An SA that opens packets."""

    __slots__ = ("_home", "window")

    moved_to: Address
    due: int
    replay_drops: int
    window_drops: int
    integrity_drops: int

    def __init__(self, sa: SecurityAssociation, link: Link, sequence: int = 0) -> None:
        """`sequence`: all numbers up to this one have been received."""
        self.window: ReplayWindow = ReplayWindow(sa.replay_window, sequence)
        super().__init__(sa, link)

    def _placed(self) -> None:
        self._home: Address = (str(self.sa.source), ports_of(self.sa)[1])
        self.moved_to = ()
        self.due &= ~MOVED

    @property
    def highest(self) -> int:  # type: ignore[override]
        """The highest sequence number received."""
        return self.window.top

    def open_run(
        self, run: Sequence[bytes], source: Address, traffic_class: int, now: float
    ) -> list[bytes | Dropped]:
        """Return inner packets: of all `run`, of its first near a limit, or up to one that moves the SA."""
        results: list[bytes | Dropped] = []
        append = results.append
        with self.lock:
            if self.gone:
                return [DROPPED[Reason.NO_SA]]
            if not self._ample(run):
                run = run[:1]
            window, esn, high = self.window, self._esn, b""
            used = octets = 0
            # one loop, not a function per packet: calls are what a packet costs most
            for packet in run:
                if self.due and results:
                    break  # what the owner does about it may concern the next ones
                _, sequence = HEADER.unpack_from(packet)
                if esn:
                    sequence = window.infer(sequence)
                    high = (sequence >> 32 & 0xFFFF_FFFF).to_bytes(4)
                newest = sequence > window.top
                if not newest:
                    reason = window.check(sequence)
                    if reason is not None:
                        append(self._refuse(reason))
                        continue
                length = len(packet) - self._fixed
                if length < 2 or length & self._remainder:
                    append(self._refuse_length(length))
                    continue
                try:
                    plaintext = self.cipher.open(packet, high)
                except Exception as error:  # noqa: BLE001 - one bad packet costs one packet
                    FAULTS.note("decrypting an ESP packet failed", type(error).__name__, error=error)
                    append(DROPPED[Reason.FAULT])
                    continue
                if plaintext is None:
                    self.integrity_drops += 1
                    append(DROPPED[Reason.INTEGRITY])
                    continue

                # authentic from here on
                window.commit(sequence)
                if newest and source != self._home:
                    self._notice(source)
                used += 1
                length = packets.payload_length(plaintext)
                if length < 0:
                    append(DROPPED[Reason.PADDING])
                    continue
                octets += length
                next_header = plaintext[-1]
                if next_header == packets.DUMMY:
                    append(DROPPED[Reason.DUMMY])
                elif self._tunnel:
                    append(self._leave_tunnel(plaintext[:length], next_header, traffic_class))
                else:
                    append(self._leave_transport(plaintext[:length], next_header, traffic_class))
            if used:
                self._use(used, octets, now)
        return results

    def _last_packet(self) -> dict[str, float | None]:
        return {"last_received": self.last_used}

    def _refuse(self, reason: Reason) -> Dropped:
        if reason is Reason.REPLAYED:
            self.replay_drops += 1
        else:
            self.window_drops += 1
        return DROPPED[reason]

    def _refuse_length(self, length: int) -> Dropped:
        """Return the reason for a length: too short for a check value, or one that cannot be right."""
        if length < 0:
            return DROPPED[Reason.SHORT]
        self.integrity_drops += 1
        return DROPPED[Reason.INTEGRITY]

    def _leave_transport(self, payload: bytes, next_header: int, traffic_class: int) -> bytes:
        sa = self.sa
        source, destination = sa.source, sa.destination
        original = sa.encapsulation.original_address if sa.encapsulation else None
        payload = packets.fix_transport_checksum(next_header, payload, source, destination, original)
        return packets.join_for_transport(source, destination, next_header, payload, traffic_class)

    def _leave_tunnel(self, inner: bytes, next_header: int, traffic_class: int) -> bytes | Dropped:
        if next_header not in INNER_VERSIONS:
            return DROPPED[Reason.NEXT_HEADER]
        total = packets.inner_length(inner)
        if not total or inner[0] >> 4 != INNER_VERSIONS[next_header]:
            return DROPPED[Reason.MALFORMED]
        if total != len(inner):
            inner = inner[:total]  # the rest is TFC padding (RFC 4303, 2.7)
        if traffic_class & 3 and self.sa.copy_ecn:
            return packets.decapsulate_ecn(inner, traffic_class) or DROPPED[Reason.ECN]
        return inner

    def _notice(self, source: Address) -> None:
        """Note that an authentic packet came from `source`; `_home` becomes the source of the next ones."""
        try:
            address: IPAddress = ip_address(str(source[0]).partition("%")[0])
            port = int(source[1])
        except (ValueError, IndexError, TypeError):
            return  # no socket address: this caller does not say where packets come from
        if isinstance(address, IPv6Address):
            address = address.ipv4_mapped or address
        self._home = source
        moved = (address, port)
        if moved == (self.sa.source, ports_of(self.sa)[1]):
            self.moved_to = ()
            self.due &= ~MOVED
        elif moved != self.moved_to:
            self.moved_to = moved
            self.due |= MOVED
