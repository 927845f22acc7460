"""The one call: set the option on a socket, or ask for it."""

from __future__ import annotations

import socket
import sys
from typing import Any, Literal, overload

from natcompat import backends
from natcompat.backends.base import Backend, EspConsumer
from natcompat.contract import UDP_NAT_T_ENDPOINT
from natcompat.endpoint.admission import admit, refuse_set_options, unwrap
from natcompat.endpoint.aliases import plain_endpoint
from natcompat.endpoint.endpoint import NatTEndpoint
from natcompat.endpoint.receive import ProcessHalf, half_of


@overload
def set_nat_t_endpoint(
    sock: socket.socket,
    enable: Literal[True] = True,
    *,
    backend: str | Backend | None = None,
    esp: EspConsumer | None = None,
) -> NatTEndpoint: ...
@overload
def set_nat_t_endpoint(
    sock: socket.socket, enable: bool, *, backend: str | Backend | None = None, esp: EspConsumer | None = None
) -> NatTEndpoint | None: ...
def set_nat_t_endpoint(
    sock: socket.socket,
    enable: bool = True,
    *,
    backend: str | Backend | None = None,
    esp: EspConsumer | None = None,
) -> NatTEndpoint | None:
    """Give `sock` the semantics of the Solaris option UDP_NAT_T_ENDPOINT, or take them away.

    From then on what comes without the non-ESP marker never reaches the application: payloads under
    four bytes are dropped, everything else goes to ESP. The marker is stripped from what is received
    and put in front of what is sent. Before or after bind and connect, and as often as you like; a
    datagram that is already queued is treated like a new one. The object stays the same; where the
    process has something to do its class changes to one derived from its class and `NatTSocket`.

    `esp` says where diverted ESP goes: None leaves it to the backend, a callable takes ``(packet:
    memoryview, source address)``, an object with ``inbound`` takes bursts; see
    `natcompat.backends.base.EspInbound`. `backend` overrides NATCOMPAT_BACKEND.

    Returns the endpoint; None when the option was switched off. Switching off what is not on is no
    error. On an error nothing has changed:

    TypeError
        It is no socket, or one that cannot be served: the message names the way.
    NatCompatError
        EBADF: it is closed; ENOPROTOOPT: it is no UDP socket; EAFNOSUPPORT: it is not of the Internet
        families; EOPNOTSUPP: UDP_CORK or UDP_SEGMENT is set, or the
        running loop is the Proactor of Windows and would read the socket itself.
    BackendUnavailableError
        ENOTSUP, EINVAL: the backend that was asked for does not work here or is unknown.

    A thread that waits in a receive while the option goes on gets one datagram as it came. After
    fork both processes may go on; see `NatTEndpoint`.
    """
    sock = unwrap(sock)
    root = admit(sock)
    existing = get_nat_t_endpoint(sock)
    if not enable:
        if existing is not None:
            existing.close()
        return None
    refuse_set_options(root, sock)
    if esp is not None and not callable(esp) and not hasattr(esp, "inbound"):
        raise TypeError(f"esp is to be a callable or an object with inbound(), not {type(esp).__name__}")
    if existing is not None:
        existing._set_again(None if backend is None else backends.select(backend), esp)
        return existing
    _object_to_bypass(sock)
    return NatTEndpoint(sock, root, backends.select(backend, hands_over_esp=esp is not None), esp)


def get_nat_t_endpoint(sock: socket.socket) -> NatTEndpoint | None:
    """Return the endpoint that `sock` is, or None: what getsockopt would say on Solaris.

    Never raises, whatever `sock` is.
    """
    sock = unwrap(sock)
    half = half_of(sock)
    if not isinstance(half, ProcessHalf):  # plain, or somebody else's attribute
        return _of_plain_socket(sock)
    endpoint = half.rearrange.__self__  # type: ignore[attr-defined]
    return endpoint if isinstance(endpoint, NatTEndpoint) and not endpoint.closed else None


def _of_plain_socket(sock: Any) -> NatTEndpoint | None:
    """Return the endpoint that `sock` is by the kernel alone, one that the application made included."""
    existing = plain_endpoint(sock)
    if existing is not None and not existing.closed:
        return existing
    if not backends.is_for_this_system("solaris"):
        return None
    try:
        root = admit(sock)
        if not sock.getsockopt(socket.IPPROTO_UDP, UDP_NAT_T_ENDPOINT):
            return None
        return NatTEndpoint(sock, root, backends.get("solaris"), None)
    except (TypeError, OSError):
        return None


def _object_to_bypass(sock: socket.socket) -> None:
    if "asyncio" in sys.modules:
        from natcompat.endpoint.loops.asyncio import object_to_bypassing_loop

        object_to_bypassing_loop(sock)


def arrive(
    original: type[socket.socket],
    descriptor: Any,
    family: int,
    kind: int,
    protocol: int,
    timeout: float | None,
) -> socket.socket:
    """Make the socket that another process sent by multiprocessing: the process's half goes on here.

    ESP stays with the process that sent it.
    """
    sock = original(family, kind, protocol, fileno=descriptor.detach())
    sock.settimeout(timeout)
    set_nat_t_endpoint(sock, backend="userspace:in-line")
    return sock
