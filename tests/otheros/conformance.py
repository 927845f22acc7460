"""The conformance suite over the backend of the modelled system; `Model.pytest` runs it there."""

from __future__ import annotations

import os

from natcompat.testing import EndpointConformance


class TestModelled(EndpointConformance):
    backends = (os.environ["NATCOMPAT_MODEL"],)
