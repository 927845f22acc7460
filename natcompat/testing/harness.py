"""Sockets, consumers and peers for the conformance suite of an endpoint."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

from natcompat import backends as registry
from natcompat.backends.base import Address, Backend, families_of, port_of
from natcompat.contract import (
    NON_ESP_MARKER,
    OUTBOUND_TABLE,
    TABLE,
)
from natcompat.endpoint import set_nat_t_endpoint
from natcompat.endpoint.endpoint import NatTEndpoint

if TYPE_CHECKING:
    import pytest


PATIENCE = 5.0
"""Seconds to wait for a datagram, a packet or an event before it counts as lost."""

LAST = b"the last datagram of the test"

SPACE = 65535


def _into(receive: Callable[[bytearray], Any]) -> bytes:
    buffer = bytearray(SPACE)
    count = receive(buffer)
    return bytes(buffer[: count[0] if isinstance(count, tuple) else count])


def _connected(sock: socket.socket, peer: Any) -> socket.socket:
    sock.connect(peer)
    return sock


RECEIVES: Mapping[str, Callable[[socket.socket], bytes]] = {
    "recv": lambda sock: sock.recv(SPACE),
    "recvfrom": lambda sock: sock.recvfrom(SPACE)[0],
    "recv_into": lambda sock: _into(sock.recv_into),
    "recvfrom_into": lambda sock: _into(sock.recvfrom_into),
    "recvmsg": lambda sock: sock.recvmsg(SPACE)[0],
    "recvmsg_into": lambda sock: _into(lambda buffer: sock.recvmsg_into([buffer])),
}
"""Every way to receive a datagram from a socket object."""

SENDS: Mapping[str, Callable[[socket.socket, bytes, Any], object]] = {
    "send": lambda sock, data, peer: _connected(sock, peer).send(data),
    "sendall": lambda sock, data, peer: _connected(sock, peer).sendall(data),
    "sendto": lambda sock, data, peer: sock.sendto(data, peer),
    "sendto with flags": lambda sock, data, peer: sock.sendto(data, 0, peer),
    "sendmsg": lambda sock, data, peer: sock.sendmsg([data[:3], data[3:]], [], 0, peer),
}
"""Every way to send a datagram from a socket object to a peer."""


class EspCollector:
    """A consumer of ESP that keeps its packets."""

    def __init__(self) -> None:
        self.packets: list[tuple[bytes, Address]] = []
        self._changed = threading.Condition()

    def __call__(self, packet: memoryview, source: Address) -> None:
        """Keep one packet; the endpoint calls this, in any thread."""
        with self._changed:
            self.packets.append((bytes(packet), source))
            self._changed.notify_all()

    def wait_for(self, count: int) -> list[tuple[bytes, Address]]:
        """Return all packets as soon as there are `count`, or those that arrived within `PATIENCE`."""
        with self._changed:
            self._changed.wait_for(lambda: len(self.packets) >= count, PATIENCE)
            return list(self.packets)


@dataclass(frozen=True, slots=True)
class Service:
    """A backend with or without a consumer of ESP: one way to serve a socket."""

    backend: Backend
    consumed: bool
    """Whether a consumer in this process takes ESP."""

    def __str__(self) -> str:
        return f"{self.backend.name}, ESP consumed" if self.consumed else self.backend.name


@dataclass(frozen=True, slots=True)
class Bench:
    """A socket with the option and a plain peer on loopback."""

    service: Service
    sock: socket.socket
    peer: socket.socket
    esp: EspCollector = field(default_factory=EspCollector)

    def switch_on(self) -> NatTEndpoint:
        """Set the option on the socket."""
        return set_nat_t_endpoint(
            self.sock, backend=self.service.backend, esp=self.esp if self.service.consumed else None
        )

    def send(self, *payloads: bytes) -> None:
        """Send UDP payloads as they are from the peer to the socket."""
        for payload in payloads:
            self.peer.sendto(payload, self.sock.getsockname())

    def delivered(self, receive: Callable[[socket.socket], bytes] = RECEIVES["recv"]) -> list[bytes]:
        """Send one last message; return all that the application receives before it."""
        self.send(NON_ESP_MARKER + LAST)
        messages = []
        while (message := receive(self.sock)) != LAST:
            messages.append(message)
        return messages

    def received_plain(self) -> list[tuple[bytes, Any]]:
        """Send the table and one last message; return all that comes without the option before that."""
        last = NON_ESP_MARKER + LAST
        self.send(*(row.payload for row in TABLE), last)
        received = []
        while (datagram := self.sock.recvfrom(SPACE))[0] != last:
            received.append(datagram)
        return received


class EndpointHarness:
    """The parameters of the suite without its tests: for tests of one's own over the same backends.

    A test method that takes ``service`` (`Service`) and ``family`` runs for every one of them and
    opens a `bench` with them; ``row``, ``outbound``, ``receive`` and ``send`` are the rows and the
    methods. A backend that says that it is not viable is skipped, with its reason.
    """

    backends: ClassVar[tuple[str | Backend, ...]]
    """Registered names or instances."""
    families: ClassVar[tuple[socket.AddressFamily, ...]] = (socket.AF_INET, socket.AF_INET6)
    hosts: ClassVar[Mapping[int, str]] = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
    """The address to bind to, by address family."""

    @classmethod
    def services(cls) -> list[Service]:
        """Return every way to serve a socket that the backends offer, viable here or not."""
        made = [registry.get(backend) if isinstance(backend, str) else backend for backend in cls.backends]
        return [
            Service(backend, consumed)
            for backend in made
            for consumed in ((False, True) if backend.hands_over_esp else (False,))
        ]

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Parametrise a test by the services, families, rows and methods in its signature; for pytest."""
        import pytest

        names = metafunc.fixturenames
        if "service" in names:
            parameters = []
            for service in self.services():
                viability = service.backend.viability()
                reason = f"{service.backend.name}: {viability.reason}"
                marks = [] if viability.viable else [pytest.mark.skip(reason=reason)]
                families = [family for family in self.families if family in families_of(service.backend)]
                if "family" not in names:
                    parameters.append(pytest.param(service, id=str(service), marks=marks))
                    continue
                for family in families:
                    together = f"{service}-{version_of(family)}"
                    parameters.append(pytest.param(service, family, id=together, marks=marks))
            metafunc.parametrize([name for name in ("service", "family") if name in names], parameters)
        elif "family" in names:
            metafunc.parametrize("family", list(self.families), ids=version_of)
        for parameter, values, name in (
            ("row", TABLE, lambda row: row.name),
            ("outbound", OUTBOUND_TABLE, lambda row: row.name),
            ("receive", _there_are(RECEIVES), str),
            ("send", _there_are(SENDS), str),
        ):
            if parameter in names:
                metafunc.parametrize(parameter, list(values), ids=list(map(name, values)))

    def address(self, service: Service, family: int) -> Address:
        """Return the address to bind to: port 0, or the only port that the backend serves."""
        return self.hosts[family], port_of(service.backend) or 0

    @contextlib.contextmanager
    def bench(self, service: Service, family: int, *, bound: bool = True) -> Iterator[Bench]:
        """Open a socket and its peer, both with a timeout; the option is still to be set."""
        host, port = self.address(service, family)
        with (
            socket.socket(family, socket.SOCK_DGRAM) as sock,
            socket.socket(family, socket.SOCK_DGRAM) as peer,
        ):
            for member in (sock, peer):
                member.settimeout(PATIENCE)
            peer.bind((host, 0))
            if bound:
                sock.bind((host, port))
            yield Bench(service, sock, peer)


def _there_are(methods: Mapping[str, object]) -> list[str]:
    """Return those of `methods` that sockets of this system have: Windows lacks some."""
    return [name for name in methods if hasattr(socket.socket, name.split()[0])]


def version_of(family: int) -> str:
    """Return "IPv4" or "IPv6"."""
    return "IPv6" if family == socket.AF_INET6 else "IPv4"
