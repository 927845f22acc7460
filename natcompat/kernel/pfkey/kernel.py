"""`IPsec` over PF_KEY: the security association and policy databases of a kernel that speaks it."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from dataclasses import replace
from ipaddress import ip_address
from sys import byteorder
from types import EllipsisType
from typing import TYPE_CHECKING, TypeVar

from natcompat.errors import NatCompatError
from natcompat.ipsec import (
    Direction,
    Features,
    InstalledSA,
    IPAddress,
    Mode,
    Policy,
    PolicyUsage,
    SaId,
    SecurityAssociation,
    TrafficSelector,
    Transforms,
    UDPEncapsulation,
    Usage,
)
from natcompat.ipsec.associations import refuse_legacy
from natcompat.ipsec.selectors import refuse_ranges
from natcompat.kernel.events import RECEIVE_BUFFER, Known
from natcompat.kernel.pfkey import numbers as n
from natcompat.kernel.pfkey.algorithms import check_algorithms, supported_transforms
from natcompat.kernel.pfkey.dialects import Dialect, NatT, Policies
from natcompat.kernel.pfkey.events import PfKeyEvents
from natcompat.kernel.pfkey.flows import Flows
from natcompat.kernel.pfkey.messages import Extension, MalformedMessageError, Message, read_sa
from natcompat.kernel.pfkey.move import move_sa
from natcompat.kernel.pfkey.readback import inner_selector, installed_sa, record_of, required, usage_of
from natcompat.kernel.pfkey.rules import PF_POLICY, PF_POLICY_V1, Rules
from natcompat.kernel.pfkey.spd import SpdPolicies
from natcompat.kernel.pfkey.translate import check_sa, encode_allocate, encode_sa, encode_sa_id, nat_t
from natcompat.kernel.pfkey.transport import PfKeySocket, failure
from natcompat.kernel.verbs import KernelIPsec

if TYPE_CHECKING:
    from natcompat.kernel.xfrm.netlink import LocalAddresses

Found = TypeVar("Found")


class PfKeyIPsec(KernelIPsec[Message]):
    """The kernel's IPsec (see `natcompat.ipsec.IPsec` for what the methods have in common).

    What is installed belongs to the kernel and stays when this object is closed. What the dialect has
    no word for is refused: EOPNOTSUPP, ENOSYS for a transform. On Linux it acts in the network
    namespace in which it was opened. Opening takes the privilege that the dialect names: EPERM.
    """

    def __init__(self, dialect: Dialect) -> None:
        super().__init__()
        self._dialect = dialect
        self._sockets = [PfKeySocket(dialect)]
        self._socket: PfKeySocket = self._sockets[0]
        self._local: LocalAddresses | None = None
        try:
            self._policies = self._open_policies()
            if dialect.name == "linux":
                from natcompat.kernel.xfrm.keepalive import KeepaliveSender
                from natcompat.kernel.xfrm.netlink import LocalAddresses

                self._local = LocalAddresses()
                self._keepalives = KeepaliveSender(self.get_sa)
        except BaseException:
            self.close()
            raise

    def _open_policies(self) -> SpdPolicies | Flows | Rules:
        if self._dialect.policies is Policies.SPD:
            return SpdPolicies(self._dialect, self._socket)
        if self._dialect.policies is Policies.FLOWS:
            return Flows(self._dialect, self._socket)
        self._sockets.append(PfKeySocket(self._dialect, family=PF_POLICY, protocol=PF_POLICY_V1))
        return Rules(self._dialect, self._sockets[-1])

    def close(self) -> None:
        """Close the sockets and stop this process's keepalives; SAs and policies stay."""
        if self._keepalives is not None:
            self._keepalives.close()
        if self._local is not None:
            self._local.close()
        for each in self._sockets:
            each.close()

    @property
    def features(self) -> Features:
        """Return the optional abilities of PF_KEY on this system."""
        return Features(
            requires_udp_encapsulation=False,
            mapping_events=self._dialect.mapping_events,
            kernel_keepalive=bool(self._dialect.kernel_keepalive),
            marks=False,
            interface_ids=self._dialect.policies is Policies.RULES,
            sa_direction=self._dialect.nat_t is NatT.ADDRESSES,
        )

    def transforms(self) -> Transforms:
        """Return the transforms that the kernel lists to who registers, as far as the dialect has them."""
        return supported_transforms(self._dialect)

    # -- security associations

    def _allocate(
        self, what: str, source: IPAddress, destination: IPAddress, sequence: int, **wanted: int
    ) -> tuple[int, int] | None:
        request = encode_allocate(self._dialect, source, destination, **wanted)
        try:
            answer = self._socket.request(what, request, sequence=sequence)
        except NatCompatError as error:
            if error.errno in (errno.ENOENT, errno.EEXIST):
                return None
            raise
        spi = _understood(what, lambda: read_sa(required(answer, n.SADB_EXT_SA)).spi)
        return spi, request.sequence

    def add_sa(self, sa: SecurityAssociation, *, legacy: bool = False) -> SaId:
        """Install `sa` and return its name; completes a larval SA of the same destination and SPI.

        EEXIST: there is an SA with this destination and SPI (FreeBSD: with this SPI). EOPNOTSUPP: the
        dialect lacks something that `sa` asks for; ENOSYS: it or the kernel lacks a transform.
        """
        refuse_legacy(sa, legacy)
        refuse_ranges(sa.selectors, f"PF_KEY of {self._dialect.system}")
        check_sa(self._dialect, sa)
        return self._add(
            sa,
            Known(sa.reqid, sa.direction, sa.source, sa.encapsulation),
            complete=lambda: self._complete(sa),
            install=lambda: self._install(sa, n.SADB_ADD),
        )

    def is_larval(self, sa_id: SaId) -> bool:
        """Tell whether the kernel has only an SPI of this name, without keys."""
        found = self._find(sa_id)
        return found is not None and read_sa(required(found, n.SADB_EXT_SA)).state == n.SADB_SASTATE_LARVAL

    def _complete(self, sa: SecurityAssociation) -> bool:
        if not self.is_larval(sa.sa_id):
            return False
        reserved = self._reserved.get((sa.destination, sa.spi))
        try:
            self._install(sa, n.SADB_UPDATE, reserved.sequence if reserved else 0)
        except NatCompatError as error:
            if error.errno in (errno.ESRCH, errno.ENOENT):
                return False
            raise
        return True

    def _install(self, sa: SecurityAssociation, kind: int, sequence: int = 0) -> None:
        try:
            self._socket.request(f"Adding {sa.sa_id}", encode_sa(self._dialect, sa, kind), sequence=sequence)
        except NatCompatError as error:
            if error.errno in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
                check_algorithms(self._dialect, sa)
            raise

    def _request(self, kind: int, what: str, sa_id: SaId) -> Message:
        """Send what names an SA. ESRCH: there is none."""
        known = self.known.get(sa_id)
        source = sa_id.source or (known.source if known else None)
        if source is None and self._dialect.name != "linux":
            source = self._source_of(sa_id)
        sa_id = SaId(spi=sa_id.spi, destination=sa_id.destination, source=source)
        more: tuple[Extension, ...] = ()
        if known and known.encapsulation and self._dialect.nat_t is NatT.PORTS:
            # NetBSD counts the ports among the addresses of the SA; others pass them over.
            more = tuple(nat_t(self._dialect, known.encapsulation, known.direction, Mode.TUNNEL))
        message = encode_sa_id(self._dialect, kind, sa_id, known.direction if known else None, more)
        try:
            return self._socket.request(what, message)
        except NatCompatError as error:
            if error.errno == errno.ENOENT:
                raise failure(what, errno.ESRCH) from None
            raise

    def _source_of(self, sa_id: SaId) -> IPAddress | None:
        """Ask the kernel where an SA comes from, of which only SPI and destination are known."""
        for found in self.list_sas():
            if found.sa_id == sa_id:
                return found.sa_id.source
        return None

    def _get(self, sa_id: SaId) -> Message:
        return self._request(n.SADB_GET, f"Looking at {sa_id}", sa_id)

    def get_sa(self, sa_id: SaId) -> Usage:
        """Return what the SA has done so far. ESRCH: there is none of this name."""
        found = self._get(sa_id)
        return _understood(f"Looking at {sa_id}", lambda: usage_of(self._dialect, found))

    def update_sa(
        self,
        sa_id: SaId,
        *,
        source: IPAddress | str | None = None,
        destination: IPAddress | str | None = None,
        encapsulation: UDPEncapsulation | EllipsisType | None = ...,
    ) -> SaId:
        """Move an SA to other addresses or ports and return its name from now on.

        What is not given stays. It is done in place, where the kernel can, so that sequence numbers and
        replay window go on: ports on Linux, FreeBSD and OpenBSD, addresses on the last two. PF_KEY hands
        neither of them over to another SA, so that all else is refused with EOPNOTSUPP: negotiate a new
        SA. ESRCH: there is no such SA. EEXIST: there is one of the new name.
        """
        known = self.known.get(sa_id)
        current = self._get(sa_id)
        record = _understood(f"Updating {sa_id}", lambda: record_of(self._dialect, current))
        direction = self.direction_of(record.sa_id)
        new, now = move_sa(
            self._dialect,
            self._socket,
            current,
            record,
            direction,
            source=None if source is None else ip_address(source),
            destination=None if destination is None else ip_address(destination),
            encapsulation=encapsulation,
            find=self._find,
        )
        if known is not None:
            known = known._replace(source=new.source or known.source, encapsulation=now)
        self._follow(sa_id, new, known, (now.local_port, now.remote_port) if now else None)
        return new

    def direction_of(self, sa_id: SaId) -> Direction:
        """Return the direction that natcompat knows, or else this host's addresses tell."""
        known = self.known.get(sa_id)
        if known is not None:
            return known.direction
        if self._local is not None:
            return Direction.IN if sa_id.destination in self._local else Direction.OUT
        return Direction.IN if _is_ours(sa_id.destination) else Direction.OUT

    def delete_sa(self, sa_id: SaId) -> None:
        """Remove one SA. ESRCH: there is none of this name."""
        self._request(n.SADB_DELETE, f"Deleting {sa_id}", sa_id)
        self._forget(sa_id)

    def flush_sas(self, *, reqid: int | None = None) -> None:
        """Remove every ESP SA, whoever installed it; with `reqid`, those that have it."""
        if reqid is not None:
            self.delete_sas_of(reqid)
            return
        self._socket.request("Flushing SAs", Message(n.SADB_FLUSH, self._dialect.esp))
        self._forget()

    def list_sas(self) -> list[InstalledSA]:
        """Return every SA, with keys.

        A direction that the kernel does not know is that of `add_sa`, or told from the addresses of
        this host where somebody else has installed the SA.
        """
        fence = None
        if not self._dialect.dump_ends:
            nobody = SaId(spi=1, destination=ip_address("0.0.0.0"), source=ip_address("0.0.0.0"))  # noqa: S104
            fence = encode_sa_id(self._dialect, n.SADB_GET, nobody, None)
        found = []
        request = Message(n.SADB_DUMP, self._dialect.esp)
        for message in self._socket.dump("Listing SAs", request, fence=fence):
            if message.satype == self._dialect.esp and message.extensions:
                try:
                    found.append(self._with_reqid(installed_sa(self._dialect, message, self.direction_of)))
                except MalformedMessageError:
                    continue
        return found

    def _with_reqid(self, found: InstalledSA) -> InstalledSA:
        """Add the reqid to an SA of this object, where the kernel keeps none."""
        known = self.known.get(found.sa_id)
        if self._dialect.largest_reqid or known is None or found.association is None:
            return found
        return replace(found, association=replace(found.association, reqid=known.reqid))

    # -- policies

    def add_policy(self, policy: Policy, *, replace: bool = False) -> None:
        """Install `policy`. EEXIST: there is one with this selector and direction.

        With `replace` it takes the place of that one: in one step where the kernel has SADB_X_SPDUPDATE
        (Linux, FreeBSD, NetBSD, macOS); elsewhere (OpenBSD, Solaris) the other one is deleted first, and put
        back if this one is refused. EOPNOTSUPP: the selector has ranges.
        """
        refuse_ranges([policy.selector], f"PF_KEY of {self._dialect.system}")
        if not replace:
            self._policies.add(policy)
            return
        if isinstance(self._policies, SpdPolicies):
            self._policies.replace(policy)
            return
        try:
            before = self._policies.get(policy).policy
        except NatCompatError as error:
            if error.errno != errno.ESRCH:
                raise
            self._policies.add(policy)
            return
        self._policies.delete(before)
        try:
            self._policies.add(policy)
        except BaseException:
            self._policies.add(before)
            raise

    def get_policy(self, policy: Policy) -> PolicyUsage:
        """Return the installed policy of this selector and direction. ESRCH: none."""
        return self._policies.get(policy)

    def delete_policy(self, policy: Policy) -> None:
        """Remove the policy of this selector and direction. ESRCH: there is none."""
        self._policies.delete(policy)

    def flush_policies(self, *, reqid: int | None = None) -> None:
        """Remove every policy, whoever installed it; with `reqid`, those of it. Sockets keep theirs."""
        if reqid is not None:
            self.delete_policies_of(reqid)
            return
        self._policies.flush()

    def list_policies(self) -> list[PolicyUsage]:
        """Return every IN and OUT policy that this package has words for."""
        return self._policies.list()

    # -- the rest

    def bypass(self, sock: socket.socket) -> None:
        """Exempt `sock` from all policies, in both directions."""
        if self._dialect.name == "linux":
            from natcompat.kernel.xfrm.bypass import bypass as bypass_xfrm

            bypass_xfrm(sock)
        else:
            from natcompat.kernel.pfkey.bypass import bypass

            bypass(self._dialect, sock)

    def events(self, *, receive_buffer: int = RECEIVE_BUFFER) -> PfKeyEvents:
        """Start listening (on Linux in the network namespace of the calling thread).

        `receive_buffer` bytes of queue are asked for.
        """
        return PfKeyEvents(self._dialect, self, receive_buffer=receive_buffer)

    def wanted(self, message: Message) -> tuple[int, TrafficSelector | None]:
        """Return reqid and selector of the policy behind an acquire; 0 and None where it is not known."""
        if isinstance(self._policies, Flows):
            return 0, self._policies.asked(message.sequence)
        if isinstance(self._policies, Rules):
            return 0, inner_selector(self._dialect, message)
        number = message.find(n.SADB_X_EXT_POLICY)
        if isinstance(self._policies, SpdPolicies) and number is not None:
            policy = self._policies.by_id(int.from_bytes(number[8:12], byteorder))
            if policy is not None:
                return policy.reqid, policy.selector
        return 0, None


def _understood(what: str, read: Callable[[], Found]) -> Found:
    """Return what `read` makes of an answer; EBADMSG for what it cannot be."""
    try:
        return read()
    except MalformedMessageError as error:
        raise NatCompatError(
            errno.EBADMSG,
            f"{what}: the kernel's answer is malformed ({error})",
            "Report this, with the OS's version",
        ) from None


def _is_ours(address: IPAddress) -> bool:
    """Tell whether `address` is one of this host: a socket can be bound to it."""
    with socket.socket(
        socket.AF_INET if address.version == 4 else socket.AF_INET6, socket.SOCK_DGRAM
    ) as sock:
        try:
            sock.bind((str(address), 0))
        except OSError:
            return False
    return True
