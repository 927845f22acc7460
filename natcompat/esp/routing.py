"""Routes into a TUN device that never take the outer packets along.

A default route, or any that covers a peer's address, would lead the ESP packets back into the device they
came from. So the routes into a device have a table of their own, and a rule leads there only what lacks a
bit of the mark (SO_MARK), which the sockets of ESP and IKE have::

    with TunDevice() as tun, DeviceRoutes(tun) as routes:
        routes.exempt(sock)  # every socket that talks to the peer
        routes.add("0.0.0.0/0", source="10.1.0.1")
        routes.check_peer("203.0.113.2")

    or  routes.follow(policies)  # instead of add(): whatever they are about

    4500: not from all fwmark 0x20000000/0x20000000 lookup 1313144834     (ip rule)

- Every device of every process has a table (by the number of its interface), all share mark and priority:
  one device's outer packets into another, and back, would be a loop, too.
- The table comes before the main one, so that a more specific route there, which a DHCP server may have
  put in (RFC 3442), takes nothing out of the tunnel. With `prefer_main` it does, as wg-quick has it: hosts on
  the own link stay in reach (rule "lookup main suppress_prefixlength 0" in front).
- Strict reverse path filtering (rp_filter 1) drops what a peer sends that is covered by a route into the
  device: the look-up for it has no mark. src_valid_mark does not change that, as nothing marks what arrives.
  `check_peer` says so; loose filtering (2), the default of systemd, and none (0) do no harm. IPv6 has none.
- Routes go with the device, whatever ends the process. Rules go on `close`; those of a process that was
  killed lead to an empty table, which changes nothing, and the next `DeviceRoutes` removes them.

Where there are no rules (a kernel without CONFIG_IP_MULTIPLE_TABLES), routes go to the main table, and one
that covers a peer is refused.
"""

from __future__ import annotations

import contextlib
import errno
import socket
from collections.abc import Iterable
from ipaddress import ip_address, ip_network
from typing import Final, Self

from natcompat.associations import default_priority
from natcompat.errors import NatCompatError
from natcompat.esp.rtnetlink import MAIN_TABLE, Rtnetlink, Rule, family_of
from natcompat.esp.tun import TunDevice
from natcompat.ipsec import Action, Direction, IPAddress, IPNetwork, Policy

MARK: Final = 0x2000_0000
"""The bit of SO_MARK that outer packets have. Other bits are other people's."""

PRIORITY: Final = 4500
"""Of the rules; that of the main table is 32766."""

_PREFER_MAIN_PRIORITY: Final = 4600
_PREFER_MAIN_SLOTS: Final = 10000

_TABLES: Final = 0x4E45_0000
"""A device's table is this plus the index of its interface."""

_NO_LOOP_REMEDY: Final = (
    "Route smaller networks that leave the peer's address out, or give the process CAP_NET_ADMIN on a kernel "
    "with CONFIG_IP_MULTIPLE_TABLES"
)


def refuse_loop(network: IPNetwork | str, peers: Iterable[IPAddress | str]) -> None:
    """Raise ELOOP if `network` contains one of `peers`, the outer addresses.

    For routes whose outer packets cannot be kept out.
    """
    network = ip_network(network)
    for each in peers:
        peer = ip_address(each)
        peer = getattr(peer, "ipv4_mapped", None) or peer
        if peer in network:
            raise NatCompatError(
                errno.ELOOP,
                f"the route to {network} covers the peer {peer}: its outer packets would loop",
                _NO_LOOP_REMEDY,
            )


