"""A plain netlink socket for XFRM: requests, dumps, and the kernel's own words in every error.

Not pyroute2's sockets: those do not work inside a running event loop, and a request through them
takes about a hundred times as long.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import threading
from collections.abc import Iterator, Mapping
from ipaddress import IPv4Address, IPv6Address

from natcompat.errors import NatCompatError
from natcompat.kernel import requests as asking
from natcompat.kernel.requests import NOTHING_BETTER, SO_RCVBUFFORCE, Owner
from natcompat.kernel.xfrm.probe import (
    NETLINK_CAP_ACK,
    NETLINK_EXT_ACK,
    NETLINK_XFRM,
    NLA_TYPE_MASK,
    NLM_F_ACK,
    NLM_F_ACK_TLVS,
    NLM_F_CAPPED,
    NLM_F_REQUEST,
    NLMSG_ERROR,
    NLMSGERR_ATTR_MSG,
    SOL_NETLINK,
)

NLMSG_DONE = 3  # linux/netlink.h
NLMSG_OVERRUN = 4
NLMSG_MIN_TYPE = 16
NLM_F_DUMP_INTR = 0x10
NETLINK_ADD_MEMBERSHIP = 1
NETLINK_DROP_MEMBERSHIP = 2
NLM_F_DUMP = 0x300
HEADER = struct.Struct("=IHHII")
"""struct nlmsghdr: length, type, flags, sequence number, port."""

NETLINK_ROUTE = 0
RTM_GETROUTE = 26  # linux/rtnetlink.h
RTA_DST = 1
RTN_LOCAL = 2

_ANSWER_TIMEOUT = 60
"""Seconds. The kernel answers at once, but may first load modules for a new algorithm."""

_DUMP_ATTEMPTS = 10
"""A dump during which the database changed (NLM_F_DUMP_INTR) is asked for again so many times."""

REMEDIES = {
    errno.EPERM: "Run as root, or grant CAP_NET_ADMIN (docker run --cap-add NET_ADMIN)",
    errno.EEXIST: "Delete the other one first, choose another SPI, or tell them apart by marks",
    errno.EPROTONOSUPPORT: (
        "Load the modules esp4 and esp6, run a kernel with CONFIG_INET_ESP and CONFIG_INET6_ESP, "
        "or use the userspace backend"
    ),
}
"""What helps against each errno, where the caller knows nothing better."""


class Netlink:
    """One netlink socket. Methods may be called from any thread; they take turns.

    A forked child must not use its parent's (they would read each other's answers): EINVAL.
    """

    def __init__(self, *, protocol: int = NETLINK_XFRM, groups: int = 0, receive_buffer: int = 0) -> None:
        """Open a socket of the netlink `protocol` and join `groups`: bit n-1 stands for multicast group n.

        `receive_buffer` bytes of queue are asked for, beyond the system's limit where privileged.
        """
        self._lock = threading.RLock()
        self._sequence = 0
        self._owner = Owner()
        try:
            self.socket: socket.socket = socket.socket(
                socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol
            )
        except (AttributeError, OSError) as error:
            raise NatCompatError(
                getattr(error, "errno", None) or errno.EAFNOSUPPORT,
                f"The kernel has no XFRM netlink ({error})",
                "Load the module xfrm_user, run a kernel with CONFIG_XFRM_USER, or use another backend",
            ) from None
        try:
            for option in (NETLINK_CAP_ACK, NETLINK_EXT_ACK):
                self.socket.setsockopt(SOL_NETLINK, option, 1)
            if receive_buffer:
                try:
                    self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, receive_buffer)
                except PermissionError:
                    self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
            # Not settimeout(): that costs another system call for each answer.
            self.socket.setsockopt(
                socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", _ANSWER_TIMEOUT, 0)
            )
            self.socket.bind((0, groups))
        except OSError as error:
            self.socket.close()
            raise failure("Listening to XFRM", error.errno or 0, error.strerror or "") from None

    def close(self) -> None:
        """Close the socket."""
        self.socket.close()

    def request(
        self,
        what: str,
        message: bytearray,
        kind: int,
        flags: int = NLM_F_ACK,
        *,
        remedies: Mapping[int, str] = NOTHING_BETTER,
    ) -> bytes:
        """Send `message` and return the kernel's reply, or empty bytes for its acknowledgement.

        The first 16 bytes of `message` are filled in here. The whole of it is overwritten with zeros
        once it is sent, since there may be keys in it. `what` begins the text of the error;
        `remedies` by errno take the place of the usual ones.
        """
        for _, answer in self._exchange(what, message, kind, flags, remedies):
            return answer
        return b""

    def request_and_hear(self, what: str, message: bytearray, kind: int, group: int) -> list[bytes]:
        """Send `message` while in multicast `group`; return what was multicast until it was acknowledged.

        Some of it may be missing when the queue was full, and some may be on the account of others.
        """
        heard: list[bytes] = []
        with self._lock:
            try:
                self.socket.setsockopt(SOL_NETLINK, NETLINK_ADD_MEMBERSHIP, group)
            except OSError as error:
                raise failure(what, error.errno or 0, error.strerror or "") from None
            try:
                self._exchange(what, message, kind, NLM_F_ACK, NOTHING_BETTER, heard)
            finally:
                self.socket.setsockopt(SOL_NETLINK, NETLINK_DROP_MEMBERSHIP, group)
                self._drain()
        return heard

    def _drain(self) -> None:
        """Forget what is in the queue."""
        while True:
            try:
                receive(self.socket, 65536, socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError as error:
                if error.errno != errno.ENOBUFS:
                    raise

    def dump(self, what: str, message: bytearray, kind: int) -> list[bytes]:
        """Send `message` as the request of a dump and return all messages of it, consistent in itself."""
        copy = bytes(message)
        for _ in range(_DUMP_ATTEMPTS):
            found = []
            interrupted = False
            for flags, answer in self._exchange(what, bytearray(copy), kind, NLM_F_DUMP, NOTHING_BETTER):
                interrupted |= bool(flags & NLM_F_DUMP_INTR)
                found.append(answer)
            if not interrupted:
                return found
        raise NatCompatError(
            errno.EAGAIN, f"{what}: the database changed during each of {_DUMP_ATTEMPTS} dumps", "Try again"
        )

    def _exchange(
        self,
        what: str,
        message: bytearray,
        kind: int,
        flags: int,
        remedies: Mapping[int, str],
        heard: list[bytes] | None = None,
    ) -> list[tuple[int, bytes]]:
        self._owner.check(what)
        with self._lock:
            self._sequence = sequence = (self._sequence + 1) & 0xFFFF_FFFF
            HEADER.pack_into(message, 0, len(message), kind, flags | NLM_F_REQUEST, sequence, 0)
            try:
                self.socket.sendto(message, (0, 0))
            except OSError as error:
                raise failure(what, error.errno or 0, error.strerror or "", remedies) from None
            finally:
                message[:] = bytes(len(message))
            code, text, answers = self._answers(sequence, flags, heard)
        if code:
            raise failure(what, code, text, remedies)
        return answers

    def _answers(
        self, sequence: int, flags: int, heard: list[bytes] | None
    ) -> tuple[int, str, list[tuple[int, bytes]]]:
        """Read what the kernel says to request `sequence`: errno, its words, (flags, message) pairs."""
        answers: list[tuple[int, bytes]] = []
        while True:
            try:
                data = receive(self.socket, 65536)
            except BlockingIOError:
                return errno.ETIMEDOUT, f"no answer within {_ANSWER_TIMEOUT} seconds", []
            except OSError as error:
                if error.errno == errno.ENOBUFS and heard is not None:
                    continue  # multicasts were lost; the acknowledgement is still to come
                return error.errno or errno.EIO, error.strerror or "", []
            for kind, answer_flags, number, answer in messages_in(data):
                if heard is not None and kind >= NLMSG_MIN_TYPE:
                    heard.append(answer)
                    continue
                if number != sequence:
                    continue
                if kind == NLMSG_ERROR:
                    return *acknowledgement(answer, answer_flags), answers
                if kind == NLMSG_DONE:
                    code = -int(struct.unpack_from("=i", answer, 16)[0]) if len(answer) >= 20 else 0
                    return code, os.strerror(code), answers
                answers.append((answer_flags, answer))
                if not flags & (NLM_F_ACK | NLM_F_DUMP):
                    return 0, "", answers


class LocalAddresses:
    """Tells which addresses are this host's: those of the network namespace in which it was made."""

    def __init__(self) -> None:
        self._netlink = Netlink(protocol=NETLINK_ROUTE)

    def close(self) -> None:
        """Close the socket."""
        self._netlink.close()

    def __contains__(self, address: IPv4Address | IPv6Address) -> bool:
        family = socket.AF_INET if address.version == 4 else socket.AF_INET6
        message = bytearray(HEADER.size)
        message += struct.pack("=BB10x", family, address.max_prefixlen)  # struct rtmsg
        message += struct.pack("=HH", 4 + len(address.packed), RTA_DST) + address.packed
        try:
            answer = self._netlink.request(f"Looking up the route to {address}", message, RTM_GETROUTE, 0)
        except NatCompatError as error:
            if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH, errno.EACCES):
                return False
            raise
        return answer[HEADER.size + 7] == RTN_LOCAL


