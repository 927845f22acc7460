"""What the doctor says of PF_KEY."""

from __future__ import annotations

import errno
import os
import socket
import sys

import click
import pytest

from natcompat.errors import NatCompatError
from natcompat.kernel.pfkey import examine
from natcompat.kernel.pfkey.dialects import DIALECTS
from tests.support.running import run

linux_only = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.mark.parametrize(
    ("platform", "name"),
    [
        ("linux", "linux"),
        ("darwin", "macos"),
        ("sunos5", "solaris"),
        ("freebsd14", "freebsd"),
        ("netbsd10", "netbsd"),
        ("openbsd7", "openbsd"),
        ("win32", None),
    ],
)
def test_each_system_has_its_dialect(
    platform: str, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    found = examine.dialect_here()
    assert (found.name if found else None) == name


def test_a_system_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "dialect_here", lambda: None)
    assert examine.examine() == {
        "dialect": None,
        "usable": False,
        "reason": "This system has no PF_KEY.",
        "remedy": "",
        "limits": [],
    }


def test_af_key_is_not_loaded_by_asking(monkeypatch: pytest.MonkeyPatch, tmp_path: os.PathLike[str]) -> None:
    monkeypatch.setattr(examine, "dialect_here", lambda: DIALECTS["linux"])
    monkeypatch.setattr(examine, "_PROC", os.fspath(tmp_path) + "/none")

    def never(*_: object) -> socket.socket:
        raise AssertionError("a socket was opened")

    monkeypatch.setattr(examine, "open_socket", never)
    found = examine.examine()
    assert found["usable"] is None
    assert "not loaded" in found["reason"]


def test_a_socket_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "dialect_here", lambda: DIALECTS["freebsd"])
    opened: list[socket.socket] = []

    def open_one(*_: object) -> socket.socket:
        opened.append(socket.socket())
        return opened[-1]

    monkeypatch.setattr(examine, "open_socket", open_one)
    assert examine.examine()["usable"] is True
    assert opened[0].fileno() == -1

    def refused(*_: object) -> socket.socket:
        raise NatCompatError(errno.EPERM, "This process may not open PF_KEY", "Run as root")

    monkeypatch.setattr(examine, "open_socket", refused)
    found = examine.examine()
    assert (found["usable"], found["remedy"]) == (False, "Run as root.")


@pytest.mark.parametrize("name", DIALECTS)
def test_limits_are_sentences(name: str) -> None:
    found = list(examine.limits(DIALECTS[name]))
    assert all(each.endswith(".") and each[0].isupper() for each in found)
    assert len(found) == len(set(found))


def test_limits_of_af_key() -> None:
    found = " ".join(examine.limits(DIALECTS["linux"]))
    for words in (
        "every PF_KEY socket",
        "96 bits",
        "combined ciphers",
        "32 packets",
        "16383",
        "Addresses of an SA",
    ):
        assert words in found


@linux_only
def test_the_doctor_says_the_limits_to_whoever_asked() -> None:
    asked = run("doctor", env={"NATCOMPAT_IPSEC": "pfkey"}).stdout
    assert "96 bits" in asked
    assert "IPsec over PF_KEY" in run("doctor").stdout


def test_the_commands_read_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    from natcompat.commands.ipsec.sources import open_kernel
    from natcompat.kernel import pfkey

    asked: list[str] = []
    monkeypatch.setattr(pfkey, "open_ipsec", asked.append)
    monkeypatch.setattr(sys, "platform", "freebsd14")
    open_kernel()
    assert asked == ["freebsd"]
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(click.ClickException, match="win32"):
        open_kernel()
