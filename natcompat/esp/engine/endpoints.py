"""`LocalEndpoints`: the addresses and ports of this host that ESP must not reach from inside an SA."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from natcompat.esp.engine.packet import Flow, address_of
from natcompat.ipsec import IPAddress

_UDP: Final = 17


def not_local(_: IPAddress) -> bool:
    """Return False: no address is one of this host."""
    return False


class LocalEndpoints:
    """UDP sockets with the option. Solaris drops what an SA brings for them (kstat esp_nat_t_ipsec).

    IKE and ESP-in-UDP on such a port never travel inside ESP.
    """

    def __init__(
        self,
        endpoints: Iterable[tuple[IPAddress, int]] = (),
        is_local: Callable[[IPAddress], bool] = not_local,
    ) -> None:
        """`endpoints`: local address and port of each; the unspecified address stands for every local one.

        `is_local` tells whether an address is one of this host. It is called for the first packet of a flow
        to the port of an endpoint with the unspecified address, and must not raise.
        """
        self._ports: dict[int, set[IPAddress]] = {}
        self._is_local = is_local
        for address, port in endpoints:
            self._ports.setdefault(port, set()).add(getattr(address, "ipv4_mapped", None) or address)

    def __contains__(self, flow: Flow) -> bool:
        """Tell whether packets of `flow` would reach one of the endpoints."""
        addresses = self._ports.get(flow.destination_port)
        if addresses is None or flow.protocol != _UDP:
            return False
        address = address_of(flow.version, flow.destination)
        if address in addresses:
            return True
        # a socket bound to :: takes IPv4 as well, unless it is IPV6_V6ONLY
        wildcard = any(bound.is_unspecified and bound.version in (6, flow.version) for bound in addresses)
        return wildcard and self._is_local(address)
