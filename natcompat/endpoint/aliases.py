"""The socket objects of one endpoint: the one that got the option, and its duplicates (``dup``)."""

from __future__ import annotations

import socket
import weakref
from collections.abc import Callable

from natcompat.endpoint.socket_class import change_class
from natcompat.endpoint.state import EndpointState, state_of

_plain: dict[int, Aliases] = {}  # by id() of a socket that is an endpoint though its class is the original


class Aliases:
    """The living socket objects of an endpoint. They keep the endpoint alive; it does not keep them.

    Callers that add or remove hold the endpoint's lock; finalizers do not.
    """

    def __init__(self, state: EndpointState, last_gone: Callable[[], None]) -> None:
        """`last_gone` is called when the last object is collected, by a finalizer in any thread."""
        self.state = state
        self._last_gone = last_gone
        self._finalizers: dict[int, weakref.finalize[[int], socket.socket]] = {}

    def __bool__(self) -> bool:
        return bool(self._finalizers)

    def __contains__(self, sock: object) -> bool:
        return any(alias is sock for alias in self.living())

    def living(self) -> list[socket.socket]:
        """Return all objects that exist."""
        peeked = [finalizer.peek() for finalizer in list(self._finalizers.values())]
        return [entry[0] for entry in peeked if entry is not None]

    def any(self) -> socket.socket | None:
        """Return one of the objects, which to the kernel are the same socket; None: none exists."""
        return next(iter(self.living()), None)

    def add(self, sock: socket.socket) -> None:
        """Add `sock` until it is collected."""
        finalizer = weakref.finalize(sock, self._collected, id(sock))
        finalizer.atexit = False  # at the end of the process everything goes anyway
        self._finalizers[id(sock)] = finalizer

    def dress(self, sock: socket.socket, cls: type[socket.socket]) -> None:
        """Make `cls` the class of `sock`: the endpoint's, or the original where the kernel has all duties."""
        change_class(sock, cls)
        if cls is self.state.original:
            _plain[id(sock)] = self
        else:
            _plain.pop(id(sock), None)

    def forget(self, sock: socket.socket) -> None:
        """Remove `sock` and make it a plain socket again."""
        finalizer = self._finalizers.pop(id(sock), None)
        _plain.pop(id(sock), None)
        if finalizer is not None:
            finalizer.detach()
            change_class(sock, self.state.original)

    def _collected(self, key: int) -> None:
        # a finalizer, in any thread: takes no lock and touches no descriptor of the application's
        self._finalizers.pop(key, None)
        _plain.pop(key, None)
        if not self._finalizers:
            self._last_gone()


def endpoint_state_of(sock: object) -> EndpointState | None:
    """Return the state of the endpoint that `sock` is, whether its class tells or not; else None."""
    state = state_of(sock)
    if isinstance(state, EndpointState):  # else an attribute of another library's
        return state
    aliases = _plain.get(id(sock))
    return aliases.state if aliases is not None and sock in aliases else None
