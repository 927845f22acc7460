"""Inner addresses under the kernel's ESP: in any order with the policies, preferred as source, never left."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from ipaddress import ip_address

import pytest

from natcompat import NatCompatError
from natcompat.ike import ChildSa, IkeSelector
from natcompat.ipsec import Encr
from natcompat.kernel.xfrm.kernel import XfrmIPsec
from tests.lab.topology import Host, Network, inside, wait_for

pytestmark = pytest.mark.kernel_esp

VIRTUAL, VIRTUAL6 = "10.9.0.10", "fd00:9::10"


def addresses(host: Host) -> str:
    return host.run("ip", "-o", "addr").stdout


def rules(host: Host) -> list[str]:
    lines = host.run("ip", "rule").stdout.splitlines() + host.run("ip", "-6", "rule").stdout.splitlines()
    return [line for line in lines if line.startswith("4499:")]


def source_to(host: Host, destination: str) -> str:
    words = host.run("ip", "route", "get", destination).stdout.split()
    return words[words.index("src") + 1]


class Client:
    """The initiator with a virtual address and everything behind the responder, as a road warrior has it."""

    def __init__(self, network: Network) -> None:
        self.host, self.gateway = network.initiator, network.responder
        self.sockets = [self.host.udp(), self.gateway.udp()]
        self.host.ipsec.bypass(self.sockets[0])
        self.gateway.ipsec.bypass(self.sockets[1])
        self.sockets[0].sendto(bytes(4) + b"IKE", (self.gateway.address, 4500))
        self.mapping: tuple[str, int] = self.sockets[1].recvfrom(100)[1]

    def install(self, virtual: str, everything: str) -> tuple[ChildSa, ChildSa]:
        keymat = os.urandom(40)
        ends = IkeSelector.of(virtual), IkeSelector.of(everything)
        here, there = (self.host.address, 4500), (self.gateway.address, 4500)
        common = {"encryption": Encr.AES_GCM_16, "keymat": keymat, "reqid": 7, "nat": True}
        spis = 0x1000 + len(virtual), 0x2000 + len(virtual)
        gateway = ChildSa.install(
            self.gateway.ipsec,
            local=there,
            remote=self.mapping,
            spi_in=spis[1],
            spi_out=spis[0],
            initiator=False,
            selectors=[ends[::-1]],
            **common,  # type: ignore[arg-type]
        )
        host = ChildSa.install(
            self.host.ipsec,
            local=here,
            remote=there,
            spi_in=spis[0],
            spi_out=spis[1],
            initiator=True,
            selectors=[ends],
            **common,  # type: ignore[arg-type]
        )
        return host, gateway


@pytest.fixture
def client(network: Network) -> Iterator[Client]:
    network.nat("20000-20999")
    made = Client(network)
    yield made
    for sock in made.sockets:
        sock.close()


@pytest.mark.parametrize("address_first", [True, False])
@pytest.mark.parametrize(
    ("virtual", "everything", "server"),
    [(VIRTUAL, "0.0.0.0/0", "10.2.0.1"), (VIRTUAL6, "::/0", "fd00:2::1")],
    ids=["IPv4", "IPv6"],
)
def test_a_client_with_a_default_route(
    client: Client, address_first: bool, virtual: str, everything: str, server: str
) -> None:
    host = client.host
    with inside(host.name):
        if address_first:
            host.ipsec.add_address(virtual)
        child, gateway = client.install(virtual, everything)
        if not address_first:
            host.ipsec.add_address(virtual)
    assert wait_for("the address", lambda: source_to(host, server) == virtual)
    assert host.ping(server) == 3
    assert child.outbound is not None
    assert host.ipsec.get_sa(child.outbound).packets == 3
    assert source_to(host, client.gateway.address) == host.address  # outer packets, and IKE
    client.sockets[0].sendto(bytes(4) + b"IKE", (client.gateway.address, 4500))
    assert client.sockets[1].recvfrom(100)[1] == client.mapping
    child.delete()
    gateway.delete()
    assert source_to(host, "10.2.0.1") != virtual  # the routes followed the policies
    host.ipsec.remove_address(virtual)
    assert virtual not in addresses(host)
    assert rules(host) == []


def test_addresses_end_with_ipsec_and_after_a_kill(client: Client) -> None:
    host = client.host
    with inside(host.name):
        with XfrmIPsec() as other:
            other.add_address(f"{VIRTUAL}/24")
            assert f"{VIRTUAL}/24" in addresses(host)
        assert VIRTUAL not in addresses(host)
        program = f"""
import time
from natcompat.kernel.xfrm.kernel import XfrmIPsec
ipsec = XfrmIPsec()
ipsec.add_address("{VIRTUAL}")
print("ready", flush=True)
time.sleep(60)
"""
        process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        assert VIRTUAL in addresses(host)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        wait_for("the interface to go", lambda: VIRTUAL not in addresses(host))
        host.ipsec.add_address(VIRTUAL)  # takes the rules away that were left
        assert len(rules(host)) == 2
        host.ipsec.remove_address(VIRTUAL)
    assert rules(host) == []


def test_errors_change_nothing(client: Client) -> None:
    host = client.host
    with inside(host.name):
        host.ipsec.add_address(VIRTUAL)
        before = addresses(host)
        with pytest.raises(NatCompatError) as caught:
            host.ipsec.add_address(ip_address(VIRTUAL))
        assert caught.value.errno == errno.EEXIST
        with pytest.raises(NatCompatError) as caught:
            host.ipsec.remove_address("10.9.0.11")
        assert caught.value.errno == errno.EADDRNOTAVAIL
        assert addresses(host) == before
        host.ipsec.remove_address(VIRTUAL)
    with pytest.raises(NatCompatError, match="another network namespace") as caught:
        host.ipsec.add_address(VIRTUAL)
    assert caught.value.errno == errno.EINVAL
    assert rules(host) == []
