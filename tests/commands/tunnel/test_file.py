"""What a tunnel's file may say, and what is said about one that is wrong."""

from __future__ import annotations

import errno
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from natcompat.commands.tunnel import form
from natcompat.commands.tunnel.file import Device, Tunnel, read_tunnel
from natcompat.commands.tunnel.form import ConfigurationError
from natcompat.errors import NatCompatError
from natcompat.ipsec import (
    Direction,
    Encr,
    Integ,
    Lifetime,
    Mode,
    Policy,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)
from tests.commands.tunnel.making import KEYS, TUNNEL, put, write
from tests.support.running import NOBODY, becomes_nobody

EXAMPLES = Path(__file__).parents[3] / "docs" / "examples"
SECRET = "c0ffee" * 12


def changed(old: str, new: str, *, count: int = 1) -> str:
    assert old in TUNNEL, old
    return TUNNEL.replace(old, new, count)


def refused(path: Path, **options: Any) -> ConfigurationError:
    with pytest.raises(ConfigurationError) as caught:
        read_tunnel(path, **options)
    said = str(caught.value)
    assert caught.value.remedy or caught.value.errno != errno.EINVAL
    assert not re.search(r"[0-9a-fA-F]{16}", said.replace(str(path.parent), "")), said
    assert "\n" not in said
    return caught.value


# -- what is right


def test_a_file(tmp_path: Path) -> None:
    tunnel = read_tunnel(write(tmp_path))
    ports = UDPEncapsulation(local_port=4500, remote_port=4500)
    common: dict[str, Any] = {
        "encryption": Encr.AES_GCM_16,
        "encapsulation": ports,
        "replay_window": 1024,
    }
    assert tunnel.associations == (
        SecurityAssociation(
            spi=0x1001,
            source="192.0.2.1",
            destination="192.0.2.2",
            direction=Direction.OUT,
            encryption_key=bytes.fromhex(KEYS["out"]),
            **common,
        ),
        SecurityAssociation(
            spi=0x1002,
            source="192.0.2.2",
            destination="192.0.2.1",
            direction=Direction.IN,
            encryption_key=bytes.fromhex(KEYS["in"]),
            **common,
        ),
    )
    selector = TrafficSelector(source="10.1.0.0/16", destination="10.2.0.0/16")
    assert tunnel.policies[0] == Policy(
        direction=Direction.OUT, selector=selector, source="192.0.2.1", destination="192.0.2.2"
    )
    assert tunnel.state == tmp_path / "state"
    assert tunnel.device is not None
    assert [str(each) for each in tunnel.device.addresses] == ["10.1.0.1/16"]
    assert tunnel.device.routes == (selector.destination,), "of the outbound policies"
    assert tunnel.device.mtu is None
    assert tunnel.endpoint.backend == "userspace"
    assert tunnel.notes == ()


def test_all_keys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TUNNEL_KEY", "33 " * 16)
    text = """
[endpoint]
backend = "linux"
local_address = "2001:db8::1"
local_port = 1
remote_address = "2001:db8::2"
remote_port = 65535
follow_mapping = true
[device]
kind = "none"
[[sa]]
spi = 4294967295
direction = "out"
source = "2001:db8::1"
destination = "2001:db8::3"
remote_port = 7
mode = "transport"
encryption = "AES_CBC"
encryption_key = { key_environment = "TUNNEL_KEY" }
integrity = "HMAC_SHA2_256_128"
integrity_key = "0044 FF"
esn = true
replay_window = 0
reqid = 5
lifetime = { soft_seconds = 1, hard_seconds = 2, soft_packets = 3, hard_packets = 4, hard_bytes = 6 }
nat_keepalive = 20
copy_dscp = false
copy_ecn = false
copy_df = false
[[policy]]
direction = "out"
source = "fd00:1::/64"
destination = "fd00:2::/64"
protocol = "tcp"
source_port = 8
destination_port = 9
mode = "transport"
reqid = 5
priority = 10
optional = true
[[policy]]
direction = "out"
source = "fd00:1::/64"
destination = "fd00:2::/64"
protocol = 58
action = "bypass"
""".replace("0044 FF", "ab" * 32)
    tunnel = read_tunnel(write(tmp_path, text))
    (sa,) = tunnel.associations
    assert (sa.mode, sa.integrity, sa.esn, sa.reqid) == (Mode.TRANSPORT, Integ.HMAC_SHA2_256_128, True, 5)
    assert sa.encryption_key == b"3" * 16
    assert sa.encapsulation == UDPEncapsulation(local_port=1, remote_port=7)
    assert sa.lifetime == Lifetime(
        soft_seconds=1, hard_seconds=2, soft_packets=3, hard_packets=4, hard_bytes=6
    )
    assert (sa.copy_dscp, sa.copy_ecn, sa.copy_df) == (False, False, False)
    assert [policy.selector.protocol for policy in tunnel.policies] == [6, 58]
    assert tunnel.device is None
    assert tunnel.endpoint.follow_mapping
    assert "no state file" in tunnel.notes[0]


