"""What the verbs of an IPsec do to its databases."""

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
    """The verbs as tests; subclass it and say how to open the implementation."""

    # --- SAs -----------------------------------------------------------------------------------

    def test_what_is_installed_is_what_was_asked_for(
        self, transforms: tuple[Encr, Integ], version: int, mode: Mode, direction: Direction
    ) -> None:
        """Every transform and key length, with and without extended sequence numbers."""
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
            sa_id = ipsec.add_sa(self.association(direction))
            with raises(errno.EEXIST):
                ipsec.add_sa(self.association(direction, reqid=9))
            (only,) = ipsec.list_sas()
            assert only.association is not None
            assert (only.sa_id, only.association.reqid) == (sa_id, REQID)
            assert ipsec.add_sa(self.association(direction, spi=SPI + 1)) != sa_id

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
                sa_id = ipsec.add_sa(self.association(direction))
                ipsec.delete_sa(sa_id)
                with raises(errno.ESRCH):
                    ipsec.get_sa(sa_id)
            assert ipsec.list_sas() == []

    def test_flushed_are_all(self) -> None:
        """SAs, reserved SPIs and policies."""
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
        """Larval first, an SA afterwards, by the same name."""
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
        """The name stays, the rest stays. Or it is refused, and all stays."""
        with self.opened() as ipsec:
            sa_id = ipsec.add_sa(self.association(direction, version))
            ports = UDPEncapsulation(local_port=4500, remote_port=34567)
            if not self.moves_ports:
                with raises(errno.EOPNOTSUPP):
                    ipsec.update_sa(sa_id, encapsulation=ports)
                assert [each.sa_id for each in ipsec.list_sas()] == [sa_id]
                return
            assert ipsec.update_sa(sa_id, encapsulation=ports) == sa_id
            (found,) = ipsec.list_sas()
            assert found.association is not None
            assert found.association.encapsulation == ports
            assert found.association.encryption_key == self.association(direction, version).encryption_key

    def test_addresses_change(self, direction: Direction) -> None:
        """A new destination is a new name; the old one is gone. Or it is refused, and nothing changes."""
        with self.opened() as ipsec:
            old = ipsec.add_sa(self.association(direction))
            if not self.moves:
                with raises(errno.EOPNOTSUPP):
                    ipsec.update_sa(old, source="192.0.2.33", destination="192.0.2.44")
                assert [each.sa_id for each in ipsec.list_sas()] == [old]
                return
            new = ipsec.update_sa(old, source="192.0.2.33", destination="192.0.2.44")
            assert str(new.destination) == "192.0.2.44"
            with raises(errno.ESRCH):
                ipsec.get_sa(old)
            (found,) = ipsec.list_sas()
            assert found.association is not None
            assert (str(found.association.source), found.sa_id) == ("192.0.2.33", new)
            assert found.association.encapsulation == PORTS

    def test_a_move_to_a_name_that_is_taken(self) -> None:
        """Refused, and both stay as they were."""
        with self.opened() as ipsec:
            one = ipsec.add_sa(self.association(Direction.OUT))
            other = ipsec.add_sa(self.association(Direction.OUT, destination="192.0.2.44"))
            with raises(errno.EEXIST if self.moves else errno.EOPNOTSUPP):
                ipsec.update_sa(one, destination="192.0.2.44")
            assert {each.sa_id for each in ipsec.list_sas()} == {one, other}

    def test_keys_are_not_shown(self) -> None:
        """Nor by what is listed."""
        with self.opened() as ipsec:
            key = b"swordfish".ljust(len(self.common["encryption_key"]), b"!")
            ipsec.add_sa(self.association(Direction.OUT, encryption_key=key))
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
            sa_id = ipsec.add_sa(self.association(direction, lifetime=lifetime))
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