class DeviceRoutes:
    """The routes into one device, and the rules that lead there. Not thread-safe.

    Raises EPERM without CAP_NET_ADMIN. `close` it before the device.
    """

    def __init__(self, device: TunDevice, *, prefer_main: bool = False) -> None:
        self.table: int = _TABLES + device.index
        """Where the routes are; the main table (254) where there are no rules."""
        self.refusal: str = ""
        """Why routes that cover a peer are refused; empty where outer packets can be kept out."""
        self._device = device
        self._prefer_main = prefer_main
        self._rules: list[Rule] = []
        self._sources: dict[IPNetwork, IPAddress | str | None] = {}
        self._thrown: set[IPNetwork] = set()
        self._netlink = Rtnetlink()
        try:
            self._remove_stale()
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
        try:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, mark | MARK if on else mark & ~MARK)
        except OSError as error:
            raise _refused("The socket cannot be marked", error) from None

    def add(
        self,
        network: IPNetwork | str,
        source: IPAddress | str | None = None,
        *,
        peers: Iterable[IPAddress | str] = (),
    ) -> None:
        """Lead `network` into the device, with `source` as the preferred address of this host.

        `peers`: whom the route must not cover where they cannot be exempted: ELOOP. EEXIST: it is there.
        """
        network = ip_network(network)
        if self.refusal:
            refuse_loop(network, peers)
        self._device.add_route(network, source, table=self.table)
        try:
            if not self.refusal:
                self._lead_here(family_of(network.version))
        except BaseException:
            self._device.remove_route(network, table=self.table)
            raise
        self._sources[network] = source

    def remove(self, network: IPNetwork | str) -> None:
        """Undo `add`."""
        network = ip_network(network)
        self._device.remove_route(network, table=self.table)
        del self._sources[network]

    def follow(self, policies: Iterable[Policy]) -> None:
        """Make the routes those that `policies` want, and no others; whole or not at all.

        What outbound policies protect or discard goes into the device, with that address of the device,
        or of this host, as its source which the policy is for, if there is one. What they bypass goes
        past it where routes can say so (see `_goes_past`); else it goes into the device, and ESP drops it.
        """
        caught, thrown = routes_for(policies)
        if self.refusal:
            thrown.clear()
        peers = [each.destination for each in caught.values() if each.destination is not None]
        new = caught.keys() - self._sources.keys()
        own = [*self._device.addresses, *(self._netlink.addresses() if new else ())]
        with contextlib.ExitStack() as undo:
            for network in self._thrown & caught.keys():
                self._catch(network)
                undo.callback(self._throw, network)
            for network in new:
                addresses = (each for each in own if each in caught[network].selector.source)
                self.add(network, next(addresses, None), peers=peers)
                undo.callback(self.remove, network)
            for network in self._sources.keys() & thrown:
                source = self._sources[network]
                self.remove(network)
                undo.callback(self.add, network, source)
            for network in thrown - self._thrown:
                self._throw(network)
                undo.callback(self._catch, network)
            undo.pop_all()
        for network in self._sources.keys() - caught.keys():
            self.remove(network)
        for network in self._thrown - thrown:
            self._catch(network)

    def _throw(self, network: IPNetwork) -> None:
        self._netlink.add_throw(network, table=self.table)
        self._thrown.add(network)

    def _catch(self, network: IPNetwork) -> None:
        self._netlink.delete_route(0, network, table=self.table)
        self._thrown.remove(network)

    def covers(self, address: IPAddress | str) -> bool:
        """Tell whether a route leads to `address` through the device."""
        found = ip_address(address)
        return any(found in network for network in self._sources)

    def check_peer(self, peer: IPAddress | str) -> None:
        """Raise unless outer packets can go to `peer` and come from there, by the system's own word.

        ELOOP: they would go into the device. ENETUNREACH: nowhere. EHOSTUNREACH: strict reverse path
        filtering would drop what comes from there.
        """
        peer = ip_address(peer)
        if not self.covers(peer):
            return
        index = self._netlink.interface_to(peer, mark=0 if self.refusal else MARK)
        if index == self._device.index:
            raise NatCompatError(
                errno.ELOOP,
                f"the outer packets to {peer} would go into {self._device.name}",
                self.refusal and _NO_LOOP_REMEDY,
            )
        if not index:
            raise NatCompatError(
                errno.ENETUNREACH,
                f"without the routes into {self._device.name} there is none to {peer}",
                "Connect to the network first",
            )
        name = socket.if_indextoname(index)
        if peer.version == 4 and max(_rp_filter("all"), _rp_filter(name)) == 1:
            raise NatCompatError(
                errno.EHOSTUNREACH,
                f"{name} drops what {peer} sends: its reverse path filter is strict, and a route into "
                f"{self._device.name} covers it",
                f"Make the filter loose: sysctl -w net.ipv4.conf.{name}.rp_filter=2",
            )

    def close(self) -> None:
        """Remove rules and routes. May be repeated."""
        for rule in reversed(self._rules):
            with contextlib.suppress(OSError):  # somebody else did
                self._netlink.delete_rule(rule)
        self._rules.clear()
        for network in self._sources:
            with contextlib.suppress(OSError):  # the device is gone
                self._device.remove_route(network, table=self.table)
        self._sources.clear()
        for network in self._thrown:
            with contextlib.suppress(OSError):
                self._netlink.delete_route(0, network, table=self.table)
        self._thrown.clear()
        self._netlink.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lead_here(self, family: socket.AddressFamily) -> None:
        """Make the rules of `family`, unless they are there."""
        wanted = [Rule(family, PRIORITY, self.table, not_mark=MARK)]
        if self._prefer_main:
            priority = _PREFER_MAIN_PRIORITY + 2 * (self._device.index % _PREFER_MAIN_SLOTS)
            wanted = [  # in this order: without the other the rule of the main table is stale
                Rule(family, priority + 1, self.table, not_mark=MARK),
                Rule(family, priority, MAIN_TABLE, not_default=True),
            ]
        for rule in wanted:
            if rule not in self._rules:
                self._netlink.add_rule(rule)
                self._rules.append(rule)

    def _remove_stale(self) -> None:
        """Remove the rules of devices that are gone: their processes were killed."""
        rules = self._netlink.rules()
        present = {_TABLES + index for index, _ in socket.if_nameindex()}
        slots = {(each.family, each.priority - 1) for each in rules if each.table in present}
        with contextlib.ExitStack() as each_of_them:
            each_of_them.enter_context(contextlib.suppress(OSError))  # another process was faster
            for rule in rules:
                partner = rule.not_default and (rule.family, rule.priority) in slots
                if rule.table not in present and not partner:
                    each_of_them.callback(self._netlink.delete_rule, rule)
            for network, table in self._netlink.throws():
                if table not in present:
                    each_of_them.callback(self._netlink.delete_route, 0, network, table=table)

    def _why_not(self) -> str:
        """Return why there can be no rules or marks; empty: there can."""
        rule = Rule(socket.AF_INET, PRIORITY, self.table, not_mark=MARK)
        try:
            self._netlink.add_rule(rule)
        except OSError as error:
            if error.errno in (errno.EOPNOTSUPP, errno.EAFNOSUPPORT):
                return f"this kernel has no rules: {error.strerror}"
            raise
        self._netlink.delete_rule(rule)
        return ""


