"""The trials of ``natcompat verify``: the contract, row by row, on real sockets.

A `Trial` is one backend on one path (loopback, or through a NAT) with one IP version. Evidence needs
no waiting: behind each row go an ESP packet and an IKE message that nobody else sends, the sentinels;
what arrives before them is what became of the row. A plain socket, the witness, gets a datagram on
the same path to tell that the row has been through the kernel, so that `select` can be asked
whether it woke.
"""

from __future__ import annotations

import itertools
import queue
import secrets
import select
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, Final

from natcompat import backends
from natcompat.backends.base import port_of
from natcompat.commands.verify.values import Outcome, Trial, TrialPath
from natcompat.commands.verify.words import (
    TIMED_OUT,
    Address,
    describe_error,
    duty_words,
    errno_of,
    in_words,
    octets,
    show_bytes,
)
from natcompat.contract import (
    LARGEST_PAYLOAD,
    NAT_KEEPALIVE,
    NON_ESP_MARKER,
    OUTBOUND_TABLE,
    TABLE,
    UDP_NAT_T_ENDPOINT,
    Duty,
    OutboundRow,
    Performer,
    Row,
    Verdict,
)
from natcompat.endpoint import set_nat_t_endpoint
from natcompat.endpoint.endpoint import NatTEndpoint

FAMILY: Final = {4: socket.AF_INET, 6: socket.AF_INET6}
LOOPBACK: Final = {4: "127.0.0.1", 6: "::1"}

PATIENCE: Final = 5.0  # seconds for a datagram that has to come
_MOST_LOSSES: Final = 3  # sentinels that may be missed before a trial is given up
_ROOM: Final = 65536
_UDP_ENCAP: Final = 100  # linux/udp.h
_GIVEN_UP: Final = "not tried any more"
SENTINEL: Final = b"sentinel"
SENTINEL_SPI: Final = b"\xff\xff\xff\xfe"

DUTY: Final = {
    Verdict.KEEPALIVE: Duty.DROP_RUNTS,
    Verdict.RUNT: Duty.DROP_RUNTS,
    Verdict.IKE: Duty.STRIP_MARKER,
    Verdict.ESP: Duty.DIVERT_ESP,
}


class Collector:
    """A consumer of ESP that keeps its packets."""

    def __init__(self) -> None:
        self.packets: queue.SimpleQueue[tuple[bytes, Address]] = queue.SimpleQueue()

    def __call__(self, packet: memoryview, source: Address) -> None:
        """Keep one packet; the endpoint calls this."""
        self.packets.put((bytes(packet), source))

    def until(self, sentinel: bytes) -> list[tuple[bytes, Address]] | None:
        """Return the packets before `sentinel`; None if the sentinel does not arrive in time."""
        return until(sentinel, lambda: self.packets.get(timeout=PATIENCE))


def run(backend: str, version: int, path: TrialPath, peer: socket.socket) -> Trial:
    """Send every row to an endpoint of `backend` and from it; `peer` is a plain socket at the other end.

    Runs in the network namespace of the endpoint; the `peer` may be in another. Raises
    `natcompat.errors.BackendUnavailableError` if the backend is not viable there.
    """
    trial = Trial(backend, path.name, version)
    with (
        socket.socket(FAMILY[version], socket.SOCK_DGRAM) as sock,
        socket.socket(FAMILY[version], socket.SOCK_DGRAM) as witness,
        socket.socket(FAMILY[version], socket.SOCK_DGRAM) as other,
    ):
        only = port_of(backends.get(backend))
        sock.bind((path.host, only or path.port))
        witness.bind((path.host, 0))
        if only is None:  # else it would be bound to another port than the only one
            other.bind((path.host, 0))
        for bound in (sock, witness, other):
            bound.settimeout(PATIENCE)
        peer.settimeout(PATIENCE)
        collector = Collector() if backends.get(backend).hands_over_esp else None
        _Run(trial, path, sock, witness, other, peer, collector).all()
    return trial


