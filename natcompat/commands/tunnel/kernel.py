"""The backend ``linux`` under a tunnel: ESP in the kernel, inner addresses on lo, routes by the outer way."""

from __future__ import annotations

import contextlib
import errno
import hmac
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Final

from natcompat.commands.tunnel.file import Tunnel
from natcompat.commands.tunnel.reserve import Name, Numbers
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

_IFA_F_NODAD: Final = 0x02  # linux/if_addr.h


class KernelSide:
    """SAs and policies in the kernel, until `close`. EPERM: it takes CAP_NET_ADMIN.

    What a tunnel of this file that was killed has left there is taken away first: since the port could be
    bound, nobody uses it. The kernel went on with it, so its SAs know better than the state file how far.
    """

    permit: Callable[[SaId, int], object] | None = None
    """The kernel knows no reserved numbers; transforms that would need them are refused."""
    device: str | None = None
    mtu: int | None = None

    def __init__(self, tunnel: Tunnel, sock: socket.socket) -> None:
        from natcompat import set_nat_t_endpoint
        from natcompat.kernel.xfrm.kernel import XfrmIPsec

        self._tunnel = tunnel
        self._ids: dict[Name, SaId] = {}
        self._left: dict[Name, int] = {}
        """Sequence numbers of the SAs that were there."""
        self._was_killed = False
        """Whether a tunnel of this file has left something."""
        self._undo = contextlib.ExitStack()
        try:
            set_nat_t_endpoint(sock, backend="linux")
            self.ipsec: XfrmIPsec = self._undo.enter_context(XfrmIPsec())
            self._take_away_what_was_left()
            for policy in tunnel.policies:  # first, and gone last: nothing goes in the clear in between
                self.ipsec.add_policy(policy)
                self._undo.callback(_suppressed, self.ipsec.delete_policy, policy)
        except BaseException:
            self.close()
            raise

    def _take_away_what_was_left(self) -> None:
        """Delete SAs that have our names and keys, and policies that say what ours do."""
        left = {installed.sa_id: installed.association for installed in self.ipsec.list_sas()}
        for sa in self._tunnel.associations:
            other = left.get(sa.sa_id)
            if other is not None and hmac.compare_digest(
                other.encryption_key + other.integrity_key, sa.encryption_key + sa.integrity_key
            ):
                self._left[sa.direction, sa.spi] = self.ipsec.get_sa(sa.sa_id).sequence or 0
                _suppressed(self.ipsec.delete_sa, sa.sa_id)
        for policy in self._tunnel.policies:  # these do not expire with the SAs
            with contextlib.suppress(NatCompatError):  # there is none
                other_policy = self.ipsec.get_policy(policy).policy
                if self._left or replace(other_policy, priority=policy.priority) == policy:
                    self.ipsec.delete_policy(policy)
                    self._was_killed = True

    def add_sa(self, sa: SecurityAssociation, sequence: int | None, permitted: int | None) -> None:
        """Install an SA."""
        name = sa.direction, sa.spi
        self._ids[name] = self.ipsec.add_sa(sa, sequence=max(sequence or 0, self._left.get(name, 0)))
        self._undo.callback(self._delete, name)

    def _delete(self, name: Name) -> None:
        _suppressed(self.ipsec.delete_sa, self._ids[name])

    def open_device(self) -> None:
        """Put the inner addresses on lo, and let routes prefer them."""
        device = self._tunnel.device
        if device is None:
            return
        from pyroute2 import IPRoute
        from pyroute2.netlink.exceptions import NetlinkError

        with IPRoute() as route:
            loopback = route.link_lookup(ifname="lo")[0]
            try:
                for address in device.addresses:
                    host = {"index": loopback, "address": str(address.ip), "prefixlen": address.max_prefixlen}
                    flags = {"flags": _IFA_F_NODAD} if address.version == 6 else {}
                    self._add(route.addr, **host, **flags)
                    self._undo.callback(_in_netlink, "addr", host)
                for network in device.routes:
                    way = self._way(route)
                    source = next(
                        (address.ip for address in device.addresses if address.version == network.version),
                        None,
                    )
                    attributes = {"dst": str(network), **way}
                    if network.version != self._tunnel.endpoint.remote_address.version:
                        attributes.pop("gateway", None)
                    if source is not None:
                        attributes["prefsrc"] = str(source)
                    self._add(route.route, **attributes)
                    self._undo.callback(_in_netlink, "route", attributes)
            except NetlinkError as error:
                raise NatCompatError(
                    error.code,
                    f"an inner address or route was refused: {error}",
                    "Leave it away in [device] if it is there already",
                ) from None

    def _add(self, change: Callable[..., object], **arguments: object) -> None:
        from pyroute2.netlink.exceptions import NetlinkError

        try:
            change("add", **arguments)
        except NetlinkError as error:
            if error.code != errno.EEXIST or not self._was_killed:
                raise

    def _way(self, route: Any) -> dict[str, Any]:
        """Return how the peer is reached: what is for it goes there in the end."""
        (route_there,) = route.route("get", dst=str(self._tunnel.endpoint.remote_address))
        way: dict[str, Any] = {"oif": route_there.get_attr("RTA_OIF")}
        gateway = route_there.get_attr("RTA_GATEWAY")
        return way if gateway is None else {**way, "gateway": gateway}

    def installed(self) -> Sequence[InstalledSA]:
        """Return the SAs of this tunnel that are there."""
        sa_ids = set(self._ids.values())
        return [sa for sa in self.ipsec.list_sas() if sa.sa_id in sa_ids and not sa.larval]

    def numbers(self) -> Numbers:
        """Return the current names of the SAs, and the last number sent or highest received of each."""
        numbers = {}
        for name, sa_id in list(self._ids.items()):
            with contextlib.suppress(NatCompatError):  # it has expired
                numbers[name] = sa_id, self.ipsec.get_sa(sa_id).sequence or 0
        return numbers

    def drops(self) -> Mapping[str, int]:
        """Return nothing: the kernel counts for the whole namespace (/proc/net/xfrm_stat)."""
        return {}

    def send_dummy(self, sa_id: SaId) -> None:
        """Raise EOPNOTSUPP: a kernel sends no dummy packets."""
        raise NatCompatError(errno.EOPNOTSUPP, "the kernel sends no dummy packets")

    def start_at(self, address: IPAddress, port: int) -> None:
        """Let the SAs begin at the learnt port of the peer; its address is that of the policies."""
        if address == self._tunnel.endpoint.remote_address:
            self._use_port(port)

    def follow(self, event: MappingChange) -> None:
        """Send where the peer is now. Only its port may be another: policies name its address."""
        if event.new_address != event.old_address:
            raise NatCompatError(
                errno.EOPNOTSUPP,
                f"the peer has another address now, {event.new_address}, and is not followed there",
                "Write it into the file, or use the backend userspace",
            )
        self._use_port(event.new_port)

    def _use_port(self, port: int) -> None:
        ports = UDPEncapsulation(local_port=self._tunnel.endpoint.local_port, remote_port=port)
        for name, sa_id in self._ids.items():
            with contextlib.suppress(NatCompatError):  # of this one, if it has expired
                self._ids[name] = self.ipsec.update_sa(sa_id, encapsulation=ports)

    def stop(self) -> Numbers:
        """Return what was received; the kernel goes on to send until an SA is deleted."""
        return {name: number for name, number in self.numbers().items() if name[0] is Direction.IN}

    def close(self) -> None:
        """Remove addresses and routes, SAs and policies."""
        self._undo.close()


def _in_netlink(kind: str, arguments: dict[str, Any]) -> None:
    from pyroute2 import IPRoute
    from pyroute2.netlink.exceptions import NetlinkError

    with contextlib.suppress(NetlinkError), IPRoute() as route:  # somebody else may have removed it
        getattr(route, kind)("del", **arguments)


def _suppressed(function: Any, argument: object) -> None:
    with contextlib.suppress(NatCompatError):  # it has expired, or somebody has removed it
        function(argument)
