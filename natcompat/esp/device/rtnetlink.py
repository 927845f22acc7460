"""Links, addresses, routes and rules (rtnetlink(7)), as far as packet devices need them.

pyroute2 encodes and decodes; a plain netlink socket carries it, which also works inside a running event
loop (see `natcompat.kernel.xfrm.netlink`). Importing this takes as long as pyroute2 takes.
"""

from __future__ import annotations

import errno
import socket
import sys
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network
from typing import Any, Final, NamedTuple

from pyroute2.netlink.rtnl.fibmsg import fibmsg
from pyroute2.netlink.rtnl.ifaddrmsg import ifaddrmsg
from pyroute2.netlink.rtnl.ifinfmsg import ifinfmsg
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from natcompat.ipsec import IPAddress, IPNetwork
from natcompat.kernel.xfrm.netlink import HEADER, NETLINK_ROUTE, Netlink, attributes
from natcompat.kernel.xfrm.probe import NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL

MAIN_TABLE: Final = 254  # linux/rtnetlink.h, as all RT* and RTM_*

PROTOCOL: Final = 78
"""Who made a route or a rule, in rtnetlink's words: those above 4 are free, and this one is not taken."""

_RTM_NEWLINK, _RTM_DELLINK, _RTM_GETLINK = 16, 17, 18
_RTM_NEWADDR, _RTM_DELADDR, _RTM_GETADDR = 20, 21, 22
_RTM_NEWROUTE, _RTM_DELROUTE, _RTM_GETROUTE = 24, 25, 26
_RTM_NEWRULE, _RTM_DELRULE, _RTM_GETRULE = 32, 33, 34
_RTN_UNICAST, _RTN_THROW = 1, 9
_RTA_DST, _RTA_OIF, _RTA_TABLE = 1, 4, 15
_IFLA_IFNAME = 3  # linux/if_link.h
_RT_SCOPE_LINK = 253
_RT_SCOPE_NOWHERE = 255
_FR_ACT_TO_TBL = 1  # linux/fib_rules.h, as all FRA_*
_IFA_ADDRESS, _IFA_LOCAL = 1, 2
_IFA_F_NODAD = 0x02  # linux/if_addr.h
_IFF_UP = 0x1  # linux/if.h
_NLM_F_REPLACE = 0x100  # linux/netlink.h
_CREATE = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL

_PRIVILEGE = "Run as root, or grant CAP_NET_ADMIN (docker run --cap-add NET_ADMIN)"
_REMEDIES: Final[Mapping[int, str]] = {
    errno.EPERM: _PRIVILEGE,
    errno.EEXIST: "It is there already: remove it, or leave it to whoever made it",
    errno.ESRCH: "Somebody removed it",
    errno.ENODEV: "The device is gone: somebody deleted it",
    errno.EACCES: "IPv6 is switched off for the device (sysctl net.ipv6.conf.all.disable_ipv6)",
    errno.EOPNOTSUPP: "Run a kernel that has it (CONFIG_IPV6, CONFIG_IP_MULTIPLE_TABLES)",
    errno.EAFNOSUPPORT: "Run a kernel that has it (CONFIG_IPV6, CONFIG_IP_MULTIPLE_TABLES)",
}


class Rule(NamedTuple):
    """A rule of the routing policy database: who takes which table (ip-rule(8))."""

    family: socket.AddressFamily
    priority: int
    table: int
    without_mark: int = 0
    """Only packets that lack this bit of the mark; 0: all."""
    own: bool = False
    """Only what this host sends itself, from whatever address."""
    source: IPNetwork | None = None
    """Only packets from there."""
    not_default: bool = False
    """What the table says of default routes does not count (suppress_prefixlength 0)."""


class Link(NamedTuple):
    """An interface."""

    name: str
    up: bool


