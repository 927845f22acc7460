"""The inbound SPD on XFRM and in the engine: one table, and by name the rows in which they differ."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest

from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.results import Dropped, Opened, Reason
from natcompat.ipsec import Direction, Policy, TrafficSelector
from natcompat.kernel.xfrm.kernel import XfrmIPsec
from natcompat.testing.ipsec.harness import HOSTS, OUTER, IPsecHarness, policy
from natcompat.testing.ipsec.traffic import udp_packet
from tests.esp.engine.test_inbound_policies import FIRST
from tests.lab.kernel_esp import KernelEsp
from tests.lab.topology import inside
from tests.support.esp import keys

pytestmark = pytest.mark.kernel_esp

NARROW = TrafficSelector(source="10.2.0.0/24", destination="10.1.0.0/16")
WIDE = policy(Direction.IN).selector
REQID = policy(Direction.IN).reqid
TAKEN_BY_XFRM = {
    "PROTECT without a reqid": "a template without a reqid takes every SA (xfrm_state_ok())",
    "PROTECT in transport mode": "it is for this host only, and forwarded packets meet the next policy",
}
"""Rows in which XFRM takes what the engine drops, and why."""


@pytest.fixture(scope="module")
def kernel() -> Iterator[KernelEsp]:
    made = KernelEsp()
    yield made
    made.close()


def on_the_lab(changes: dict[str, Any]) -> Policy:
    """Return the policy of a row of the table between the ends that the lab has."""
    changes = dict(changes)
    source = changes.pop("source", None)
    changes.pop("destination", None)
    if source == "192.0.2.9":
        changes |= {"source": source, "destination": OUTER[4][0]}
        return Policy(direction=Direction.IN, selector=NARROW, reqid=REQID, **changes)
    return policy(Direction.IN, **{"selector": NARROW, **changes})


@pytest.mark.parametrize("selectors", [(), (WIDE,)], ids=["no selectors", "selectors"])
@pytest.mark.parametrize(("row", "narrow", "expected"), FIRST, ids=[row[0] for row in FIRST])
def test_the_first_policy_decides(
    kernel: KernelEsp,
    row: str,
    narrow: dict[str, Any] | None,
    expected: Reason | None,
    selectors: tuple[TrafficSelector, ...],
) -> None:
    near, far = HOSTS[4]
    packet, source = udp_packet(far, near, b"inbound"), (OUTER[4][1], 4500)
    common: dict[str, Any] = keys(*IPsecHarness().transforms[0])
    inbound = IPsecHarness().association(Direction.IN, selectors=selectors, **common)
    ends: dict[str, Any] = {"source": inbound.source, "destination": inbound.destination}
    with contextlib.ExitStack() as stack:
        stack.enter_context(inside("here"))
        xfrm = stack.enter_context(XfrmIPsec())
        engine, peer = (stack.enter_context(EspEngine(timer=False)) for _ in range(2))
        for remove in (xfrm.flush_policies, xfrm.flush_sas):
            remove()
            stack.callback(remove)
        peer.add_sa(IPsecHarness().association(Direction.OUT, **{**common, **ends}))
        peer.add_policy(policy(Direction.OUT, selector=WIDE, **ends, mode=inbound.mode))
        for ipsec in (xfrm, engine):
            ipsec.add_sa(inbound)
            ipsec.add_policy(policy(Direction.IN))
            if narrow is not None:
                ipsec.add_policy(on_the_lab(narrow))

        def both() -> tuple[list[bytes], bytes | None]:
            """Let one packet arrive at both; return what XFRM and what the engine made of it."""
            sealed = peer.seal(packet)
            assert not isinstance(sealed, Dropped)
            opened = engine.open(sealed[0][0], source)
            return kernel.deliver(sealed[0][0], source), opened.inner if isinstance(opened, Opened) else None

        taken = [packet] if expected is None or row in TAKEN_BY_XFRM else []
        assert both() == (taken, packet if expected is None else None)
        for ipsec in (xfrm, engine):
            ipsec.flush_policies()
        assert both() == ([], None), "what no policy covers is dropped"