@pytest.mark.parametrize("name", ["tunnel.toml", "tunnel-peer.toml"])
def test_the_examples(tmp_path: Path, name: str) -> None:
    for key in ("to-peer.key", "from-peer.key"):
        put(tmp_path / key, os.urandom(36).hex())
    tunnel = read_tunnel(put(tmp_path / name, (EXAMPLES / name).read_text(), mode=0o644))
    assert len(tunnel.associations) == len(tunnel.policies) == 2
    assert tunnel.notes == ()


def test_the_example_explains_every_key_and_its_default(tmp_path: Path) -> None:
    """Uncommented, it says the same as before, where a line says what is so without it."""
    text = (EXAMPLES / "tunnel.toml").read_text()
    for key in ("to-peer.key", "from-peer.key"):
        put(tmp_path / key, os.urandom(36).hex())
    without = read_tunnel(put(tmp_path / "tunnel.toml", text))
    lines = [
        re.sub(r"^# (\w+ = )", r"\1", line)
        if not any(line.startswith(f"# {each}") for each in ("lifetime", "integrity_key", "priority", "mtu"))
        else line
        for line in text.splitlines()
    ]
    assert read_tunnel(put(tmp_path / "tunnel.toml", "\n".join(lines))) == without
    every = re.sub(r"^# (\w+ = )", r"\1", text, flags=re.MULTILINE)
    said = tomllib.loads(every)
    assert set(said) == set(form.TOP)
    for table, entries in (
        (said["endpoint"], form.ENDPOINT),
        (said["device"], form.DEVICE),
        (said["sa"][0] | said["sa"][1], form.SA),
        (said["policy"][0], form.POLICY),
    ):
        assert set(table) == set(entries)


def test_the_example_of_the_command_is_that_of_the_documentation() -> None:
    shipped = Path(form.__file__).parents[2] / "data" / "tunnel.toml"
    assert shipped.read_text() == (EXAMPLES / "tunnel.toml").read_text()


# -- what is wrong

