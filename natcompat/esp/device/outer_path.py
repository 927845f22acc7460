"""Checks of the way that outer packets take to the peer."""

from __future__ import annotations

import errno
import socket
from collections.abc import Iterable
from ipaddress import ip_address, ip_network
from typing import Final

from natcompat.errors import NatCompatError
from natcompat.esp.device.rtnetlink import Rtnetlink
from natcompat.esp.device.tun import TunDevice
from natcompat.ipsec import IPAddress, IPNetwork

NO_LOOP_REMEDY: Final = (
    "Route smaller networks that leave the peer's address out, or give the process CAP_NET_ADMIN on a kernel "
    "with CONFIG_IP_MULTIPLE_TABLES"
)


def refuse_loop(network: IPNetwork | str, peers: Iterable[IPAddress | str]) -> None:
    """Raise ELOOP if `network` contains one of `peers`, the outer addresses.

    For routes whose outer packets cannot be kept out.
    """
    network = ip_network(network)
    for address in map(ip_address, peers):
        peer = getattr(address, "ipv4_mapped", None) or address
        if peer in network:
            raise NatCompatError(
                errno.ELOOP,
                f"the route to {network} covers the peer {peer}: its outer packets would loop",
                NO_LOOP_REMEDY,
            )


def check_way(netlink: Rtnetlink, peer: IPAddress, device: TunDevice, *, mark: int, refusal: str) -> None:
    """Raise as `DeviceRoutes.check_peer` does. `refusal`: why there is no `mark`; empty: there is."""
    index = netlink.interface_to(peer, mark=0 if refusal else mark)
    if index == device.index:
        raise NatCompatError(
            errno.ELOOP,
            f"the outer packets to {peer} would go into {device.name}",
            refusal and NO_LOOP_REMEDY,
        )
    if not index:
        raise NatCompatError(
            errno.ENETUNREACH,
            f"without the routes into {device.name} there is none to {peer}",
            "Connect to the network first",
        )
    name = socket.if_indextoname(index)
    if peer.version == 4 and max(rp_filter("all"), rp_filter(name)) == 1:
        raise NatCompatError(
            errno.EHOSTUNREACH,
            f"{name} drops what {peer} sends: its reverse path filter is strict, and a route into "
            f"{device.name} covers it",
            f"Make the filter loose: sysctl -w net.ipv4.conf.{name}.rp_filter=2",
        )


def rp_filter(name: str) -> int:
    """Return the reverse path filter of an interface: 0 none, 1 strict, 2 loose (ip-sysctl.rst)."""
    try:
        with open(f"/proc/sys/net/ipv4/conf/{name}/rp_filter") as file:
            return int(file.read())
    except OSError:
        return 0
