"""The conformance suite under the model of Python on Windows; test_windows.py runs it."""

from __future__ import annotations

from tests.otheros import windows

windows.become()

import natcompat  # noqa: E402
from natcompat.testing import EndpointConformance  # noqa: E402

VIABLE = tuple(each.backend for each in natcompat.probe() if each.viable)
assert VIABLE == ("userspace", "userspace:in-line"), VIABLE


class TestWindows(EndpointConformance):
    backends = VIABLE
