"""What is said to a kernel is understood when the kernel says it back; and what kernels add to it."""

from __future__ import annotations

import errno
import socket
from dataclasses import replace
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from natcompat.errors import NatCompatError
from natcompat.ipsec.associations import (
    LARGEST_SPI,
    SMALLEST_SPI,
    Lifetime,
    SecurityAssociation,
    UDPEncapsulation,
)
from natcompat.ipsec.policies import Policy
from natcompat.ipsec.selectors import TrafficSelector
from natcompat.ipsec.transforms import Encr, Integ
from natcompat.ipsec.values import Action, Direction, Mode
from natcompat.kernel.pfkey import flows, rules, spd
from natcompat.kernel.pfkey.dialects import DIALECTS, Dialect, Policies
from natcompat.kernel.pfkey.messages import Message, decode
from natcompat.kernel.pfkey.readback import installed_sa, usage_of
from natcompat.kernel.pfkey.translate import check_sa, encode_sa
from tests.kernel.pfkey import layouts
from tests.kernel.pfkey.golden import CBC, OURS, PEER, PORTS, SPI, association, ends, sa2
from tests.kernel.pfkey.layouts import (
    FREEBSD,
    LINUX,
    MACOS,
    NETBSD,
    OPENBSD,
    SOLARIS,
    System,
    extension,
    key,
    port,
)

TRIED = settings(max_examples=60, deadline=None, database=None)
EVERY = pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)

limits = st.none() | st.integers(1, 2**40)
addresses = st.ip_addresses().filter(
    lambda address: not address.is_unspecified and getattr(address, "ipv4_mapped", None) is None
)


@st.composite
def associations(draw: st.DrawFn, dialect: Dialect) -> SecurityAssociation:
    """An SA that the dialect may have words for."""
    source = draw(addresses)
    destination = draw(addresses.filter(lambda address: address.version == source.version))
    encryption = draw(st.sampled_from(sorted(dialect.encryption)))
    integrity = Integ.NONE if encryption.is_aead else draw(st.sampled_from(sorted(dialect.integrity)))
    size = draw(st.sampled_from(encryption.key_lengths))
    mode = draw(st.sampled_from(Mode))
    encapsulation = None
    if source.version in dialect.nat_t_versions and draw(st.booleans()):
        local = 4500 if dialect.name == "openbsd" else draw(st.integers(1, 65535))
        original = None
        if dialect.name == "solaris" and mode is Mode.TRANSPORT:
            original = draw(addresses.filter(lambda address: address.version == 4))
        encapsulation = UDPEncapsulation(
            local_port=local, remote_port=draw(st.integers(1, 65535)), original_address=original
        )
    soft, hard = draw(limits), draw(limits)
    if soft and hard:
        soft, hard = sorted((soft, hard))
    return SecurityAssociation(
        spi=draw(st.integers(SMALLEST_SPI, LARGEST_SPI)),
        source=source,
        destination=destination,
        direction=draw(st.sampled_from(Direction)),
        mode=mode,
        encryption=encryption,
        encryption_key=draw(st.binary(min_size=size, max_size=size)),
        integrity=integrity,
        integrity_key=draw(st.binary(min_size=integrity.key_length, max_size=integrity.key_length)),
        esn=bool(dialect.esn) and draw(st.booleans()),
        replay_window=64 if dialect.name == "openbsd" else 32,
        encapsulation=encapsulation,
        lifetime=Lifetime(soft_seconds=soft, hard_seconds=hard, hard_bytes=draw(limits)),
        reqid=draw(st.integers(0, dialect.largest_reqid)),
    )


@EVERY
@TRIED
@given(data=st.data())
def test_sas_come_back(dialect: Dialect, data: st.DataObject) -> None:
    sa = data.draw(associations(dialect))
    check_sa(dialect, sa)
    message = decode(encode_sa(dialect, sa, 3).encode())
    found = installed_sa(dialect, message, lambda _: sa.direction).association
    assert found is not None
    window = found.replay_window if sa.direction is Direction.OUT else sa.replay_window
    assert found == replace(sa, replay_window=window)


@EVERY
def test_where_an_address_of_the_peer_is_only_for_checksums(dialect: Dialect) -> None:
    """Ports in both directions, and swapped nowhere."""
    for direction in Direction:
        source, destination = (OURS, PEER) if direction is Direction.OUT else (PEER, OURS)
        sa = SecurityAssociation(
            spi=SPI,
            source=source,
            destination=destination,
            direction=direction,
            encryption=Encr.AES_CBC,
            encryption_key=bytes(16),
            integrity=Integ.HMAC_SHA1_96,
            integrity_key=bytes(20),
            replay_window=32,
            encapsulation=UDPEncapsulation(local_port=4500, remote_port=1),
        )
        message = decode(encode_sa(dialect, sa, 3).encode())
        found = installed_sa(dialect, message, lambda _: direction).association  # noqa: B023
        assert found is not None
        assert found.encapsulation == sa.encapsulation


