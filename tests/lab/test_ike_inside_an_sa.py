"""IKE that arrives inside an SA for a socket with the option is dropped and counted, as Solaris does.

Its kstat is esp_nat_t_ipsec (ip_input.c). On Linux the kernel drops IKE of tunnel-mode SAs, and the socket
filter IKE of transport-mode SAs.
"""

from __future__ import annotations

import contextlib
import socket
from typing import Any

import pytest

from natcompat import NON_ESP_MARKER, set_nat_t_endpoint
from natcompat.ipsec import (
    Direction,
    Encr,
    Integ,
    Mode,
    Policy,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)
from tests.lab.topology import Host, Network, inside, wait_for

pytestmark = pytest.mark.kernel_esp

# other ports than those of the tests of NAT: the router remembers flows
IKE_PORT, ESP_PORT = 4600, 4601
PORTS = UDPEncapsulation(local_port=ESP_PORT, remote_port=ESP_PORT)
TRANSFORMS: dict[str, dict[str, Any]] = {
    "AES-GCM": {"encryption": Encr.AES_GCM_16, "encryption_key": bytes(range(20))},
    "NULL": {  # no IV: as little of the old header stays as can be
        "encryption": Encr.NULL,
        "encryption_key": b"",
        "integrity": Integ.HMAC_SHA2_256_128,
        "integrity_key": bytes(range(32)),
    },
}


def install(
    sender: Host, receiver: Host, addresses: tuple[str, str], mode: Mode, encapsulated: bool, transform: str
) -> None:
    """Install one SA from `sender` to `receiver` for all UDP between them but that of ESP-in-UDP."""
    source, destination = addresses
    tunnel: dict[str, Any] = {"source": source, "destination": destination} if mode is Mode.TUNNEL else {}
    for host, direction in ((sender, Direction.OUT), (receiver, Direction.IN)):
        host.ipsec.add_sa(
            SecurityAssociation(
                spi=0x4321,
                source=source,
                destination=destination,
                direction=direction,
                mode=mode,
                reqid=1,
                encapsulation=PORTS if encapsulated else None,
                **TRANSFORMS[transform],
            )
        )
        host.ipsec.add_policy(
            Policy(
                direction=direction,
                mode=mode,
                selector=TrafficSelector(source=source, destination=destination, protocol=17),
                reqid=1,
                optional=direction is Direction.IN,  # IKE outside of the SA comes, too
                **tunnel,
            )
        )


def bound(host: Host, address: str, port: int) -> socket.socket:
    with inside(host.name):
        sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((address, port))
    sock.settimeout(5)
    return sock


@pytest.mark.parametrize("transform", list(TRANSFORMS))
@pytest.mark.parametrize("encapsulated", [False, True], ids=["ESP", "ESP in UDP"])
@pytest.mark.parametrize("mode", list(Mode), ids=lambda mode: mode.value)
@pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
def test_ike_inside_an_sa_is_dropped_and_counted(
    network: Network, version: int, mode: Mode, encapsulated: bool, transform: str
) -> None:
    sender, receiver = network.responder, network.second
    addresses = (sender.address, receiver.address) if version == 4 else (sender.address6, receiver.address6)
    install(sender, receiver, addresses, mode, encapsulated, transform)
    with contextlib.ExitStack() as stack:
        if encapsulated:
            for host, address in zip((sender, receiver), addresses, strict=True):
                stack.enter_context(host.udp(address, ESP_PORT))
        sock = stack.enter_context(bound(receiver, addresses[1], IKE_PORT))
        control = stack.enter_context(bound(receiver, addresses[1], 7777))
        peer = stack.enter_context(bound(sender, addresses[0], IKE_PORT))
        with inside(receiver.name):
            endpoint = set_nat_t_endpoint(sock, backend="linux")
        for payload in (b"control", b"another control"):
            peer.sendto(payload, control.getsockname())
            assert control.recv(100) == payload, "the SA works"

        def dropped() -> int:
            return receiver.statistic("XfrmInTmplMismatch") + (endpoint.stats().dropped_in_kernel or 0)

        before = dropped()
        for size in (0, 1, 100, 1000):
            peer.sendto(NON_ESP_MARKER + b"IKE inside ESP".ljust(size), (addresses[1], IKE_PORT))
        wait_for("the drops", lambda: dropped() >= before + 4)
        with inside(sender.name):  # the same peer, outside of the SA
            sender.ipsec.flush_policies()
        for size in (14, 100, 1000, 5000):
            peer.sendto(NON_ESP_MARKER + b"IKE outside ESP".ljust(size), (addresses[1], IKE_PORT))
            assert sock.recv(10_000) == b"IKE outside ESP".ljust(size)
        assert endpoint.stats().ike == 4
