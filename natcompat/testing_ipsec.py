"""The conformance suite of `natcompat.ipsec.IPsec`: whether an implementation does what its verbs say.

Who writes one subclasses `IPsecConformance` in a test module, and pytest does the rest::

    from natcompat.testing_ipsec import IPsecConformance, IPsecTrafficConformance

    class TestMine(IPsecConformance):
        def open_ipsec(self) -> IPsec: ...        # empty, with the privilege that it needs

    class TestMyTraffic(IPsecTrafficConformance): # also with `seal` and `deliver`
        ...

The kernel's ESP and the one in this process are held to the same tests. The peer in the traffic
tests is `natcompat.esp.engine.EspEngine`. pytest is needed only where pytest runs this; to see the
values in a failed assertion, put ``pytest.register_assert_rewrite("natcompat.testing_ipsec")``
before the import.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import select
import socket
import time
from collections.abc import Iterator, Sequence
from ipaddress import ip_address
from typing import TYPE_CHECKING, Any, ClassVar

from natcompat.errors import NatCompatError
from natcompat.ipsec import (
    Action,
    Direction,
    Encr,
    Event,
    Events,
    Expire,
    Features,
    Integ,
    IPsec,
    Lifetime,
    Mode,
    Policy,
    SaId,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)

if TYPE_CHECKING:
    import pytest

    from natcompat.esp.engine import EspEngine

PATIENCE = 10.0
"""Seconds after which what has not come is lost."""

OUTER = {4: ("192.0.2.1", "192.0.2.2"), 6: ("2001:db8::1", "2001:db8::2")}
"""This end and its peer, by IP version."""

NETWORKS = {4: ("10.1.0.0/16", "10.2.0.0/16"), 6: ("fd00:1::/64", "fd00:2::/64")}
"""What is behind this end and behind the peer."""

HOSTS = {4: ("10.1.0.1", "10.2.0.1"), 6: ("fd00:1::1", "fd00:2::1")}

TRANSFORMS: Sequence[tuple[Encr, Integ]] = (
    *(
        (encryption, Integ.NONE)
        for encryption in (Encr.AES_GCM_8, Encr.AES_GCM_12, Encr.AES_GCM_16, Encr.CHACHA20_POLY1305)
    ),
    *itertools.product(
        (Encr.AES_CBC, Encr.AES_CTR, Encr.NULL),
        (Integ.HMAC_SHA1_96, Integ.HMAC_SHA2_256_128, Integ.HMAC_SHA2_384_192, Integ.HMAC_SHA2_512_256),
    ),
)
"""What every implementation has."""

PORTS = UDPEncapsulation(local_port=4500, remote_port=4500)
SPI = 0xC0DE0001
REQID = 7


def keys(encryption: Encr, integrity: Integ = Integ.NONE, length: int | None = None) -> dict[str, Any]:
    """Return the transforms of an SA with keys: the longest, or of `length` bytes."""
    size = max(encryption.key_lengths) if length is None else length
    return {
        "encryption": encryption,
        "encryption_key": bytes(range(1, size + 1)),
        "integrity": integrity,
        "integrity_key": bytes(range(101, 101 + integrity.key_length)),
    }


def association(direction: Direction, version: int = 4, **changes: Any) -> SecurityAssociation:
    """Return an SA of this end, towards the peer or from there."""
    local, remote = OUTER[version]
    arguments: dict[str, Any] = {
        "spi": SPI,
        "source": local if direction is Direction.OUT else remote,
        "destination": remote if direction is Direction.OUT else local,
        "direction": direction,
        "encapsulation": PORTS,
        "reqid": REQID,
        **keys(Encr.AES_GCM_16, length=20),
        **changes,
    }
    return SecurityAssociation(**arguments)


def policy(direction: Direction, version: int = 4, inner: int | None = None, **changes: Any) -> Policy:
    """Return the policy that belongs to `association`."""
    local, remote = OUTER[version]
    near, far = NETWORKS[inner or version]
    if changes.get("mode") is Mode.TRANSPORT:
        near, far = local, remote
    out = direction is Direction.OUT
    arguments: dict[str, Any] = {
        "direction": direction,
        "selector": TrafficSelector(source=near if out else far, destination=far if out else near),
        "reqid": REQID,
        **changes,
    }
    if "mode" not in changes and "action" not in changes:
        arguments |= {"source": local if out else remote, "destination": remote if out else local}
    return Policy(**arguments)


def wait_for(events: Events, seconds: float = PATIENCE) -> list[Event]:
    """Return the next events, or nothing when there are none for so long."""
    readable = select.select([events], [], [], seconds)[0]
    return list(events.read()) if readable else []


@contextlib.contextmanager
def raises(number: int) -> Iterator[None]:
    """Expect a `NatCompatError` with this errno."""
    import pytest

    with pytest.raises(NatCompatError) as caught:
        yield
    assert caught.value.errno == number, caught.value  # noqa: S101


class IPsecHarness:
    """The parameters of the suites without their tests."""

    transforms: ClassVar[Sequence[tuple[Encr, Integ]]] = TRANSFORMS
    """The combinations of transforms to be tried."""

    def open_ipsec(self) -> IPsec:
        """Open what is tested, with neither SAs nor policies."""
        raise NotImplementedError

    @contextlib.contextmanager
    def opened(self) -> Iterator[IPsec]:
        """Open what is tested, and leave nothing behind."""
        ipsec = self.open_ipsec()
        try:
            yield ipsec
        finally:
            try:
                ipsec.flush_policies()
                ipsec.flush_sas()
            finally:
                ipsec.close()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        """Called by pytest: every test for all transforms, modes and versions that it names."""
        for parameter, values, name in (
            (
                "transforms",
                self.transforms,
                lambda pair: "-".join(each.name for each in pair if each is not Integ.NONE),
            ),
            ("version", (4, 6), lambda version: f"IPv{version}"),
            ("mode", tuple(Mode), lambda mode: mode.value),
            ("esn", (False, True), lambda esn: "64 bits" if esn else "32 bits"),
            ("direction", tuple(Direction), lambda direction: direction.value),
        ):
            if parameter in metafunc.fixturenames:
                metafunc.parametrize(parameter, list(values), ids=[name(value) for value in values])


class IPsecConformance(IPsecHarness):
    """The verbs as tests; subclass it and say how to open the implementation."""

    # --- SAs -----------------------------------------------------------------------------------

    def test_what_is_installed_is_what_was_asked_for(
        self, transforms: tuple[Encr, Integ], version: int, mode: Mode, direction: Direction
    ) -> None:
        """Every transform and key length, with and without extended sequence numbers."""
        with self.opened() as ipsec:
            asked = {}
            for number, (length, esn) in enumerate(
                itertools.product(transforms[0].key_lengths, (False, True))
            ):
                sa = association(
                    direction,
                    version,
                    spi=SPI + number,
                    mode=mode,
                    esn=esn,
                    **keys(*transforms, length=length),
                )
                asked[ipsec.add_sa(sa)] = sa
            found = {each.sa_id: each.association for each in ipsec.list_sas()}
            assert found.keys() == asked.keys()
            for sa_id, sa in asked.items():
                shown = found[sa_id]
                assert shown is not None
                for name in (
                    "spi", "source", "destination", "mode", "encryption", "encryption_key", "integrity",
                    "integrity_key", "esn", "encapsulation", "reqid",
                ):  # fmt: skip
                    assert getattr(shown, name) == getattr(sa, name), name
                assert ipsec.get_sa(sa_id).packets == 0

    def test_a_name_is_given_once(self, direction: Direction) -> None:
        """EEXIST, and what was there stays."""
        with self.opened() as ipsec:
            sa_id = ipsec.add_sa(association(direction))
            with raises(errno.EEXIST):
                ipsec.add_sa(association(direction, reqid=9))
            (only,) = ipsec.list_sas()
            assert only.association is not None
            assert (only.sa_id, only.association.reqid) == (sa_id, REQID)
            assert ipsec.add_sa(association(direction, spi=SPI + 1)) != sa_id

    def test_what_is_not_there(self) -> None:
        """ESRCH from every verb that names an SA or a policy."""
        with self.opened() as ipsec:
            nobody = SaId(spi=SPI, destination=ip_address("192.0.2.2"), source=ip_address("192.0.2.1"))
            for verb in (ipsec.get_sa, ipsec.delete_sa):
                with raises(errno.ESRCH):
                    verb(nobody)
            with raises(errno.ESRCH):
                ipsec.update_sa(nobody, source="192.0.2.3")
            for policy_verb in (ipsec.get_policy, ipsec.delete_policy):
                with raises(errno.ESRCH):
                    policy_verb(policy(Direction.OUT))

    def test_deleted_is_gone(self, direction: Direction) -> None:
        """And can be added again, its keys included."""
        with self.opened() as ipsec:
            for _ in range(3):
                sa_id = ipsec.add_sa(association(direction))
                ipsec.delete_sa(sa_id)
                with raises(errno.ESRCH):
                    ipsec.get_sa(sa_id)
            assert ipsec.list_sas() == []

    def test_flushed_are_all(self) -> None:
        """SAs, reserved SPIs and policies."""
        with self.opened() as ipsec:
            for number in range(10):
                ipsec.add_sa(association(Direction.OUT, spi=SPI + number))
            ipsec.allocate_spi(*OUTER[4][::-1])
            ipsec.add_policy(policy(Direction.OUT))
            ipsec.add_policy(policy(Direction.IN))
            ipsec.flush_sas()
            ipsec.flush_policies()
            assert ipsec.list_sas() == []
            assert ipsec.list_policies() == []

    def test_an_spi_is_reserved_and_completed(self, version: int) -> None:
        """Larval first, an SA afterwards, by the same name."""
        with self.opened() as ipsec:
            local, remote = OUTER[version]
            spi = ipsec.allocate_spi(remote, local, minimum=0x4000, maximum=0x4FFF, reqid=REQID)
            assert 0x4000 <= spi <= 0x4FFF
            (larval,) = ipsec.list_sas()
            assert (larval.larval, larval.association, larval.sa_id.spi) == (True, None, spi)
            sa_id = ipsec.add_sa(association(Direction.IN, version, spi=spi))
            assert sa_id == larval.sa_id
            (whole,) = ipsec.list_sas()
            assert not whole.larval
            assert whole.association is not None

    def test_spis_run_out(self) -> None:
        """ENOENT when all of the range are taken, until one is deleted."""
        with self.opened() as ipsec:
            local, remote = OUTER[4]
            spis = [ipsec.allocate_spi(remote, local, minimum=0x4000, maximum=0x4003) for _ in range(4)]
            assert sorted(spis) == [0x4000, 0x4001, 0x4002, 0x4003]
            with raises(errno.ENOENT):
                ipsec.allocate_spi(remote, local, minimum=0x4000, maximum=0x4003)
            ipsec.delete_sa(SaId(spi=0x4002, destination=ip_address(local), source=ip_address(remote)))
            assert ipsec.allocate_spi(remote, local, minimum=0x4000, maximum=0x4003) == 0x4002

    def test_ports_change_in_place(self, direction: Direction, version: int) -> None:
        """The name stays, the rest stays."""
        with self.opened() as ipsec:
            sa_id = ipsec.add_sa(association(direction, version))
            ports = UDPEncapsulation(local_port=4500, remote_port=34567)
            assert ipsec.update_sa(sa_id, encapsulation=ports) == sa_id
            (found,) = ipsec.list_sas()
            assert found.association is not None
            assert found.association.encapsulation == ports
            assert found.association.encryption_key == association(direction, version).encryption_key

    def test_addresses_change(self, direction: Direction) -> None:
        """A new destination is a new name; the old one is gone."""
        with self.opened() as ipsec:
            old = ipsec.add_sa(association(direction))
            new = ipsec.update_sa(old, source="192.0.2.33", destination="192.0.2.44")
            assert str(new.destination) == "192.0.2.44"
            with raises(errno.ESRCH):
                ipsec.get_sa(old)
            (found,) = ipsec.list_sas()
            assert found.association is not None
            assert (str(found.association.source), found.sa_id) == ("192.0.2.33", new)
            assert found.association.encapsulation == PORTS

    def test_a_move_to_a_name_that_is_taken(self) -> None:
        """EEXIST, and both stay as they were."""
        with self.opened() as ipsec:
            one = ipsec.add_sa(association(Direction.OUT))
            other = ipsec.add_sa(association(Direction.OUT, destination="192.0.2.44"))
            with raises(errno.EEXIST):
                ipsec.update_sa(one, destination="192.0.2.44")
            assert {each.sa_id for each in ipsec.list_sas()} == {one, other}

    def test_keys_are_not_shown(self) -> None:
        """Nor by what is listed."""
        with self.opened() as ipsec:
            ipsec.add_sa(association(Direction.OUT, encryption_key=b"swordfish-swordfish!"))
            assert "swordfish" not in repr(ipsec.list_sas())

    # --- policies ------------------------------------------------------------------------------

    def test_policies(self, direction: Direction, version: int) -> None:
        """Added, listed, found, deleted; once per selector and direction."""
        with self.opened() as ipsec:
            mine = policy(direction, version)
            ipsec.add_policy(mine)
            with raises(errno.EEXIST):
                ipsec.add_policy(policy(direction, version, reqid=9))
            (found,) = ipsec.list_policies()
            for name in ("direction", "selector", "reqid", "mode", "action", "source", "destination"):
                assert getattr(found.policy, name) == getattr(mine, name), name
            assert ipsec.get_policy(mine).policy.selector == mine.selector
            assert ipsec.get_policy(mine).last_used is None
            assert abs(found.added - time.time()) < 60
            ipsec.delete_policy(mine)
            assert ipsec.list_policies() == []

    def test_actions(self, direction: Direction) -> None:
        """What is not protected has neither tunnel nor SA."""
        with self.opened() as ipsec:
            for number, action in enumerate((Action.BYPASS, Action.DISCARD)):
                selector = TrafficSelector(source=f"10.{number}.0.0/16", destination="0.0.0.0/0")
                ipsec.add_policy(policy(direction, selector=selector, action=action))
            assert {each.policy.action for each in ipsec.list_policies()} == {Action.BYPASS, Action.DISCARD}

    # --- events, sockets -----------------------------------------------------------------------

    def test_expiries(self, direction: Direction) -> None:
        """Soft first, hard afterwards, on a descriptor that can be waited for."""
        with self.opened() as ipsec, ipsec.events() as events:
            lifetime = Lifetime(soft_seconds=1, hard_seconds=3)
            sa_id = ipsec.add_sa(association(direction, lifetime=lifetime))
            found: list[Event] = []
            deadline = time.monotonic() + PATIENCE
            while len(found) < 2 and time.monotonic() < deadline:
                found += wait_for(events)
            assert found == [Expire(sa_id=sa_id, reqid=REQID, hard=hard) for hard in (False, True)]
            with raises(errno.ESRCH):
                ipsec.get_sa(sa_id)
            assert wait_for(events, 0) == []

    def test_nothing_happened(self) -> None:
        """`read` does not wait."""
        with self.opened() as ipsec, ipsec.events() as events:
            assert list(events.read()) == []
            assert events.fileno() >= 0

    def test_bypass(self, version: int) -> None:
        """Any UDP socket can be exempted, more than once."""
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with self.opened() as ipsec, socket.socket(family, socket.SOCK_DGRAM) as sock:
            ipsec.bypass(sock)
            ipsec.bypass(sock)

    def test_features(self) -> None:
        """It says what it can do, and says the same again."""
        with self.opened() as ipsec:
            assert isinstance(ipsec.features, Features)
            assert ipsec.features == ipsec.features


def udp_packet(source: str, destination: str, payload: bytes, traffic_class: int = 0) -> bytes:
    """Return an IP packet with a UDP datagram whose checksum is right."""
    from natcompat.esp.packet import checksum

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
    """What becomes of packets; subclass it and say how packets get in and out."""

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
        from natcompat.esp.engine import EspEngine

        mode = {"mode": changes["mode"]} if changes.get("mode") is Mode.TRANSPORT else {}
        with self.opened() as ipsec, EspEngine(timer=False) as peer:
            for direction in Direction:
                out = direction is Direction.OUT
                spi = SPI + out
                key = {**keys(Encr.AES_GCM_16, length=20), **changes}
                if key["encryption"].salt_length:  # one key, one direction
                    key["encryption_key"] = key["encryption_key"][:-1] + bytes((out,))
                sa = association(direction, version, spi=spi, **key)
                ipsec.add_sa(sa)
                ipsec.add_policy(policy(direction, version, inner, **mode))
                opposite = Direction.IN if out else Direction.OUT
                ends = {"source": sa.source, "destination": sa.destination}
                peer.add_sa(association(opposite, version, spi=spi, **{**key, **ends}))
                tunnel = {} if mode else ends
                mine = policy(direction, version, inner, **mode).selector
                peer.add_policy(Policy(direction=opposite, selector=mine, reqid=REQID, **{**mode, **tunnel}))
            yield ipsec, peer

    def hosts(self, version: int, mode: Mode, inner: int | None = None) -> tuple[str, str]:
        """Return who talks to whom inside."""
        return OUTER[version] if mode is Mode.TRANSPORT else HOSTS[inner or version]

    def test_both_ways(self, transforms: tuple[Encr, Integ], version: int, mode: Mode, esn: bool) -> None:
        """What one end seals the other opens, for packets of every length modulo a block."""
        from natcompat.esp.results import Dropped, Opened

        with self.connected(version, mode=mode, esn=esn, **keys(*transforms)) as (ipsec, peer):
            near, far = self.hosts(version, mode)
            for size in (0, 1, 2, 3, 15, 16, 17, 1200):
                question, answer = (udp_packet(*ends, bytes(size)) for ends in ((near, far), (far, near)))
                (packet,) = self.seal(ipsec, question)
                opened = peer.open(packet, (OUTER[version][0], 4500))
                assert isinstance(opened, Opened), opened
                assert _comparable(opened.inner, mode) == _comparable(question, mode)
                sealed = peer.seal(answer)
                assert not isinstance(sealed, Dropped), sealed
                (inner,) = self.deliver(ipsec, sealed[0][0], (OUTER[version][1], 4500))
                assert _comparable(inner, mode) == _comparable(answer, mode)
            assert {each.usage.packets for each in ipsec.list_sas()} == {8}

    def test_families_inside(self, version: int) -> None:
        """IPv4 in IPv6 and IPv6 in IPv4."""
        from natcompat.esp.results import Dropped, Opened

        other = 10 - version
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
        """Dropped, and counted for the SA."""
        from natcompat.esp.results import Dropped

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
            usage = ipsec.get_sa(association(Direction.IN, spi=SPI).sa_id)
            assert (usage.replay_drops, usage.window_drops, usage.integrity_drops) == (1, 1, 1)
            assert (usage.packets, usage.sequence) == (3, 61)

    def test_what_the_sa_is_not_for(self) -> None:
        """An authentic packet with other inner addresses is dropped (RFC 4301, 5.2)."""
        from natcompat.esp.results import Dropped

        with self.connected() as (ipsec, peer):
            wide = TrafficSelector(source="0.0.0.0/0", destination="0.0.0.0/0")
            ends = {"source": OUTER[4][1], "destination": OUTER[4][0]}
            peer.add_policy(Policy(direction=Direction.OUT, selector=wide, reqid=REQID, **ends))  # type: ignore[arg-type]
            sealed = peer.seal(udp_packet("10.77.0.1", HOSTS[4][0], b"spoofed"))
            assert not isinstance(sealed, Dropped)
            assert self.deliver(ipsec, sealed[0][0], (OUTER[4][1], 4500)) == []

    def test_lifetimes_in_packets(self) -> None:
        """No more than the hard limit is sent, and nothing in the clear afterwards."""
        lifetime = Lifetime(soft_packets=2, hard_packets=4)
        with self.connected(lifetime=lifetime) as (ipsec, _), ipsec.events() as events:
            near, far = HOSTS[4]
            sent = [len(self.seal(ipsec, udp_packet(near, far, b"x"))) for _ in range(6)]
            assert sent == [1, 1, 1, 1, 0, 0]
            found: list[Event] = []
            deadline = time.monotonic() + PATIENCE
            while time.monotonic() < deadline and not any(
                isinstance(each, Expire) and each.hard for each in found
            ):
                found += wait_for(events)
            sa_id = association(Direction.OUT, spi=SPI + 1).sa_id
            expiries = [each for each in found if isinstance(each, Expire)]
            assert expiries == [Expire(sa_id=sa_id, reqid=REQID, hard=hard) for hard in (False, True)]

    def test_sequence_numbers_go_on_when_an_sa_moves(self) -> None:
        """Or the peer would take its packets for replayed ones."""
        with self.connected() as (ipsec, _):
            near, far = HOSTS[4]
            sa_id = association(Direction.OUT, spi=SPI + 1).sa_id
            numbers = []
            for port in (4500, 1024, 1025):
                ports = UDPEncapsulation(local_port=4500, remote_port=port)
                sa_id = ipsec.update_sa(sa_id, encapsulation=ports)
                (packet,) = self.seal(ipsec, udp_packet(near, far, b"x"))
                numbers.append(int.from_bytes(packet[4:8]))
            assert numbers == [1, 2, 3]
            assert ipsec.get_sa(sa_id).sequence == 3


def _comparable(packet: bytes, mode: Mode) -> bytes:
    """Return what of a UDP packet has to arrive: in transport mode neither IP header nor UDP checksum."""
    header = 20 if packet[0] >> 4 == 4 else 40
    if mode is Mode.TUNNEL:
        return packet
    return packet[header - 2 * (4 if header == 20 else 16) : header + 6] + packet[header + 8 :]
