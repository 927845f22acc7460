"""What `XfrmIPsec` and `PfKeyIPsec` over af_key do alike, against a real kernel."""

from __future__ import annotations

import errno
import subprocess
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeAlias

import pytest

import natcompat
from natcompat.errors import NatCompatError
from natcompat.ipsec import Direction, EventsLost, Expire, Lifetime, UDPEncapsulation
from natcompat.kernel.pfkey.kernel import PfKeyIPsec
from natcompat.kernel.xfrm.kernel import XfrmIPsec
from tests.kernel.xfrm.test_probe import as_nobody
from tests.lab.making import PORTS, emptied, modest, open_pfkey, refused, tunnel
from tests.lab.topology import wait_for

pytestmark = pytest.mark.kernel_esp

Either: TypeAlias = XfrmIPsec | PfKeyIPsec
Opener: TypeAlias = Callable[[], Either]


@pytest.fixture(params=[XfrmIPsec, open_pfkey], ids=["XFRM", "PF_KEY"])
def opener(request: pytest.FixtureRequest) -> Opener:
    opener: Opener = request.param
    return opener


@pytest.fixture
def either(opener: Opener) -> Iterator[Either]:
    with emptied(opener()) as ipsec:
        yield ipsec


def test_a_larval_sa_of_another_process_is_completed(either: Either, opener: Opener) -> None:
    with opener() as other:
        spi = other.allocate_spi("192.0.2.1", "192.0.2.2", reqid=7)
    either.add_sa(modest(spi, direction=Direction.IN))
    assert [each.larval for each in either.list_sas()] == [False]


def test_a_reservation_outlives_the_larval_sa(either: Either) -> None:
    expires = Path("/proc/sys/net/core/xfrm_acq_expires")
    before = expires.read_text()
    expires.write_text("1")
    try:
        with either.events() as events:
            spi = either.allocate_spi("192.0.2.1", "192.0.2.2", minimum=5000, maximum=5001)
            wait_for("the larval SA to go", lambda: not either.list_sas())
            other = either.allocate_spi("192.0.2.1", "192.0.2.2", minimum=5000, maximum=5001)
            assert {spi, other} == {5000, 5001}
            error = refused(either.allocate_spi, "192.0.2.1", "192.0.2.2", minimum=5000, maximum=5001)
            assert error.errno == errno.ENOENT
            wait_for("the larval SAs to go", lambda: not either.list_sas())
            either.add_sa(modest(spi, direction=Direction.IN))
            either.add_sa(modest(other, direction=Direction.IN))
            assert len(either.list_sas()) == 2
            assert events.read() == []
    finally:
        expires.write_text(before)


def test_threads_take_turns(either: Either) -> None:
    moved: dict[str, Any] = {"encapsulation": UDPEncapsulation(local_port=4500, remote_port=99)}
    if isinstance(either, XfrmIPsec):
        moved = {"source": "192.0.2.7"}  # a deletion and an addition

    def work(number: int) -> None:
        for each in range(40):
            spi = either.allocate_spi("192.0.2.1", f"192.0.2.{10 + number}")
            sa_id = either.add_sa(modest(spi, destination=f"192.0.2.{10 + number}", encapsulation=PORTS))
            either.update_sa(sa_id, **moved)
            assert either.get_sa(sa_id).packets == 0
            if each % 2:
                either.delete_sa(sa_id)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert len(either.list_sas()) == 80


def test_no_privilege(opener: Opener) -> None:
    def attempt() -> list[Any]:
        try:
            opener()
        except NatCompatError as error:
            return [error.errno, error.remedy]
        return []

    code, remedy = as_nobody(attempt)
    assert code == errno.EPERM
    assert "CAP_NET_ADMIN" in remedy


def test_a_forked_child_is_told(either: Either) -> None:
    def attempt() -> list[Any]:
        try:
            either.flush_sas()
        except NatCompatError as error:
            return [error.errno, error.remedy]
        return []

    code, remedy = as_nobody(attempt)
    assert code == errno.EINVAL
    assert "after fork" in remedy


def test_keys_are_not_in_the_locals_of_our_frames(either: Either) -> None:
    package = str(Path(natcompat.__file__).parent)
    sa = modest(encryption_key=b"swordfish-sword!", encapsulation=PORTS)
    either.add_sa(sa)
    either.add_sa(modest(destination="192.0.2.9"))
    for error in (refused(either.add_sa, sa), refused(either.update_sa, sa.sa_id, destination="192.0.2.9")):
        stack = traceback.TracebackException.from_exception(error, capture_locals=True).stack
        shown = "".join(str(frame.locals) for frame in stack if frame.filename.startswith(package))
        assert shown
        assert "swordfish" not in shown
    if isinstance(either, PfKeyIPsec):
        assert b"swordfish" not in bytes(either._socket.buffer)


def test_a_policy_is_installed_whole_or_not_at_all(either: Either) -> None:
    command = "ip xfrm policy add src 10.2.0.0/24 dst 10.1.0.0/16 dir fwd"
    subprocess.run(command.split(), check=True)
    error = refused(either.add_policy, tunnel())
    assert error.errno == errno.EEXIST
    if isinstance(either, XfrmIPsec):
        assert "marks" in error.remedy
    assert either.list_policies() == []


def test_policies_of_others_are_left_out(either: Either) -> None:
    command = (
        "ip xfrm policy add src 10.2.0.0/24 dst 10.1.0.0/16 dir out "
        "tmpl proto ah mode transport tmpl proto esp mode transport"
    )
    subprocess.run(command.split(), check=True)
    assert either.list_policies() == []


def test_lost_events_are_said_and_found_out(either: Either) -> None:
    with either.events(receive_buffer=4096) as events:
        for number in range(60):
            either.add_sa(modest(3000 + number, lifetime=Lifetime(hard_seconds=1)))
        either.add_sa(modest(9999, lifetime=Lifetime(soft_seconds=1)))
        wait_for("the expiries", lambda: len(either.list_sas()) == 1)
        found = list(events.read())
    assert EventsLost() in found
    expired = {each.sa_id.spi for each in found if isinstance(each, Expire) and each.hard}
    assert expired == {3000 + number for number in range(60)}
    assert [each.sa_id.spi for each in found if isinstance(each, Expire) and not each.hard][-1:] == [9999]
    assert [each.sa_id.spi for each in either.list_sas()] == [9999]
