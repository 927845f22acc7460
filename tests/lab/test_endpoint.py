"""The endpoint where the kernel really has ESP: the whole contract, the choice, and policies."""

from __future__ import annotations

import socket
import sys

import pytest

from natcompat import Duty, NatCompatError, Performer, open_ipsec, probe, set_nat_t_endpoint
from natcompat.ipsec import Action, Direction, Policy, TrafficSelector
from natcompat.kernel.xfrm.kernel import XfrmIPsec
from natcompat.testing import EndpointConformance
from tests.lab.topology import Network, wait_for

pytestmark = pytest.mark.kernel_esp


class TestLinux(EndpointConformance):
    """Not the socket half alone, as where there is no ESP, but the backend as it is chosen."""

    backends = ("linux",)


def test_the_kernel_is_chosen() -> None:
    (found,) = (each for each in probe() if each.backend == "linux")
    assert found.viable, found.reason
    assert found.automatic
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        endpoint = set_nat_t_endpoint(sock)
        assert endpoint.backend == "linux"
        assert endpoint.duties[Duty.DIVERT_ESP] is Performer.KERNEL
        assert endpoint.stats().bypassed is True
    with open_ipsec() as ipsec:
        assert isinstance(ipsec, XfrmIPsec)


def test_user_space_keeps_esp_that_is_wanted_in_this_process() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        assert set_nat_t_endpoint(sock, esp=lambda packet, source: None).backend == "userspace"
    with (
        socket.socket(type=socket.SOCK_DGRAM) as sock,
        pytest.raises(NatCompatError, match="the kernel, so the process cannot have it"),
    ):
        set_nat_t_endpoint(sock, backend="linux", esp=lambda packet, source: None)


@pytest.mark.parametrize("version", [4, 6], ids=["IPv4", "IPv6"])
def test_an_endpoint_is_exempt_from_policies(network: Network, version: int) -> None:
    """A policy that blocks UDP blocks plain sockets, and neither IKE nor ESP-in-UDP of an endpoint."""
    near, far = network.initiator, network.responder
    source, destination = (near.address, far.address) if version == 4 else (near.address6, far.address6)
    everything = "0.0.0.0/0" if version == 4 else "::/0"
    selector = TrafficSelector(source=everything, destination=everything, protocol=socket.IPPROTO_UDP)
    for direction in Direction:
        far.ipsec.add_policy(Policy(direction=direction, selector=selector, action=Action.DISCARD))
    with near.udp(source) as peer, far.udp(destination, encap=False) as sock:
        set_nat_t_endpoint(peer, backend="linux")
        before = far.statistic("XfrmInPolBlock")
        peer.sendto(b"blocked", (destination, 4500))
        wait_for("the policy to block", lambda: far.statistic("XfrmInPolBlock") > before)
        endpoint = set_nat_t_endpoint(sock, backend="linux")
        assert endpoint.stats().bypassed is True
        peer.sendto(b"request", (destination, 4500))
        message, address = sock.recvfrom(100)
        assert message == b"request"
        sock.sendto(b"response", address)
        assert peer.recv(100) == b"response"
        endpoint.close()
        with pytest.raises(PermissionError):
            sock.sendto(b"blocked again", address)


def test_without_privilege_an_endpoint_says_that_policies_hold(network: Network) -> None:
    """The kernel's part is to be had without CAP_NET_ADMIN, the exemption is not."""
    program = (
        "import ctypes, os, socket\n"
        "from natcompat import probe, set_nat_t_endpoint\n"
        "probe()  # imports what another user may not read\n"
        "os.setuid(65534)\n"
        "with socket.socket(type=socket.SOCK_DGRAM) as sock:\n"
        "    stats = set_nat_t_endpoint(sock, backend='linux').stats()\n"
        "    print(stats.mode, stats.bypassed)"
    )
    assert network.responder.run(sys.executable, "-c", program).stdout == "filter False\n"
