"""Moving an SA to other addresses or ports without a packet in the clear or a sequence number twice.

XFRM_MSG_UPDSA of an SA in use changes its UDP ports and lifetimes, ignores all else and reports
success all the same (xfrm_state_update() in net/xfrm/xfrm_state.c). So only ports go that way, and
are read back. All else is a deletion and an addition: the kernel multicasts the SA that it deletes
as it was at the very end, and that is what is installed again with the new addresses. The policies
stay all the while, so that packets in between wait for an SA or are dropped.

Nothing here is decoded into objects: the messages hold keys, and are overwritten when done with.
"""

from __future__ import annotations

import errno
import struct
from types import EllipsisType

from natcompat.errors import NatCompatError
from natcompat.ipsec import Direction, IPAddress, SaId, UDPEncapsulation
from natcompat.ipsec.associations import wire_ports
from natcompat.kernel.xfrm import layouts, messages
from natcompat.kernel.xfrm.netlink import HEADER, LocalAddresses, Netlink, attributes
from natcompat.kernel.xfrm.probe import NLM_F_ACK, NLM_F_CREATE, NLM_F_EXCL, UDP_ENCAP_ESPINUDP
from natcompat.kernel.xfrm.readback import XFRMA, refuse_withheld_keys
from natcompat.kernel.xfrm.translate import (
    BODY,
    INFO_END,
    address_of,
    encode_sa_id,
    octets,
    patch_ports,
)

_AT = {
    name: BODY + layouts.offset_of(layouts.XFRM_USERSA_INFO, name)
    for name in (
        "sel_daddr",
        "sel_saddr",
        "sel_prefixlen_d",
        "sel_prefixlen_s",
        "id_daddr",
        "id_spi",
        "saddr",
        "curlft_bytes",
        "stats_replay_window",
        "family",
    )
}
_ENCAP_SIZE = 24
_DELETED_INFO = BODY + layouts.size_of(layouts.XFRM_USERSA_ID)


def move_sa(
    netlink: Netlink,
    sa_id: SaId,
    *,
    source: IPAddress | None,
    destination: IPAddress | None,
    encapsulation: UDPEncapsulation | EllipsisType | None,
    known: Direction | None,
    local: LocalAddresses,
) -> tuple[SaId, tuple[int, int] | None]:
    """Move an SA (see `XfrmIPsec.update_sa`); return its new name and its ports on the wire, if any.

    Where the kernel does not know the direction, it is `known`, or else the addresses of this host tell.
    """
    what = f"Updating {sa_id}"
    current = bytearray(
        netlink.request(f"Looking at {sa_id}", encode_sa_id(sa_id), messages.XFRM_MSG_GETSA, 0)
    )
    try:
        family = struct.unpack_from("=H", current, _AT["family"])[0]
        old_source = address_of(bytes(current[_AT["saddr"] : _AT["saddr"] + 16]), family)
        source = source or old_source
        destination = destination or sa_id.destination
        if not source.version == destination.version == sa_id.destination.version:
            raise ValueError(f"source, destination: {sa_id} stays in its address family")
        direction = _direction(current, sa_id, known, local)
        place = _find(current, XFRMA["ENCAP"])
        ports = struct.unpack_from(">HH", current, place + 2) if place else None
        if isinstance(encapsulation, EllipsisType):
            new_ports = ports
        else:
            new_ports = wire_ports(encapsulation, direction) if encapsulation else None
        new = SaId(spi=sa_id.spi, destination=destination, source=source, mark=sa_id.mark)
        same_place = source == old_source and destination == sa_id.destination
        if same_place and new_ports == ports:
            return new, ports
        refuse_withheld_keys(what)
        original = None
        if isinstance(encapsulation, UDPEncapsulation):
            original = encapsulation.original_address
        if same_place and ports and new_ports:
            changed = _changed(current, source, destination, new_ports, original)
            netlink.request(what, changed, messages.XFRM_MSG_UPDSA)
            _check_ports(netlink, what, sa_id, new_ports)
        else:
            _delete_and_add(netlink, what, sa_id, (source, destination, new_ports, original))
        return new, new_ports
    finally:
        current[:] = bytes(len(current))


def _direction(message: bytearray, sa_id: SaId, known: Direction | None, local: LocalAddresses) -> Direction:
    place = _find(message, XFRMA["SA_DIR"])
    if place:
        return Direction.IN if message[place] == messages.XFRM_SA_DIR_IN else Direction.OUT
    if known is not None:
        return known
    return Direction.IN if sa_id.destination in local else Direction.OUT


def _find(message: bytearray, wanted: int) -> int:
    """Return the offset of the value of the attribute `wanted`, or 0."""
    for kind, start, _ in attributes(message, INFO_END):
        if kind == wanted:
            return start
    return 0


