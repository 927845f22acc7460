"""The socket objects of an endpoint: the one that got the option, and what dup and the like made of it."""

from __future__ import annotations

import socket
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

from natcompat.endpoint.socket_class import change_class

if TYPE_CHECKING:
    from natcompat.endpoint.endpoint import NatTEndpoint

_plain: dict[int, Aliases] = {}  # by the identity of a socket object whose class does not tell


class Aliases:
    """The living ones: they keep the endpoint alive, and it does not keep them.

    Those who add and take away hold the endpoint's lock; a finalizer does without.
    """

    def __init__(
        self, endpoint: NatTEndpoint, original: type[socket.socket], last_gone: Callable[[], None]
    ) -> None:
        """`original` is the class without the option; `last_gone` is called when the last is collected."""
        self.endpoint = endpoint
        self._original = original
        self._last_gone = last_gone
        self._ends: dict[int, weakref.finalize[[int], socket.socket]] = {}

    def __bool__(self) -> bool:
        return bool(self._ends)

    def __contains__(self, sock: object) -> bool:
        return any(alias is sock for alias in self.living())

    def living(self) -> list[socket.socket]:
        """Return all that are there."""
        peeked = [end.peek() for end in list(self._ends.values())]
        return [found[0] for found in peeked if found is not None]

    def any(self) -> socket.socket | None:
        """Return one of them; to the kernel they are the same socket."""
        return next(iter(self.living()), None)

    def add(self, sock: socket.socket) -> None:
        """Watch `sock` until it is collected."""
        end = weakref.finalize(sock, self._gone, id(sock))
        end.atexit = False  # the process ends: nothing of ours outlives it
        self._ends[id(sock)] = end

    def dress(self, sock: socket.socket, cls: type[socket.socket]) -> None:
        """Give `sock` the class of an endpoint's, or the original: the kernel does all there is to do."""
        change_class(sock, cls)
        if cls is self._original:
            _plain[id(sock)] = self
        else:
            _plain.pop(id(sock), None)

    def forget(self, sock: socket.socket) -> None:
        """Make `sock` the plain object that it was."""
        end = self._ends.pop(id(sock), None)
        _plain.pop(id(sock), None)
        if end is not None:
            end.detach()
            change_class(sock, self._original)

    def _gone(self, key: int) -> None:
        # a finalizer, in whatever thread: takes no lock, and touches no descriptor of the application's
        self._ends.pop(key, None)
        _plain.pop(key, None)
        if not self._ends:
            self._last_gone()


def plain_endpoint(sock: object) -> NatTEndpoint | None:
    """Return the endpoint that `sock` is though its class does not tell."""
    aliases = _plain.get(id(sock))
    return aliases.endpoint if aliases is not None and sock in aliases else None
