"""ESP without I/O (RFC 4303): `EspEngine` and the results that it returns."""

from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.results import Destination, Dropped, Opened, Packet, Reason

__all__ = ["Destination", "Dropped", "EspEngine", "Opened", "Packet", "Reason"]
