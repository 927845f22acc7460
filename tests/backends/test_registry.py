"""The registry and the choice: who is there, who is viable, who is chosen, and what a refusal says."""

from __future__ import annotations

import errno
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any

import pytest

from natcompat import backends, get_nat_t_endpoint, set_nat_t_endpoint
from natcompat.backends import base
from natcompat.backends.base import Viability
from natcompat.backends.linux import LinuxBackend
from natcompat.backends.userspace import UserspaceBackend
from natcompat.contract import Duty, Performer
from natcompat.errors import BackendUnavailableError
from tests.support.linux import (
    LINUX,
    Collector,
    at,
    ike,
    send_ike,
    state,
    udp,
)

ENV = backends.ENVIRONMENT_VARIABLE
PROCESS = dict.fromkeys(Duty, Performer.PROCESS)
BUILT_IN = [
    *("linux", "solaris", "freebsd", "netbsd", "openbsd", "macos"),
    *("userspace", "userspace:in-line"),
]


@pytest.fixture(autouse=True)
def unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment of the run asks for."""
    monkeypatch.delenv(ENV, raising=False)


class Named:
    """A backend of somebody else's."""

    hands_over_esp = True

    def __init__(self, name: str = "named", viable: bool = True, **found: Any) -> None:
        self.name = name
        self._found = Viability(name, viable, **found)

    def viability(self) -> Viability:
        return self._found

    def attach(self, sock: socket.socket, diversion: Any) -> Any:
        return UserspaceBackend(in_line=True).attach(sock, diversion)


# --- the registry -----------------------------------------------------------------------------------


def test_built_in_names_come_first_in_the_order_of_auto() -> None:
    names = backends.names()
    assert names[: len(BUILT_IN)] == BUILT_IN


def test_a_backend_is_made_once_and_knows_its_name() -> None:
    for name in backends.names():
        assert backends.get(name) is backends.get(name)
        assert backends.get(name).name == name


def test_probe_asks_every_backend_and_changes_nothing() -> None:
    with udp() as sock:
        before = state(sock)
        found = backends.probe()
        assert state(sock) == before
    assert [viability.backend for viability in found] == backends.names()
    for viability in found:
        assert viability.reason
        # against being another operating system there is no remedy
        assert viability.viable or viability.remedy or not backends.is_for_this_system(viability.backend)
        assert not viability.viable or set(viability.duties) == set(Duty)


@pytest.mark.parametrize("ask", [backends.get, backends.viability, backends.select])
def test_an_unknown_name_is_refused_with_the_list(ask: Any) -> None:
    with pytest.raises(BackendUnavailableError) as raised:
        ask("solarish")
    assert raised.value.errno == errno.EINVAL
    assert "'solarish'" in str(raised.value)
    for name in backends.names():
        assert (name in raised.value.remedy) == backends.is_for_this_system(name)
    assert "auto" in raised.value.remedy


def test_a_backend_of_another_system_says_so_without_being_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "freebsd14")
    monkeypatch.setattr(backends, "get", lambda name: pytest.fail(f"{name} was loaded"))
    found = backends.viability("linux")
    assert (found.viable, found.reason) == (False, "it is for linux; this is freebsd14")


# --- the choice -------------------------------------------------------------------------------------


def viable(monkeypatch: pytest.MonkeyPatch, *names: str, by_name_only: tuple[str, ...] = ()) -> None:
    """Let exactly these built-in backends be viable; a model of other machines."""

    def answer(name: str) -> Viability:
        if name not in backends.names():
            backends.get(name)  # raises
        return Viability(
            name, name in names, PROCESS, f"{name} is out.", "Mend it.", automatic=name not in by_name_only
        )

    monkeypatch.setattr(backends, "viability", answer)


