"""Keeps a tunnel alive, and notices when its peer is gone or has another key.

Dummy packets (next header 59; RFC 4303, 2.6) are sent by idle outbound SAs. In contrast to NAT-keepalives
they are authentic, so a peer that follows mappings learns a new one from them while no inner packet flows.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import Final, Protocol

from natcompat.errors import NatCompatError, get_logger
from natcompat.ipsec import Direction, Event, InstalledSA, IntegrityFailure, PeerSilent, SaId

DEFAULT_INTERVAL: Final = 20
"""Seconds without a packet after which a dummy packet is sent, where an SA has no nat_keepalive."""

_ROUND: Final = 0.5
_LONGEST_ROUND: Final = 5.0
_log = get_logger()


class Sender(Protocol):
    """The SAs that are kept alive."""

    def installed(self) -> Sequence[InstalledSA]:
        """Return the SAs of the tunnel."""

    def send_dummy(self, sa_id: SaId) -> None:
        """Send a dummy packet by an outbound SA."""


class KeepAlive:
    """A thread that sends dummy packets and reports silence, from `start` to `close`.

    `intervals`: seconds without a packet before a dummy packet, by SPI of the outbound SAs; others get none.
    `silence`: seconds without an authentic packet, although this end sent some, after which
    `report` gets a `PeerSilent`; 0: never. It gets an `IntegrityFailure` for the first of a series of packets
    with a wrong check value; a series ends with an authentic packet. `report` is called in the thread.
    """

    def __init__(
        self,
        sender: Sender,
        *,
        intervals: dict[int, float],
        silence: float,
        report: Callable[[Event], object],
    ) -> None:
        self._sender = sender
        self._intervals = intervals
        # a kernel lists every SA of the namespace for a look: without dummy packets there is less hurry
        self._round = _ROUND if intervals else min(_LONGEST_ROUND, max(_ROUND, silence / 10))
        self._silence = silence
        self._report = report
        self._began = time.time()
        self._reported: float | None = None
        """The time of the last authentic packet before the silence that was reported."""
        self._counted: dict[int, tuple[int, int]] = {}
        """Packets with a wrong check value and authentic ones, by SPI of the inbound SAs."""
        self._failing: set[int] = set()
        """SPIs of a series that has been reported."""
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="natcompat-tunnel-keepalive", daemon=True)

    @property
    def silent(self) -> bool:
        """Whether the peer's silence has been reported, and nothing authentic has come since then."""
        return self._reported is not None

    def start(self) -> None:
        """Start the thread; an SA that has sent nothing yet sends a dummy packet at once."""
        self._thread.start()

    def close(self) -> None:
        """End the thread."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def look(self) -> None:
        """Look once at the SAs, and do what is due."""
        now = time.time()
        installed = self._sender.installed()
        for sa in installed:
            interval = self._intervals.get(sa.sa_id.spi)
            if interval is None or sa.association is None or sa.association.direction is not Direction.OUT:
                continue
            sent = last_sent(sa)
            if sent is None or not 0 <= now - sent < interval:  # negative: the clock was set back
                self._send(sa.sa_id)
        if self._silence:
            self._judge(installed, now)
        for sa in installed:
            if sa.association is not None and sa.association.direction is Direction.IN:
                self._judge_integrity(sa, sa.association.reqid)

    def _send(self, sa_id: SaId) -> None:
        try:
            self._sender.send_dummy(sa_id)
        except NatCompatError as error:  # its numbers are used up or not yet reserved, or there is no route
            _log.debug("a dummy packet of %s was not sent: %s", sa_id, error)

    def _judge(self, installed: Sequence[InstalledSA], now: float) -> None:
        """Report the silence of the peer, once until something authentic comes."""
        received = max((last_received(sa) or self._began for sa in installed), default=self._began)
        if self._reported is not None:
            if received > self._reported:
                _log.info("the peer is heard again")
                self._reported = None
            return
        outbound = [sa for sa in installed if (last_sent(sa) or 0) > received]
        if now - received >= self._silence and outbound:
            self._reported = received
            sa = max(outbound, key=lambda sa: last_sent(sa) or 0)
            reqid = sa.association.reqid if sa.association is not None else 0
            self._report(PeerSilent(sa_id=sa.sa_id, reqid=reqid, seconds=now - received))

    def _judge_integrity(self, sa: InstalledSA, reqid: int) -> None:
        """Report the first packet of a series whose check value is wrong."""
        spi, failed, authentic = sa.sa_id.spi, sa.usage.integrity_drops or 0, sa.usage.packets
        failed_before, authentic_before = self._counted.get(spi, (0, 0))
        self._counted[spi] = failed, authentic
        if failed > failed_before:
            if spi not in self._failing:
                self._failing.add(spi)
                self._report(
                    IntegrityFailure(sa_id=sa.sa_id, reqid=reqid, address=None, port=0, count=failed)
                )
        elif authentic > authentic_before:
            self._failing.discard(spi)

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self.look()
            except NatCompatError as error:  # IPsec is being closed
                _log.debug("the SAs cannot be looked at: %s", error)
            self._ended.wait(self._round)


def last_sent(sa: InstalledSA) -> float | None:
    """Return the time of the last packet of an outbound SA, since the epoch; None: never."""
    if sa.association is None or sa.association.direction is not Direction.OUT:
        return None
    return sa.usage.last_sent or sa.usage.last_used


def last_received(sa: InstalledSA) -> float | None:
    """Return the time of the last authentic packet of an inbound SA, since the epoch; None: never."""
    if sa.association is None or sa.association.direction is not Direction.IN:
        return None
    return sa.usage.last_received or sa.usage.last_used
