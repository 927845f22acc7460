"""`natcompat verify` and `natcompat doctor` on a kernel with ESP, where all three backends are viable."""

from __future__ import annotations

import json
import sys

import pytest

from tests.support.running import run

pytestmark = pytest.mark.kernel_esp

if sys.platform != "linux":
    pytest.skip("a kernel of Linux", allow_module_level=True)


def test_the_kernels_esp_keeps_the_contract_through_a_nat() -> None:
    done = run("verify", "--json", "--backend", "linux")
    found = json.loads(done.stdout)
    differences = [
        (trial["path"], trial["version"], each)
        for trial in found["trials"]
        for each in trial["outcomes"]
        if not each["passed"]
    ]
    assert not differences
    assert (done.returncode, done.stderr) == (0, "")
    assert found["nat"], found["skipped"]
    assert len(found["trials"]) == 6
    for trial in found["trials"]:
        assert trial["mode"] == "filter"
        assert trial["duties"]["divert_esp"] == "kernel"
        assert not any(each["woke"] for each in trial["outcomes"])
        assert {each["row"] for each in trial["outcomes"] if each["limit"]} <= {"to a closed port"}


def test_the_doctor_sees_the_kernels_esp() -> None:
    found = json.loads(run("doctor", "--json").stdout)
    assert found["auto"] == "linux"
    assert found["auto_with_consumer"] == "userspace"
    assert {each["support"] for each in found["esp"]} == {"available"}
