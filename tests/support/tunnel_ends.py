"""Both ends of a tunnel with real sockets and the ESP of this process at each."""

from __future__ import annotations

import contextlib
import os
import socket
from dataclasses import dataclass
from typing import Any

from natcompat import NatTEndpoint, set_nat_t_endpoint
from natcompat.backends.base import Backend
from natcompat.esp.device.queue import QueueDevice
from natcompat.esp.userspace import UserspaceIPsec
from natcompat.ipsec import (
    Direction,
    Encr,
    IPsec,
    Policy,
    SaId,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)
from natcompat.ipsec.device import PacketDevice
from tests.support.esp import NETWORKS, inner

LOCALHOST = {4: ("127.0.0.1", "127.0.0.2"), 6: ("::1", "::1")}
"""Outer addresses of the near and the far end on one host, by IP version."""
SPIS = (0xC0DE0001, 0xC0DE0002)
KEYS = (os.urandom(20), os.urandom(20))
"""By direction: from near to far, from far to near. New ones for each run of the tests."""


def install(
    ipsec: IPsec,
    *,
    near: bool,
    addresses: tuple[str, ...],
    local_port: int,
    remote_port: int,
    inner_version: int = 4,
    keys: tuple[bytes, bytes] = KEYS,
    **changes: Any,
) -> dict[Direction, SaId]:
    """Install the SAs and policies of one end. `addresses`: this end's and the other's, as it sees them."""
    networks = NETWORKS[inner_version][:: 1 if near else -1]
    ids = {}
    for direction in Direction:
        order = 1 if direction is Direction.OUT else -1
        source, destination = addresses[::order]
        inside = networks[::order]
        to_far = near is (direction is Direction.OUT)
        ipsec.add_policy(
            Policy(
                direction=direction,
                selector=TrafficSelector(source=inside[0], destination=inside[1]),
                source=source,
                destination=destination,
                reqid=7,
            )
        )
        arguments: dict[str, Any] = {
            "spi": SPIS[0 if to_far else 1],
            "source": source,
            "destination": destination,
            "direction": direction,
            "encryption": Encr.AES_GCM_16,
            "encryption_key": keys[0 if to_far else 1],
            "reqid": 7,
            "encapsulation": UDPEncapsulation(local_port=local_port, remote_port=remote_port),
            **changes,
        }
        if direction is Direction.IN:
            arguments.pop("nat_keepalive", None)
        ids[direction] = ipsec.add_sa(SecurityAssociation(**arguments))
    return ids


@dataclass
class End:
    """One end: a socket with the option, and the IPsec behind it."""

    sock: socket.socket
    endpoint: NatTEndpoint
    ipsec: UserspaceIPsec
    ids: dict[Direction, SaId]

    @property
    def device(self) -> QueueDevice:
        """The queues of this end."""
        assert isinstance(self.ipsec.device, QueueDevice)
        return self.ipsec.device


def udp_socket(stack: contextlib.ExitStack, host: str, port: int = 0) -> socket.socket:
    """Return a bound socket, closed at the end."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    sock = stack.enter_context(socket.socket(family, socket.SOCK_DGRAM))
    sock.settimeout(10)
    sock.bind((host, port))
    return sock


def two_ends(
    stack: contextlib.ExitStack,
    *,
    version: int = 4,
    inner_version: int = 4,
    backends: tuple[str | Backend, str | Backend] = ("userspace", "userspace"),
    bind: tuple[str, str] | None = None,
    devices: tuple[PacketDevice, PacketDevice] | None = None,
    follow_mapping: bool = False,
    **changes: Any,
) -> tuple[End, End]:
    """Return the ends of a tunnel over loopback, the near one and the far one, in this process."""
    addresses = LOCALHOST[version]
    socks = [udp_socket(stack, host) for host in bind or addresses]
    ports = [sock.getsockname()[1] for sock in socks]
    ends = []
    for index, sock in enumerate(socks):
        device = devices[index] if devices else QueueDevice()
        ipsec = stack.enter_context(UserspaceIPsec(device, follow_mapping=follow_mapping))
        endpoint = set_nat_t_endpoint(sock, backend=backends[index], esp=ipsec)
        ids = install(
            ipsec,
            near=index == 0,
            addresses=addresses[:: 1 if index == 0 else -1],
            local_port=ports[index],
            remote_port=ports[1 - index],
            inner_version=inner_version,
            **changes,
        )
        ends.append(End(sock, endpoint, ipsec, ids))
    return ends[0], ends[1]


def question(version: int = 4, payload: bytes | None = None, **changes: Any) -> bytes:
    """Return an inner packet from behind the near end to behind the far one."""
    return inner(version, payload, **changes)
