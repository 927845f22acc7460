"""`ChildSa`: the two ESP SAs of a CHILD_SA and their policies, as one object."""

from __future__ import annotations

import contextlib
import errno
import itertools
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from ipaddress import ip_address
from typing import Final, NamedTuple, Self, TypeAlias

from natcompat.contract import NAT_T_PORT
from natcompat.errors import NatCompatError
from natcompat.ike.keymat import as_key, split_keymat
from natcompat.ike.nat import NatDetection
from natcompat.ike.selectors import IkeSelector, policy_selectors
from natcompat.ike.steps import add_policy, delete_present, failure_of, undo_quietly
from natcompat.ipsec import (
    Direction,
    Encr,
    Integ,
    IPAddress,
    IPsec,
    Key,
    Lifetime,
    Mark,
    Mode,
    Policy,
    SaId,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)

OuterAddress: TypeAlias = str | IPAddress | tuple[str | IPAddress, int]
"""An outer address, or its pair with the UDP port of ESP in UDP (host byte order; without: 4500)."""


_NO_LIMITS: Final = Lifetime()


class OuterEnd(NamedTuple):
    """One end of the SAs on the wire: address, and UDP port in host byte order."""

    address: IPAddress
    port: int


class ChildSa:
    """Two ESP SAs and their policies (RFC 7296, 1.3), installed, moved and deleted together.

    `install` makes one. All methods raise what the verbs of the `IPsec` raise. An object belongs to one
    thread at a time. It keeps no keys, but those of an outbound SA that waits for `rekeyed_by`.
    """

    __slots__ = (
        "_ipsec",
        "_legacy",
        "_pending",
        "encapsulation",
        "inbound",
        "local",
        "mode",
        "outbound",
        "policies",
        "remote",
        "reqid",
    )

    def __init__(
        self,
        ipsec: IPsec,
        inbound: SecurityAssociation,
        outbound: SecurityAssociation,
        policies: tuple[Policy, ...],
    ) -> None:
        self._ipsec = ipsec
        self.inbound: SaId | None = inbound.sa_id
        """Name of the inbound SA; None once it is deleted."""
        self.outbound: SaId | None = None
        """Name of the outbound SA; None while it waits for `rekeyed_by`, and once it is deleted."""
        self.policies: tuple[Policy, ...] = policies
        """The policies that this object deletes; one that rekeys another has none until `rekeyed_by`."""
        self.mode: Mode = outbound.mode
        self.reqid: int = outbound.reqid
        self.encapsulation: UDPEncapsulation | None = outbound.encapsulation
        ports = outbound.encapsulation
        self.local: OuterEnd = OuterEnd(outbound.source, ports.local_port if ports else NAT_T_PORT)
        """Outer address of this host, and its port of ESP in UDP."""
        self.remote: OuterEnd = OuterEnd(outbound.destination, ports.remote_port if ports else NAT_T_PORT)
        """Outer address of the peer as this host sees it, and its port."""
        self._pending: SecurityAssociation | None = outbound
        self._legacy = False

    def __repr__(self) -> str:
        return f"<ChildSa {self.inbound} / {self.outbound}, {len(self.policies)} policies>"

    @classmethod
    def install(
        cls,
        ipsec: IPsec,
        *,
        local: OuterAddress,
        remote: OuterAddress,
        spi_in: int | bytes,
        spi_out: int | bytes,
        encryption: Encr | int,
        integrity: Integ | int = Integ.NONE,
        keymat: bytes | bytearray | memoryview,
        key_bits: int | None = None,
        initiator: bool,
        selectors: Iterable[tuple[IkeSelector, IkeSelector]] = (),
        reqid: int,
        nat: NatDetection | bool = False,
        mode: Mode = Mode.TUNNEL,
        lifetime: Lifetime = _NO_LIMITS,
        keepalive: int | None = None,
        esn: bool = False,
        replay_window: int = 64,
        original_address: IPAddress | None = None,
        mark: Mark | int | None = None,
        output_mark: Mark | int | None = None,
        interface_id: int | None = None,
        legacy: bool = False,
        replace_policies: bool = False,
        rekeys: ChildSa | None = None,
    ) -> Self:
        """Install a CHILD_SA: inbound SA, inbound policies, outbound SA, outbound policies.

        `local` and `remote` are the outer addresses as this host sees them, with the ports of ESP in UDP.
        `spi_in` is the SPI that this host chose (`IPsec.allocate_spi`), `spi_out` the peer's; as bytes, 4 in
        network order. `keymat`, `key_bits` and `initiator`: see `split_keymat`. `selectors` are the pairs of
        a local and a remote traffic selector that were negotiated (`selector_pairs`).

        `nat` says whether ESP goes in UDP: the result of `NatDetection.received`, or a boolean. `keepalive`
        is the interval of NAT-keepalives in seconds; it counts where this host is behind the NAT (or `nat`
        is True). `original_address`: the peer's address before its NAT, for checksums in transport mode.

        `replace_policies`: a policy of the same selector is replaced, for a daemon that installed trap
        policies or was restarted. Without it such a policy is EEXIST. `legacy` permits old transforms.

        `rekeys` is the CHILD_SA that this one replaces. The policies stay as they are until
        `rekeys.rekeyed_by(this)`, and `selectors` may be left out. The responder of a rekey (`initiator`
        False) sends on the new outbound SA only after `rekeyed_by`: its peer cannot receive on it before
        it has the answer. So no packet is lost.

        On an error nothing of it remains, and policies that were replaced are back. EPROTONOSUPPORT: `nat`
        says no UDP, and this IPsec has ESP in UDP only. ValueError: an argument cannot be.
        """
        try:
            keymat = as_key(keymat)
        except TypeError:
            keymat = Key()  # a traceback may show the local variables of this frame
            raise
        keys = split_keymat(keymat, encryption, integrity, initiator=initiator, key_bits=key_bits)
        pairs = list(selectors)
        near, far = _end(local), _end(remote)
        encapsulation = _encapsulation(ipsec, near, far, nat, original_address)
        behind_nat = nat.needs_keepalive if isinstance(nat, NatDetection) else nat
        ends = {Direction.IN: (far.address, near.address), Direction.OUT: (near.address, far.address)}

        def association(direction: Direction) -> SecurityAssociation:
            out = direction is Direction.OUT
            return SecurityAssociation(
                spi=spi_out if out else spi_in,
                source=ends[direction][0],
                destination=ends[direction][1],
                direction=direction,
                mode=mode,
                encryption=encryption,
                encryption_key=keys.outbound_encryption if out else keys.inbound_encryption,
                integrity=integrity,
                integrity_key=keys.outbound_integrity if out else keys.inbound_integrity,
                esn=esn,
                replay_window=replay_window,
                encapsulation=encapsulation,
                lifetime=lifetime,
                reqid=reqid,
                nat_keepalive=keepalive if out and encapsulation and behind_nat else None,
                mark=mark,
                output_mark=output_mark,
                interface_id=interface_id,
            )

        policies = tuple(
            Policy(
                direction=direction,
                selector=selector,
                source=ends[direction][0] if mode is Mode.TUNNEL else None,
                destination=ends[direction][1] if mode is Mode.TUNNEL else None,
                mode=mode,
                reqid=reqid,
                mark=mark,
                interface_id=interface_id,
            )
            for direction in (Direction.IN, Direction.OUT)
            for selector in _selectors(pairs, direction, ipsec.features.ranges)
        )
        if rekeys is not None:
            _check_rekey(rekeys, policies, reqid, mode)
            policies = ()
        elif not policies:
            raise ValueError("selectors: a CHILD_SA needs at least one pair, or `rekeys`")
        inbound = association(Direction.IN)
        child = cls(ipsec, inbound, association(Direction.OUT), policies)
        child._legacy = legacy
        child._add(inbound, replace_policies, later=rekeys is not None and not initiator)
        return child

    def _add(self, inbound: SecurityAssociation, replace_policies: bool, *, later: bool) -> None:
        with contextlib.ExitStack() as undo:
            added = self._ipsec.add_sa(inbound, legacy=self._legacy)
            undo.callback(undo_quietly, self._ipsec.delete_sa, added)
            for policy in self.policies:
                if policy.direction is Direction.OUT and self._pending is not None:
                    self._add_outbound(undo)
                add_policy(self._ipsec, policy, replace_policies, undo)
            if self._pending is not None and not later:
                self._add_outbound(undo)
            undo.pop_all()

    def _add_outbound(self, undo: contextlib.ExitStack) -> None:
        assert self._pending is not None
        added = self._ipsec.add_sa(self._pending, legacy=self._legacy)
        undo.callback(undo_quietly, self._ipsec.delete_sa, added)
        self.outbound, self._pending = added, None

    def rekeyed_by(self, new: ChildSa) -> None:
        """Let `new`, installed with ``rekeys=self``, send in place of this CHILD_SA.

        `new` takes over the policies. This one stops sending, and goes on receiving what is under way until
        `delete`. The initiator of the rekey calls it when it has installed `new`; the responder calls it when
        the peer's Delete for the old SA, or the first packet on the new one, arrives. Both call `delete` some
        seconds after the Delete exchange, since ESP can come after an IKE message that was sent later.

        On an error (the new outbound SA cannot be installed) this CHILD_SA sends as before.
        """
        if new is self:
            raise ValueError("new: a CHILD_SA does not replace itself")
        with contextlib.ExitStack() as undo:
            if new._pending is not None:
                new._add_outbound(undo)
            undo.pop_all()
        new.policies, self.policies = (*new.policies, *self.policies), ()
        self._pending = None
        outbound, self.outbound = self.outbound, None
        if outbound is not None:
            delete_present(self._ipsec.delete_sa, outbound)

    def move(
        self,
        *,
        local: OuterAddress | None = None,
        remote: OuterAddress | None = None,
        nat: NatDetection | bool | None = None,
    ) -> None:
        """Move both SAs and the policies to other outer addresses or ports (RFC 7296, 2.23; RFC 4555).

        An address without a port keeps the port that it had. `nat` says whether ESP goes in UDP from now on;
        None: as before. Sequence numbers and replay windows go on. Between the steps packets wait or are
        dropped, and none goes in the clear. On an error what had been moved is moved back.

        EOPNOTSUPP: another address in transport mode, where the selectors name the outer addresses; negotiate
        another CHILD_SA. Also what `IPsec.update_sa` of this backend cannot move.
        """
        near, far = self._moved(self.local, local), self._moved(self.remote, remote)
        before = self.encapsulation
        if nat is None:
            wanted = None if before is None else replace(before, local_port=near.port, remote_port=far.port)
        else:
            original = None if before is None else before.original_address
            wanted = _encapsulation(self._ipsec, near, far, nat, original)
        readdressed = (near.address, far.address) != (self.local.address, self.remote.address)
        if readdressed and self.mode is Mode.TRANSPORT:
            raise NatCompatError(
                errno.EOPNOTSUPP,
                "a CHILD_SA in transport mode cannot move to another address: its selectors name the old one",
                "Negotiate another CHILD_SA and delete this one",
            )
        with contextlib.ExitStack() as undo:
            inbound = self._move_sa(self.inbound, far.address, near.address, wanted, before, undo)
            outbound = self._move_sa(self.outbound, near.address, far.address, wanted, before, undo)
            policies = self._move_policies(near.address, far.address, undo) if readdressed else self.policies
            undo.pop_all()
        if self._pending is not None:
            self._pending = replace(
                self._pending, source=near.address, destination=far.address, encapsulation=wanted
            )
        self.inbound, self.outbound, self.policies = inbound, outbound, policies
        self.local, self.remote, self.encapsulation = near, far, wanted

    @staticmethod
    def _moved(before: OuterEnd, to: OuterAddress | None) -> OuterEnd:
        if to is None:
            return before
        end = _end(to)
        return end if isinstance(to, tuple) else end._replace(port=before.port)

    def _move_sa(
        self,
        sa_id: SaId | None,
        source: IPAddress,
        destination: IPAddress,
        wanted: UDPEncapsulation | None,
        before: UDPEncapsulation | None,
        undo: contextlib.ExitStack,
    ) -> SaId | None:
        if sa_id is None:
            return None
        update, old_source, old_destination = self._ipsec.update_sa, sa_id.source, sa_id.destination
        moved = update(
            sa_id,
            source=None if source == old_source else source,
            destination=None if destination == old_destination else destination,
            encapsulation=wanted if wanted != before else ...,
        )

        undo.callback(
            undo_quietly,
            partial(update, moved, source=old_source, destination=old_destination, encapsulation=before),
        )
        return moved

    def _move_policies(
        self, near: IPAddress, far: IPAddress, undo: contextlib.ExitStack
    ) -> tuple[Policy, ...]:
        moved = []
        for policy in self.policies:
            source, destination = (near, far) if policy.direction is Direction.OUT else (far, near)
            new = replace(policy, source=source, destination=destination)
            self._ipsec.add_policy(new, replace=True)
            undo.callback(undo_quietly, partial(self._ipsec.add_policy, policy, replace=True))
            moved.append(new)
        return tuple(moved)

    def delete(self, *, policies: bool = True) -> None:
        """Delete the SAs and then the policies; what is gone already (expired, flushed) is no error.

        ``policies=False`` leaves the policies installed, so that nothing goes in the clear afterwards. All
        that can be deleted is deleted, and then the first error is raised. May be called again.
        """
        sa_ids = [sa_id for sa_id in (self.outbound, self.inbound) if sa_id is not None]
        verbs: list[Callable[[], object]] = [partial(self._ipsec.delete_sa, sa_id) for sa_id in sa_ids]
        if policies:
            verbs += [partial(self._ipsec.delete_policy, policy) for policy in self.policies]
        self._pending = None
        failures = [failure for failure in map(failure_of, verbs) if failure is not None]
        if failures:
            raise failures[0]
        self.outbound = self.inbound = None
        if policies:
            self.policies = ()


