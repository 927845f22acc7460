"""The doctor tells the truth about this machine, and leaves it as it was."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from natcompat import backends
from natcompat.commands.doctor import examine as doctor
from natcompat.commands.doctor import report as doctor_report
from natcompat.commands.doctor import system
from natcompat.commands.verify.namespaces import Topology
from natcompat.errors import NatCompatError
from natcompat.kernel.xfrm.bypass import bypass
from natcompat.kernel.xfrm.esp_support import EspSupport
from natcompat.kernel.xfrm.probe import probe_esp
from tests.support.running import as_nobody, run, run_on_terminal

SHAPE = {
    "schema": int,
    "natcompat": str,
    "auto": str,
    "auto_with_consumer": str,
    "requested": {"value": (str, type(None)), "backend": (str, type(None)), "error": (str, type(None))},
    "backends": [
        {"name": str, "viable": bool, "automatic": bool, "duties": dict, "reason": str, "remedy": str}
    ],
    "esp": [{"family": str, "algorithm": str, "support": str, "reason": str, "remedy": str}],
    "xfrm": {
        "bypass": (bool, type(None)),
        "keepalive": (bool, type(None)),
        "sa_direction": (bool, type(None)),
        "reason": str,
        "remedy": str,
    },
    "pfkey": {
        "asked": (str, type(None)),
        "error": (str, type(None)),
        "dialect": (str, type(None)),
        "usable": (bool, type(None)),
        "reason": str,
        "remedy": str,
        "limits": [str],
    },
    "privileges": {"user": int, "capabilities": dict},
    "guard": {"usable": (bool, type(None)), "reason": str, "remedy": str},
    "offloads": dict,
    "hand_back": {"way": str, "reason": str},
    "tun": {
        "usable": (bool, type(None)),
        "reason": str,
        "remedy": str,
        "stale_rules": (int, type(None)),
    },
    "userspace_esp": {
        "datapath": (str, type(None)),
        "requested": (str, type(None)),
        "error": (str, type(None)),
        "datapaths": [{"name": str, "viable": bool, "reason": str}],
        "device": str,
    },
    "ports": [{"port": int, "family": str, "address": str, "user": int, "owners": list}],
    "system": {
        "kernel": str,
        "machine": str,
        "python": str,
        "sandbox": list,
        "seccomp": (str, type(None)),
        "unprivileged_bpf": (str, type(None)),
        "gevent": (str, type(None)),
        "uvloop": (str, type(None)),
    },
    "beyond_solaris": [str],
}

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def report(*arguments: str, **more: Any) -> dict[str, Any]:
    done = run("doctor", "--json", *arguments, **more)
    assert not done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert done.returncode == (0 if found["auto"] else 1)
    return found


def check_shape(value: object, shape: Any, where: str = "report") -> None:
    if isinstance(shape, dict):
        assert isinstance(value, dict), where
        assert value.keys() == shape.keys(), where
        for key, inner in shape.items():
            check_shape(value[key], inner, f"{where}.{key}")
    elif isinstance(shape, list):
        assert isinstance(value, list), where
        for each in value:
            check_shape(each, shape[0], f"{where}[]")
    else:
        assert isinstance(value, shape), where


@linux_only
def test_json_has_the_documented_keys() -> None:
    found = report()
    check_shape(found, SHAPE)
    assert found["schema"] == 1
    assert doctor.__doc__ is not None
    for key in SHAPE.keys() - {"schema"}:
        assert f"``{key}``" in doctor.__doc__


def test_the_data_path_is_named() -> None:
    found = report(env={"NATCOMPAT_DATAPATH": "python"})["userspace_esp"]
    assert (found["datapath"], found["requested"], found["error"]) == ("python", "python", None)
    assert found["datapaths"][-1]["name"] == "python"
    assert found["datapaths"][-1]["viable"]
    found = report(env={"NATCOMPAT_DATAPATH": "fastest"})["userspace_esp"]
    assert found["datapath"] is None
    assert "fastest" in found["error"]
    assert "python" in found["error"]
    assert "fastest" in run("doctor", env={"NATCOMPAT_DATAPATH": "fastest"}).stdout


def test_agrees_with_the_registry() -> None:
    found = report()
    assert [(each["name"], each["viable"]) for each in found["backends"]] == [
        (each.backend, each.viable) for each in backends.probe()
    ]
    assert found["auto"] == backends.select("auto").name
    for each in found["backends"]:
        assert each["reason"].endswith(".")
        assert each["viable"] or each["remedy"] or "it is for" in each["reason"].lower()


@linux_only
def test_esp_is_what_the_probe_says() -> None:
    for each in report()["esp"]:
        family = {"IPv4": socket.AF_INET, "IPv6": socket.AF_INET6}[each["family"]]
        if each["algorithm"] == "AES-GCM-16":
            found = probe_esp("rfc4106(gcm(aes))", "", family=family).support
            if found is not EspSupport.NO_PRIVILEGE:
                assert each["support"] == found.value


@linux_only
def test_exemption_from_policies_is_what_an_endpoint_gets() -> None:
    found = report()["xfrm"]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        refusal: NatCompatError | None = None
        try:
            bypass(sock)
        except NatCompatError as error:
            refusal = error
    assert found["bypass"] is (refusal is None)
    assert (refusal.remedy if refusal else "") in found["remedy"]
    assert bool(found["reason"]) == bool(refusal)


@pytest.mark.parametrize(
    ("value", "backend", "error"),
    [
        ("userspace", "userspace", ""),
        ("no-such,userspace:in-line", None, "there is no backend"),
        ("", None, ""),
    ],
    ids=["viable", "unknown", "empty"],
)
def test_what_the_environment_asks_for(value: str, backend: str | None, error: str) -> None:
    requested = report(env={"NATCOMPAT_BACKEND": value})["requested"]
    assert requested["value"] == (value or None)
    assert requested["backend"] == backend
    assert error in (requested["error"] or "")
    assert bool(requested["error"]) == bool(error)


@linux_only
@pytest.mark.parametrize(
    ("family", "address", "shown"),
    [(socket.AF_INET, "127.1.2.3", "127.1.2.3"), (socket.AF_INET6, "::1", "::1")],
    ids=["IPv4", "IPv6"],
)
def test_owner_of_a_port(family: int, address: str, shown: str) -> None:
    with socket.socket(family, socket.SOCK_DGRAM) as sock:
        sock.bind((address, 0))
        found = [each for each in system.owners_of_port(sock.getsockname()[1]) if each["address"] == shown]
    assert len(found) == 1
    assert found[0]["user"] == os.geteuid()
    assert found[0]["owners"] == [
        {"pid": os.getpid(), "command": Path("/proc/self/comm").read_text().strip()}
    ]


@linux_only
def test_a_free_port_has_no_owner() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    assert [each for each in system.owners_of_port(port) if each["address"] == "127.0.0.1"] == []


@linux_only
def test_leaves_no_device_behind() -> None:
    before = sorted(os.listdir("/sys/class/net"))
    assert system.tun_device()["usable"] in (True, False, None)
    assert sorted(os.listdir("/sys/class/net")) == before


@linux_only
@pytest.mark.parametrize("arguments", [(), ("--json",)], ids=["text", "json"])
def test_as_an_ordinary_user(arguments: tuple[str, ...]) -> None:
    prefix = as_nobody()
    if not prefix:
        pytest.skip("no Python of this version is in an ordinary user's reach")
    done = run("doctor", *arguments, prefix=prefix)
    assert (done.returncode, done.stderr) == (0, "")
    assert "CAP_NET_ADMIN" in done.stdout
    if arguments:
        found = json.loads(done.stdout)
        assert not found["privileges"]["capabilities"]["CAP_NET_ADMIN"]
        assert found["auto"] == "userspace"
        assert found["tun"]["usable"] is not True
        asked = found["xfrm"]
        assert (asked["bypass"], asked["keepalive"], asked["sa_direction"]) == (False, None, None)
        assert "CAP_NET_ADMIN" in asked["remedy"]


def test_without_cryptography(tmp_path: Path) -> None:
    """Where it is not installed, as on Solaris, that is what the doctor has to tell."""
    (tmp_path / "cryptography.py").write_text("raise ImportError('not installed')")
    without = {"PYTHONPATH": str(tmp_path)}
    found = report(env=without)["userspace_esp"]
    assert found["datapath"] is None
    assert not any(each["viable"] for each in found["datapaths"])
    assert "pip install 'natcompat[userspace]'" in found["error"]
    assert "It cannot be had: " in run("doctor", env=without).stdout


@linux_only
def test_a_port_of_somebody_else() -> None:
    prefix = as_nobody()
    if os.geteuid() != 0 or not prefix:
        pytest.skip("takes root and an ordinary user")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.4.5.6", 0))
        port = sock.getsockname()[1]
        script = f"from natcompat.commands.doctor import system; print(list(system.owners_of_port({port})))"
        done = subprocess.run([*prefix, "-c", script], capture_output=True, text=True, check=True)
    assert "'owners': []" in done.stdout
    assert "'user': 0" in done.stdout


@pytest.mark.parametrize("width", [80, 90, 120])
def test_loses_no_letter_on_a_terminal(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    found = doctor.examine()
    terminal = Terminal()
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setattr(sys, "stdout", terminal)
    doctor_report.show(found)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", terminal.getvalue()).splitlines()
    header = next(line for line in lines if line.split()[-1:] == ["why"])
    text = "".join("".join(line[header.index("why") :].split()) for line in lines)
    for each in found["backends"]:
        assert "".join(each["reason"].split()) in text


@pytest.mark.parametrize("width", [80, 100, 160])
def test_fits_on_a_terminal(width: int) -> None:
    status, shown = run_on_terminal("doctor", width=width)
    assert status == 0
    for words in (
        "Backends",
        "ESP in the kernel",
        "Privileges",
        "ESP in this process",
        "UDP ports of IKE",
        "System",
        "auto takes",
    ):
        assert words in shown


def test_says_when_no_backend_is_viable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    found = doctor.examine()
    found["auto"] = found["auto_with_consumer"] = None
    doctor_report.show(found)
    assert "auto finds no backend" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (
            "no-such",
            "NATCOMPAT_BACKEND=no-such cannot be had: there is no backend called 'no-such'. Choose among ",
        ),
        ("userspace:in-line", "NATCOMPAT_BACKEND=userspace:in-line takes userspace:in-line instead."),
    ],
    ids=["unknown", "viable"],
)
def test_tells_people_what_the_environment_asks_for(value: str, words: str) -> None:
    assert words in run("doctor", env={"NATCOMPAT_BACKEND": value}).stdout


@linux_only
@pytest.mark.parametrize(
    ("make", "usable", "reason"),
    [
        (lambda path: None, False, "There is no"),
        (lambda path: path.mkdir(), False, "cannot be opened"),
        (lambda path: path.touch(), None if os.geteuid() else False, "a device"),
    ],
    ids=["not there", "cannot be opened", "is no TUN device"],
)
def test_tun_that_cannot_be_had(
    make: Callable[[Path], object],
    usable: bool | None,
    reason: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(system, "_TUN", tmp_path / "tun")
    make(tmp_path / "tun")
    found = system.tun_device()
    assert found["usable"] is usable
    assert reason.lower() in found["reason"].lower()
    assert found["remedy"]


@pytest.mark.parametrize(
    ("name", "value", "sign"),
    [
        ("version", "#1 SMP Sun Jan 10 15:06:54 PST 2016", "gVisor"),
        ("release", "5.15.167.4-microsoft-standard-WSL2", "WSL"),
    ],
    ids=["gVisor", "WSL"],
)
def test_signs_of_a_sandbox(name: str, value: str, sign: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What these systems say of themselves; they cannot run here."""
    monkeypatch.setattr(f"platform.{name}", lambda: value)
    assert any(each.startswith(sign) for each in system.sandbox())


