"""Ten thousand SAs: as a gateway has them."""

from collections.abc import Callable

import pytest

from tests.bench.xfrm_requests import measure

pytestmark = pytest.mark.kernel_esp


def test_ten_thousand_sas_take_no_longer_than_twice_ip_batch(
    record_property: Callable[[str, object], None],
) -> None:
    measured = measure(10_000, rounds=1)
    for name, value in measured.items():
        record_property(name, round(value, 2))
    assert measured["add / ip -batch"] <= 2
    assert measured["delete / ip -batch"] <= 2
