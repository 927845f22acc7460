"""The suite of the verbs: their effects on the databases."""

from __future__ import annotations

import errno
import itertools
import socket
import time
from ipaddress import ip_address

from natcompat.ipsec import (
    Action,
    Direction,
    Encr,
    Event,
    Expire,
    Features,
    Integ,
    Lifetime,
    Mode,
    SaId,
    TrafficSelector,
    UDPEncapsulation,
)
from natcompat.testing.ipsec.harness import (
    OUTER,
    PATIENCE,
    PORTS,
    REQID,
    SPI,
    keys,
    policy,
    raises,
    wait_for,
)
from natcompat.testing.ipsec.management import IPsecManagement


class IPsecConformance(IPsecManagement):
    """The verbs as tests: a subclass says how to open the implementation."""

    # --- SAs -----------------------------------------------------------------------------------

    def test_an_installed_sa_is_listed_unchanged(
        self, transforms: tuple[Encr, Integ], version: int, mode: Mode, direction: Direction
    ) -> None:
        """An installed SA is listed unchanged, for every transform and key length, with and without ESN."""
        with self.opened() as ipsec:
            asked = {}
            for number, (length, esn) in enumerate(
                itertools.product(transforms[0].key_lengths, self.sequences)
            ):
                sa = self.association(
                    direction,
                    version,
                    spi=SPI + number,
                    mode=mode,
                    esn=esn,
                    **keys(*transforms, length=length),
                )
                asked[ipsec.add_sa(sa)] = sa
            listed = {installed.sa_id: installed.association for installed in ipsec.list_sas()}
            assert listed.keys() == asked.keys()
            for sa_id, sa in asked.items():
                shown = listed[sa_id]
                assert shown is not None
                for name in (
                    "spi", "source", "destination", "mode", "encryption", "encryption_key", "integrity",
                    "integrity_key", "esn", "encapsulation", "reqid",
                ):  # fmt: skip
                    assert getattr(shown, name) == getattr(sa, name), name
                assert ipsec.get_sa(sa_id).packets == 0

    def test_a_second_sa_of_the_same_name_is_refused(self, direction: Direction) -> None:
        """A second SA of the same name is EEXIST, and the first stays."""
        with self.opened() as ipsec:
            sa_id = ipsec.add_sa(self.association(direction))
            with raises(errno.EEXIST):
                ipsec.add_sa(self.association(direction, reqid=9))
            (only,) = ipsec.list_sas()
            assert only.association is not None
            assert (only.sa_id, only.association.reqid) == (sa_id, REQID)
            assert ipsec.add_sa(self.association(direction, spi=SPI + 1)) != sa_id

    def test_verbs_on_missing_entries_are_refused(self) -> None:
        """Every verb that names an SA or a policy raises ESRCH if it is not installed."""
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

    def test_a_deleted_sa_can_be_added_again(self, direction: Direction) -> None:
        """A deleted SA is gone, and can be added again with the same keys."""
        with self.opened() as ipsec:
            for _ in range(3):
                sa_id = ipsec.add_sa(self.association(direction))
                ipsec.delete_sa(sa_id)
                with raises(errno.ESRCH):
                    ipsec.get_sa(sa_id)
            assert ipsec.list_sas() == []

    def test_flushing_removes_everything(self) -> None:
        """Flushing removes SAs, reserved SPIs and policies."""
        with self.opened() as ipsec:
            for number in range(10):
                ipsec.add_sa(self.association(Direction.OUT, spi=SPI + number))
            ipsec.allocate_spi(*OUTER[4][::-1])
            ipsec.add_policy(policy(Direction.OUT))
            ipsec.add_policy(policy(Direction.IN))
            ipsec.flush_sas()
            ipsec.flush_policies()
            assert ipsec.list_sas() == []
            assert ipsec.list_policies() == []

    def test_an_spi_is_reserved_and_completed(self, version: int) -> None:
        """A reserved SPI is listed as larval; `add_sa` completes it under the same name."""
        with self.opened() as ipsec:
            local, remote = OUTER[version]
            spi = ipsec.allocate_spi(remote, local, minimum=0x4000, maximum=0x4FFF, reqid=REQID)
            assert 0x4000 <= spi <= 0x4FFF
            (larval,) = ipsec.list_sas()
            assert (larval.larval, larval.association, larval.sa_id.spi) == (True, None, spi)
            sa_id = ipsec.add_sa(self.association(Direction.IN, version, spi=spi))
            assert sa_id == larval.sa_id
            (whole,) = ipsec.list_sas()
            assert not whole.larval
            assert whole.association is not None

    def test_spis_run_out(self) -> None:
        """ENOENT while every SPI of the range is in use."""
        with self.opened() as ipsec:
            local, remote = OUTER[4]
            spis = [ipsec.allocate_spi(remote, local, minimum=0x4000, maximum=0x4003) for _ in range(4)]
            assert sorted(spis) == [0x4000, 0x4001, 0x4002, 0x4003]
            with raises(errno.ENOENT):
                ipsec.allocate_spi(remote, local, minimum=0x4000, maximum=0x4003)
            ipsec.delete_sa(SaId(spi=0x4002, destination=ip_address(local), source=ip_address(remote)))
            assert ipsec.allocate_spi(remote, local, minimum=0x4000, maximum=0x4003) == 0x4002

    def test_ports_change_in_place(self, direction: Direction, version: int) -> None:
        """`update_sa` changes the ports and nothing else, or refuses and changes nothing."""
        with self.opened() as ipsec:
            sa_id = ipsec.add_sa(self.association(direction, version))
            ports = UDPEncapsulation(local_port=4500, remote_port=34567)
            if not self.moves_ports:
                with raises(errno.EOPNOTSUPP):
                    ipsec.update_sa(sa_id, encapsulation=ports)
                assert [installed.sa_id for installed in ipsec.list_sas()] == [sa_id]
                return
            assert ipsec.update_sa(sa_id, encapsulation=ports) == sa_id
            (moved,) = ipsec.list_sas()
            assert moved.association is not None
            assert moved.association.encapsulation == ports
            assert moved.association.encryption_key == self.association(direction, version).encryption_key

    def test_addresses_change(self, direction: Direction) -> None:
        """A new destination gives a new name and ends the old one, or is refused and changes nothing."""
        with self.opened() as ipsec:
            old = ipsec.add_sa(self.association(direction))
            if not self.moves:
                with raises(errno.EOPNOTSUPP):
                    ipsec.update_sa(old, source="192.0.2.33", destination="192.0.2.44")
                assert [installed.sa_id for installed in ipsec.list_sas()] == [old]
                return
            new = ipsec.update_sa(old, source="192.0.2.33", destination="192.0.2.44")
            assert str(new.destination) == "192.0.2.44"
            with raises(errno.ESRCH):
                ipsec.get_sa(old)
            (moved,) = ipsec.list_sas()
            assert moved.association is not None
            assert (str(moved.association.source), moved.sa_id) == ("192.0.2.33", new)
            assert moved.association.encapsulation == PORTS

    def test_a_move_to_a_name_that_is_taken(self) -> None:
        """A move to the name of another SA is refused, and both SAs stay."""
        with self.opened() as ipsec:
            one = ipsec.add_sa(self.association(Direction.OUT))
            other = ipsec.add_sa(self.association(Direction.OUT, destination="192.0.2.44"))
            with raises(errno.EEXIST if self.moves else errno.EOPNOTSUPP):
                ipsec.update_sa(one, destination="192.0.2.44")
            assert {installed.sa_id for installed in ipsec.list_sas()} == {one, other}

    def test_keys_are_not_shown(self) -> None:
        """The repr of listed SAs shows no keys."""
        with self.opened() as ipsec:
            key = b"swordfish".ljust(len(self.common["encryption_key"]), b"!")
            ipsec.add_sa(self.association(Direction.OUT, encryption_key=key))
            assert "swordfish" not in repr(ipsec.list_sas())

    # --- policies ------------------------------------------------------------------------------

    def test_policies(self, direction: Direction, version: int) -> None:
        """A policy is added once per selector and direction, listed, looked up and deleted."""
        with self.opened() as ipsec:
            asked = policy(direction, version)
            ipsec.add_policy(asked)
            with raises(errno.EEXIST):
                ipsec.add_policy(policy(direction, version, reqid=9))
            (usage,) = ipsec.list_policies()
            for name in ("direction", "selector", "reqid", "mode", "action", "source", "destination"):
                assert getattr(usage.policy, name) == getattr(asked, name), name
            assert ipsec.get_policy(asked).policy.selector == asked.selector
            assert ipsec.get_policy(asked).last_used is None
            assert abs(usage.added - time.time()) < 60
            ipsec.delete_policy(asked)
            assert ipsec.list_policies() == []

    def test_actions(self, direction: Direction) -> None:
        """BYPASS and DISCARD policies need neither tunnel nor SA."""
        with self.opened() as ipsec:
            for number, action in enumerate((Action.BYPASS, Action.DISCARD)):
                selector = TrafficSelector(source=f"10.{number}.0.0/16", destination="0.0.0.0/0")
                ipsec.add_policy(policy(direction, selector=selector, action=action))
            assert {usage.policy.action for usage in ipsec.list_policies()} == {Action.BYPASS, Action.DISCARD}

    # --- events, sockets -----------------------------------------------------------------------

    def test_expiries(self, direction: Direction) -> None:
        """The soft limit is reported first, the hard one afterwards; the descriptor becomes readable."""
        with self.opened() as ipsec, ipsec.events() as events:
            lifetime = Lifetime(soft_seconds=1, hard_seconds=3)
            sa_id = ipsec.add_sa(self.association(direction, lifetime=lifetime))
            reported: list[Event] = []
            deadline = time.monotonic() + PATIENCE
            while len(reported) < 2 and time.monotonic() < deadline:
                reported += wait_for(events)
            assert reported == [Expire(sa_id=sa_id, reqid=REQID, hard=hard) for hard in (False, True)]
            with raises(errno.ESRCH):
                ipsec.get_sa(sa_id)
            assert wait_for(events, 0) == []

    def test_reading_without_events_returns_at_once(self) -> None:
        """`read` returns at once when there are no events."""
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
        """`features` is a `Features`, and stays the same."""
        with self.opened() as ipsec:
            assert isinstance(ipsec.features, Features)
            assert ipsec.features == ipsec.features
