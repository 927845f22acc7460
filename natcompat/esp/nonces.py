"""Initialization vectors of counter modes: no key ever sees one twice."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2s
from itertools import count
from typing import Final

MEMORY: Final = 4096
"""Keys that are remembered after their last SA is gone."""


class _Counter:
    """The IVs of one key, as integers that may exceed 64 bits, and the SAs that draw from them."""

    __slots__ = ("draw", "users")

    def __init__(self, start: int) -> None:
        self.draw = count(start).__next__  # one step, so that no two threads get the same
        self.users = 0


class Nonces:
    """A 64-bit counter per key, shared by all SAs that have the key, also one after the other.

    A counter begins at a random number, as the kernel's seqiv does, so that a restart with the same
    keys meets used numbers about never; who needs to be sure of that keeps the numbers himself and
    gives a `start`. An SA that is deleted and added again goes on where it was. Keys are kept as
    digests. The caller holds a lock.
    """

    def __init__(self) -> None:
        self._live: dict[bytes, _Counter] = {}
        self._retired: OrderedDict[bytes, _Counter] = OrderedDict()

    def attach(self, key: bytes, start: int | None = None) -> Callable[[], int] | None:
        """Return what draws IVs for a new SA; None if there is a `start` but the key has been used."""
        digest = blake2s(key, digest_size=16).digest()
        counter = self._live.get(digest) or self._retired.get(digest)
        if counter is None:
            counter = _Counter(int.from_bytes(os.urandom(8)) if start is None else start)
        elif start is not None:
            return None
        self._retired.pop(digest, None)
        self._live[digest] = counter
        counter.users += 1
        return counter.draw

    def detach(self, key: bytes) -> None:
        """An SA with this key is gone."""
        digest = blake2s(key, digest_size=16).digest()
        counter = self._live[digest]
        counter.users -= 1
        if not counter.users:
            self._retired[digest] = self._live.pop(digest)
            if len(self._retired) > MEMORY:
                self._retired.popitem(last=False)
