"""Two ends with TUN devices in network namespaces of their own, and what crosses between them."""

from __future__ import annotations

import contextlib
import ctypes
import os
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import pytest

from natcompat import set_nat_t_endpoint
from natcompat.esp import choice as datapaths
from natcompat.esp.device.tun import TunDevice
from natcompat.esp.userspace import UserspaceIPsec
from natcompat.ipsec import (
    Direction,
    Encr,
    Policy,
    SaId,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)
from tests.support.linux import readable, set_up

PATHS = pytest.mark.parametrize("path", [each.name for each in datapaths.probe() if each.viable])

IN_C = pytest.mark.skipif(
    not any(each.name == "c" and each.viable for each in datapaths.probe()), reason="no data path in C here"
)

KEYS = os.urandom(20), os.urandom(20)

OUTER = "127.0.0.1", "127.0.0.2"

CLONE_NEWNET = 0x40000000  # linux/sched.h

Result = TypeVar("Result")


def enter(namespace: int | None) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET) if namespace is None else libc.setns(namespace, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "network namespace")


def elsewhere(namespace: int | None, function: Callable[[], Result]) -> Result:
    """Run `function` in a thread that is in `namespace`; None: a new one."""
    results: list[Result] = []

    def run() -> None:
        enter(namespace)
        results.append(function())

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return results[0]


class End:
    """A socket with the option on loopback, ESP in this process, and a TUN in a namespace of its own."""

    def __init__(
        self, number: int, path: str, backend: str = "userspace", host: str | None = None, **options: Any
    ) -> None:
        self.inner = {4: f"10.9.0.{number + 1}", 6: f"fd09::{number + 1}"}
        self.number = number
        self.ids: dict[int, SaId] = {}
        self.tun = elsewhere(None, lambda: self._make_tun(path))
        self.ipsec = UserspaceIPsec(self.tun, datapath=path, **options)
        self.sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.sock.settimeout(20)
        self.sock.bind((OUTER[number] if host is None else host, 0))
        self.endpoint = set_nat_t_endpoint(self.sock, backend=backend, esp=self.ipsec)
        self.port: int = self.sock.getsockname()[1]

    def _make_tun(self, path: str) -> TunDevice:
        self.namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        tun = TunDevice("inner", mtu=1400, vnet_header=path == "c")
        for address in (f"{self.inner[4]}/24", f"{self.inner[6]}/64"):
            subprocess.run(
                ["ip", "address", "add", address, "dev", "inner", *(["nodad"] if ":" in address else [])],
                check=True,
            )
        return tun

    def install(self, peer: End, **changes: Any) -> None:
        """Install SAs and policies with the other end."""
        for direction in Direction:
            order = 1 if direction is Direction.OUT else -1
            source, destination = (OUTER[self.number], OUTER[peer.number])[::order]
            for inside in ("10.9.0.0/24", "fd09::/64"):
                self.ipsec.add_policy(
                    Policy(
                        direction=direction,
                        selector=TrafficSelector(source=inside, destination=inside),
                        source=source,
                        destination=destination,
                        reqid=7,
                    )
                )
            self.add_sa(peer, direction, **changes)

    def add_sa(self, peer: End, direction: Direction, spi: int = 0xC0DE0000, **changes: Any) -> None:
        order = 1 if direction is Direction.OUT else -1
        source, destination = (OUTER[self.number], OUTER[peer.number])[::order]
        sender = self.number if direction is Direction.OUT else peer.number
        arguments: dict[str, Any] = {
            "spi": spi + sender,
            "source": source,
            "destination": destination,
            "direction": direction,
            "encryption": Encr.AES_GCM_16,
            "encryption_key": KEYS[sender] if spi == 0xC0DE0000 else bytes((spi + sender & 0xFF,)) * 20,
            "replay_window": 1024,
            "reqid": 7,
            "encapsulation": UDPEncapsulation(local_port=self.port, remote_port=peer.port),
            **changes,
        }
        self.ids[spi + sender] = self.ipsec.add_sa(SecurityAssociation(**arguments))

    def socket(self, kind: int, version: int = 4) -> socket.socket:
        """Return a socket at the inner address."""

        def make() -> socket.socket:
            made = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, kind)
            made.settimeout(20)
            made.bind((self.inner[version], 0))
            return made

        return elsewhere(self.namespace, make)

    def close(self) -> None:
        self.endpoint.close()
        self.ipsec.close()
        self.sock.close()
        os.close(self.namespace)


@contextlib.contextmanager
def tunnel(path: str, *, install: bool = True, **options: Any) -> Iterator[tuple[End, End]]:
    set_up("lo")
    with contextlib.ExitStack() as stack:
        near = End(0, path, **options)
        stack.callback(near.close)
        far = End(1, path)
        stack.callback(far.close)
        if install:
            near.install(far)
            far.install(near)
        yield near, far


def transfer(sender: End, receiver: End, data: bytes, version: int = 4) -> None:
    """Send `data` by TCP, and see that it arrives."""
    with receiver.socket(socket.SOCK_STREAM, version) as listener:
        listener.listen()
        with sender.socket(socket.SOCK_STREAM, version) as client:
            client.connect(listener.getsockname()[:2])
            accepted, _ = listener.accept()
            with accepted:
                accepted.settimeout(20)

                def send() -> None:
                    client.sendall(data)
                    client.shutdown(socket.SHUT_WR)

                thread = threading.Thread(target=send)
                thread.start()
                got = b"".join(iter(lambda: accepted.recv(1 << 20), b""))
                thread.join()
                assert got == data


@contextlib.contextmanager
def datagrams(sender: End, receiver: End) -> Iterator[tuple[Callable[[], bool], socket.socket]]:
    """What sends a datagram and tells whether one arrived."""
    with sender.socket(socket.SOCK_DGRAM) as source, receiver.socket(socket.SOCK_DGRAM) as target:
        source.connect(target.getsockname())

        def passes() -> bool:
            source.send(b"natcompat")
            if not readable(target, 0.02):
                return False
            return target.recv(2048) == b"natcompat"

        yield passes, source


def example(near: End, far: End) -> bytes:
    """Return an inner packet."""
    from scapy.layers.inet import IP, UDP

    return bytes(IP(src=near.inner[4], dst=far.inner[4]) / UDP(sport=1, dport=2) / b"natcompat")
