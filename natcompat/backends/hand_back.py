"""`HandBack`: the envelopes in which IKE that came to another socket returns to the application.

IKE can come to a socket of natcompat: coalesced with ESP by GRO, or while steering begins and ends. It goes
back by the queue of the application's socket, so that `select` wakes, as a datagram that no peer can make:

| bytes | content |
|---|---|
| 4 | non-ESP marker |
| 8 | tag: recognises envelopes of this endpoint; random, not secret |
| 4, 4 | sender and its counter; a message counts once |
| 26 | source: address (16), port (2), flow information (4), scope (4) |
| 20 | destination: address (16), interface index (4); zero if unknown |
| n | message |
| 16 | HMAC-SHA-256, truncated, over everything between tag and HMAC |

Integers are in network byte order. On IPv4 sockets an address takes the first 4 of 16 bytes. From the sender
on, the layout is that of an ESP packet with NULL encryption and HMAC-SHA2-256-128, so that the C data path
(`ffi/loop/hand_back.c`) needs no hash of its own. A copy of an envelope is worthless: its content cannot be
changed, and the receiver accepts each envelope once.
"""

from __future__ import annotations

import hmac
import itertools
import os
import secrets
import socket
import struct
import threading
from collections.abc import Iterator
from typing import Final, NamedTuple, NoReturn, Protocol, TypeAlias

from natcompat.backends.consumer import Address
from natcompat.contract import MARKER_LENGTH, NON_ESP_MARKER

Destination: TypeAlias = tuple[str, int]
"""Local address to which a datagram was sent, and index of the interface by which it came."""

_TAG_LENGTH: Final = 8
_MAC_LENGTH: Final = 16
_COUNT: Final = struct.Struct("!II")  # sender, counter
_ADDRESSES: Final = struct.Struct("!16sHII16sI")
_PREFIX_LENGTH: Final = MARKER_LENGTH + _TAG_LENGTH
_MESSAGE: Final = _PREFIX_LENGTH + _COUNT.size + _ADDRESSES.size
OVERHEAD: Final = _MESSAGE + _MAC_LENGTH
"""Bytes by which an envelope is longer than the message in it."""

_WINDOW: Final = 1024  # envelopes of one sender that may overtake each other between two processors
_MOST_SENDERS: Final = 1024  # whose counters are kept: each thread of C that reads, and each process, is one
# Linux, include/uapi/linux/in.h and in6.h: only there does a backend hand back with a destination
_IP_PKTINFO: Final = 8
_IPV6_PKTINFO: Final = 50
_PACKET_INFORMATION: Final = ((socket.IPPROTO_IP, _IP_PKTINFO), (socket.IPPROTO_IPV6, _IPV6_PKTINFO))
_LAST_COUNT: Final = 0xFFFFFFFF


class Enveloped(NamedTuple):
    """The content of an envelope."""

    message: bytes
    source: Address
    destination: Destination | None

    def restore_destination(self, ancillary: list[tuple[int, int, bytes]]) -> list[tuple[int, int, bytes]]:
        """Return `ancillary` with the destination of the message, or none, in place of the envelope's."""
        if self.destination is None:
            return [item for item in ancillary if item[:2] not in _PACKET_INFORMATION]
        host, interface = self.destination
        restored = []
        for level, kind, data in ancillary:
            if (level, kind) == (socket.IPPROTO_IP, _IP_PKTINFO) and ":" not in host:
                packed = socket.inet_pton(socket.AF_INET, host)
                restored.append((level, kind, struct.pack("=i4s4s", interface, packed, packed)))
            elif (level, kind) == (socket.IPPROTO_IPV6, _IPV6_PKTINFO) and ":" in host:
                packed = socket.inet_pton(socket.AF_INET6, host)
                restored.append((level, kind, struct.pack("=16si", packed, interface)))
            else:
                restored.append((level, kind, data))
        return restored


class HandBackWay(Protocol):
    """Takes envelopes to the application's socket."""

    sock: socket.socket
    """The socket that sends."""
    address: Address
    """Address at which `sock` reaches the application's socket."""

    def send(self, envelope: bytes) -> None:
        """Send `envelope`. Never waits. Raises OSError."""
        ...

    def close(self) -> None:
        """Close the sockets of the way; the application's stays open."""
        ...


