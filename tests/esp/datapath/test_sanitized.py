"""The C data path by itself, under sanitizers, shortly. `make sanitize` does it for long."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.ffi.building import ADDRESS, ROOT, THREAD, build
from tests.support.esp import native_providers

pytestmark = [
    pytest.mark.skipif(not native_providers(), reason="the C data path cannot be built here"),
    pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc"),
    pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="it is all sanitized already"),
]


def run(*command: str | Path) -> str:
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_corpus(tmp_path: Path) -> None:
    """What the fuzzer has found interesting, with AddressSanitizer and UndefinedBehaviorSanitizer."""
    program, corpus = tmp_path / "corpus", ROOT / "tests" / "fuzz" / "corpora" / "esp_c.hex"
    build("esp_fuzz", program, "-DMAIN", *ADDRESS)
    assert run(program, corpus) == f"{len(corpus.read_text().splitlines())} inputs\n"


@pytest.mark.parametrize("flags", [ADDRESS, THREAD], ids=["address", "thread"])
def test_hostile_frames_and_datagrams(tmp_path: Path, flags: list[str]) -> None:
    """From both sides of a loop: nothing is read too far, and every merged frame has the right checksums."""
    build("loop_fuzz", tmp_path / "fuzz", *flags)
    said = run(tmp_path / "fuzz", "5000")
    assert said.startswith("5000 bursts; ")
    numbers = [int(word) for word in said.split() if word.isdigit()]
    assert all(number > 500 for number in numbers), said


@pytest.mark.parametrize("program", ["esp_threads", "loop_threads"])
@pytest.mark.parametrize("flags", [ADDRESS, THREAD], ids=["address", "thread"])
def test_changes_while_threads_carry_packets(tmp_path: Path, flags: list[str], program: str) -> None:
    build(program, tmp_path / "threads", *flags)
    assert "60 rounds" in run(tmp_path / "threads", "60")