class Rtnetlink:
    """A socket for the network namespace of this thread. Methods may be called from any thread."""

    def __init__(self) -> None:
        self._netlink = Netlink(protocol=NETLINK_ROUTE)

    def close(self) -> None:
        """Close the socket. What was made stays."""
        self._netlink.close()

    def set_link(
        self, index: int, *, mtu: int | None = None, up: bool | None = None, segmented: int | None = None
    ) -> None:
        """Change an interface. `segmented`: bytes of the longest packet that is left to it to cut up."""
        message = ifinfmsg()
        message["index"] = index
        if up is not None:
            message["flags"], message["change"] = _IFF_UP if up else 0, _IFF_UP
        if mtu is not None:
            message["attrs"].append(["IFLA_MTU", mtu])
        if segmented is not None:
            message["attrs"].append(["IFLA_GSO_MAX_SIZE", segmented])
        self._request("Configuring the interface", message, _RTM_NEWLINK, NLM_F_ACK)

    def delete_link(self, index: int) -> None:
        """Remove an interface, with its addresses and routes."""
        message = ifinfmsg()
        message["index"] = index
        self._request("Removing the interface", message, _RTM_DELLINK, NLM_F_ACK)

    def link(self, index: int) -> Link | None:
        """Return the interface with `index`; None: there is none in this network namespace."""
        message = ifinfmsg()
        message["index"] = index
        message.encode()
        try:
            answer = self._netlink.request(
                "Looking at the interface", bytearray(message.data), _RTM_GETLINK, 0
            )
        except OSError as error:
            if error.errno == errno.ENODEV:
                return None
            raise
        names = (
            answer[start:end]
            for kind, start, end in attributes(answer, HEADER.size + 16)
            if kind == _IFLA_IFNAME
        )
        name = next(names, b"").rstrip(b"\0").decode(errors="replace")
        return Link(
            name, bool(int.from_bytes(answer[HEADER.size + 8 : HEADER.size + 12], sys.byteorder) & _IFF_UP)
        )

    def add_address(self, index: int, address: IPAddress, prefix_length: int) -> None:
        """Give an interface an address. There is no duplicate address detection for IPv6.

        Even so the kernel takes an IPv6 address into use a moment later (addrconf_dad_work()).
        """
        message = _address(index, address, prefix_length)
        if address.version == 6:
            message["attrs"].append(["IFA_FLAGS", _IFA_F_NODAD])
        self._request(f"Giving the interface the address {address}", message, _RTM_NEWADDR, _CREATE)

    def delete_address(self, index: int, address: IPAddress, prefix_length: int) -> None:
        """Undo `add_address`."""
        message = _address(index, address, prefix_length)
        self._request(f"Taking the address {address} away", message, _RTM_DELADDR, NLM_F_ACK)

    def add_route(
        self, index: int, network: IPNetwork, *, table: int, source: IPAddress | None, replace: bool = False
    ) -> None:
        """Lead `network` into an interface. `source`: the address that this host prefers as its own there."""
        message = _route(index, network, table)
        message["proto"], message["type"] = PROTOCOL, _RTN_UNICAST
        message["scope"] = _RT_SCOPE_LINK if network.version == 4 else 0
        if source is not None:
            message["attrs"].append(["RTA_PREFSRC", str(source)])
        flags = NLM_F_ACK | NLM_F_CREATE | (_NLM_F_REPLACE if replace else NLM_F_EXCL)
        self._request(f"Adding the route to {network}", message, _RTM_NEWROUTE, flags)

    def add_throw(self, network: IPNetwork, *, table: int) -> None:
        """Let what looks up `network` in `table` go on with the next rule."""
        message = _route(0, network, table)
        message["proto"], message["type"] = PROTOCOL, _RTN_THROW
        self._request(f"Adding the route past {network}", message, _RTM_NEWROUTE, _CREATE)

    def routes(self) -> list[tuple[int, IPNetwork, int]]:
        """Return interface (0: of `add_throw`), network and table of the routes made here, by any process."""
        found = []
        for message in self._dump("Listing the routes", rtmsg, _RTM_GETROUTE):
            if message["proto"] == PROTOCOL:
                default = "0.0.0.0" if message["family"] == socket.AF_INET else "::"  # noqa: S104
                network = ip_network(f"{message.get_attr('RTA_DST') or default}/{message['dst_len']}")
                # IPv6 has the loopback interface for those that lead nowhere
                index = 0 if message["type"] == _RTN_THROW else int(message.get_attr("RTA_OIF") or 0)
                found.append((index, network, int(message.get_attr("RTA_TABLE") or message["table"])))
        return found

    def routes_in(self, table: int) -> set[tuple[int, IPNetwork]]:
        """Return interface (0: of `add_throw`) and network of the routes in `table` that were made here."""
        routes = set()
        for family, cls in ((socket.AF_INET, IPv4Network), (socket.AF_INET6, IPv6Network)):
            message = bytearray(HEADER.size + 12)
            message[HEADER.size] = family
            for answer in self._netlink.dump("Listing the routes", message, _RTM_GETROUTE):
                length, protocol, kind = (
                    answer[HEADER.size + 1],
                    answer[HEADER.size + 5],
                    answer[HEADER.size + 7],
                )
                if protocol != PROTOCOL:
                    continue
                values = {key: answer[start:end] for key, start, end in attributes(answer, HEADER.size + 12)}
                if int.from_bytes(values.get(_RTA_TABLE, b""), sys.byteorder) == table:
                    address = values.get(_RTA_DST, bytes(4 if family == socket.AF_INET else 16))
                    index = int.from_bytes(values.get(_RTA_OIF, b""), sys.byteorder)
                    routes.add((0 if kind == _RTN_THROW else index, cls((address, length))))
        return routes

    def delete_route(self, index: int, network: IPNetwork, *, table: int) -> None:
        """Undo `add_route`, or with `index` 0 `add_throw`."""
        message = _route(index, network, table)
        message["scope"] = _RT_SCOPE_NOWHERE if network.version == 4 else 0  # whatever it has
        self._request(f"Removing the route to {network}", message, _RTM_DELROUTE, NLM_F_ACK)

    def interface_to(self, address: IPAddress, *, mark: int) -> int:
        """Return the index of the interface that packets with `mark` to `address` leave by; 0: none."""
        message = rtmsg()
        message["family"], message["dst_len"] = family_of(address.version), address.max_prefixlen
        message["attrs"] = [["RTA_DST", str(address)], ["RTA_MARK", mark]]
        message.encode()
        try:
            answer = self._netlink.request(
                f"Looking up the route to {address}", bytearray(message.data), _RTM_GETROUTE, 0
            )
        except OSError as error:
            if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES, errno.EINVAL):
                return 0
            raise
        found = rtmsg(answer)
        found.decode()
        return int(found.get_attr("RTA_OIF") or 0)

    def addresses_of(self, index: int) -> set[IPAddress]:
        """Return the addresses of an interface."""
        return {address for interface, address in self._all_addresses() if interface == index}

    def addresses(self) -> list[IPAddress]:
        """Return the addresses of this host, those of the loopback interface last."""
        addresses = [address for _, address in self._all_addresses()]
        return sorted(addresses, key=lambda address: address.is_loopback)

    def _all_addresses(self) -> Iterator[tuple[int, IPAddress]]:
        """Yield interfaces and addresses, as fast as it takes to do so for every policy."""
        message = bytearray(HEADER.size + 8)
        for answer in self._netlink.dump("Listing the addresses", message, _RTM_GETADDR):
            values = {kind: answer[start:end] for kind, start, end in attributes(answer, HEADER.size + 8)}
            packed = values.get(_IFA_LOCAL) or values.get(_IFA_ADDRESS)
            if packed is not None and len(packed) in (4, 16):
                index = int.from_bytes(answer[HEADER.size + 4 : HEADER.size + 8], sys.byteorder)
                yield index, ip_address(packed)

    def add_rule(self, rule: Rule) -> None:
        """Put a rule in. EEXIST: there is one like it."""
        self._request(_naming(rule), _encoded(rule), _RTM_NEWRULE, _CREATE)

    def delete_rule(self, rule: Rule) -> None:
        """Take a rule out."""
        self._request(_naming(rule), _encoded(rule), _RTM_DELRULE, NLM_F_ACK)

    def rules(self) -> list[Rule]:
        """Return the rules that `add_rule` made, by whatever process."""
        return [
            _decoded(message)
            for message in self._dump("Listing the rules", fibmsg, _RTM_GETRULE)
            if message.get_attr("FRA_PROTOCOL") == PROTOCOL
        ]

    def _dump(self, what: str, kind: Any, request: int) -> Iterator[Any]:
        for family in (socket.AF_INET, socket.AF_INET6):
            message = kind()
            message["family"] = family
            message.encode()
            try:
                answers = self._netlink.dump(what, bytearray(message.data), request)
            except OSError as error:
                if error.errno in (errno.EOPNOTSUPP, errno.EAFNOSUPPORT):
                    continue  # this kernel has none of this family
                raise
            for answer in answers:
                message = kind(answer)
                message.decode()
                if message["family"] == family:
                    yield message

    def _request(self, what: str, message: Any, kind: int, flags: int) -> None:
        message.encode()
        self._netlink.request(what, bytearray(message.data), kind, flags, remedies=_REMEDIES)


