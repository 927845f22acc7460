"""IPsec in the words of RFC 4301: associations, policies, events, and the protocol `IPsec`. No I/O."""

from natcompat.ipsec.associations import (
    LARGEST_REPLAY_WINDOW,
    LARGEST_SPI,
    SMALLEST_SPI,
    Lifetime,
    SaId,
    SecurityAssociation,
    UDPEncapsulation,
)
from natcompat.ipsec.offload import HardwareOffload
from natcompat.ipsec.policies import Policy
from natcompat.ipsec.protocol import (
    Acquire,
    Event,
    Events,
    EventsLost,
    Expire,
    Features,
    InstalledSA,
    IntegrityFailure,
    IPsec,
    MappingChange,
    PeerSilent,
    PolicyUsage,
    ProtectionRestored,
    Transforms,
    Usage,
)
from natcompat.ipsec.selectors import AddressRange, PortRange, TrafficSelector
from natcompat.ipsec.transforms import (
    Encr,
    Integ,
    Key,
)
from natcompat.ipsec.values import Action, Direction, IPAddress, IPNetwork, Mark, Mode

__all__ = [
    "LARGEST_REPLAY_WINDOW",
    "LARGEST_SPI",
    "SMALLEST_SPI",
    "Acquire",
    "Action",
    "AddressRange",
    "Direction",
    "Encr",
    "Event",
    "Events",
    "EventsLost",
    "Expire",
    "Features",
    "HardwareOffload",
    "IPAddress",
    "IPNetwork",
    "IPsec",
    "InstalledSA",
    "Integ",
    "IntegrityFailure",
    "Key",
    "Lifetime",
    "MappingChange",
    "Mark",
    "Mode",
    "PeerSilent",
    "Policy",
    "PolicyUsage",
    "PortRange",
    "ProtectionRestored",
    "SaId",
    "SecurityAssociation",
    "TrafficSelector",
    "Transforms",
    "UDPEncapsulation",
    "Usage",
]
