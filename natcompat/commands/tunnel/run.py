"""Runs a tunnel in the foreground, and takes everything down at its end."""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from natcompat.commands.ipsec.lines import Rates
from natcompat.commands.tunnel.display import Reporter
from natcompat.commands.tunnel.file import Endpoint, Tunnel
from natcompat.commands.tunnel.keepalive import DEFAULT_INTERVAL, KeepAlive
from natcompat.commands.tunnel.log import DropLog, log_down, log_event, log_up
from natcompat.commands.tunnel.reserve import Numbers, Reservations
from natcompat.commands.tunnel.signals import Ended, EndingSignals
from natcompat.commands.tunnel.state import LearntPeer, StateFile
from natcompat.commands.tunnel.status import Status
from natcompat.errors import NatCompatError, get_logger
from natcompat.esp.control_socket import ControlSocket
from natcompat.ipsec import (
    Direction,
    Event,
    Events,
    Expire,
    InstalledSA,
    IntegrityFailure,
    IPAddress,
    IPsec,
    MappingChange,
    SaId,
    SecurityAssociation,
)
from natcompat.ipsec.describe import describe_sa

_MOST_AT_ONCE = 64
_ONE_SERIES = 10.0
"""Seconds within which two reports of integrity failures of one SA are about the same series."""
_log = get_logger()


class Side(Protocol):
    """One end of a tunnel: its SAs, policies and device, in the kernel or in this process."""

    device: str | None
    """The name of the TUN device."""
    mtu: int | None
    permit: Callable[[SaId, int], object] | None
    """Let an SA use sequence numbers up to this one; None: it takes no such limit."""

    @property
    def ipsec(self) -> IPsec:
        """The SAs and policies."""
        ...

    def add_sa(self, sa: SecurityAssociation, sequence: int | None, permitted: int | None) -> None:
        """Install an SA that goes on behind `sequence`, and may use numbers up to `permitted`."""

    def open_device(self) -> None:
        """Bring up addresses and routes for inner packets."""

    def installed(self) -> Sequence[InstalledSA]:
        """Return the SAs of this tunnel that are there."""

    def numbers(self) -> Numbers:
        """Return the current names of the SAs, and the last number sent or highest received of each."""

    def drops(self) -> Mapping[str, int]:
        """Return the number of dropped packets by cause."""

    def send_dummy(self, sa_id: SaId) -> None:
        """Send a dummy packet by an outbound SA."""

    def start_at(self, address: IPAddress, port: int) -> None:
        """Let the SAs begin at an address of the peer that an earlier run has learnt."""

    def follow(self, event: MappingChange) -> None:
        """Send to the new address of the peer."""

    def stop(self) -> Numbers:
        """Stop sealing; return the numbers of those SAs whose numbers are final."""

    def close(self) -> None:
        """Remove SAs, policies, device, addresses and routes."""


def run(tunnel: Tunnel, *, create_state: bool, interval: float, count: int | None, reporter: Reporter) -> int:
    """Run `tunnel` in the foreground until a signal or `count` rounds end it; return the exit status.

    Raises `NatCompatError` if it cannot come up, and has changed nothing then.
    """
    with EndingSignals() as signals, contextlib.ExitStack() as stack:
        stack.callback(reporter.close)
        state = stack.enter_context(StateFile(tunnel.state, create=create_state)) if tunnel.state else None
        if create_state and state is None:
            raise NatCompatError(errno.EINVAL, "the file names no state file", "Leave --create-state out")
        with contextlib.ExitStack() as unused:
            if create_state and state is not None:
                unused.callback(state.discard)
            sock = stack.enter_context(open_socket(tunnel.endpoint))
            side = stack.enter_context(contextlib.closing(open_side(tunnel, sock)))
            unused.pop_all()
        foreground = _Foreground(tunnel, side, sock, signals, reporter, state)
        reservations = _install(tunnel, side, state, foreground.complain)
        if reservations is not None:
            stack.callback(_finish, reservations, side)
            stack.callback(reservations.close)
            reservations.start()
        events = stack.enter_context(side.ipsec.events())
        side.open_device()
        _start_at_learnt_peer(tunnel, side, state)
        keepalive = _make_keepalive(tunnel, side, foreground.note)
        stack.callback(keepalive.close)
        keepalive.start()
        control = ControlSocket({"tunnel": Status(tunnel, side, keepalive)})
        stack.callback(control.close)
        control.start()
        try:
            return foreground.serve(events, interval, count)
        except Ended:
            return 128 + signals.number


