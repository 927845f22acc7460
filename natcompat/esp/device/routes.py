"""Routes into a TUN device that never take the outer packets along.

A default route, or any that covers a peer's address, would lead the ESP packets back into the device they
came from. So the routes into a device have a table of their own, and rules lead there only what lacks a
bit of the mark (SO_MARK), which the sockets of ESP and IKE have::

    with TunDevice() as tun, DeviceRoutes(tun) as routes:
        tun.add_address("10.1.0.1")
        routes.exempt(sock)  # every socket that talks to the peer
        routes.follow(policies)  # or routes.add("0.0.0.0/0", source="10.1.0.1")
        routes.check_peer("203.0.113.2")

    4500: from all fwmark 0/0x20000000 iif lo lookup 1313144834     (ip rule)
    4501: from 10.1.0.0/16 fwmark 0/0x20000000 lookup 1313144834

- Every device of every process has its own table (by the index of its interface). All devices share mark and
  priority: outer packets of one device that entered another, and back, would be a loop, too.
- The table comes before the main one, so that a more specific route there, which a DHCP server may have
  put in (RFC 3442), takes nothing out of the tunnel. With `prefer_main` it does, as wg-quick has it: hosts on
  the own link stay in reach (rule "lookup main suppress_prefixlength 0" in front).
- A rule is for what this host sends or for one source network, as policies are. So what comes out of the
  tunnel finds the hosts behind a gateway, even with a default route into the device.
- Strict reverse path filtering (rp_filter 1) drops what a peer sends that is covered by a route into the
  device: the look-up for it has no mark. src_valid_mark does not change that, as nothing marks what arrives.
  `check_peer` says so; loose filtering (2), the default of systemd, and none (0) do no harm. IPv6 has none.
- The kernel removes the routes with the device. `close` removes the rules; those of a killed process lead to
  an empty table, which changes nothing. `natcompat doctor` counts them; the next `DeviceRoutes` removes them.

Where there are no rules (a kernel without CONFIG_IP_MULTIPLE_TABLES), routes go to the main table, and one
that covers a peer is refused.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Set
from ipaddress import ip_address, ip_network
from typing import Final, NamedTuple, Self

from natcompat.errors import NatCompatError
from natcompat.esp.device.outer_path import check_way, refuse_loop
from natcompat.esp.device.policy_routes import PolicyRoutes, covering
from natcompat.esp.device.rtnetlink import MAIN_TABLE, Rtnetlink, Rule, family_of
from natcompat.esp.device.stale_rules import SLOT, remove_stale, table_of
from natcompat.esp.device.tun import TunDevice
from natcompat.ipsec import IPAddress, IPNetwork, Policy

MARK: Final = 0x2000_0000
"""The bit of SO_MARK that outer packets have. Other bits are other people's."""

PRIORITY: Final = 4500
"""Of the first rule; that of the main table is 32766.

Each kind of rule has its own: to the kernel one that says less is the same as one that says more.
"""

_OWN, _FROM, _ALL = 0, 1, 2

_EVERYBODY: Final[Mapping[int, IPNetwork]] = {4: ip_network("0.0.0.0/0"), 6: ip_network("::/0")}
"""Of each IP version."""

_PREFER_MAIN_PRIORITY: Final = 4600
_PREFER_MAIN_SLOTS: Final = 5000


class _Route(NamedTuple):
    """The route of packets to one destination through the device."""

    preferred: IPAddress | None
    """This host's address there."""
    users: frozenset[IPNetwork | None]
    """Networks of the senders; None among them: this host itself, whatever its address."""


_PAST: Final = _Route(None, frozenset())
"""The route of a destination whose packets never enter the device: a throw route."""


