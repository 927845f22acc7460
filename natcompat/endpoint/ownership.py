"""Ownership of an endpoint among the processes that its maker forked."""

from __future__ import annotations

import errno
import os

from natcompat.errors import NatCompatError


class Ownership:
    """The process that changes the kernel's socket of an endpoint, and the one that runs its ESP.

    Both are the process that made the endpoint. A forked child owns the socket once the maker has ended, and
    runs ESP once the option is set there again, IPsec is opened there, or it has succeeded the maker.
    """

    def __init__(self) -> None:
        self.maker: int = os.getpid()
        self._server = self.maker

    def is_ours(self) -> bool:
        """Tell whether this process may change the kernel's socket; the heir of the maker may."""
        if self.maker != os.getpid() and not _lives(self.maker):
            self.take()
        return self.maker == os.getpid()

    def take(self) -> None:
        """Let this process change the kernel's socket from now on."""
        self.maker = os.getpid()

    def runs_esp(self) -> bool:
        """Tell whether the endpoint's ESP runs in this process."""
        return self._server == os.getpid()

    def run_esp(self) -> None:
        """Let ESP run in this process from now on."""
        self._server = os.getpid()

    def lost_esp(self) -> NatCompatError:
        """Return the error for an endpoint whose ESP has ended with the process that ran it."""
        return NatCompatError(
            errno.EINVAL,
            f"the ESP of this endpoint ran in process {self._server}, from which this one was forked, and "
            "has ended with it: no SA goes on after fork, since two processes must not use one nonce",
            "Daemonize before open_ipsec(), or call open_ipsec() again in this process and install new SAs",
        )


def works_here(consumer: object) -> bool:
    """Tell whether a consumer of ESP works in this process; see `natcompat.backends.consumer.EspInbound`."""
    return bool(getattr(consumer, "process", os.getpid()) == os.getpid())


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it is another user's
        pass
    return True
