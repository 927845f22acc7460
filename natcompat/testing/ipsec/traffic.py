"""The traffic suite: packets of an implementation, with the ESP of this process as the peer."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, ClassVar

from natcompat.ipsec import (
    Direction,
    Encr,
    Event,
    Expire,
    Integ,
    IPsec,
    Lifetime,
    MappingChange,
    Mode,
    Policy,
    TrafficSelector,
    UDPEncapsulation,
)
from natcompat.testing.ipsec.harness import (
    HOSTS,
    OUTER,
    PATIENCE,
    REQID,
    SPI,
    IPsecHarness,
    keys,
    policy,
    raises,
    wait_for,
)

if TYPE_CHECKING:
    from natcompat.esp.engine.engine import EspEngine


PEER_PORTS = (4500, 1024, 1025)
"""Ports of the peer, or of the NAT in front of the peer."""


def udp_packet(source: str, destination: str, payload: bytes, traffic_class: int = 0) -> bytes:
    """Return an IP packet with a UDP datagram whose checksum is right."""
    from natcompat.esp.engine.packet import checksum

    addresses = ip_address(source).packed + ip_address(destination).packed
    length = (8 + len(payload)).to_bytes(2)
    ports = (7001).to_bytes(2) + (7002).to_bytes(2)
    pseudo = addresses + length + b"\0\x11"
    datagram = ports + length + checksum(pseudo + ports + length + payload).to_bytes(2) + payload
    if ip_address(source).version == 6:
        start = (0x6000_0000 | traffic_class << 20).to_bytes(4)
        return start + len(datagram).to_bytes(2) + bytes((17, 64)) + addresses + datagram
    start = bytes((0x45, traffic_class)) + (20 + len(datagram)).to_bytes(2) + bytes((0, 0, 0x40, 0, 64, 17))
    return start + checksum(start + addresses).to_bytes(2) + addresses + datagram


class IPsecTrafficConformance(IPsecHarness):
    """Traffic as tests: a subclass says how packets enter and leave the implementation."""

    shortest: ClassVar[Mapping[int, int]] = {4: 0, 6: 0}
    """Length in bytes below which ESP packets do not reach the SA, by outer IP version."""

    def seal(self, ipsec: IPsec, inner: bytes) -> list[bytes]:
        """Send an inner packet; return the UDP payloads that leave for the peer."""
        raise NotImplementedError

    def deliver(self, ipsec: IPsec, packet: bytes, source: tuple[str, int]) -> list[bytes]:
        """Let a UDP payload arrive from `source`; return the inner packets that come out."""
        raise NotImplementedError

    @contextlib.contextmanager
    def connected(
        self, version: int = 4, inner: int | None = None, **changes: Any
    ) -> Iterator[tuple[IPsec, EspEngine]]:
        """Open both ends, with an SA and a policy in each direction."""
        from natcompat.esp.engine.engine import EspEngine

        mode = {"mode": changes["mode"]} if changes.get("mode") is Mode.TRANSPORT else {}
        with self.opened() as ipsec, EspEngine(timer=False) as peer:
            for direction in Direction:
                out = direction is Direction.OUT
                spi = SPI + out
                key = {**self.common, **changes}
                if key["encryption"].salt_length:  # one key, one direction
                    key["encryption_key"] = key["encryption_key"][:-1] + bytes((out,))
                sa = self.association(direction, version, spi=spi, **key)
                ipsec.add_sa(sa)
                ipsec.add_policy(policy(direction, version, inner, **mode))
                opposite = Direction.IN if out else Direction.OUT
                ends = {"source": sa.source, "destination": sa.destination}
                peer.add_sa(self.association(opposite, version, spi=spi, **{**key, **ends}))
                tunnel = {} if mode else ends
                selector = policy(direction, version, inner, **mode).selector
                peer.add_policy(
                    Policy(direction=opposite, selector=selector, reqid=REQID, **{**mode, **tunnel})
                )
            yield ipsec, peer

    def hosts(self, version: int, mode: Mode, inner: int | None = None) -> tuple[str, str]:
        """Return the inner source and destination."""
        return OUTER[version] if mode is Mode.TRANSPORT else HOSTS[inner or version]

    def test_packets_pass_both_ways(
        self, transforms: tuple[Encr, Integ], version: int, mode: Mode, esn: bool
    ) -> None:
        """Each end opens the packets of the other, for every length modulo a cipher block."""
        from natcompat.esp.engine.results import Dropped, Opened

        with self.connected(version, mode=mode, esn=esn, **keys(*transforms)) as (ipsec, peer):
            near, far = self.hosts(version, mode)
            sizes, delivered = (0, 1, 2, 3, 15, 16, 17, 1200), 0
            for size in sizes:
                question, answer = (udp_packet(*ends, bytes(size)) for ends in ((near, far), (far, near)))
                (packet,) = self.seal(ipsec, question)
                opened = peer.open(packet, (OUTER[version][0], 4500))
                assert isinstance(opened, Opened), opened
                assert _comparable(opened.inner, mode) == _comparable(question, mode)
                sealed = peer.seal(answer)
                assert not isinstance(sealed, Dropped), sealed
                if len(sealed[0][0]) < self.shortest[version]:
                    continue
                (inner,) = self.deliver(ipsec, sealed[0][0], (OUTER[version][1], 4500))
                assert _comparable(inner, mode) == _comparable(answer, mode)
                delivered += 1
            usage = {installed.sa_id.spi: installed.usage.packets for installed in ipsec.list_sas()}
            assert usage == {SPI: delivered, SPI + 1: len(sizes)}

    def test_families_inside(self, version: int) -> None:
        """IPv4 in IPv6 and IPv6 in IPv4 pass, or are refused."""
        from natcompat.esp.engine.results import Dropped, Opened

        other = 10 - version
        if not self.cross_family:
            with self.opened() as ipsec, raises(errno.EOPNOTSUPP):
                ipsec.add_policy(policy(Direction.OUT, version, other))
            return
        with self.connected(version, other) as (ipsec, peer):
            near, far = HOSTS[other]
            (packet,) = self.seal(ipsec, udp_packet(near, far, b"question"))
            opened = peer.open(packet, (OUTER[version][0], 4500))
            assert isinstance(opened, Opened)
            assert opened.inner == udp_packet(near, far, b"question")
            sealed = peer.seal(udp_packet(far, near, b"answer"))
            assert not isinstance(sealed, Dropped)
            assert self.deliver(ipsec, sealed[0][0], (OUTER[version][1], 4500)) == [
                udp_packet(far, near, b"answer")
            ]

    def test_replayed_tampered_and_old(self) -> None:
        """Replayed, forged and old packets are dropped, and counted for the SA."""
        from natcompat.esp.engine.results import Dropped

        with self.connected(replay_window=32) as (ipsec, peer):
            near, far = HOSTS[4]
            source = (OUTER[4][1], 4500)
            packets = []
            for number in range(100):
                sealed = peer.seal(udp_packet(far, near, bytes((number,))))
                assert not isinstance(sealed, Dropped)
                packets.append(sealed[0][0])
            assert self.deliver(ipsec, packets[50], source)
            bad = packets[60][:-1] + bytes((packets[60][-1] ^ 1,))
            for packet in (packets[50], packets[18], bad):
                assert self.deliver(ipsec, packet, source) == []
            assert self.deliver(ipsec, packets[19], source), "the oldest in the window"
            assert self.deliver(ipsec, packets[60], source), "the forged one has not taken its place"
            usage = ipsec.get_sa(self.association(Direction.IN, spi=SPI).sa_id)
            expected = (1, 1, 1, 61) if self.counts else (None,) * 4
            drops = usage.replay_drops, usage.window_drops, usage.integrity_drops
            assert (*drops, usage.sequence) == expected
            assert usage.packets == 3

    def test_tampered_in_each_byte(self, version: int) -> None:
        """A forged packet is dropped and changes nothing; the authentic one is accepted afterwards."""
        from natcompat.esp.engine.results import Dropped

        with self.connected(version, esn=max(self.sequences), replay_window=self.windows[0]) as (ipsec, peer):
            near, far = HOSTS[version]
            source = (OUTER[version][1], 4500)
            sealed = peer.seal(udp_packet(far, near, b"x"))
            assert not isinstance(sealed, Dropped)
            packet = sealed[0][0]
            for at in range(len(packet)):
                bad = packet[:at] + bytes((packet[at] ^ 0x40,)) + packet[at + 1 :]
                assert self.deliver(ipsec, bad, source) == [], f"byte {at}"
            usage = ipsec.get_sa(self.association(Direction.IN, version, spi=SPI).sa_id)
            assert (usage.packets, usage.sequence) == (0, 0 if self.counts else None)
            assert self.deliver(ipsec, packet, source) == [udp_packet(far, near, b"x")]

    def test_windows(self, window: int, esn: bool) -> None:
        """A late packet inside the window is accepted once; an older one is dropped."""
        from natcompat.esp.engine.results import Dropped

        with self.connected(replay_window=window, esn=esn) as (ipsec, peer):
            near, far = HOSTS[4]
            source = (OUTER[4][1], 4500)
            packets = []
            for number in range(window + 5):
                sealed = peer.seal(udp_packet(far, near, number.to_bytes(2)))
                assert not isinstance(sealed, Dropped)
                packets.append(sealed[0][0])
            newest = window + 3
            old = newest - window
            order = (newest, old, old + 1, old + 1, old + 2, newest, newest - 1, newest + 1, old + 1, old + 2)
            verdicts = [len(self.deliver(ipsec, packets[number], source)) for number in order]
            assert verdicts == [1, 0, 1, 0, 1, 0, 1, 1, 0, 0]
            usage = ipsec.get_sa(self.association(Direction.IN, spi=SPI).sa_id)
            assert usage.packets == 5
            if not self.counts:
                return
            assert usage.sequence == newest + 2
            # left of the window is, with ESN, right of it 2**32 later (RFC 4303, A2.2): the ICV tells
            old_drops = (0, 2) if esn else (2, 0)
            assert (usage.replay_drops, usage.window_drops, usage.integrity_drops) == (3, *old_drops)

    def test_packets_from_another_port_are_accepted(self) -> None:
        """An authentic packet from another port is accepted, and reported if the implementation can."""
        from natcompat.esp.engine.results import Dropped

        with self.connected() as (ipsec, peer), ipsec.events() as events:
            near, far = HOSTS[4]
            sealed = peer.seal(udp_packet(far, near, b"x"))
            assert not isinstance(sealed, Dropped)
            moved = (OUTER[4][1], PEER_PORTS[1])
            assert self.deliver(ipsec, sealed[0][0], moved) == [udp_packet(far, near, b"x")]
            reported = wait_for(events) if ipsec.features.mapping_events else []
            assert [
                (event.old_port, event.new_port) for event in reported if isinstance(event, MappingChange)
            ] == [(4500, PEER_PORTS[1])] * ipsec.features.mapping_events

    def test_padded_for_traffic_flow_confidentiality(self) -> None:
        """TFC padding hides the length of a packet and keeps its contents, or is refused."""
        from natcompat.esp.engine.results import Opened

        if not self.pads:
            with self.opened() as ipsec, raises(errno.EOPNOTSUPP):
                ipsec.add_sa(self.association(Direction.OUT, tfc=600))
            return
        with self.connected(tfc=600) as (ipsec, peer):
            near, far = HOSTS[4]
            lengths = set()
            for size in (0, 1, 100, 500):
                question = udp_packet(near, far, bytes(size))
                (packet,) = self.seal(ipsec, question)
                opened = peer.open(packet, (OUTER[4][0], 4500))
                assert isinstance(opened, Opened)
                assert opened.inner == question
                lengths.add(len(packet))
            assert len(lengths) == 1
            assert lengths.pop() > 600

    def test_inner_addresses_outside_of_the_selectors_are_dropped(self) -> None:
        """An authentic packet with other inner addresses is dropped (RFC 4301, 5.2)."""
        from natcompat.esp.engine.results import Dropped

        with self.connected() as (ipsec, peer):
            wide = TrafficSelector(source="0.0.0.0/0", destination="0.0.0.0/0")
            ends = {"source": OUTER[4][1], "destination": OUTER[4][0]}
            peer.add_policy(Policy(direction=Direction.OUT, selector=wide, reqid=REQID, **ends))  # type: ignore[arg-type]
            sealed = peer.seal(udp_packet("10.77.0.1", HOSTS[4][0], b"spoofed"))
            assert not isinstance(sealed, Dropped)
            assert self.deliver(ipsec, sealed[0][0], (OUTER[4][1], 4500)) == []

    def test_lifetimes_in_packets(self) -> None:
        """The SA sends up to the hard limit; afterwards packets are dropped, not sent in the clear."""
        lifetime = Lifetime(soft_packets=2, hard_packets=4)
        with self.connected(lifetime=lifetime) as (ipsec, _), ipsec.events() as events:
            near, far = HOSTS[4]
            sent = [len(self.seal(ipsec, udp_packet(near, far, b"x"))) for _ in range(6)]
            assert sent == [1, 1, 1, 1, 0, 0]
            reported: list[Event] = []
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline and not any(
                isinstance(event, Expire) and event.hard for event in reported
            ):
                reported += wait_for(events)
            sa_id = self.association(Direction.OUT, spi=SPI + 1).sa_id
            expiries = [event for event in reported if isinstance(event, Expire)]
            assert expiries == [Expire(sa_id=sa_id, reqid=REQID, hard=hard) for hard in (False, True)]

    def test_sequence_numbers_go_on_when_an_sa_moves(self) -> None:
        """Sequence numbers continue, so that the peer does not drop packets as replays."""
        with self.connected() as (ipsec, _):
            near, far = HOSTS[4]
            sa_id = self.association(Direction.OUT, spi=SPI + 1).sa_id
            numbers = []
            for port in PEER_PORTS:
                ports = UDPEncapsulation(local_port=4500, remote_port=port)
                sa_id = ipsec.update_sa(sa_id, encapsulation=ports)
                (packet,) = self.seal(ipsec, udp_packet(near, far, b"x"))
                numbers.append(int.from_bytes(packet[4:8]))
            assert numbers == [1, 2, 3]
            assert ipsec.get_sa(sa_id).sequence == (3 if self.counts else None)


def _comparable(packet: bytes, mode: Mode) -> bytes:
    """Return the part of a UDP packet to compare: in transport mode without IP header and UDP checksum."""
    header = 20 if packet[0] >> 4 == 4 else 40
    if mode is Mode.TUNNEL:
        return packet
    return packet[header - 2 * (4 if header == 20 else 16) : header + 6] + packet[header + 8 :]