class DeviceRoutes:
    """The routes into one device, and the rules that lead there. Not thread-safe.

    Each device has one of these. Raises EPERM without CAP_NET_ADMIN. `close` it before the device.
    """

    def __init__(self, device: TunDevice, *, prefer_main: bool = False) -> None:
        self.table: int = table_of(device.index)
        """Where the routes are; the main table (254) where there are no rules."""
        self.refusal: str = ""
        """Why routes that cover a peer are refused; empty where outer packets can be kept out."""
        self._device = device
        self._prefer_main = prefer_main
        self._rules: dict[Rule, None] = {}
        """Those that are there, in the order in which they came."""
        self._uses: Counter[Rule] = Counter()
        """How many routes want a rule."""
        self._unsettled: dict[Rule, None] = {}
        self._routes: dict[IPNetwork, _Route] = {}
        self._policies = PolicyRoutes()
        self._addresses: dict[IPAddress, frozenset[IPNetwork]] = {}
        """Of this host, when it was last looked, and the networks that contain each."""
        self._netlink = Rtnetlink()
        try:
            remove_stale(self._netlink, self.table)
            self.refusal = self._why_not()
            if self.refusal:
                self.table = MAIN_TABLE
        except BaseException:
            self.close()
            raise

    def exempt(self, sock: socket.socket, on: bool = True) -> None:
        """Keep what `sock` sends out of the device, from now on; other bits of its mark stay.

        Every socket that talks to the peer needs it: of ESP and of IKE, port 500, too. EPERM without
        CAP_NET_ADMIN.
        """
        if self.refusal:
            return
        mark = sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK)
        if bool(mark & MARK) is on:  # marked before the process gave up its privileges
            return
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark | MARK if on else mark & ~MARK)
        except OSError as error:
            raise _refused("The socket cannot be marked", error) from None

    @staticmethod
    def end_exemption(sock: socket.socket) -> None:
        """Undo `exempt`, which may have been that of another object: they share the mark."""
        mark = sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK)
        if mark & MARK:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark & ~MARK)

    def add(
        self,
        network: IPNetwork | str,
        source: IPAddress | str | None = None,
        *,
        behind: Iterable[IPNetwork | str] | None = None,
        peers: Iterable[IPAddress | str] = (),
    ) -> None:
        """Lead `network` into the device, with `source` as the preferred address of this host.

        `behind`: networks behind this host whose packets take the route, besides its own; None: all, also
        what comes out of the device. `peers`: whom the route must not cover where they cannot be
        exempted: ELOOP. EEXIST: it is there.
        """
        network = ip_network(network)
        if network in self._routes:
            raise NatCompatError(errno.EEXIST, f"the route to {network} is there already", "Remove it first")
        users: set[IPNetwork | None] = {_EVERYBODY[network.version]}
        if behind is not None:
            users = {None, *map(ip_network, behind)}
        if self.refusal:
            refuse_loop(network, peers)
        self._change({network: _Route(None if source is None else ip_address(source), frozenset(users))})

    def remove(self, network: IPNetwork | str) -> None:
        """Undo `add`. ESRCH: there is none."""
        network = ip_network(network)
        if network not in self._routes:
            raise NatCompatError(errno.ESRCH, f"there is no route to {network}")
        self._change({network: None})

    def follow(self, policies: Iterable[Policy]) -> None:
        """Make the routes those that `policies` want, and no others; whole or not at all.

        What outbound policies protect or discard goes into the device, if it is from a network that one
        of them is for; of this host itself if the device or this host has such an address, which is then
        preferred. What they bypass goes past it where routes can say so; else it goes into the device,
        and ESP drops it (see `natcompat.esp.device.policy_routes`).
        """
        before, self._policies = self._policies, PolicyRoutes(policies)
        try:
            self._follow(self._routes.keys() | self._policies.destinations())
        except BaseException:
            self._policies = before
            raise

    def add_policy(self, policy: Policy) -> None:
        """Follow `policy`, too; like `follow`, in a time that does not depend on the number of policies."""
        try:
            self._follow(self._policies.add(policy))
        except BaseException:
            self._policies.remove(policy)
            raise

    def delete_policy(self, policy: Policy) -> None:
        """Stop following `policy`."""
        try:
            self._follow(self._policies.remove(policy))
        except BaseException:
            self._policies.add(policy)
            raise

    def _follow(self, destinations: Set[IPNetwork]) -> None:
        """Make the routes to `destinations` those that the policies want."""
        addresses = list(dict.fromkeys((*self._device.addresses, *self._netlink.addresses())))
        if addresses != list(self._addresses):
            self._addresses = {address: frozenset(covering(ip_network(address))) for address in addresses}
            destinations = destinations | self._policies.destinations()
        if self.refusal:
            peers = self._policies.peers()
            for network in self._policies.destinations():
                if self._policies.sources(network):
                    refuse_loop(network, peers)
        self._change({network: self._wanted(network) for network in destinations})

    def _wanted(self, destination: IPNetwork) -> _Route | None:
        """Return the route that the policies want; None: they want none."""
        sources = self._policies.sources(destination)
        if not sources:
            return None if sources is None or self.refusal else _PAST
        local = (address for address, nets in self._addresses.items() if not nets.isdisjoint(sources))
        preferred = next(local, None)
        if _EVERYBODY[destination.version] in sources:
            return _Route(preferred, frozenset({_EVERYBODY[destination.version]}))
        return _Route(preferred, sources if preferred is None else sources | {None})

    def _change(self, routes: Mapping[IPNetwork, _Route | None]) -> None:
        """Make the routes to some networks these, whole or not at all. None: there shall be none."""
        before = {network: self._routes.get(network) for network in routes}
        try:
            self._become(routes)
        except BaseException:
            for network, route in before.items():
                if route is None:
                    with contextlib.suppress(OSError):
                        self._remove(network)
            with contextlib.suppress(OSError):
                self._become(before)
            raise

    def _become(self, routes: Mapping[IPNetwork, _Route | None]) -> None:
        """Make the routes these. New ones come before old ones go, lest packets leave in the clear."""
        changed = {network: route for network, route in routes.items() if route != self._routes.get(network)}
        for network, route in changed.items():
            if route is not None and route is not _PAST:
                self._lead(network, route)
        for network, route in changed.items():
            if route is _PAST:
                self._remove(network)
                self._netlink.add_throw(network, table=self.table)
                self._note(network, route)
        self._set_rules()
        for network, route in changed.items():
            if route is None:
                self._remove(network)
        self._set_rules()

    def _lead(self, network: IPNetwork, route: _Route) -> None:
        if self._routes.get(network) is _PAST:
            self._remove(network)
        before = self._routes.get(network)
        if before is None or before.preferred != route.preferred:
            self._netlink.add_route(
                self._device.index,
                network,
                table=self.table,
                source=route.preferred,
                replace=before is not None,
            )
        self._note(network, route)

    def _remove(self, network: IPNetwork) -> None:
        route = self._routes.get(network)
        if route is not None:
            index = 0 if route is _PAST else self._device.index
            self._netlink.delete_route(index, network, table=self.table)
            self._note(network, None)

    def _note(self, network: IPNetwork, route: _Route | None) -> None:
        """Record `route` as the one to `network`; `_set_rules` must follow."""
        before = (self._routes.pop(network, None) or _PAST).users
        after = (route or _PAST).users
        if route is not None:
            self._routes[network] = route
        for users, change in ((after - before, 1), (before - after, -1)):
            for user in users:
                for rule in self._rules_for(network.version, user):
                    self._uses[rule] += change
                    self._unsettled[rule] = None

    def covers(self, address: IPAddress | str) -> bool:
        """Tell whether a route leads to `address` through the device."""
        networks = covering(ip_network(address))
        return any(self._routes.get(network, _PAST) is not _PAST for network in networks)

    def check_peer(self, peer: IPAddress | str) -> None:
        """Raise unless outer packets can go to `peer` and come from there, by the system's own word.

        ELOOP: they would go into the device. ENETUNREACH: nowhere. EHOSTUNREACH: strict reverse path
        filtering would drop what comes from there.
        """
        peer = ip_address(peer)
        if not self.covers(peer):
            return
        check_way(self._netlink, peer, self._device, mark=MARK, refusal=self.refusal)

    def restore(self) -> list[str]:
        """Put rules and routes back that somebody took away; return what they were, in words."""
        restored = []
        present = set(self._netlink.rules())
        for rule in self._rules:
            if rule not in present:
                self._netlink.add_rule(rule)
                restored.append(f"the rule of priority {rule.priority} to table {rule.table}")
        routes = self._netlink.routes_in(self.table)
        for network, route in self._routes.items():
            index = 0 if route is _PAST else self._device.index
            if (index, network) in routes:
                continue
            if route is _PAST:
                self._netlink.add_throw(network, table=self.table)
            else:
                self._netlink.add_route(
                    index, network, table=self.table, source=route.preferred, replace=True
                )
            restored.append(f"the route to {network}")
        return restored

    def follow_addresses(self) -> None:
        """Let the routes prefer the addresses that the device and this host have now."""
        self._follow(set())

    def close(self) -> None:
        """Remove rules and routes. May be repeated."""
        for rule in reversed(self._rules):
            with contextlib.suppress(OSError):  # somebody else did
                self._netlink.delete_rule(rule)
        self._rules.clear()
        for network in list(self._routes):
            with contextlib.suppress(OSError):  # the device is gone
                self._remove(network)
        self._routes.clear()
        self._netlink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _set_rules(self) -> None:
        """Make the rules those that the routes need: what is new first."""
        changed, self._unsettled = self._unsettled, {}
        for rule in changed:
            if self._uses[rule] and rule not in self._rules:
                self._netlink.add_rule(rule)
                self._rules[rule] = None
        for rule in reversed(changed):
            if not self._uses[rule]:
                del self._uses[rule]
                if rule in self._rules:
                    self._netlink.delete_rule(rule)
                    del self._rules[rule]

    def _rules_for(self, version: int, user: IPNetwork | None) -> Iterator[Rule]:
        """Yield the rules that lead what `user` sends into the table."""
        if self.refusal:
            return
        family, priority = family_of(version), PRIORITY
        if self._prefer_main:
            priority = _PREFER_MAIN_PRIORITY + SLOT * (self._device.index % _PREFER_MAIN_SLOTS) + 1
        here = Rule(family, priority, self.table, without_mark=MARK)
        if user is None:
            yield here._replace(priority=priority + _OWN, own=True)
        elif user == _EVERYBODY[version]:
            yield here._replace(priority=priority + _ALL)
        else:
            yield here._replace(priority=priority + _FROM, source=user)
        if self._prefer_main:  # behind the others, without which it is stale
            yield Rule(family, priority - 1, MAIN_TABLE, not_default=True)

    def _why_not(self) -> str:
        """Return why there can be no rules or marks; empty: there can."""
        rule = Rule(socket.AF_INET, PRIORITY, self.table, without_mark=MARK)
        try:
            self._netlink.add_rule(rule)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EAFNOSUPPORT):
                return f"this kernel has no rules: {error.strerror}"
            raise
        self._netlink.delete_rule(rule)
        return ""


def _refused(operation: str, error: OSError) -> NatCompatError:
    remedy = "Run as root, or grant CAP_NET_ADMIN" if error.errno == errno.EPERM else ""
    return NatCompatError(error.errno or errno.EIO, f"{operation}: {error.strerror}", remedy)
