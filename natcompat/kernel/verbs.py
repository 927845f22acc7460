"""The verbs of `natcompat.ipsec.IPsec` as far as they are the same for every kernel."""

from __future__ import annotations

import contextlib
import errno
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from ipaddress import IPv4Interface, IPv6Interface, ip_address
from typing import Generic, NamedTuple, Protocol, Self, TypeVar

from natcompat.errors import NatCompatError
from natcompat.ipsec import (
    LARGEST_SPI,
    SMALLEST_SPI,
    InstalledSA,
    IPAddress,
    Policy,
    PolicyUsage,
    SaId,
    SecurityAssociation,
)
from natcompat.ipsec.associations import spi_number
from natcompat.kernel.events import Known

_Answer = TypeVar("_Answer")
_ALLOCATION_ATTEMPTS = 16


class Reservation(NamedTuple):
    """An SPI that `allocate_spi` has promised."""

    deadline: float
    sequence: int
    """That the kernel wants to hear again, where it does."""


class Keepalives(Protocol):
    """Sends the NAT-keepalives of SAs for a kernel that sends none."""

    def check(self) -> None:
        """Raise `natcompat.NatCompatError` (EPERM) where this process cannot send them."""

    def watch(self, sa: SecurityAssociation) -> None:
        """Send the keepalives of `sa` from now on."""

    def move(self, old: SaId, new: SaId, source: IPAddress, ports: tuple[int, int] | None) -> None:
        """Send those of the SA `old` for `new`; without `ports` (source, destination) send none."""

    def forget(self, sa_id: SaId | None = None) -> None:
        """Send no more for one SA, or for any."""

    def close(self) -> None:
        """End the sender."""


class InnerTraffic(Protocol):
    """Inner addresses of this host, and routes that follow the policies."""

    def add(self, address: str | IPAddress | IPv4Interface | IPv6Interface) -> None:
        """Give this host an address."""

    def remove(self, address: str | IPAddress | IPv4Interface | IPv6Interface) -> None:
        """Take it away."""

    def follow(self) -> None:
        """Follow a policy that was added."""

    def follow_deletion(self) -> None:
        """Follow a policy that was deleted; never raises."""

    def close(self) -> None:
        """Take all addresses away."""