selectors = st.builds(
    lambda version, protocol, ports, prefixes: TrafficSelector(
        source=f"{'10.0.0.0' if version == 4 else 'fd00::'}/{prefixes[0]}",
        destination=f"{'172.16.0.0' if version == 4 else 'fd11::'}/{prefixes[1] + 12}",
        protocol=protocol,
        source_port=ports[0] if protocol in (6, 17) else 0,
        destination_port=ports[1] if protocol in (6, 17) else 0,
    ),
    st.sampled_from((4, 6)),
    st.sampled_from((0, 1, 6, 17, 50)),
    st.tuples(st.integers(0, 65535), st.integers(0, 65535)),
    st.tuples(st.integers(8, 20), st.integers(4, 20)),
)


@pytest.mark.parametrize(
    "dialect",
    [each for each in DIALECTS.values() if each.policies is Policies.SPD],
    ids=lambda each: each.name,
)
@TRIED
@given(
    selector=selectors,
    direction=st.sampled_from(Direction),
    action=st.sampled_from(Action),
    mode=st.sampled_from(Mode),
    reqid=st.integers(0, 0x3FFF),
)
def test_policies_come_back(
    dialect: Dialect, selector: TrafficSelector, direction: Direction, action: Action, mode: Mode, reqid: int
) -> None:
    protects = action is Action.PROTECT
    tunnel = protects and mode is Mode.TUNNEL
    ends = ("192.0.2.1", "192.0.2.2") if selector.source.version == 4 else ("2001:db8::1", "2001:db8::2")
    policy = Policy(
        direction=direction,
        selector=selector,
        source=ends[0] if tunnel else None,
        destination=ends[1] if tunnel else None,
        mode=mode if protects else Mode.TUNNEL,
        reqid=reqid if protects else 0,
        action=action,
    )
    spd.check_policy(dialect, policy)
    number = spd.kernel_directions(dialect, policy)[0]
    found = spd.policy_of(dialect, decode(spd.encode_policy(dialect, policy, number).encode())).policy
    assert replace(found, priority=None) == policy


@TRIED
@given(
    selector=selectors,
    direction=st.sampled_from(Direction),
    action=st.sampled_from(Action),
    number=st.integers(1, 999),
)
def test_rules_come_back(
    selector: TrafficSelector, direction: Direction, action: Action, number: int
) -> None:
    dialect = DIALECTS["solaris"]
    tunnel = action is Action.PROTECT
    nowhere = "0.0.0.0" if selector.source.version == 4 else "::"
    policy = Policy(
        direction=direction,
        selector=selector,
        action=action,
        source=nowhere if tunnel else None,
        destination=nowhere if tunnel else None,
        interface_id=number if tunnel else None,
        priority=1234,
    )
    message = decode(rules.encode_rule(dialect, policy, 2).encode())
    assert [each.policy for each in rules.policies_of(dialect, message)] == [policy]


@TRIED
@given(selector=selectors)
def test_selectors_of_flows_come_back(selector: TrafficSelector) -> None:
    dialect = DIALECTS["openbsd"]
    policy = Policy(direction=Direction.IN, selector=selector, action=Action.DISCARD)
    assert flows.selector_of(dialect, decode(flows.encode_flow(dialect, policy, 12).encode())) == selector


# --- what kernels add ----------------------------------------------------------------------------------


def answer(system: System, *more: bytes, first: bytes | None = None) -> Message:
    satype = 2 if system is OPENBSD else 3
    encrypt = 13 if system is MACOS else 20
    start = layouts.sa(SPI, encrypt=encrypt) if first is None else first
    return decode(
        layouts.message(5, satype, start, *ends(system, Direction.IN), key(9, bytes(range(20))), *more)
    )


def current(packets: int = 0) -> bytes:
    return extension(layouts.sadb_lifetime(0, 2, packets, 4000, 1700000000, 1700000005))


def usage(system: System, *more: bytes) -> Any:
    return usage_of(DIALECTS[system.name], answer(system, *more))


