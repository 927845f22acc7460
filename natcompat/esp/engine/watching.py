"""`Watching`: notices packets that fail authentication and silent peers, without work per packet."""

from __future__ import annotations

import logging
import time
from typing import Any, Final

from natcompat.esp.engine.association import Association, Inbound, Outbound, Pair, ports_of
from natcompat.esp.engine.faults import FAULTS
from natcompat.esp.engine.reporting import Reporting
from natcompat.esp.engine.results import Reason
from natcompat.ipsec import IntegrityFailure, PeerSilent

INTERVAL: Final = 5.0
"""Seconds between two looks at the counters."""

SERIES: Final = 60.0
"""Seconds without a failure, after which the next one begins another series."""


class Watching(Reporting):
    """Reporting that compares the counters of SAs from time to time. The counters are in the SAs already."""

    def __init__(self, *, silence: float | None, **options: Any) -> None:
        """`silence`: seconds, see `EspEngine`. `options`: those of `Reporting`."""
        super().__init__(**options)
        self._silence = silence
        self._next_watch = time.monotonic() + INTERVAL
        self._failures = 0
        self._failed: dict[Association, tuple[int, float]] = {}
        """SAs with failures: how many, and when the last ones were noticed."""
        self._unanswered: dict[Pair, tuple[float, bool]] = {}
        """Since when packets to a peer are unanswered, and whether that was reported."""

    def _watch(self, now: float) -> None:
        """Report what the counters say. `now` is on the monotonic clock. The caller holds the lock."""
        self._next_watch = now + INTERVAL
        failures = self._path.counters().get(Reason.INTEGRITY, 0)
        if failures != self._failures:
            self._failures = failures
            for association in self._associations:
                if isinstance(association, Inbound):
                    self._check_failures(association, now)
        if self._silence is not None:
            self._check_silence(now, self._silence)

    def _check_failures(self, association: Inbound, now: float) -> None:
        count = association.usage().integrity_drops or 0
        before, last = self._failed.get(association, (0, now - SERIES))
        if count == before:
            return
        self._failed[association] = count, now
        if now - last < SERIES:
            return
        sa = association.sa
        FAULTS.note(
            f"{sa.sa_id}: packets fail authentication",
            f"{count} so far, seemingly from {sa.source}. The peer has another key or other transforms, or a"
            " middlebox changes packets",
        )
        self._emit(
            IntegrityFailure(
                sa_id=sa.sa_id, reqid=sa.reqid, address=sa.source, port=ports_of(sa)[1], count=count
            )
        )

    def _check_silence(self, now: float, silence: float) -> None:
        received: dict[Pair, float] = {}
        sent: dict[Pair, tuple[float, Outbound]] = {}
        for association in self._associations:
            pair, last = association.pair, association.usage().last_used or 0.0
            if isinstance(association, Outbound):
                if last >= sent.get(pair, (0.0, None))[0]:
                    sent[pair] = last, association
            elif last > received.get(pair, 0.0):
                received[pair] = last
        unanswered: dict[Pair, tuple[float, bool]] = {}
        for pair, (last, association) in sent.items():
            if last <= received.get(pair, 0.0):
                continue
            since, reported = self._unanswered.get(pair, (now, False))
            if not reported and now - since >= silence:
                reported = True
                sa = association.sa
                FAULTS.note(
                    f"{sa.sa_id}: the peer is silent",
                    f"nothing authentic has come for {now - since:.0f} s although this end sends",
                    level=logging.INFO,
                )
                self._emit(PeerSilent(sa_id=sa.sa_id, reqid=sa.reqid, seconds=now - since))
            unanswered[pair] = since, reported
        self._unanswered = unanswered

    def _retire(self, association: Association) -> None:
        super()._retire(association)
        self._failed.pop(association, None)
