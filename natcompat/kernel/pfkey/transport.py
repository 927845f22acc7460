"""A PF_KEY socket: requests, dumps, and the kernel's errors with what helps.

A kernel sends its answers to every PF_KEY socket, or some of them to the asker only. An answer is
what has the request's type, sequence number and process. Requests begin with an empty queue, so that
what others do in between is not in the way.
"""

from __future__ import annotations

import errno
import os
import random
import select
import socket
import threading
import time
from collections.abc import Callable, Mapping

from natcompat.errors import NatCompatError
from natcompat.kernel import requests as asking
from natcompat.kernel.pfkey import numbers as n
from natcompat.kernel.pfkey.dialects import Dialect
from natcompat.kernel.pfkey.messages import MalformedMessageError, Message, Wire, decode
from natcompat.kernel.requests import NOTHING_BETTER, SO_RCVBUFFORCE, Owner

ANSWER_TIMEOUT = 30.0
"""Seconds. A kernel answers at once, but Linux may load modules for a new algorithm before."""
LARGEST_MESSAGE = 8 * 0xFFFF
QUEUE = 1 << 20
"""Bytes of queue for answers, which share it with what others do."""
DRAIN_LIMIT = 100_000
"""Messages that are passed over at most before a request."""
_DUMPS = (n.SADB_DUMP, n.SADB_X_SPDDUMP)

REMEDIES: Mapping[int, str] = {
    errno.EEXIST: "Delete the other one first, or choose another SPI",
    errno.EPROTONOSUPPORT: "Load ESP into the kernel, or use the userspace backend",
}
"""What helps against each errno, where the caller knows nothing better."""


def failure(
    what: str, code: int, remedies: Mapping[int, str] = NOTHING_BETTER, diagnostic: int = 0
) -> NatCompatError:
    """Return the error for `what`, with errno `code` and the number that Solaris gives beside it."""
    text = os.strerror(code)
    if diagnostic:
        text += f" (diagnostic {diagnostic} of net/pfkeyv2.h)"
    return asking.failure(what, code, text, remedies, REMEDIES)