def _end(value: OuterAddress) -> OuterEnd:
    address, port = value if isinstance(value, tuple) else (value, NAT_T_PORT)
    return OuterEnd(ip_address(address), port)


def _encapsulation(
    ipsec: IPsec,
    local: OuterEnd,
    remote: OuterEnd,
    nat: NatDetection | bool,
    original_address: IPAddress | None,
) -> UDPEncapsulation | None:
    if nat.encapsulate if isinstance(nat, NatDetection) else nat:
        return UDPEncapsulation(
            local_port=local.port, remote_port=remote.port, original_address=original_address
        )
    if ipsec.features.requires_udp_encapsulation:
        raise NatCompatError(
            errno.EPROTONOSUPPORT,
            "this IPsec carries ESP in UDP only, and NAT detection found no NAT",
            "Send NatDetection.hashes(force=True) in IKE_SA_INIT",
        )
    return None


def _selectors(
    pairs: Iterable[tuple[IkeSelector, IkeSelector]], direction: Direction, ranges: bool
) -> Iterable[TrafficSelector]:
    return dict.fromkeys(
        itertools.chain.from_iterable(policy_selectors(*pair, direction, ranges=ranges) for pair in pairs)
    )


def _check_rekey(old: ChildSa, policies: tuple[Policy, ...], reqid: int, mode: Mode) -> None:
    if (old.mode, old.reqid) != (mode, reqid):
        raise ValueError("reqid, mode: a rekeyed CHILD_SA keeps them, since its policies stay")
    if policies and set(map(_name, policies)) != set(map(_name, old.policies)):
        raise ValueError("selectors: a rekeyed CHILD_SA keeps its selectors; install another one for others")


def _name(policy: Policy) -> tuple[Direction, TrafficSelector]:
    return policy.direction, policy.selector
