"""The processes that hold the network namespaces, and the channel through which they are called."""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import io
import os
import pickle
import shutil
import signal
import socket
import struct
import subprocess
import traceback
from typing import Any, Final

from natcompat.errors import NatCompatError

NAT_PORTS: Final = (20000, 29999)
"""The range of source ports that the router gives to masqueraded datagrams."""

_CLONE_NEWUSER: Final = 0x10000000  # linux/sched.h

_CLONE_NEWNET: Final = 0x40000000

_PR_SET_PDEATHSIG: Final = 1  # linux/prctl.h

_SYSTEM_PATH: Final = "/usr/sbin:/sbin:/usr/bin:/bin"  # an ordinary user's PATH may lack sbin

_PORT_RANGE: Final = "{}-{}".format(*NAT_PORTS)

_NFT: Final = "".join(
    f"add table {family} natcompat\n"
    f"add chain {family} natcompat out {{ type nat hook postrouting priority 100; }}\n"
    f"add rule {family} natcompat out oifname outside meta l4proto udp masquerade to :{_PORT_RANGE}\n"
    for family in ("ip", "ip6")
)

_IPTABLES: Final = ("-t nat -A POSTROUTING -o outside -p udp -j MASQUERADE --to-ports " + _PORT_RANGE).split()


def populate(parent: int, *descriptors: int) -> None:
    """Run as the process of the router: fork the other two and answer calls until the channels close."""
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
        receive(router)  # the first call asks how it went
        send(router, (True, in_user_namespace))
    _serve(router)
    for child in children:
        os.waitpid(child, 0)


def _refuse(channel: socket.socket, error: NatCompatError) -> None:
    with contextlib.suppress(EOFError, OSError):
        receive(channel)
        send(channel, (False, error))


def _leave_network() -> bool:
    """Move into a new network namespace; return whether that took a user namespace."""
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
    """Have the kernel kill this process when `parent` ends. To be called after unshare, which forgets it."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended meanwhile
        os._exit(1)


def _serve(channel: socket.socket) -> None:
    """Answer calls until the other end closes."""
    while True:
        try:
            function, args, kwargs = receive(channel)
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
            send(channel, answer)
        except (BrokenPipeError, ConnectionResetError):
            return
        except Exception as error:  # noqa: BLE001 - a result that cannot be pickled
            send(channel, (False, TypeError(f"the answer cannot be sent: {error!r}")))
        del answer  # and with it the sockets that went


def masquerade(tool_wanted: str | None) -> str:
    """Make this namespace a NAT router; return the name of the tool that did it."""
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
    for tool in [tool_wanted] if tool_wanted else commands:
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
    """Run `command` with `text` as its input; return a description of the failure, empty on success."""
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


class _Unpickler(pickle.Unpickler):  # noqa: S301 - of this process's own children
    def __init__(self, file: io.BytesIO, sockets: list[socket.socket]) -> None:
        super().__init__(file)
        self._sockets = sockets

    def persistent_load(self, pid: tuple[int, float | None]) -> socket.socket:
        index, timeout = pid
        self._sockets[index].settimeout(timeout)
        return self._sockets[index]


def send(channel: socket.socket, message: object) -> None:
    """Send one message, with the sockets in it."""
    file = io.BytesIO()
    pickler = _Pickler(file)
    pickler.dump(message)
    body = file.getbuffer()
    rights = array.array("i", [sock.fileno() for sock in pickler.sockets])
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)] if rights else []
    channel.sendmsg([_HEADER.pack(len(body), len(rights))], ancillary)
    channel.sendall(body)


def receive(channel: socket.socket) -> Any:
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
