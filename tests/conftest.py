"""What all tests share: sockets that close, both families, and the rule that CI skips nothing."""

from __future__ import annotations

import atexit
import contextlib
import os
import shutil
import socket
import sys
import tempfile
from collections.abc import Callable, Generator, Iterator

import pytest

from tests.support.pairs import KINDS, Kind, Pair

pytest_plugins = ("tests.lab.plugin",)
pytest.register_assert_rewrite("natcompat.testing.ipsec")  # before any module of the tests imports it

MakeSocket = Callable[..., socket.socket]

if _built := os.environ.get("NATCOMPAT_TEST_DATAPATH"):  # another build of the C data path, by tests/ffi
    import natcompat.esp

    natcompat.esp.__path__.insert(0, _built)

if "NATCOMPAT_CONTROL" not in os.environ:  # other sessions on this machine have engines of their own
    _control, _session = tempfile.mkdtemp(prefix="natcompat-control-"), os.getpid()
    os.environ["NATCOMPAT_CONTROL"] = _control

    @atexit.register
    def _remove_control() -> None:
        if os.getpid() == _session:  # and no forked child
            shutil.rmtree(_control, ignore_errors=True)


NO_SKIPS = os.environ.get("CI") == "true" and hasattr(os, "geteuid") and os.geteuid() == 0
"""Continuous integration runs as root and has everything: a skip there is a hole in the tests."""


@pytest.fixture(params=[socket.AF_INET, socket.AF_INET6], ids=["IPv4", "IPv6"])
def family(request: pytest.FixtureRequest) -> socket.AddressFamily:
    """Every address family that the option is for."""
    chosen: socket.AddressFamily = request.param
    return chosen


@pytest.fixture
def loopback(family: socket.AddressFamily) -> tuple[str, int]:
    """The loopback address of the family, with a port of the kernel's choice."""
    return ("::1" if family == socket.AF_INET6 else "127.0.0.1"), 0


@pytest.fixture
def udp(family: socket.AddressFamily, loopback: tuple[str, int]) -> Iterator[MakeSocket]:
    """Make UDP sockets on loopback, with a timeout of 5 s; closed at the end of the test."""
    with contextlib.ExitStack() as open_sockets:

        def make(cls: type[socket.socket] = socket.socket, *, bound: bool = True) -> socket.socket:
            sock = open_sockets.enter_context(cls(family, socket.SOCK_DGRAM))
            sock.settimeout(5)
            if bound:
                sock.bind(loopback)
            return sock

        yield make


@pytest.fixture(params=KINDS, ids=lambda kind: kind.name)
def kind(request: pytest.FixtureRequest) -> Kind:
    """Every way of serving a socket."""
    chosen: Kind = request.param
    return chosen


@pytest.fixture
def pair(kind: Kind, family: socket.AddressFamily) -> Iterator[Pair]:
    """An endpoint on loopback and its peer."""
    with contextlib.ExitStack() as stack:
        yield Pair(kind, family, stack)


@pytest.fixture(scope="module", params=["python", "c"])
def datapath(request: pytest.FixtureRequest) -> Iterator[str]:
    """Both data paths: every engine that a module makes, or `open_ipsec`, while it has this fixture."""
    from natcompat.esp import choice as datapaths
    from natcompat.esp.engine.data_path import DataPathFactory
    from natcompat.esp.engine.engine import EspEngine
    from natcompat.esp.engine.portable import PortableDataPath
    from tests.support.esp import native_providers

    path: DataPathFactory = PortableDataPath
    if request.param == "c":
        if not native_providers():
            pytest.skip("the C data path is not built: python ffi/build_datapath.py")
        from natcompat.esp.datapath.native import NativeDataPath

        path = NativeDataPath
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(EspEngine.__init__.__kwdefaults__ or {}, "datapath", path)
        patch.setenv(datapaths.ENVIRONMENT_VARIABLE, request.param)
        with EspEngine(timer=False) as engine:
            assert type(engine.path) is path
        yield request.param


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """Turn a skip into a failure where nothing may skip."""
    report = yield
    if NO_SKIPS and report.skipped and not hasattr(report, "wasxfail"):
        report.outcome, report.longrepr = "failed", _complaint(report.longrepr)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    """Turn the skip of a whole module into an error where nothing may skip."""
    report = yield
    if NO_SKIPS and report.skipped:
        report.outcome, report.longrepr = "failed", _complaint(report.longrepr)
    return report


def _complaint(skip: object) -> str:
    reason = skip[2] if isinstance(skip, tuple) else skip
    return (
        f"{reason}\n\nAs root with CI=true no test may skip: give it what it needs (.ci/setup names the "
        "packages), or take CI out of the environment."
    )


@pytest.fixture(autouse=True)
def used_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let each test begin with a process that has used no keys: tests share a few."""
    nonces = sys.modules.get("natcompat.esp.engine.nonces")
    if nonces is not None:
        monkeypatch.setattr(nonces, "USED_KEYS", nonces.UsedKeys())
