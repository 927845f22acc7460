"""The conformance suite of policies, over a TUN device, by the packets on the wire."""

from __future__ import annotations

import contextlib
import socket

import pytest

from natcompat.ipsec import IPsec
from natcompat.testing.ipsec.policies import BEHIND, CASES, ICMP, TCP, Outcome, Packet, check
from tests.support.linux import LINUX, isolated
from tests.support.tun import TUN
from tests.support.wire import PEER, US, Host, datagram, protected, send

pytestmark = [LINUX, TUN]


class TunHost:
    """A host with the userspace backend."""

    outer = (US[4], PEER)

    def __init__(self, host: Host, ipsec: IPsec) -> None:
        self._host = host
        self.ipsec: IPsec = ipsec

    def outcome(self, packet: Packet) -> Outcome:
        """Send or forward a packet; look at the uplink."""
        self._host.left(0.02)
        if packet.source == BEHIND:
            self._host.arrive(datagram(packet.source, packet.destination, packet.port), "lan0")
        elif packet.protocol == TCP:
            with socket.socket() as sock:
                sock.bind((packet.source, 0))
                sock.setblocking(False)
                sock.connect_ex((packet.destination, packet.port))
        elif packet.protocol == ICMP:
            with socket.socket(socket.AF_INET, socket.SOCK_RAW, ICMP) as sock, contextlib.suppress(OSError):
                sock.bind((packet.source, 0))
                sock.sendto(bytes((packet.port, 0, 0, 0)) + bytes(16), (packet.destination, 0))
        else:
            send(packet.destination, packet.source, packet.port, count=1)
        destinations = {seen.destination for seen in self._host.left(0.1)}
        if packet.destination in destinations:
            assert PEER not in destinations, "once"
            return Outcome.CLEAR
        return Outcome.SEALED if PEER in destinations else Outcome.DROPPED


@pytest.mark.parametrize("number", range(len(CASES)), ids=[str(case) for case in CASES])
@isolated(network=True)
def test_policies_say_what_leaves_and_how(number: int) -> None:
    with protected() as (host, ipsec):
        check(CASES[number], TunHost(host, ipsec))
