"""The suite of the verbs by which a daemon manages its own SAs, policies and SPIs."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable

from natcompat.ipsec import Action, Direction, Integ, SaId, TrafficSelector
from natcompat.testing.ipsec.harness import OUTER, REQID, SPI, IPsecHarness, keys, policy, raises

_NO_ADDRESSES = (errno.EOPNOTSUPP, errno.ENOENT, errno.ENODEV, errno.ENXIO)
"""Errors of an implementation that assigns no addresses, or of a system without TUN devices."""


def _refusal(operation: Callable[[], object]) -> OSError | None:
    """Return the error of `operation`; None: it has none."""
    try:
        operation()
    except OSError as error:
        return error
    return None


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

    def test_inner_addresses_are_given_and_taken_away(self, version: int) -> None:
        """An address can be bound to between `add_address` and `remove_address`, or both are refused."""
        address = {4: "10.255.77.10", 6: "fd00:ff:77::10"}[version]
        interface = f"{address}/{32 if version == 4 else 128}"
        family = socket.AF_INET if version == 4 else socket.AF_INET6
        with self.opened() as ipsec:
            with raises(errno.EADDRNOTAVAIL, *_NO_ADDRESSES):
                ipsec.remove_address(interface)
            refusal = _refusal(lambda: ipsec.add_address(interface))
            if refusal is not None:
                assert refusal.errno in _NO_ADDRESSES, refusal
                return
            with raises(errno.EEXIST):
                ipsec.add_address(interface)
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                sock.bind((address, 0))
            ipsec.remove_address(interface)
            with socket.socket(family, socket.SOCK_DGRAM) as sock:
                refusal = _refusal(lambda: sock.bind((address, 0)))
                assert refusal is not None
                assert refusal.errno == errno.EADDRNOTAVAIL
            with raises(errno.EADDRNOTAVAIL):
                ipsec.remove_address(interface)

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
