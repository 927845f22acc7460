"""Where everything goes that is not IKE, and how IKE comes back from there."""

from __future__ import annotations

import secrets
import socket
import struct
import threading
from itertools import compress
from typing import Any

from natcompat.backends.consumer import Address, EspConsumer, EspInbound
from natcompat.contract import MARKER_LENGTH, NON_ESP_MARKER, Verdict, classify
from natcompat.errors import get_logger

_log = get_logger()


class Counters:
    """What has passed an endpoint, as plain integers; see `natcompat.Stats`.

    Incremented without a lock: one `+=` on a slot is not interrupted under the interpreter lock;
    a free-threaded interpreter may miss some when threads receive at once.
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


class HandBack:
    """The envelope in which IKE goes back from a socket of natcompat's to the application's.

    On the wire: non-ESP marker, 16 secret bytes, the original source, the message. It leaves and
    enters by loopback alone. Nobody who does not know the secret, which is per endpoint and never
    shown, can make one, so nobody can forge a source with it.
    """

    __slots__ = ("family", "prefix")

    _SOURCE = struct.Struct("!16sHII")  # address, port, flow information, scope; all in network byte order
    HEADROOM = MARKER_LENGTH + 16 + _SOURCE.size

    def __init__(self, family: int) -> None:
        self.family: int = family
        self.prefix: bytes = NON_ESP_MARKER + secrets.token_bytes(16)

    def wrap(self, message: bytes | memoryview, source: Address) -> bytes:
        """Return the datagram that carries `message` from `source` to the application's socket."""
        host, port, *rest = source
        flow, scope = (*rest, 0, 0)[:2]
        packed = socket.inet_pton(self.family, host.partition("%")[0])
        return b"".join((self.prefix, self._SOURCE.pack(packed, port, flow, scope), message))

    def unwrap(self, datagram: bytes) -> tuple[bytes, Address] | None:
        """Return message and source of what `wrap` made, or None for any other datagram."""
        if len(datagram) < self.HEADROOM or not datagram.startswith(self.prefix):
            return None
        packed, port, flow, scope = self._SOURCE.unpack_from(datagram, len(self.prefix))
        message = datagram[self.HEADROOM :]
        if self.family == socket.AF_INET:
            return message, (socket.inet_ntop(self.family, packed[:4]), port)
        host = socket.inet_ntop(self.family, packed)
        return message, (host, port, flow, scope)


class Diversion:
    """Takes what must not reach the application: counts it, hands ESP to whoever wants it.

    Backends get one per endpoint. Every method may be called from any thread and never raises.
    """

    def __init__(self, consumer: EspConsumer | None, family: int, counters: Counters | None = None) -> None:
        self.counters: Counters = counters if counters is not None else Counters()
        self.hand_back: HandBack = HandBack(family)
        self.consumer = consumer
        self.calling: set[int] = set()
        """Identifiers of the threads that are in the consumer now."""

    @property
    def wanted(self) -> bool:
        """Whether somebody takes ESP; if not it is counted and dropped, like ESP without an SA."""
        return self.consumer is not None

    @property
    def coalesce(self) -> bool:
        """Whether the consumer gains by UDP_GRO on the sockets that ESP is steered to."""
        return bool(getattr(self.consumer, "coalesce", False))

    @property
    def wants_traffic_classes(self) -> bool:
        """Whether the consumer asks for the outer traffic class of each packet."""
        return bool(getattr(self.consumer, "traffic_classes", False))

    def take(
        self, datagrams: list[tuple[memoryview, Address]], traffic_classes: list[int] | None = None
    ) -> None:
        """Take UDP payloads with their sources, in order, none of them IKE.

        `traffic_classes`: one for each, where the caller knows them.
        """
        burst, classes = datagrams, traffic_classes
        if any(len(payload) < MARKER_LENGTH or not payload[0] for payload, _ in datagrams):
            burst, classes = self._sort_out(datagrams, traffic_classes)  # some may be something else
        if not burst:
            return
        count = len(burst)  # no call between the two halves of +=
        self.counters.esp += count
        consumer: Any = self.consumer  # another thread may exchange it
        if consumer is None:
            return
        if isinstance(consumer, EspInbound):
            classed = classes and getattr(consumer, "traffic_classes", False)
            self._call(consumer.inbound, burst, *((classes,) if classed else ()))
        else:
            for packet, source in burst:
                self._call(consumer, packet, source)

    def shed(self, datagrams: list[tuple[memoryview, Address]]) -> None:
        """Count what was dropped unread, since more came than is taken; none of it is IKE."""
        burst, _ = self._sort_out(datagrams, None)
        count = len(burst)
        self.counters.esp += count
        told: Any = getattr(self.consumer, "shed", None)
        if told is not None:
            self._call(told, count)

    def _sort_out(
        self, datagrams: list[tuple[memoryview, Address]], traffic_classes: list[int] | None
    ) -> tuple[list[tuple[memoryview, Address]], list[int] | None]:
        """Return what of `datagrams` is ESP, and its traffic classes; count the others."""
        verdicts = [classify(payload) for payload, _ in datagrams]
        for verdict in verdicts:
            match verdict:
                case Verdict.KEEPALIVE:
                    self.counters.keepalives += 1
                case Verdict.RUNT:
                    self.counters.runts += 1
                case Verdict.IKE:  # a backend that diverts IKE is broken: say so, lose nothing silently
                    self.error("IKE was diverted")
        is_esp = [verdict is Verdict.ESP for verdict in verdicts]
        classes = None if traffic_classes is None else list(compress(traffic_classes, is_esp))
        return list(compress(datagrams, is_esp)), classes

    def error(self, what: str) -> None:
        """Count and log something that went wrong off the application's path."""
        self.counters.errors += 1
        _log.warning("%s", what)

    def _call(self, function: Any, *arguments: object) -> None:
        thread = threading.get_ident()
        self.calling.add(thread)
        try:
            function(*arguments)
        except Exception:  # noqa: BLE001 - the consumer's fault must not reach the receiver of IKE
            self.counters.errors += 1
            _log.exception("the consumer of ESP raised")
        finally:
            self.calling.discard(thread)
