"""Initialization vectors of counter modes: no key sees one twice, whatever engines a process opens."""

from __future__ import annotations

import errno
import os
import threading
from array import array
from bisect import bisect_left
from hashlib import blake2b
from typing import Final

from natcompat.errors import NatCompatError
from natcompat.esp.engine import process

BLOCK: Final = 1 << 48
"""IVs for one SA. With 32-bit sequence numbers no SA uses more than 2**32."""

MOST_KEYS: Final = 1 << 24
"""Keys that one process remembers, about 9 bytes each. Then new ones are refused: none is forgotten."""

_SHARDS: Final = 1 << 12
_SPENT: Final = 0xFFFF
"""Instead of a number of blocks: the key gets no more of them."""


class UsedKeys:
    """The memory of all keys of counter modes that were used by a process, across all of its engines.

    The IVs of a key are a ring of 2**64, cut into 65536 blocks that begin at a random number; every SA with
    the key gets the next block. So SAs that share a key share no IV, at once or one after the other, in C or
    in Python, and a restarted process with the same keys meets used IVs about never. An owner who needs to be
    sure of that keeps the numbers in a file and names the first one (`start`); such a key is used once.

    A key is kept as 60 bits of a digest under a secret of this object, so it cannot be found out from here.
    A forked child refuses the keys of its parent: it cannot know what that still does with them.
    """

    __slots__ = ("_count", "_inherited", "_lock", "_owner", "_secret", "_shards")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inherited: tuple[tuple[bytes, dict[int, array[int]]], ...] = ()
        """Secrets and shards of the processes that this one was forked from."""
        self._begin()

    def _begin(self) -> None:
        self._owner = process.identity()
        self._secret = os.urandom(32)  # or two children would begin at the same IV
        self._shards: dict[int, array[int]] = {}
        """Sorted: 48 bits of a digest, then 16 bits that say how many blocks are given away."""
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def attach(self, key: bytes, start: int | None = None) -> int:
        """Return the first IV for a new SA: `start`, or the first of a block of `BLOCK` of them.

        EEXIST: the key was used before, and that leaves no IVs that are certainly unused. ENOSPC: this
        process has used as many keys as it can remember.
        """
        process.notice_restore()
        if process.WORD[0] != self._owner:
            self._inherit()
        with self._lock:
            if any(_blocks(secret, shards, key) for secret, shards in self._inherited):
                raise NatCompatError(
                    errno.EEXIST,
                    "the key of this SA has been used before, by the process that this one was forked from",
                    "Negotiate a fresh key: two processes must not use one nonce",
                )
            shard, name, base = _place(self._secret, key)
            entries = self._shards.setdefault(shard, array("Q"))
            at, blocks = _find(entries, name)
            if not blocks:
                if self._count >= MOST_KEYS:
                    raise NatCompatError(
                        errno.ENOSPC,
                        f"this process has used {MOST_KEYS} keys, and remembers no more",
                        "Start the process anew, with fresh keys",
                    )
                entries.insert(at, name << 16 | (1 if start is None else _SPENT))
                self._count += 1
                return base if start is None else start
            if start is not None or blocks == _SPENT:
                raise NatCompatError(
                    errno.EEXIST, "the key of this SA has been used before in this process", "Use a fresh key"
                )
            entries[at] += 1
        return (base + blocks * BLOCK) % (1 << 64)

    def _inherit(self) -> None:
        """Begin anew in a forked child. Threads that held the lock are not in it."""
        self._lock = threading.Lock()
        self._inherited = (*self._inherited, (self._secret, self._shards))
        self._begin()


def _place(secret: bytes, key: bytes) -> tuple[int, int, int]:
    """Return the shard of a key, its name there (48 bits), and the first IV of its ring."""
    digest = blake2b(key, key=secret, digest_size=16).digest()
    number = int.from_bytes(digest[:8])
    return number % _SHARDS, number >> 16, int.from_bytes(digest[8:])


def _blocks(secret: bytes, shards: dict[int, array[int]], key: bytes) -> int:
    """Return how many blocks of a key are given away."""
    shard, name, _ = _place(secret, key)
    return _find(shards.get(shard, array("Q")), name)[1]


def _find(entries: array[int], name: int) -> tuple[int, int]:
    """Return the place of `name` in a sorted shard, and how many blocks are given away: 0 for a new one."""
    at = bisect_left(entries, name << 16)
    if at < len(entries) and entries[at] >> 16 == name:
        return at, entries[at] & 0xFFFF
    return at, 0


USED_KEYS: UsedKeys = UsedKeys()
"""Those of this process."""