class PfKeySocket:
    """One PF_KEY socket. Methods may be called from any thread; they take turns.

    A forked child must not use its parent's (they would read each other's answers): EINVAL.
    """

    def __init__(
        self,
        dialect: Dialect,
        *,
        family: int | None = None,
        protocol: int = n.PF_KEY_V2,
        receive_buffer: int = QUEUE,
    ) -> None:
        """Open a socket. EPERM: no privilege. EAFNOSUPPORT: this kernel has no PF_KEY.

        `family` and `protocol`, the version, are those of PF_KEY, unless it is Solaris's PF_POLICY.
        """
        self._protocol = protocol
        self._patience = 0.0 if dialect.answers_at_once else ANSWER_TIMEOUT
        self._lock = threading.RLock()
        self._sequence = random.getrandbits(28)
        self._owner = Owner()
        self.buffer: Wire = Wire(LARGEST_MESSAGE)
        """For whoever reads the socket; what was in it is wiped afterwards."""
        self.socket: socket.socket = open_socket(
            dialect, dialect.family if family is None else family, protocol, receive_buffer
        )
        self.socket.setblocking(False)

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

    def request(
        self,
        what: str,
        message: Message,
        *,
        sequence: int = 0,
        remedies: Mapping[int, str] = NOTHING_BETTER,
    ) -> Message:
        """Send `message` and return the kernel's answer; raise its errno.

        `sequence` is that of an acquire or of an allocation, which the kernel wants to hear again;
        otherwise it is chosen here. `what` begins the text of the error; `remedies` by errno take the
        place of the usual ones.
        """
        with self._lock:
            self._send(what, message, sequence, remedies)
            answer = self._receive(what, message)
        if answer.errno:
            raise failure(what, answer.errno, remedies, answer.diagnostic)
        return answer

    def dump(
        self,
        what: str,
        message: Message,
        *,
        is_last: Callable[[Message], bool] = lambda message: message.sequence == 0,
        fence: Message | None = None,
    ) -> list[Message]:
        """Send `message` and return all that the kernel has.

        `is_last` knows the last message. With `fence`, a request that fails, its answer is the end: the
        dump of OpenBSD has none of its own.
        """
        found: list[Message] = []
        with self._lock:
            self._send(what, message)
            if fence is not None:
                self._send(what, fence, drain=False)
            while True:
                answer = self._receive(what, message, fence)
                if fence is not None and answer.type == fence.type:
                    return found
                if answer.errno in (errno.ENOENT, errno.ESRCH):
                    return found
                if answer.errno:
                    raise failure(what, answer.errno, diagnostic=answer.diagnostic)
                found.append(answer)
                if fence is None and is_last(answer):
                    return found

    def _send(
        self,
        what: str,
        message: Message,
        sequence: int = 0,
        remedies: Mapping[int, str] = NOTHING_BETTER,
        *,
        drain: bool = True,
    ) -> None:
        self._owner.check(what)
        if drain:
            self._drain(what)
        # Kernels count the sequence numbers of acquires from 1 (Linux) or from 2**31 (Solaris) on.
        self._sequence = (self._sequence + 1) & 0x0FFF_FFFF
        message.sequence = sequence or 0x4000_0000 | self._sequence
        message.process = os.getpid()
        wire = message.encode(self._protocol)
        try:
            self._patiently(select.POLLOUT, ANSWER_TIMEOUT, lambda: self.socket.send(wire))
        except OSError as error:
            # what is too odd for an answer is refused at once
            raise failure(what, error.errno or errno.EIO, remedies) from None
        finally:
            wire.wipe()

    def _patiently(self, event: int, patience: float, call: Callable[[], int]) -> int:
        """Return what `call` returns once it does not have to wait any more; ETIMEDOUT."""
        deadline = time.monotonic() + patience
        while True:
            try:
                return call()
            except BlockingIOError:
                rest = deadline - time.monotonic()
                if rest <= 0:
                    raise TimeoutError(errno.ETIMEDOUT, os.strerror(errno.ETIMEDOUT)) from None
                poll = select.poll()
                poll.register(self.socket, event)
                poll.poll(rest * 1000)

    def _drain(self, what: str) -> None:
        """Forget what is in the queue."""
        for _ in range(DRAIN_LIMIT):
            try:
                size = self.socket.recv_into(self.buffer)
            except BlockingIOError:
                return
            except OSError as error:
                raise failure(what, error.errno or errno.EIO) from None
            self.buffer[:size] = bytes(size)

    def _receive(self, what: str, message: Message, fence: Message | None = None) -> Message:
        """Return the next message that answers `message` or `fence`."""
        while True:
            try:
                size = self._patiently(
                    select.POLLIN, self._patience, lambda: self.socket.recv_into(self.buffer)
                )
            except TimeoutError:
                raise NatCompatError(
                    errno.ENOBUFS if not self._patience else errno.ETIMEDOUT,
                    f"{what}: the kernel's answer got lost among what others do",
                    "Look whether it was done, and try again if not",
                ) from None
            except OSError as error:
                raise failure(what, error.errno or errno.EIO) from None
            try:
                answer = decode(memoryview(self.buffer)[:size], self._protocol)
            except MalformedMessageError:
                continue
            finally:
                self.buffer[:size] = bytes(size)
            if answer.process != message.process:
                continue
            for asked in (message, fence):
                if asked is None or answer.type != asked.type:
                    continue
                # those of a dump are numbered, down to 0 or up to it
                if answer.sequence == asked.sequence or asked.type in _DUMPS:
                    return answer


def open_socket(dialect: Dialect, family: int, protocol: int, receive_buffer: int) -> socket.socket:
    """Open a socket with a queue of `receive_buffer` bytes, beyond the system's limit where privileged."""
    try:
        opened = socket.socket(family, socket.SOCK_RAW, protocol)
    except OSError as error:
        raise refused_socket(dialect, error) from None
    try:
        try:
            if dialect.name != "linux":
                raise PermissionError
            opened.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, receive_buffer)
        except PermissionError:
            _ask_for_queue(opened, receive_buffer)
    except BaseException:
        opened.close()
        raise
    return opened


def _ask_for_queue(opened: socket.socket, size: int) -> None:
    """Get as long a queue as the system gives; Linux gives what it has, others refuse what is too much."""
    while size >= 1 << 16:
        try:
            opened.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)
        except OSError as error:
            if error.errno != errno.ENOBUFS:
                raise
            size //= 2
        else:
            return


def refused_socket(dialect: Dialect, error: OSError) -> NatCompatError:
    """Return the error for a PF_KEY socket that cannot be opened."""
    code = error.errno or errno.EAFNOSUPPORT
    if code in (errno.EPERM, errno.EACCES):
        return NatCompatError(code, "This process may not open PF_KEY", dialect.privilege)
    remedy = "Run a kernel with IPsec, or use the userspace backend"
    if dialect.name == "linux":
        remedy = "Load the module af_key (modprobe af_key), or use XFRM (NATCOMPAT_IPSEC=xfrm)"
    return NatCompatError(code, f"This kernel has no PF_KEY ({error.strerror})", remedy)
