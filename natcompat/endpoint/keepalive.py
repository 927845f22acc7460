"""`Keepalive`: NAT-keepalives to any number of peers, by one timer (RFC 3948, sections 2.3 and 4)."""

from __future__ import annotations

import errno
import socket
import threading
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from natcompat.endpoint.keepalive_schedule import (
    KernelKeepalive,
    LoopTimer,
    Peer,
    Schedule,
    ThreadTimer,
)
from natcompat.errors import NatCompatError

if TYPE_CHECKING:
    import asyncio
    from typing import Self

    from natcompat.endpoint.endpoint import NatTEndpoint
    from natcompat.ipsec import IPAddress

__all__ = ["DEFAULT_INTERVAL", "Keepalive", "KeepaliveStats", "KernelKeepalive"]

DEFAULT_INTERVAL: Final = 20.0
"""Seconds without traffic to a peer after which a keepalive is due (RFC 3948, section 4)."""


@dataclass(frozen=True, slots=True)
class KeepaliveStats:
    """The counters of a `Keepalive`."""

    peers: int
    """Current peers, those of the kernel included."""
    by_kernel: int
    """Peers to which the kernel sends keepalives."""
    sent: int
    skipped: int
    """Keepalives that were due but not sent, since other traffic had flowed within the interval."""
    errors: int
    """Attempts that failed. Each is repeated after a tenth of the interval."""
    last_error: Exception | None


class Keepalive:
    """Sends NAT-keepalives from an endpoint to peers to which no traffic has flowed for `interval` seconds.

    A daemon thread of its own sends them, which the first peer starts; with `loop` that asyncio loop does.
    The object ends with `close`, with the ``with`` block, when it is collected, and at the first keepalive
    that is due after the endpoint was closed. In a forked child it is closed. Its methods may be called
    from any thread.

    Each keepalive is early by a random part of a tenth of the interval, so that many peers do not fall into
    step. IKE that the endpoint's sockets send counts as traffic; call `sent` for ESP that leaves
    elsewhere. An error of a send is counted and does not end anything: see `KeepaliveStats.errors`.
    """

    def __init__(
        self,
        endpoint: NatTEndpoint,
        *,
        interval: float = DEFAULT_INTERVAL,
        loop: asyncio.AbstractEventLoop | None = None,
    ) -> None:
        self._interval = _positive(interval)
        self._family = endpoint.family
        schedule = Schedule(endpoint)
        self._schedule = schedule
        schedule.timer = ThreadTimer(schedule) if loop is None else LoopTimer(schedule, loop)
        schedule.unobserve = endpoint.observe_sends(schedule.sent)
        # the timer and the endpoint refer to the schedule and not to this object, which can be collected
        self._finalizer = weakref.finalize(self, schedule.end)
        self._finalizer.atexit = False

    @property
    def closed(self) -> bool:
        """Whether it sends no more keepalives."""
        return self._schedule.ended

    def add(
        self,
        address: Any = None,
        *,
        interval: float | None = None,
        kernel: KernelKeepalive | None = None,
        local_address: IPAddress | str | None = None,
    ) -> None:
        """Keep the NAT mapping to `address` alive; None: to the connected peer.

        `address` is numeric, as `socket.socket.recvfrom` returns it. `interval` is in seconds; for a peer
        that was added before it counts from now. `kernel` is asked first, and sends the keepalives of the
        peers that it takes over. The process sends from `local_address`, such as that of the `Datagram` by
        which the peer became known; None leaves the choice to the system. Raises OSError: EBADF once this or
        the endpoint is closed; `socket.gaierror` for a host name and for an address of another family.
        """
        schedule = self._schedule
        interval = self._interval if interval is None else _positive(interval)
        if schedule.endpoint.closed:
            schedule.end()
        if schedule.ended:
            raise NatCompatError(
                errno.EBADF, "the keepalives have ended", "Make a Keepalive of an open endpoint"
            )
        if address is not None:
            address = _numeric(address, self._family)
        schedule.remove(address)
        schedule.add(Peer(address, interval, kernel, local_address))

    def remove(self, address: Any = None) -> None:
        """Send no more keepalives to `address`; no error where none were sent."""
        self._schedule.remove(None if address is None else _numeric(address, self._family))

    def sent(self, address: Any = None) -> None:
        """Note that a packet, such as ESP, has just left for `address`. Costs one look-up."""
        self._schedule.sent(address)

    def stats(self) -> KeepaliveStats:
        """Return the counters."""
        schedule = self._schedule
        peers = list(schedule.peers.values())
        return KeepaliveStats(
            peers=len(peers),
            by_kernel=sum(peer.by_kernel for peer in peers),
            sent=schedule.sent_count,
            skipped=schedule.skipped_count,
            errors=schedule.error_count,
            last_error=schedule.last_error,
        )

    def close(self) -> None:
        """Send no more; returns when the thread has ended. May be repeated."""
        self._finalizer.detach()
        self._schedule.end()
        self._schedule.timer.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _positive(interval: float) -> float:
    if not 0 < interval < threading.TIMEOUT_MAX:
        raise ValueError(f"the interval must be a positive number of seconds, not {interval!r}")
    return float(interval)


def _numeric(address: Any, family: int) -> Any:
    """Return the numeric `address` in the form that sockets of `family` return."""
    host, port, *rest = address
    if not 0 <= port < 65536:
        raise OverflowError(f"port must be 0-65535, not {port}")
    numeric: Any = socket.getaddrinfo(host, port, family, socket.SOCK_DGRAM, flags=socket.AI_NUMERICHOST)[0][
        4
    ]
    return (*numeric[:2], *rest) if rest else numeric
