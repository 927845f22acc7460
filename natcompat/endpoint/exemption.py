"""Exempts an endpoint's socket from the policies of this process's IPsec, which must not take IKE."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, TypeAlias

from natcompat.backends.system_calls import SystemCalls

if TYPE_CHECKING:
    from natcompat.endpoint.state import EndpointState

_End: TypeAlias = Callable[[socket.socket], object]


class Exemption:
    """The exemptions of one socket; see ``exempt`` of `natcompat.backends.consumer.EspInbound`.

    They last while the option is on, also while the socket is unbound or is being attached anew, so that a
    policy routes none of its sends.
    """

    def __init__(self, state: EndpointState) -> None:
        self._state = state
        self._ends: dict[_End, None] = {}

    def renew(self, sock: socket.socket, consumers: Iterable[object], *, owned: bool) -> None:
        """Exempt `sock` from the policies of `consumers`, and end the exemptions from those of others.

        `owned` is as for `end`. Raises what the consumer raises where it cannot exempt the socket.
        """
        lasting: dict[_End, None] = {}
        for consumer in consumers:
            exempt = getattr(consumer, "exempt", None)
            end = exempt(SystemCalls(sock, self._state.root)) if exempt is not None else None
            if end is not None:
                lasting[end] = self._ends[end] = None
        for end in self._ends.keys() - lasting.keys():
            self._end(end, sock, owned)

    def end(self, sock: socket.socket, *, owned: bool) -> None:
        """End all exemptions. If not `owned`, a parent process goes on with the kernel's socket."""
        for end in list(self._ends):
            self._end(end, sock, owned)

    def _end(self, end: _End, sock: socket.socket, owned: bool) -> None:
        del self._ends[end]
        if owned:
            with contextlib.suppress(OSError):  # the socket is closed, or the privilege is gone
                end(SystemCalls(sock, self._state.root))
