"""Importing natcompat is cheap: heavy modules are imported when they are used."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import natcompat

ROOT = Path(natcompat.__file__).parent.parent
NEVER_FOR_THE_PACKAGE = {
    *("asyncio", "cffi", "cryptography", "dataclasses", "ipaddress", "pyroute2", "socket", "typing"),
    "importlib.metadata",
}
NEVER_FOR_THE_CALL = {"asyncio", "cffi", "click", "cryptography", "multiprocessing", "pyroute2", "rich"}


def modules_after(statement: str) -> set[str]:
    """Return the names of the modules that `statement` loads in a new interpreter."""
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{statement}\nprint(*sys.modules)"
    run = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


def test_importing_the_package_loads_no_other_module() -> None:
    loaded = modules_after("import natcompat")
    assert "natcompat" in loaded
    assert not loaded & NEVER_FOR_THE_PACKAGE
    assert not {name for name in loaded if name.startswith("natcompat.")}


@pytest.mark.parametrize("name", ["set_nat_t_endpoint", "get_nat_t_endpoint", "classify", "NatTSocket"])
def test_the_call_loads_no_heavy_module(name: str) -> None:
    assert not modules_after(f"from natcompat import {name}") & NEVER_FOR_THE_CALL


@pytest.mark.parametrize("name", natcompat.__all__)
def test_every_public_name_is_defined_and_listed(name: str) -> None:
    assert getattr(natcompat, name) is not None
    assert name in dir(natcompat)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_of_ours"):
        natcompat.nothing_of_ours  # noqa: B018
