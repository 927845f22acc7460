"""Checks of the way that outer packets take to the peer."""

from __future__ import annotations

import errno
from collections.abc import Iterable
from ipaddress import ip_address, ip_network
from typing import Final

from natcompat.errors import NatCompatError
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


def rp_filter(name: str) -> int:
    """Return the reverse path filter of an interface: 0 none, 1 strict, 2 loose (ip-sysctl.rst)."""
    try:
        with open(f"/proc/sys/net/ipv4/conf/{name}/rp_filter") as file:
            return int(file.read())
    except OSError:
        return 0
