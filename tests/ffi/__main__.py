"""Runs the C data path under sanitizers and valgrind: `python -m tests.ffi`, or `make sanitize`.

The programs of this directory for long, then the tests that use the path, the extension itself built with
AddressSanitizer and UndefinedBehaviorSanitizer. Minutes.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.ffi.building import ADDRESS, ROOT, THREAD, build

CORPUS = ROOT / "tests" / "fuzz" / "corpora" / "esp_c.hex"
TESTS = [
    "datapath/test_differential.py",
    "datapath/test_offload.py",
    "engine/test_engine.py",
    "engine/test_bad_input.py",
    "engine/test_nonces.py",
    "engine/test_vectors.py",
    "carrier/test_loop.py",
]


def run(title: str, *command: str | Path, **environment: str) -> None:
    """Run `command`, and stop at what fails."""
    print(f"[sanitize] {title}", flush=True)
    subprocess.run([*map(str, command)], check=True, env={**os.environ, **environment}, cwd=ROOT)


def runtime(name: str) -> str:
    """Return the path of gcc's library `name`."""
    command = ["gcc", f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.ffi")
    parser.add_argument("--rounds", type=int, default=20_000, help="of changes while threads carry packets")
    parser.add_argument("--bursts", type=int, default=1_000_000, help="of hostile frames and datagrams")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="natcompat-sanitize-") as temporary:
        directory = Path(temporary)
        threads, corpus = directory / "threads", directory / "corpus"
        for title, flags in (("ThreadSanitizer", THREAD), ("AddressSanitizer", ADDRESS)):
            build("esp_threads", threads, *flags)
            run(f"{title}: SAs change while threads carry packets", threads, str(options.rounds))
            build("loop_threads", threads, *flags)
            run(f"{title}: all changes under loops that carry packets", threads, str(options.rounds // 10))
            build("loop_fuzz", threads, *flags)
            run(f"{title}: hostile frames and datagrams through a loop", threads, str(options.bursts))
        build("esp_fuzz", corpus, "-DMAIN", *ADDRESS)
        run("AddressSanitizer, UndefinedBehaviorSanitizer: the corpus", corpus, CORPUS)
        if shutil.which("valgrind"):
            build("esp_fuzz", corpus, "-DMAIN")
            strict = [
                "valgrind",
                "-q",
                "--error-exitcode=9",
                "--leak-check=full",
                "--show-leak-kinds=definite",
            ]
            run("valgrind: the corpus", *strict, corpus, CORPUS)
        built = directory / "built"
        builder = [sys.executable, "ffi/build_datapath.py", "--into", str(built)]
        run("the extension", *builder, "--", "-g", "-O1", *ADDRESS)
        tests = [f"tests/esp/{name}" for name in TESTS]
        run(
            "AddressSanitizer, UndefinedBehaviorSanitizer: the tests",
            *(sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "not python", *tests),
            NATCOMPAT_TEST_DATAPATH=str(built / "natcompat" / "esp"),
            ASAN_OPTIONS="detect_leaks=0",  # Python's own
            LD_PRELOAD=f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        )


if __name__ == "__main__":
    main()
