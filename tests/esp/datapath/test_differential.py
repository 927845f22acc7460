"""The C data path against the portable one: the same calls, and whatever comes out is the same.

Packets byte for byte (but for what AES-CBC has at random: there it is what the packet holds), destinations
with all fields, reasons, counters, times, events, usage of SAs and policies. Both have the same clock.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from natcompat.ipsec import (
    Direction,
    Encr,
    Mode,
    TrafficSelector,
    UDPEncapsulation,
)
from tests.esp.datapath.twins import (
    MANY,
    PROVIDERS,
    SOURCES,
    Twins,
    associations,
    esp_packets,
    forger,
    inners,
    policies,
    revealer,
)
from tests.support.esp import (
    SPI,
    ip_packet,
    keys,
    sa,
    udp,
)

pytestmark = pytest.mark.skipif(
    not PROVIDERS, reason="the C data path is not built: python ffi/build_datapath.py"
)


@pytest.mark.parametrize("provider", PROVIDERS)
@given(data=st.data())
@MANY
def test_opening(provider: str, data: st.DataObject) -> None:
    draw = data.draw
    version = draw(st.sampled_from([4, 6]))
    arguments = draw(associations(version=version))
    if draw(st.booleans()) and arguments["mode"] is Mode.TUNNEL:
        arguments["selectors"] = [TrafficSelector(source="10.1.0.0/16", destination="10.2.0.0/16")]
    bases = [0, 0, 50]
    if arguments["esn"]:  # numbers that overflow begin at 0 again, as those of a peer without manners
        bases += [(1 << 32) - 40, (1 << 40) + 7, (1 << 64) - 40, (1 << 64) - 4000]
    base = draw(st.sampled_from(bases))
    twins = Twins(provider, follow_mapping=draw(st.booleans()))
    with twins.running():
        association = sa(Direction.IN, **arguments)
        twins.do("add_sa", association, sequence=base or None)
        for each in policies(Direction.IN, version, association.mode):
            twins.do("add_policy", each)
        if draw(st.integers(0, 3)) == 0:  # another one with the same SPI
            elsewhere = "192.0.2.99" if version == 4 else "2001:db8::99"
            other = sa(Direction.IN, **{**arguments, "destination": elsewhere})
            twins.do("add_sa", other)
        forge = forger(association)
        for _ in range(draw(st.integers(1, 6))):
            sources = [draw(st.sampled_from(SOURCES))] if draw(st.booleans()) else SOURCES
            packet = st.tuples(esp_packets(association, forge, base), st.sampled_from(sources))
            burst = draw(st.lists(packet, max_size=12))
            burst += burst[: draw(st.integers(0, 3))]  # replayed
            classes = draw(st.lists(st.integers(0, 255), min_size=len(burst), max_size=len(burst)))
            twins.do("open_burst", burst, draw(st.sampled_from([None, classes, [3] * len(burst)])))
            base += draw(st.sampled_from([1, 10, 100, 3000]))
            match draw(st.sampled_from(["no"] * 4 + ["move", "delete", "again", "policy"])):
                case "move":
                    ports = UDPEncapsulation(local_port=4500, remote_port=draw(st.sampled_from([1024, 4500])))
                    twins.do("update_sa", association.sa_id, encapsulation=ports)
                case "delete":
                    twins.do("delete_sa", association.sa_id)
                case "again":
                    twins.do("add_sa", association)
                case "policy":
                    first = policies(Direction.IN, version, association.mode)[0]
                    twins.do("delete_policy", first)


CHANGES = ["move", "delete", "newer", "dummy", "permit", "policy", "large"]


@pytest.mark.parametrize("provider", PROVIDERS)
@given(data=st.data())
@MANY
def test_sealing(provider: str, data: st.DataObject) -> None:
    draw = data.draw
    version = draw(st.sampled_from([4, 6]))
    arguments = draw(associations(version=version))
    if arguments["mode"] is Mode.TUNNEL:
        arguments["tfc"] = draw(st.sampled_from([0, 0, 50, 700, 65535]))
    last = (1 << 64) - 4 if arguments["esn"] else (1 << 32) - 4
    twins = Twins(provider)
    with twins.running():
        association = sa(Direction.OUT, **arguments)
        sequence = draw(st.sampled_from([0, 0, 17, last, (1 << 32) - 3 if arguments["esn"] else 5]))
        permitted = draw(st.sampled_from([None, None, sequence + 5]))
        twins.reveal = revealer(association, sequence)
        twins.do("add_sa", association, sequence=sequence, permitted=permitted)
        for each in policies(Direction.OUT, version, association.mode):
            twins.do("add_policy", each)
        newer = sa(Direction.OUT, **{**arguments, "spi": SPI + 1, **keys(Encr.AES_GCM_16)})
        for _ in range(draw(st.integers(1, 6))):
            flows = draw(st.lists(st.tuples(inners(), st.sampled_from([1, 1, 2, 5])), max_size=8))
            twins.do("seal_burst", [packet for packet, times in flows for _ in range(times)])
            match draw(
                st.sampled_from(
                    ["no"] * 4 + ["move", "delete", "newer", "dummy", "permit", "policy", "large"]
                )
            ):
                case "move":
                    ports = UDPEncapsulation(local_port=4501, remote_port=draw(st.sampled_from([1024, 4500])))
                    twins.do("update_sa", association.sa_id, encapsulation=ports)
                case "delete":
                    twins.do("delete_sa", association.sa_id)
                case "newer":
                    twins.do("add_sa", newer, sequence=99)
                case "dummy":
                    twins.do("seal_dummy", association.sa_id, 33)
                case "permit":
                    twins.do("permit", association.sa_id, sequence + 20)
                case "policy":
                    first = policies(Direction.OUT, version, association.mode)[0]
                    twins.do("delete_policy", first)
                case "large":
                    size = draw(st.sampled_from([1400, 9000, 65440, 65470, 65500, 65507]))
                    twins.do("seal_burst", [ip_packet("10.1.0.1", "10.2.0.1", udp(bytes(size - 28)))])
