"""The public conformance suites: `EndpointConformance` here, of IPsec in `natcompat.testing.ipsec`."""

from natcompat.testing.endpoint import EndpointConformance
from natcompat.testing.harness import Bench, EndpointHarness, EspCollector, Service

__all__ = ["Bench", "EndpointConformance", "EndpointHarness", "EspCollector", "Service"]