@pytest.mark.parametrize(
    ("asked", "here", "hands_over", "chosen"),
    [
        pytest.param("auto", ["linux", "userspace"], False, "linux", id="auto prefers the kernel"),
        pytest.param("auto", ["userspace"], False, "userspace", id="auto without ESP in the kernel"),
        pytest.param("auto", ["linux", "userspace"], True, "userspace", id="auto with a consumer of ESP"),
        pytest.param("userspace", ["linux", "userspace"], False, "userspace", id="one name"),
        pytest.param("linux,userspace", ["userspace"], False, "userspace", id="the second of two"),
        pytest.param(" linux , userspace,", ["userspace"], False, "userspace", id="spaces and commas"),
        pytest.param(
            "linux,userspace", ["linux", "userspace"], True, "userspace", id="the first that hands over"
        ),
        pytest.param("linux,auto", ["userspace"], False, "userspace", id="auto at the end"),
        pytest.param("userspace,nonsense", ["userspace"], False, "userspace", id="what is not reached"),
    ],
)
@pytest.mark.parametrize("by", ["argument", "environment"])
def test_the_choice(
    monkeypatch: pytest.MonkeyPatch, asked: str, here: list[str], hands_over: bool, chosen: str, by: str
) -> None:
    viable(monkeypatch, *here)
    if by == "environment":
        monkeypatch.setenv(ENV, asked)
    requested = asked if by == "argument" else None
    assert backends.select(requested, hands_over_esp=hands_over).name == chosen


def test_the_argument_goes_before_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(ENV, "nonsense")
    assert backends.select("userspace:in-line").name == "userspace:in-line"


@pytest.mark.parametrize("empty", ["", None])
def test_an_empty_variable_is_none(monkeypatch: pytest.MonkeyPatch, empty: str | None) -> None:
    viable(monkeypatch, "userspace")
    monkeypatch.setenv(ENV, "")
    assert backends.select(empty).name == "userspace"


def test_auto_chooses_no_backend_that_works_by_name_only(monkeypatch: pytest.MonkeyPatch) -> None:
    viable(monkeypatch, "linux", "userspace", by_name_only=("linux",))
    assert backends.select().name == "userspace"
    assert backends.select("linux").name == "linux"


def test_in_line_is_never_chosen_by_auto() -> None:
    assert not backends.viability("userspace:in-line").automatic


@pytest.mark.parametrize("by", ["argument", "environment"])
def test_a_refusal_names_every_reason_the_remedies_and_what_is_left(
    monkeypatch: pytest.MonkeyPatch, by: str
) -> None:
    viable(monkeypatch, "userspace:in-line")
    monkeypatch.setenv(ENV, "linux,userspace")
    with pytest.raises(BackendUnavailableError) as raised:
        backends.select("linux,userspace" if by == "argument" else None)
    text = str(raised.value)
    assert raised.value.errno == errno.ENOTSUP
    assert "linux: linux is out (Mend it); userspace: userspace is out (Mend it)" in text
    assert (f"{ENV}=linux,userspace" in text) == (by == "environment")
    assert raised.value.remedy.startswith("Choose among auto, userspace:in-line")


@pytest.mark.parametrize("asked", [",", " , "])
def test_a_list_of_nothing_is_refused(asked: str) -> None:
    with pytest.raises(BackendUnavailableError, match="no name was given") as raised:
        backends.select(asked)
    assert raised.value.errno == errno.ENOTSUP


@pytest.mark.parametrize("asked", ["nonsense", "linux,nonsense", "nonsense,userspace"])
def test_an_unknown_name_that_is_reached_is_an_error(monkeypatch: pytest.MonkeyPatch, asked: str) -> None:
    """It is never skipped: a misspelt name must not turn into another backend."""
    viable(monkeypatch, "userspace")
    with pytest.raises(BackendUnavailableError, match="'nonsense'"):
        backends.select(asked)


def test_an_object_is_a_backend_as_well() -> None:
    mine = Named()
    assert backends.select(mine) is mine
    with udp() as sock:
        assert set_nat_t_endpoint(sock, backend=mine).backend == "named"


def test_an_object_that_is_not_viable_is_refused() -> None:
    mine = Named(viable=False, reason="it is broken.", remedy="Repair it.")
    with pytest.raises(BackendUnavailableError, match=r"named: it is broken \(Repair it\)") as raised:
        backends.select(mine)
    assert raised.value.errno == errno.ENOTSUP


