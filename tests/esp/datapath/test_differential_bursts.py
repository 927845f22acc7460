"""The C data path against the portable one: bursts of many packets of several SAs."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natcompat.esp.engine.packet import IPV4, PADDINGS
from natcompat.ipsec import (
    Direction,
    Encr,
    Lifetime,
    Policy,
    SecurityAssociation,
    TrafficSelector,
)
from tests.esp.datapath.twins import (
    MANY,
    PROVIDERS,
    Twins,
    forger,
    revealer,
    transforms,
)
from tests.support.esp import (
    NETWORKS,
    OUTER,
    SPI,
    TRANSFORMS,
    ip_packet,
    keys,
    policy,
    sa,
    udp,
)

pytestmark = pytest.mark.skipif(
    not PROVIDERS, reason="the C data path is not built: python ffi/build_datapath.py"
)


CHAINED = [each for each in TRANSFORMS if each[0] is Encr.AES_CBC]
"""What C may do for many packets at once."""


@st.composite
def several(draw: st.DrawFn, direction: Direction) -> tuple[list[SecurityAssociation], list[Policy]]:
    """Return SAs, most of them `CHAINED`, whose packets go in one burst, and a policy for each."""
    associations, found = [], []
    esn, out = draw(st.booleans()), direction is Direction.OUT
    for number in range(draw(st.integers(1, 4))):
        encryption, integrity = draw(st.sampled_from(CHAINED) if number < 3 else transforms())
        length = draw(st.sampled_from(encryption.key_lengths))
        lifetime = draw(st.sampled_from([{}, {}, {"soft_packets": 10, "hard_packets": 30}]))
        associations.append(
            sa(
                direction,
                spi=SPI + number,
                reqid=7 + number,
                esn=esn,
                lifetime=Lifetime(**lifetime),
                tfc=draw(st.sampled_from([0, 0, 700])) if out else 0,
                **keys(encryption, integrity, length=length),
            )
        )
        ends = (NETWORKS[4][0], f"10.2.{number}.0/24")[:: 1 if out else -1]
        selector = TrafficSelector(source=ends[0], destination=ends[1])
        found.append(policy(direction, selector=selector, reqid=7 + number))
    return associations, found


@pytest.mark.parametrize("provider", PROVIDERS)
@given(data=st.data())
@MANY
def test_opening_many_at_once(provider: str, data: st.DataObject) -> None:
    draw = data.draw
    associations, policies = draw(several(Direction.IN))
    forges = [forger(each) for each in associations]
    base = draw(st.sampled_from([0, (1 << 32) - 20] if associations[0].esn else [0]))
    tops = [base] * len(forges)
    twins = Twins(provider)
    with twins.running():
        for association, each in zip(associations, policies, strict=True):
            twins.do("add_sa", association, sequence=base or None)
            twins.do("add_policy", each)
        for _ in range(draw(st.integers(1, 3))):
            burst = []
            runs = st.tuples(st.integers(0, len(forges) - 1), st.integers(1, 30), st.integers(0, 200))
            for which, times, size in draw(st.lists(runs, min_size=1, max_size=6)):
                packet = ip_packet(f"10.2.{which}.1", "10.1.0.1", udp(bytes(size)))
                padding = -(len(packet) + 2) % 16
                text = packet + PADDINGS[padding] + bytes((padding, IPV4))
                for _ in range(times):
                    tops[which] += 1
                    burst.append(forges[which](tops[which], text))
            for at in draw(st.lists(st.integers(0, len(burst) - 1), max_size=6)):
                changed = burst[at]
                match draw(st.sampled_from(["tampered", "cut", "replayed", "new", "unknown", "jump"])):
                    case "tampered":
                        where = draw(st.integers(0, len(changed)))
                        rest = bytes(octet ^ 1 for octet in changed[where : where + 1])
                        changed = changed[:where] + rest + changed[where + 1 :]
                    case "cut":
                        changed = changed[: draw(st.integers(0, len(changed)))]
                    case "replayed":
                        changed = burst[draw(st.integers(0, len(burst) - 1))]
                    case "new":  # a flow that Python has to see first, and an SA that may not carry it
                        far = draw(st.sampled_from(["10.2.0.9", "10.2.0.10", "10.3.0.1"]))
                        text = ip_packet(far, "10.1.0.1", udp(bytes(2))) + bytes((0, IPV4))
                        tops[0] += 1
                        changed = forges[0](tops[0], text)
                    case "unknown":
                        changed = (SPI + 77).to_bytes(4) + changed[4:]
                    case "jump":  # with extended sequence numbers, to where others have another upper half
                        tops[0] += draw(st.sampled_from([50, 5000]))
                        text = ip_packet("10.2.0.1", "10.1.0.1", udp(bytes(2))) + bytes((0, IPV4))
                        changed = forges[0](tops[0], text)
                burst[at] = changed
            moved = draw(st.integers(0, len(burst)))
            sources = [(OUTER[4][1], 4500)] * moved + [(OUTER[4][1], 1024)] * (len(burst) - moved)
            twins.do("open_burst", list(zip(burst, sources, strict=True)))


@pytest.mark.parametrize("provider", PROVIDERS)
@given(data=st.data())
@MANY
def test_sealing_many_at_once(provider: str, data: st.DataObject) -> None:
    draw = data.draw
    associations, policies = draw(several(Direction.OUT))
    esn = associations[0].esn
    last = (1 << 64) - 1 if esn else (1 << 32) - 1
    twins = Twins(provider)
    reveals = {}
    with twins.running():
        for association, each in zip(associations, policies, strict=True):
            sequence = draw(st.sampled_from([0, 0, (1 << 32) - 20, last - 20] if esn else [0, 0, last - 20]))
            permitted = draw(st.sampled_from([None, None, sequence + 15]))
            reveals[association.spi] = revealer(association, sequence)
            twins.do("add_sa", association, sequence=sequence, permitted=permitted)
            twins.do("add_policy", each)
        twins.reveal = lambda packet: reveals[int.from_bytes(packet[:4])](packet)
        for _ in range(draw(st.integers(1, 3))):
            runs = st.tuples(
                st.integers(0, 4), st.sampled_from([1, 9]), st.integers(1, 30), st.integers(0, 200)
            )
            burst = []
            for which, host, times, size in draw(st.lists(runs, min_size=1, max_size=6)):
                burst += [ip_packet("10.1.0.1", f"10.2.{which}.{host}", udp(bytes(size)))] * times
            for at in draw(st.lists(st.integers(0, len(burst) - 1), max_size=3)):
                burst[at] = draw(
                    st.sampled_from([b"", burst[at][:-1], ip_packet("10.1.0.1", "10.2.0.3", udp())])
                )
            twins.do("seal_burst", burst)
