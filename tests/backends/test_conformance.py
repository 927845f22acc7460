"""Every backend that is viable here keeps the contract, for root and for an ordinary user."""

from __future__ import annotations

import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

from natcompat.backends.base import Attachment, Backend, Viability
from natcompat.backends.diversion import Diversion
from natcompat.backends.linux import LinuxBackend
from natcompat.backends.userspace import InLineAttachment, UserspaceBackend
from natcompat.contract import Duty, Performer
from natcompat.testing import EndpointConformance, Service
from tests.support.running import becomes_nobody

ON_LINUX: Final = sys.platform == "linux"


class Boaster(UserspaceBackend):
    """Says that the kernel does what nobody does outside the process."""

    def attach(self, sock: socket.socket, diversion: Diversion) -> Attachment:
        """Claim runts and ESP for the kernel, and do nothing."""
        attachment = InLineAttachment("it boasts")
        attachment.duties = {
            **attachment.duties,
            Duty.DROP_RUNTS: Performer.KERNEL,
            Duty.DIVERT_ESP: Performer.KERNEL,
        }
        return attachment


class LinuxSocketHalf(LinuxBackend):
    """The backend's hold on the socket, also where no SA can be installed: UDP_ENCAP diverts anyway."""

    def viability(self) -> Viability:
        """Say what the socket's duties will be, without asking for the kernel's ESP."""
        return Viability(self.name, True, super().viability().duties)


OURS: Final[tuple[str | Backend, ...]] = (
    *((LinuxSocketHalf(),) if ON_LINUX else ()),
    "userspace",
    "userspace:in-line",
)


class TestConformance(EndpointConformance):
    backends = OURS


@pytest.mark.parametrize("consumed", [False, True], ids=["ESP dropped", "ESP consumed"])
def test_the_suite_fails_a_backend_that_claims_duties_it_lacks(
    family: socket.AddressFamily, consumed: bool
) -> None:
    suite, service = EndpointConformance(), Service(Boaster(), consumed)
    with pytest.raises(AssertionError):
        suite.test_select_does_not_wake_for_dropped_datagrams(service, family)


def ordinary_user(*command: str) -> list[str]:
    """Return `command` for the user nobody, who may read the clone, wherever it is, and nothing else.

    The one capability is for a clone or a Python below /root.
    """
    capability = "dac_override"
    return [
        *("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", "--no-new-privs"),
        *(f"--{kind}=-all,+{capability}" for kind in ("inh-caps", "ambient-caps", "bounding-set")),
        *command,
    ]


@becomes_nobody
def test_conformance_for_an_ordinary_user() -> None:
    here = Path(__file__)
    options = ("-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-p", "no:cov", "--color=no")
    run = subprocess.run(
        ordinary_user(sys.executable, "-m", "pytest", *options, f"{here}::TestConformance"),
        cwd=here.parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout + run.stderr
    summary = run.stdout.splitlines()[-1]
    assert re.fullmatch(r"(\d{3,}) passed in [\d.]+s.*", summary), run.stdout