WRONG = [
    ("spi = 0x1001", "spi = 255", "line 11, [[sa]] 1, spi: 255 is not right", "256 to 4294967295"),
    ("spi = 0x1001", 'spi = "0x1001"', "[[sa]] 1, spi", "integer"),
    ("spi = 0x1001", "spi = true", "spi: true", "integer"),
    ("spi = 0x1001", "spi = 1.5", "spi: a fraction", "integer"),
    ("spi = 0x1001", "spi = 1979-05-27", "spi: a date", "integer"),
    ("spi = 0x1001", f"spi = 0x{SECRET}", "spi: a number that large", "integer"),
    ("spi = 0x1001", "", "line 10, [[sa]] 1: spi is missing", "integer"),
    ("spi = 0x1002", "spi = 0x1002\nsip = 4", 'line 18, [[sa]] 2: unknown key "sip"', "Is spi meant?"),
    ("spi = 0x1001", f"spi = 0x1001\n{SECRET} = 4", "unknown key a text that long", "Known here"),
    ('direction = "out"', 'direction = "both"', '[[sa]] 1, direction: "both"', '"in", "out"'),
    ('"AES_GCM_16"', '"AES-GCM"', "encryption", '"AES_GCM_16"'),
    ('"AES_GCM_16"', '"AES_CBC"', "encryption_key: AES_CBC takes 16 or 24 or 32 bytes, not 36", "--example"),
    (
        '"AES_GCM_16"\nencryption_key = { key_file = "out.key" }',
        '"NULL"',
        "is forbidden (RFC 8221",
        "--example",
    ),
    ('"AES_GCM_16"', '"AES_GCM_16"\nintegrity = "HMAC_SHA1_96"', "integrity_key is missing", "takes one"),
    ('"AES_GCM_16"', '"AES_GCM_16"\nreplay_window = 4097', "replay_window: 4097", "0 to 4096"),
    ('"AES_GCM_16"', '"AES_GCM_16"\nlifetime = { soft = 3 }', "lifetime: unknown key", "soft_seconds"),
    ('"AES_GCM_16"', '"AES_GCM_16"\nlifetime = 3', "lifetime: 3", "table"),
    (
        '"AES_GCM_16"',
        '"AES_GCM_16"\nlifetime = { soft_bytes = 3, hard_bytes = 2 }',
        "lifetime.soft_bytes: 3 comes after",
        "--example",
    ),
    ('"AES_GCM_16"', '"AES_GCM_16"\nsource = "192.0.2.9"', "source: 192.0.2.9 is not the local", "192.0.2.1"),
    ('"AES_GCM_16"', '"AES_GCM_16"\nesn = 1', "esn: 1", "true or false"),
    ('{ key_file = "out.key" }', "7", "encryption_key: a key is wanted", "hexadecimal"),
    ('{ key_file = "out.key" }', '"xyz"', "encryption_key: this is not a row of hex", "hexadecimal"),
    ('{ key_file = "out.key" }', '"1122"', "encryption_key: AES_GCM_16 takes 20 or 28 or 36", "--example"),
    ('{ key_file = "out.key" }', f'"{SECRET}0"', "not a row of hexadecimal digits", "hexadecimal"),
    ('{ key_file = "out.key" }', "{}", "either key_file or key_environment", "hexadecimal"),
    ('{ key_file = "out.key" }', '{ key_file = "no.key" }', "no.key cannot be read: No such file", "Name a"),
    ('{ key_file = "out.key" }', '{ key_file = "." }', "is no regular file", "regular file"),
    ('{ key_file = "out.key" }', '{ key_file = "a\\u0000b" }', "key_file", "path"),
    ('{ key_file = "out.key" }', "{ key_file = 7 }", "encryption_key.key_file: 7", "path"),
    ('{ key_file = "out.key" }', '{ key_file = "in.key" }', "[[sa]] 1 is the same key", "a key for each"),
    ('{ key_file = "out.key" }', '{ key_environment = "NO_KEY" }', "the environment has no NO_KEY", "Set it"),
    (
        "encryption_key",
        "encryption_keys",
        'line 14, [[sa]] 1: unknown key "encryption_keys"',
        "Is encryption_key meant",
    ),
    ('local_address = "192.0.2.1"', "", "line 3, [endpoint]: local_address is missing", "192.0.2.1"),
    (
        'local_address = "192.0.2.1"',
        'local_address = "::"',
        'line 4, [endpoint], local_address: "::"',
        "host",
    ),
    ('local_address = "192.0.2.1"', 'local_address = "::1"', "other IP version", "192.0.2.1"),
    ('local_address = "192.0.2.1"', 'local_address = "host"', '"host" is not right', "IP address"),
    ("[endpoint]", "[endpoint]\nbackend = 'xfrm'", 'backend: "xfrm"', '"linux"'),
    ("[endpoint]", "[endpoint]\nlocal_port = 0", "local_port: 0", "1 to 65535"),
    ("[endpoint]", "[end]", 'unknown key "end"', "endpoint"),
    ('state = "state"', "", "needs a state file", 'state = "PATH"'),
    ('state = "state"', "state = 3", "line 1, state: 3", "path"),
    ('state = "state"', 'sa = "state"', "TOML", "--example"),
    ('state = "state"', 'state = "state"\n"sa b" = 3', 'line 2: unknown key "sa b"', "Known here: state"),
    ('addresses = ["10.1.0.1/16"]', 'addresses = "10.1.0.1/16"', "[device], addresses", "array"),
    ('addresses = ["10.1.0.1/16"]', 'addresses = ["10.1.0.1/33"]', "an array is not right", "array"),
    ('addresses = ["10.1.0.1/16"]', 'name = "a/b"', 'name: "a/b"', "letters"),
    ('addresses = ["10.1.0.1/16"]', 'name = "%s"', "name", "letters"),
    ('addresses = ["10.1.0.1/16"]', "mtu = 68", "mtu: 68", "576 to 65535"),
    ('addresses = ["10.1.0.1/16"]', "kind = 'none'\nmtu = 1400", "mtu: a device of kind", "Leave"),
    ('source = "10.1.0.0/16"', 'source = "10.1.0.1/16"', "[[policy]] 1, source", "network"),
    ('source = "10.1.0.0/16"', 'source = "fd00::/64"', "one address family", "--example"),
    ('source = "10.1.0.0/16"', 'source = "10.1.0.0/16"\nprotocol = "gre"', 'protocol: "gre"', "ipv6-icmp"),
    ('source = "10.1.0.0/16"', 'source = "10.1.0.0/16"\nsource_port = 1', "0 has no ports", "--example"),
    ('source = "10.1.0.0/16"', 'source = "10.1.0.0/16"\nreqid = 4', "no SA is for it", "same reqid"),
    (
        'source = "10.1.0.0/16"',
        'source = "10.1.0.0/16"\naction = "discard"',
        "[[sa]] 1: no policy leads to it",
        "[[policy]]",
    ),
    (
        'source = "10.1.0.0/16"',
        'source = "10.1.0.0/16"\nmode = "transport"\ntunnel_source = "192.0.2.1"',
        "only action",
        "Leave it away",
    ),
    (
        'source = "10.2.0.0/16"\ndestination = "10.1.0.0/16"',
        'source = "10.1.0.0/16"\ndestination = "10.2.0.0/16"\n\n[[policy]]\ndirection = "in"\n'
        'source = "10.1.0.0/16"\ndestination = "10.2.0.0/16"',
        "[[policy]] 2 is for the same packets",
        "Leave one",
    ),
    ("[[sa]]", "[sa]", "TOML", "--example"),
    ('[[policy]]\ndirection = "out"', '[policy]\ndirection = "out"', "TOML", "--example"),
    ("spi = 0x1001", f'spi = "{SECRET}', "line 11, column", "toml.io"),
    ("spi = 0x1001", f"{SECRET}", "line 11, column", "toml.io"),
    ("spi = 0x1001", "spi = " + "9" * 5000, "too long or deep", "toml.io"),
    ("spi = 0x1001", "spi = " + "[" * 5000, "TOML", "toml.io"),
]


