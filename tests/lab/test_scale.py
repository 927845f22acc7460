"""Ten thousand SAs: as a gateway has them."""

import json
import os
import subprocess
import sys
from collections.abc import Callable

import pytest

pytestmark = pytest.mark.kernel_esp


def test_ten_thousand_sas_take_no_longer_than_twice_ip_batch(
    record_property: Callable[[str, object], None],
) -> None:
    # in a process of its own, which nothing traces
    environment = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE_")}
    command = [sys.executable, "-m", "tests.bench.xfrm_requests", "10000", "1"]
    run = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    measured = json.loads(run.stdout)
    for name, value in measured.items():
        record_property(name, value)
    assert measured["add / ip -batch"] <= 2
    assert measured["delete / ip -batch"] <= 2
