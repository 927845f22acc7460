"""The counters of an endpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Stats:
    """What has passed an endpoint since the option was set, and how it is served.

    Counts of datagrams. What the kernel drops or decapsulates by itself this process cannot tell
    apart; it is in `dropped_in_kernel`, or in the counters of the SA.
    """

    backend: str
    mode: str
    """How the socket is served now; see `NatTEndpoint.mode`."""
    reason: str
    """Why not in a stronger mode; empty for the strongest."""
    ike: int
    """Delivered to the application."""
    esp: int
    """Diverted by this process or to a socket of natcompat's."""
    keepalives: int
    """NAT-keepalives that this process or a socket of natcompat's received and dropped."""
    runts: int
    """Other payloads under four bytes, likewise."""
    markers_inserted: int
    """Sent by the application."""
    keepalives_sent: int
    """By `NatTEndpoint.send_keepalive`."""
    dropped_in_kernel: int | None
    """On the application's socket: by filter and for want of room together, since the kernel does not
    tell them apart. None where the kernel does not say."""
    esp_dropped_in_kernel: int | None
    """On the sockets that ESP is steered to, since more came than was taken; None: nothing is steered."""
    bypassed: bool | None
    """Whether the kernel's IPsec policies leave the socket alone. If not (it takes CAP_NET_ADMIN), a
    policy that blocks UDP blocks IKE and ESP-in-UDP. None where the kernel's IPsec is not used."""
    handed_back: int
    """IKE that had come to a socket of natcompat's and was given back to the application's."""
    datapath: str | None
    """What carries ESP in this process, as NATCOMPAT_DATAPATH calls it, and whose ciphers it has: "python",
    "c (ipsec-mb)", "c (libcrypto)"; None where natcompat does not."""
    errors: int
    """Exceptions of the consumer of ESP, IKE that could not be handed back; logged to ``natcompat``."""
    system_wide: Mapping[str, int] = field(default_factory=dict)
    """What the kernel counts of ESP-in-UDP for all sockets, since it started and under its own names
    (kstats of Solaris: ``ip:0:ipdrop:esp_nat_t_ka``). Empty where it does not say."""
