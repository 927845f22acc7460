"""An endpoint's socket is exempt from the policies of user-space IPsec, or the call that needs it fails."""

from __future__ import annotations

import errno
import os
import socket
import threading
from collections.abc import Callable
from functools import partial

import pytest

from natcompat import NatCompatError, get_nat_t_endpoint, open_ipsec, set_nat_t_endpoint
from natcompat.esp.device.routes import MARK
from natcompat.ipsec import Action, Direction, Policy, TrafficSelector
from tests.support.linux import LINUX, isolated, set_up, udp
from tests.support.tun import TUN

pytestmark = [LINUX, TUN]

EVERYTHING = TrafficSelector(source="0.0.0.0/0", destination="0.0.0.0/0")
DISCARD = Policy(direction=Direction.OUT, selector=EVERYTHING, action=Action.DISCARD)
BYPASS = Policy(direction=Direction.OUT, selector=EVERYTHING, action=Action.BYPASS)


def mark_of(sock: socket.socket) -> int:
    return sock.getsockopt(socket.SOL_SOCKET, socket.SO_MARK)


def give_up_privileges() -> None:
    os.setresgid(65534, 65534, 65534)
    os.setresuid(65534, 65534, 65534)


def ignore(packet: memoryview, source: object) -> None:
    """Take ESP and do nothing with it."""


@isolated(network=True)
def test_without_the_privilege_the_option_is_refused_while_a_policy_takes_packets() -> None:
    set_up("lo")
    with open_ipsec("userspace") as ipsec, udp() as before, udp() as sock:
        set_nat_t_endpoint(before, backend="userspace")
        ipsec.add_policy(DISCARD)
        give_up_privileges()
        with pytest.raises(NatCompatError) as caught:
            set_nat_t_endpoint(sock, backend="userspace:in-line")
        assert caught.value.errno == errno.EPERM
        assert "exempted" in str(caught.value)
        assert "CAP_NET_ADMIN" in caught.value.remedy
        assert type(sock) is socket.socket
        assert get_nat_t_endpoint(sock) is None
        with before.dup() as duplicate:  # the exemption from before stays
            assert mark_of(duplicate) == MARK
        set_nat_t_endpoint(before, backend="userspace", esp=ignore)
        assert mark_of(before) == MARK


@isolated(network=True)
@pytest.mark.parametrize("policy", [None, BYPASS], ids=["no policy", "BYPASS"])
def test_without_the_privilege_and_such_a_policy_the_option_is_set(policy: Policy | None) -> None:
    set_up("lo")
    with open_ipsec("userspace") as ipsec, udp() as sock:
        if policy is not None:
            ipsec.add_policy(policy)
        give_up_privileges()
        assert set_nat_t_endpoint(sock, backend="userspace:in-line").mode == "in line"
        with pytest.raises(NatCompatError):
            ipsec.add_policy(DISCARD)


@isolated(network=True)
def test_the_exemption_lasts_while_the_option_is_on() -> None:
    set_up("lo")
    with socket.socket(type=socket.SOCK_DGRAM) as sock:
        endpoint = set_nat_t_endpoint(sock, backend="userspace")
        assert mark_of(sock) == 0
        with open_ipsec("userspace"):
            assert mark_of(sock) == MARK, "before bind"
            sock.bind(("127.0.0.1", 0))
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_MARK, 7)
            assert mark_of(sock) == MARK | 7
            set_nat_t_endpoint(sock, backend="userspace:in-line")
            set_nat_t_endpoint(sock, esp=ignore)
            assert mark_of(sock) == MARK | 7, "the socket of an endpoint with another consumer, too"
            with sock.dup():
                pass
            assert mark_of(sock) == MARK | 7
            endpoint.close()
            assert mark_of(sock) == 7
            set_nat_t_endpoint(sock, backend="userspace")
            assert mark_of(sock) == MARK | 7
        assert mark_of(sock) == 7, "after the end of IPsec"


@isolated(network=True)
def test_the_socket_is_exempt_while_it_is_attached_anew() -> None:
    set_up("lo")
    seen: set[int] = set()
    with open_ipsec("userspace"), udp() as sock, socket.socket(fileno=os.dup(sock.fileno())) as alias:
        set_nat_t_endpoint(sock, backend="userspace")
        done = threading.Event()

        def watch() -> None:
            while not done.is_set():
                seen.add(mark_of(alias))

        thread = threading.Thread(target=watch)
        thread.start()
        port = sock.getsockname()[1]
        changes: list[Callable[[], object]] = [
            partial(set_nat_t_endpoint, sock, backend="userspace:in-line"),
            partial(set_nat_t_endpoint, sock, backend="userspace"),
            partial(sock.connect, ("127.0.0.1", port)),
            partial(sock.setsockopt, socket.SOL_SOCKET, socket.SO_REUSEPORT, 1),
            partial(sock.setsockopt, socket.SOL_SOCKET, socket.SO_REUSEPORT, 0),
        ]
        for _ in range(20):
            for change in changes:
                change()
        done.set()
        thread.join()
    assert seen == {MARK}


@isolated(network=True)
def test_a_forked_child_leaves_the_exemption_of_its_parent() -> None:
    set_up("lo")
    with open_ipsec("userspace"), udp() as sock:
        endpoint = set_nat_t_endpoint(sock, backend="userspace")
        pid = os.fork()
        if not pid:
            endpoint.close()
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
        assert mark_of(sock) == MARK
