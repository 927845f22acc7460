"""A table of nf_tables that no route goes around: what policies cover never passes in the clear.

Routes and rules lead traffic into the packet device, and anybody may change them; a program may bind to an
interface. The guard drops packets that leave by any other interface while an outbound policy protects or
discards them, and packets that arrive by any other interface while such an inbound policy covers them (RFC
4301, 5.2), local and forwarded. Packets that no policy covers pass, exactly by protocol and port::

    table inet natcompat-7 {
        chain output  { hook postrouting; oif 7 accept; ... @out4-0-... goto block-output }
        chain input   { hook input; iif 7 accept; ... }
        chain forward { hook forward; iif 7 accept; ... }

- Outer packets of ESP and IKE pass: their sockets have the mark of `natcompat.esp.device.routes`.
- Later fragments have no ports: the guard drops those of address pairs with a policy for ports.
- As with the kernel's IPsec, policies are not for traffic of the loopback interface. ARP and IPv6 neighbour
  discovery pass, since no packet leaves without them.
- The table has an owner (Linux 5.12): the kernel removes it when the process ends, however it ends, and lets
  nobody else change it. With `lockdown` it stays (Linux 6.9) until another process takes it over.
- The guard looks at packets before and after source NAT, since a policy may name either address.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
from collections.abc import Iterable
from typing import Final

from natcompat.errors import NatCompatError, get_logger
from natcompat.esp.device import guard_rules
from natcompat.esp.device import nftables as nft
from natcompat.esp.device.guard_rules import Identity, Program
from natcompat.esp.device.selector_sets import SelectorSets
from natcompat.ipsec import Direction, Policy, TrafficSelector

TABLE_PREFIX: Final = "natcompat-"

_UNKNOWN: Final = (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOENT)
"""What older kernels say to a flag or an expression that they do not know."""

_log = get_logger()


class Guard:
    """The table of one device. Not thread-safe.

    Raises EPERM without CAP_NET_ADMIN; EPROTONOSUPPORT, ENOENT or EOPNOTSUPP on a kernel without nf_tables.
    """

    def __init__(self, index: int, *, mark: int, passed: int, lockdown: bool = False) -> None:
        """Create the table of the interface `index`, without a policy.

        `mark`: the bit of the packet mark that outer packets have. `passed`: a bit that those packets have,
        too, which the engine handed back since no policy protects them; the guard checks these as any other.
        """
        self.table: str = f"{TABLE_PREFIX}{index}"
        self.owned: bool = True
        """Whether the kernel lets nobody else change the table, and ends it with the process."""
        self._lockdown = lockdown
        self._sides = _empty_sides()
        self._policies: dict[tuple[Direction, TrafficSelector], Policy] = {}
        self._sets: list[str] = []
        """Names of the sets of policies in the kernel."""
        self._endpoints: frozenset[tuple[str, bytes]] = frozenset()
        self._uncertain = False
        """Whether the sets in the kernel differ from `_sides`, since a batch failed."""
        self._identity = Identity(index, mark, passed, socket_marks=True)
        self._predecessors: list[str] = []
        self._netlink = nft.Nfnetlink()
        try:
            self._create()
        except BaseException:
            self._netlink.close()
            raise

    # --- the table

    def _create(self) -> None:
        """Create the table with the flags and expressions that this kernel knows; take over stale ones."""
        stale = {state.name: state for state in stale_among(self._netlink.tables())}
        wanted = nft.OWNER | nft.PERSIST if self._lockdown else nft.OWNER
        refusal: NatCompatError | None = None
        for flags, socket_marks in ((wanted, True), (wanted, False), (0, True), (0, False)):
            self._identity = self._identity._replace(socket_marks=socket_marks)
            before = nft.removal(stale[self.table]) if self.table in stale else []
            create = guard_rules.skeleton(self.table, flags, self._identity)
            try:
                self._netlink.batch("Creating the guard in nf_tables", [*before, *create])
            except NatCompatError as error:
                if error.errno not in _UNKNOWN:
                    raise
                refusal = refusal or error
            else:
                self.owned = bool(flags)
                break
        else:
            raise refusal or NatCompatError(errno.EOPNOTSUPP, "There is no nf_tables")
        for name, state in stale.items():
            if name != self.table:
                self._take_over(state)

    def _take_over(self, state: nft.TableState) -> None:
        """Adopt the table that a killed process left, and let this device through it."""
        adopt = nft.adoption(state)
        admit = guard_rules.let_device_pass(state.name, self._identity.interface)
        try:
            self._netlink.batch(f"Taking over the guard {state.name}", [*adopt, *admit])
        except NatCompatError as error:
            _log.warning("%s", error)
        else:
            self._predecessors.append(state.name)

    @property
    def has_predecessors(self) -> bool:
        """Whether tables of killed processes still block what their policies covered."""
        return bool(self._predecessors)

    def release_predecessors(self) -> None:
        """Remove the tables of killed processes."""
        names, self._predecessors = self._predecessors, []
        for name in names:
            with contextlib.suppress(NatCompatError):  # somebody else did
                self._netlink.batch(f"Removing the guard {name}", [nft.delete_table(name)])

    def restore(self) -> bool:
        """Create the table anew if somebody removed it; tell whether that was so."""
        if self.owned or any(state.name == self.table for state in self._netlink.tables()):
            return False
        program = Program(self.table)
        create = guard_rules.skeleton(self.table, 0, self._identity)
        elements = self._endpoint_messages(self._endpoints, frozenset())
        messages = [*create, *elements, *program.replace(self._sides, [])]
        self._netlink.batch("Restoring the guard", messages)
        self._sets = program.sets
        return True

    # --- policies

    def change(self, *, add: Iterable[Policy] = (), remove: Iterable[Policy] = ()) -> None:
        """Remove and add policies in one step, whole or not at all."""
        with contextlib.ExitStack() as undo:
            undo.callback(self._settle)
            undo.callback(self._doubt)
            for policy in remove:
                undo.callback(self._enter, policy, self._leave(policy))
            for policy in add:
                self._enter(policy)
                undo.callback(self._leave, policy)
            self._apply()
            undo.pop_all()
        self._settle()

    def _enter(self, policy: Policy, insertion: int | None = None) -> None:
        self._side(policy).add(policy, insertion)
        self._policies[policy.direction, policy.selector] = policy

    def _leave(self, policy: Policy) -> int:
        """Take the policy with the direction and selector of `policy` out; return its number."""
        del self._policies[policy.direction, policy.selector]
        return self._side(policy).remove(policy)

    def _doubt(self) -> None:
        self._uncertain = True

    def _settle(self) -> None:
        for side in self._sides.values():
            side.settle()

    def _apply(self) -> None:
        if self._uncertain or any(side.restructured for side in self._sides.values()):
            program = Program(self.table)
            self._netlink.batch("Changing the guard", program.replace(self._sides, self._sets))
            self._sets, self._uncertain = program.sets, False
        elif messages := guard_rules.changes_of(self.table, self._sides):
            self._netlink.batch("Changing the guard", messages)

    def retain(self, policies: Iterable[Policy]) -> None:
        """Remove all policies but these, and the tables of killed processes."""
        retained = {(policy.direction, policy.selector) for policy in policies}
        self.change(remove=[policy for name, policy in self._policies.items() if name not in retained])
        self.release_predecessors()

    def _side(self, policy: Policy) -> SelectorSets:
        return self._sides[_side_name(policy.direction, policy.selector.source.version)]

    # --- endpoints

    def set_endpoints(self, addresses: Iterable[tuple[str, int]]) -> None:
        """Drop and count what comes out of the device for these addresses and ports (UDP)."""
        keys = frozenset(_endpoint_keys(addresses))
        messages = self._endpoint_messages(keys, self._endpoints)
        if messages:
            self._netlink.batch("Telling the guard the endpoints", messages)
            self._endpoints = keys

    def _endpoint_messages(
        self, keys: frozenset[tuple[str, bytes]], before: frozenset[tuple[str, bytes]]
    ) -> list[nft.Message]:
        messages: list[nft.Message] = []
        for delete, changed in ((True, before - keys), (False, keys - before)):
            for name, key in changed:
                messages += nft.set_elements(self.table, name, [key], delete=delete)
        return messages

    # --- counters, and the end

    def counters(self) -> dict[str, int]:
        """Return how many packets were blocked (output, input, forward, endpoint-inside, looped)."""
        return self._netlink.counters(self.table)

    def close(self) -> None:
        """Remove the table. With lockdown it stays as long as there is a policy in it. May be repeated."""
        stays = self._lockdown and bool(self._policies)
        if not stays:
            with contextlib.suppress(
                NatCompatError, OSError
            ):  # privileges are gone; the owner's socket ends it
                self._netlink.batch("Removing the guard", [nft.delete_table(self.table)])
            with contextlib.suppress(NatCompatError, OSError):
                self.release_predecessors()
        self._netlink.close()

    def abandon(self) -> None:
        """Close a forked child's copy of the socket: the table is its parent's, and ends with that."""
        self._netlink.close()


def stale_among(tables: Iterable[nft.TableState]) -> list[nft.TableState]:
    """Return the guards that no process owns: their processes were killed under lockdown."""
    guards = (state for state in tables if state.name.startswith(TABLE_PREFIX))
    return [state for state in guards if not state.owner and not _has_device(state)]


def _has_device(state: nft.TableState) -> bool:
    """Tell whether a table without an owner may be a living process's, on a kernel that knows no owners."""
    if state.flags & nft.OWNER:
        return False
    import socket

    try:
        socket.if_indextoname(int(state.name.removeprefix(TABLE_PREFIX)))
    except (OSError, ValueError, OverflowError):
        return False
    return True