def open_socket(endpoint: Endpoint) -> socket.socket:
    """Return a UDP socket that is bound to the local end."""
    address, port = str(endpoint.local_address), endpoint.local_port
    family = socket.AF_INET if endpoint.local_address.version == 4 else socket.AF_INET6
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.bind((address, port))
    except OSError as error:
        sock.close()
        remedies = {
            errno.EADDRINUSE: "End who has it (natcompat doctor tells), or choose another local_port",
            errno.EADDRNOTAVAIL: "Let local_address be one that this host has (ip address)",
            errno.EACCES: "Choose a local_port above 1023, or run as root",
        }
        raise NatCompatError(
            error.errno or errno.EIO,
            f"{address} port {port} cannot be bound: {error.strerror}",
            remedies.get(error.errno or 0, ""),
        ) from None
    sock.setblocking(False)
    return sock


def open_side(tunnel: Tunnel, sock: socket.socket) -> Side:
    """Open the IPsec that the file asks for, and put its policies there."""
    if tunnel.endpoint.backend == "linux":
        from natcompat.commands.tunnel.kernel import KernelSide

        return KernelSide(tunnel, sock)
    from natcompat.commands.tunnel.process import ProcessSide

    return ProcessSide(tunnel, sock)


def _install(
    tunnel: Tunnel, side: Side, state: StateFile | None, complain: Callable[[str], object]
) -> Reservations | None:
    """Install the SAs, inbound ones first: nobody shall send before the other can receive."""
    reservations = None
    numbers = {}
    if state is not None:
        reservations = Reservations(
            state, tunnel.associations, numbers=side.numbers, permit=side.permit, complain=complain
        )
        numbers = reservations.begin()
    for sa in sorted(tunnel.associations, key=lambda sa: sa.direction is Direction.OUT):
        sequence, permitted = numbers.get((sa.direction, sa.spi), (None, None))
        side.add_sa(sa, sequence, permitted)
    return reservations


def _start_at_learnt_peer(tunnel: Tunnel, side: Side, state: StateFile | None) -> None:
    """Go on where the peer was last, if mappings are followed: it may be long until the peer sends."""
    endpoint = tunnel.endpoint
    if state is None or not endpoint.follow_mapping:
        return
    learnt = state.peer((str(endpoint.remote_address), endpoint.remote_port))
    if learnt is not None and learnt.address.version == endpoint.remote_address.version:
        _log.info("the peer was last seen at %s port %d", learnt.address, learnt.port)
        side.start_at(learnt.address, learnt.port)


def _make_keepalive(tunnel: Tunnel, side: Side, report: Callable[[Event], object]) -> KeepAlive:
    sends = tunnel.endpoint.keepalive == "esp"
    return KeepAlive(
        side,
        intervals={
            sa.spi: sa.nat_keepalive or DEFAULT_INTERVAL
            for sa in tunnel.associations
            if sends and sa.direction is Direction.OUT
        },
        silence=tunnel.endpoint.silence,
        report=report,
    )


def _finish(reservations: Reservations, side: Side) -> None:
    with contextlib.suppress(OSError):  # the file then says what may have been used, which is right, too
        reservations.finish(side.stop())