class HandBack:
    """Makes and opens the envelopes of one endpoint. Any thread, and forked children, may use it."""

    __slots__ = ("_key", "_lock", "_pid", "_sender", "_windows", "family", "prefix", "way")

    def __init__(self, family: int) -> None:
        """`family`: of the application's socket, AF_INET or AF_INET6."""
        self.family: int = family
        self.prefix: bytes = NON_ESP_MARKER + secrets.token_bytes(_TAG_LENGTH)
        """The first bytes of every envelope."""
        self.way: HandBackWay | None = None
        """The way that the backend uses, for a consumer of ESP that hands IKE back itself."""
        self._key = secrets.token_bytes(32)
        self._windows: dict[int, _Window] = {}
        self._begin_process()

    def _begin_process(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._begin_sender()

    def _begin_sender(self) -> None:
        self._sender: tuple[int, Iterator[int]] = secrets.randbits(32), itertools.count(1)

    def wrap(
        self, message: bytes | memoryview, source: Address, destination: Destination | None = None
    ) -> bytes:
        """Return the envelope that takes `message` from `source` to the application, once."""
        if self._pid != os.getpid():  # two processes must not count as one sender
            self._begin_process()
        sender, counts = self._sender
        count = next(counts)
        if count > _LAST_COUNT:
            self._begin_sender()
            return self.wrap(message, source, destination)
        host, port, *rest = source
        flow, scope = (*rest, 0, 0)[:2]
        local, interface = destination or (None, 0)
        body = b"".join(
            (
                _COUNT.pack(sender, count),
                _ADDRESSES.pack(self._packed(host), port, flow, scope, self._packed(local), interface),
                message,
            )
        )
        return b"".join((self.prefix, body, self._mac(body)))

    def open(self, datagram: bytes, *, peek: bool = False) -> Enveloped | None:
        """Return the content of an envelope; None for any other datagram, and for a copy of an envelope.

        With `peek`, the envelope stays in the queue and can be opened again.
        """
        if len(datagram) < OVERHEAD or not datagram.startswith(self.prefix):
            return None
        body = datagram[_PREFIX_LENGTH:-_MAC_LENGTH]
        if not hmac.compare_digest(self._mac(body), datagram[-_MAC_LENGTH:]):
            return None
        sender, count = _COUNT.unpack_from(body)
        if not self._is_first(sender, count, peek):
            return None
        packed, port, flow, scope, local, interface = _ADDRESSES.unpack_from(body, _COUNT.size)
        source = (self._host(packed), port) if self.family == socket.AF_INET else None
        return Enveloped(
            body[_COUNT.size + _ADDRESSES.size :],
            source or (self._host(packed), port, flow, scope),
            (self._host(local), interface) if interface else None,
        )

    def parameters(self) -> tuple[bytes, bytes, int]:
        """Return (tag, key, number of a new sender), for a sender that is not of Python."""
        return self.prefix[MARKER_LENGTH:], self._key, secrets.randbits(32)

    def _mac(self, body: bytes) -> bytes:
        return hmac.digest(self._key, body, "sha256")[:_MAC_LENGTH]

    def _is_first(self, sender: int, count: int, peek: bool) -> bool:
        if self._pid != os.getpid():
            self._begin_process()
        with self._lock:
            window = self._windows.get(sender)
            if window is None:
                if len(self._windows) >= _MOST_SENDERS:
                    del self._windows[next(iter(self._windows))]
                window = self._windows[sender] = _Window()
            return window.accepts(count, peek)

    def _packed(self, host: str | None) -> bytes:
        return b"" if host is None else socket.inet_pton(self.family, host.partition("%")[0])

    def _host(self, packed: bytes) -> str:
        return socket.inet_ntop(self.family, packed[:4] if self.family == socket.AF_INET else packed)

    def __reduce__(self) -> NoReturn:
        raise TypeError("a HandBack has a key, which is not copied")


class _Window:
    """The counts that a sender has used: all below a window, and a bit for each in the window."""

    __slots__ = ("_highest", "_seen")

    def __init__(self) -> None:
        self._highest = 0
        self._seen = 0

    def accepts(self, count: int, peek: bool) -> bool:
        """Return whether `count` is new; without `peek`, it is not from now on."""
        ahead = count - self._highest
        if ahead <= -_WINDOW or (ahead <= 0 and self._seen >> -ahead & 1):
            return False
        if peek:
            return True
        if ahead > 0:
            self._highest = count
            self._seen = (self._seen << min(ahead, _WINDOW) | 1) & ((1 << _WINDOW) - 1)
        else:
            self._seen |= 1 << -ahead
        return True
