"""After SIGKILL a daemon takes over its SAs and policies in the kernel, and leaves those of others."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import subprocess
import sys

import pytest

from natcompat.ipsec import Direction, Policy, TrafficSelector
from natcompat.kernel.xfrm.kernel import XfrmIPsec
from tests.lab.making import make, refused, tunnel

pytestmark = pytest.mark.kernel_esp

DAEMON = """
import sys
from natcompat.kernel.xfrm.kernel import XfrmIPsec
from natcompat.ipsec import Direction
from tests.lab.making import make, tunnel
ipsec = XfrmIPsec()
ipsec.add_sa(make(0x2001, reqid=7))
ipsec.add_policy(tunnel(Direction.OUT, reqid=7))
ipsec.add_policy(tunnel(Direction.IN, reqid=7))
print("installed", flush=True)
sys.stdin.read()
"""


@pytest.fixture
def left_behind(ipsec: XfrmIPsec) -> None:
    """A daemon has installed an SA and two policies with reqid 7, and was killed."""
    with subprocess.Popen(
        [sys.executable, "-c", DAEMON], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as daemon:
        assert daemon.stdout is not None
        assert daemon.stdout.readline() == "installed\n"
        os.kill(daemon.pid, signal.SIGKILL)


def test_policies_take_the_place_of_those_that_were_left(ipsec: XfrmIPsec, left_behind: None) -> None:
    policy = tunnel(Direction.OUT, reqid=8)
    assert refused(ipsec.add_policy, policy).errno == errno.EEXIST
    ipsec.add_policy(policy, replace=True)
    assert ipsec.get_policy(policy).policy.reqid == 8
    inbound = tunnel(Direction.IN, reqid=8)
    ipsec.add_policy(inbound, replace=True)
    listed = subprocess.run(["ip", "xfrm", "policy"], capture_output=True, text=True, check=True).stdout
    assert (listed.count("reqid 8"), listed.count("reqid 7")) == (3, 0), "OUT, IN and FWD"


def test_a_replacement_that_fails_leaves_what_was(ipsec: XfrmIPsec, left_behind: None) -> None:
    """An outbound tunnel policy cannot be optional."""
    before = ipsec.list_policies()
    assert refused(ipsec.add_policy, tunnel(Direction.OUT, reqid=8, optional=True), replace=True)
    assert [usage.policy for usage in ipsec.list_policies()] == [usage.policy for usage in before]


def test_flushing_by_reqid_leaves_those_of_others(ipsec: XfrmIPsec, left_behind: None) -> None:
    other = make(0x3001, reqid=9)
    ipsec.add_sa(other)
    selector = TrafficSelector(source="10.3.0.0/24", destination="10.4.0.0/24")
    others: Policy = dataclasses.replace(tunnel(Direction.IN, reqid=9), selector=selector)
    ipsec.add_policy(others)
    ipsec.flush_sas(reqid=7)
    ipsec.flush_policies(reqid=7)
    assert [installed.sa_id for installed in ipsec.list_sas()] == [other.sa_id]
    assert {usage.policy.reqid for usage in ipsec.list_policies()} == {9}


def test_spis_as_bytes(ipsec: XfrmIPsec) -> None:
    spi = ipsec.allocate_spi("192.0.2.1", "192.0.2.2", minimum=b"\0\0\x10\0", maximum=b"\0\0\x1f\xff")
    assert 0x1000 <= spi <= 0x1FFF
    sa_id = ipsec.add_sa(make(spi.to_bytes(4), direction=Direction.IN))  # type: ignore[arg-type]
    assert sa_id.spi == spi
    spi = ipsec.allocate_spi("192.0.2.1", "192.0.2.2")
    ipsec.release_spi(spi.to_bytes(4), "192.0.2.2")
    assert [installed.sa_id for installed in ipsec.list_sas()] == [sa_id]
