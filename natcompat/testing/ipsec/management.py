"""The suite of the verbs by which a daemon manages its own SAs, policies and SPIs."""

from __future__ import annotations

import errno

from natcompat.ipsec import Action, Direction, Integ, SaId, TrafficSelector
from natcompat.testing.ipsec.harness import OUTER, REQID, SPI, IPsecHarness, keys, policy, raises


class IPsecManagement(IPsecHarness):
    """Replacing, flushing by reqid, releasing SPIs, and the list of transforms, as tests."""

    def test_a_policy_replaces_another(self, direction: Direction) -> None:
        """With replace=True there is one policy before and after, and the new one is in force."""
        with self.opened() as ipsec:
            first, second = policy(direction), policy(direction, action=Action.DISCARD)
            ipsec.add_policy(first, replace=True)  # there is nothing to be replaced
            if self.refuses_a_second_policy:
                with raises(errno.EEXIST):
                    ipsec.add_policy(second)
            ipsec.add_policy(second, replace=True)
            (usage,) = ipsec.list_policies()
            assert usage.policy.action is Action.DISCARD
            ipsec.delete_policy(second)
            assert ipsec.list_policies() == []

    def test_flushing_by_reqid_leaves_others(self) -> None:
        """SAs and policies of another reqid are somebody else's, and stay."""
        with self.opened() as ipsec:
            kept = ipsec.add_sa(self.association(Direction.OUT, reqid=REQID + 1))
            ipsec.add_sa(self.association(Direction.OUT, spi=SPI + 1))
            ipsec.add_sa(self.association(Direction.IN, spi=SPI + 2))
            ipsec.flush_sas(reqid=REQID)
            assert [installed.sa_id for installed in ipsec.list_sas()] == [kept]
            ipsec.flush_sas()
            assert ipsec.list_sas() == []

    def test_flushing_policies_by_reqid_leaves_others(self) -> None:
        """A policy of another reqid stays."""
        other = TrafficSelector(source="10.77.0.0/16", destination="10.78.0.0/16")
        with self.opened() as ipsec:
            ipsec.add_policy(policy(Direction.OUT))
            ipsec.add_policy(policy(Direction.OUT, selector=other, reqid=REQID + 1))
            ipsec.flush_policies(reqid=REQID)
            (usage,) = ipsec.list_policies()
            assert usage.policy.selector == other
            ipsec.flush_policies(reqid=REQID + 1)
            assert ipsec.list_policies() == []

    def test_an_spi_that_was_not_chosen_is_released(self) -> None:
        """The SPI is free again; what is not reserved is refused."""
        local, remote = OUTER[4]
        with self.opened() as ipsec:
            spi = ipsec.allocate_spi(remote, local, minimum=SPI, maximum=SPI.to_bytes(4))
            assert spi == SPI
            with raises(errno.ENOENT):
                ipsec.allocate_spi(remote, local, minimum=SPI, maximum=SPI)
            ipsec.release_spi(spi.to_bytes(4), local)
            assert SPI not in [installed.sa_id.spi for installed in ipsec.list_sas()]
            with raises(errno.ESRCH):
                ipsec.release_spi(spi, local)
            assert ipsec.allocate_spi(remote, local, minimum=SPI, maximum=SPI) == SPI

    def test_spis_are_taken_as_bytes(self) -> None:
        """SPIs can be given as 4 bytes in network order."""
        with self.opened() as ipsec:
            sa_id = ipsec.add_sa(self.association(Direction.OUT, spi=SPI.to_bytes(4)))
            assert sa_id == SaId(spi=SPI.to_bytes(4), destination=OUTER[4][1])
            assert ipsec.get_sa(sa_id).packets == 0

    def test_listed_transforms_can_be_installed(self) -> None:
        """`transforms()` names nothing that `add_sa` refuses, and names AES-GCM."""
        with self.opened() as ipsec:
            listed = ipsec.transforms()
            number = SPI
            for encryption, sizes in listed.encryption.items():
                for bits in sizes:
                    length = bits // 8 + encryption.salt_length
                    for integrity in [Integ.NONE] if encryption.is_aead else sorted(listed.integrity):
                        number += 1
                        sa = self.association(
                            Direction.OUT, spi=number, **keys(encryption, integrity, length=length)
                        )
                        ipsec.add_sa(sa)
            assert {transforms[0] for transforms in self.transforms} <= listed.encryption.keys()
