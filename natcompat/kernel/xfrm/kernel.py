"""`IPsec` over XFRM: the security association and policy databases of the Linux kernel."""

from __future__ import annotations

import errno
import os
import socket
from ipaddress import ip_address
from types import EllipsisType

from natcompat.errors import NatCompatError
from natcompat.ipsec import (
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
from natcompat.ipsec.associations import refuse_legacy
from natcompat.ipsec.selectors import refuse_ranges
from natcompat.kernel.events import RECEIVE_BUFFER, Known
from natcompat.kernel.verbs import KernelIPsec, words
from natcompat.kernel.xfrm import messages
from natcompat.kernel.xfrm.algorithms import modules_of, supported_transforms
from natcompat.kernel.xfrm.bypass import bypass
from natcompat.kernel.xfrm.events import XfrmEvents
from natcompat.kernel.xfrm.inner_addresses import InnerAddresses
from natcompat.kernel.xfrm.keepalive import KeepaliveSender
from natcompat.kernel.xfrm.move import move_sa
from natcompat.kernel.xfrm.netlink import LocalAddresses, Netlink, attributes, failure
from natcompat.kernel.xfrm.offload import NO_CARD_REMEDY, has_card, not_offloaded
from natcompat.kernel.xfrm.probe import NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, probe_attributes
from natcompat.kernel.xfrm.readback import XFRMA, decode, installed_sa, usage_of
from natcompat.kernel.xfrm.translate import (
    INFO_END,
    KernelFeatures,
    encode_allocate,
    encode_sa,
    encode_sa_id,
    put_sequence,
    refuse_unknown,
)
from natcompat.kernel.xfrm.translate_policy import (
    encode_policy,
    encode_policy_id,
    kernel_directions,
    no_policy,
    policy_usage_of,
)

_NEW = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL
_ALGORITHMS = {XFRMA[name] for name in ("ALG_AEAD", "ALG_CRYPT", "ALG_AUTH", "ALG_AUTH_TRUNC")}
QUEUE = 1 << 20
"""Bytes of queue for answers, and for the report of a deletion among those of other SAs."""

_POLICY_REMEDIES = {
    errno.EEXIST: "Delete the other one first, add this one with replace=True, or tell them apart by marks",
    errno.EINVAL: "Outbound tunnel policies cannot be optional: add a BYPASS policy until there is an SA",
}


class XfrmIPsec(KernelIPsec[bytes]):
    """The kernel's IPsec (see `natcompat.ipsec.IPsec` for what the methods have in common).

    What is installed belongs to the kernel and stays when this object is closed. It acts in the
    network namespace in which it was opened. Opening takes CAP_NET_ADMIN: EPERM.
    """

    def __init__(self) -> None:
        super().__init__()
        self._netlink = Netlink(receive_buffer=QUEUE)
        try:
            self._kernel = _ask_kernel()
            self._local = LocalAddresses()
        except BaseException:
            self._netlink.close()
            raise
        if not self._kernel.keepalive:
            self._keepalives = KeepaliveSender(self.get_sa)
        self._inner: InnerAddresses = InnerAddresses(lambda: [use.policy for use in self.list_policies()])

    def close(self) -> None:
        """Close the sockets, stop keepalives, remove inner addresses; SAs and policies stay."""
        self._inner.close()
        if self._keepalives is not None:
            self._keepalives.close()
        self._local.close()
        self._netlink.close()

    @property
    def features(self) -> Features:
        """Return the optional abilities of this kernel, which was asked for them."""
        return Features(
            requires_udp_encapsulation=False,
            mapping_events=True,
            kernel_keepalive=self._kernel.keepalive,
            marks=True,
            interface_ids=True,
            sa_direction=self._kernel.sa_direction,
        )

    def transforms(self) -> Transforms:
        """Return the transforms that this kernel installs, found out by a dry run of each.

        The first time the kernel may load the modules, which takes up to seconds.
        """
        return supported_transforms()

    # -- security associations

    def _allocate(
        self, what: str, source: IPAddress, destination: IPAddress, sequence: int, **wanted: int
    ) -> tuple[int, int] | None:
        request = encode_allocate(source, destination, self._kernel, sequence=sequence, **wanted)
        try:
            answer = self._netlink.request(what, request, messages.XFRM_MSG_ALLOCSPI, 0)
        except NatCompatError as error:
            if error.errno == errno.ENOENT:
                return None
            raise
        return int(decode(messages.xfrm_usersa_info, answer)["id_spi"]), 0

    def add_sa(self, sa: SecurityAssociation, *, sequence: int | None = None, legacy: bool = False) -> SaId:
        """Install `sa` and return its name; completes a larval SA of the same destination and SPI.

        `sequence`, for an SA that was there before: the last sequence number sent, or the highest
        received, whereupon all before it are replays. It keeps numbers from repeating, not IVs: those
        of counter modes begin where the kernel likes (crypto/seqiv.c), so they need new keys.

        EEXIST: there is an SA with this destination and SPI (and mark). ENOSYS: the kernel lacks a
        transform; EPROTONOSUPPORT: it lacks ESP, or a transform is old and `legacy` is not set. EOPNOTSUPP:
        it has no output marks, offload or SAs of processors, or the card of `hw_offload` does not do it.
        Where the kernel sends no keepalives, a thread of this process does from now on, until the SA or
        this object is gone.
        """
        refuse_legacy(sa, legacy)
        refuse_ranges(sa.selectors, "XFRM", port_masks=True)
        refuse_unknown(sa, self._kernel)
        return self._add(
            sa,
            Known(sa.reqid, sa.direction),
            complete=lambda: self._complete(sa, sequence),
            install=lambda: self._install(sa, messages.XFRM_MSG_NEWSA, _NEW, sequence),
        )

    def _complete(self, sa: SecurityAssociation, sequence: int | None) -> bool:
        if not self.is_larval(sa.sa_id):
            return False
        # A larval SA that somebody else made without a direction takes none from the SA.
        for features in dict.fromkeys((self._kernel, self._kernel._replace(sa_direction=False))):
            try:
                self._install(sa, messages.XFRM_MSG_UPDSA, NLM_F_ACK, sequence, features)
            except NatCompatError as error:
                if error.errno not in (errno.ESRCH, errno.EINVAL):
                    raise
                refusal = error
            else:
                return True
        if refusal.errno == errno.ESRCH:
            return False
        raise refusal

    def _install(
        self,
        sa: SecurityAssociation,
        kind: int,
        flags: int,
        sequence: int | None,
        features: KernelFeatures | None = None,
    ) -> None:
        message = encode_sa(sa, features or self._kernel)
        if sequence:
            put_sequence(message, sa.direction, sequence)
        remedies = {errno.ENOSYS: modules_of(sa), errno.ENOENT: modules_of(sa)}
        if sa.hw_offload is not None:
            remedies[errno.EINVAL] = NO_CARD_REMEDY
        self._netlink.request(f"Adding {sa.sa_id}", message, kind, flags, remedies=remedies)
        if sa.hw_offload is not None and not has_card(self._get(sa.sa_id)):
            self.delete_sa(sa.sa_id)
            raise not_offloaded(f"Adding {sa.sa_id}", sa.hw_offload)

    def is_larval(self, sa_id: SaId) -> bool:
        """Tell whether the kernel has an SA of this name without any algorithm: only the SPI is taken."""
        answer = self._find(sa_id)
        return answer is not None and not any(
            kind in _ALGORITHMS for kind, _, _ in attributes(answer, INFO_END)
        )

    def _get(self, sa_id: SaId) -> bytes:
        return self._netlink.request(f"Looking at {sa_id}", encode_sa_id(sa_id), messages.XFRM_MSG_GETSA, 0)

    def get_sa(self, sa_id: SaId) -> Usage:
        """Return what the SA has done so far. ESRCH: there is none of this name."""
        known = self.known.get(sa_id)
        return usage_of(self._get(sa_id), known.direction if known else None)

    def update_sa(
        self,
        sa_id: SaId,
        *,
        source: IPAddress | str | None = None,
        destination: IPAddress | str | None = None,
        encapsulation: UDPEncapsulation | EllipsisType | None = ...,
    ) -> SaId:
        """Move an SA to other addresses or ports and return its name from now on.

        What is not given stays; None for `encapsulation` ends it. New ports are changed in place.
        For anything else the kernel has no way, so the SA is deleted and added again with the
        sequence number, replay window, counters and age that the kernel reported when it deleted it:
        no sequence number is used twice, and packets in between are dropped, not sent in the clear.
        When the second half fails, the old SA is put back and the error raised.

        ESRCH: there is no such SA. EEXIST: there is one of the new name. ENOBUFS: the kernel's report
        of the deletion was lost; the SA is gone and a new one must be negotiated.
        """
        known = self.known.get(sa_id)
        new, ports = move_sa(
            self._netlink,
            sa_id,
            source=None if source is None else ip_address(source),
            destination=None if destination is None else ip_address(destination),
            encapsulation=encapsulation,
            known=known.direction if known else None,
            local=self._local,
        )
        self._follow(sa_id, new, known, ports)
        return new

    def delete_sa(self, sa_id: SaId) -> None:
        """Remove one SA. ESRCH: there is none of this name."""
        self._netlink.request(f"Deleting {sa_id}", encode_sa_id(sa_id), messages.XFRM_MSG_DELSA)
        self._forget(sa_id)

    def flush_sas(self, *, reqid: int | None = None) -> None:
        """Remove every ESP SA of this network namespace, whoever installed it; with `reqid`, those of it."""
        if reqid is not None:
            self.delete_sas_of(reqid)
            return
        message = messages.xfrm_usersa_flush()
        message["proto"] = socket.IPPROTO_ESP
        message.encode()
        self._netlink.request("Flushing SAs", bytearray(message.data), messages.XFRM_MSG_FLUSHSA)
        self._forget()

    def _dump_sas(self) -> list[bytes]:
        return self._netlink.dump("Listing SAs", bytearray(INFO_END), messages.XFRM_MSG_GETSA)

    def list_sas(self) -> list[InstalledSA]:
        """Return every SA of this network namespace, with keys.

        A direction that the kernel does not know is that of `add_sa`, or told from the addresses of
        this host where somebody else has installed the SA.
        """
        directions = {sa_id: known.direction for sa_id, known in list(self.known.items())}
        return [installed_sa(answer, directions, self._local) for answer in self._dump_sas()]

    # -- policies

    def add_policy(self, policy: Policy, *, replace: bool = False) -> None:
        """Install `policy`. EEXIST: there is one with this selector, direction, mark and interface.

        With `replace` it takes the place of that one in one step (XFRM_MSG_UPDPOLICY), also of one that
        another process left. EOPNOTSUPP: the selector has ranges.

        What comes in may be for this host or for another behind it, so that an IN policy is
        installed for FWD, too (except in transport mode, which is for this host only). Outbound
        tunnel policies cannot be `optional` with kernels since 2022: EINVAL.
        """
        refuse_ranges([policy.selector], "XFRM", port_masks=True)
        before = self._find_policy(policy) if replace else None
        done: list[int] = []
        try:
            for direction in kernel_directions(policy):
                self._put_policy(policy, direction, replace=replace)
                done.append(direction)
            if policy.hw_offload is not None and self.get_policy(policy).policy.hw_offload is None:
                raise not_offloaded(f"Adding the policy for {words(policy)}", policy.hw_offload)
            self._inner.follow()
        except BaseException:
            for installed in done:
                if before is None:
                    self._delete_policy(policy, installed)
                else:
                    self._put_policy(before, installed, replace=True)
            raise
        if before is not None:
            for direction in set(kernel_directions(before)) - set(done):
                self._delete_policy(policy, direction)

    def _put_policy(self, policy: Policy, direction: int, *, replace: bool) -> None:
        self._netlink.request(
            f"Adding the policy for {words(policy)}",
            encode_policy(policy, direction),
            messages.XFRM_MSG_UPDPOLICY if replace else messages.XFRM_MSG_NEWPOLICY,
            NLM_F_ACK if replace else _NEW,
            remedies=_POLICY_REMEDIES,
        )

    def _find_policy(self, policy: Policy) -> Policy | None:
        try:
            return self.get_policy(policy).policy
        except NatCompatError as error:
            if error.errno == errno.ESRCH:
                return None
            raise

    def get_policy(self, policy: Policy) -> PolicyUsage:
        """Return the installed policy of this selector, direction, mark and interface. ESRCH: none."""
        message = encode_policy_id(policy, kernel_directions(policy)[0])
        what = f"Looking at the policy for {words(policy)}"
        try:
            return policy_usage_of(self._netlink.request(what, message, messages.XFRM_MSG_GETPOLICY, 0))
        except NatCompatError as error:
            raise no_policy(error) from None

    def delete_policy(self, policy: Policy) -> None:
        """Remove the policy of this selector, direction, mark and interface. ESRCH: there is none."""
        self._delete_policy(policy, kernel_directions(policy)[0])
        if policy.direction is Direction.IN:
            try:
                self._delete_policy(policy, messages.XFRM_POLICY_FWD)
            except NatCompatError as error:
                if error.errno != errno.ESRCH:
                    raise
        self._inner.follow_deletion()

    def _delete_policy(self, policy: Policy, direction: int) -> None:
        what = f"Deleting the policy for {words(policy)}"
        try:
            self._netlink.request(what, encode_policy_id(policy, direction), messages.XFRM_MSG_DELPOLICY)
        except NatCompatError as error:
            raise no_policy(error) from None

    def flush_policies(self, *, reqid: int | None = None) -> None:
        """Remove every policy of this network namespace, whoever installed it; sockets keep their own.

        With `reqid`, those that have it.
        """
        if reqid is not None:
            self.delete_policies_of(reqid)
            return
        message = messages.xfrm_userpolicy_flush()
        message.encode()
        self._netlink.request("Flushing policies", bytearray(message.data), messages.XFRM_MSG_FLUSHPOLICY)
        self._inner.follow_deletion()

    def list_policies(self) -> list[PolicyUsage]:
        """Return every IN and OUT policy that this package has words for (FWD comes with IN)."""
        policies = []
        empty = messages.xfrm_userpolicy_id()
        empty.encode()
        for answer in self._netlink.dump(
            "Listing policies", bytearray(empty.data), messages.XFRM_MSG_GETPOLICY
        ):
            try:
                policies.append(policy_usage_of(answer))
            except NatCompatError:
                continue
        return policies

    # -- the rest

    def bypass(self, sock: socket.socket) -> None:
        """Exempt `sock` from all policies, in both directions (see `natcompat.kernel.xfrm.bypass`)."""
        bypass(sock)

    def events(self, *, receive_buffer: int = RECEIVE_BUFFER) -> XfrmEvents:
        """Start listening, in the network namespace of the calling thread, where this was opened, too.

        `receive_buffer` bytes of queue are asked for.
        """
        return XfrmEvents(self._dump_sas, self.known, self.is_there, receive_buffer=receive_buffer)


def _ask_kernel() -> KernelFeatures:
    """Find out which attributes the kernel knows. EPERM: no privilege."""
    supported = probe_attributes()
    if supported.errno:
        raise failure("Opening XFRM", supported.errno, os.strerror(supported.errno))
    return KernelFeatures(
        sa_direction=bool(supported.sa_direction),
        keepalive=bool(supported.keepalive),
        output_mark=bool(supported.output_mark),
        hw_offload=bool(supported.hw_offload),
        cpu=bool(supported.cpu),
    )


def open_xfrm() -> XfrmIPsec:
    """Open the kernel's IPsec."""
    return XfrmIPsec()
