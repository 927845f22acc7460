"""The one call: `set_nat_t_endpoint` sets the option on a socket, `get_nat_t_endpoint` asks for it."""

from __future__ import annotations

import socket
from typing import Literal, overload

from natcompat import backends
from natcompat.backends.base import Backend, EspConsumer
from natcompat.contract import UDP_NAT_T_ENDPOINT
from natcompat.endpoint.admission import admit, refuse_set_options, unwrap
from natcompat.endpoint.aliases import endpoint_state_of
from natcompat.endpoint.bypassing_loops import object_to_bypassing_loop
from natcompat.endpoint.endpoint import NatTEndpoint


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
    """Set or clear the Solaris option UDP_NAT_T_ENDPOINT on `sock`.

    With the option the application receives nothing but IKE: a datagram that begins with the non-ESP marker
    is delivered without it, payloads under four bytes are dropped, everything else goes to ESP. Every send
    gets the marker in front. The option can be set before or after bind and connect, and any number of
    times; it covers datagrams that are queued already. The socket object stays the same; where the process
    has a duty, its class becomes one derived from its class and `NatTSocket`.

    `esp` receives diverted ESP: a callable takes ``(packet: memoryview, source address)``, an object with
    ``inbound`` takes bursts (`natcompat.backends.base.EspInbound`); None leaves ESP to the backend.
    `backend` overrides NATCOMPAT_BACKEND.

    Returns the endpoint; None when the option was cleared, which is no error where it was not set. An
    error changes nothing:

    TypeError
        `sock` is no socket, or one of a kind that cannot be served; the message says what to use.
    NatCompatError
        EBADF: `sock` is closed; ENOPROTOOPT: it is no UDP socket; EAFNOSUPPORT: it is not of the Internet
        families; EOPNOTSUPP: UDP_CORK or UDP_SEGMENT is set, or the running loop is the Proactor of
        Windows, which would read the socket itself.
    BackendUnavailableError
        ENOTSUP: the requested backend does not work here; EINVAL: it is unknown.

    A thread already blocked in a receive when the option is set receives one datagram unfiltered. After
    fork both processes may go on; see `NatTEndpoint`.
    """
    sock = unwrap(sock)
    root = admit(sock)
    endpoint = get_nat_t_endpoint(sock)
    if not enable:
        if endpoint is not None:
            endpoint.close()
        return None
    refuse_set_options(root, sock)
    if esp is not None and not callable(esp) and not hasattr(esp, "inbound"):
        raise TypeError(f"esp must be a callable or an object with inbound(), not {type(esp).__name__}")
    if endpoint is not None:
        endpoint.set_again(None if backend is None else backends.select(backend), esp)
        return endpoint
    object_to_bypassing_loop(sock, has_option=False)
    return NatTEndpoint(sock, root, backends.select(backend, hands_over_esp=esp is not None), esp)


def get_nat_t_endpoint(sock: socket.socket) -> NatTEndpoint | None:
    """Return the endpoint that `sock` is, or None: what getsockopt returns on Solaris.

    Never raises, even for an object that is no socket.
    """
    sock = unwrap(sock)
    state = endpoint_state_of(sock)
    if state is not None and isinstance(state.endpoint, NatTEndpoint) and not state.endpoint.closed:
        return state.endpoint
    if not backends.is_for_this_system("solaris"):
        return None
    try:  # the application may have set the kernel's option by itself
        root = admit(sock)
        if not sock.getsockopt(socket.IPPROTO_UDP, UDP_NAT_T_ENDPOINT):
            return None
        return NatTEndpoint(sock, root, backends.get("solaris"), None)
    except (TypeError, OSError):
        return None
