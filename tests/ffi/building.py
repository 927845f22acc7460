"""Builds the programs of this directory with the sources of the C data path."""

from __future__ import annotations

import subprocess
import tomllib
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
PROVIDERS = {"WITH_LIBCRYPTO": "<openssl/evp.h>", "WITH_IPSEC_MB": "<intel-ipsec-mb.h>"}

ADDRESS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
THREAD = ["-fsanitize=thread"]


def sources() -> list[str]:
    """Return the C files of the data path."""
    declared = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"]
    (found,) = (each["sources"] for each in declared if each["name"] == "natcompat.esp.datapath.compiled")
    return [str(ROOT / each) for each in found]


def build(name: str, target: Path, *flags: str, compiler: str = "gcc") -> None:
    """Build the program `name` as `target`."""
    defined = [
        f"-D{macro}={int(_compiles(f'#include {header}', compiler))}" for macro, header in PROVIDERS.items()
    ]
    command = [compiler, "-std=gnu11", "-g", "-O1", "-Wall", f"-I{ROOT / 'ffi'}", *defined, *flags]
    libraries = ["-lpthread", "-ldl", *(["-lcrypto"] if "-DWITH_LIBCRYPTO=1" in defined else [])]
    subprocess.run([*command, str(HERE / f"{name}.c"), *sources(), *libraries, "-o", str(target)], check=True)


def _compiles(program: str, compiler: str) -> bool:
    command = [compiler, "-fsyntax-only", "-xc", "-"]
    done = subprocess.run(command, input=program.encode(), stderr=subprocess.DEVNULL, check=False)
    return done.returncode == 0