class KernelIPsec(ABC, Generic[_Answer]):
    """SPIs that are reserved, SAs that are known, and keepalives that this process sends."""

    def __init__(self) -> None:
        self.known: dict[SaId, Known] = {}
        """What this object has installed."""
        self._reserved: dict[tuple[IPAddress, int], Reservation] = {}
        self._keepalives: Keepalives | None = None
        """None: this process sends none."""
        self._inner: InnerTraffic | None = None
        """None: this implementation assigns no addresses."""

    @abstractmethod
    def close(self) -> None:
        """Close the sockets and stop this process's keepalives; SAs and policies stay."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def allocate_spi(
        self,
        source: IPAddress | str,
        destination: IPAddress | str,
        *,
        reqid: int = 0,
        minimum: int | bytes = SMALLEST_SPI,
        maximum: int | bytes = LARGEST_SPI,
        lifetime: float = 165.0,
        sequence: int = 0,
    ) -> int:
        """Reserve an SPI of `destination` (an address of this host) and return it.

        The kernel keeps its larval SA for a while (Linux 30 s, net.core.xfrm_acq_expires; Solaris 90 s).
        This object goes on to know the SPI as taken for `lifetime` seconds (the default is strongSwan's
        time for a whole exchange with retransmissions), gives it to nobody else, and `add_sa` works until
        then and after, whether or not the larval SA is still there. `sequence` is that of an `Acquire`.

        ENOENT: no SPI is free between `minimum` and `maximum`.
        """
        source, destination = ip_address(source), ip_address(destination)
        minimum, maximum = spi_number(minimum), spi_number(maximum)
        if not SMALLEST_SPI <= minimum <= maximum <= LARGEST_SPI:
            raise ValueError(f"minimum, maximum: {minimum}..{maximum} is no range within 256..4294967295")
        now = time.monotonic()
        for key in [key for key, reservation in list(self._reserved.items()) if reservation.deadline < now]:
            self._reserved.pop(key, None)
        what = f"Allocating an SPI for {destination}"
        for _ in range(_ALLOCATION_ATTEMPTS):
            found = self._allocate(
                what, source, destination, sequence, reqid=reqid, minimum=minimum, maximum=maximum
            )
            if found is None:
                continue  # the kernel guesses, and in a narrow range does not always hit what is free
            spi, number = found
            if (destination, spi) not in self._reserved:
                self._reserved[destination, spi] = Reservation(now + lifetime, number)
                return spi
            # Still promised to somebody, though the kernel had forgotten: it has its larval SA again.
        raise NatCompatError(errno.ENOENT, f"{what}: all are taken", "Ask for a wider range")

    def add_address(self, address: str | IPAddress | IPv4Interface | IPv6Interface) -> None:
        """Give this host an inner address, before or after the policies for it; gone on `close`.

        Routes of the policies prefer it as source. EOPNOTSUPP: this implementation assigns no addresses.
        """
        if self._inner is None:
            raise NatCompatError(
                errno.EOPNOTSUPP,
                "this IPsec assigns no inner addresses",
                "Assign it by the system's tools (ifconfig, ipadm), with a route that prefers it as source",
            )
        self._inner.add(address)

    def remove_address(self, address: str | IPAddress | IPv4Interface | IPv6Interface) -> None:
        """Take an inner address away. EADDRNOTAVAIL: `add_address` did not give it."""
        if self._inner is None:
            raise NatCompatError(errno.EADDRNOTAVAIL, "this IPsec assigns no inner addresses")
        self._inner.remove(address)

    def release_spi(self, spi: int | bytes, destination: IPAddress | str) -> None:
        """Give back an SPI that `allocate_spi` reserved and no SA took. ESRCH: it is not reserved."""
        sa_id = SaId(spi=spi, destination=destination)
        if self._reserved.pop((sa_id.destination, sa_id.spi), None) is None:
            raise NatCompatError(errno.ESRCH, f"the SPI of {sa_id} is not reserved", "Use delete_sa for SAs")
        try:
            if self.is_larval(sa_id):
                self.delete_sa(sa_id)
        except NatCompatError as error:
            if error.errno != errno.ESRCH:  # the kernel's larval SA has expired
                raise

    @abstractmethod
    def is_larval(self, sa_id: SaId) -> bool:
        """Tell whether the kernel has only an SPI of this name, without keys."""

    @abstractmethod
    def delete_sa(self, sa_id: SaId) -> None:
        """Remove one SA. ESRCH: there is none of this name."""

    @abstractmethod
    def list_sas(self) -> list[InstalledSA]:
        """Return every SA."""

    @abstractmethod
    def delete_policy(self, policy: Policy) -> None:
        """Remove one policy. ESRCH: there is none."""

    @abstractmethod
    def list_policies(self) -> list[PolicyUsage]:
        """Return every policy that this package has words for."""

    def delete_sas_of(self, reqid: int) -> None:
        """Remove the ESP SAs with `reqid`, whoever installed them."""
        for installed in self.list_sas():
            if installed.association is not None and installed.association.reqid == reqid:
                with self._gone_already():
                    self.delete_sa(installed.sa_id)

    def delete_policies_of(self, reqid: int) -> None:
        """Remove the policies with `reqid`, whoever installed them."""
        for usage in self.list_policies():
            if usage.policy.reqid == reqid:
                with self._gone_already():
                    self.delete_policy(usage.policy)

    @staticmethod
    @contextlib.contextmanager
    def _gone_already() -> Iterator[None]:
        """Pass over what somebody else has removed meanwhile."""
        try:
            yield
        except NatCompatError as error:
            if error.errno != errno.ESRCH:
                raise

    @abstractmethod
    def _allocate(
        self, what: str, source: IPAddress, destination: IPAddress, sequence: int, **wanted: int
    ) -> tuple[int, int] | None:
        """Return a free SPI and the sequence number of its larval SA; None: the kernel hit none.

        `wanted` are `reqid`, `minimum` and `maximum`.
        """

    @abstractmethod
    def _get(self, sa_id: SaId) -> _Answer:
        """Return what the kernel says of an SA. ESRCH: there is none of this name."""

    def _find(self, sa_id: SaId) -> _Answer | None:
        try:
            return self._get(sa_id)
        except NatCompatError as error:
            if error.errno == errno.ESRCH:
                return None
            raise

    def is_there(self, sa_id: SaId) -> bool:
        """Tell whether an SPI is reserved, or an SA of this name is in the kernel."""
        reserved = self._reserved.get((sa_id.destination, sa_id.spi))
        if reserved is not None and reserved.deadline > time.monotonic():
            return True
        return self._find(sa_id) is not None

    def _add(
        self,
        sa: SecurityAssociation,
        known: Known,
        *,
        complete: Callable[[], bool],
        install: Callable[[], None],
    ) -> SaId:
        """Let the larval SA of the name of `sa` become it, or install it where there is none.

        `complete` returns False where there is no larval SA (any more).
        """
        keepalives = self._keepalives if sa.nat_keepalive is not None else None
        if keepalives is not None:
            keepalives.check()
        key = sa.destination, sa.spi
        if not (key in self._reserved and complete()):
            try:
                install()
            except NatCompatError as error:
                if error.errno != errno.EEXIST or not complete():
                    raise
        self._reserved.pop(key, None)
        self.known[sa.sa_id] = known
        if keepalives is not None:
            keepalives.watch(sa)
        return sa.sa_id

    def _follow(self, old: SaId, new: SaId, known: Known | None, ports: tuple[int, int] | None) -> None:
        """An SA has moved, and has `ports` (source, destination) now, or none."""
        if known is not None:
            self.known.pop(old, None)
            self.known[new] = known
        if self._keepalives is not None and new.source is not None:
            self._keepalives.move(old, new, new.source, ports)

    def _forget(self, sa_id: SaId | None = None) -> None:
        """An SA is gone; None: all are."""
        if sa_id is None:
            self.known.clear()
            self._reserved.clear()
        else:
            self.known.pop(sa_id, None)
            self._reserved.pop((sa_id.destination, sa_id.spi), None)
        if self._keepalives is not None:
            self._keepalives.forget(sa_id)


def words(policy: Policy) -> str:
    """Return what errors call `policy`."""
    return f"{policy.selector} ({policy.direction.value})"
