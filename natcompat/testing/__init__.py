"""The public conformance suites: `EndpointConformance` here, of IPsec in `natcompat.testing.ipsec`."""

from natcompat.testing.endpoint import (
    Bench,
    EndpointConformance,
    EndpointHarness,
    EspCollector,
    Service,
)

__all__ = ["Bench", "EndpointConformance", "EndpointHarness", "EspCollector", "Service"]
