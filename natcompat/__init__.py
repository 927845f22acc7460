"""The Solaris socket option UDP_NAT_T_ENDPOINT on every operating system.

`set_nat_t_endpoint(sock)` gives a UDP socket these semantics (RFC 3948; udp(4P) of Solaris).

Inbound, by UDP payload:

- fewer than four bytes (NAT-keepalives, empty datagrams): dropped and counted; the application is not
  woken;
- four zero bytes (the non-ESP marker), alone or with more behind them: delivered without the marker; a
  bare marker becomes a datagram of length zero;
- every other payload: to ESP, never to the application.

Outbound, every send gets the marker in front. The largest message has 65503 bytes over IPv4 and
65523 over IPv6. ESP sends its packets and keepalives itself.

The option can be set, read and cleared at any time. The package imports its modules when their names
are first used.
"""

TYPE_CHECKING = False
if TYPE_CHECKING:
    from natcompat.backends import open_ipsec, probe
    from natcompat.backends.base import Viability
    from natcompat.contract import (
        NAT_KEEPALIVE,
        NAT_T_PORT,
        NON_ESP_MARKER,
        UDP_NAT_T_ENDPOINT,
        Duty,
        Performer,
        Verdict,
        classify,
    )
    from natcompat.endpoint import get_nat_t_endpoint, set_nat_t_endpoint
    from natcompat.endpoint.datagram import Datagram
    from natcompat.endpoint.endpoint import NatTEndpoint
    from natcompat.endpoint.keepalive import Keepalive
    from natcompat.endpoint.socket_class import NatTSocket
    from natcompat.endpoint.solaris_option import install, uninstall
    from natcompat.endpoint.stats import Stats
    from natcompat.errors import BackendUnavailableError, NatCompatError
    from natcompat.ipsec import SecurityAssociation

__version__ = "0.1.0"

_MODULES = {
    "natcompat.backends": ("open_ipsec", "probe"),
    "natcompat.backends.base": ("Viability",),
    "natcompat.contract": (
        "NAT_KEEPALIVE",
        "NAT_T_PORT",
        "NON_ESP_MARKER",
        "UDP_NAT_T_ENDPOINT",
        "Duty",
        "Performer",
        "Verdict",
        "classify",
    ),
    "natcompat.endpoint.datagram": ("Datagram",),
    "natcompat.endpoint.endpoint": ("NatTEndpoint",),
    "natcompat.errors": ("BackendUnavailableError", "NatCompatError"),
    "natcompat.ipsec": ("SecurityAssociation",),
    "natcompat.endpoint.keepalive": ("Keepalive",),
    "natcompat.endpoint.solaris_option": ("install", "uninstall"),
    "natcompat.endpoint": ("get_nat_t_endpoint", "set_nat_t_endpoint"),
    "natcompat.endpoint.socket_class": ("NatTSocket",),
    "natcompat.endpoint.stats": ("Stats",),
}

__all__ = [
    "NAT_KEEPALIVE",
    "NAT_T_PORT",
    "NON_ESP_MARKER",
    "UDP_NAT_T_ENDPOINT",
    "BackendUnavailableError",
    "Datagram",
    "Duty",
    "Keepalive",
    "NatCompatError",
    "NatTEndpoint",
    "NatTSocket",
    "Performer",
    "SecurityAssociation",
    "Stats",
    "Verdict",
    "Viability",
    "classify",
    "get_nat_t_endpoint",
    "install",
    "open_ipsec",
    "probe",
    "set_nat_t_endpoint",
    "uninstall",
]


def __getattr__(name: str) -> object:
    for module, names in _MODULES.items():
        if name in names:
            import importlib

            value: object = getattr(importlib.import_module(module), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