def test_usage() -> None:
    counted = extension(layouts.sadb_x_sa2(0, 19, 2, 0, 0, 77, 7))
    for system in (FREEBSD, NETBSD, MACOS):
        found = usage(system, current(), counted)
        assert (found.packets, found.octets, found.sequence) == (77, 4000, 77)
        assert (found.added, found.first_used, found.last_used) == (1700000000, 1700000005, None)
        assert (found.replay_drops, found.window_drops, found.integrity_drops) == (None, None, None)
    found = usage(LINUX, current(12), sa2(2))
    assert (found.packets, found.octets, found.sequence) == (12, 4000, None)
    counter = extension(layouts.sadb_x_counter(0, 36, 0, 5, 6))
    last = extension(layouts.sadb_lifetime(0, 32, 0, 0, 0, 1700000009))
    replay = extension(layouts.sadb_x_replay_openbsd(0, 39, 0, 2**33))
    found = usage(OPENBSD, current(), counter, last, replay)
    assert (found.packets, found.sequence, found.last_used) == (11, 2**33, 1700000009)
    found = usage(SOLARIS, current(), extension(layouts.sadb_x_replay_ctr(0, 24, 88, 0)))
    assert (found.packets, found.sequence) == (88, 88)
    assert usage(SOLARIS, current()).sequence == 0


def test_windows() -> None:
    def window(system: System, replay: int, *more: bytes) -> int:
        encrypt = 13 if system is MACOS else 20
        message = answer(system, sa2(2), *more, first=layouts.sa(SPI, replay=replay, encrypt=encrypt))
        found = installed_sa(DIALECTS[system.name], message, lambda _: Direction.IN).association
        assert found is not None
        return found.replay_window

    assert window(FREEBSD, 8) == window(NETBSD, 8) == window(MACOS, 8) == 64
    assert window(FREEBSD, 255, extension(layouts.sadb_x_sa_replay(0, 26, 4096))) == 4096
    assert window(OPENBSD, 64) == 64


def test_solaris_knows_directions_and_maps_addresses() -> None:
    dialect = DIALECTS["solaris"]
    mapped = SOLARIS.address(21, "::ffff:10.0.0.9", port=77, proto=17)
    flags = 0x8000 | 0x80000
    message = answer(SOLARIS, mapped, first=layouts.sa(SPI, encrypt=20, flags=flags))
    found = installed_sa(dialect, message, lambda _: Direction.IN).association
    assert found is not None
    assert (found.direction, found.mode) == (Direction.OUT, Mode.TRANSPORT)
    assert found.encapsulation == UDPEncapsulation(
        local_port=4500, remote_port=77, original_address=ip_address("10.0.0.9")
    )


def test_ports_of_macos_in_their_two_orders() -> None:
    fields = layouts.sadb_sa(0, 1, socket.htonl(SPI), 4, 1, 0, 13, 2)
    message = answer(
        MACOS, sa2(2), first=extension(layouts.sadb_sa_2(fields, 40001, 0, 0, socket.htons(4500)))
    )
    found = installed_sa(DIALECTS["macos"], message, lambda _: Direction.IN).association
    assert found is not None
    assert found.encapsulation == PORTS


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ((layouts.sa(SPI, encrypt=6), sa2(2)), "encryption 6"),
        ((layouts.sa(SPI, encrypt=12, auth=2), sa2(2)), "integrity 2"),
        ((layouts.sa(SPI, encrypt=20), sa2(0)), "neither tunnel nor transport"),
        ((layouts.sa(SPI, encrypt=20),), "neither tunnel nor transport"),
        ((layouts.sa(SPI, encrypt=12), sa2(2)), "encryption_key"),
    ],
)
def test_what_there_are_no_words_for(changes: tuple[bytes, ...], words: str) -> None:
    found = installed_sa(
        DIALECTS["freebsd"], answer(FREEBSD, *changes[1:], first=changes[0]), lambda _: Direction.IN
    )
    assert found.association is None
    assert words in found.description


@EVERY
@pytest.mark.parametrize(
    "change",
    [
        {"tfc": 100},
        {"mark": 1},
        {"interface_id": 3},
        {"esn": True},
        {"replay_window": 4096},
        {"copy_ecn": False},
    ],
    ids=lambda change: next(iter(change)),
)
def test_what_cannot_be_said_is_refused_with_a_remedy(dialect: Dialect, change: dict[str, Any]) -> None:
    sa = association(Direction.IN, **CBC)
    check_sa(dialect, sa)
    can = {"esn": dialect.esn, "replay_window": dialect.wide_windows, "copy_ecn": dialect.no_ecn}
    if can.get(next(iter(change))):
        check_sa(dialect, replace(sa, **change))
        return
    with pytest.raises(NatCompatError) as caught:
        check_sa(dialect, replace(sa, **change))
    assert caught.value.errno == errno.EOPNOTSUPP
    assert caught.value.remedy
    assert dialect.system in str(caught.value)


def test_port_extensions_are_those_of_the_header() -> None:
    assert port(21, 40001)[4:6] == (40001).to_bytes(2, "big")
