"""Inner addresses of this host under the kernel's IPsec, and routes that prefer them as source.

The addresses are on a TUN interface that no packet passes: the kernel's policies take the packets that its
routes lead there, and replace the route by that of the outer packet (xfrm_lookup()). Without a policy they
end there, and none leaves in the clear. The interface ends with its descriptor, after SIGKILL, too, and its
addresses and routes with it; a rule that is left leads to an empty table.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import threading
from collections.abc import Callable, Iterable
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from typing import Final

from natcompat.errors import NatCompatError, get_logger
from natcompat.ipsec import Action, Direction, IPAddress, IPNetwork, Mode, Policy
from natcompat.kernel.xfrm.netlink import HEADER, NETLINK_ROUTE, Netlink, attributes
from natcompat.kernel.xfrm.probe import NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL

_log = get_logger()

NAME: Final = "natcompat-in%d"
PRIORITY: Final = 4499
"""Of the rule, in front of those of packet devices (natcompat.esp.device.routes)."""
TABLES: Final = 0x4E45_0000
"""The routing table is this plus the index of the interface, as that of a packet device."""
PROTOCOL: Final = 78
"""Who made a route or a rule (rtnetlink(7)): natcompat, as for packet devices."""

_TUNSETIFF: Final = 0x400454CA  # linux/if_tun.h
_IFF_TUN_NO_PI: Final = 0x1001
_IFREQ: Final = struct.Struct("16sH22x")
_IFF_UP: Final = 1
_RTM_NEWLINK, _RTM_NEWADDR, _RTM_DELADDR = 16, 20, 21  # linux/rtnetlink.h
_RTM_NEWROUTE, _RTM_DELROUTE = 24, 25
_RTM_NEWRULE, _RTM_DELRULE, _RTM_GETRULE = 32, 33, 34
_RTN_UNICAST, _RTN_THROW = 1, 9
_SCOPE_LINK: Final = 253
_IFA_ADDRESS, _IFA_LOCAL, _IFA_FLAGS = 1, 2, 8  # linux/if_addr.h
_IFA_F_NODAD: Final = 2
_RTA_DST, _RTA_OIF, _RTA_PREFSRC, _RTA_TABLE = 1, 4, 7, 15
_FRA_IIFNAME, _FRA_PRIORITY, _FRA_TABLE, _FRA_PROTOCOL = 3, 6, 15, 21  # linux/fib_rules.h
_TO_TABLE: Final = 1
_CREATE: Final = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL
_REMEDIES: Final = {
    errno.EEXIST: "This host has the address already: remove it there, or leave it as it is",
    errno.EADDRNOTAVAIL: "Remove only what add_address() gave",
    errno.EPERM: "Run as root, or grant CAP_NET_ADMIN",
    errno.EACCES: "Switch IPv6 on (sysctl net.ipv6.conf.all.disable_ipv6)",
}


class InnerAddresses:
    """Inner addresses of the network namespace of the thread that makes this object. Thread-safe.

    The interface is there while there are addresses. `policies` returns those that are installed.
    """

    def __init__(self, policies: Callable[[], Iterable[Policy]]) -> None:
        self._policies = policies
        self._namespace = _namespace()
        self._lock = threading.RLock()
        self._interface: Interface | None = None

    def add(self, address: str | IPAddress | IPv4Interface | IPv6Interface) -> None:
        """Give this host `address`, whole or not at all.

        EEXIST: it was given before. ENOENT: there is no /dev/net/tun. EPERM: no CAP_NET_ADMIN. EINVAL: the
        calling thread is in another network namespace.
        """
        inner = ip_interface(address)
        with self._lock, contextlib.ExitStack() as undo:
            if _namespace() != self._namespace:
                raise NatCompatError(
                    errno.EINVAL,
                    "this thread is in another network namespace than that in which IPsec was opened",
                    "Call add_address() in a thread of that namespace",
                )
            interface = self._interface or Interface()
            if self._interface is None:
                undo.callback(interface.close)
            interface.add(inner)
            undo.callback(interface.remove, inner)
            interface.follow(self._policies())
            undo.pop_all()
            self._interface = interface

    def remove(self, address: str | IPAddress | IPv4Interface | IPv6Interface) -> None:
        """Take `address` away, with the routes that prefer it. EADDRNOTAVAIL: it was not given."""
        inner = ip_interface(address)
        with self._lock:
            if self._interface is None or inner.ip not in self._interface.addresses:
                raise NatCompatError(
                    errno.EADDRNOTAVAIL, f"{inner.ip} is no inner address", _REMEDIES[errno.EADDRNOTAVAIL]
                )
            self._interface.remove(inner)
            if not self._interface.addresses:
                self.close()
            else:
                self.follow()

    def follow(self) -> None:
        """Make the routes that the installed policies ask for, where there are addresses."""
        with self._lock:
            if self._interface is not None:
                self._interface.follow(self._policies())

    def follow_deletion(self) -> None:
        """Remove routes whose policy is gone. A route that stays leads nowhere; the error is logged."""
        try:
            self.follow()
        except OSError as error:
            _log.warning("a route to an inner network could not be removed: %s", error)

    def close(self) -> None:
        """Remove the interface, with its addresses and routes."""
        with self._lock:
            interface, self._interface = self._interface, None
            if interface is not None:
                interface.close()


class Interface:
    """The interface, its addresses and routes. Not thread-safe."""

    def __init__(self) -> None:
        self.addresses: dict[IPAddress, IPv4Interface | IPv6Interface] = {}
        self._routes: dict[IPNetwork, IPAddress | None] = {}
        """Network and preferred source; None: packets to it are looked up in the next table."""
        self._undo = contextlib.ExitStack()
        try:
            self._netlink = Netlink(protocol=NETLINK_ROUTE)
            self._undo.callback(self._netlink.close)
            descriptor, name = _open_interface()
            self._undo.callback(os.close, descriptor)
            self._index = socket.if_nametoindex(name)
            self.table: int = TABLES + self._index
            self._remove_stale_rules()
            up = struct.pack("=BxHiII", socket.AF_UNSPEC, 0, self._index, _IFF_UP, _IFF_UP)
            self._request("Bringing the interface up", up, _RTM_NEWLINK, NLM_F_ACK)
            for family in (socket.AF_INET, socket.AF_INET6):
                self._add_rule(family)
        except BaseException:
            self._undo.close()
            raise

    def close(self) -> None:
        """Remove the rules, the routes past the interface, and the interface with all that it has."""
        for network, source in list(self._routes.items()):
            if source is None:  # these have no interface to end with
                self._remove_route(network)
        self._undo.close()

    def add(self, interface: IPv4Interface | IPv6Interface) -> None:
        """Add an address."""
        self._address(interface, _RTM_NEWADDR, _CREATE, "Adding")
        self.addresses[interface.ip] = interface

    def remove(self, interface: IPv4Interface | IPv6Interface) -> None:
        """Remove an address, and the routes that prefer it."""
        for network in [network for network, source in self._routes.items() if source == interface.ip]:
            self._remove_route(network)
        self._address(self.addresses.pop(interface.ip), _RTM_DELADDR, NLM_F_ACK, "Removing")

    def follow(self, policies: Iterable[Policy]) -> None:
        """Make the routes that outbound policies ask for, for the addresses that they cover; remove others.

        Whole or not at all: on an error the routes are those of before.
        """
        routes: dict[IPNetwork, IPAddress | None] = {}
        peers: dict[IPNetwork, IPAddress | None] = {}
        for policy in policies:
            covered = _covered(policy, self.addresses)
            if covered and policy.destination is not None:
                routes.setdefault(policy.selector.destination, covered[0])
                peers[ip_interface(policy.destination).network] = None
        routes |= peers
        with contextlib.ExitStack() as undo:
            # ways to peers first, so that no outer packet takes another route in between
            for network, source in sorted(routes.items(), key=lambda route: route[1] is not None):
                if self._routes.get(network, ...) == source:
                    continue
                if network in self._routes:
                    undo.callback(self._add_route, network, self._routes[network])
                    self._remove_route(network)
                self._add_route(network, source)
                undo.callback(self._remove_route, network)
            undo.pop_all()
        for network in self._routes.keys() - routes.keys():
            self._remove_route(network)

    def _add_route(self, network: IPNetwork, source: IPAddress | None) -> None:
        body = self._route(network, source)
        if source is not None:
            body += _attribute(_RTA_OIF, struct.pack("=I", self._index))
            body += _attribute(_RTA_PREFSRC, source.packed)
        self._request(f"Adding the route to {network}", body, _RTM_NEWROUTE, _CREATE)
        self._routes[network] = source

    def _remove_route(self, network: IPNetwork) -> None:
        body = self._route(network, self._routes.pop(network))
        with contextlib.suppress(NatCompatError):  # somebody was faster, or the interface is gone
            self._request(f"Removing the route to {network}", body, _RTM_DELROUTE, NLM_F_ACK)

    def _route(self, network: IPNetwork, source: IPAddress | None) -> bytes:
        """Return struct rtmsg and the attributes that name the route."""
        kind = _RTN_THROW if source is None else _RTN_UNICAST
        scope = _SCOPE_LINK if network.version == 4 and kind == _RTN_UNICAST else 0
        family = _family(network.version)
        body = struct.pack("=8BI", family, network.prefixlen, 0, 0, 0, PROTOCOL, scope, kind, 0)
        body += _attribute(_RTA_TABLE, struct.pack("=I", self.table))
        return body + (_attribute(_RTA_DST, network.network_address.packed) if network.prefixlen else b"")

    def _address(
        self, interface: IPv4Interface | IPv6Interface, kind: int, flags: int, operation: str
    ) -> None:
        ip = interface.ip
        body = struct.pack("=4BI", _family(ip.version), interface.network.prefixlen, 0, 0, self._index)
        body += _attribute(_IFA_ADDRESS, ip.packed) + _attribute(_IFA_LOCAL, ip.packed)
        if ip.version == 6:
            body += _attribute(_IFA_FLAGS, struct.pack("=I", _IFA_F_NODAD))
        self._request(f"{operation} the inner address {ip}", body, kind, flags)

    def _add_rule(self, family: int) -> None:
        try:
            self._request(
                "Adding the rule for inner addresses", _rule(family, self.table), _RTM_NEWRULE, _CREATE
            )
        except NatCompatError as error:
            if family == socket.AF_INET6 and error.errno in (errno.EAFNOSUPPORT, errno.EOPNOTSUPP):
                return  # this kernel has no IPv6
            raise
        self._undo.callback(self._remove_rule, family, self.table)

    def _remove_rule(self, family: int, table: int) -> None:
        with contextlib.suppress(OSError):  # somebody was faster
            self._request("Removing the rule", _rule(family, table), _RTM_DELRULE, NLM_F_ACK)

    def _remove_stale_rules(self) -> None:
        """Remove the rules of killed processes: those whose table belongs to no interface."""
        present = {TABLES + index for index, _ in socket.if_nameindex()}
        for family in (socket.AF_INET, socket.AF_INET6):
            message = bytearray(HEADER.size + 12)
            message[HEADER.size] = family
            with contextlib.suppress(OSError):  # this kernel has none of this family
                for answer in self._netlink.dump("Listing the rules", message, _RTM_GETRULE):
                    values = {
                        key: answer[start:end] for key, start, end in attributes(answer, HEADER.size + 12)
                    }
                    priority, table = (_number(values.get(key)) for key in (_FRA_PRIORITY, _FRA_TABLE))
                    if priority == PRIORITY and table not in present and _is_ours(values):
                        self._remove_rule(family, table)

    def _request(self, operation: str, body: bytes, kind: int, flags: int) -> None:
        message = bytearray(HEADER.size) + body
        self._netlink.request(operation, message, kind, flags, remedies=_REMEDIES)


def _open_interface() -> tuple[int, str]:
    """Return the descriptor of a new TUN interface, and its name."""
    try:
        descriptor = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise NatCompatError(
            error.errno or errno.ENOENT,
            f"an inner address needs a TUN interface, and /dev/net/tun cannot be opened: {error.strerror}",
            "Load the module tun, give the container /dev/net/tun, or assign the address yourself",
        ) from None
    try:
        made = fcntl.ioctl(descriptor, _TUNSETIFF, _IFREQ.pack(NAME.encode(), _IFF_TUN_NO_PI))
    except OSError as error:
        os.close(descriptor)
        raise NatCompatError(
            error.errno or errno.EPERM,
            f"an inner address needs a TUN interface: {error.strerror}",
            _REMEDIES[errno.EPERM],
        ) from None
    name: bytes = _IFREQ.unpack(made)[0]
    return descriptor, name.rstrip(b"\0").decode()


def _namespace() -> tuple[int, int]:
    """Return what identifies the network namespace of this thread."""
    status = os.stat("/proc/thread-self/ns/net")
    return status.st_dev, status.st_ino


def _covered(policy: Policy, addresses: Iterable[IPAddress]) -> list[IPAddress]:
    """Return the addresses whose packets an outbound tunnel policy protects."""
    if (policy.direction, policy.action, policy.mode) != (Direction.OUT, Action.PROTECT, Mode.TUNNEL):
        return []
    return [address for address in addresses if address in policy.selector.source]


def _rule(family: int, table: int) -> bytes:
    """Return the message of the rule: what this host sends itself looks into `table`."""
    return (
        struct.pack("=8BI", family, 0, 0, 0, 0, 0, 0, _TO_TABLE, 0)
        + _attribute(_FRA_PRIORITY, struct.pack("=I", PRIORITY))
        + _attribute(_FRA_TABLE, struct.pack("=I", table))
        + _attribute(_FRA_IIFNAME, b"lo\0")
        + _attribute(_FRA_PROTOCOL, bytes((PROTOCOL,)))
    )


def _is_ours(values: dict[int, bytes]) -> bool:
    return values.get(_FRA_PROTOCOL) == bytes((PROTOCOL,))


def _number(value: bytes | bytearray | None) -> int:
    return struct.unpack("=I", value)[0] if value else 0


def _family(version: int) -> int:
    return socket.AF_INET if version == 4 else socket.AF_INET6


def _attribute(kind: int, value: bytes) -> bytes:
    padding = bytes(-len(value) % 4)
    return struct.pack("=HH", 4 + len(value), kind) + value + padding
