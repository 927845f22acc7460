"""The state of an SA that both directions have in common, on the portable data path.

All of it changes under the lock of the SA. Expiries and a new mapping are noted in `due`; the engine acts on
them when the lock is free.
"""

from __future__ import annotations

import threading
import time
from abc import abstractmethod
from collections.abc import Sequence
from struct import Struct
from typing import Final, NoReturn

from natcompat.esp.engine import packet as packets
from natcompat.esp.engine.association import (
    HARD,
    SOFT,
    UNLIMITED,
    Address,
    Association,
    Link,
)
from natcompat.esp.engine.crypto import HEADER_LENGTH, Cipher, make_cipher
from natcompat.ipsec import Mode, SecurityAssociation, Usage

IV_MASK: Final = (1 << 64) - 1
HEADER: Final = Struct("!II")
HEADER_AND_IV: Final = Struct("!IIQ")
INNER_VERSIONS: Final = {packets.IPV4: 4, packets.IPV6: 6}
"""IP version by next header."""
LARGEST_UDP_PAYLOAD: Final = {4: 65535 - 20 - 8, 6: 65535 - 8}


class WipedCipher:
    """The cipher of an SA that is over: nothing is sealed or opened any more, and no key is held."""

    __slots__ = ()
    iv_length = icv_length = 0
    block_length = 1

    def seal(self, prefix: bytes, plaintext: bytes, high: bytes) -> NoReturn:
        """Refuse: an SA that is over looks at `gone` first."""
        raise RuntimeError("this SA is over")

    def open(self, packet: bytes, high: bytes) -> None:
        """Return None: no packet is authentic."""


class PortableAssociation(Association):
    """An SA whose state is in Python."""

    __slots__ = (
        "_esn",
        "_fixed",
        "_remainder",
        "_tunnel",
        "added",
        "cipher",
        "due",
        "first_used",
        "gone",
        "integrity_drops",
        "last_used",
        "lock",
        "moved_to",
        "next_bytes",
        "next_packets",
        "octets",
        "packets",
        "replay_drops",
        "soft",
        "window_drops",
    )
    highest: int
    """The sequence number of the last packet sent, or the highest received."""
    gone: bool
    soft: bool
    due: int
    packets: int
    octets: int
    replay_drops: int
    window_drops: int
    integrity_drops: int
    next_packets: int
    next_bytes: int

    def __init__(self, sa: SecurityAssociation, link: Link) -> None:
        self.cipher: Cipher = make_cipher(sa.encryption, sa.encryption_key, sa.integrity, sa.integrity_key)
        self.lock: threading.Lock = threading.Lock()
        self._fixed = HEADER_LENGTH + self.cipher.iv_length + self.cipher.icv_length
        self._remainder = self.cipher.block_length - 1  # blocks are powers of two
        self._esn, self._tunnel = sa.esn, sa.mode is Mode.TUNNEL
        self.gone = self.soft = False
        self.moved_to: Address = ()
        """Where the newest authentic packet came from, unless from the address of the SA."""
        self.due = 0
        self.packets = self.octets = 0
        self.replay_drops = self.window_drops = self.integrity_drops = 0
        self.added: float = time.time()
        self.first_used: float | None = None
        self.last_used: float | None = None
        super().__init__(sa, link)

    @property
    def moved(self) -> bool:
        """Whether the newest authentic packet came from another address than that of the SA."""
        return bool(self.moved_to)

    def place(self, sa: SecurityAssociation, link: Link) -> None:
        """Take the addresses and ports of `sa`."""
        with self.lock:
            super().place(sa, link)
            self._set_limits()
            self._placed()

    @abstractmethod
    def _placed(self) -> None:
        """Derive again what depends on addresses and ports. The lock is held."""

    def _set_limits(self) -> None:
        """Set the next limits: the soft ones, and once they are reached the hard ones."""
        lifetime = self.sa.lifetime
        packets, octets = lifetime.hard_packets or UNLIMITED, lifetime.hard_bytes or UNLIMITED
        if not self.soft:
            packets = min(packets, lifetime.soft_packets or UNLIMITED)
            octets = min(octets, lifetime.soft_bytes or UNLIMITED)
        self.next_packets, self.next_bytes = packets, octets

    def _ample(self, run: Sequence[bytes]) -> bool:
        """Tell whether all of `run` stays below the next limit."""
        if self.packets + len(run) >= self.next_packets:
            return False
        return self.next_bytes == UNLIMITED or self.octets + sum(map(len, run)) < self.next_bytes

    def _use(self, packets: int, octets: int, now: float) -> None:
        """Count packets, and note the limits that they reach."""
        self.packets += packets
        self.octets += octets
        self.last_used = now
        if self.first_used is None:
            self.first_used = now
        if self.packets >= self.next_packets or self.octets >= self.next_bytes:
            lifetime = self.sa.lifetime
            most, largest = lifetime.hard_packets or UNLIMITED, lifetime.hard_bytes or UNLIMITED
            self._expire(hard=self.packets >= most or self.octets >= largest)

    def expire(self, *, hard: bool) -> None:
        """Note that a limit is reached; at the hard one this SA is over."""
        with self.lock:
            self._expire(hard=hard)

    def _expire(self, *, hard: bool) -> None:
        if hard:
            self.gone = True
            self.due |= HARD
        elif not self.soft:
            self.soft = True
            self.due |= SOFT
            self._set_limits()

    def take_due(self) -> tuple[int, Address]:
        """Return the bits of `due`, and with MOVED the new (address, port); clear them."""
        with self.lock:
            due, self.due = self.due, 0
            return due, self.moved_to

    def retire(self) -> None:
        """End this SA, and let go of its keys."""
        with self.lock:
            self.gone = True
            self.cipher = WipedCipher()

    def usage(self) -> Usage:
        """Return the counters."""
        with self.lock:
            return Usage(
                packets=self.packets,
                octets=self.octets,
                added=self.added,
                first_used=self.first_used,
                last_used=self.last_used,
                replay_drops=self.replay_drops,
                window_drops=self.window_drops,
                integrity_drops=self.integrity_drops,
                sequence=self.highest,
                **self._last_packet(),
            )

    @abstractmethod
    def _last_packet(self) -> dict[str, float | None]:
        """Return `last_used` under the name that the direction of this SA gives it in `Usage`."""
