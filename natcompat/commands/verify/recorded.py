"""A recorded conversation through an endpoint: what goes to IKE, what to ESP, and what is dropped."""

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
    """How many datagrams of one verdict."""

    what: str
    """A verdict of the classifier (``ike``, ``esp``, ``keepalive``, ``runt``); ``sent``: IKE of its own."""
    recorded: int
    """In the recording, by the classifier."""
    arrived: str
    """What became of them here."""
    performer: str
    """Who did the duty."""
    passed: bool


@dataclass(slots=True)
class Replay:
    """The recording through one backend."""

    backend: str
    mode: str = ""
    duties: dict[str, str] = field(default_factory=dict)
    counts: list[Count] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether every datagram went where the classifier says."""
        return bool(self.counts) and all(each.passed for each in self.counts)


def replay(backend: str, conversation: Conversation) -> Replay:
    """Send what the responder received, and let it send what it sent, over loopback.

    Every datagram is compared, in its order. Runts and keepalives have to be counted as such where
    the process counts them, and may arrive nowhere in any case.
    """
    received = [each.payload for each in conversation.received()]
    recorded = Counter(map(classify, received))
    collector = Collector() if backends.get(backend).hands_over_esp else None
    with (
        socket.socket(FAMILY[4], socket.SOCK_DGRAM) as sock,
        socket.socket(FAMILY[4], socket.SOCK_DGRAM) as peer,
    ):
        for each, port in ((sock, port_of(backends.get(backend)) or 0), (peer, 0)):
            each.bind((LOOPBACK[4], port))
            each.settimeout(PATIENCE)
        endpoint = set_nat_t_endpoint(sock, backend=backend, esp=collector)
        found = Replay(backend, endpoint.mode, duty_words(endpoint.duties))
        performers = {verdict: endpoint.duties[DUTY[verdict]].value for verdict in Verdict}
        token = SENTINEL + secrets.token_bytes(8)
        for payload in (*received, SENTINEL_SPI + token, NON_ESP_MARKER + token):
            peer.sendto(payload, sock.getsockname())
        ike = until(token, lambda: sock.recvfrom(65536))
        esp = collector.until(SENTINEL_SPI + token) if collector is not None and ike is not None else []
        stats = endpoint.stats()

        def count(verdict: Verdict, arrived: str, passed: bool) -> None:
            found.counts.append(Count(verdict.value, recorded[verdict], arrived, performers[verdict], passed))

        expected = [each[MARKER_LENGTH:] for each in received if classify(each) is Verdict.IKE]
        messages = None if ike is None else [data for data, _ in ike]
        nothing_else = messages == expected
        count(Verdict.IKE, f"{len(messages or [])} to IKE", nothing_else)
        if collector is None:
            count(Verdict.ESP, "none to IKE, so the kernel has them", nothing_else)
        else:
            packets = None if esp is None else [data for data, _ in esp]
            wanted = [each for each in received if classify(each) is Verdict.ESP]
            count(Verdict.ESP, f"{len(packets or [])} to esp=", packets == wanted)
        for verdict, counted in ((Verdict.KEEPALIVE, stats.keepalives), (Verdict.RUNT, stats.runts)):
            counts_itself = performers[verdict] in (Performer.PROCESS.value, Performer.STEERING.value)
            if counts_itself and collector is not None:  # else the kernel may have taken some with the ESP
                count(verdict, f"{counted} dropped", counted == recorded[verdict])
            else:
                count(verdict, "none to IKE, so the kernel dropped them", nothing_else)
        found.counts.append(_send(sock, peer, conversation, found.duties["insert_marker"]))
    return found


def _send(sock: socket.socket, peer: socket.socket, conversation: Conversation, performer: str) -> Count:
    """Let the endpoint send the IKE of the responder, and compare what is on the wire with the recording."""
    wires = [each.payload for each in conversation.sent() if classify(each.payload) is Verdict.IKE]
    came = []
    try:
        for wire in wires:
            sock.sendto(wire[MARKER_LENGTH:], peer.getsockname())
            came.append(peer.recv(65536))
    except TimeoutError:
        pass
    return Count("sent", len(wires), f"{len(came)} sent as IKE", performer, came == wires)
