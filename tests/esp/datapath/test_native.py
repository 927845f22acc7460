"""What only the C data path does: its choice of transforms and libraries, serials, moves within a burst."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest

from natcompat.esp.engine.association import Inbound
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.packet import IPV4
from natcompat.esp.engine.results import Dropped
from natcompat.ipsec import (
    Direction,
    Encr,
    Integ,
    Mode,
)
from tests.esp.datapath.twins import (
    PROVIDERS,
    SOURCES,
    Twins,
    forger,
    policies,
)
from tests.support.esp import (
    IN_C,
    TRANSFORMS,
    inner,
    ip_packet,
    keys,
    policy,
    sa,
    udp,
)

pytestmark = pytest.mark.skipif(
    not PROVIDERS, reason="the C data path is not built: python ffi/build_datapath.py"
)


def test_which_transforms_are_done_in_c() -> None:
    from natcompat.esp.datapath.native import NativeDataPath

    with EspEngine(timer=False, datapath=NativeDataPath) as engine:
        assert isinstance(engine.path, NativeDataPath)
        for transforms in TRANSFORMS:
            for length in transforms[0].key_lengths:
                association = sa(Direction.OUT, **keys(*transforms, length=length))
                assert bool(engine.path.providers(association)) == (transforms in IN_C), transforms


@pytest.mark.skipif(PROVIDERS != ["ipsec-mb", "libcrypto"], reason="there is one library")
def test_which_library_does_what() -> None:
    from natcompat.esp.datapath.native import NativeDataPath

    def told(transforms: tuple[Encr, Integ], provider: str | None) -> str | None:
        with EspEngine(timer=False, datapath=partial(NativeDataPath, provider=provider)) as engine:
            assert isinstance(engine.path, NativeDataPath)
            return engine.path.providers(sa(Direction.OUT, **keys(*transforms)))

    gcm, cbc = (Encr.AES_GCM_16, Integ.NONE), (Encr.AES_CBC, Integ.HMAC_SHA2_256_128)
    assert [told(gcm, each) for each in (None, *PROVIDERS)] == ["ipsec-mb", "ipsec-mb", "libcrypto"]
    assert [told(cbc, each) for each in (None, "libcrypto")] == ["ipsec-mb and libcrypto", "libcrypto"]
    assert told((Encr.AES_CBC, Integ.AES_CMAC_96), None) == "libcrypto"


def test_a_burst_whose_sa_ends_before_it_is_out_goes_by_the_other() -> None:
    """Where the SA is gone when the C data path's caller asks where its packets go."""
    from natcompat.esp.datapath.native import NativeDataPath

    with EspEngine(timer=False, datapath=NativeDataPath) as engine:
        engine.add_policy(policy(Direction.OUT))
        ids = [
            engine.add_sa(sa(Direction.OUT, spi=0x1000 + number, encryption_key=bytes((number,)) * 20))
            for number in range(2)
        ]

        class Destinations(dict[Any, Any]):
            def get(self, key: Any, default: Any = None) -> Any:
                if ids:
                    engine.delete_sa(ids.pop())
                    ids.clear()
                return super().get(key, default)

        assert isinstance(engine._path, NativeDataPath)
        engine._path._destinations = Destinations()
        results = engine.seal_burst([inner()] * 3)
        assert not any(isinstance(each, Dropped) for each in results), results
        assert not engine.counters()


def test_a_move_that_the_owner_makes_first_is_not_reported() -> None:
    twins = Twins(PROVIDERS[0])
    with twins.running():
        association = sa(Direction.IN)
        plaintext = ip_packet("10.2.0.1", "10.1.0.1", udp()) + bytes((0, IPV4))
        packet = forger(association)(1, plaintext)
        twins.do("add_sa", association)
        for engine in twins.engines:
            (mine,) = engine._associations
            assert isinstance(mine, Inbound)
            # a thread that opens packets was here, when another moves the SA
            mine.open_run([packet], ("192.0.2.9", 4500), 0, twins.now)
            engine.update_sa(association.sa_id, source="192.0.2.9")
            engine._report(mine)
        assert not any(listener.read() for listener in twins.listeners)


