"""`ChildSa` on the engines of both data paths: install, move, delete, and whole undoing at each step."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from typing import Any

import pytest

from natcompat import NatCompatError
from natcompat.esp.engine import Dropped, EspEngine
from natcompat.ike import ChildSa, IkeSelector
from natcompat.ipsec import Direction, Encr, Integ, Mode, SecurityAssociation, UDPEncapsulation
from tests.ike.children import (
    ANSWER,
    FAR,
    NEAR,
    PATHS,
    REMOTE_BEHIND_NAT,
    REQUEST,
    Negotiated,
    carried,
    databases,
    two_engines,
)

Engines = tuple[EspEngine, EspEngine]


@pytest.fixture(params=PATHS, ids=["Python", "C"])
def engines(request: pytest.FixtureRequest) -> Iterator[Engines]:
    with two_engines(request.param) as both:
        yield both


class Failing:
    """An IPsec whose verb number `step` fails, as a kernel's can; all others are those of the engine."""

    def __init__(self, engine: EspEngine, step: int, error: BaseException) -> None:
        self._engine, self._left, self._error = engine, step, error
        self.failed = False

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self._engine, name)
        if name not in ("add_sa", "add_policy", "update_sa"):
            return verb

        def count_down(*arguments: Any, **options: Any) -> Any:
            self._left -= 1
            if self._left == 0:
                self.failed = True
                raise self._error
            return verb(*arguments, **options)

        return count_down


def fail_at_each_step(engine: EspEngine, attempt: Callable[[Any], object], error: BaseException) -> int:
    """Let `attempt` fail at its first verb, its second, and so on; return how many steps it has."""
    for step in range(1, 20):
        before = databases(engine)
        failing = Failing(engine, step, error)
        if not failing_attempt(attempt, failing, error):
            return step - 1
        assert databases(engine) == before, f"step {step} left something behind"
    raise AssertionError("it never came to an end")


def failing_attempt(attempt: Callable[[Any], object], failing: Failing, error: BaseException) -> bool:
    """Return whether `attempt` met the error; then it has to reach the caller as it is."""
    raised: BaseException | None = None
    try:
        attempt(failing)
    except type(error) as caught:
        raised = caught
    assert raised is (error if failing.failed else None)
    return failing.failed


NO_ALGORITHM = NatCompatError(errno.ENOSYS, "this kernel lacks the algorithm", "Load its module")


def test_both_ends_talk(engines: Engines) -> None:
    near, far = engines
    child = Negotiated()
    at_near, at_far = child.install(near, near=True), child.install(far, near=False)
    assert carried(near, far, REQUEST) == REQUEST
    assert carried(far, near, ANSWER, FAR) == ANSWER
    assert at_near.inbound is not None
    assert at_near.inbound.spi == 0xA001
    assert at_near.outbound is not None
    assert at_near.outbound.spi == 0xB001
    assert (str(at_near.local.address), at_near.remote.port) == ("192.0.2.1", 4500)
    assert [policy.direction for policy in at_far.policies] == [Direction.IN, Direction.OUT]


@pytest.mark.parametrize(
    ("encryption", "integrity", "length"),
    [
        (Encr.AES_GCM_16, Integ.NONE, 2 * 20),
        (Encr.CHACHA20_POLY1305, Integ.NONE, 2 * 36),
        (Encr.AES_CBC, Integ.HMAC_SHA2_256_128, 2 * (32 + 32)),
        (Encr.AES_CTR, Integ.HMAC_SHA1_96, 2 * (20 + 20)),
        (Encr.NULL, Integ.HMAC_SHA2_512_256, 2 * 64),
    ],
)
def test_transforms(engines: Engines, encryption: Encr, integrity: Integ, length: int) -> None:
    near, far = engines
    child = Negotiated(
        encryption=int(encryption), integrity=int(integrity), keymat=bytes(i * 7 & 255 for i in range(length))
    )
    child.install(near, near=True)
    child.install(far, near=False)
    assert carried(near, far, REQUEST) == REQUEST
    assert carried(far, near, ANSWER, FAR) == ANSWER


