"""Sequence numbers, reserved in the state file ahead of their use, while a tunnel runs."""

from __future__ import annotations

import contextlib
import errno
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Final, TypeAlias

from natcompat.commands.tunnel.state import Identity, StateFile
from natcompat.errors import NatCompatError
from natcompat.ipsec import Direction, SaId, SecurityAssociation

BLOCK: Final = 1 << 17
"""Numbers that are reserved ahead, at least. What is left of them when the process is killed is lost: a
key without extended sequence numbers survives that 32768 times."""

AHEAD: Final = 2.0
"""Seconds; for so long reserved numbers last at the present rate."""

ROUND: Final = 0.1
"""Seconds between two looks at what is used."""

CHECKPOINT: Final = 10.0
"""Seconds between two records of what was received, where nothing else is to be recorded."""

Name: TypeAlias = tuple[Direction, int]
"""Direction and SPI: what an SA of a tunnel's file keeps, wherever the peer goes."""

Numbers: TypeAlias = Mapping[Name, tuple[SaId, int]]
"""What SAs are called now, and the last sequence number sent, or the highest received."""


class Reservations:
    """Keeps the state file ahead of the SAs, in a thread of its own from `start` to `close`.

    `numbers` tells what the SAs have used; `permit` lets one use more (None: this IPsec takes no such
    limit); `complain` is called with a sentence when numbers cannot be reserved, and when they can again.
    """

    def __init__(
        self,
        state: StateFile,
        associations: Sequence[SecurityAssociation],
        *,
        numbers: Callable[[], Numbers],
        permit: Callable[[SaId, int], object] | None,
        complain: Callable[[str], object],
    ) -> None:
        self._state = state
        self._numbers = numbers
        self._permit = permit
        self._complain = complain
        self._complained = False
        self._identities: dict[Name, Identity] = {}
        self._largest: dict[Name, int] = {}
        self._recorded: dict[Name, int] = {}
        """What the file says: the last number that may be used, or the highest received."""
        self._permitted: dict[Name, int] = {}
        """What the outbound SAs know of that."""
        self._used: dict[Name, int] = {}
        self._looked = self._written = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="natcompat-tunnel-state", daemon=True)
        for sa in associations:
            name = sa.direction, sa.spi
            self._identities[name] = identity = state.identity(sa)
            self._used[name] = self._recorded[name] = state.last(identity)
            self._largest[name] = (1 << 64 if sa.esn else 1 << 32) - 1
            if self._used[name] >= self._largest[name]:
                raise NatCompatError(
                    errno.EOVERFLOW,
                    f"the sequence numbers of {sa.sa_id} are used up, says {state.path}",
                    "Replace its keys, at both ends",
                )

    def begin(self) -> dict[Name, tuple[int, int]]:
        """Reserve a first block.

        Return for each SA the number behind which it goes on, and the last that it may use now. Raises an
        OSError if that cannot be written.
        """
        self._record(
            {
                name: min(used + BLOCK, self._largest[name])
                for name, used in self._used.items()
                if name[0] is Direction.OUT
            }
        )
        self._permitted = dict(self._recorded)
        return {name: (used, self._recorded[name]) for name, used in self._used.items()}

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    def close(self) -> None:
        """End the thread. What is reserved stays so."""
        self._ended.set()
        if self._thread.ident is not None:
            self._thread.join()

    def finish(self, numbers: Numbers) -> None:
        """Record what was really used and received, by SAs that seal no more."""
        self._record({name: number for name, (_, number) in numbers.items() if name in self._used})

    def look(self) -> None:
        """Look once at what is used, and reserve more where it is due."""
        try:
            numbers = self._numbers()
            due = self._wanted(numbers)
            if due:
                self._record(due)
        except OSError as error:
            if not self._complained:
                self._complained = True
                self._complain(
                    f"sequence numbers cannot be reserved: {error.strerror or error}. When those that are "
                    "reserved have been used, nothing more is sent"
                )
            return
        if self._complained:
            self._complained = False
            self._complain("sequence numbers can be reserved again")
        for name, permitted in self._permitted.items():
            if self._permit is not None and permitted < self._recorded[name] and name in numbers:
                with contextlib.suppress(NatCompatError):  # it is just being moved: next time
                    self._permit(numbers[name][0], self._recorded[name])
                    self._permitted[name] = self._recorded[name]

    def _wanted(self, numbers: Numbers) -> dict[Name, int]:
        """Return what is to be recorded now, if anything."""
        now = time.monotonic()
        passed, self._looked = max(now - self._looked, ROUND / 2), now
        due: dict[Name, int] = {}
        received: dict[Name, int] = {}
        for name, (_, used) in numbers.items():
            before, self._used[name] = self._used[name], used
            if name[0] is Direction.IN:
                if used > self._recorded[name]:
                    received[name] = used
                continue
            ahead = max(BLOCK, int((used - before) / passed * AHEAD))
            number = min(used + ahead, self._largest[name])
            if self._recorded[name] - used < ahead // 2 and number > self._recorded[name]:
                due[name] = number
        if due or (received and now - self._written >= CHECKPOINT):
            return due | received
        return {}

    def _record(self, numbers: dict[Name, int]) -> None:
        self._state.record({self._identities[name]: number for name, number in numbers.items()})
        self._recorded.update(numbers)
        self._written = time.monotonic()

    def _run(self) -> None:
        while not self._ended.wait(ROUND):
            self.look()
