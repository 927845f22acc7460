"""`Control`: the verbs of `natcompat.ipsec.IPsec` on databases of this process."""

from __future__ import annotations

import errno
import socket
from ipaddress import IPv4Interface, IPv6Interface

from natcompat.errors import NatCompatError
from natcompat.esp.engine.crypto import supported_transforms
from natcompat.esp.engine.policy_verbs import PolicyVerbs
from natcompat.esp.engine.sa_verbs import AssociationVerbs
from natcompat.ipsec import Features, IPAddress, Transforms


class Control(AssociationVerbs, PolicyVerbs):
    """SAs and policies of this process."""

    @property
    def features(self) -> Features:
        """Return the abilities of the ESP of this process."""
        return Features(
            requires_udp_encapsulation=True,
            mapping_events=True,
            kernel_keepalive=False,
            marks=False,
            interface_ids=False,
            sa_direction=True,
            host_traffic=False,
            ranges=True,
        )

    def transforms(self) -> Transforms:
        """Return the transforms that SAs may have here."""
        return supported_transforms()

    def bypass(self, sock: socket.socket) -> None:
        """Do nothing: what sockets send is not subject to the policies of this engine."""

    def add_address(self, address: str | IPAddress | IPv4Interface | IPv6Interface) -> None:
        """Raise EOPNOTSUPP: an engine without a device of its own assigns no inner addresses."""
        raise NatCompatError(
            errno.EOPNOTSUPP,
            "this ESP engine has no device that could have an inner address",
            'Use open_ipsec("userspace") with a TUN, or assign the address yourself',
        )

    def remove_address(self, address: str | IPAddress | IPv4Interface | IPv6Interface) -> None:
        """Raise EADDRNOTAVAIL, likewise."""
        raise NatCompatError(errno.EADDRNOTAVAIL, "this ESP engine has no inner addresses")
