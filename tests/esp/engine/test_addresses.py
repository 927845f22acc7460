"""An engine alone assigns no addresses, and says so."""

from __future__ import annotations

import errno

import pytest

from natcompat import NatCompatError
from natcompat.esp.engine import EspEngine


def test_an_engine_without_a_device_assigns_no_addresses() -> None:
    with EspEngine(timer=False) as engine:
        with pytest.raises(NatCompatError, match="no device") as caught:
            engine.add_address("10.9.0.10")
        assert caught.value.errno == errno.EOPNOTSUPP
        assert "TUN" in caught.value.remedy
        with pytest.raises(NatCompatError) as caught:
            engine.remove_address("10.9.0.10")
        assert caught.value.errno == errno.EADDRNOTAVAIL
