"""The values of a trial: what was tried on which path, what should come, and what came."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one row."""

    section: str
    """``inbound``, ``outbound`` or ``socket``."""
    row: str
    sent: str
    """What was sent, in words."""
    solaris: str
    """What Solaris does with it."""
    arrived: str
    """What the application, the consumer of ESP or the peer got."""
    performer: str
    """Who did the duty: ``kernel``, ``filter``, ``steering``, ``process``."""
    woke: bool | None
    """Whether `select` woke for what was dropped; None where it was not asked."""
    passed: bool
    """Whether it is as on Solaris, or a `limit`."""
    limit: str = ""
    """Why it cannot be as on Solaris here, one sentence; empty where it is, or could be."""


@dataclass(slots=True)
class Trial:
    """One backend on one path."""

    backend: str
    path: str
    version: int
    """Of IP."""
    mode: str = ""
    reason: str = ""
    duties: dict[str, str] = field(default_factory=dict)
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        """Whether there was no difference, and there was something to compare."""
        return bool(self.outcomes) and all(each.passed for each in self.outcomes)


@dataclass(frozen=True, slots=True)
class TrialPath:
    """Where the endpoint is and where its peer: the addresses that they bind, and who begins.

    Who is behind a NAT has to begin, since nobody can reach him before.
    """

    name: str
    host: str
    port: int
    peer_host: str
    endpoint_begins: bool
