"""The counters of an endpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Stats:
    """The counters of an endpoint since the option was set, in datagrams, and how it is served.

    The process does not see datagrams that the kernel drops or decapsulates; the kernel counts them in
    `dropped_in_kernel` or in the counters of the SA.
    """

    backend: str
    mode: str
    """How the socket is served now; see `NatTEndpoint.mode`."""
    reason: str
    """Why the mode is not a stronger one; empty for the strongest."""
    ike: int
    """Delivered to the application."""
    esp: int
    """Diverted by this process, or to natcompat's own socket on the port."""
    keepalives: int
    """NAT-keepalives that this process or natcompat's own socket received and dropped."""
    runts: int
    """Other payloads under four bytes, likewise."""
    markers_inserted: int
    """Messages that the application sent."""
    keepalives_sent: int
    """NAT-keepalives that `NatTEndpoint.send_keepalive` sent."""
    dropped_in_kernel: int | None
    """Dropped on the application's socket, by the filter or by a full queue: the kernel has one counter for
    both. None where the kernel has none."""
    esp_dropped_in_kernel: int | None
    """Dropped by the full queues of natcompat's sockets for ESP; None where ESP is not steered."""
    bypassed: bool | None
    """Whether the socket bypasses the kernel's IPsec policies, which takes CAP_NET_ADMIN. If not, a policy
    that blocks UDP blocks IKE and ESP-in-UDP. None where the kernel's IPsec is not used."""
    handed_back: int
    """IKE that came to natcompat's own socket and was handed back to the application's."""
    datapath: str | None
    """The data path of ESP in this process and its cipher library: "python", "c (ipsec-mb)",
    "c (libcrypto)"; None without ESP in this process. See NATCOMPAT_DATAPATH."""
    errors: int
    """Exceptions of the ESP consumer and IKE that could not be handed back; logged to ``natcompat``."""
    system_wide: Mapping[str, int] = field(default_factory=dict)
    """The kernel's counters of ESP-in-UDP for all sockets since it started, by its own names (kstats of
    Solaris: ``ip:0:ipdrop:esp_nat_t_ka``). Empty where the kernel has none."""
