"""NATCOMPAT_OFFLOADS: which offloads are used."""

from __future__ import annotations

import pytest

from natcompat.esp.device.offloads import OFFLOADS, enabled, tun_flags, tun_names

ALL = frozenset(OFFLOADS)


@pytest.mark.parametrize(
    ("setting", "names"),
    [
        ("", ALL),
        ("all", ALL),
        ("none", frozenset()),
        (" NONE ", frozenset()),
        ("-udp-gro", ALL - {"udp-gro"}),
        ("-udp-gro, -uso", ALL - {"udp-gro", "uso"}),
        ("csum,tso4", {"csum", "tso4"}),
        ("csum,tso4,-tso4", {"csum"}),
    ],
)
def test_a_list_names_those_that_are_used(setting: str, names: frozenset[str]) -> None:
    assert enabled(setting) == names


@pytest.mark.parametrize("setting", ["-udpgro", "tso", "none,csum"])
def test_an_unknown_name_is_an_error_that_lists_the_names(setting: str) -> None:
    with pytest.raises(ValueError, match=r"NATCOMPAT_OFFLOADS: '.*' is none of csum, tso4.*none, all"):
        enabled(setting)


def test_the_variable_is_read_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NATCOMPAT_OFFLOADS", "none")
    assert enabled() == frozenset()
    monkeypatch.delenv("NATCOMPAT_OFFLOADS")
    assert enabled() == ALL


def test_segmentation_takes_checksums() -> None:
    assert tun_flags({"tso4", "uso"}) == 0
    assert tun_flags({"csum"}) == 0x01
    assert tun_flags({"csum", "tso4"}) == 0x01 | 0x02 | 0x08
    assert tun_flags({"csum", "uso", "gro"}) == 0x01 | 0x20 | 0x40
    assert tun_names(tun_flags(ALL)) == {"csum", "tso4", "tso6", "uso"}
    assert tun_names(0x20) == frozenset(), "USO4 alone is half of it"