class _Run:
    """The sockets of one trial, and its checks."""

    def __init__(
        self,
        trial: Trial,
        path: TrialPath,
        sock: socket.socket,
        witness: socket.socket,
        other: socket.socket,
        peer: socket.socket,
        collector: Collector | None,
    ) -> None:
        self.trial, self.sock, self.witness, self.other, self.peer = trial, sock, witness, other, peer
        self.collector = collector
        self.numbers = itertools.count()
        self.losses = 0
        peer_address = (path.peer_host, peer.getsockname()[1])
        # before the option is set: where a backend is broken these still meet
        self.reach, self.seen = introduce(sock, peer, peer_address, path.endpoint_begins)
        self.witness_reach, _ = introduce(witness, peer, peer_address, path.endpoint_begins)
        self.endpoint: NatTEndpoint = set_nat_t_endpoint(sock, backend=trial.backend, esp=collector)
        self.duties = self.endpoint.duties
        trial.mode, trial.reason = self.endpoint.mode, self.endpoint.reason
        trial.duties = duty_words(self.duties)

    def all(self) -> None:
        """Run every check."""
        for step in (*map(self._inbound, TABLE), *map(self._outbound, OUTBOUND_TABLE), self._on_the_socket()):
            for outcome in step:
                self.trial.outcomes.append(outcome)

    # --- inbound -------------------------------------------------------------------------------

    def _inbound(self, row: Row) -> Iterator[Outcome]:
        duty = DUTY[row.verdict]
        performer = self.duties[duty]
        solaris = as_solaris_says(row)
        if self.losses >= _MOST_LOSSES:
            yield self._outcome("inbound", row.name, row.payload, solaris, _GIVEN_UP, performer)
            return
        self.peer.sendto(row.payload, self.reach)
        woke = self._woke() if row.delivered is None else None
        arrived, diverted = self._sentinels()
        expected = [] if row.delivered is None else [(row.delivered, self.seen)]
        # a backend whose kernel has ESP hands none over: then it must be nowhere in this process
        expected_esp = [(row.payload, self.seen)] if self.collector and row.verdict is Verdict.ESP else []
        if arrived is None or diverted is None:
            self.losses += 1
            passed, words = False, "what was sent behind it did not arrive"
        else:
            passed = arrived == expected and diverted == expected_esp
            words = in_words(arrived, diverted, self.seen, in_full=not passed)
            if woke and performer is not Performer.PROCESS and row.name not in self.endpoint.leaks:
                passed, words = False, f"{words}, but select woke for it"
        yield self._outcome("inbound", row.name, row.payload, solaris, words, performer, woke, passed)

    def _woke(self) -> bool:
        """Return whether `select` finds the endpoint readable after every datagram has been processed."""
        token = secrets.token_bytes(8)
        self.peer.sendto(token, self.witness_reach)
        try:
            while self.witness.recv(_ROOM) != token:
                pass
        except TimeoutError:
            return False  # the sentinels will say what is the matter
        return bool(select.select([self.sock], [], [], 0)[0])

    def _sentinels(self) -> tuple[list[Any] | None, list[Any] | None]:
        """Send the sentinels; return the datagrams before them: IKE and ESP."""
        token = SENTINEL + secrets.token_bytes(8)
        esp = SENTINEL_SPI + token
        if self.collector is not None:
            self.peer.sendto(esp, self.reach)
        self.peer.sendto(NON_ESP_MARKER + token, self.reach)
        arrived = until(token, lambda: self.sock.recvfrom(_ROOM))
        diverted = self.collector.until(esp) if self.collector is not None and arrived is not None else []
        return arrived, diverted

    # --- outbound ------------------------------------------------------------------------------

    def _outbound(self, row: OutboundRow) -> Iterator[Outcome]:
        yield self._sent("outbound", row.name, row.message, row.wire, f"marker, {octets(len(row.message))}")

    def _sent(self, section: str, name: str, message: bytes, wire: bytes, solaris: str) -> Outcome:
        performer = self.duties[Duty.INSERT_MARKER]
        if self.losses >= _MOST_LOSSES:
            return self._outcome(section, name, message, solaris, _GIVEN_UP, performer)
        token = SENTINEL + secrets.token_bytes(8)
        try:
            returned = self.sock.sendto(message, self.seen)
            self.sock.sendto(token, self.seen)
            datagrams = until(token, lambda: self.peer.recvfrom(_ROOM), suffix=True)
        except OSError as error:
            return self._outcome(section, name, message, solaris, describe_error(error), performer)
        if datagrams is None:
            self.losses += 1
            arrived = "what was sent behind it did not arrive"
        elif datagrams == [(wire, self.reach)]:
            arrived = solaris if returned == len(message) else f"{solaris}, but the send returned {returned}"
        else:
            arrived = "on the wire: " + (", ".join(show_bytes(data) for data, _ in datagrams) or "nothing")
        return self._outcome(section, name, message, solaris, arrived, performer)

    # --- the socket ----------------------------------------------------------------------------

    def _on_the_socket(self) -> Iterator[Outcome]:
        process = Performer.PROCESS
        read = self.sock.getsockopt(socket.IPPROTO_UDP, UDP_NAT_T_ENDPOINT)
        yield self._outcome("socket", "option read back", None, "1", str(read), process)
        most = LARGEST_PAYLOAD[self.trial.version]
        message = secrets.token_bytes(1 << 12).ljust(most, b"\xa5")
        yield self._sent(
            "socket", "largest message", message, NON_ESP_MARKER + message, f"marker, {octets(most)}"
        )
        arrived = errno_of(lambda: self.sock.sendto(bytes(most + 1), self.seen))
        yield self._outcome("socket", "one byte more", bytes(most + 1), "EMSGSIZE", arrived, process)
        yield self._to_a_closed_port()
        yield self._switched_off()

    def _to_a_closed_port(self) -> Outcome:
        """Send to an unbound port: the ICMP error has to surface as on any UDP socket.

        Linux shows such errors to no socket with UDP_ENCAP. Whether this is one, and whether that is
        so, a plain socket with that option tells.
        """
        with socket.socket(self.peer.family, socket.SOCK_DGRAM) as closed:
            closed.bind((self.sock.getsockname()[0], 0))
            address = self.seen[0], closed.getsockname()[1]
        set_nat_t_endpoint(self.other, backend=self.trial.backend)
        arrived = _refused(self.other, address)
        outcome = self._outcome("socket", "to a closed port", None, "ECONNREFUSED", arrived, Performer.KERNEL)
        encapsulation = _encapsulation(self.other)
        if outcome.passed or not encapsulation:
            return outcome
        with socket.socket(self.peer.family, socket.SOCK_DGRAM) as plain:
            plain.setsockopt(socket.IPPROTO_UDP, _UDP_ENCAP, encapsulation)
            plain.bind((self.sock.getsockname()[0], 0))
            if _refused(plain, address) != arrived:
                return outcome
        limit = (
            "The kernel shows ICMP errors to no socket with UDP_ENCAP, so that a peer who is gone is silent."
        )
        return replace(outcome, passed=True, limit=limit)

    def _switched_off(self) -> Outcome:
        """Switch the option off, and send one datagram of each kind both ways."""
        self.endpoint.close()
        datagrams = [NAT_KEEPALIVE, b"", NON_ESP_MARKER + b"IKE", b"\xc0\xde\x00\x01" + bytes(28)]
        limit = ""
        expected = datagrams
        if port_of(backends.get(self.trial.backend)):  # not even this process's any more
            expected = [datagram for datagram in datagrams if datagram.startswith(NON_ESP_MARKER)]
            limit = "The kernel takes ESP from every socket of this port, with the option or without."
        try:
            for datagram in datagrams:
                self.peer.sendto(datagram, self.reach)
            came = [self.sock.recv(_ROOM) for _ in expected]
            for datagram in datagrams:
                self.sock.sendto(datagram, self.seen)
            went = [self.peer.recv(_ROOM) for _ in datagrams]
        except OSError as error:
            arrived = describe_error(error)
        else:
            same = came == expected and went == datagrams
            arrived = "all as sent" if same else f"came {came}, went {went}"
        outcome = self._outcome(
            "socket", "switched off again", None, "all as sent", arrived, Performer.KERNEL
        )
        return replace(outcome, limit=limit) if outcome.passed else outcome

    def _outcome(
        self,
        section: str,
        row: str,
        sent: bytes | None,
        solaris: str,
        arrived: str,
        performer: Performer,
        woke: bool | None = None,
        passed: bool | None = None,
    ) -> Outcome:
        """Return the outcome; `passed` None: it passed if `arrived` and `solaris` are equal."""
        words = "" if sent is None else show_bytes(sent)
        passed = arrived == solaris if passed is None else passed
        return Outcome(section, row, words, solaris, arrived, performer.value, woke, passed)