@linux_only
@pytest.mark.parametrize("variable", ["container", "KUBERNETES_SERVICE_HOST"])
def test_containers_say_so_in_the_environment(variable: str) -> None:
    assert any(
        "a container (" in each or "Kubernetes" in each
        for each in report(env={variable: "x"})["system"]["sandbox"]
    )


@linux_only
def test_tells_people_who_has_the_port() -> None:
    try:
        network = Topology()
    except NatCompatError as error:
        pytest.skip(f"no namespace, in which nobody else uses port 4500, can be made here: {error}")
    with network:
        shown = network.responder.call(_doctor_while_4500_is_taken)
    command = "pytest" if "pytest" in shown else "python"
    assert re.search(rf"4500  taken  127\.0\.0\.1 by .*{command}.* \(pid \d+\)", shown)
    assert "4500  taken  [::1] by " in shown
    assert "500   free   over IPv4 and IPv6" in shown


def _doctor_while_4500_is_taken() -> str:
    with (
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as four,
        socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as six,
    ):
        four.bind(("127.0.0.1", 4500))
        six.bind(("::1", 4500))
        return run("doctor").stdout


def test_names_a_data_path_that_cannot_be_had() -> None:
    shown = run("doctor", env={"NATCOMPAT_DATAPATH": "no-such"}).stdout
    assert "NATCOMPAT_DATAPATH=no-such cannot be had: There is no data path called 'no-such'." in shown


@pytest.mark.skipif(sys.platform != "linux", reason="the variable is for Linux")
def test_names_a_mapping_of_ipsec_that_cannot_be_had() -> None:
    shown = run("doctor", env={"NATCOMPAT_IPSEC": "no-such"}).stdout
    assert "NATCOMPAT_IPSEC=no-such cannot be had: There is no mapping of IPsec called 'no-such'" in shown
    assert "Choose among auto, xfrm, pfkey." in shown
    assert report(env={"NATCOMPAT_IPSEC": "xfrm"})["pfkey"]["error"] is None
