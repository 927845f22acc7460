"""Moving an SA to other addresses or ports in place, as far as SADB_UPDATE does it.

PF_KEY has no way to give sequence numbers and replay window to another SA: an SA that was deleted and
added again would use its sequence numbers (and with AES-CTR its key stream) a second time, and take
packets that were played back. So what the kernel does not do in place is refused.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from types import EllipsisType

from natcompat.errors import NatCompatError
from natcompat.ipsec.associations import SaId, UDPEncapsulation
from natcompat.ipsec.values import Direction, IPAddress, Mode
from natcompat.kernel.pfkey import numbers as n
from natcompat.kernel.pfkey.dialects import Dialect, Modes, Move, NatT
from natcompat.kernel.pfkey.messages import Extension, Message, address_extension, key_extension
from natcompat.kernel.pfkey.readback import SaRecord, encapsulation_in, required
from natcompat.kernel.pfkey.translate import nat_t, refusal
from natcompat.kernel.pfkey.transport import PfKeySocket

_REMEDY = "Negotiate a new SA instead"


def move_sa(
    dialect: Dialect,
    sock: PfKeySocket,
    current: Message,
    record: SaRecord,
    direction: Direction,
    *,
    source: IPAddress | None,
    destination: IPAddress | None,
    encapsulation: UDPEncapsulation | EllipsisType | None,
    find: Callable[[SaId], Message | None],
) -> tuple[SaId, UDPEncapsulation | None]:
    """Move the SA in `current`, an answer to SADB_GET; return its new name and encapsulation.

    `find` asks for an SA by its name. See `natcompat.kernel.pfkey.kernel.PfKeyIPsec.update_sa`.
    """
    sa_id = record.sa_id
    what = f"Updating {sa_id}"
    source = source or record.source
    destination = destination or sa_id.destination
    if not source.version == destination.version == sa_id.destination.version:
        raise ValueError(f"source, destination: {sa_id} stays in its address family")
    before = encapsulation_in(dialect, current, direction)
    after = before if isinstance(encapsulation, EllipsisType) else encapsulation
    new = SaId(spi=sa_id.spi, destination=destination, source=source)
    same_place = (source, destination) == (record.source, sa_id.destination)
    same_ports = _ports(before) == _ports(after)
    if same_place and same_ports:
        return new, before
    _check(dialect, what, same_place, before, after)
    if new != sa_id and find(new) is not None:
        raise NatCompatError(errno.EEXIST, f"{what}: there is already {new}", "Delete the other one first")
    sock.request(
        what,
        Message(n.SADB_UPDATE, dialect.esp, list(_update(dialect, current, record, direction, new, after))),
    )
    found = find(new)
    if found is None or _ports(encapsulation_in(dialect, found, direction)) != _ports(after):
        raise NatCompatError(errno.EOPNOTSUPP, f"{what}: the kernel ignored what is new", _REMEDY)
    return new, after


def _ports(encapsulation: UDPEncapsulation | None) -> tuple[int, int] | None:
    return (encapsulation.local_port, encapsulation.remote_port) if encapsulation else None


def _check(
    dialect: Dialect,
    what: str,
    same_place: bool,
    before: UDPEncapsulation | None,
    after: UDPEncapsulation | None,
) -> None:
    if not same_place and Move.ADDRESSES not in dialect.moves:
        raise refusal(dialect, f"moves no SA to other addresses ({what})", _REMEDY)
    if (before is None) != (after is None):
        raise refusal(dialect, f"puts no SA into UDP or out of it ({what})", _REMEDY)
    if before is None or after is None or _ports(before) == _ports(after):
        return
    if Move.PORTS not in dialect.moves:
        raise refusal(dialect, f"changes no ports of an SA ({what})", _REMEDY)
    if dialect.nat_t is NatT.PEER and before.local_port != after.local_port:
        raise refusal(dialect, f"has one local port for all SAs ({what})", "Set net.inet.esp.udpencap_port")


def _update(
    dialect: Dialect,
    current: Message,
    record: SaRecord,
    direction: Direction,
    new: SaId,
    encapsulation: UDPEncapsulation | None,
) -> Iterator[Extension]:
    """Yield what SADB_UPDATE wants to hear of an SA in use."""
    yield required(current, n.SADB_EXT_SA)
    if Move.ADDRESSES not in dialect.moves:
        # Linux demands all that an SA has, though it looks at lifetimes and ports only.
        for kind in (n.SADB_EXT_LIFETIME_HARD, n.SADB_EXT_LIFETIME_SOFT):
            yield required(current, kind)
    if dialect.modes is Modes.FLAG:  # OpenBSD: the new source, the old destination, the new one as proxy
        yield address_extension(dialect, n.SADB_EXT_ADDRESS_SRC, new.source or record.source)
        yield address_extension(dialect, n.SADB_EXT_ADDRESS_DST, record.sa_id.destination)
        if new.destination != record.sa_id.destination:
            yield address_extension(dialect, n.SADB_EXT_ADDRESS_PROXY, new.destination)
    else:
        yield address_extension(dialect, n.SADB_EXT_ADDRESS_SRC, record.source)
        yield address_extension(dialect, n.SADB_EXT_ADDRESS_DST, record.sa_id.destination)
    if Move.ADDRESSES not in dialect.moves:
        authentication = current.find(n.SADB_EXT_KEY_AUTH)
        if authentication is not None:
            yield authentication
        yield current.find(n.SADB_EXT_KEY_ENCRYPT) or key_extension(n.SADB_EXT_KEY_ENCRYPT, b"")
    if dialect.modes is Modes.SA2:
        yield required(current, n.SADB_X_EXT_SA2)
    if encapsulation is not None:
        yield from nat_t(dialect, encapsulation, direction, Mode.TUNNEL)
    if dialect.modes is Modes.SA2 and (new.source, new.destination) != (
        record.source,
        record.sa_id.destination,
    ):
        yield address_extension(dialect, n.SADB_X_EXT_NEW_ADDRESS_SRC, new.source or record.source)  # FreeBSD
        yield address_extension(dialect, n.SADB_X_EXT_NEW_ADDRESS_DST, new.destination)
