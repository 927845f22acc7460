"""A device in another network namespace than the sockets of ESP."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from natcompat import open_ipsec
from natcompat.errors import NatCompatError
from natcompat.esp.device.namespace import Namespace
from tests.support.linux import LINUX, isolated, nothing_left
from tests.support.tun import TUN, interfaces
from tests.support.wire import FAR, NEAR, PEER, STRANGER, policy, protected, send, sh, wait_for

pytestmark = [LINUX, TUN]

NAME = f"natcompat-test-{os.getpid()}"


@contextmanager
def namespace() -> Iterator[str]:
    """A namespace of `ip netns` with an uplink of its own; its name."""
    sh(f"ip netns add {NAME}")
    try:
        sh(f"ip -n {NAME} link set lo up", f"ip -n {NAME} link add eth0 type veth peer name wire")
        sh(f"ip -n {NAME} link set eth0 up", f"ip -n {NAME} link set wire up")
        sh(f"ip -n {NAME} addr add 198.18.0.1/24 dev eth0", f"ip -n {NAME} route add default dev eth0")
        yield NAME
    finally:
        sh(f"ip netns del {NAME}")


@pytest.mark.parametrize("how", ["name", "path", "descriptor"])
@isolated(network=True)
def test_programs_in_the_namespace_are_protected_and_esp_leaves_here(how: str) -> None:
    with namespace() as name:
        path = f"/run/netns/{name}"
        descriptor = os.open(path, os.O_RDONLY)
        netns = {"name": name, "path": path, "descriptor": descriptor}[how]
        inside = Namespace(name)
        with protected(netns=netns) as (host, ipsec):
            os.close(descriptor)
            ipsec.add_policy(policy())
            assert interfaces() == {"lo", "eth0", "wire", "lan0", "lan"}
            assert "natcompat0" in sh(f"ip -n {name} link")
            assert "natcompat-" in sh(f"ip netns exec {name} nft list tables")
            assert "natcompat-" not in sh("nft list tables"), "this namespace is left alone"
            assert "proto 78" not in sh("ip rule")
            assert inside.call(lambda: send(FAR[4])) == 3
            assert {seen.destination for seen in host.left()} == {PEER}
            sh(f"ip -n {name} rule flush", f"ip -n {name} rule add priority 32766 lookup main")
            wait_for(lambda: "proto 78" in sh(f"ip -n {name} rule"), "put back")
            ipsec.remove_address(NEAR[4])
            ipsec.add_address("10.1.0.2/32")
            inside.call(lambda: send(FAR[4]))
            assert {seen.destination for seen in host.left()} == {PEER}
            inside.call(lambda: send(STRANGER[4]))
            assert host.left(0.05) == []
            ipsec.delete_policy(policy())
        assert "proto 78" not in sh(f"ip -n {name} rule")
        assert "natcompat" not in sh(f"ip netns exec {name} nft list tables", f"ip -n {name} link")
        inside.close()


@isolated(network=True)
def test_what_is_no_namespace_is_refused_and_nothing_is_left() -> None:
    with nothing_left():
        with pytest.raises(NatCompatError, match="ip netns add") as caught:
            open_ipsec("userspace", netns="there-is-none")
        assert caught.value.errno == errno.ENOENT
        with socket.socket() as sock, pytest.raises(NatCompatError, match="cannot be entered") as caught:
            open_ipsec("userspace", netns=sock.fileno())
        assert caught.value.errno == errno.EINVAL
