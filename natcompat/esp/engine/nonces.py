"""Initialization vectors of counter modes: no key ever sees one twice."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable
from hashlib import blake2s
from typing import Final, Generic, TypeVar

MEMORY: Final = 4096
"""Keys that are remembered after their last SA is gone."""

_C = TypeVar("_C")


def _digest(key: bytes) -> bytes:
    return blake2s(key, digest_size=16).digest()


class Nonces(Generic[_C]):
    """A 64-bit counter per key, shared by all SAs that have the key, also one after the other.

    A counter begins at a random number, as the kernel's seqiv does, so that a restart with the same
    keys meets used numbers about never; who needs to be sure of that keeps the numbers himself and
    gives a `start`. An SA that is deleted and added again goes on where it was. Keys without an SA
    are kept as digests. The caller holds a lock.
    """

    def __init__(self, counter: Callable[[int], _C]) -> None:
        """`counter` makes what counts from a number on, as the data path has it."""
        self._counter = counter
        self._live: dict[bytes, _C] = {}
        """By the key itself, which its SA has anyway."""
        self._shared: dict[bytes, int] = {}
        """How many more SAs than one use a key, where there are more."""
        self._retired: OrderedDict[bytes, _C] = OrderedDict()

    def attach(self, key: bytes, start: int | None = None) -> _C | None:
        """Return the counter of the IVs of a new SA.

        None if there is a `start`, but the key has been used.
        """
        digest = _digest(key)
        live, retired = self._live.get(key), self._retired.get(digest)
        if start is not None and (live is not None or retired is not None):
            return None
        if live is not None:
            self._shared[key] = self._shared.get(key, 0) + 1
            return live
        if retired is not None:
            del self._retired[digest]
            self._live[key] = retired
            return retired
        self._live[key] = fresh = self._counter(int.from_bytes(os.urandom(8)) if start is None else start)
        return fresh

    def detach(self, key: bytes) -> None:
        """An SA with this key is gone."""
        more = self._shared.pop(key, 0)
        if more:
            if more > 1:
                self._shared[key] = more - 1
            return
        self._retired[_digest(key)] = self._live.pop(key)
        if len(self._retired) > MEMORY:
            self._retired.popitem(last=False)
