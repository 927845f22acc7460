"""Network cards that do the work of SAs (struct xfrm_user_offload of linux/xfrm.h)."""

from __future__ import annotations

import errno
import socket
from typing import Any

from natcompat.errors import NatCompatError
from natcompat.ipsec import Direction, HardwareOffload
from natcompat.kernel.xfrm import layouts
from natcompat.kernel.xfrm.netlink import HEADER, attributes
from natcompat.kernel.xfrm.probe import XFRMA_OFFLOAD_DEV

XFRM_OFFLOAD_INBOUND, XFRM_OFFLOAD_PACKET = 2, 4  # linux/xfrm.h
NO_CARD_REMEDY = (
    "Leave hw_offload out, or choose an interface whose driver has ESP (ethtool -k: esp-hw-offload)"
)
_INFO_END = HEADER.size + layouts.size_of(layouts.XFRM_USERSA_INFO)


def offload_fields(offload: HardwareOffload, direction: Direction) -> tuple[int, int]:
    """Return interface index and flags of an SA of this direction. ENODEV: there is no such interface."""
    try:
        index = socket.if_nametoindex(offload.interface)
    except OSError:
        raise NatCompatError(
            errno.ENODEV,
            f"hw_offload: there is no network interface {offload.interface}",
            "Name one of those that `ip link` shows in this network namespace",
        ) from None
    flags = XFRM_OFFLOAD_INBOUND if direction is Direction.IN else 0
    return index, flags | XFRM_OFFLOAD_PACKET * offload.packet


def offload_of(message: Any) -> HardwareOffload | None:
    """Return the card in a message about an SA or a policy; None: there is none, or it has gone."""
    attribute = message.get_attr("XFRMA_OFFLOAD_DEV")
    if not attribute or not attribute["ifindex"]:
        return None
    try:
        name = socket.if_indextoname(attribute["ifindex"])
    except OSError:
        return None
    return HardwareOffload(interface=name, packet=bool(attribute["flags"] & XFRM_OFFLOAD_PACKET))


def has_card(answer: bytes) -> bool:
    """Tell whether the SA in a message that starts with an xfrm_usersa_info is a network card's."""
    return any(kind == XFRMA_OFFLOAD_DEV for kind, _, _ in attributes(answer, _INFO_END))


def not_offloaded(name: str, offload: HardwareOffload) -> NatCompatError:
    """Return the error for what the kernel has installed without the card."""
    return NatCompatError(
        errno.EOPNOTSUPP,
        f"{name}: {offload.interface} does not take it, and the kernel would do the work itself",
        NO_CARD_REMEDY,
    )
