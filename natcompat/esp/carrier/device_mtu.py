"""The MTU of a packet device: what every outbound SA can carry, and more again when paths recover.

What makes a path narrow may be a forged ICMP message (RFC 4301, 8.2.1). Its effect is bounded: nothing
below `natcompat.esp.carrier.mtu.SMALLEST_MTU` is believed, the device keeps `SMALLEST_DEVICE_MTU` bytes at
least, and after the lifetime of a path MTU (ten minutes; RFC 1191, 6.3) the path is asked for again.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterable
from typing import Final

from natcompat.esp.carrier.mtu import PathMtus, device_mtu, overhead_of
from natcompat.ipsec import SecurityAssociation
from natcompat.ipsec.device import PacketDevice

_BETWEEN_LOOKS: Final = 1.0
"""Seconds between two looks at all SAs, whatever comes."""


class DeviceMtu:
    """Follows outbound SAs and paths with the MTU of `device`; never above the MTU that the device had.

    `outbound_sas` returns the outbound SAs there are. Any thread may call it.
    """

    def __init__(
        self,
        device: PacketDevice,
        paths: PathMtus,
        outbound_sas: Callable[[], Iterable[SecurityAssociation]],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._device = device
        self._paths = paths
        self._outbound_sas = outbound_sas
        self._clock = clock
        self._largest = self._mtu = device.mtu
        self._looked = float("-inf")
        self._timer: threading.Timer | None = None
        self._lock = threading.Lock()
        self._closed = False

    def take(self, sa: SecurityAssociation) -> None:
        """Shrink to what a new outbound SA can carry, or grow if paths have recovered."""
        with self._lock:
            room = device_mtu([sa], self._paths.of)
            if room < self._mtu:
                self._set(room)
            elif self._mtu < self._largest:
                self._look_again()

    def recover(self) -> None:
        """Look at all paths again, and grow if they have recovered."""
        with self._lock, contextlib.suppress(OSError):  # the device was closed meanwhile
            if not self._closed:
                self._looked = float("-inf")
                self._look_again()

    def close(self) -> None:
        """Look no more."""
        with self._lock:
            self._closed = True
            if self._timer is not None:
                self._timer.cancel()

    def _look_again(self) -> None:
        now = self._clock()
        if now - self._looked < _BETWEEN_LOOKS:
            return
        self._looked = now
        different = {(sa.destination, overhead_of(sa)): sa for sa in self._outbound_sas()}
        room = device_mtu(different.values(), self._paths.of) if different else self._largest
        self._set(min(room, self._largest))

    def _set(self, mtu: int) -> None:
        if mtu != self._mtu:
            self._device.mtu = self._mtu = mtu
        if mtu < self._largest and not self._closed:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = threading.Timer(self._paths.lifetime + 1.0, self.recover)
            self._timer.daemon = True
            self._timer.name = "natcompat-mtu"
            self._timer.start()
