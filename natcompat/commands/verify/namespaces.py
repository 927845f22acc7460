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

import array
import contextlib
import ctypes
import errno
import io
import json
import os
import pickle
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable
from typing import Any, Final, ParamSpec, TypeVar

from natcompat.errors import NatCompatError

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")

INITIATOR: Final = {4: "192.168.1.2", 6: "fd00:1::2"}
ROUTER_INSIDE: Final = {4: "192.168.1.1", 6: "fd00:1::1"}
ROUTER_OUTSIDE: Final = {4: "203.0.113.1", 6: "2001:db8:113::1"}
RESPONDER: Final = {4: "203.0.113.2", 6: "2001:db8:113::2"}
"""Addresses by IP version: of RFC 1918, RFC 4193, and those for documentation (RFC 5737, RFC 3849)."""

NAT_PORTS: Final = (20000, 29999)
"""From these the router takes the source ports of what it masquerades."""

_PREFIX: Final = {4: 24, 6: 64}
_FAMILY: Final = {4: socket.AF_INET, 6: socket.AF_INET6}
_CLONE_NEWUSER: Final = 0x10000000  # linux/sched.h
_CLONE_NEWNET: Final = 0x40000000
_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h
_IFA_F_NODAD: Final = 0x02  # linux/if_addr.h

_SYSTEM_PATH: Final = "/usr/sbin:/sbin:/usr/bin:/bin"  # an ordinary user's PATH may lack sbin
_PORT_RANGE: Final = "{}-{}".format(*NAT_PORTS)
_NFT: Final = "".join(
    f"add table {family} natcompat\n"
    f"add chain {family} natcompat out {{ type nat hook postrouting priority 100; }}\n"
    f"add rule {family} natcompat out oifname outside meta l4proto udp masquerade to :{_PORT_RANGE}\n"
    for family in ("ip", "ip6")
)
_IPTABLES: Final = ("-t nat -A POSTROUTING -o outside -p udp -j MASQUERADE --to-ports " + _PORT_RANGE).split()


class Namespace:
    """One network namespace, through the process that is in it. Thread-safe."""

    def __init__(self, name: str, channel: socket.socket) -> None:
        self.name = name
        self._channel = channel
        self._lock = threading.Lock()
        self.pid = 0
        """Of the process in it."""

    def call(
        self, function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        """Run ``function(*args, **kwargs)`` in the namespace; return what it returns, raise what it raises.

        The function has to be importable (not of ``__main__``, no lambda); arguments and result are
        pickled, and sockets may be among them: they arrive as duplicates and stay in the namespace
        in which they were made. Calls of one namespace run one after another. Raises
        ConnectionError if the process in it is gone.
        """
        with self._lock:
            try:
                _send(self._channel, (function, args, kwargs))
                worked, answer = _receive(self._channel)
            except (EOFError, OSError) as error:
                raise ConnectionError(f"the process in the namespace {self.name} is gone: {error}") from error
        if not worked:
            raise answer
        result: Result = answer
        return result

    def socket(self, family: int, kind: int = socket.SOCK_DGRAM) -> socket.socket:
        """Return a new socket that is in the namespace; bind it, use it and close it from here."""
        return self.call(socket.socket, family, kind)

    def close(self) -> None:
        """Let the process in it end."""
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
    """Whether they are inside a user namespace, since this process is not privileged."""
    nat: str
    """What masquerades: a name as in the argument."""

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
        program += (
            "from natcompat.commands.verify.namespaces import _populate; _populate(*map(int, sys.argv[2:]))"
        )
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
            for channel in (each for pair in pairs for each in pair):
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
            for each in (self.router, self.initiator, self.responder):
                each.pid = each.call(os.getpid)
            self.router.call(_link, self.initiator.pid, self.responder.pid)
            self.initiator.call(_configure, "uplink", INITIATOR, ROUTER_INSIDE)
            self.responder.call(_configure, "uplink", RESPONDER, None)
            self.router.call(_configure, "inside", ROUTER_INSIDE, None)
            self.router.call(_configure, "outside", ROUTER_OUTSIDE, None)
            self.nat = self.router.call(_masquerade, nat)
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
        """End the processes, and with them the namespaces. May be repeated."""
        for each in (self.initiator, self.responder, self.router):
            each.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:  # one is busy with a call
            self._process.kill()
            self._process.wait()

    def _settle(self, version: int) -> None:
        """Wait until datagrams pass, and see that the NAT is one.

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


def _populate(parent: int, *descriptors: int) -> None:
    """Be the router's process, and make the other two. Ends when the channels close."""
    router, *others = [socket.socket(fileno=descriptor) for descriptor in descriptors]
    children: list[int] = []
    try:
        # before unshare, after which the files of others may be out of reach
        import asyncio  # noqa: F401
        import queue  # noqa: F401

        with contextlib.suppress(ImportError):
            import pyroute2  # noqa: F401

        in_user_namespace = _leave_network()
        _end_with(parent)
        for index, channel in enumerate(others):
            child = os.fork()
            if child:
                children.append(child)
                continue
            router.close()
            others[1 - index].close()
            _unshare(_CLONE_NEWNET)
            _end_with(os.getppid())
            _serve(channel)
            return
    except NatCompatError as error:
        _refuse(router, error)
        return
    for channel in others:
        channel.close()
    with contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):  # it may have gone already
        _receive(router)  # the first call asks how it went
        _send(router, (True, in_user_namespace))
    _serve(router)
    for child in children:
        os.waitpid(child, 0)