def stale_guards() -> list[str]:
    """Return the names of guards that killed processes left behind. EPERM without CAP_NET_ADMIN."""
    netlink = nft.Nfnetlink()
    try:
        return [state.name for state in stale_among(netlink.tables())]
    finally:
        netlink.close()


def remove_stale_guards() -> list[str]:
    """Remove the guards that killed processes left behind; return their names."""
    netlink = nft.Nfnetlink()
    try:
        removed = []
        for state in stale_among(netlink.tables()):
            netlink.batch(f"Removing the guard {state.name}", nft.removal(state))
            removed.append(state.name)
        return removed
    finally:
        netlink.close()


def _empty_sides() -> dict[str, SelectorSets]:
    return {
        _side_name(direction, version): SelectorSets(version, outbound=direction is Direction.OUT)
        for direction in Direction
        for version in (4, 6)
    }


def _side_name(direction: Direction, version: int) -> str:
    return f"{direction.value}{version}"


def _endpoint_keys(addresses: Iterable[tuple[str, int]]) -> Iterable[tuple[str, bytes]]:
    for host, port in addresses:
        address = ipaddress.ip_address(host.partition("%")[0])
        address = getattr(address, "ipv4_mapped", None) or address
        if not address.is_unspecified:
            yield f"endpoints{address.version}", address.packed + port.to_bytes(2) + bytes(2)
        else:
            for version in (4,) if address.version == 4 else (4, 6):
                yield f"ports{version}", port.to_bytes(2)
