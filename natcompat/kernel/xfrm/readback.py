"""Reads the kernel's SAs and their usage from XFRM messages."""

from __future__ import annotations

import contextlib
import errno
import socket
import struct
from collections.abc import Mapping
from typing import Any

from natcompat.errors import NatCompatError
from natcompat.ipsec import (
    Direction,
    InstalledSA,
    Integ,
    Mark,
    Mode,
    SaId,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
    Usage,
)
from natcompat.ipsec.associations import encapsulation_of
from natcompat.kernel.xfrm import layouts, messages
from natcompat.kernel.xfrm.algorithms import ENCRYPTION_NAMES, INTEGRITY_NAMES
from natcompat.kernel.xfrm.netlink import LocalAddresses, attributes
from natcompat.kernel.xfrm.offload import offload_of
from natcompat.kernel.xfrm.translate import BODY, INFO_END, address_of, lifetime_of, selector_of

XFRMA = {
    name.removeprefix("XFRMA_"): number for number, (name, _) in enumerate(messages.xfrm_attributes.nla_map)
}
"""Attribute numbers by name."""

_CURRENT = BODY + layouts.offset_of(layouts.XFRM_USERSA_INFO, "curlft_bytes")
_STATISTICS = BODY + layouts.offset_of(layouts.XFRM_USERSA_INFO, "stats_replay_window")

_ENCRYPTION = {name: transform for transform, name in reversed(ENCRYPTION_NAMES.items())}
_AEAD = {
    (name, 8 * transform.icv_length): transform
    for transform, name in ENCRYPTION_NAMES.items()
    if transform.is_aead
}
_INTEGRITY = {(name, 8 * transform.icv_length): transform for transform, name in INTEGRITY_NAMES.items()}


def usage_of(answer: bytes, direction: Direction | None = None) -> Usage:
    """Return the usage in a message that starts with an xfrm_usersa_info (XFRM_MSG_NEWSA).

    `direction` is that of the SA where the kernel does not know it.
    """
    octets, packets, added, first_used = struct.unpack_from("=4Q", answer, _CURRENT)
    window_drops, replay_drops, integrity_drops = struct.unpack_from("=3I", answer, _STATISTICS)
    last_used = None
    sequence = 0
    for kind, start, end in attributes(answer, INFO_END):
        if kind == XFRMA["REPLAY_ESN_VAL"]:
            _, sent, received, sent_high, received_high = struct.unpack_from("=5I", answer, start)
            sequence = max(sent_high << 32 | sent, received_high << 32 | received)
        elif kind == XFRMA["REPLAY_VAL"]:
            sequence = max(struct.unpack_from("=2I", answer, start))
        elif kind == XFRMA["LASTUSED"] and end - start == 8:
            last_used = float(struct.unpack_from("=Q", answer, start)[0]) or None
        elif kind == XFRMA["SA_DIR"]:
            direction = Direction.IN if answer[start] == messages.XFRM_SA_DIR_IN else Direction.OUT
    return Usage(
        packets=packets,
        octets=octets,
        added=float(added),
        first_used=float(first_used) or None,
        last_used=last_used,
        replay_drops=replay_drops,
        window_drops=window_drops,
        integrity_drops=integrity_drops,
        sequence=sequence,
        last_received=last_used if direction is Direction.IN else None,
        last_sent=last_used if direction is Direction.OUT else None,
    )


def decode(message_class: type[Any], answer: bytes) -> Any:
    """Return `answer` decoded as `message_class`."""
    message = message_class(answer)
    message.decode()
    return message


def sa_id_of(message: Any, prefix: str = "") -> SaId:
    """Return the name of the SA in a struct xfrm_usersa_info."""
    family = message[f"{prefix}family"]
    mark = message.get_attr("XFRMA_MARK")
    return SaId(
        spi=message[f"{prefix}id_spi"],
        destination=address_of(message[f"{prefix}id_daddr"], family),
        source=address_of(message[f"{prefix}saddr"], family),
        mark=Mark(value=mark["v"], mask=mark["m"]) if mark else None,
    )


def installed_sa(answer: bytes, directions: Mapping[SaId, Direction], local: LocalAddresses) -> InstalledSA:
    """Return the SA in a message that starts with an xfrm_usersa_info.

    Where the kernel does not know its direction, `directions` does, or `local`, this host's addresses.
    """
    message = decode(messages.xfrm_usersa_info, answer)
    sa_id = sa_id_of(message)
    names = [
        message.get_attr(name)["alg_name"]
        for name in ("XFRMA_ALG_AEAD", "XFRMA_ALG_CRYPT", "XFRMA_ALG_AUTH", "XFRMA_ALG_COMP")
        if message.get_attr(name)
    ]
    protocol = {50: "ESP", 51: "AH", 108: "IPComp"}.get(message["id_proto"], str(message["id_proto"]))
    larval = protocol == "ESP" and not names
    association = None
    direction = _direction_of(message, sa_id, directions, local)
    description = " ".join([protocol, *names])
    if not larval:
        try:
            association = _association(message, sa_id, direction)
        except (ValueError, KeyError, OSError) as error:
            description += f" ({error.args[0] if isinstance(error, KeyError) else error})"
    return InstalledSA(
        sa_id=sa_id,
        association=association,
        usage=usage_of(answer, direction),
        larval=larval,
        description=description,
    )


