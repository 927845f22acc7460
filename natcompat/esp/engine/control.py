"""The verbs of `natcompat.ipsec.IPsec`, on databases of this process."""

from __future__ import annotations

import errno
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from ipaddress import ip_address
from types import EllipsisType
from typing import Final, NamedTuple, TypeAlias

from natcompat.errors import NatCompatError
from natcompat.esp.engine.association import HARD, SOFT, Association, Link, Outbound, link_of
from natcompat.esp.engine.crypto import counts, supported_transforms
from natcompat.esp.engine.databases import AssociationDatabase, PolicyDatabase, PolicyEntry
from natcompat.esp.engine.nonces import Nonces
from natcompat.esp.engine.portable import DataPath
from natcompat.esp.engine.timer import Deadlines
from natcompat.ipsec import (
    LARGEST_SPI,
    SMALLEST_SPI,
    Direction,
    Features,
    InstalledSA,
    IPAddress,
    Policy,
    PolicyUsage,
    SaId,
    SecurityAssociation,
    Transforms,
    UDPEncapsulation,
    Usage,
)
from natcompat.ipsec.associations import spi_number

KEEPALIVE: Final = 8
"""A deadline of this kind, besides SOFT and HARD."""

_ALLOCATION_ATTEMPTS: Final = 1 << 16


class Larval(NamedTuple):
    """An SPI that is reserved."""

    sa_id: SaId
    reqid: int
    added: float
    deadline: float


Due: TypeAlias = Larval | tuple[Association, int]
"""What has a deadline: an SPI that nobody took, or an SA and SOFT, HARD or KEEPALIVE."""


