"""Traffic, isolated processes and the state of a socket, for tests of Linux sockets."""

from __future__ import annotations

import ctypes
import fcntl
import functools
import os
import pickle
import select
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, ParamSpec

import pytest

from natcompat import NON_ESP_MARKER, NatTEndpoint, probe
from natcompat.backends.linux_sockets import filters as bpf
from natcompat.backends.linux_sockets import options
from tests.support.running import can_become_nobody

P = ParamSpec("P")

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="steering and filters are features of Linux")
ESP = b"\xc0\xde\x00\x01" + bytes(28)
KEEPALIVE = b"\xff"
HOSTS = {socket.AF_INET: "127.0.0.1", socket.AF_INET6: "::1"}
FAMILIES = pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6], ids=["v4", "v6"])

_INSIDE = "NATCOMPAT_TEST_INSIDE"
_NOBODY = 65534


def ike(number: int = 0, size: int = 32) -> bytes:
    """Return a message that can be told from others."""
    return (b"IKE %06d " % number).ljust(size, b".")


def udp(
    family: socket.AddressFamily = socket.AF_INET, host: str | None = None, port: int = 0, timeout: float = 5
) -> socket.socket:
    """Return a bound socket; by default on loopback, at a port that the kernel chooses."""
    sock = socket.socket(family, socket.SOCK_DGRAM)
    try:
        sock.bind((HOSTS[family] if host is None else host, port))
    except BaseException:
        sock.close()
        raise
    sock.settimeout(timeout)
    return sock


def at(sock: socket.socket, host: str | None = None) -> Any:
    """Return the address at which `sock` can be reached on loopback."""
    return (host or HOSTS[sock.family], sock.getsockname()[1])


def send_ike(peer: socket.socket, address: Any, *numbers: int, size: int = 32) -> None:
    for number in numbers:
        peer.sendto(NON_ESP_MARKER + ike(number, size), address)


