"""The command line of ``natcompat tunnel``: --check, --example, and what is refused at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.commands.tunnel.making import KEYS, TUNNEL, put, write
from tests.support.running import COMMAND, environment

LINUX = sys.platform == "linux"


def tunnel(
    *arguments: object, cwd: Path | None = None, more: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [*COMMAND, "tunnel", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=60,
        cwd=cwd,
        env=environment(more),
    )
    assert "Traceback" not in done.stderr
    for key in KEYS.values():
        assert key[:16] not in done.stdout + done.stderr
    return done


def test_check_says_what_it_would_do(tmp_path: Path) -> None:
    done = tunnel("--check", write(tmp_path))
    assert (done.returncode, done.stderr) == (0, "")
    for words in (
        "192.0.2.1 port 4500",
        "10.2.0.0/16",
        "AES_GCM_16 256",
        "0x00001001  out  192.0.2.1  192.0.2.2    4500-4500  tunnel",
        "10.1.0.0/16 to 10.2.0.0/16  protect  tunnel  192.0.2.1 to 192.0.2.2",
        str(tmp_path / "state"),
    ):
        assert words in done.stdout
    assert sorted(os.listdir(tmp_path)) == ["in.key", "out.key", "tunnel.toml"], "nothing was done"


def test_check_in_json(tmp_path: Path) -> None:
    done = tunnel("--check", "--json", write(tmp_path))
    assert done.returncode == 0
    said = json.loads(done.stdout)
    assert set(said) == {
        "file",
        "backend",
        "state_file",
        "endpoint",
        "device",
        "sas",
        "policies",
        "notes",
    }
    assert said["device"] == {
        "name": "natcompat%d",
        "addresses": ["10.1.0.1/16"],
        "routes": ["10.2.0.0/16"],
        "mtu": None,
        "lockdown": False,
    }
    assert [sa["spi"] for sa in said["sas"]] == ["0x00001001", "0x00001002"]
    assert not any("key" in name for sa in said["sas"] for name in sa)
    assert said["policies"][0]["selector"] == "10.1.0.0/16 to 10.2.0.0/16"
    assert (said["notes"], said["backend"]) == ([], "userspace")


def test_check_with_notes(tmp_path: Path) -> None:
    text = TUNNEL.replace('"AES_GCM_16"', '"NULL"\nintegrity = "HMAC_SHA1_96"\nreplay_window = 0')
    text = text.replace('state = "state"', "").replace("encryption_key", "integrity_key")
    for name, digit in (("in", "1"), ("out", "2")):
        put(tmp_path / f"{name}.key", digit * 40)
    path = put(
        tmp_path / "tunnel.toml", text.replace("[device]\naddresses", "[device]\nname = 'tun7'\naddresses")
    )
    done = tunnel("--check", *(["--backend", "linux"] if LINUX else []), path)
    assert done.returncode == 0, done.stderr
    assert "There is no state file." in done.stdout
    assert "no replay window" in done.stdout
    assert not LINUX or "addresses are put on lo" in done.stdout


def test_an_error_is_one_sentence_and_a_remedy(tmp_path: Path) -> None:
    path = write(tmp_path, TUNNEL.replace("spi = 0x1002", "spi = 2"))
    done = tunnel("--check", path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        f"natcompat: {path}, line 17, [[sa]] 2, spi: 2 is not right. "
        "Write an integer from 256 to 4294967295.\n"
    )


@pytest.mark.parametrize("options", [[], ["--check"], ["--backend", "xfrm", "x"], ["--interval", "0", "x"]])
def test_a_wrong_command_line(options: list[str]) -> None:
    assert tunnel(*options).returncode == 2


def test_from_an_empty_directory(tmp_path: Path) -> None:
    """The example is printed, and right when its keys are there."""
    done = tunnel("--example")
    assert done.returncode == 0
    put(tmp_path / "tunnel.toml", done.stdout, mode=0o644)
    done = tunnel("--check", "tunnel.toml", cwd=tmp_path)
    assert done.returncode == 1
    lines = (tmp_path / "tunnel.toml").read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if text.startswith("encryption_key"))
    where = f"tunnel.toml, line {line}, [[sa]] 1, encryption_key.key_file: "
    assert f"{where}the key file to-peer.key cannot be read: No such file" in done.stderr
    for name, key in (("to-peer.key", KEYS["out"]), ("from-peer.key", KEYS["in"])):
        put(tmp_path / name, key)
    assert tunnel("--check", "tunnel.toml", cwd=tmp_path).returncode == 0


def test_keys_from_the_environment(tmp_path: Path) -> None:
    text = TUNNEL.replace('key_file = "out.key"', 'key_environment = "TUNNEL_OUT"')
    path = write(tmp_path, text)
    assert "TUNNEL_OUT" in tunnel("--check", path).stderr
    assert tunnel("--check", path, more={"TUNNEL_OUT": KEYS["out"]}).returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="state files need directories that can be synced")
@pytest.mark.parametrize(
    ("options", "words"), [([], "it is not there"), (["--create-state"], "cannot be bound")]
)
def test_nothing_is_left_of_one_that_cannot_be(tmp_path: Path, options: list[str], words: str) -> None:
    """192.0.2.1 is nobody's address (RFC 5737)."""
    done = tunnel(*options, write(tmp_path))
    assert done.returncode == 1
    assert words in done.stderr
    assert done.stdout == ""


def test_a_state_file_that_is_not_named(tmp_path: Path) -> None:
    text = TUNNEL.replace('state = "state"', "").replace('"AES_GCM_16"', '"NULL"\nintegrity = "HMAC_SHA1_96"')
    for name, digit in (("in", "1"), ("out", "2")):
        put(tmp_path / f"{name}.key", digit * 40)
    path = put(tmp_path / "tunnel.toml", text.replace("encryption_key", "integrity_key"))
    done = tunnel("--create-state", path)
    assert done.returncode == 1
    assert "names no state file" in done.stderr