def _direction_of(
    message: Any, sa_id: SaId, directions: Mapping[SaId, Direction], local: LocalAddresses
) -> Direction:
    """Return the direction that the kernel knows, or else natcompat, or else this host's addresses."""
    known = message.get_attr("XFRMA_SA_DIR")
    if known:
        return Direction.IN if known == messages.XFRM_SA_DIR_IN else Direction.OUT
    if sa_id in directions:
        return directions[sa_id]
    return Direction.IN if sa_id.destination in local else Direction.OUT


def _association(message: Any, sa_id: SaId, direction: Direction) -> SecurityAssociation:
    """Say the kernel's SA in the words of RFC 4301; ValueError or KeyError for what cannot be said."""
    if message["id_proto"] != socket.IPPROTO_ESP:
        raise KeyError("not ESP")
    if message["mode"] not in (messages.XFRM_MODE_TUNNEL, messages.XFRM_MODE_TRANSPORT):
        raise KeyError("neither tunnel nor transport mode")
    transforms = _transforms(message)
    replay = message.get_attr("XFRMA_REPLAY_ESN_VAL")
    window = replay["replay_window"] if replay else message["replay_window"]
    encapsulation: UDPEncapsulation | None = None
    wire = message.get_attr("XFRMA_ENCAP")
    if wire:
        encapsulation = encapsulation_of(wire["encap_sport"], wire["encap_dport"], direction)
    flags = message["flags"]
    selectors: list[TrafficSelector] = []
    if message["sel_family"] and any(
        message[f"sel_{name}"] for name in ("prefixlen_s", "prefixlen_d", "proto")
    ):
        selectors.append(selector_of(message))
    return SecurityAssociation(
        spi=sa_id.spi,
        source=address_of(message["saddr"], message["family"]),
        destination=sa_id.destination,
        direction=direction,
        mode=Mode.TUNNEL if message["mode"] == messages.XFRM_MODE_TUNNEL else Mode.TRANSPORT,
        **transforms,
        esn=bool(flags & messages.XFRM_STATE_ESN),
        replay_window=window,
        encapsulation=encapsulation,
        lifetime=lifetime_of(message),
        selectors=selectors,
        reqid=message["reqid"],
        nat_keepalive=message.get_attr("XFRMA_NAT_KEEPALIVE_INTERVAL") or None,
        mark=sa_id.mark,
        interface_id=message.get_attr("XFRMA_IF_ID") or None,
        tfc=message.get_attr("XFRMA_TFCPAD") or 0,
        copy_dscp=not (message.get_attr("XFRMA_SA_EXTRA_FLAGS") or 0)
        & messages.XFRM_SA_XFLAG_DONT_ENCAP_DSCP,
        copy_ecn=not flags & messages.XFRM_STATE_NOECN,
        copy_df=not flags & messages.XFRM_STATE_NOPMTUDISC,
        output_mark=_output_mark(message),
        hw_offload=offload_of(message),
        cpu=message.get_attr("XFRMA_SA_PCPU"),
    )


def _output_mark(message: Any) -> Mark | None:
    value = message.get_attr("XFRMA_SET_MARK")
    if value is None:
        return None
    mask = message.get_attr("XFRMA_SET_MARK_MASK") or 0xFFFF_FFFF
    return Mark(value=value & mask, mask=mask)


def _transforms(message: Any) -> dict[str, Any]:
    aead = message.get_attr("XFRMA_ALG_AEAD")
    if aead:
        return {
            "encryption": _AEAD[aead["alg_name"], aead["alg_icv_len"]],
            "encryption_key": aead["alg_key"],
        }
    crypt = message.get_attr("XFRMA_ALG_CRYPT")
    auth = message.get_attr("XFRMA_ALG_AUTH_TRUNC")
    encryption = _ENCRYPTION[crypt["alg_name"] if crypt else "none"]
    integrity = Integ.NONE
    key = b""
    if auth:
        integrity = _INTEGRITY[auth["alg_name"], auth["alg_trunc_len"]]
        key = auth["alg_key"]
    return {
        "encryption": encryption,
        "encryption_key": crypt["alg_key"] if crypt else b"",
        "integrity": integrity,
        "integrity_key": key,
    }


def refuse_withheld_keys(what: str) -> None:
    """Raise EPERM where the kernel shows zeros for keys: lockdown, see xfrm_redact() in xfrm_user.c."""
    with (
        contextlib.suppress(FileNotFoundError, PermissionError),
        open("/sys/kernel/security/lockdown", encoding="ascii") as state,
    ):
        if "[confidentiality]" in state.read():
            raise NatCompatError(
                errno.EACCES,
                f"{what}: the kernel is locked down and does not show the keys that must go on",
                "Negotiate a new SA instead",
            )
