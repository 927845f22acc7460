"""The backend ``userspace`` under a tunnel: ESP in this process, inner packets by a TUN device."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from natcompat.commands.tunnel.file import Device, Tunnel
from natcompat.commands.tunnel.reserve import Numbers
from natcompat.errors import NatCompatError
from natcompat.ipsec import (
    Direction,
    InstalledSA,
    IPAddress,
    MappingChange,
    SaId,
    SecurityAssociation,
    UDPEncapsulation,
)
from natcompat.ipsec.device import PacketDevice

if TYPE_CHECKING:
    from natcompat.esp.device.host_traffic import HostTraffic

ETHERNET_MTU = 1500
"""The path MTU where the kernel does not tell one."""


class ProcessSide:
    """The ESP of this process, until `close`. A TUN device takes CAP_NET_ADMIN: EPERM."""

    def __init__(self, tunnel: Tunnel, sock: socket.socket) -> None:
        from natcompat import set_nat_t_endpoint
        from natcompat.esp.userspace import UserspaceIPsec, open_process_ipsec

        self._tunnel = tunnel
        self._names = {(sa.direction, sa.spi) for sa in tunnel.associations}
        self.device: str | None = None
        self.mtu: int | None = None
        self._bring_up: Callable[[], None] = _nothing
        self._undo = contextlib.ExitStack()
        try:
            follow = tunnel.endpoint.follow_mapping
            if tunnel.device is None:
                self.ipsec: UserspaceIPsec = open_process_ipsec(device=_nowhere(), follow_mapping=follow)
            else:
                host = self._make_device(tunnel.device, sock)
                self._undo.callback(host.close)
                self.ipsec = open_process_ipsec(host=host, follow_mapping=follow)
            self._undo.callback(self.ipsec.close)
            self.permit: Callable[[SaId, int], object] | None = self.ipsec.permit
            for policy in tunnel.policies:
                self.ipsec.add_policy(policy)
            set_nat_t_endpoint(sock, backend="userspace")
        except BaseException:
            self.close()
            raise

    def _make_device(self, settings: Device, sock: socket.socket) -> HostTraffic:
        """Make the TUN device and its guard, and keep what `sock` sends out of it, before any route."""
        from natcompat.esp import choice as datapaths
        from natcompat.esp.carrier.mtu import device_mtu
        from natcompat.esp.carrier.path_mtu import kernel_path_mtu
        from natcompat.esp.device.host_traffic import HostTraffic
        from natcompat.esp.device.tun import TunDevice

        mtu = settings.mtu or device_mtu(
            self._tunnel.associations, lambda host: kernel_path_mtu(host, sock) or ETHERNET_MTU
        )
        in_c = datapaths.select().name == "c"  # segments are then cut and joined there
        try:
            host = HostTraffic(
                lambda: TunDevice(settings.name, mtu=mtu, vnet_header=in_c),
                lockdown=settings.lockdown,
                routes_follow=False,
            )
        except NatCompatError as error:
            remedies = [error.remedy] if error.remedy else []
            remedies.append('Without a device (kind = "none" in [device]) this end only receives')
            raise NatCompatError(error.errno or 0, error.strerror or "", ". ".join(remedies)) from None
        tun, routes = host.device, host.routes
        routes.exempt(sock)
        self.device, self.mtu = tun.name, mtu
        peers = {str(self._tunnel.endpoint.remote_address)}

        def bring_up() -> None:
            for address in settings.addresses:
                tun.add_address(str(address))
            for network in settings.routes:
                sources = (address.ip for address in settings.addresses if address.version == network.version)
                host.add_route(network, next(sources, None), peers=peers)
            for peer in peers:
                routes.check_peer(peer)

        self._bring_up = bring_up
        return host

    def add_sa(self, sa: SecurityAssociation, sequence: int | None, permitted: int | None) -> None:
        """Install an SA."""
        if self._tunnel.endpoint.keepalive != "nat":
            sa = replace(sa, nat_keepalive=None)
        self.ipsec.add_sa(sa, sequence=sequence, permitted=permitted)

    def open_device(self) -> None:
        """Give the device its addresses and routes."""
        self._bring_up()

    def installed(self) -> Sequence[InstalledSA]:
        """Return the SAs that are there."""
        return [sa for sa in self.ipsec.list_sas() if not sa.larval]

    def numbers(self) -> Numbers:
        """Return the current names of the SAs, and the last number sent or highest received of each."""
        return {
            (sa.association.direction, sa.sa_id.spi): (sa.sa_id, sa.usage.sequence or 0)
            for sa in self.installed()
            if sa.association is not None
        }

    def drops(self) -> Mapping[str, int]:
        """Return the number of dropped packets by cause."""
        return {reason.value: count for reason, count in sorted(self.ipsec.counters().items(), key=str)}

    def send_dummy(self, sa_id: SaId) -> None:
        """Send a dummy packet by an outbound SA."""
        self.ipsec.send_dummy(sa_id)

    def start_at(self, address: IPAddress, port: int) -> None:
        """Let the SAs begin at the learnt address of the peer."""
        ports = UDPEncapsulation(local_port=self._tunnel.endpoint.local_port, remote_port=port)
        for sa in self.installed():
            if sa.association is not None:
                end = "destination" if sa.association.direction is Direction.OUT else "source"
                with contextlib.suppress(NatCompatError):  # it has just expired
                    self.ipsec.update_sa(sa.sa_id, encapsulation=ports, **{end: address})

    def follow(self, event: MappingChange) -> None:
        """Do nothing: the engine has done it."""

    def stop(self) -> Numbers:
        """Carry no more packets; return what the SAs have done, which is final."""
        self.ipsec.carrier.close()
        return self.numbers()

    def close(self) -> None:
        """Take all away."""
        self._undo.close()


def _nowhere() -> PacketDevice:
    """Return a device that nothing comes from, and that drops what it gets."""
    from natcompat.esp.device.queue import CallbackDevice

    return CallbackDevice(_nothing)


def _nothing(*_: object) -> None:
    pass
