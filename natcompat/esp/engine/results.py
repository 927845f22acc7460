"""What comes out of the ESP engine: packets, or the reason why there is none."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from natcompat.ipsec import SecurityAssociation

Packet: TypeAlias = bytes | memoryview
"""What goes in. What comes out is bytes."""


class Reason(enum.Enum):
    """Why a packet went no further; the values are the names of the counters."""

    SHORT = "short"
    """Inbound: too short for its SA."""
    NO_SA = "no_sa"
    """Inbound: nobody has this SPI."""
    REPLAYED = "replayed"
    """Inbound: the sequence number has been received already, or is none (0)."""
    TOO_OLD = "too_old"
    """Inbound: the sequence number is left of the replay window."""
    INTEGRITY = "integrity"
    """Inbound: the integrity check value is wrong, or cannot be right at this length."""
    PADDING = "padding"
    """Inbound: the padding is not 1, 2, 3... (RFC 4303, 2.4)."""
    NEXT_HEADER = "next_header"
    """Inbound: tunnel mode carries IPv4 and IPv6 only."""
    DUMMY = "dummy"
    """Inbound: a dummy packet (next header 59), made to be dropped (RFC 4303, 2.6)."""
    MALFORMED = "malformed"
    """Both: the inner packet is no IP packet, or its lengths contradict each other."""
    SELECTOR = "selector"
    """Inbound: authentic, but not what the SA is for (RFC 4301, 5.2)."""
    ECN = "ecn"
    """Inbound: congestion met a packet that cannot be marked (RFC 6040, 4.2)."""
    NO_POLICY = "no_policy"
    """Outbound: no policy is for this packet."""
    DISCARD = "discard"
    """Outbound: the policy says so."""
    BYPASS = "bypass"
    """Outbound: the policy leaves it in the clear, so it is the caller's."""
    ACQUIRE = "acquire"
    """Outbound: there is no SA yet; whoever listens to events has been told."""
    SEQUENCE = "sequence"
    """Outbound: the sequence numbers of the SA are used up; it sends no more."""
    UNRESERVED = "unreserved"
    """Outbound: the owner has not permitted this sequence number yet (`EspEngine.permit`)."""
    FRAGMENT = "fragment"
    """Outbound: transport mode takes whole packets only (RFC 4303, 3.3.4)."""
    HEADERS = "headers"
    """Outbound: transport mode, and an extension header that would have to stand in front of ESP."""
    TOO_BIG = "too_big"
    """Outbound: the result would not fit in a UDP datagram."""
    QUEUE = "queue"
    """Inbound: nobody took the packets that came before."""
    FORKED = "forked"
    """Both: this process is a fork of the one that opened the engine; two would use one nonce."""
    CLOSED = "closed"
    """Both: the engine is closed."""
    DEVICE = "device"
    """Inbound: authentic, and the packet device did not take it."""
    NO_ENDPOINT = "no_endpoint"
    """Outbound: no endpoint has the local port of the SA, so nothing can carry the packet."""
    PATH_MTU = "path_mtu"
    """Outbound: longer than the path takes; its sender has been told, if he could be."""
    SEND = "send"
    """Outbound: the system did not send it, as when it had no room or no route."""


class Dropped(NamedTuple):
    """No packet, for this reason."""

    reason: Reason


DROPPED: Final = {reason: Dropped(reason) for reason in Reason}
"""One object per reason: a flood of bad packets allocates nothing."""


class Opened(NamedTuple):
    """An authentic inner packet, whole and by itself an IP packet, and the SA that brought it."""

    inner: bytes
    sa: SecurityAssociation


class Destination(tuple[str, int]):
    """Where a packet goes: an address as `socket.sendto` takes it, and what its IP header shall say.

    Whoever owns the socket sets the traffic class (IP_TOS, IPV6_TCLASS) and the DF bit per packet.
    """

    local_port: int
    source: str
    """The address that it is to come from, as the SA says; empty: any."""
    traffic_class: int
    """DSCP and ECN of the outer header, as one octet."""
    dont_fragment: bool

    def __new__(
        cls,
        host: str,
        port: int,
        *,
        local_port: int,
        source: str = "",
        traffic_class: int = 0,
        dont_fragment: bool = False,
    ) -> Destination:
        """Make one."""
        self = super().__new__(cls, (host, port))
        self.source = source
        self.local_port, self.traffic_class, self.dont_fragment = local_port, traffic_class, dont_fragment
        return self
