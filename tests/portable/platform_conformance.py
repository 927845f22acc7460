"""The conformance suite over every backend that works on this operating system.

`.ci/portable` runs this module alone, on systems that the other tests are not made for; it needs
natcompat and pytest.
"""

from __future__ import annotations

import natcompat
from natcompat.testing import EndpointConformance

VIABLE = tuple(each.backend for each in natcompat.probe() if each.viable)


class TestPlatform(EndpointConformance):
    backends = VIABLE


def test_some_backend_works() -> None:
    assert "userspace:in-line" in VIABLE