def _refused(sock: socket.socket, address: Address) -> str:
    """Return the error of `sock` after it was connected to the unbound `address`."""
    sock.settimeout(0.3)
    sock.connect(address)

    def ask() -> object:
        sock.send(b"is anybody there?")
        return sock.recv(_ROOM)

    for _ in range(4):  # an error that comes late surfaces in the next call
        answer = errno_of(ask)
        if answer != TIMED_OUT:
            break
    return answer


def _encapsulation(sock: socket.socket) -> int:
    """Return the value of UDP_ENCAP; 0 where there is no such option."""
    if sys.platform != "linux":
        return 0
    try:
        return sock.getsockopt(socket.IPPROTO_UDP, _UDP_ENCAP)
    except OSError:
        return 0


def introduce(
    sock: socket.socket, peer: socket.socket, peer_address: Address, sock_begins: bool
) -> tuple[Address, Address]:
    """Exchange one datagram; return the address of `sock` for `peer`, and of `peer` for `sock`."""
    token = NON_ESP_MARKER + secrets.token_bytes(8)  # some kernels take ESP from plain sockets
    if sock_begins:
        sock.sendto(token, peer_address)
        receiver = peer
    else:
        peer.sendto(token, sock.getsockname())
        receiver = sock
    while True:
        data, source = receiver.recvfrom(_ROOM)
        if data == token:
            break
    if sock_begins:
        return source, (*peer_address, *sock.getsockname()[2:])
    return sock.getsockname(), source


def until(sentinel: bytes, receive: Any, *, suffix: bool = False) -> list[Any] | None:
    """Return the datagrams before `sentinel`, without earlier sentinels; None: it does not arrive."""
    before: list[Any] = []
    try:
        while True:
            data, source = receive()
            if data == sentinel or (suffix and data.endswith(sentinel)):
                return before
            if SENTINEL not in data[:16]:
                before.append((data, source))
    except (TimeoutError, queue.Empty):
        return None


def as_solaris_says(row: Row) -> str:
    """Return what Solaris does with the datagram of `row`."""
    if row.verdict is Verdict.ESP:
        return "to ESP"
    return "dropped" if row.delivered is None else f"IKE, {octets(len(row.delivered))}"