@pytest.mark.parametrize(("old", "new", "problem", "remedy"), WRONG, ids=range(len(WRONG)))
def test_what_is_wrong(tmp_path: Path, old: str, new: str, problem: str, remedy: str) -> None:
    error = refused(write(tmp_path, changed(old, new)))
    assert problem in (error.strerror or "")
    assert remedy in error.remedy
    assert str(tmp_path) in str(error)


def test_two_sas_of_one_name(tmp_path: Path) -> None:
    text = changed('spi = 0x1002\ndirection = "in"', 'spi = 0x1001\ndirection = "out"')
    assert "[[sa]] 1 has this SPI, too" in str(refused(write(tmp_path, text)))


@pytest.mark.parametrize("encryption", [encr for encr in Encr if encr.is_aead or encr is Encr.AES_CTR])
def test_counter_modes_on_the_kernel(tmp_path: Path, encryption: Encr) -> None:
    text = TUNNEL.replace("AES_GCM_16", encryption.name)
    if encryption is Encr.AES_CTR:
        text = text.replace(
            '"AES_CTR"', f'"AES_CTR"\nintegrity = "HMAC_SHA1_96"\nintegrity_key = "{"5" * 40}"', 1
        )
        text = text.replace(
            '"AES_CTR"\nenc', f'"AES_CTR"\nintegrity = "HMAC_SHA1_96"\nintegrity_key = "{"6" * 40}"\nenc'
        )
    path = write(tmp_path, text)
    for name, digit in (("in", "1"), ("out", "2")):
        put(tmp_path / f"{name}.key", digit * 2 * max(encryption.key_lengths))
    assert read_tunnel(path).endpoint.backend == "userspace"
    error = refused(path, backend="linux")
    assert "nothing rules out that one repeats" in str(error)
    assert "AES_CBC" in error.remedy


def test_a_transform_that_this_engine_lacks(tmp_path: Path) -> None:
    text = TUNNEL.replace(
        '"AES_GCM_16"\nencryption_key', '"NULL"\nintegrity = "AES_XCBC_96"\nintegrity_key', 1
    )
    path = write(tmp_path, text)
    put(tmp_path / "out.key", "5" * 32)
    assert "line 13, [[sa]] 1, encryption" in str(refused(path))


