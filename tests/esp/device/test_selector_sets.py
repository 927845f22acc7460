"""The sets by which the guard decides, against the database by which the engine decides."""

from __future__ import annotations

from collections import Counter
from ipaddress import ip_address, ip_network
from random import Random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from natcompat.errors import NatCompatError
from natcompat.esp.device.selector_sets import (
    MOST_KEYS,
    SelectorSets,
    Shape,
    keys_of,
    without_ports,
)
from natcompat.esp.engine.databases import PolicyDatabase
from natcompat.esp.engine.packet import Flow
from natcompat.ipsec import Action, Direction, Policy, TrafficSelector

QUIETLY = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
NETWORKS = st.builds(
    lambda address, length: str(ip_network((address << (32 - length) & 0xFFFF_FFFF, length))),
    st.integers(0, 7),
    st.sampled_from([0, 1, 2, 3]),
)
"""Few and large ones, which overlap."""
PORTS = st.sampled_from([0, 0, 7, 23, "20-23", "5000-5999", "1-65535"])
POLICIES = st.lists(
    st.builds(
        lambda source, destination, ports, action, priority, optional: Policy(
            direction=Direction.OUT,
            selector=TrafficSelector(
                source=source,
                destination=destination,
                protocol=6 if ports != (0, 0) else 0,
                source_port=ports[0],
                destination_port=ports[1],
            ),
            action=action,
            source="192.0.2.1" if action is Action.PROTECT else None,
            destination="203.0.113.2" if action is Action.PROTECT else None,
            priority=priority,
            optional=optional and action is Action.PROTECT,
        ),
        NETWORKS,
        NETWORKS,
        st.tuples(PORTS, PORTS),
        st.sampled_from(Action),
        st.sampled_from([None, None, 1, 2]),
        st.sampled_from([False, False, True]),
    ),
    max_size=7,
    unique_by=lambda policy: policy.selector,
)
ADDRESSES = [number << 29 for number in range(8)]


def key_of(flow: Flow, shape: Shape) -> bytes:
    """Return what the guard looks up of `flow` in a set."""
    parts = []
    for address, length in ((flow.source, shape.source_length), (flow.destination, shape.destination_length)):
        if length:
            parts.append((address >> (32 - length) << (32 - length)).to_bytes(4))
    if shape.protocol:
        parts.append(bytes((flow.protocol, 0, 0, 0)))
    for port, mask in (
        (flow.source_port, shape.source_mask),
        (flow.destination_port, shape.destination_mask),
    ):
        if mask:
            parts.append((port & mask).to_bytes(2) + bytes(2))
    return b"".join(parts)


def blocks(sets: SelectorSets, flow: Flow) -> bool:
    """Decide as the guard's rules do."""
    if sets.prefilter_length:
        shift = 32 - sets.prefilter_length
        if (flow.destination >> shift << shift).to_bytes(4) not in sets.prefilter:
            return False
    for level in sets.levels:
        if any(key_of(flow, shape) in keys for shape, keys in level.sets.items()):
            return level.blocks
    return False


@QUIETLY
@given(POLICIES, st.randoms(use_true_random=False))
def test_the_sets_block_what_the_engine_protects_or_discards(policies: list[Policy], random: Random) -> None:
    sets, database = SelectorSets(4, outbound=True), PolicyDatabase()
    installed: dict[str, Counter[tuple[int, Shape, bool, bytes]]] = {"": Counter()}
    for policy in [*policies, *random.sample(policies, len(policies) // 2)]:
        entry = database.get(policy)
        if entry is None:
            database.add(policy, 0)
            sets.add(policy)
        else:
            database.remove(entry)
            sets.remove(policy)
        kernel = installed[""]
        if not sets.restructured:
            for change in sets.changes:
                kernel[change[:4]] += 1 if change.added else -1
            assert +kernel == contents(sets), "the changes that were told are those that were made"
        installed[""] = contents(sets)
        sets.settle()
    for source in random.sample(ADDRESSES, 3):
        for destination in ADDRESSES:
            for protocol, ports in ((6, (7, 23)), (6, (21, 5500)), (17, (7, 23)), (6, (65535, 1))):
                flow = Flow(4, protocol, source, destination, *ports)
                entry = database.look_up(Direction.OUT, flow)
                found = entry.policy if entry else None
                wanted = found is not None and found.action is not Action.BYPASS and not found.optional
                assert blocks(sets, flow) is wanted, found


def contents(sets: SelectorSets) -> Counter[tuple[int, Shape, bool, bytes]]:
    return Counter(
        {
            (level.number, shape, fragments, key): 1
            for level in sets.levels
            for fragments, by_shape in ((False, level.sets), (True, level.fragments))
            for shape, keys in by_shape.items()
            for key in keys
        }
    )


@pytest.mark.parametrize(
    ("first", "last"), [(0, 65535), (1, 65535), (0, 65534), (5000, 5999), (7, 7), (65535, 65535)]
)
def test_port_ranges_are_exact(first: int, last: int) -> None:
    selector = TrafficSelector(
        source="10.1.0.0/16", destination="10.2.0.0/16", protocol=17, destination_port=f"{first}-{last}"
    )
    covered = {
        port
        for shape, key in keys_of(selector)
        for port in range(65536)
        if not shape.destination_mask or (port & shape.destination_mask).to_bytes(2) == key[-4:-2]
    }
    assert covered == set(range(first, last + 1))


def test_address_ranges_are_exact() -> None:
    selector = TrafficSelector(source="10.0.0.5-10.0.0.9", destination="10.2.0.0/16")
    covered = {
        address
        for shape, key in keys_of(selector)
        for address in range(1 << 8)
        if ip_address(f"10.0.0.{address}") in ip_network((key[:4], shape.source_length))
    }
    assert covered == set(range(5, 10))


def test_icmp_has_type_and_code_in_place_of_ports() -> None:
    selector = TrafficSelector(
        source="10.1.0.1", destination="10.2.0.1", protocol=1, source_port=8, destination_port=0
    )
    ((shape, key),) = keys_of(selector)
    assert (shape.layout, shape.source_mask, shape.destination_mask) == (1, 0xFF, 0)
    assert key == ip_address("10.1.0.1").packed + ip_address("10.2.0.1").packed + b"\1\0\0\0\x08\0\0\0"
    assert without_ports(shape, key) == (Shape(32, 32, protocol=True), key[:-4])


def test_what_takes_too_many_keys_is_refused() -> None:
    selector = TrafficSelector(
        source="1.0.0.1-254.255.255.254",
        destination="1.0.0.1-254.255.255.254",
        protocol=6,
        source_port="1-65534",
        destination_port="1-65534",
    )
    with pytest.raises(NatCompatError, match=f"more than {MOST_KEYS} keys"):
        keys_of(selector)