def routes_for(policies: Iterable[Policy]) -> tuple[dict[IPNetwork, Policy], set[IPNetwork]]:
    """Return the networks that go into the device, with a policy for each, and those that go past it."""
    outbound = [each for each in policies if each.direction is Direction.OUT]
    closed = [each for each in outbound if each.action is not Action.BYPASS]
    caught = {each.selector.destination: each for each in closed}
    thrown = {each.selector.destination for each in outbound if _goes_past(each, closed)}
    return caught, thrown - caught.keys()


def _goes_past(policy: Policy, closed: Iterable[Policy]) -> bool:
    """Tell whether what goes where `policy` says may pass by the device, because of its destination alone.

    Only what no policy of `closed`, which protect or discard, wants: none that overlaps comes first by its
    priority, or has sources that `policy` is not for. One whose destination is more specific has a route
    that is, too.
    """
    mine = policy.selector
    if policy.action is not Action.BYPASS or mine.protocol or mine.source_port or mine.destination_port:
        return False
    for each in closed:
        other = each.selector
        if not _overlap(mine.destination, other.destination):
            continue
        if other.destination.prefixlen > mine.destination.prefixlen:
            continue
        if not _contains(mine.source, other.source) or _priority(policy) >= _priority(each):
            return False
    return True


def _overlap(one: IPNetwork, other: IPNetwork) -> bool:
    return _contains(one, other) or _contains(other, one)


def _contains(wide: IPNetwork, narrow: IPNetwork) -> bool:
    return narrow.network_address in wide and narrow.prefixlen >= wide.prefixlen


def _priority(policy: Policy) -> int:
    return default_priority(policy.selector) if policy.priority is None else policy.priority


def _rp_filter(name: str) -> int:
    """Return the reverse path filter of an interface: 0 none, 1 strict, 2 loose (ip-sysctl.rst)."""
    try:
        with open(f"/proc/sys/net/ipv4/conf/{name}/rp_filter") as file:
            return int(file.read())
    except OSError:
        return 0


def _refused(what: str, error: OSError) -> NatCompatError:
    remedy = "Run as root, or grant CAP_NET_ADMIN" if error.errno == errno.EPERM else ""
    return NatCompatError(error.errno or errno.EIO, f"{what}: {error.strerror}", remedy)
