"""IPsec of this process, whole: the ESP engine, a packet device, and what moves packets between them.

`open_process_ipsec` opens the one that endpoints use by themselves; `natcompat.open_ipsec` is the way to
it. More of them can be made, each for the endpoints that name it: ``set_nat_t_endpoint(sock, esp=ipsec)``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace as with_changes
from ipaddress import IPv4Interface, IPv6Interface, ip_address
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
from natcompat.esp.carrier.device_mtu import DeviceMtu
from natcompat.esp.carrier.portable import Carrier
from natcompat.esp.control_socket import control_of
from natcompat.esp.device.queue import QueueDevice
from natcompat.esp.device_choice import host_traffic, refuse_options
from natcompat.esp.engine.data_path import Sealed
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.results import Reason
from natcompat.ipsec import (
    Action,
    Direction,
    Features,
    IPAddress,
    Policy,
    ProtectionRestored,
    SaId,
    SecurityAssociation,
)
from natcompat.ipsec.device import PacketDevice

if TYPE_CHECKING:
    from natcompat.backends.diversion import Diversion
    from natcompat.esp.device.host_traffic import HostTraffic

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
        host: HostTraffic | None = None,
        follow_mapping: bool = False,
        datapath: str | None = None,
    ) -> None:
        """`host`: applies the policies to the traffic of this host by way of `device`, and is closed with it.

        `datapath`: as NATCOMPAT_DATAPATH, which it overrides.
        """
        self._control = control_of(self)
        chosen = datapaths.select(datapath)
        if chosen.make_path is None or chosen.make_carrier is None:
            raise ValueError(f"datapath: {chosen.name} makes nothing")
        super().__init__(
            transmit=self._transmit_keepalives, follow_mapping=follow_mapping, datapath=chosen.make_path
        )
        self._host = host
        self._outlets: dict[EspOutlet, None] = {}
        self.device: PacketDevice = device
        """Where inner packets come from and go to."""
        self.carrier: Carrier = chosen.make_carrier(self, device)
        """What moves packets."""
        self._mtu = DeviceMtu(device, self.carrier.paths, self._outbound_sas)
        self.datapath: str = f"{chosen.name} ({chosen.ciphers})" if chosen.ciphers else chosen.name
        """Which data path carries packets, as NATCOMPAT_DATAPATH calls it, and whose ciphers it has."""
        if host is not None:
            if host.hands_back:
                self.carrier.hand_back = host.hand_back
                self.path.hand_up_unprotected()
            host.start(self._lock, self._report_restored, self._endpoint_addresses)
        self.carrier.start()
        self._control.start()

    @property
    def features(self) -> Features:
        """Return the abilities; `host_traffic` is True where policies hold for this host's programs."""
        return with_changes(super().features, host_traffic=self._host is not None)

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
        self._outlets[outlet] = None
        if self._host is None:
            self.protect_endpoints(
                (ip_address(host.partition("%")[0]), port)
                for host, port in self._endpoint_addresses()
                if port
            )
        else:
            try:
                self._host.follow_endpoints()
            except OSError as error:  # privileges were given up
                _log.warning("the guard was not told of an endpoint: %s", error)
        self.carrier.attached(outlet)

    def detached(self, outlet: EspOutlet) -> None:
        """Let it leave there no longer."""
        self.carrier.detached(outlet)
        self._outlets.pop(outlet, None)
        if self._host is not None:
            self._host.wake()

    @property
    def process(self) -> int:
        """To an endpoint: the number of the only process in which this object works."""
        return self._pid

    def exempt(self, sock: socket.socket) -> Callable[[socket.socket], object] | None:
        """Keep what an endpoint's socket sends out of the device; return the function that undoes it.

        None: policies do not hold for this host. An error (EPERM without CAP_NET_ADMIN) is raised where a
        policy may take the socket's packets into the device, and logged where there is no such policy.
        """
        if self._host is None:
            return None
        try:
            self._host.exempt(sock)
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
        return self._host.end_exemption

    def _endpoint_addresses(self) -> list[tuple[str, int]]:
        """Return addresses and ports of the endpoints, for which nothing may come through an SA."""
        return [(outlet.address[0], outlet.address[1]) for outlet in list(self._outlets)]

    def _report_restored(self, description: str, count: int) -> None:
        self._emit(ProtectionRestored(description=description, count=count))

    def bypass(self, sock: socket.socket) -> None:
        """Keep what `sock` sends out of the device: for sockets of IKE that are no endpoints (port 500).

        EPERM where policies hold for this host and CAP_NET_ADMIN is gone. Elsewhere it does nothing.
        """
        if self._host is not None:
            self._host.exempt(sock)

    def add_sa(
        self,
        sa: SecurityAssociation,
        *,
        sequence: int | None = None,
        permitted: int | None = None,
        without_policies: bool = False,
        legacy: bool = False,
    ) -> SaId:
        """Install `sa`; see `EspEngine.add_sa`. The MTU of the device shrinks to what the SA can carry, and
        grows again when the path does, after ten minutes or with the next SA.
        """
        options = {"without_policies": without_policies, "legacy": legacy}
        sa_id = super().add_sa(sa, sequence=sequence, permitted=permitted, **options)
        if sa.direction is Direction.OUT and self._host is not None and self._host.routes_follow:
            with self._lock:
                self._mtu.take(sa)
        return sa_id

    def _outbound_sas(self) -> list[SecurityAssociation]:
        with self._lock:
            return [entry.sa for entry in self._associations if entry.sa.direction is Direction.OUT]

    def add_policy(self, policy: Policy, *, replace: bool = False) -> None:
        """Install `policy`; see `EspEngine.add_policy`. From now on its packets are sealed or blocked.

        ELOOP: a route would lead ESP itself into the device, and this kernel has no rules to prevent it.
        EOPNOTSUPP: this kernel cannot apply the selector exactly.
        """
        with self._usable(), contextlib.ExitStack() as undo:
            entry = self._policies.get(policy)
            if self._host is not None and (entry is None or replace):
                replaced = None if entry is None else entry.policy
                self._host.add_policy(policy, replaced)
                undo.callback(self._host.replace_policy, policy, replaced)
            super().add_policy(policy, replace=replace)
            undo.pop_all()

    def delete_policy(self, policy: Policy) -> None:
        """Remove a policy. Its packets are sealed, then blocked, and then leave in the clear."""
        with self._usable():
            installed = self._policy(policy).policy
            if self._host is not None:
                self._host.delete_policy(installed)
            super().delete_policy(installed)

    def flush_policies(self, *, reqid: int | None = None) -> None:
        """Remove every policy of this engine; with `reqid`, those that have it."""
        with self._usable():
            if self._host is not None:
                policies = [entry.policy for entry in self._policies]
                self._host.retain([policy for policy in policies if reqid not in (None, policy.reqid)])
            super().flush_policies(reqid=reqid)

    def counters(self) -> Mapping[Reason, int]:
        """Return how many packets went no further, by reason; see `EspEngine.counters`."""
        counted = dict(super().counters())
        if self._host is not None:
            for reason, packets in self._host.passed().items():  # those went further
                counted[reason] = max(0, counted.get(reason, 0) - packets)
        return {reason: packets for reason, packets in counted.items() if packets}

    def host_counters(self) -> Mapping[str, int]:
        """Return how many packets were blocked or passed by, and how often something was restored."""
        with self._usable():
            return {} if self._host is None else self._host.counters()

    # --- inner addresses

    def add_address(self, address: str | IPAddress | IPv4Interface | IPv6Interface) -> None:
        """Give this host an inner address, "10.9.0.10/32", before or after the policies for it.

        Routes of the policies prefer it as source. It goes with `close` or the process. EEXIST: the device
        has it. EOPNOTSUPP: the device is no TUN of this object's own.
        """
        with self._usable():
            self._addressed().add_address(str(address))

    def remove_address(self, address: str | IPAddress | IPv4Interface | IPv6Interface) -> None:
        """Take an inner address away. EADDRNOTAVAIL: it was not given."""
        with self._usable():
            self._addressed().remove_address(str(address))

    def _addressed(self) -> HostTraffic:
        if self._host is None:
            raise NatCompatError(
                errno.EOPNOTSUPP,
                f"a {type(self.device).__name__} has no addresses of this host",
                'Open IPsec with device="tun", or leave inner addresses to the program that has the device',
            )
        return self._host

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
        if self.is_copy:
            self.abandon()
            return
        if self._closed:
            return
        with contextlib.ExitStack() as steps:  # every one, whatever another raises, from the last on
            steps.callback(self._close_device)
            if self._host is not None:
                steps.callback(self._host.close)
            steps.callback(super().close)
            steps.callback(self.carrier.close)
            steps.callback(self._mtu.close)
            steps.callback(self._leave)
            steps.callback(self._control.close)

    def abandon(self) -> None:
        """Let go of what a forked child has inherited: the device goes on as long as somebody holds it."""
        abandon = getattr(self._host or self.device, "abandon", None)
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
    host: HostTraffic | None = None,
) -> UserspaceIPsec:
    """Open the ESP of this process: what endpoints of the backend userspace hand their ESP to.

    Endpoints that were given another consumer keep it (`esp` of `natcompat.set_nat_t_endpoint`).

    `device`: ``"tun"`` and ``"auto"`` make a TUN device by which policies hold for this host's own traffic
    (`natcompat.esp.device.host_traffic`); ``"queue"`` a `QueueDevice`; an object is a packet device of the
    caller's, closed with what is returned. `netns`: the network namespace of the TUN device, by name, path
    or descriptor; the sockets of ESP stay where they are. `lockdown`: what the policies cover stays blocked
    after the process dies, until the next start or ``natcompat doctor --clean``. `host`: made by the caller,
    in place of the three; it is closed with what is returned.

    Raises EBUSY while another one is open, since a port gives its ESP to one; what `TunDevice` raises without
    /dev/net/tun or CAP_NET_ADMIN; ENOTSUP for a TUN elsewhere than on Linux. A forked child may open its own,
    which then shares the ports of its parent.
    """
    if host is not None:
        device = host.device
    elif not isinstance(device, str) or device == "queue":
        refuse_options(netns, lockdown)
    elif device not in ("auto", "tun"):
        raise ValueError(f"device: {device!r} is neither 'auto', 'tun', 'queue' nor a packet device")
    with _opening:
        if PROCESS_ESP.consumer is not None:
            raise NatCompatError(
                errno.EBUSY,
                "the ESP of this process is open already",
                "Share the object that open_ipsec() returned, or close it before another is opened",
            )
        with contextlib.ExitStack() as undo:
            if not isinstance(device, str):
                packets = device
            elif device == "queue":
                packets = QueueDevice()
            else:
                host = host_traffic(netns, lockdown)
                undo.callback(host.close)
                packets = host.device
            ipsec = UserspaceIPsec(packets, host=host, follow_mapping=follow_mapping)
            undo.callback(ipsec.close)
            PROCESS_ESP.change(ipsec)
            undo.pop_all()
        return ipsec


def _after_fork() -> None:
    global _opening  # noqa: PLW0603
    _opening = threading.Lock()
    inherited = PROCESS_ESP.inherited
    if isinstance(inherited, UserspaceIPsec):
        inherited.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
