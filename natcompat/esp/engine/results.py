"""Results of the ESP engine: packets, or the reason why there is none."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, Final, NamedTuple, TypeAlias

if TYPE_CHECKING:
    from natcompat.ipsec import SecurityAssociation

Packet: TypeAlias = bytes | memoryview
"""A packet as it is given to the engine. Results are bytes."""


class Reason(enum.Enum):
    """Why a packet went no further; the values are the names of the counters.

    The C data path numbers them in this order (`enum esp_result` in ffi/).
    """

    SHORT = "short"
    """Inbound: too short for its SA."""
    NO_SA = "no_sa"
    """Inbound: there is no SA with this SPI."""
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
    """Both: the selectors of the SA, or the policies, do not let this SA carry the packet (RFC 4301, 5.2)."""
    ECN = "ecn"
    """Inbound: congestion met a packet that cannot be marked (RFC 6040, 4.2)."""
    NO_POLICY = "no_policy"
    """Outbound: no policy covers this packet."""
    DISCARD = "discard"
    """Outbound: a DISCARD policy covers this packet."""
    BYPASS = "bypass"
    """Outbound: the policy leaves the packet in the clear, so the caller sends it."""
    ACQUIRE = "acquire"
    """Outbound: there is no SA yet; listeners of events have been told."""
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
    """Inbound: the queue is full of packets that the application has not taken."""
    FORKED = "forked"
    """Both: this process is a copy of the one that made the engine; two would use one nonce."""
    CLOSED = "closed"
    """Both: the engine is closed."""
    DEVICE = "device"
    """Inbound: authentic, and the packet device did not take it."""
    NO_ENDPOINT = "no_endpoint"
    """Outbound: no endpoint has the local port of the SA, so nothing can carry the packet."""
    PATH_MTU = "path_mtu"
    """Outbound: longer than the path takes; its sender has been told, where that is possible."""
    SEND = "send"
    """Outbound: the system did not send it, as when it had no room or no route."""
    CLEARTEXT = "cleartext"
    """Inbound: a packet in the clear that an IN policy wants protected or discarded."""
    ENDPOINT = "endpoint"
    """Inbound: authentic, and for the port of a socket with the option: IKE does not travel inside ESP."""
    FAULT = "fault"
    """Both: handling this packet failed with an error, which is in the log."""


class Dropped(NamedTuple):
    """A packet that went no further, and why."""

    reason: Reason


DROPPED: Final = {reason: Dropped(reason) for reason in Reason}
"""One object per reason: a flood of bad packets allocates nothing."""


class Opened(NamedTuple):
    """An authentic inner packet, a whole IP packet, and the SA that brought it."""

    inner: bytes
    sa: SecurityAssociation


class Destination(tuple[str, int]):
    """The destination of a packet, as `socket.sendto` takes it, and the fields of its outer IP header.

    The owner of the socket sets the traffic class (IP_TOS, IPV6_TCLASS) and the DF bit for each packet.
    """

    local_port: int
    source: str
    """The address that the packet comes from, as the SA says; empty: any."""
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
