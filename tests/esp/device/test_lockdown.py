"""What is blocked when a process is killed, with lockdown and without, and what the next one makes of it."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from natcompat import open_ipsec
from natcompat.errors import NatCompatError
from natcompat.esp.device.guard import remove_stale_guards, stale_guards
from natcompat.esp.device.stale_rules import remove_stale_rules, stale_rules
from natcompat.ipsec import Direction
from tests.support.linux import LINUX, isolated
from tests.support.tun import TUN
from tests.support.wire import (
    BEHIND,
    FAR,
    NEAR,
    PEER,
    STRANGER,
    US,
    Host,
    datagram,
    outbound_sa,
    policy,
    protected,
    send,
    sh,
    wait_for,
)

pytestmark = [LINUX, TUN]


def in_a_child(body: Callable[[], object]) -> None:
    """Run `body` in a child process, which is then killed."""
    child = os.fork()
    if child == 0:
        try:
            body()
        except BaseException:  # noqa: BLE001
            import traceback

            traceback.print_exc()
            os._exit(1)
        os.kill(os.getpid(), signal.SIGKILL)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status), "the child failed"


def open_with_policies(*, lockdown: bool) -> None:
    ipsec = open_ipsec("userspace", lockdown=lockdown)
    for direction in Direction:
        for version in (4, 6):
            ipsec.add_policy(policy(direction, version))


@contextmanager
def host_with_address() -> Iterator[Host]:
    with Host() as host:
        for version in (4, 6):
            sh(f"ip addr add {NEAR[version]} dev lo")
        yield host


def passes(host: Host, version: int = 4) -> bool:
    """Tell whether what the policies cover leaves in the clear, and is forwarded into the LAN."""
    host.left(0.05)
    send(FAR[version], NEAR[version], count=1)
    out = len(host.clear(FAR[version], seconds=0.1))
    host.left(0.02, "lan0")
    host.arrive(datagram(FAR[version], BEHIND[version]))
    into = [seen for seen in host.left(0.1, "lan0") if seen.source == FAR[version]]
    assert out == len(into), "both or neither"
    return bool(out)


@isolated(network=True)
def test_without_lockdown_nothing_is_left_of_a_killed_process() -> None:
    with host_with_address() as host:
        in_a_child(lambda: open_with_policies(lockdown=False))
        assert "natcompat" not in sh("nft list ruleset")
        assert stale_guards() == []
        assert passes(host)
        assert passes(host, 6)


@isolated(network=True)
def test_with_lockdown_it_stays_blocked_until_it_is_cleaned() -> None:
    with host_with_address() as host:
        in_a_child(lambda: open_with_policies(lockdown=True))
        assert not passes(host)
        assert not passes(host, 6)
        (guard,) = stale_guards()
        send(STRANGER[4], US[4], count=1)
        assert len(host.clear(STRANGER[4])) == 1
        assert remove_stale_guards() == [guard]
        assert remove_stale_rules() == 4
        assert (stale_guards(), stale_rules()) == ([], [])
        assert passes(host)


@pytest.mark.parametrize("lockdown", [True, False])
@isolated(network=True)
def test_the_next_process_takes_over_without_a_gap(lockdown: bool) -> None:
    with host_with_address() as host:
        in_a_child(lambda: open_with_policies(lockdown=True))
        with protected(host=host, address=False, lockdown=lockdown) as (_, ipsec):
            assert stale_guards() == [], "it is adopted"
            assert not passes(host), "until there are policies"
            for direction in Direction:
                ipsec.add_policy(policy(direction))
            send(FAR[4], NEAR[4], count=1)
            assert [seen.destination for seen in host.left(0.1)] == [PEER], "at once"
            assert len(sh("nft list tables").split("natcompat-")) == 3
            wait_for(lambda: len(sh("nft list tables").split("natcompat-")) == 2, "the old one goes", 4)
            host.left(0.05)
            send(FAR[6], NEAR[6], count=1)
            assert len(host.clear(FAR[6])) == 1, "this one has no policy for it"
        assert passes(host) is not lockdown, "closing with policies keeps them under lockdown"
        assert len(remove_stale_guards()) == lockdown
        assert passes(host)


@isolated(network=True)
def test_flushing_before_the_close_ends_lockdown() -> None:
    with host_with_address() as host:
        with protected(host=host, address=False, lockdown=True) as (_, ipsec):
            ipsec.add_policy(policy())
            assert sh("nft list tables").count("natcompat-") == 1
            ipsec.flush_policies()
        assert "natcompat" not in sh("nft list ruleset")
        assert passes(host)


@isolated(network=True)
def test_a_forked_child_does_not_keep_the_guard_of_a_killed_parent() -> None:
    with host_with_address() as host:
        reading, writing = os.pipe()

        def open_and_fork() -> None:
            open_with_policies(lockdown=False)
            if os.fork() == 0:
                os.close(writing)
                os.read(reading, 1)  # lives until the test ends
                os._exit(0)

        in_a_child(open_and_fork)
        wait_for(lambda: "natcompat" not in sh("nft list ruleset"), "the table goes with the parent")
        assert passes(host)
        os.close(writing)
        os.close(reading)


def test_lockdown_is_for_a_device_of_natcompats_own() -> None:
    for options in ({"lockdown": True}, {"netns": "nowhere"}):
        with pytest.raises(NatCompatError, match='device="tun"'):
            open_ipsec("userspace", device="queue", **options)


@isolated(network=True)
def test_an_old_kernel_without_owners_is_cleaned_by_name() -> None:
    """Linux before 5.12 refuses the flag; then the table stays and the next process removes it."""
    from natcompat.esp.device import nftables

    real = nftables.new_table

    def without_owner(table: str, flags: int) -> nftables.Message:
        return real(table, flags | (1 << 20 if flags else 0))  # a flag that this kernel does not know

    with host_with_address() as host:

        def open_old() -> None:
            nftables.new_table = without_owner
            open_with_policies(lockdown=True)

        in_a_child(open_old)
        assert "flags" not in sh("nft list ruleset")
        assert not passes(host)
        assert len(remove_stale_guards()) == 1
        assert passes(host)
        nftables.new_table = without_owner
        try:
            with protected(host=host, address=False) as (_, ipsec):
                ipsec.add_policy(policy())
                sh("nft flush ruleset")
                wait_for(lambda: sh("nft list ruleset").count("natcompat-") == 1, "made again", 3)
                assert host.clear(FAR[4]) == []
                assert ipsec.host_counters()["restored"] >= 1
        finally:
            nftables.new_table = real
        assert "natcompat" not in sh("nft list ruleset")


@isolated(network=True)
def test_an_sa_goes_on_while_the_uplink_changes_its_address() -> None:
    """DHCP gives another address, and the daemon moves the SA: nothing leaves in the clear."""
    with host_with_address() as host, protected(host=host, address=False) as (_, ipsec):
        ipsec.add_policy(policy())
        sa_id = outbound_sa().sa_id
        for address in ("192.0.2.77", US[4]):
            before = US[4] if address != US[4] else "192.0.2.77"
            sh(f"ip addr del {before}/24 dev eth0", f"ip addr add {address}/24 dev eth0")
            sh("ip route replace default via 192.0.2.254 dev eth0 onlink")
            send(FAR[4], NEAR[4], count=2)
            sa_id = ipsec.update_sa(sa_id, source=address)
            send(FAR[4], NEAR[4], count=2)
            assert host.clear(FAR[4]) == []
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.connect((FAR[4], 9))
            assert sock.getsockname()[0] == NEAR[4]