def _start() -> bool:
    """Stand for the first call, which `_populate` answers itself."""
    return True


def _refuse(channel: socket.socket, error: NatCompatError) -> None:
    with contextlib.suppress(EOFError, OSError):
        _receive(channel)
        _send(channel, (False, error))


def _leave_network() -> bool:
    """Move into a network namespace of our own, by way of a user namespace if need be; True if it was."""
    user, group = os.geteuid(), os.getegid()
    try:
        _unshare(_CLONE_NEWNET)
        return False
    except NatCompatError as error:
        if error.errno != errno.EPERM:
            raise
    _unshare(_CLONE_NEWUSER | _CLONE_NEWNET)
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {user} 1"),
        ("gid_map", f"0 {group} 1"),
    ):
        with open(f"/proc/self/{name}", "w") as file:
            file.write(text)
    return True


def _unshare(flags: int) -> None:
    if ctypes.CDLL(None, use_errno=True).unshare(flags):
        code = ctypes.get_errno()
        raise NatCompatError(
            code,
            f"a network namespace was refused: {os.strerror(code)}",
            "Run as root, or permit user namespaces to this user (sysctl user.max_user_namespaces, "
            "kernel.unprivileged_userns_clone, kernel.apparmor_restrict_unprivileged_userns; a container "
            "needs CAP_SYS_ADMIN)",
        )