def family_of(version: int) -> socket.AddressFamily:
    """Return the address family of an IP version."""
    return socket.AF_INET if version == 4 else socket.AF_INET6


def _address(index: int, address: IPAddress, prefix_length: int) -> Any:
    message = ifaddrmsg()
    message["family"], message["prefixlen"] = family_of(address.version), prefix_length
    message["index"] = index
    message["attrs"] = [["IFA_ADDRESS", str(address)], ["IFA_LOCAL", str(address)]]
    return message


def _route(index: int, network: IPv4Network | IPv6Network, table: int) -> Any:
    message = rtmsg()
    message["family"], message["dst_len"] = family_of(network.version), network.prefixlen
    message["attrs"] = [["RTA_TABLE", table]]
    if index:
        message["attrs"].append(["RTA_OIF", index])
    if network.prefixlen:
        message["attrs"].append(["RTA_DST", str(network.network_address)])
    return message


def _naming(rule: Rule) -> str:
    return f"The routing rule of priority {rule.priority} for {rule.family.name}"


def _encoded(rule: Rule) -> Any:
    message = fibmsg()
    message["family"], message["action"] = rule.family, _FR_ACT_TO_TBL
    message["attrs"] = [
        ["FRA_PRIORITY", rule.priority],
        ["FRA_TABLE", rule.table],
        ["FRA_PROTOCOL", PROTOCOL],
    ]
    if rule.without_mark:
        message["attrs"] += [["FRA_FWMARK", 0], ["FRA_FWMASK", rule.without_mark]]
    if rule.own:
        message["attrs"].append(["FRA_IIFNAME", "lo"])
    if rule.source is not None:
        message["src_len"] = rule.source.prefixlen
        message["attrs"].append(["FRA_SRC", str(rule.source.network_address)])
    if rule.not_default:
        message["attrs"].append(["FRA_SUPPRESS_PREFIXLEN", 0])
    return message


def _decoded(message: Any) -> Rule:
    source = message.get_attr("FRA_SRC")
    return Rule(
        socket.AddressFamily(message["family"]),
        message.get_attr("FRA_PRIORITY") or 0,
        message.get_attr("FRA_TABLE") or message["table"],
        message.get_attr("FRA_FWMASK") or 0,
        message.get_attr("FRA_IIFNAME") == "lo",
        source and ip_network(f"{source}/{message['src_len']}"),
        message.get_attr("FRA_SUPPRESS_PREFIXLEN") == 0,
    )