class Control:
    """SAs and policies of this process, and who may touch them.

    `keepalives`: whether there is a way to send them. `path` makes what carries packets by the databases.
    """

    def __init__(
        self,
        *,
        keepalives: bool,
        path: Callable[[AssociationDatabase, PolicyDatabase], DataPath],
        wake_at: Callable[[float], None],
    ) -> None:
        self._pid = os.getpid()
        self._closed = False
        self._keepalives = keepalives
        self._wake_at = wake_at
        self._lock = threading.RLock()
        self._associations = AssociationDatabase()
        self._policies = PolicyDatabase()
        self._path = path(self._associations, self._policies)
        self._larval: dict[int, Larval] = {}
        """By SPI: those that this engine gives away are unique, whatever the destination."""
        self._nonces = Nonces(self._path.counter)
        self._deadlines = Deadlines()

    def _usable(self) -> AbstractContextManager[object]:
        """Return the lock, to be held while the databases are read or changed."""
        if os.getpid() != self._pid:
            raise NatCompatError(
                errno.EINVAL,
                f"this ESP engine belongs to process {self._pid}, which this one was forked from",
                "Open one after fork, with other keys: two processes must not use one nonce",
            )
        if self._closed:
            raise NatCompatError(errno.EBADF, "this ESP engine is closed")
        return self._lock

    # -- SAs

    @property
    def features(self) -> Features:
        """What this one can do."""
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
        """Reserve an SPI for an inbound SA, for `lifetime` seconds, and return it.

        ENOENT: no SPI is free between `minimum` and `maximum`.
        """
        source, destination = ip_address(source), ip_address(destination)
        minimum, maximum = spi_number(minimum), spi_number(maximum)
        if not SMALLEST_SPI <= minimum <= maximum <= LARGEST_SPI:
            raise ValueError(f"minimum, maximum: {minimum}..{maximum} is no range within 256..4294967295")
        with self._usable():
            span = maximum - minimum + 1
            start = secrets.randbelow(span)
            for step in range(min(span, _ALLOCATION_ATTEMPTS)):
                spi = minimum + (start + step) % span
                if spi not in self._associations.inbound and spi not in self._larval:
                    sa_id = SaId(spi=spi, destination=destination, source=source)
                    deadline = time.monotonic() + lifetime
                    self._larval[spi] = larval = Larval(sa_id, reqid, time.time(), deadline)
                    self._schedule(deadline, larval)
                    return spi
        raise NatCompatError(errno.ENOENT, f"no SPI is free in {minimum}..{maximum}", "Ask for a wider range")

    def release_spi(self, spi: int | bytes, destination: IPAddress | str) -> None:
        """Give back an SPI that `allocate_spi` reserved and no SA took. ESRCH: it is not reserved."""
        sa_id = SaId(spi=spi, destination=destination)
        with self._usable():
            if self._reserved(sa_id) is None:
                raise NatCompatError(
                    errno.ESRCH, f"the SPI of {sa_id} is not reserved", "Use delete_sa for SAs"
                )
            del self._larval[sa_id.spi]

    def add_sa(
        self, sa: SecurityAssociation, *, sequence: int | None = None, permitted: int | None = None
    ) -> SaId:
        """Install `sa`, whole or not at all; completes what `allocate_spi` began.

        `sequence`, for an SA whose keys outlive this process. Outbound: the last sequence number that
        was or may have been used under its key; IVs are then the sequence numbers themselves, and
        nothing repeats if the caller keeps that number (RFC 4106, 3.1). Inbound: the highest that was
        received; it and all before it are taken for replays. `permitted`, outbound: the highest
        number that may be used until `permit` allows more, for callers who reserve them in a file.

        EEXIST: there is one of this name, or the key has been used in this process and so `sequence`
        cannot be trusted. EPROTONOSUPPORT: no UDP encapsulation, or a transform that is not had.
        EOPNOTSUPP: mark, interface and keepalive without the means for them.
        """
        self._refuse_foreign(sa)
        with self._usable():
            if self._associations.find(sa.sa_id) is not None:
                raise NatCompatError(
                    errno.EEXIST, f"there is an SA {sa.sa_id}", "Delete it first, or use update_sa"
                )
            association = self._make(sa, sequence, permitted)
            if self._reserved(sa.sa_id):
                del self._larval[sa.spi]
            self._associations.add(association)
            self._path.forget(association)
            now = time.monotonic()
            for seconds, kind in (
                (sa.lifetime.soft_seconds, SOFT),
                (sa.lifetime.hard_seconds, HARD),
                (sa.nat_keepalive, KEEPALIVE),
            ):
                if seconds is not None:
                    self._schedule(now + seconds, (association, kind))
            return sa.sa_id

    def _refuse_foreign(self, sa: SecurityAssociation) -> None:
        if sa.encapsulation is None:
            raise NatCompatError(
                errno.EPROTONOSUPPORT,
                "the ESP of this process is carried in UDP only",
                "Let IKE act as if there were a NAT (features.requires_udp_encapsulation)",
            )
        if sa.mark is not None or sa.interface_id is not None:
            raise NatCompatError(
                errno.EOPNOTSUPP,
                "the ESP of this process sees neither packet marks nor XFRM interfaces",
                "Leave mark and interface_id away, or use the linux backend",
            )
        if sa.nat_keepalive is not None and not self._keepalives:
            raise NatCompatError(
                errno.EOPNOTSUPP,
                "this engine has nothing to send NAT-keepalives with",
                "Give EspEngine(transmit=...), or leave nat_keepalive to the IKE daemon",
            )

    def permit(self, sa_id: SaId, number: int) -> None:
        """Let an outbound SA use sequence numbers up to `number`, which the caller has reserved.

        What needs a higher one is dropped (`Reason.UNRESERVED`), and the SA stays. ESRCH: there is none.
        """
        with self._usable():
            association = self._find(sa_id)
            if not isinstance(association, Outbound):
                raise NatCompatError(errno.ESRCH, f"{sa_id} is no outbound SA")
            association.permit(number)

    def _make(self, sa: SecurityAssociation, sequence: int | None, permitted: int | None) -> Association:
        link = link_of(sa)
        if sa.direction is Direction.IN:
            return self._path.inbound(sa, link, sequence or 0)
        outbound = self._path.outbound(sa, link, sequence or 0, permitted)
        if counts(sa.encryption):
            ivs = self._nonces.attach(sa.encryption_key, None if sequence is None else sequence + 1)
            if ivs is None:
                outbound.retire()
                self._path.forget(outbound)
                raise NatCompatError(
                    errno.EEXIST, f"the key of {sa.sa_id} has been used before", "Use a fresh key"
                )
            outbound.draw_ivs(ivs)
        return outbound

    def update_sa(
        self,
        sa_id: SaId,
        *,
        source: IPAddress | str | None = None,
        destination: IPAddress | str | None = None,
        encapsulation: UDPEncapsulation | EllipsisType | None = ...,
    ) -> SaId:
        """Move an SA to other addresses or ports; sequence numbers, window and counters go on.

        Policies that name its old outer addresses are the caller's to move as well.
        ESRCH: there is no such SA. EEXIST: there is one of the new name.
        """
        with self._usable():
            association = self._find(sa_id)
            old = association.sa
            new = replace(
                old,
                source=old.source if source is None else ip_address(source),
                destination=old.destination if destination is None else ip_address(destination),
                encapsulation=old.encapsulation if encapsulation is ... else encapsulation,
            )
            self._refuse_foreign(new)
            self._move(association, new, link_of(new))
            return new.sa_id

    def _move(self, association: Association, new: SecurityAssociation, link: Link) -> None:
        old_id = association.sa.sa_id
        if new.sa_id != old_id and self._associations.find(new.sa_id) is not None:
            raise NatCompatError(errno.EEXIST, f"there is an SA {new.sa_id}", "Delete it first")
        self._associations.move(association, new, link)
        self._path.forget(association)

    def get_sa(self, sa_id: SaId) -> Usage:
        """Return what the SA has done so far. ESRCH: there is none."""
        with self._usable():
            larval = self._reserved(sa_id)
            return _unused(larval.added) if larval else self._find(sa_id).usage()

    def delete_sa(self, sa_id: SaId) -> None:
        """Remove one SA, or an SPI that is reserved. ESRCH: there is none."""
        with self._usable():
            if self._reserved(sa_id):
                del self._larval[sa_id.spi]
            else:
                self._retire(self._find(sa_id))

    def flush_sas(self, *, reqid: int | None = None) -> None:
        """Remove every SA of this engine and every SPI that is reserved; with `reqid`, those that have it."""
        with self._usable():
            self._larval = {
                spi: larval for spi, larval in self._larval.items() if reqid not in (None, larval.reqid)
            }
            for association in self._associations:
                if reqid in (None, association.sa.reqid):
                    self._retire(association)

    def list_sas(self) -> list[InstalledSA]:
        """Return every SA, with its keys, and every SPI that is reserved."""
        with self._usable():
            installed = [
                InstalledSA(sa_id=each.sa.sa_id, association=each.sa, usage=each.usage())
                for each in self._associations
            ]
            reserved = [
                InstalledSA(
                    sa_id=each.sa_id,
                    association=None,
                    usage=_unused(each.added),
                    larval=True,
                    description="ESP, an SPI only",
                )
                for each in self._larval.values()
            ]
            return installed + reserved

    def _reserved(self, sa_id: SaId) -> Larval | None:
        larval = self._larval.get(sa_id.spi)
        return larval if larval and larval.sa_id == sa_id else None

    def _find(self, sa_id: SaId) -> Association:
        association = self._associations.find(sa_id)
        if association is None:
            raise NatCompatError(errno.ESRCH, f"there is no SA {sa_id}", "list_sas() tells which there are")
        return association

    def _retire(self, association: Association) -> None:
        """Take an SA out for ever. The caller holds the lock."""
        if self._associations.remove(association.sa.sa_id) is None:
            return
        association.retire()
        if isinstance(association, Outbound) and counts(association.sa.encryption):
            self._nonces.detach(association.sa.encryption_key)
        self._path.forget(association)
        if len(self._deadlines) > 64 + 6 * len(self._associations) + 2 * len(self._larval):
            self._deadlines.prune(self._meant)

    # -- policies

    def add_policy(self, policy: Policy, *, replace: bool = False) -> None:
        """Install `policy`. EEXIST: there is one with this selector and direction.

        With `replace` it takes the place of that one; packets meet either the one or the other.
        """
        if policy.mark is not None or policy.interface_id is not None:
            raise NatCompatError(
                errno.EOPNOTSUPP,
                "the ESP of this process sees neither packet marks nor XFRM interfaces",
                "Leave mark and interface_id away, or use the linux backend",
            )
        with self._usable():
            if self._policies.get(policy) is not None and not replace:
                raise NatCompatError(
                    errno.EEXIST,
                    f"there is a policy for {policy.selector} ({policy.direction.value})",
                    "Delete it first, or add this one with replace=True",
                )
            self._policies.add(policy, time.time())
            self._path.forget()

    def get_policy(self, policy: Policy) -> PolicyUsage:
        """Return the installed policy with the selector and direction of `policy`. ESRCH: there is none."""
        with self._usable():
            return _policy_usage(self._policy(policy))

    def delete_policy(self, policy: Policy) -> None:
        """Remove the policy with the selector and direction of `policy`. ESRCH: there is none."""
        with self._usable():
            self._policies.remove(self._policy(policy))
            self._path.forget()

    def flush_policies(self, *, reqid: int | None = None) -> None:
        """Remove every policy of this engine; with `reqid`, those that have it."""
        with self._usable():
            for entry in self._policies:
                if reqid in (None, entry.policy.reqid):
                    self._policies.remove(entry)
            self._path.forget()

    def list_policies(self) -> list[PolicyUsage]:
        """Return every policy."""
        with self._usable():
            return [_policy_usage(entry) for entry in self._policies]

    def _policy(self, policy: Policy) -> PolicyEntry:
        entry = self._policies.get(policy)
        if entry is None:
            raise NatCompatError(errno.ESRCH, "there is no policy with this selector and direction")
        return entry

    def bypass(self, sock: socket.socket) -> None:
        """Do nothing, rightly: what sockets send is not subject to the policies of this engine."""

    def _schedule(self, deadline: float, item: Due) -> None:
        self._deadlines.add(deadline, item)
        self._wake_at(deadline)

    def _meant(self, item: Due) -> bool:
        if isinstance(item, Larval):
            return self._larval.get(item.sa_id.spi) is item
        return not item[0].gone


def _unused(added: float) -> Usage:
    return Usage(
        packets=0,
        octets=0,
        added=added,
        first_used=None,
        last_used=None,
        replay_drops=0,
        window_drops=0,
        integrity_drops=0,
        sequence=0,
    )


def _policy_usage(entry: PolicyEntry) -> PolicyUsage:
    return PolicyUsage(policy=entry.policy, added=entry.added, last_used=entry.when_used())