def test_a_peer_that_moves_within_a_burst() -> None:
    """And an SA that moves stays the first of those that have its SPI."""
    for provider in PROVIDERS:
        twins = Twins(provider, follow_mapping=True)
        with twins.running():
            association = sa(Direction.IN)
            twins.do("add_sa", association)
            for each in policies(Direction.IN, 4, association.mode):
                twins.do("add_policy", each)
            twins.do("add_sa", sa(Direction.IN, destination="192.0.2.99"))
            inside = ip_packet("10.2.0.1", "10.1.0.1", udp()) + bytes((0, IPV4))
            forge = forger(association)
            for start in (1, 5):  # the flow is known the second time
                burst = [
                    (forge(start + each, inside), ("192.0.2.9", 1000 + start + each // 2))
                    for each in range(4)
                ]
                twins.do("open_burst", burst)
            assert twins.do("get_sa", association.sa_id).packets == 8


def test_padding_of_an_sa_that_comes_in_the_middle_of_a_burst() -> None:
    from natcompat.esp.datapath.native import NativeDataPath

    class Interrupted(NativeDataPath):
        def _find_way(self, key: Any) -> Any:
            """Another thread adds an SA while this one asks where a flow goes."""
            if self._spare == 0:
                engine.add_sa(sa(Direction.OUT, spi=0x2000, encryption_key=bytes(20), reqid=99, tfc=4000))
            return super()._find_way(key)

    with EspEngine(timer=False, datapath=Interrupted) as engine:
        engine.add_policy(policy(Direction.OUT))
        engine.add_sa(sa(Direction.OUT))
        results = engine.seal_burst([inner()] * 2)
        assert not any(isinstance(each, Dropped) for each in results), results


def test_a_serial_never_names_the_next_sa_of_its_slot() -> None:
    from natcompat.esp.datapath.native_association import Register

    register = Register()
    first, second = mock.sentinel.first, mock.sentinel.second

    class Taken(list[int]):
        def __getitem__(self, slot: Any) -> Any:
            """Another thread ends the SA right after it was looked at, and makes one."""
            found = super().__getitem__(slot)
            if busy:
                busy.clear()
                register.give_back(serial)
                register.put(register.take(), second)
            return found

    busy: list[bool] = []
    serial = register.take()
    register.put(serial, first)
    register._taken = Taken(register._taken)  # type: ignore[assignment]
    busy.append(True)
    assert register.get(serial) is not second
    assert register.get(serial) is None


@pytest.mark.parametrize("window", [1, 31, 32, 63, 64, 65, 1024, 4096])
@pytest.mark.parametrize("esn", [False, True])
def test_edges_of_the_window(window: int, esn: bool) -> None:
    twins = Twins(PROVIDERS[0])
    with twins.running():
        association = sa(Direction.IN, esn=esn, replay_window=window)
        twins.do("add_sa", association)
        twins.do("add_policy", policies(Direction.IN, 4, Mode.TUNNEL)[0])
        forge = forger(association)
        plaintext = ip_packet("10.2.0.1", "10.1.0.1", udp()) + bytes((0, IPV4))
        for top in (9000, 9001, 9000 + window, 20000):
            edge = top - window
            numbers = [top, edge + 1, edge, edge - 1, edge + 1, edge + 2, top + 1]
            burst = [(forge(number, plaintext), SOURCES[0]) for number in numbers if number > 0]
            twins.do("open_burst", burst)


def test_the_first_packets_are_not_taken_again_behind_the_last() -> None:
    """With extended sequence numbers the upper half would be what it was."""
    twins = Twins(PROVIDERS[0])
    with twins.running():
        association = sa(Direction.IN, esn=True)
        twins.do("add_sa", association, sequence=(1 << 64) - 3)
        twins.do("add_policy", policies(Direction.IN, 4, Mode.TUNNEL)[0])
        forge = forger(association)
        plaintext = ip_packet("10.2.0.1", "10.1.0.1", udp()) + bytes((0, IPV4))
        numbers = [1, 2, (1 << 64) - 1, 1, 2]
        twins.do("open_burst", [(forge(number, plaintext), SOURCES[0]) for number in numbers])
        (used,) = twins.do("list_sas")
        assert used.usage.packets == 1
        assert used.usage.window_drops == 4
