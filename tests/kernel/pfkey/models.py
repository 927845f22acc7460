"""Models of the systems' kernels, started for one test."""

from __future__ import annotations

import select
from collections.abc import Callable
from typing import Any

import pytest

from natcompat.errors import NatCompatError
from natcompat.ipsec import (
    TrafficSelector,
)
from natcompat.kernel import pfkey
from natcompat.kernel.pfkey.kernel import PfKeyIPsec
from tests.kernel.pfkey import layouts
from tests.kernel.pfkey.model import ModelKernel

SELECTOR = TrafficSelector(source="10.2.0.0/24", destination="10.1.0.0/16")

SYSTEMS = (layouts.FREEBSD, layouts.NETBSD, layouts.OPENBSD, layouts.MACOS, layouts.SOLARIS)

EVERY = pytest.mark.parametrize("system", SYSTEMS, ids=lambda each: each.name)

Opener = Callable[[layouts.System], tuple[ModelKernel, PfKeyIPsec]]


def refused(what: Any, *arguments: Any, **options: Any) -> NatCompatError:
    with pytest.raises(NatCompatError) as caught:
        what(*arguments, **options)
    return caught.value


def pfkey_of(system: layouts.System) -> PfKeyIPsec:
    ipsec = pfkey.open_ipsec(system.name)
    assert isinstance(ipsec, PfKeyIPsec)
    return ipsec


def read(events: Any) -> list[Any]:
    assert select.select([events], [], [], 10)[0]
    return list(events.read())


def extension_of(kind: int, size: int) -> Any:
    from natcompat.kernel.pfkey.messages import extension as made

    return made(kind, bytes(size))
