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
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Final

from natcompat.backends.base import Address, EspOutlet, SocketReader
from natcompat.backends.own_esp import PROCESS_ESP
from natcompat.errors import NatCompatError
from natcompat.esp import datapaths
from natcompat.esp.carrier import Carrier
from natcompat.esp.datapath import Sealed
from natcompat.esp.device import PacketDevice, QueueDevice
from natcompat.esp.engine import EspEngine

if TYPE_CHECKING:
    from natcompat.diversion import Diversion


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
        self, device: PacketDevice, *, follow_mapping: bool = False, datapath: str | None = None
    ) -> None:
        """`datapath`: as NATCOMPAT_DATAPATH, which it overrides."""
        chosen = datapaths.select(datapath)
        if chosen.make_path is None or chosen.make_carrier is None:
            raise ValueError(f"datapath: {chosen.name} makes nothing")
        super().__init__(
            transmit=self._transmit_keepalives, follow_mapping=follow_mapping, datapath=chosen.make_path
        )
        self.device: PacketDevice = device
        """Where inner packets come from and go to."""
        self.carrier: Carrier = chosen.make_carrier(self, device)
        """What moves packets."""
        self.datapath: str = chosen.name
        """Which data path carries packets, as NATCOMPAT_DATAPATH calls it."""
        self.carrier.start()

    def inbound(
        self, burst: list[tuple[memoryview, Address]], traffic_classes: list[int] | None = None
    ) -> None:
        """Take diverted ESP, as the `esp` of `natcompat.set_nat_t_endpoint`."""
        self.carrier.inbound(burst, traffic_classes)

    def attached(self, outlet: EspOutlet) -> None:
        """Let ESP leave by an endpoint that hands its own to this object."""
        self.carrier.attached(outlet)

    def detached(self, outlet: EspOutlet) -> None:
        """Let it leave there no longer."""
        self.carrier.detached(outlet)

    @property
    def engines(self) -> int:
        """To an endpoint: by how many sockets its ESP should come."""
        return getattr(self.carrier, "engines", 1)

    def read_sockets(
        self, sockets: Sequence[socket.socket], diversion: Diversion, read: Callable[[], SocketReader]
    ) -> SocketReader | None:
        """Return what reads the sockets that ESP is steered to; None: `read` shall make it."""
        own = getattr(self.carrier, "read_sockets", None)
        return own(sockets, diversion, read) if own else None

    def close(self) -> None:
        """Forget all SAs and policies, and close the device. Endpoints go on without ESP."""
        if os.getpid() != self._pid or self._closed:
            return
        with contextlib.ExitStack() as each:  # all of them, whatever one of them raises
            each.callback(self._close_device)
            each.callback(super().close)
            each.callback(self.carrier.close)
            each.callback(self._leave)

    def _close_device(self) -> None:
        self.device.close()
        while self.device.read_burst():  # a queue lets go of its descriptor when it has been emptied
            pass

    def _leave(self) -> None:
        if PROCESS_ESP.consumer is self:
            PROCESS_ESP.change(None)

    def _transmit_keepalives(self, packets: list[Sealed]) -> None:
        self.carrier.transmit(packets)


_opening: threading.Lock = threading.Lock()


def open_process_ipsec(*, device: PacketDevice | None = None, follow_mapping: bool = False) -> UserspaceIPsec:
    """Open the ESP of this process: what endpoints of the backend userspace hand their ESP to.

    Those that were given another consumer keep it (`esp` of `natcompat.set_nat_t_endpoint`). `device`
    is closed with what is returned; None: a `QueueDevice`.

    There is one at a time, since a port gives its ESP to one: EBUSY while it is open. A forked child may
    open its own, which then shares the ports of its parent.
    """
    with _opening:
        if PROCESS_ESP.consumer is not None:
            raise NatCompatError(
                errno.EBUSY,
                "the ESP of this process is open already",
                "Share the object that open_ipsec() returned, or close it before another is opened",
            )
        ipsec = UserspaceIPsec(QueueDevice() if device is None else device, follow_mapping=follow_mapping)
        PROCESS_ESP.change(ipsec)
        return ipsec


def _after_fork() -> None:
    global _opening  # noqa: PLW0603
    _opening = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