class _Foreground:
    """The main thread of a running tunnel: shows events and counters, and waits for the end."""

    def __init__(
        self,
        tunnel: Tunnel,
        side: Side,
        sock: socket.socket,
        signals: EndingSignals,
        reporter: Reporter,
        state: StateFile | None,
    ) -> None:
        self._state = state
        self._noted: deque[Event] = deque()
        self._failures: dict[int, float] = {}
        """When an integrity failure was shown last, by SPI."""
        self._tunnel, self._side, self._sock = tunnel, side, sock
        self._signals, self._reporter = signals, reporter
        self._complaints: deque[str] = deque()
        self._drops = DropLog()
        self._rates = Rates(lambda row: (row.get("direction"), row["spi"]))  # its addresses may change

    def complain(self, text: str) -> None:
        """Have `text` written, by the main thread: a write may wait for its reader. From any thread."""
        self._complaints.append(text)
        self._signals.wake()

    def note(self, event: Event) -> None:
        """Have `event` shown and logged, by the main thread. From any thread."""
        self._noted.append(event)
        self._signals.wake()

    def serve(self, events: Events, interval: float, count: int | None) -> int:
        """Return the exit status when it is over."""
        log_up(self._tunnel, self._side.device, self._side.mtu)
        with self._signals.writing():
            self._reporter.up(self._tunnel, self._side.device, self._side.mtu)
        status = self._serve(events, interval, count)
        log_down(self._tunnel, status)
        with self._signals.writing():
            self._reporter.down(status)
        return status

    def _serve(self, events: Events, interval: float, count: int | None) -> int:
        sources: list[Any] = [self._sock, events, self._signals]
        finished, due = 0, time.monotonic()
        while not self._signals.number:
            if time.monotonic() >= due:
                installed = self._side.installed()
                with self._signals.writing():
                    lines = self._rates.lines(map(describe_sa, installed))
                    drops = self._side.drops()
                    self._drops.log(drops)
                    self._reporter.counters(lines, drops)
                finished += 1
                if finished == count:
                    return 0
                if not installed:
                    self._warn("the last SA has expired")
                    return 1
                due += interval * max(1, (time.monotonic() - due) // interval)
            wait = max(0.0, due - time.monotonic())
            ready = select.select(sources, [], [], wait)[0]
            if self._sock in ready:
                _drain(self._sock)
            if self._signals in ready:
                self._signals.rest()
            while self._complaints:
                self._warn(self._complaints.popleft())
            while self._noted:
                self._handle(self._noted.popleft())
            for event in events.read() if events in ready else ():
                self._handle(event)
                if isinstance(event, Expire) and event.hard:
                    due = min(due, time.monotonic())
        return 128 + self._signals.number

    def _handle(self, event: Event) -> None:
        if isinstance(event, IntegrityFailure) and self._is_known(event):
            return
        with self._signals.writing():
            self._reporter.event(event)
        log_event(event)
        if isinstance(event, MappingChange) and self._tunnel.endpoint.follow_mapping:
            try:
                self._side.follow(event)
                self._remember(event)
            except NatCompatError as error:
                self._warn(f"{error.strerror}. {error.remedy}")

    def _is_known(self, event: IntegrityFailure) -> bool:
        """Return whether this series was shown a moment ago: the engine and the counters report it both."""
        now, before = time.monotonic(), self._failures.get(event.sa_id.spi, float("-inf"))
        self._failures[event.sa_id.spi] = now
        return now - before < _ONE_SERIES

    def _remember(self, event: MappingChange) -> None:
        """Keep the address of the peer for the next start."""
        if self._state is not None:
            endpoint = self._tunnel.endpoint
            configured = str(endpoint.remote_address), endpoint.remote_port
            self._state.record_peer(LearntPeer(configured, event.new_address, event.new_port))

    def _warn(self, text: str) -> None:
        _log.info("%s", text)
        with self._signals.writing():
            self._reporter.warn(text)


def _drain(sock: socket.socket) -> None:
    """Drop IKE, since nobody speaks it here; ESP in line is taken out of it on the way."""
    with contextlib.suppress(OSError):
        for _ in range(_MOST_AT_ONCE):
            sock.recv(65535)
