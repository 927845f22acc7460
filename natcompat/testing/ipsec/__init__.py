"""The conformance suite of `natcompat.ipsec.IPsec`: its verbs, events and traffic, on an implementation.

Who writes one subclasses `IPsecConformance` in a test module, and pytest does the rest::

    from natcompat.testing.ipsec import IPsecConformance, IPsecTrafficConformance

    class TestMine(IPsecConformance):
        def open_ipsec(self) -> IPsec: ...        # empty, with the privilege that it needs

    class TestMyTraffic(IPsecTrafficConformance): # also with `seal` and `deliver`
        ...

The kernel's ESP and the one in this process are held to the same tests. The peer in the traffic
tests is `natcompat.esp.engine.engine.EspEngine`. pytest is needed only where pytest runs this; to see the
values in a failed assertion, put ``pytest.register_assert_rewrite("natcompat.testing.ipsec")``
before the import.
"""

from natcompat.testing.ipsec.harness import TRANSFORMS, IPsecHarness
from natcompat.testing.ipsec.traffic import IPsecTrafficConformance
from natcompat.testing.ipsec.verbs import IPsecConformance

__all__ = ["TRANSFORMS", "IPsecConformance", "IPsecHarness", "IPsecTrafficConformance"]