def receive(sock: socket.socket, size: int, flags: int = 0) -> bytes:
    """Return what the kernel sent next to a netlink socket.

    A process with CAP_NET_ADMIN can send netlink messages to another process's port, too; these are passed
    over. Raises what `socket.socket.recv` raises.
    """
    while True:
        data, (port, _) = sock.recvfrom(size, flags)
        if port == 0:
            return data


def messages_in(data: bytes) -> Iterator[tuple[int, int, int, bytes]]:
    """Split a datagram into its messages: type, flags, sequence number, and the message with its header."""
    offset = 0
    while offset + HEADER.size <= len(data):
        length, kind, flags, sequence, _ = HEADER.unpack_from(data, offset)
        if length < HEADER.size or offset + length > len(data):
            return
        yield kind, flags, sequence, data[offset : offset + length]
        offset += -(-length // 4) * 4


def attributes(message: bytes | bytearray, offset: int) -> Iterator[tuple[int, int, int]]:
    """Return type, start and end of the value of each attribute of `message` from `offset` on."""
    while offset + 4 <= len(message):
        length, kind = struct.unpack_from("=HH", message, offset)
        if length < 4 or offset + length > len(message):
            return
        yield kind & NLA_TYPE_MASK, offset + 4, offset + length
        offset += -(-length // 4) * 4


def acknowledgement(answer: bytes, flags: int) -> tuple[int, str]:
    """Return errno and text of an NLMSG_ERROR message; errno 0 and a text are a warning."""
    code = -int(struct.unpack_from("=i", answer, 16)[0])
    text = os.strerror(code) if code else ""
    if flags & NLM_F_ACK_TLVS:
        offset = 36
        if not flags & NLM_F_CAPPED:
            offset = 20 + -(-int(struct.unpack_from("=I", answer, 20)[0]) // 4) * 4
        for kind, start, end in attributes(answer, offset):
            if kind == NLMSGERR_ATTR_MSG:
                text = answer[start:end].rstrip(b"\0").decode("utf-8", "replace")
    return code, text


def failure(what: str, code: int, text: str, remedies: Mapping[int, str] = NOTHING_BETTER) -> NatCompatError:
    """Return the error for `what`, with errno `code` and the kernel's `text`."""
    return asking.failure(what, code, text, remedies, REMEDIES)