def test_a_file_that_is_none(tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    assert refused(missing).errno == errno.ENOENT
    assert "no regular file" in str(refused(tmp_path))
    os.mkfifo(tmp_path / "fifo")
    assert "no regular file" in str(refused(tmp_path / "fifo")), "and nobody waited for a writer"
    binary = tmp_path / "binary"
    binary.write_bytes(b"\n\n\xff")
    assert "line 3 is no UTF-8 text" in str(refused(binary))
    large = tmp_path / "large"
    large.write_bytes(b"#" * (2 << 20))
    assert "larger than" in str(refused(large))


# -- who may read keys


@pytest.mark.parametrize(
    ("mode", "words"), [(0o640, "its group may read"), (0o604, "others may read"), (0o620, "change")]
)
@pytest.mark.parametrize("inline", [False, True], ids=["key file", "inline"])
def test_files_that_others_may_touch(tmp_path: Path, mode: int, words: str, inline: bool) -> None:
    if inline:
        path = write(tmp_path, changed('{ key_file = "out.key" }', f'"{KEYS["out"]}"'), mode=mode)
        culprit = path
    else:
        path = write(tmp_path, mode=0o644)  # there are no keys in it
        culprit = tmp_path / "out.key"
        culprit.chmod(mode)
    error = refused(path)
    assert error.errno == errno.EACCES
    assert words in (error.strerror or "")
    assert error.remedy.startswith(("chmod 600", "chmod go-w"))
    assert str(culprit) in error.remedy


@pytest.mark.parametrize(("mode", "words"), [(0o664, "its group may"), (0o646, "others may")])
def test_a_file_that_others_may_change(tmp_path: Path, mode: int, words: str) -> None:
    """Without keys in it, too: it says where keys and state are, and what becomes of packets."""
    error = refused(write(tmp_path, mode=mode))
    assert error.errno == errno.EACCES
    assert words in (error.strerror or "")
    assert "chmod go-w" in error.remedy


@becomes_nobody
def test_files_of_others(tmp_path: Path) -> None:
    path = write(tmp_path)
    os.chown(tmp_path / "out.key", NOBODY, -1)
    error = refused(path)
    assert error.errno == errno.EACCES
    assert f"belongs to user {NOBODY}" in str(error)


def test_links_to_key_files_are_followed_to_what_they_name(tmp_path: Path) -> None:
    path = write(tmp_path)
    (tmp_path / "out.key").rename(tmp_path / "elsewhere")
    (tmp_path / "out.key").symlink_to("elsewhere")
    read_tunnel(path)
    (tmp_path / "elsewhere").chmod(0o644)
    assert refused(path).errno == errno.EACCES


# -- anything at all

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(1 << 70), 1 << 70),
    st.floats(),
    st.text(max_size=20),
    st.sampled_from(["in", "out", "AES_GCM_16", "tunnel", "10.0.0.0/8", "192.0.2.1", "%d%d", "\0", SECRET]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner)),
    max_leaves=5,
)


def toml(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{toml(str(name))} = {toml(each)}" for name, each in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml, value)) + "]"
    if isinstance(value, str):
        return '"' + "".join(f"\\U{ord(each):08x}" for each in value) + '"'
    return "nan" if value is None else repr(value)


NAMES = sorted({*form.SA, *form.POLICY, *form.ENDPOINT, *form.DEVICE, *form.LIFETIME, *form.KEY})
LINES = [line for line in TUNNEL.splitlines() if "=" in line]


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(
    line=st.sampled_from(LINES), name=st.sampled_from([None, *NAMES]), value=VALUES, replaces=st.booleans()
)
def test_any_value_of_any_key(
    tmp_path: Path, line: str, name: str | None, value: Any, replaces: bool
) -> None:
    """It is read, or refused with words: never a traceback, never a key in the words."""
    new = f"{name or line.split()[0]} = {toml(value)}"
    either(write(tmp_path, changed(line, new if replaces else f"{line}\n{new}")))


@settings(max_examples=200, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(at=st.integers(0, len(TUNNEL)), length=st.integers(0, 40), put_in=st.binary(max_size=20))
@example(at=0, length=0, put_in=b"\xef\xbb\xbf")
def test_any_damage(tmp_path: Path, at: int, length: int, put_in: bytes) -> None:
    path = write(tmp_path)
    content = TUNNEL.encode()
    path.write_bytes(content[:at] + put_in + content[at + length :])
    either(path)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=st.binary(max_size=200))
def test_any_key_file(tmp_path: Path, content: bytes) -> None:
    path = write(tmp_path)
    (tmp_path / "out.key").write_bytes(content)
    either(path)


def either(path: Path) -> None:
    try:
        tunnel = read_tunnel(path)
    except ConfigurationError as error:
        said = str(error)
        assert SECRET not in said
        assert "\n" not in said
    else:
        assert isinstance(tunnel, Tunnel)
        assert KEYS["out"] not in repr(tunnel)


def test_nothing_shows_keys(tmp_path: Path) -> None:
    tunnel = read_tunnel(write(tmp_path))
    assert not any(key in repr(tunnel) for key in (KEYS["out"], KEYS["in"], repr(bytes.fromhex(KEYS["in"]))))
    assert isinstance(tunnel.device, Device)
    assert issubclass(ConfigurationError, NatCompatError)
