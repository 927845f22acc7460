"""The values of a trial: path, expected result, result."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of one row."""

    section: str
    """``inbound``, ``outbound`` or ``socket``."""
    row: str
    sent: str
    """The datagram, in words."""
    solaris: str
    """The behaviour of Solaris."""
    arrived: str
    """The behaviour here: what the application, the consumer of ESP or the peer received."""
    performer: str
    """The performer of the duty: ``kernel``, ``filter``, ``steering``, ``process``."""
    woke: bool | None
    """Whether `select` woke for a dropped datagram; None: not checked."""
    passed: bool
    """Whether the behaviour is that of Solaris, or a `limit`."""
    limit: str = ""
    """One sentence: why the behaviour of Solaris is impossible here; empty where it is possible."""


@dataclass(slots=True)
class Trial:
    """One backend on one path."""

    backend: str
    path: str
    version: int
    """The IP version, 4 or 6."""
    mode: str = ""
    reason: str = ""
    duties: dict[str, str] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether there are outcomes, and all passed."""
        return bool(self.outcomes) and all(outcome.passed for outcome in self.outcomes)


@dataclass(frozen=True, slots=True)
class TrialPath:
    """The addresses of the endpoint and its peer, and which of the two sends first.

    A host behind a NAT has to send first, since no datagram reaches it before.
    """

    name: str
    host: str
    port: int
    peer_host: str
    endpoint_begins: bool
