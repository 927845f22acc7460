"""The state that the methods of one endpoint's sockets share, and how to find it from a socket."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, Final

from natcompat.backends.diversion import Counters, Diversion
from natcompat.backends.hand_back import Enveloped
from natcompat.backends.system_calls import root_class

LARGEST_DATAGRAM: Final = 65535
"""Size in bytes that holds every UDP payload."""


class EndpointState:
    """The state that the sockets of one endpoint share. Threads read it without a lock.

    The callables are the endpoint's. They stand here, and not the endpoint's class, so that the modules
    that receive and send import nothing above them.
    """

    __slots__ = (
        "add_alias",
        "arrive",
        "counters",
        "diversion",
        "draining",
        "enabled",
        "endpoint",
        "envelope_prefix",
        "hidden",
        "in_child",
        "message_open",
        "note_sent",
        "open_envelope",
        "original",
        "reattach_around",
        "receive_size",
        "remove_alias",
        "root",
        "sensitive",
        "set_option",
        "unbound",
        "unprepared",
        "warned_of_loop",
    )

    def __init__(
        self, original: type[socket.socket], root: type[socket.socket], diversion: Diversion
    ) -> None:
        self.original: type[socket.socket] = original
        """The class of the socket without the option."""
        self.root: type[socket.socket] = root
        """The library's socket class from which `original` derives; its methods are the system calls."""
        self.diversion: Diversion = diversion
        self.counters: Counters = diversion.counters
        self.envelope_prefix: bytes = diversion.hand_back.prefix
        self.open_envelope: Callable[..., Enveloped | None] = diversion.hand_back.open
        self.receive_size: int = LARGEST_DATAGRAM
        """Least size in bytes of a receive, so that ESP is not truncated; 0 once the kernel delivers IKE
        alone."""
        self.draining: bool = False
        """Whether `receive_size` becomes 0 as soon as the queue holds no datagram from before, and `in_child`
        is None."""
        self.enabled: bool = True
        """False once the option is off: a receive that began before delivers its datagram unchanged."""
        self.unbound: bool = False
        """Whether the implicit bind of a first send has to attach the socket anew."""
        self.in_child: Callable[[], None] | None = None
        """Called before every receive and send in a forked child, until it is clear who runs ESP."""
        self.unprepared: bool = False
        """Whether a send has something to do first: because of `unbound` or `in_child`."""
        self.message_open: bool = False
        """Whether MSG_MORE has begun a datagram, which already has its marker."""
        self.warned_of_loop: bool = False
        """Whether the application was warned of an event loop that bypasses the socket object."""
        self.sensitive: frozenset[str | tuple[int, int]] = frozenset()
        """See `natcompat.backends.base.Attachment.sensitive`."""
        self.hidden: dict[tuple[int, int], int] = {}
        """See `natcompat.backends.base.Attachment.hidden`."""
        self.note_sent: Callable[[Any], None] | None = None
        """Called with the destination of every send, while there is an observer."""
        # set by the endpoint
        self.endpoint: object
        """The endpoint itself, for `natcompat.get_nat_t_endpoint`."""
        self.reattach_around: Callable[[Any, Callable[[], Any]], Any]
        """Calls a function while the socket is detached, attaches it again, returns the result."""
        self.set_option: Callable[[bool], None]
        """Sets or clears UDP_NAT_T_ENDPOINT."""
        self.add_alias: Callable[[Any], None]
        """Adds a socket object that the application made of another one (``dup``)."""
        self.remove_alias: Callable[[Any], None]
        """Removes a socket object that the application closes or detaches from its descriptor."""
        self.arrive: Callable[..., socket.socket]
        """Makes the socket again in another process (multiprocessing); a function that can be pickled."""


def state_of(sock: Any) -> EndpointState | None:
    """Return the state that the class of `sock` holds, None if it is a plain socket (again)."""
    return getattr(type(sock), "_nat_t", None)


def root_of(sock: Any) -> type[socket.socket]:
    """Return the library's class from which that of `sock` derives, with the option or without.

    A method that finds the option switched off meanwhile calls the method of this class: ``super()`` of
    an application's override, which may be running, would have come to it without natcompat.
    """
    root = root_class(type(sock))
    assert root is not None, "a socket is what set_nat_t_endpoint takes"  # noqa: S101
    return root
