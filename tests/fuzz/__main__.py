"""Runs the fuzzers, one after the other, from the corpora of tests/fuzz/corpora.

    python -m tests.fuzz [--seconds N] [--keep] [TARGET...]

A corpus is a file of inputs in hexadecimal, one a line; the ordinary tests try all of them
(tests/fuzz/test_corpora.py). With --keep, what reaches more code than before is added to it. An input that
makes a target fail is printed and ends the run; it belongs into the corpus when the failure is repaired. The
target esp_c is C and takes clang with its run-time libraries (libclang-rt-dev); the others take atheris.
"""

from __future__ import annotations

import argparse
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.ffi.building import build

CORPORA = Path(__file__).with_name("corpora")
LONGEST = 512
"""Bytes of an input."""


def fuzz(name: str, program: str, options: list[str]) -> None:
    """Fuzz in this process, by the options of libFuzzer, which may start `program` again; does not return."""
    import atheris

    with atheris.instrument_imports(include=["natcompat"]):
        from tests.fuzz.targets import TARGETS

    atheris.Setup([program, *options], TARGETS[name])
    atheris.Fuzz()


def run(name: str, seconds: int, *, keep: bool) -> bool:
    """Fuzz in another process; return whether nothing failed."""
    corpus = CORPORA / f"{name}.hex"
    with tempfile.TemporaryDirectory(prefix="natcompat-fuzz-") as temporary:
        directory = Path(temporary)
        known, found, merged = (directory / each for each in ("known", "found", "merged"))
        for each in (known, found, merged):
            each.mkdir()
        for number, line in enumerate(corpus.read_text().splitlines()):
            (known / str(number)).write_bytes(bytes.fromhex(line))
        program = directory / "fuzz"
        if name.endswith("_c"):
            build("esp_fuzz", program, "-fsanitize=fuzzer,address,undefined", compiler="clang")
        else:
            program.write_text(
                f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m tests.fuzz --one {name} "$0" "$@"\n'
            )
            program.chmod(0o755)
        command = [str(program), f"-max_len={LONGEST}"]
        limits = [
            f"-max_total_time={seconds}",
            "-len_control=0",
            "-timeout=10",
            f"-artifact_prefix={directory}/",
        ]
        done = subprocess.run(
            [*command, *limits, "-print_final_stats=1", str(found), str(known)], check=False
        )
        for each in sorted(directory.glob("*-*")):
            print(f"{name}: {each.name.split('-')[0]}: {each.read_bytes().hex()}", file=sys.stderr)
        if keep and done.returncode == 0:
            subprocess.run([*command, "-merge=1", str(merged), str(known), str(found)], check=True)
            lines = sorted(
                (each.read_bytes().hex() for each in merged.iterdir()), key=lambda line: (len(line), line)
            )
            corpus.write_text("".join(f"{line}\n" for line in lines))
    return done.returncode == 0


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz")
    parser.add_argument("targets", nargs="*", metavar="TARGET", help="by default all of them")
    parser.add_argument("--seconds", type=int, default=60, help="for each target")
    parser.add_argument("--keep", action="store_true", help="add what is found to the corpora")
    options = parser.parse_args()
    names = options.targets or sorted(each.stem for each in CORPORA.glob("*.hex"))
    if not options.targets and not shutil.which("clang"):
        print("without clang, not: esp_c", file=sys.stderr)
        names.remove("esp_c")
    return 0 if all(run(name, options.seconds, keep=options.keep) for name in names) else 1


if __name__ == "__main__":
    if sys.argv[1:2] == ["--one"]:
        fuzz(sys.argv[2], sys.argv[3], sys.argv[4:])
    sys.exit(main())