def test_transport_mode(engines: Engines) -> None:
    near, far = engines
    ends = IkeSelector.of(NEAR[0]), IkeSelector.of(FAR[0])
    child = Negotiated(mode=Mode.TRANSPORT)
    child.install(near, near=True, selectors=[ends])
    child.install(far, near=False, selectors=[ends[::-1]])
    packet = REQUEST[:12] + ip_address(NEAR[0]).packed + ip_address(FAR[0]).packed + REQUEST[20:]
    opened = carried(near, far, packet)
    assert opened is not None
    assert opened[20:] == packet[20:]
    assert near.list_policies()[0].policy.source is None


def test_an_spi_that_was_allocated_is_completed(engines: Engines) -> None:
    near, _ = engines
    spi = near.allocate_spi(FAR[0], NEAR[0], reqid=7)
    Negotiated().install(near, near=True, spi_in=spi)
    assert [sa.larval for sa in near.list_sas()] == [False, False]


def test_keepalives_are_for_the_end_behind_the_nat() -> None:
    sent: list[object] = []
    with EspEngine(timer=False, transmit=sent.append) as engine:
        for child, nat, expected in (
            (Negotiated(1), None, 20),
            (Negotiated(2, reqid=8), REMOTE_BEHIND_NAT, None),
            (Negotiated(3, reqid=9), True, 20),
        ):
            changes = {} if nat is None else {"nat": nat}
            installed = child.install(engine, near=True, keepalive=20, **changes)
            by_name = {sa.sa_id: sa.association for sa in engine.list_sas()}
            assert installed.outbound is not None
            association = by_name[installed.outbound]
            assert isinstance(association, SecurityAssociation)
            assert association.nat_keepalive == expected
            installed.delete()


def test_install_is_undone_whole_at_each_step(engines: Engines) -> None:
    near, _ = engines
    selectors = [
        (IkeSelector.of("10.1.0.0/16"), IkeSelector.of("10.2.0.0/16")),
        (IkeSelector.of("10.1.0.0/16"), IkeSelector.of("10.3.0.0/16", 6, 80, 80)),
    ]
    for error in (NO_ALGORITHM, KeyboardInterrupt()):
        keys = iter(range(100))  # a key is used for one SA, even for one that was undone

        def attempt(ipsec: Any, keys: Iterator[int] = keys, kind: str = type(error).__name__) -> None:
            keymat = f"{kind} {next(keys)}".encode().ljust(72, b".")
            Negotiated(keymat=keymat).install(ipsec, near=True, selectors=selectors).delete()

        assert fail_at_each_step(near, attempt, error) == 6
    assert near.list_sas() == []
    assert near.list_policies() == []


def test_policies_that_were_replaced_come_back(engines: Engines) -> None:
    near, _ = engines
    trap = Negotiated(1).install(near, near=True, reqid=99)
    before = databases(near)
    with pytest.raises(NatCompatError) as caught:
        Negotiated(2).install(near, near=True)
    assert caught.value.errno == errno.EEXIST
    assert databases(near) == before
    keys = iter(range(100))

    def attempt(ipsec: Any) -> None:
        keymat = f"{next(keys)}".encode().ljust(72, b".")
        Negotiated(2, keymat=keymat).install(ipsec, near=True, replace_policies=True)

    assert fail_at_each_step(near, attempt, NO_ALGORITHM) == 4
    assert {entry.policy.reqid for entry in near.list_policies()} == {7}
    trap.delete(policies=False)


def test_move_follows_a_nat(engines: Engines) -> None:
    near, far = engines
    child = Negotiated()
    at_near, at_far = child.install(near, near=True), child.install(far, near=False)
    assert carried(near, far, REQUEST) == REQUEST
    at_far.move(remote=("198.51.100.7", 31234))
    assert at_far.remote == (ip_address("198.51.100.7"), 31234)
    packet = far.seal(ANSWER)
    assert not isinstance(packet, Dropped)
    ((payload, destination),) = packet
    assert destination == ("198.51.100.7", 31234)
    assert near.open(payload, FAR).inner == ANSWER  # type: ignore[union-attr]
    assert carried(near, far, REQUEST, ("198.51.100.7", 31234)) == REQUEST
    outer = {policy.direction: (policy.source, policy.destination) for policy in at_far.policies}
    assert outer[Direction.OUT] == (ip_address(FAR[0]), ip_address("198.51.100.7"))
    assert outer[Direction.IN] == (ip_address("198.51.100.7"), ip_address(FAR[0]))
    assert {entry.policy for entry in far.list_policies()} == set(at_far.policies)
    at_near.move(local="192.0.2.9")
    assert at_near.local == (ip_address("192.0.2.9"), 4500)
    at_near.delete()
    at_far.delete()
    assert databases(near) == databases(far) == ([], [])


