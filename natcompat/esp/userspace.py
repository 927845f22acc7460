"""IPsec of this process, whole: the ESP engine, a packet device, and what moves packets between them.

`open_process_ipsec` opens the one that endpoints use by themselves; `natcompat.open_ipsec` is the way to
it. More of them can be made, each for the endpoints that name it: ``set_nat_t_endpoint(sock, esp=ipsec)``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace as with_changes
from typing import TYPE_CHECKING, Final

from natcompat.backends.base import (
    Address,
    DeviceChoice,
    EspOutlet,
    NetworkNamespace,
    SocketReader,
    TakeBurst,
)
from natcompat.backends.process_esp import PROCESS_ESP
from natcompat.errors import NatCompatError, get_logger
from natcompat.esp import choice as datapaths
from natcompat.esp.carrier.mtu import device_mtu
from natcompat.esp.carrier.portable import Carrier
from natcompat.esp.device.queue import QueueDevice
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.portable import Sealed
from natcompat.esp.engine.results import Reason
from natcompat.ipsec import Action, Direction, Features, Policy, SaId, SecurityAssociation
from natcompat.ipsec.device import PacketDevice

if TYPE_CHECKING:
    from natcompat.backends.diversion import Diversion
    from natcompat.esp.device.routes import DeviceRoutes

_log = get_logger()


class UserspaceIPsec(EspEngine):
    """SAs and policies of this process, and their packets between endpoints and `device`.

    ESP of its endpoints is opened and goes to `device`; what comes from there is sealed and leaves by
    the endpoint whose port the SA names (`UDPEncapsulation.local_port`), as do NAT-keepalives. SAs and
    policies end with it, or with the process; `close` closes the device, too. See `EspEngine` for the
    rest, threads and fork included.
    """

    coalesce: Final = True
    """To an endpoint: this one takes bursts."""
    traffic_classes: Final = True
    """To an endpoint: this one wants to know the ECN field of outer headers."""

    def __init__(
        self,
        device: PacketDevice,
        *,
        routes: DeviceRoutes | None = None,
        follow_mapping: bool = False,
        datapath: str | None = None,
    ) -> None:
        """`routes`: into `device`; they follow the policies from now on, and are closed with it.

        `datapath`: as NATCOMPAT_DATAPATH, which it overrides.
        """
        chosen = datapaths.select(datapath)
        if chosen.make_path is None or chosen.make_carrier is None:
            raise ValueError(f"datapath: {chosen.name} makes nothing")
        super().__init__(
            transmit=self._transmit_keepalives, follow_mapping=follow_mapping, datapath=chosen.make_path
        )
        self._routes = routes
        self._device_mtu = device.mtu
        self.device: PacketDevice = device
        """Where inner packets come from and go to."""
        self.carrier: Carrier = chosen.make_carrier(self, device)
        """What moves packets."""
        self.datapath: str = f"{chosen.name} ({chosen.ciphers})" if chosen.ciphers else chosen.name
        """Which data path carries packets, as NATCOMPAT_DATAPATH calls it, and whose ciphers it has."""
        self.carrier.start()

    @property
    def features(self) -> Features:
        """What this one can do; `host_traffic` where routes lead into the device."""
        return with_changes(super().features, host_traffic=self._routes is not None)

    def inbound(
        self, burst: list[tuple[memoryview, Address]], traffic_classes: list[int] | None = None
    ) -> None:
        """Take diverted ESP, as the `esp` of `natcompat.set_nat_t_endpoint`."""
        self.carrier.inbound(burst, traffic_classes)

    def shed(self, count: int) -> None:
        """Count packets that an endpoint dropped since more came than is opened."""
        self.count(Reason.QUEUE, count)

    def attached(self, outlet: EspOutlet) -> None:
        """Let ESP leave by an endpoint that hands its own to this object."""
        if outlet.own:
            self.exempt(outlet.sock)
        self.carrier.attached(outlet)

    def detached(self, outlet: EspOutlet) -> None:
        """Let it leave there no longer."""
        self.carrier.detached(outlet)

    def exempt(self, sock: socket.socket) -> Callable[[socket.socket], object] | None:
        """Keep what an endpoint's socket sends out of the device; return the function that undoes it.

        None: there are no routes. An error (EPERM once CAP_NET_ADMIN is gone) is raised where a policy may
        take the socket's packets into the device, and logged where there is no such policy.
        """
        if self._routes is None:
            return None
        try:
            self._routes.exempt(sock)
        except NatCompatError as error:
            if any(_takes_outbound(entry.policy) for entry in self.list_policies()):
                raise NatCompatError(
                    error.errno or errno.EPERM,
                    "the socket cannot be exempted from the policies, which would take its IKE and ESP into "
                    f"{getattr(self.device, 'name', 'the device')}: {error.strerror}",
                    "Set the option before the process gives up CAP_NET_ADMIN",
                ) from error
            _log.warning("an endpoint's socket is not exempt from later policies: %s", error)
            return None
        return self._routes.end_exemption

    def bypass(self, sock: socket.socket) -> None:
        """Keep what `sock` sends out of the device: for sockets of IKE that are no endpoints (port 500).

        EPERM where routes lead into the device and CAP_NET_ADMIN is gone. Without routes it does nothing.
        """
        if self._routes is not None:
            self._routes.exempt(sock)

    def add_sa(
        self, sa: SecurityAssociation, *, sequence: int | None = None, permitted: int | None = None
    ) -> SaId:
        """Install `sa`; see `EspEngine.add_sa`. The MTU of the device shrinks to what the SA can carry."""
        sa_id = super().add_sa(sa, sequence=sequence, permitted=permitted)
        if sa.direction is Direction.OUT and self._routes is not None:  # else it is the caller's
            mtu = device_mtu([sa], self.carrier.paths.of)
            with self._lock:
                if mtu < self._device_mtu:
                    self._device_mtu = self.device.mtu = mtu
        return sa_id

    def add_policy(self, policy: Policy, *, replace: bool = False) -> None:
        """Install `policy`; see `EspEngine.add_policy`. Routes into the device follow.

        ELOOP: one would lead ESP itself into the device, and this kernel has no rules to prevent it.
        """
        with self._usable(), contextlib.ExitStack() as undo:
            entry = self._policies.get(policy)
            super().add_policy(policy, replace=replace)
            if entry is None:
                undo.callback(super().delete_policy, policy)
            else:
                undo.callback(super().add_policy, entry.policy, replace=True)
            if self._routes is not None:
                self._routes.add_policy(policy)
                undo.callback(self._routes.delete_policy, policy)
                self._check_peer(policy, self._routes)
                if entry is not None:
                    self._routes.delete_policy(entry.policy)
            undo.pop_all()

    def delete_policy(self, policy: Policy) -> None:
        """Remove a policy, and its route."""
        with self._usable():
            if self._routes is not None:
                self._routes.delete_policy(self._policy(policy).policy)
            super().delete_policy(policy)

    def flush_policies(self, *, reqid: int | None = None) -> None:
        """Remove every policy of this engine, and the routes; with `reqid`, those that have it."""
        with self._usable():
            if self._routes is not None:
                rest = (entry.policy for entry in self._policies if reqid not in (None, entry.policy.reqid))
                self._routes.follow(rest)
            super().flush_policies(reqid=reqid)

    @staticmethod
    def _check_peer(policy: Policy, routes: DeviceRoutes) -> None:
        if policy.direction is Direction.IN or policy.destination is None:
            return
        try:
            routes.check_peer(policy.destination)
        except NatCompatError as error:
            if error.errno == errno.ELOOP:
                raise
            _log.warning("%s", error)  # it may be set right later

    @property
    def engines(self) -> int:
        """To an endpoint: by how many sockets its ESP should come."""
        return getattr(self.carrier, "engines", 1)

    def read_sockets(
        self, sockets: Sequence[socket.socket], diversion: Diversion, take: TakeBurst
    ) -> SocketReader | None:
        """Return what reads the sockets that ESP is steered to; None: a thread of their own shall."""
        return self.carrier.read_sockets(sockets, diversion, take)

    def close(self) -> None:
        """Forget all SAs and policies, and close the device. Endpoints go on without ESP."""
        if os.getpid() != self._pid:
            self.abandon()
            return
        if self._closed:
            return
        with contextlib.ExitStack() as each:  # all of them, whatever one of them raises, from the last on
            each.callback(self._close_device)
            if self._routes is not None:
                each.callback(self._routes.close)
            each.callback(super().close)
            each.callback(self.carrier.close)
            each.callback(self._leave)

    def abandon(self) -> None:
        """Let go of what a forked child has inherited: the device goes on as long as somebody holds it."""
        abandon = getattr(self.device, "abandon", None)
        if abandon is not None:
            abandon()

    def _close_device(self) -> None:
        self.device.close()
        while self.device.read_burst():  # a queue lets go of its descriptor when it has been emptied
            pass

    def _leave(self) -> None:
        if PROCESS_ESP.consumer is self:
            PROCESS_ESP.change(None)

    def _transmit_keepalives(self, packets: list[Sealed]) -> None:
        self.carrier.transmit(packets)


def _takes_outbound(policy: Policy) -> bool:
    return policy.direction is Direction.OUT and policy.action is not Action.BYPASS


_opening: threading.Lock = threading.Lock()


def open_process_ipsec(
    *,
    device: DeviceChoice = "auto",
    netns: NetworkNamespace | None = None,
    lockdown: bool = False,
    follow_mapping: bool = False,
) -> UserspaceIPsec:
    """Open the ESP of this process: what endpoints of the backend userspace hand their ESP to.

    Those that were given another consumer keep it (`esp` of `natcompat.set_nat_t_endpoint`). `device`
    is closed with what is returned. ``"auto"``: a `natcompat.esp.device.tun.TunDevice` where this process may
    make one,
    with routes that follow the outbound policies (`natcompat.esp.device.routes`); else a `QueueDevice`.

    There is one at a time, since a port gives its ESP to one: EBUSY while it is open. A forked child may
    open its own, which then shares the ports of its parent.
    """
    if netns is not None or lockdown:
        raise NatCompatError(
            errno.EOPNOTSUPP, "ESP in this process has neither netns nor lockdown", "Omit them"
        )
    with _opening:
        if PROCESS_ESP.consumer is not None:
            raise NatCompatError(
                errno.EBUSY,
                "the ESP of this process is open already",
                "Share the object that open_ipsec() returned, or close it before another is opened",
            )
        with contextlib.ExitStack() as undo:
            routes = None
            if isinstance(device, str):
                device, routes = (QueueDevice(), None) if device == "queue" else _default_device(undo)
            ipsec = UserspaceIPsec(device, routes=routes, follow_mapping=follow_mapping)
            undo.callback(ipsec.close)
            PROCESS_ESP.change(ipsec)
            undo.pop_all()
        return ipsec


def _default_device(undo: contextlib.ExitStack) -> tuple[PacketDevice, DeviceRoutes | None]:
    """Return the system's device, if there can be one, else a queue."""
    if sys.platform != "linux":
        return QueueDevice(), None
    from natcompat.esp.device.routes import DeviceRoutes
    from natcompat.esp.device.tun import TunDevice

    try:
        device = undo.enter_context(TunDevice(vnet_header=datapaths.select().name == "c"))
        return device, undo.enter_context(DeviceRoutes(device))
    except NatCompatError as error:
        undo.close()
        _log.info("inner packets go through a queue (open_ipsec().device): %s", error)
        return QueueDevice(), None


def _after_fork() -> None:
    global _opening  # noqa: PLW0603
    _opening = threading.Lock()
    inherited = PROCESS_ESP.inherited
    if isinstance(inherited, UserspaceIPsec):
        inherited.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