@LINUX
def test_a_consumer_of_esp_is_refused_where_the_kernel_takes_esp(monkeypatch: pytest.MonkeyPatch) -> None:
    viable(monkeypatch, "linux", "userspace")
    with udp() as sock:
        before = state(sock)
        for arguments in ({"backend": "linux"}, {"backend": LinuxBackend()}):
            monkeypatch.setattr(LinuxBackend, "viability", lambda _: Viability("linux", True))
            with pytest.raises(BackendUnavailableError, match="ESP goes to the kernel") as raised:
                set_nat_t_endpoint(sock, esp=Collector(), **arguments)
            assert raised.value.errno == errno.ENOTSUP
            assert get_nat_t_endpoint(sock) is None
            assert state(sock) == before


def test_an_unknown_or_refused_backend_leaves_the_socket_alone() -> None:
    with udp() as sock:
        before = type(sock), sock.gettimeout()
        for refused in ("nonsense", Named(viable=False, reason="no")):
            with pytest.raises(BackendUnavailableError):
                set_nat_t_endpoint(sock, backend=refused)
            assert (type(sock), sock.gettimeout()) == before


# --- entry points -----------------------------------------------------------------------------------

PLUGIN = """
from natcompat.backends.base import Viability
from natcompat.backends.userspace import UserspaceBackend

class Plugin(UserspaceBackend):
    def __init__(self):
        super().__init__(in_line=True)
        self.name = "plugin"

def nothing():
    return object()

class Liar(Plugin):
    def viability(self):
        return None

class Raising(Plugin):
    def __init__(self):
        raise RuntimeError("its library is too old")
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A distribution as pip installs it, in a directory of its own on sys.path."""
    (tmp_path / "natcompat_plugin.py").write_text(PLUGIN)
    info = tmp_path / "natcompat_plugin-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: natcompat-plugin\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[natcompat.backends]\n"
        "plugin = natcompat_plugin:Plugin\n"
        "absent = natcompat_no_such_module:Backend\n"
        "nothing = natcompat_plugin:nothing\n"
        "liar = natcompat_plugin:Liar\n"
        "raising = natcompat_plugin:Raising\n"
        "userspace = natcompat_plugin:Plugin\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    PathFinder.invalidate_caches()
    known = dict(backends._instances)
    yield tmp_path
    backends._instances.clear()
    backends._instances.update(known)
    sys.modules.pop("natcompat_plugin", None)


@pytest.mark.usefixtures("plugin")
def test_an_installed_distribution_brings_a_backend() -> None:
    assert backends.names()[len(BUILT_IN) :] == ["absent", "liar", "nothing", "plugin", "raising"]
    assert backends.viability("plugin").viable
    with udp() as sock, udp() as peer:
        endpoint = set_nat_t_endpoint(sock, backend="plugin")
        assert endpoint.backend == "plugin"
        send_ike(peer, at(sock), 1)
        assert sock.recv(64) == ike(1)


@pytest.mark.usefixtures("plugin")
def test_a_name_of_natcompats_own_cannot_be_taken() -> None:
    assert type(backends.get("userspace")) is UserspaceBackend


BROKEN = pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("absent", "No module named 'natcompat_no_such_module'"),
        ("nothing", "'object' object has no attribute 'viability'"),
        ("liar", "its viability() returned NoneType"),
        ("raising", "its library is too old"),
    ],
)


@BROKEN
@pytest.mark.usefixtures("plugin")
def test_a_broken_plugin_breaks_nothing_but_itself(name: str, reason: str) -> None:
    found = {viability.backend: viability for viability in backends.probe()}
    assert found["userspace"].viable
    assert not found[name].viable
    assert reason in found[name].reason
    assert found[name].remedy


@BROKEN
@pytest.mark.usefixtures("plugin")
def test_a_broken_plugin_that_is_asked_for_is_refused_with_its_reason(name: str, reason: str) -> None:
    with pytest.raises(BackendUnavailableError) as raised:
        backends.select(name)
    assert reason in str(raised.value)
    assert backends.select(f"{name},userspace").name == "userspace"


def test_a_plugin_is_found_by_a_program_that_starts_with_it(plugin: Path) -> None:
    code = "import natcompat.backends as b; print(b.select().name)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, ENV: "plugin", "PYTHONPATH": os.pathsep.join([str(plugin), *sys.path])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "plugin"


def test_built_in_backends_have_the_attributes_of_the_protocol() -> None:
    """What natcompat's own backends have, a third party's has to have."""
    for name in BUILT_IN:
        backend: base.Backend = backends.get(name)
        assert isinstance(backend.hands_over_esp, bool)
