"""`Diversion`: counts the datagrams that are not IKE, and hands ESP to its consumer."""

from __future__ import annotations

import threading
from itertools import compress
from typing import Any

from natcompat.backends.consumer import Address, EspConsumer, EspInbound
from natcompat.backends.hand_back import HandBack
from natcompat.contract import MARKER_LENGTH, Verdict, classify
from natcompat.errors import get_logger

_log = get_logger()


class Counters:
    """The counters of an endpoint, as plain integers; see `natcompat.Stats`.

    Incremented without a lock: the interpreter lock makes one `+=` on a slot whole. A free-threaded
    interpreter may miss some when threads receive at once.
    """

    __slots__ = ("errors", "esp", "handed_back", "ike", "keepalives", "markers_inserted", "runts")

    ike: int
    esp: int
    keepalives: int
    runts: int
    markers_inserted: int
    handed_back: int
    errors: int

    def __init__(self) -> None:
        self.ike = self.esp = self.keepalives = self.runts = 0
        self.markers_inserted = self.handed_back = self.errors = 0


class Diversion:
    """Takes the datagrams that must not reach the application: counts them, and hands ESP to its consumer.

    One per endpoint, for its backend. Any thread may call the methods, which never raise.
    """

    def __init__(self, consumer: EspConsumer | None, family: int, counters: Counters | None = None) -> None:
        self.counters: Counters = counters if counters is not None else Counters()
        self.hand_back: HandBack = HandBack(family)
        self.consumer = consumer
        self.calling: set[int] = set()
        """Identifiers of the threads that run the consumer now."""

    @property
    def wanted(self) -> bool:
        """Whether there is a consumer of ESP; without one, ESP is counted and dropped."""
        return self.consumer is not None

    @property
    def coalesce(self) -> bool:
        """Whether the consumer requests UDP_GRO on the sockets to which ESP is steered."""
        return bool(getattr(self.consumer, "coalesce", False))

    @property
    def wants_traffic_classes(self) -> bool:
        """Whether the consumer requests the outer traffic class of each packet."""
        return bool(getattr(self.consumer, "traffic_classes", False))

    def take(
        self, datagrams: list[tuple[memoryview, Address]], traffic_classes: list[int] | None = None
    ) -> None:
        """Take UDP payloads with their sources, in the order of their arrival; none is IKE.

        `traffic_classes`: one for each payload, where the caller knows them.
        """
        burst, classes = datagrams, traffic_classes
        if any(len(payload) < MARKER_LENGTH or not payload[0] for payload, _ in datagrams):
            burst, classes = self._sort_out(datagrams, traffic_classes)  # some may be runts or keepalives
        if not burst:
            return
        count = len(burst)  # computed first: no call may interrupt the +=
        self.counters.esp += count
        consumer: Any = self.consumer  # read once: another thread may change it
        if consumer is None:
            return
        if isinstance(consumer, EspInbound):
            classed = classes and getattr(consumer, "traffic_classes", False)
            self._call(consumer.inbound, burst, *((classes,) if classed else ()))
        else:
            for packet, source in burst:
                self._call(consumer, packet, source)

    def shed(self, datagrams: list[tuple[memoryview, Address]]) -> None:
        """Count datagrams that were dropped unread under overload; none is IKE."""
        burst, _ = self._sort_out(datagrams, None)
        count = len(burst)
        self.counters.esp += count
        shed: Any = getattr(self.consumer, "shed", None)
        if shed is not None:
            self._call(shed, count)

    def _sort_out(
        self, datagrams: list[tuple[memoryview, Address]], traffic_classes: list[int] | None
    ) -> tuple[list[tuple[memoryview, Address]], list[int] | None]:
        """Return the ESP among `datagrams`, and its traffic classes; count the others."""
        verdicts = [classify(payload) for payload, _ in datagrams]
        for verdict in verdicts:
            match verdict:
                case Verdict.KEEPALIVE:
                    self.counters.keepalives += 1
                case Verdict.RUNT:
                    self.counters.runts += 1
                case Verdict.IKE:  # the fault of a backend
                    self.error("IKE was lost: the backend diverted it as ESP")
        is_esp = [verdict is Verdict.ESP for verdict in verdicts]
        classes = None if traffic_classes is None else list(compress(traffic_classes, is_esp))
        return list(compress(datagrams, is_esp)), classes

    def error(self, message: str) -> None:
        """Count and log an error that no call of the application can return."""
        self.counters.errors += 1
        _log.warning("%s", message)

    def _call(self, function: Any, *arguments: object) -> None:
        thread = threading.get_ident()
        self.calling.add(thread)
        try:
            function(*arguments)
        except Exception:  # noqa: BLE001 - a fault of the consumer must not reach the receiver of IKE
            self.counters.errors += 1
            _log.exception("the consumer of ESP raised")
        finally:
            self.calling.discard(thread)
