"""Three network namespaces with a NAT between them, for `natcompat verify`, tests and benchmarks.

    initiator 192.168.1.2 ---- 192.168.1.1 router 203.0.113.1 ---- 203.0.113.2 responder
              fd00:1::2        fd00:1::1          2001:db8:113::1  2001:db8:113::2

The router masquerades UDP from the initiator, over IPv4 and IPv6, and always changes the source port::

    with Topology() as network:
        peer = network.initiator.socket(socket.AF_INET)  # a socket in there, used from here
        print(network.responder.call(function, peer))  # a function that runs in there

The namespaces have no names: each lives exactly as long as the process that is in it, and these
end with the `Topology`, or with the process that made it, however that ends. An ordinary user gets
them inside a user namespace, where the system permits that.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Final, ParamSpec, TypeVar

from natcompat.commands.verify.namespace_process import NAT_PORTS, masquerade, receive, send
from natcompat.errors import NatCompatError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

INITIATOR: Final = {4: "192.168.1.2", 6: "fd00:1::2"}
ROUTER_INSIDE: Final = {4: "192.168.1.1", 6: "fd00:1::1"}
ROUTER_OUTSIDE: Final = {4: "203.0.113.1", 6: "2001:db8:113::1"}
RESPONDER: Final = {4: "203.0.113.2", 6: "2001:db8:113::2"}
"""Addresses by IP version: of RFC 1918, RFC 4193, and those for documentation (RFC 5737, RFC 3849)."""


_PREFIX: Final = {4: 24, 6: 64}
_FAMILY: Final = {4: socket.AF_INET, 6: socket.AF_INET6}
_IFA_F_NODAD: Final = 0x02  # linux/if_addr.h


class Namespace:
    """One network namespace, reached through a process inside. Thread-safe."""

    def __init__(self, name: str, channel: socket.socket) -> None:
        self.name = name
        self._channel = channel
        self._lock = threading.Lock()
        self.pid = 0
        """Process ID of the process inside."""

    def call(
        self, function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        """Run ``function(*args, **kwargs)`` in the namespace; return its result, or raise its exception.

        The function has to be importable (not of ``__main__``, no lambda); arguments and result are
        pickled, and sockets may be among them: they arrive as duplicates and stay in the namespace
        in which they were made. Calls of one namespace run one after another. Raises
        ConnectionError if the process in it is gone.
        """
        with self._lock:
            try:
                send(self._channel, (function, args, kwargs))
                worked, answer = receive(self._channel)
            except (EOFError, OSError) as error:
                raise ConnectionError(f"the process in the namespace {self.name} is gone: {error}") from error
        if not worked:
            raise answer
        result: Result = answer
        return result

    def socket(self, family: int, kind: int = socket.SOCK_DGRAM) -> socket.socket:
        """Return a new socket of the namespace, for use in this process."""
        return self.call(socket.socket, family, kind)

    def close(self) -> None:
        """End the process inside."""
        self._channel.close()


class Topology:
    """The three namespaces and the NAT; a context manager.

    `nat` is ``"nft"``, ``"iptables"`` or ``"iptables-legacy"``; None: whichever is there and works.
    Raises `natcompat.errors.NatCompatError` (EPERM, ENOTSUP, ENOENT) with the reason and the remedy if
    there can be none. May be made in any thread, which then has to outlive it (see PR_SET_PDEATHSIG).
    """

    router: Namespace
    initiator: Namespace
    responder: Namespace
    user_namespace: bool
    """Whether a user namespace holds the three, since this process is not privileged."""
    nat: str
    """The tool that set up the NAT, named as in the argument."""

    def __init__(self, nat: str | None = None) -> None:
        if sys.platform != "linux":
            raise NatCompatError(errno.ENOTSUP, "network namespaces are a feature of Linux")
        pairs = [socket.socketpair() for _ in range(3)]
        self.router, self.initiator, self.responder = (
            Namespace(name, pair[0])
            for name, pair in zip(("router", "initiator", "responder"), pairs, strict=True)
        )
        remote = [pair[1].fileno() for pair in pairs]
        program = "import sys, json; sys.path[:] = json.loads(sys.argv[1])\n"
        program += "from natcompat.commands.verify.namespace_process import populate\n"
        program += "populate(*map(int, sys.argv[2:]))"
        command = [sys.executable, "-c", program, json.dumps(sys.path), str(os.getpid()), *map(str, remote)]
        # a session of its own: Ctrl-C is for the process that made it, which then ends it in order
        try:
            self._process = subprocess.Popen(  # noqa: S603 - our own interpreter
                command,
                pass_fds=remote,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                start_new_session=True,
            )
        except OSError as error:
            for channel in itertools.chain.from_iterable(pairs):
                channel.close()
            raise NatCompatError(
                error.errno or errno.EACCES,
                f"no process for the namespaces: {sys.executable or 'the interpreter'}: {error.strerror}",
                "Use an interpreter that this user may run, or leave the namespaces out (--no-nat)",
            ) from None
        try:
            for _, channel in pairs:
                channel.close()
            self.user_namespace = self.router.call(_start)
            for namespace in (self.router, self.initiator, self.responder):
                namespace.pid = namespace.call(os.getpid)
            self.router.call(_link, self.initiator.pid, self.responder.pid)
            self.initiator.call(_configure, "uplink", INITIATOR, ROUTER_INSIDE)
            self.responder.call(_configure, "uplink", RESPONDER, None)
            self.router.call(_configure, "inside", ROUTER_INSIDE, None)
            self.router.call(_configure, "outside", ROUTER_OUTSIDE, None)
            self.nat = self.router.call(masquerade, nat)
            for version in (4, 6):
                self._settle(version)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Topology:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes and so the namespaces. May be called again."""
        for namespace in (self.initiator, self.responder, self.router):
            namespace.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:  # one is busy with a call
            self._process.kill()
            self._process.wait()

    def _settle(self, version: int) -> None:
        """Wait until datagrams pass, and check that the NAT translates.

        IPv6 takes a second: the kernel tells it of links that came up once a second (linkwatch).
        """
        with self.initiator.socket(_FAMILY[version]) as near, self.responder.socket(_FAMILY[version]) as far:
            near.bind((INITIATOR[version], 0))
            far.bind((RESPONDER[version], 0))
            far.settimeout(0.05)
            deadline = time.monotonic() + 10
            while True:
                near.sendto(b"natcompat", far.getsockname())
                with contextlib.suppress(TimeoutError):
                    source = far.recvfrom(64)[1]
                    break
                if time.monotonic() > deadline:
                    raise NatCompatError(errno.EHOSTUNREACH, f"nothing passes the NAT over IPv{version}")
        if source[0] != ROUTER_OUTSIDE[version] or not NAT_PORTS[0] <= source[1] <= NAT_PORTS[1]:
            raise NatCompatError(
                errno.ENOTSUP,
                f"{self.nat} accepted the rules and does not masquerade: the source is {source[:2]}",
                "Load the modules nf_nat and nft_masq (or xt_MASQUERADE)",
            )


# --- in the processes of the namespaces ----------------------------------------------------------


def _start() -> bool:
    """Name the first call, whose answer is the result of `populate`'s set-up."""
    return True


def _link(initiator: int, responder: int) -> None:
    from pyroute2 import IPRoute

    with IPRoute() as route:
        for name, process in (("inside", initiator), ("outside", responder)):
            route.link("add", ifname=name, kind="veth", peer={"ifname": "uplink", "net_ns_pid": process})


def _configure(name: str, addresses: dict[int, str], gateways: dict[int, str] | None) -> None:
    from pyroute2 import IPRoute

    with IPRoute() as route:
        route.link("set", index=route.link_lookup(ifname="lo")[0], state="up")
        index = route.link_lookup(ifname=name)[0]
        for version, address in addresses.items():
            flags = {"flags": _IFA_F_NODAD} if version == 6 else {}
            route.addr("add", index=index, address=address, prefixlen=_PREFIX[version], **flags)
        route.link("set", index=index, state="up")
        for version, gateway in (gateways or {}).items():
            route.route("add", family=_FAMILY[version], dst="default", gateway=gateway)


# --- the channel: pickles with a length in front, sockets beside them (unix(7), SCM_RIGHTS) ------