def test_move_is_undone_whole_at_each_step(engines: Engines) -> None:
    near, _ = engines
    child = Negotiated().install(near, near=True)
    before = child.inbound, child.outbound, child.policies, child.local, child.encapsulation

    def attempt(ipsec: Any) -> None:
        child._ipsec = ipsec
        try:
            child.move(local=("192.0.2.9", 4501))
        except NatCompatError:
            assert (child.inbound, child.outbound, child.policies, child.local, child.encapsulation) == before
            raise

    assert fail_at_each_step(near, attempt, NO_ALGORITHM) == 4
    assert child.encapsulation == UDPEncapsulation(local_port=4501, remote_port=4500)


def test_ports_move_in_transport_mode_and_addresses_do_not(engines: Engines) -> None:
    near, _ = engines
    ends = [(IkeSelector.of(NEAR[0]), IkeSelector.of(FAR[0]))]
    child = Negotiated(mode=Mode.TRANSPORT).install(near, near=True, selectors=ends)
    child.move(remote=(FAR[0], 31234))
    assert child.remote.port == 31234
    before = databases(near)
    with pytest.raises(NatCompatError, match="transport mode cannot move") as caught:
        child.move(remote="198.51.100.7")
    assert caught.value.errno == errno.EOPNOTSUPP
    assert databases(near) == before


def test_delete_goes_on_and_may_be_repeated(engines: Engines) -> None:
    near, _ = engines
    child = Negotiated().install(near, near=True)
    assert child.inbound is not None
    near.delete_sa(child.inbound)  # it expired
    child.delete()
    child.delete()
    assert databases(near) == ([], [])


def test_policies_can_stay_when_the_sas_go(engines: Engines) -> None:
    near, _ = engines
    child = Negotiated().install(near, near=True)
    child.delete(policies=False)
    assert near.list_sas() == []
    assert len(near.list_policies()) == 2
    assert isinstance(near.seal(REQUEST), Dropped)
    child.delete()
    assert near.list_policies() == []


def test_udp_is_asked_for_where_this_ipsec_has_nothing_else(engines: Engines) -> None:
    near, _ = engines
    if not near.features.requires_udp_encapsulation:
        pytest.skip("this engine has ESP without UDP")
    with pytest.raises(NatCompatError, match="found no NAT") as caught:
        Negotiated().install(near, near=True, nat=False)
    assert caught.value.errno == errno.EPROTONOSUPPORT
    assert "force=True" in caught.value.remedy
    assert databases(near) == ([], [])


def test_arguments_that_cannot_be(engines: Engines) -> None:
    near, _ = engines
    for changes, words in (
        ({"selectors": []}, "at least one pair"),
        ({"keymat": bytes(41)}, "41 bytes"),
        ({"encryption": 1}, "1 is not a valid Encr"),
        ({"spi_in": b"\0\0\1"}, "spi"),
        ({"local": "here"}, "here"),
    ):
        with pytest.raises(ValueError, match=words):
            Negotiated().install(near, near=True, **changes)
        assert databases(near) == ([], [])


@pytest.mark.parametrize("encryption", [encryption for encryption in Encr if encryption.is_legacy])
def test_old_transforms_need_the_permission(engines: Engines, encryption: Encr) -> None:
    """The engine has none of them: with the permission the error is another one."""
    near, _ = engines
    keymat = bytes(range(2 * (max(encryption.key_lengths) + 20)))
    child = Negotiated(encryption=encryption, integrity=Integ.HMAC_SHA1_96, keymat=keymat)
    with pytest.raises(NatCompatError) as caught:
        child.install(near, near=True)
    assert caught.value.errno == errno.EPROTONOSUPPORT
    assert "legacy=True" in caught.value.remedy
    with pytest.raises(NatCompatError) as caught:
        child.install(near, near=True, legacy=True)
    assert "legacy=True" not in caught.value.remedy
    assert databases(near) == ([], [])


def test_keys_are_not_shown(engines: Engines) -> None:
    near, _ = engines
    child: ChildSa = Negotiated(keymat=b"\xa5" * 72).install(near, near=True)
    assert "a5" not in repr(child)
