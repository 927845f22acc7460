"""The result of a probe for ESP in the kernel."""

from __future__ import annotations

import enum
from dataclasses import dataclass


class EspSupport(enum.Enum):
    """The kinds of support for ESP that a probe distinguishes."""

    AVAILABLE = "available"
    """An SA can be installed; from the unprivileged probe: the kernel takes ESP packets."""
    NO_ESP = "no ESP"
    """There is XFRM but no ESP for this address family: ESP packets would be lost."""
    NO_ALGORITHM = "no algorithm"
    """ESP is there, the algorithm is not (or cannot be set up)."""
    NO_PRIVILEGE = "no privilege"
    """This process lacks CAP_NET_ADMIN; whether there is ESP was not said."""
    NO_XFRM = "no XFRM"
    """No XFRM netlink: not Linux, built without it, or kept away by a sandbox."""
    UNKNOWN = "unknown"
    """The kernel answered something else; `EspProbe.reason` quotes it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EspProbe:
    """The result of one probe. True in a boolean context exactly when ESP is available."""

    support: EspSupport
    errno: int = 0
    """The errno of the answer; 0 when there was none."""
    kernel_text: str = ""
    """The kernel's own words (extended ACK) or the text of `errno`."""
    reason: str = ""
    """One sentence: what was found."""
    remedy: str = ""
    """One sentence: what to do about it; empty when there is nothing to do."""

    def __bool__(self) -> bool:
        return self.support is EspSupport.AVAILABLE


@dataclass(frozen=True, slots=True, kw_only=True)
class XfrmAttributes:
    """The newer attributes of SAs that the kernel knows; None: it did not tell."""

    sa_direction: bool | None = None
    """SAs have a direction (Linux 6.10)."""
    keepalive: bool | None = None
    """The kernel sends NAT-keepalives (Linux 6.11)."""
    output_mark: bool | None = None
    """SAs set bits of packet marks, under a mask (Linux 4.19)."""
    hw_offload: bool | None = None
    """SAs can be given to a network card; whether there is one that takes them, only a try tells."""
    cpu: bool | None = None
    """SAs can belong to a processor (Linux 6.13)."""
    errno: int = 0
    """Why it did not say."""
