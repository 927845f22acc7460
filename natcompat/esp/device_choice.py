"""The TUN device that IPsec of this process opens by itself, and which options belong to it."""

from __future__ import annotations

import errno
import sys
from typing import TYPE_CHECKING

from natcompat.backends.base import NetworkNamespace
from natcompat.errors import NatCompatError
from natcompat.esp import choice as datapaths

if TYPE_CHECKING:
    from natcompat.esp.device.host_traffic import HostTraffic


def refuse_options(netns: NetworkNamespace | None, lockdown: bool) -> None:
    """Raise EOPNOTSUPP for options of a TUN device where the device is another."""
    for name, given in (("netns", netns is not None), ("lockdown", lockdown)):
        if given:
            raise NatCompatError(
                errno.EOPNOTSUPP,
                f"{name} is for a TUN device that natcompat makes",
                f'Omit {name}, or use device="tun"',
            )


def host_traffic(netns: NetworkNamespace | None, lockdown: bool) -> HostTraffic:
    """Return a TUN device with what applies policies to this host's traffic."""
    try:
        if sys.platform != "linux":
            raise NatCompatError(errno.ENOTSUP, "TUN devices are here for Linux only")
        from natcompat.esp.device.host_traffic import HostTraffic
        from natcompat.esp.device.tun import TunDevice

        vnet_header = datapaths.select().name == "c"
        return HostTraffic(lambda: TunDevice(vnet_header=vnet_header), netns=netns, lockdown=lockdown)
    except NatCompatError as error:
        remedies = [error.remedy] if error.remedy else []
        remedies.append('or take inner packets yourself: device="queue"')
        raise NatCompatError(error.errno or 0, error.strerror or "", ", ".join(remedies)) from None
