"""Policies for the traffic of this host: routes into a TUN device, the guard, and the watch over both."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from natcompat.backends.base import NetworkNamespace
from natcompat.errors import NatCompatError, get_logger
from natcompat.esp.device.clear_path import ClearPath
from natcompat.esp.device.guard import Guard
from natcompat.esp.device.namespace import Namespace
from natcompat.esp.device.routes import MARK, DeviceRoutes
from natcompat.esp.device.tun import TunDevice
from natcompat.esp.device.watch import RouteWatch
from natcompat.esp.engine.results import Reason
from natcompat.ipsec import Action, Direction, IPAddress, IPNetwork, Policy

_log = get_logger()

PASSED: Final = 0x1000_0000
"""The bit of SO_MARK that packets have besides MARK which the engine handed back."""

_TAKEOVER: Final = 2.0
"""Seconds after the last new policy at which the guards of killed processes go."""

_UNOWNED: Final = 1.0
"""Seconds between two looks at a guard that somebody else may remove (before Linux 5.12)."""

_NO_GUARD: Final = (errno.EOPNOTSUPP, errno.EPROTONOSUPPORT, errno.ENOENT, errno.EAFNOSUPPORT)
"""Errors of a kernel without nf_tables."""


class HostTraffic:
    """Applies policies to what this host sends, receives and forwards. Thread-safe.

    `device` belongs to this object from now on: `close` closes it.
    """

    def __init__(
        self,
        make_device: Callable[[], TunDevice],
        *,
        netns: NetworkNamespace | None = None,
        lockdown: bool = False,
        routes_follow: bool = True,
    ) -> None:
        """Make the device, the routes and the guard in `netns` (None: that of the calling thread).

        `routes_follow`: the routes are those of the policies, and packets in the device that no policy
        protects are sent past it. False: the owner adds the routes, and such packets are dropped. `lockdown`:
        what policies cover stays blocked when the process dies, until another one starts.
        EPERM without CAP_NET_ADMIN; EOPNOTSUPP: `lockdown` on a kernel without nf_tables.
        """
        self.weakness: str = ""
        """Why what policies cover is not guarded against changes of routes; empty: it is."""
        self.restored: int = 0
        """How often rules, routes, addresses or the device had to be put back."""
        self._lock: threading.RLock = threading.RLock()
        self._lockdown = lockdown
        self.routes_follow: bool = routes_follow
        """Whether the routes are those of the policies."""
        self._report: Callable[[str, int], object] = _ignore
        self._endpoints: Callable[[], Iterable[tuple[str, int]]] = tuple
        self._guard: Guard | None = None
        self._clear: ClearPath | None = None
        self._watch: RouteWatch | None = None
        self._no_clear_path = ""
        self._gone = False
        self._newest: float | None = None
        """When the last policy was added, while guards of killed processes are still there."""
        self._closed = False
        self._undo = contextlib.ExitStack()
        self._namespace = Namespace(netns)
        self._undo.callback(self._namespace.close)
        try:
            self._namespace.call(lambda: self._make(make_device))
        except BaseException:
            self._undo.close()
            raise

    device: TunDevice
    routes: DeviceRoutes

    def _make(self, make_device: Callable[[], TunDevice]) -> None:
        self.device = self._undo.enter_context(make_device())
        try:
            self._guard = Guard(self.device.index, mark=MARK, passed=PASSED, lockdown=self._lockdown)
        except NatCompatError as error:
            if error.errno not in _NO_GUARD:
                raise
            self.weakness = f"there is no guard in nf_tables ({error.strerror})"
            if self._lockdown:
                raise NatCompatError(
                    errno.EOPNOTSUPP, f"lockdown takes nf_tables: {error.strerror}", error.remedy
                ) from None
            _log.warning("%s; routes and rules alone keep traffic from leaving in the clear", self.weakness)
        else:
            self._undo.callback(self._guard.close)
        self.routes = self._undo.enter_context(DeviceRoutes(self.device))
        if self._guard is not None and self.routes_follow and not self.routes.refusal:
            try:
                self._clear = ClearPath(MARK | PASSED)
                self._undo.callback(self._clear.close)
            except NatCompatError as error:  # without CAP_NET_RAW
                self._no_clear_path = str(error)
                _log.warning("policies for protocols or ports are refused: %s", error)
        self._watch = RouteWatch(self.device.index, self.routes.table, self._check)
        self._undo.callback(self._watch.close)
        self.device.addresses_changed = self._follow_addresses

    def start(
        self,
        lock: threading.RLock,
        report: Callable[[str, int], object],
        endpoints: Callable[[], Iterable[tuple[str, int]]],
    ) -> None:
        """Start to put back what others take away; `report` gets a description and `restored`.

        `lock` guards the caller's policies; verbs of this object are called with it held. `endpoints` returns
        the addresses and ports that only outer packets may come to.
        """
        self._lock, self._report, self._endpoints = lock, report, endpoints
        if self._watch is not None:
            self._watch.start()
            if self._guard is not None and not self._guard.owned:
                self._watch.wake()

    @property
    def in_other_namespace(self) -> bool:
        """Whether the device is in another network namespace than the sockets of ESP."""
        return self._namespace.is_other

    # --- sockets

    def exempt(self, sock: socket.socket, on: bool = True) -> None:
        """Keep what `sock` sends out of the device; see `DeviceRoutes.exempt`."""
        if not self.in_other_namespace:
            self.routes.exempt(sock, on)

    @staticmethod
    def end_exemption(sock: socket.socket) -> None:
        """Undo `exempt`."""
        DeviceRoutes.end_exemption(sock)

    def follow_endpoints(self) -> None:
        """Drop datagrams for the endpoints there are now that come out of the device."""
        if self._guard is not None and not self.in_other_namespace:
            with self._lock:
                self._guard.set_endpoints(self._endpoints())

    # --- policies

    def add_policy(self, policy: Policy, replaced: Policy | None = None) -> None:
        """Guard `policy` and route it, in the place of `replaced`; whole or not at all.

        EOPNOTSUPP: without a guard, a selector that routes cannot say.
        """
        self._refuse_inexact(policy)
        removed = [] if replaced is None else [replaced]
        with contextlib.ExitStack() as undo:
            if self._guard is not None:
                self._guard.change(add=[policy], remove=removed)
                undo.callback(self._guard.change, add=removed, remove=[policy])
                if self._guard.has_predecessors:
                    self._newest = time.monotonic()
                    self.wake()
            if self.routes_follow:
                self.routes.add_policy(policy)
                undo.callback(self.routes.delete_policy, policy)
                self._check_peer(policy)
                if replaced is not None:
                    self.routes.delete_policy(replaced)
            undo.pop_all()

    def _refuse_inexact(self, policy: Policy) -> None:
        """Refuse what only the guard and the way back past the device make exact."""
        selector = policy.selector
        inexact = selector.protocol or selector.has_ranges
        if self.routes_follow and self._clear is None and inexact and policy.action is not Action.BYPASS:
            raise NatCompatError(
                errno.EOPNOTSUPP,
                f"a policy for {selector} would cut off other traffic between these addresses: "
                f"{self.weakness or self._no_clear_path or self.routes.refusal}",
                "Use a policy for whole networks, or a kernel with nf_tables and rules, and CAP_NET_RAW",
            )

    def delete_policy(self, policy: Policy) -> None:
        """Undo `add_policy`. What `policy` covered is blocked until it is let pass."""
        if self.routes_follow:
            self.routes.delete_policy(policy)
        if self._guard is not None:
            try:
                self._guard.change(remove=[policy])
            except BaseException:
                if self.routes_follow:
                    self.routes.add_policy(policy)
                raise

    def replace_policy(self, policy: Policy, replacement: Policy | None) -> None:
        """Undo `add_policy` of `policy`, which took the place of `replacement`."""
        if replacement is None:
            self.delete_policy(policy)
        else:
            self.add_policy(replacement, policy)

    def retain(self, policies: Sequence[Policy]) -> None:
        """Remove all policies but these."""
        if self.routes_follow:
            self.routes.follow(policies)
        if self._guard is not None:
            self._guard.retain(policies)

    def _check_peer(self, policy: Policy) -> None:
        if policy.direction is Direction.IN or policy.destination is None or self.in_other_namespace:
            return
        try:
            self.routes.check_peer(policy.destination)
        except NatCompatError as error:
            if error.errno == errno.ELOOP:
                raise
            _log.warning("%s", error)  # it may be set right later

    def hand_back(self, packets: Sequence[bytes], outcomes: Iterable[object]) -> None:
        """Send those of `packets` past the device that no policy protects."""
        if self._clear is not None:
            self._clear.send(packets, outcomes)

    @property
    def hands_back(self) -> bool:
        """Whether packets that no policy protects leave past the device."""
        return self._clear is not None

    def add_route(
        self, network: IPNetwork, source: IPAddress | None, *, peers: Iterable[IPAddress | str]
    ) -> None:
        """Lead `network` into the device; see `DeviceRoutes.add`."""
        with self._lock:
            self.routes.add(network, source, peers=peers)

    # --- addresses

    def add_address(self, address: str) -> None:
        """Give the device an inner address, which the routes then prefer as source."""
        self.device.add_address(address)

    def remove_address(self, address: str | IPAddress) -> None:
        """Undo `add_address`. EADDRNOTAVAIL: it was not given."""
        self.device.remove_address(address)

    def _follow_addresses(self) -> None:
        if self.routes_follow:
            with self._lock:
                self.routes.follow_addresses()

    # --- what others change

    def _check(self) -> float | None:
        """Put back what is missing; return in how many seconds to look again."""
        with self._lock:
            if self._closed:
                return None
            restored: list[str] = []
            try:
                if not self._gone:
                    restored += self.device.restore()
                    self._follow_addresses()
                    restored += self.routes.restore()
                if self._guard is not None and self._guard.restore():
                    restored.append("the guard in nf_tables")
                self.follow_endpoints()
            except NatCompatError as error:
                self._say_failed(error)
            if restored:
                self.restored += 1
                shown = ", ".join(restored[:3]) + (f" and {len(restored) - 3} more" if restored[3:] else "")
                _log.warning("somebody changed what policies stand on; restored: %s", shown)
                self._report(shown, self.restored)
            return self._release_predecessors()

    def _say_failed(self, error: NatCompatError) -> None:
        blocked = "stays blocked" if self._guard is not None else "may leave in the clear"
        if error.errno == errno.ENODEV and not self._gone:
            self._gone = True
            self.restored += 1
            _log.error("%s: what policies cover %s", error.strerror, blocked)
            self._report(f"{error.strerror}; not put back, what policies cover {blocked}", self.restored)
        else:
            _log.warning(
                "%s cannot be looked after, what policies cover %s: %s", self.device.name, blocked, error
            )

    def _release_predecessors(self) -> float | None:
        """Remove the guards of killed processes once new policies have settled; return as `_check`."""
        if self._guard is None:
            return None
        idle = None if self._guard.owned else _UNOWNED
        if self._newest is None:
            return idle
        remaining = self._newest + _TAKEOVER - time.monotonic()
        if remaining > 0:
            return remaining
        self._newest = None
        self._guard.release_predecessors()
        return idle

    def wake(self) -> None:
        """Have endpoints, routes and rules looked at soon. Takes no lock, for finalizers."""
        if self._watch is not None:
            self._watch.wake()

    # --- counters, and the end

    def counters(self) -> Mapping[str, int]:
        """Return packets that the guard blocked, by where, and `restored`."""
        counted = {"restored": self.restored}
        if self._guard is not None:
            with contextlib.suppress(NatCompatError):  # privileges are gone
                counted |= {f"blocked-{name}": packets for name, packets in self._guard.counters().items()}
        if self._clear is not None:
            counted |= {"passed": self._clear.sent.total(), "not-passed": self._clear.failed}
        return counted

    def passed(self) -> Mapping[Reason, int]:
        """Return how many packets left past the device since no policy protects them, by reason."""
        return {} if self._clear is None else dict(self._clear.sent)

    def close(self) -> None:
        """Remove routes, rules and the device, the guard last but for lockdown. May be repeated."""
        with self._lock:
            self._closed = True
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()
        self._undo.close()

    def abandon(self) -> None:
        """Let go of a forked child's descriptors; all stays as its parent has it."""
        if self._guard is not None:
            self._guard.abandon()
        if self._watch is not None:
            self._watch.abandon()
        if self._clear is not None:
            self._clear.close()
        self.device.abandon()


def _ignore(description: str, count: int) -> None:
    """Report to nobody."""
