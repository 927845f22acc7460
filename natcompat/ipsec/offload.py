"""IPsec offload of an SA to a network card."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareOffload:
    """A network card does the work of an SA (Linux: Documentation/networking/xfrm_device.rst).

    It is in force or refused: where a kernel would fall back to its own ciphers in silence, the SA is taken
    away again and the error says so (EOPNOTSUPP). Unproven: no card that does it was at hand; the tests see
    the messages, and the refusal by devices that cannot.
    """

    interface: str
    """The name of the network interface that the packets of the SA pass."""
    packet: bool = False
    """The card puts on and takes off ESP, too (Linux 6.2); False: it encrypts and decrypts only. The policies
    of such an SA need the same `HardwareOffload`."""

    def __post_init__(self) -> None:
        if not isinstance(self.interface, str):
            raise TypeError(f"interface: a name is wanted, not {type(self.interface).__name__}")
        if not 0 < len(self.interface.encode()) < 16 or "/" in self.interface or "\0" in self.interface:
            raise ValueError(f"interface: {self.interface!r} is no name of a network interface")