def wait_until(condition: Callable[[], object], what: str = "", seconds: float = 5) -> None:
    """Poll until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, what or "it did not come about"
        time.sleep(0.002)


def readable(sock: socket.socket, seconds: float = 0) -> bool:
    """Tell whether `select` wakes for `sock`."""
    return bool(select.select([sock], [], [], seconds)[0])


def queued(sock: socket.socket) -> list[bytes]:
    """Return and remove all datagrams in the queue of `sock`."""
    found = []
    while readable(sock):
        found.append(sock.recv(65535))
    return found


class Collector:
    """A consumer of ESP that keeps the packets."""

    def __init__(self, *, coalesce: bool = False) -> None:
        self.coalesce = coalesce
        self.packets: list[tuple[bytes, Any]] = []
        self.threads: set[str] = set()

    def inbound(self, burst: list[tuple[memoryview, Any]]) -> None:
        self.threads.add(threading.current_thread().name)
        self.packets += [(bytes(packet), source) for packet, source in burst]

    def wait_for(self, count: int) -> list[tuple[bytes, Any]]:
        wait_until(lambda: len(self.packets) >= count, f"{len(self.packets)} of {count} ESP packets came")
        return self.packets


def check_demultiplexing(sock: socket.socket, consumer: Collector, peer: socket.socket, address: Any) -> None:
    """Assert that datagrams to `address` reach the place that the contract names, each once."""
    endpoint_payloads = (KEEPALIVE, b"", b"\0\0\0", ESP, NON_ESP_MARKER + ike(1), ESP, NON_ESP_MARKER)
    before = len(consumer.packets)
    for payload in endpoint_payloads:
        peer.sendto(payload, address)
    source = peer.getsockname()[1]
    assert sock.recvfrom(2048)[0] == ike(1)
    message, sender = sock.recvfrom(2048)
    assert (message, sender[1]) == (b"", source)
    got = consumer.wait_for(before + 2)[before:]
    assert [(packet, address[1]) for packet, address in got] == [(ESP, source)] * 2
    assert not readable(sock)


# --- the state of a socket and of the process -------------------------------------------------------

_OPTIONS = {
    "SO_REUSEPORT": (socket.SOL_SOCKET, 15),
    "SO_REUSEADDR": (socket.SOL_SOCKET, socket.SO_REUSEADDR),
    "SO_RCVBUF": (socket.SOL_SOCKET, socket.SO_RCVBUF),
    "UDP_ENCAP": (socket.IPPROTO_UDP, options.UDP_ENCAP),
    "UDP_GRO": (socket.IPPROTO_UDP, options.UDP_GRO),
    "IP_RECVERR": (socket.IPPROTO_IP, options.IP_RECVERR),
    "IP_PKTINFO": (socket.IPPROTO_IP, options.IP_PKTINFO),
}


def state(sock: socket.socket) -> dict[str, Any]:
    """Return the visible state of `sock`, and the threads and descriptors of this process."""
    return {
        "class": type(sock),
        "timeout": sock.gettimeout(),
        "filter": bpf.has_filter(sock),
        "program": has_program(sock),
        "alone": alone_on_port(sock),
        "descriptors": descriptors(),
        "threads": {thread.name for thread in threading.enumerate()},
        **{name: sock.getsockopt(*option) for name, option in _OPTIONS.items()},
    }


def descriptors() -> set[str]:
    """Return the open descriptors of this process with their files."""
    found = set()
    for entry in os.listdir("/proc/self/fd"):
        with suppress(OSError):  # the one that lists them
            found.add(f"{entry} {os.readlink(f'/proc/self/fd/{entry}')}")
    return {entry for entry in found if "/proc/" not in entry}


def has_program(sock: socket.socket) -> bool:
    """Tell whether the reuseport group of `sock` has a program, and leave it there.

    The kernel can only be asked by taking it off; put back it is as before.
    """
    plain = socket.socket(fileno=os.dup(sock.fileno()))
    try:
        bpf.detach_steering(plain)
    except OSError:
        return False
    else:
        bpf.attach_steering(plain, 1)
        return True
    finally:
        plain.close()


def alone_on_port(sock: socket.socket) -> bool:
    """Tell whether no other socket has the address and port of `sock`, by /proc/net."""
    table = "/proc/net/udp6" if sock.family == socket.AF_INET6 else "/proc/net/udp"
    inode = str(os.fstat(sock.fileno()).st_ino)
    lines = [line.split() for line in Path(table).read_text().splitlines()[1:]]
    own = [local for _, local, *_, its_inode, _, _, _ in lines if its_inode == inode]
    return sum(line[1] in own for line in lines) == 1


@contextmanager
def nothing_left() -> Iterator[None]:
    """Assert that the body leaves no descriptor and no thread behind."""
    # pyroute2 0.9.1 opens sockets when it is imported, and keeps them
    import natcompat.esp.device.rtnetlink  # noqa: F401

    before = descriptors(), set(threading.enumerate())
    yield
    assert (descriptors(), set(threading.enumerate())) == before


# --- tests in a process of their own ----------------------------------------------------------------


def isolated(
    *, network: bool = False, ordinary_user: bool = False, refused: tuple[int, ...] = ()
) -> Callable[[Callable[P, None]], Callable[P, None]]:
    """Run a test in a process of its own, since it changes the process.

    `network`: in a network namespace of its own, in which loopback is down, with all rights there;
    `ordinary_user`: without any right; `refused`: under a seccomp policy that refuses setsockopt of
    these options of SOL_SOCKET with EPERM.
    """

    def decorate(body: Callable[P, None]) -> Callable[P, None]:
        @functools.wraps(body)
        def run(*args: P.args, **kwargs: P.kwargs) -> None:
            if os.environ.get(_INSIDE) == f"{body.__module__}.{body.__name__}":
                if ordinary_user and os.geteuid() == 0:
                    _become_nobody()
                if refused:
                    _refuse_socket_options(refused)
                body(*args, **kwargs)
                return
            if ordinary_user and os.geteuid() == 0 and not can_become_nobody():
                pytest.skip("there is no ordinary user in this user namespace")
            _run_elsewhere(body.__module__, body.__name__, (args, kwargs), network)

        return run

    return decorate


def _run_elsewhere(module: str, name: str, arguments: Any, network: bool) -> None:
    code = (
        f"import sys, pickle; sys.path.insert(0, {str(Path(__file__).parents[2])!r});"
        f"import {module} as module;"
        f"args, kwargs = pickle.loads({pickle.dumps(arguments)!r}); module.{name}(*args, **kwargs)"
    )
    command = [sys.executable, "-W", "error", "-c", code]
    root = os.geteuid() == 0
    if network:
        prefix = ["unshare", "--net"] if root else ["unshare", "--user", "--map-root-user", "--net"]
        if subprocess.run([*prefix, "true"], capture_output=True, check=False).returncode:
            pytest.skip("network namespaces are not allowed here")
        command = prefix + command
    environment = {
        **os.environ,
        _INSIDE: f"{module}.{name}",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, f"in a process of its own:\n{done.stdout}{done.stderr}"


def _become_nobody() -> None:
    # the interpreter may be in a directory of root's: what is imported later has to be there before
    import natcompat.backends.linux  # noqa: F401
    import natcompat.backends.userspace  # noqa: F401
    import natcompat.kernel.xfrm.probe  # noqa: F401

    probe()
    os.setgroups([])
    os.setresgid(_NOBODY, _NOBODY, _NOBODY)
    os.setresuid(_NOBODY, _NOBODY, _NOBODY)
    for module in (natcompat.backends.linux, natcompat.backends.linux_sockets.features):
        for found in vars(module).values():
            if hasattr(found, "cache_clear"):
                found.cache_clear()


def set_up(device: str) -> None:
    """Set the network device up, as ``ip link set DEVICE up``."""
    request = struct.pack("16sH14x", device.encode(), 1)  # IFF_UP, linux/if.h
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        fcntl.ioctl(sock, 0x8914, request)  # SIOCSIFFLAGS, linux/sockios.h


def ip(*arguments: str) -> None:
    """Run the command ``ip``."""
    command = shutil.which("ip") or "/usr/sbin/ip"
    subprocess.run([command, *arguments], check=True)


def _refuse_socket_options(options: tuple[int, ...]) -> None:
    """Put a seccomp filter on this process, as container runtimes do."""
    setsockopt = {"x86_64": 54, "aarch64": 208, "riscv64": 208}[os.uname().machine]
    allow, eperm = 0x7FFF0000, 0x00050000 | 1  # SECCOMP_RET_ALLOW, SECCOMP_RET_ERRNO, linux/seccomp.h
    program = [(0x20, 0, 0, 0), (0x15, 0, 3 + len(options), setsockopt)]  # the number of the system call
    program += [(0x20, 0, 0, 16 + 8), (0x15, 0, 1 + len(options), socket.SOL_SOCKET)]  # its second argument
    program += [(0x20, 0, 0, 16 + 16)]  # its third
    program += [(0x15, len(options) - index, 0, option) for index, option in enumerate(options)]
    program += [(0x06, 0, 0, allow), (0x06, 0, 0, eperm)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("=HBBI", *line) for line in program))
    fprog = struct.pack("@HP", len(program), ctypes.addressof(code))
    libc = ctypes.CDLL(None, use_errno=True)
    word = ctypes.c_ulong
    assert libc.prctl(38, word(1), word(0), word(0), word(0)) == 0  # PR_SET_NO_NEW_PRIVS
    assert libc.prctl(22, word(2), fprog, word(0), word(0)) == 0, ctypes.get_errno()  # PR_SET_SECCOMP


def closed(endpoint: NatTEndpoint) -> None:
    """Switch off and assert that it is off."""
    endpoint.close()
    assert endpoint.closed
    assert endpoint.mode == "off"
