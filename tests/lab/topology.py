"""The network of the lab: two initiators behind one NAT router, and a responder in the open.

    initiator 192.168.1.2 -- 192.168.1.1 \\
                                           router (NAT) 203.0.113.1 -- 203.0.113.2 responder
    second    192.168.2.2 -- 192.168.2.1 /

Inside addresses, for tunnels: 10.1.0.1 and fd00:1::1 (initiator), 10.1.0.2 and fd00:1::2 (second),
10.2.0.1 and fd00:2::1 (responder). Outside IPv6 (not translated): fd01::2, fd03::2, and fd02::2.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TypeVar

from natcompat.kernel.xfrm.events import XfrmEvents
from natcompat.kernel.xfrm.kernel import XfrmIPsec
from natcompat.kernel.xfrm.probe import UDP_ENCAP, UDP_ENCAP_ESPINUDP

CLONE_NEWNET = 0x40000000  # linux/sched.h
_libc = ctypes.CDLL(None, use_errno=True)

Found = TypeVar("Found")

SETUP = """
for host in initiator second router responder; do
  ip netns add $host
  ip -n $host link set lo up
done
link() {  # host, its interface, router's interface, network prefix
  ip link add $2 netns $1 type veth peer name $3 netns router
  ip -n $1 addr add $4.2/24 dev $2; ip -n router addr add $4.1/24 dev $3
  ip -n $1 addr add $5::2/64 dev $2 nodad; ip -n router addr add $5::1/64 dev $3 nodad
  ip -n $1 link set $2 up; ip -n router link set $3 up
  ip -n $1 route add default via $4.1; ip -n $1 route add default via $5::1
}
link initiator lan one 192.168.1 fd01
link second lan two 192.168.2 fd03
link responder wan out 203.0.113 fd02
inside() {  # host, number, peer's network, gateways
  ip -n $1 addr add 10.$2 dev lo; ip -n $1 addr add fd00:$3 dev lo nodad
}
inside initiator 1.0.1/32 1::1/128
inside second 1.0.2/32 1::2/128
inside responder 2.0.1/32 2::1/128
ip -n initiator route add 10.2.0.0/24 via 192.168.1.1 src 10.1.0.1
ip -n second route add 10.2.0.0/24 via 192.168.2.1 src 10.1.0.2
ip -n responder route add 10.1.0.0/24 via 203.0.113.1 src 10.2.0.1
ip -n initiator route add fd00:2::/64 via fd01::1 src fd00:1::1
ip -n second route add fd00:2::/64 via fd03::1 src fd00:1::2
ip -n responder route add fd00:1::/64 via fd02::1 src fd00:2::1
ip netns exec router sysctl -qw net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1
"""


def iptables() -> str:
    """Return the iptables that works with this kernel: the guest has no nftables."""
    return shutil.which("iptables-legacy", path="/usr/sbin:/sbin:/usr/bin") or "iptables"


def wait_for(what: str, condition: Callable[[], Found], limit: float = 10.0) -> Found:
    """Ask `condition` until it is true, return what it says; fail after `limit` seconds."""
    end = time.monotonic() + limit
    while True:
        answer = condition()
        if answer:
            return answer
        if time.monotonic() > end:
            raise AssertionError(f"waited {limit} seconds for {what}")
        time.sleep(0.02)


@contextmanager
def inside(name: str) -> Iterator[None]:
    """Be in the network namespace `name`, this thread only: sockets made here stay there."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    after = os.open(f"/run/netns/{name}", os.O_RDONLY)
    try:
        if _libc.setns(after, CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "setns")
        yield
    finally:
        _libc.setns(before, CLONE_NEWNET)
        os.close(before)
        os.close(after)


@dataclass
class Host:
    """One machine of the network, with its IPsec."""

    name: str
    address: str
    address6: str
    inner: str
    inner6: str
    ipsec: XfrmIPsec = field(init=False)

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program on this host."""
        return subprocess.run(
            ["ip", "netns", "exec", self.name, *command], capture_output=True, text=True, check=check
        )

    def ping(self, address: str, *options: str, count: int = 3) -> int:
        """Return how many of `count` pings were answered."""
        command = ["ping", "-c", str(count), "-i", "0.1", "-W", "2", *options, address]
        output = self.run(*command, check=False).stdout
        return sum("bytes from" in line for line in output.splitlines())

    def udp(self, address: str = "", port: int = 4500, *, encap: bool = True) -> socket.socket:
        """Return a bound UDP socket of this host, by default one that hands ESP to the kernel."""
        address = address or self.address
        with inside(self.name):
            sock = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        if encap:
            sock.setsockopt(socket.IPPROTO_UDP, UDP_ENCAP, UDP_ENCAP_ESPINUDP)
        sock.bind((address, port))
        sock.settimeout(5)
        return sock

    def tcp(self) -> socket.socket:
        """Return a TCP socket of this host."""
        with inside(self.name):
            sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        sock.settimeout(10)
        return sock

    def events(self) -> XfrmEvents:
        """Listen to the events of this host."""
        with inside(self.name):
            return self.ipsec.events()

    def statistic(self, name: str) -> int:
        """Return a counter of /proc/net/xfrm_stat."""
        for line in self.run("cat", "/proc/net/xfrm_stat").stdout.splitlines():
            if line.split()[0] == name:
                return int(line.split()[1])
        raise KeyError(name)


class Network:
    """The hosts, and the NAT between them."""

    def __init__(self) -> None:
        subprocess.run(["sh", "-ec", SETUP], check=True)
        self.initiator = Host("initiator", "192.168.1.2", "fd01::2", "10.1.0.1", "fd00:1::1")
        self.second = Host("second", "192.168.2.2", "fd03::2", "10.1.0.2", "fd00:1::2")
        self.responder = Host("responder", "203.0.113.2", "fd02::2", "10.2.0.1", "fd00:2::1")
        self.hosts = (self.initiator, self.second, self.responder)
        self._ports = ""
        self.nat("20000-20999")

    def nat(self, ports: str) -> None:
        """Translate UDP to `ports` of 203.0.113.1 from now on; forget all mappings there were."""
        rule = ["-t", "nat", "POSTROUTING", "-o", "out", "-j", "MASQUERADE"]
        for action, which in (("-D", self._ports), ("-A", ports)):
            if which:
                rest = [*rule[3:], "-p", "udp", "--to-ports", which]
                self.router(iptables(), "-t", "nat", action, "POSTROUTING", *rest)
        self._ports = ports
        self.router("conntrack", "-F", check=False)

    def router(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program on the router."""
        return subprocess.run(
            ["ip", "netns", "exec", "router", *command], capture_output=True, text=True, check=check
        )

    def open(self) -> None:
        """Open IPsec on every host, with empty databases."""
        for host in self.hosts:
            with inside(host.name):
                host.ipsec = XfrmIPsec()
            host.ipsec.flush_policies()
            host.ipsec.flush_sas()

    def close(self) -> None:
        """Empty the databases and close IPsec."""
        for host in self.hosts:
            host.ipsec.flush_policies()
            host.ipsec.flush_sas()
            host.ipsec.close()

    def remove(self) -> None:
        """Remove the namespaces."""
        for name in ("initiator", "second", "router", "responder"):
            subprocess.run(["ip", "netns", "delete", name], check=False)