def _end_with(parent: int) -> None:
    """Be killed when `parent` ends, however it does; after unshare, which would forget it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended meanwhile
        os._exit(1)


def _serve(channel: socket.socket) -> None:
    """Answer calls until the other end closes."""
    while True:
        try:
            function, args, kwargs = _receive(channel)
        except (EOFError, ConnectionResetError):
            return
        except Exception as error:  # noqa: BLE001 - what cannot be unpickled is the caller's to know
            answer: tuple[bool, Any] = False, error
        else:
            try:
                answer = True, function(*args, **kwargs)
            except Exception as error:  # noqa: BLE001 - whatever it is, it is the caller's
                error.add_note(f"In the namespace:\n{''.join(traceback.format_tb(error.__traceback__))}")
                answer = False, error
        try:
            _send(channel, answer)
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:  # noqa: BLE001 - a result that cannot be pickled
            _send(channel, (False, TypeError(f"the answer cannot be sent: {error!r}")))
        del answer  # and with it the sockets that went


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


def _masquerade(wanted: str | None) -> str:
    """Make this namespace a NAT router; return by what."""
    for setting in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
        try:
            with open(f"/proc/sys/net/{setting}", "w") as file:
                file.write("1")
        except OSError as error:
            raise NatCompatError(
                error.errno or errno.EPERM,
                f"forwarding cannot be switched on: {error}",
                "Give the container a writable /proc/sys/net (docker run --privileged)",
            ) from None
    commands = {
        "nft": [["nft", "-f", "-"]],
        "iptables": [["iptables", *_IPTABLES], ["ip6tables", *_IPTABLES]],
        "iptables-legacy": [["iptables-legacy", *_IPTABLES], ["ip6tables-legacy", *_IPTABLES]],
    }
    refusals = []
    for tool in [wanted] if wanted else commands:
        refusal = ""
        for command in commands[tool]:
            refusal = refusal or _run(command, _NFT if tool == "nft" else "")
        if not refusal:
            return tool
        refusals.append(refusal)
    raise NatCompatError(
        errno.ENOENT,
        f"there is nothing to make a NAT with: {'; '.join(refusals)}",
        "Install nftables (apt install nftables), on a kernel with nf_nat",
    )


def _run(command: list[str], text: str) -> str:
    """Run `command` with `text` as its input; return what went wrong, or nothing."""
    path = shutil.which(command[0], path=f"{os.environ.get('PATH', '')}:{_SYSTEM_PATH}")
    if path is None:
        return f"{command[0]} is not installed"
    # iptables-legacy would lock a file that only root may write; nobody else is in this namespace
    environment = {**os.environ, "XTABLES_LOCKFILE": "/dev/null"}
    done = subprocess.run(  # noqa: S603 - the commands are those above
        [path, *command[1:]], input=text, capture_output=True, text=True, env=environment, check=False
    )
    if done.returncode == 0:
        return ""
    return f"{command[0]}: {done.stderr.strip().partition(chr(10))[0] or f'exit status {done.returncode}'}"


# --- the channel: pickles with a length in front, sockets beside them (unix(7), SCM_RIGHTS) ------

_HEADER: Final = struct.Struct("=QI")  # length of the pickle, number of sockets
_MOST_SOCKETS: Final = 250  # SCM_MAX_FD is 253


class _Pickler(pickle.Pickler):
    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file, protocol=pickle.HIGHEST_PROTOCOL)
        self.sockets: list[socket.socket] = []

    def persistent_id(self, obj: object) -> object:
        if type(obj) is not socket.socket:
            return None
        self.sockets.append(obj)
        return len(self.sockets) - 1, obj.gettimeout()


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, sockets: list[socket.socket]) -> None:
        super().__init__(file)
        self._sockets = sockets

    def persistent_load(self, pid: tuple[int, float | None]) -> socket.socket:
        index, timeout = pid
        self._sockets[index].settimeout(timeout)
        return self._sockets[index]


def _send(channel: socket.socket, message: object) -> None:
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(message)
    body = file.getbuffer()
    rights = array.array("i", [each.fileno() for each in pickler.sockets])
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
    channel.sendmsg([_HEADER.pack(len(body), len(rights))], ancillary)
    channel.sendall(body)


def _receive(channel: socket.socket) -> Any:
    """Return the next message. Raises EOFError when the other end is closed."""
    header, descriptors, _, _ = socket.recv_fds(channel, _HEADER.size, _MOST_SOCKETS)
    if len(header) < _HEADER.size:
        raise EOFError("the channel is closed")
    sockets = [socket.socket(fileno=descriptor) for descriptor in descriptors]
    length, _ = _HEADER.unpack(header)
    body = bytearray()
    while len(body) < length:
        piece = channel.recv(min(length - len(body), 1 << 20))
        if not piece:
            raise EOFError("the channel was closed in the middle of a message")
        body += piece
    return _Unpickler(io.BytesIO(body), sockets).load()
