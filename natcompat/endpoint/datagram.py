"""`Datagram`: an IKE message with its source and the local address to which it came."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from natcompat.ipsec import IPAddress


class Datagram(NamedTuple):
    """One received IKE message: the return value of `NatTEndpoint.receive`."""

    payload: bytes
    """The message, without the non-ESP marker."""
    source: Any
    """Socket address of the sender, as `socket.socket.recvfrom` returns it; of a connected socket it may be
    None."""
    local_address: IPAddress | None
    """The address of this host to which the message came; None where the system does not tell it.

    On a dual-stack socket that of an IPv4 message is an `ipaddress.IPv4Address`. A link-local address has the
    index of its interface as zone (``fe80::1%2``).
    """
