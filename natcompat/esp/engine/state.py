"""`EngineState`: the databases of an ESP engine, its lock, and whether this process may use it."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Final, NamedTuple, NoReturn, SupportsIndex, TypeAlias

from natcompat.errors import NatCompatError
from natcompat.esp.engine import nonces, process
from natcompat.esp.engine.association import Association
from natcompat.esp.engine.data_path import DataPath
from natcompat.esp.engine.databases import AssociationDatabase, PolicyDatabase
from natcompat.esp.engine.timer import Deadlines
from natcompat.ipsec import SaId

KEEPALIVE: Final = 8
"""The kind of the deadline of a NAT-keepalive, beside SOFT and HARD."""


class Larval(NamedTuple):
    """An SPI that is reserved."""

    sa_id: SaId
    reqid: int
    added: float
    deadline: float


Due: TypeAlias = Larval | tuple[Association, int]
"""An item that has a deadline: an SPI that no SA took, or an SA and SOFT, HARD or KEEPALIVE."""


class EngineState:
    """The databases of an engine and what guards them.

    An engine belongs to the process that made it. It is not copied or pickled, and a forked or restored copy
    of the process cannot use it: two would use one nonce.
    """

    def __init__(
        self,
        *,
        keepalives: bool,
        raw_esp: bool,
        path: Callable[[AssociationDatabase, PolicyDatabase], DataPath],
        wake_at: Callable[[float], None],
    ) -> None:
        """`keepalives`: the engine can send them. `raw_esp`: the owner carries ESP without UDP.

        `path` makes the data path on the databases. `wake_at` is called with the time of a new deadline.
        """
        self._pid = os.getpid()
        self._process = process.identity()
        self._closed = False
        self._keepalives = keepalives
        self._raw_esp = raw_esp
        self._wake_at = wake_at
        self._lock = threading.RLock()
        self._associations = AssociationDatabase()
        self._policies = PolicyDatabase()
        self._path = path(self._associations, self._policies)
        self._larval: dict[int, Larval] = {}
        """By SPI: those that this engine gives away are unique, whatever the destination."""
        self._nonces = nonces.USED_KEYS
        self._deadlines = Deadlines()

    @property
    def is_copy(self) -> bool:
        """Whether this process is a fork or a restored copy of the one that made the engine."""
        return process.is_copy(self._process, self._pid)

    def _usable(self) -> AbstractContextManager[object]:
        """Return the lock, to be held while the databases are read or changed.

        EINVAL: this process is a copy of the one that made the engine. EBADF: the engine is closed.
        """
        if self.is_copy:
            raise NatCompatError(
                errno.EINVAL,
                f"this ESP engine belongs to process {self._pid}, which this one was forked from"
                " (or it was restored from a checkpoint)",
                "Open one after fork, with other keys: two processes must not use one nonce",
            )
        if self._closed:
            raise NatCompatError(errno.EBADF, "this ESP engine is closed")
        return self._lock

    def _schedule(self, deadline: float, item: Due) -> None:
        self._deadlines.add(deadline, item)
        self._wake_at(deadline)

    def _still_meant(self, item: Due) -> bool:
        if isinstance(item, Larval):
            return self._larval.get(item.sa_id.spi) is item
        return not item[0].gone

    def __reduce_ex__(self, _: SupportsIndex) -> NoReturn:
        raise TypeError("an ESP engine is neither copied nor pickled: two would use one nonce")
