"""Fixtures of the tests of PF_KEY."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from natcompat.kernel import pfkey
from natcompat.kernel.pfkey import transport
from natcompat.kernel.pfkey.kernel import PfKeyIPsec
from tests.kernel.pfkey import layouts
from tests.kernel.pfkey.model import ModelKernel
from tests.kernel.pfkey.models import Opener


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Iterator[Opener]:
    """Start a model; return it, and IPsec on it."""
    closing: list[Any] = []

    def begin(system: layouts.System) -> tuple[ModelKernel, PfKeyIPsec]:
        kernel = ModelKernel(system)
        closing.append(kernel)
        monkeypatch.setattr(transport, "open_socket", kernel.open)
        ipsec = pfkey.open_ipsec(system.name)
        assert isinstance(ipsec, PfKeyIPsec)
        closing.append(ipsec)
        return kernel, ipsec

    yield begin
    for each in reversed(closing):
        each.close()
