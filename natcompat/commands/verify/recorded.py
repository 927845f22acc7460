"""Replays a recorded conversation through an endpoint, and counts IKE, ESP and drops."""

from __future__ import annotations

import secrets
import socket
from collections import Counter
from dataclasses import dataclass, field

from natcompat import backends
from natcompat.backends.base import port_of
from natcompat.commands.verify.conversation import Conversation
from natcompat.commands.verify.trials import (
    DUTY,
    FAMILY,
    LOOPBACK,
    PATIENCE,
    SENTINEL,
    SENTINEL_SPI,
    Collector,
    until,
)
from natcompat.commands.verify.words import duty_words
from natcompat.contract import MARKER_LENGTH, NON_ESP_MARKER, Performer, Verdict, classify
from natcompat.endpoint import set_nat_t_endpoint


@dataclass(frozen=True, slots=True)
class Count:
    """The number of datagrams of one verdict: recorded, and after the replay."""

    what: str
    """A verdict of the classifier (``ike``, ``esp``, ``keepalive``, ``runt``), or ``sent``: outbound IKE."""
    recorded: int
    """Datagrams in the recording, by the classifier."""
    arrived: str
    """The result here, in words."""
    performer: str
    """The performer of the duty."""
    passed: bool


@dataclass(slots=True)
class Replay:
    """The result of the replay through one backend."""

    backend: str
    mode: str = ""
    duties: dict[str, str] = field(default_factory=dict)
    counts: list[Count] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every datagram went to the place that the classifier names."""
        return bool(self.counts) and all(count.passed for count in self.counts)


def replay(backend: str, conversation: Conversation) -> Replay:
    """Send the responder's inbound datagrams to an endpoint, and its outbound ones from there, over loopback.

    Every datagram is compared, in its order. Runts and keepalives have to be counted as such where
    the process counts them, and may arrive nowhere in any case.
    """
    received = [datagram.payload for datagram in conversation.received()]
    recorded = Counter(map(classify, received))
    collector = Collector() if backends.get(backend).hands_over_esp else None
    with (
        socket.socket(FAMILY[4], socket.SOCK_DGRAM) as sock,
        socket.socket(FAMILY[4], socket.SOCK_DGRAM) as peer,
    ):
        for bound, port in ((sock, port_of(backends.get(backend)) or 0), (peer, 0)):
            bound.bind((LOOPBACK[4], port))
            bound.settimeout(PATIENCE)
        endpoint = set_nat_t_endpoint(sock, backend=backend, esp=collector)
        result = Replay(backend, endpoint.mode, duty_words(endpoint.duties))
        performers = {verdict: endpoint.duties[DUTY[verdict]].value for verdict in Verdict}
        token = SENTINEL + secrets.token_bytes(8)
        for payload in (*received, SENTINEL_SPI + token, NON_ESP_MARKER + token):
            peer.sendto(payload, sock.getsockname())
        ike = until(token, lambda: sock.recvfrom(65536))
        esp = collector.until(SENTINEL_SPI + token) if collector is not None and ike is not None else []
        stats = endpoint.stats()

        def count(verdict: Verdict, arrived: str, passed: bool) -> None:
            result.counts.append(
                Count(verdict.value, recorded[verdict], arrived, performers[verdict], passed)
            )

        expected = [payload[MARKER_LENGTH:] for payload in received if classify(payload) is Verdict.IKE]
        messages = None if ike is None else [data for data, _ in ike]
        nothing_else = messages == expected
        count(Verdict.IKE, f"{len(messages or [])} to IKE", nothing_else)
        if collector is None:
            count(Verdict.ESP, "none to IKE, so the kernel has them", nothing_else)
        else:
            packets = None if esp is None else [data for data, _ in esp]
            expected_esp = [payload for payload in received if classify(payload) is Verdict.ESP]
            count(Verdict.ESP, f"{len(packets or [])} to esp=", packets == expected_esp)
        for verdict, counted in ((Verdict.KEEPALIVE, stats.keepalives), (Verdict.RUNT, stats.runts)):
            counts_itself = performers[verdict] in (Performer.PROCESS.value, Performer.STEERING.value)
            if counts_itself and collector is not None:  # else the kernel may have taken some with the ESP
                count(verdict, f"{counted} dropped", counted == recorded[verdict])
            else:
                count(verdict, "none to IKE, so the kernel dropped them", nothing_else)
        result.counts.append(_send(sock, peer, conversation, result.duties["insert_marker"]))
    return result


def _send(sock: socket.socket, peer: socket.socket, conversation: Conversation, performer: str) -> Count:
    """Send the responder's IKE through the endpoint, and compare the datagrams on the wire."""
    wires = [
        datagram.payload for datagram in conversation.sent() if classify(datagram.payload) is Verdict.IKE
    ]
    came = []
    try:
        for wire in wires:
            sock.sendto(wire[MARKER_LENGTH:], peer.getsockname())
            came.append(peer.recv(65536))
    except TimeoutError:
        pass
    return Count("sent", len(wires), f"{len(came)} sent as IKE", performer, came == wires)
