"""The verbs of `natcompat.ipsec.IPsec` for SAs and SPIs, on the databases of an engine."""

from __future__ import annotations

import errno
import secrets
import time
from dataclasses import replace
from ipaddress import ip_address
from types import EllipsisType
from typing import Final

from natcompat.errors import NatCompatError
from natcompat.esp.engine import nonces
from natcompat.esp.engine.association import HARD, SOFT, UNLIMITED, Association, Outbound, link_of
from natcompat.esp.engine.crypto import counts
from natcompat.esp.engine.state import KEEPALIVE, EngineState, Larval
from natcompat.ipsec import (
    LARGEST_SPI,
    SMALLEST_SPI,
    Direction,
    InstalledSA,
    IPAddress,
    SaId,
    SecurityAssociation,
    UDPEncapsulation,
    Usage,
)
from natcompat.ipsec.associations import refuse_legacy, spi_number

_ALLOCATION_ATTEMPTS: Final = 1 << 16


class AssociationVerbs(EngineState):
    """Allocates SPIs; adds, moves, lists and deletes SAs."""

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
        self,
        sa: SecurityAssociation,
        *,
        sequence: int | None = None,
        permitted: int | None = None,
        without_policies: bool = False,
        legacy: bool = False,
    ) -> SaId:
        """Install `sa`, whole or not at all; completes what `allocate_spi` began.

        `sequence`, for an SA whose keys outlive this process. Outbound: the last sequence number that
        was or may have been used under its key; IVs are then the sequence numbers themselves, and
        nothing repeats if the caller keeps that number (RFC 4106, 3.1). Inbound: the highest that was
        received; it and all before it are taken for replays. `permitted`, outbound: the highest
        number that may be used until `permit` allows more, for callers who reserve them in a file.

        `without_policies`: packets that no policy covers may pass this SA, if its selectors allow them. Else
        they are dropped, in both modes (RFC 4301, 5.2). A policy that covers a packet decides in any case.

        EEXIST: there is one of this name; or the key is one of a counter mode and was used by this process,
        so that `sequence` cannot be trusted, or by the process that it was forked from. ENOSPC: this process
        has used `natcompat.esp.engine.nonces.MOST_KEYS` keys of counter modes. EPROTONOSUPPORT: no UDP
        encapsulation, or a transform that is not had. EOPNOTSUPP: mark, interface and keepalive without the
        means for them.
        """
        refuse_legacy(sa, legacy)
        self._refuse_foreign(sa)
        with self._usable():
            if self._associations.find(sa.sa_id) is not None:
                raise NatCompatError(
                    errno.EEXIST, f"there is an SA {sa.sa_id}", "Delete it first, or use update_sa"
                )
            association = self._make(sa, sequence, permitted)
            association.without_policies = without_policies
            if self._reserved(sa.sa_id):
                del self._larval[sa.spi]
            self._associations.add(association)
            self._path.forget(association)
            now = time.monotonic()
            self._wake_at(now + 1)
            for seconds, kind in (
                (sa.lifetime.soft_seconds, SOFT),
                (sa.lifetime.hard_seconds, HARD),
                (sa.nat_keepalive, KEEPALIVE),
            ):
                if seconds is not None:
                    self._schedule(now + seconds, (association, kind))
            return sa.sa_id

    def _refuse_foreign(self, sa: SecurityAssociation) -> None:
        if sa.encapsulation is None and not self._raw_esp:
            raise NatCompatError(
                errno.EPROTONOSUPPORT,
                "the ESP of this process is carried in UDP only here",
                "Let IKE act as if there were a NAT (features.requires_udp_encapsulation)",
            )
        if sa.kernel_services:
            names = " and ".join(sa.kernel_services)
            raise NatCompatError(
                errno.EOPNOTSUPP,
                f"the ESP of this process has no {names}: only a kernel does that",
                f"Leave {names} away, or use the linux backend",
            )
        if sa.nat_keepalive is not None and not self._keepalives:
            raise NatCompatError(
                errno.EOPNOTSUPP,
                "this engine has nothing to send NAT-keepalives with",
                "Give EspEngine(transmit=...), or leave nat_keepalive to the IKE daemon",
            )

    def permit(self, sa_id: SaId, number: int) -> None:
        """Let an outbound SA use sequence numbers up to `number`, which the caller has reserved.

        Packets that need a higher one are dropped (`Reason.UNRESERVED`), and the SA stays. ESRCH: there is no
        outbound SA of this name.
        """
        with self._usable():
            self._find_outbound(sa_id).permit(number)

    def _make(self, sa: SecurityAssociation, sequence: int | None, permitted: int | None) -> Association:
        link = link_of(sa)
        if sa.direction is Direction.IN:
            return self._path.inbound(sa, link, sequence or 0)
        counting = counts(sa.encryption)
        largest = nonces.BLOCK if counting and sequence is None else UNLIMITED
        limit = largest if permitted is None else min(permitted, largest)
        outbound = self._path.outbound(sa, link, sequence or 0, limit)
        outbound.largest_number = largest
        if counting:
            try:
                first = self._nonces.attach(sa.encryption_key, None if sequence is None else sequence + 1)
            except NatCompatError:
                outbound.retire()
                self._path.forget(outbound)
                raise
            outbound.draw_ivs(first)
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

        The caller also replaces the policies that name its old outer addresses.
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
            if new.sa_id != old.sa_id and self._associations.find(new.sa_id) is not None:
                raise NatCompatError(errno.EEXIST, f"there is an SA {new.sa_id}", "Delete it first")
            self._associations.move(association, new)
            self._path.forget(association)
            return new.sa_id

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
                InstalledSA(sa_id=association.sa.sa_id, association=association.sa, usage=association.usage())
                for association in self._associations
            ]
            reserved = [
                InstalledSA(
                    sa_id=larval.sa_id,
                    association=None,
                    usage=_unused(larval.added),
                    larval=True,
                    description="ESP, an SPI only",
                )
                for larval in self._larval.values()
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

    def _find_outbound(self, sa_id: SaId) -> Outbound:
        association = self._find(sa_id)
        if not isinstance(association, Outbound):
            raise NatCompatError(errno.ESRCH, f"{sa_id} is no outbound SA")
        return association

    def _retire(self, association: Association) -> None:
        """Remove an SA for ever. The caller holds the lock."""
        if self._associations.remove(association.sa.sa_id) is None:
            return
        association.retire()
        self._path.forget(association)
        if len(self._deadlines) > 64 + 6 * len(self._associations) + 2 * len(self._larval):
            self._deadlines.prune(self._still_meant)


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