def _changed(
    message: bytearray,
    source: IPAddress,
    destination: IPAddress,
    ports: tuple[int, int] | None,
    original: IPAddress | None,
) -> bytearray:
    """Return a copy of `message` (header, xfrm_usersa_info, attributes) with other addresses and ports."""
    info = bytearray(message[:INFO_END])
    for selector, prefix, address, new in (
        ("sel_daddr", "sel_prefixlen_d", "id_daddr", destination),
        ("sel_saddr", "sel_prefixlen_s", "saddr", source),
    ):
        old = info[_AT[address] : _AT[address] + 16]
        # A transport-mode selector names the outer addresses, and so has to move with them.
        if info[_AT[prefix]] == new.max_prefixlen and info[_AT[selector] : _AT[selector] + 16] == old:
            info[_AT[selector] : _AT[selector] + 16] = octets(new)
        info[_AT[address] : _AT[address] + 16] = octets(new)
    changed = info
    encapsulated = False
    for kind, start, end in attributes(message, INFO_END):
        if kind == XFRMA["ENCAP"]:
            if ports is None:
                continue
            encapsulated = True
        elif kind in (XFRMA["MTIMER_THRESH"], XFRMA["NAT_KEEPALIVE_INTERVAL"]) and ports is None:
            continue  # the kernel takes them with encapsulation only
        at = len(changed) + 4
        changed += struct.pack("=HH", 4 + end - start, kind) + message[start:end] + bytes(-(end - start) % 4)
        if kind == XFRMA["ENCAP"] and ports is not None:
            _put_ports(changed, at, ports, original)
    if ports is not None and not encapsulated:
        at = len(changed) + 4
        changed += struct.pack("=HHH", 4 + _ENCAP_SIZE, XFRMA["ENCAP"], UDP_ENCAP_ESPINUDP) + bytes(22)
        _put_ports(changed, at, ports, original)
    return changed


def _put_ports(message: bytearray, at: int, ports: tuple[int, int], original: IPAddress | None) -> None:
    outbound = UDPEncapsulation(local_port=ports[0], remote_port=ports[1], original_address=original)
    patch_ports(message, at, outbound, Direction.OUT)


def _check_ports(netlink: Netlink, what: str, sa_id: SaId, ports: tuple[int, int]) -> None:
    answer = bytearray(netlink.request(what, encode_sa_id(sa_id), messages.XFRM_MSG_GETSA, 0))
    place = _find(answer, XFRMA["ENCAP"])
    found = struct.unpack_from(">HH", answer, place + 2) if place else None
    answer[:] = bytes(len(answer))
    if found != ports:
        raise NatCompatError(
            errno.EOPNOTSUPP, f"{what}: the kernel ignored the new ports", "Negotiate a new SA instead"
        )


def _delete_and_add(
    netlink: Netlink,
    what: str,
    sa_id: SaId,
    new: tuple[IPAddress, IPAddress, tuple[int, int] | None, IPAddress | None],
) -> None:
    new_id = SaId(spi=sa_id.spi, destination=new[1], mark=sa_id.mark)
    if new_id != sa_id and _exists(netlink, new_id):
        raise NatCompatError(errno.EEXIST, f"{what}: there is already {new_id}", "Delete the other one first")
    final = _delete_and_listen(netlink, what, sa_id)
    flags = NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL
    try:
        try:
            netlink.request(what, _changed(final, *new), messages.XFRM_MSG_NEWSA, flags)
        except BaseException:
            netlink.request(f"Putting back {sa_id}", bytearray(final), messages.XFRM_MSG_NEWSA, flags)
            raise
    finally:
        final[:] = bytes(len(final))


def _exists(netlink: Netlink, sa_id: SaId) -> bool:
    try:
        netlink.request("Looking", encode_sa_id(sa_id), messages.XFRM_MSG_GETSA, 0)
    except NatCompatError as error:
        if error.errno == errno.ESRCH:
            return False
        raise
    return True


def _delete_and_listen(netlink: Netlink, what: str, sa_id: SaId) -> bytearray:
    """Delete an SA; return it as it was at the end, as a message that adds it, counters and all.

    The socket that deletes is in the multicast group itself, so that the report is in its queue
    before the acknowledgement.
    """
    request = encode_sa_id(sa_id)
    reports = netlink.request_and_hear(what, request, messages.XFRM_MSG_DELSA, messages.XFRMNLGRP_SA)
    final = _installable(reports, sa_id)
    reports.clear()  # whatever it is, there are keys in it
    if final is None:
        raise NatCompatError(
            errno.ENOBUFS,
            f"{what}: the kernel's report of the deletion was lost, and with it the sequence number",
            "Negotiate a new SA",
        )
    return final


def _installable(reports: list[bytes], sa_id: SaId) -> bytearray | None:
    """Make a message that adds an SA out of the report of its deletion."""
    wanted = octets(sa_id.destination) + sa_id.spi.to_bytes(4, "big")
    for report in reports:
        if report[BODY : BODY + 20] != wanted:
            continue
        for kind, start, end in attributes(report, _DELETED_INFO):
            if kind == XFRMA["SA"]:
                message = bytearray(HEADER.size) + report[start:end]
                for other, begin, stop in attributes(report, _DELETED_INFO):
                    if other != XFRMA["SA"]:
                        padding = bytes(-(stop - begin) % 4)
                        message += struct.pack("=HH", 4 + stop - begin, other) + report[begin:stop] + padding
                current = message[_AT["curlft_bytes"] : _AT["curlft_bytes"] + 32]
                message += struct.pack("=HH", 36, XFRMA["LTIME_VAL"]) + current
                return message
    return None
