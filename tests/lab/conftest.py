"""Fixtures of the lab."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator

import pytest

from natcompat.kernel.pfkey.kernel import PfKeyIPsec
from natcompat.kernel.xfrm.kernel import XfrmIPsec
from tests.lab.making import emptied, open_pfkey
from tests.lab.topology import Network


@pytest.fixture(scope="session")
def built_network() -> Iterator[Network]:
    network = Network()
    yield network
    network.remove()


@pytest.fixture
def network(built_network: Network) -> Iterator[Network]:
    built_network.open()
    yield built_network
    built_network.close()


@pytest.fixture
def ipsec() -> Iterator[XfrmIPsec]:
    """IPsec of the lab's own namespace, where there is no traffic; empty before."""
    subprocess.run(["ip", "xfrm", "state", "flush"], check=True)  # what is not ESP, too
    with XfrmIPsec() as opened:
        opened.flush_policies()
        opened.flush_sas()
        yield opened


@pytest.fixture
def pfkey() -> Iterator[PfKeyIPsec]:
    """IPsec over af_key, in the lab's own namespace; empty before and after."""
    with emptied(open_pfkey()) as opened:
        yield opened
