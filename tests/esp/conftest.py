"""Both data paths for the tests that ask for `datapath`: every engine in such a module has that one."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from natcompat.esp.datapath import DataPathFactory, PortableDataPath
from natcompat.esp.engine import EspEngine
from tests.esp.making import native_providers


@pytest.fixture(scope="module", params=["python", "c"])
def datapath(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a module once with each data path."""
    path: DataPathFactory = PortableDataPath
    if request.param == "c":
        if not native_providers():
            pytest.skip("the C data path is not built: python ffi/build_datapath.py")
        from natcompat.esp.native import NativeDataPath

        path = NativeDataPath
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EspEngine.__init__.__kwdefaults__ or {}, "datapath", path)
        yield request.param
