"""A tunnel's file for the tests, to be changed."""

from __future__ import annotations

from pathlib import Path

KEYS = {"out": "11" * 36, "in": "22" * 36}

TUNNEL = """\
state = "state"

[endpoint]
local_address = "192.0.2.1"
remote_address = "192.0.2.2"

[device]
addresses = ["10.1.0.1/16"]

[[sa]]
spi = 0x1001
direction = "out"
encryption = "AES_GCM_16"
encryption_key = { key_file = "out.key" }

[[sa]]
spi = 0x1002
direction = "in"
encryption = "AES_GCM_16"
encryption_key = { key_file = "in.key" }

[[policy]]
direction = "out"
source = "10.1.0.0/16"
destination = "10.2.0.0/16"

[[policy]]
direction = "in"
source = "10.2.0.0/16"
destination = "10.1.0.0/16"
"""


def write(directory: Path, text: str = TUNNEL, *, mode: int = 0o600) -> Path:
    """Write the file and its keys; return its path."""
    for name, digits in KEYS.items():
        put(directory / f"{name}.key", f"{digits}\n")
    return put(directory / "tunnel.toml", text, mode=mode)


def put(path: Path, text: str, *, mode: int = 0o600) -> Path:
    path.write_text(text)
    path.chmod(mode)
    return path
