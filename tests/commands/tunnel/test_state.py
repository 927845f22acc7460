"""The state file: on the disk before use, whole or not at all, one at a time, and nobody else's."""

from __future__ import annotations

import errno
import json
import os
import signal
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from natcompat.commands.tunnel.state import Identity, LearntPeer, StateFile
from natcompat.errors import NatCompatError
from natcompat.ipsec import Direction, Encr, Integ, SecurityAssociation
from tests.support.esp import keys, sa
from tests.support.running import NOBODY, becomes_nobody

if not hasattr(os, "fork"):
    pytest.skip("needs flock and directories that can be synced", allow_module_level=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "state"


@pytest.fixture
def state(path: Path) -> Iterator[StateFile]:
    with StateFile(path, create=True) as opened:
        yield opened


def out(**changes: Any) -> SecurityAssociation:
    return sa(Direction.OUT, **changes)


def refused(path: Path, **options: Any) -> NatCompatError:
    with pytest.raises(NatCompatError) as caught:
        StateFile(path, **options)
    assert str(path) in str(caught.value)
    assert caught.value.remedy
    return caught.value


def test_numbers_are_kept(path: Path, state: StateFile) -> None:
    one, two = state.identity(out()), state.identity(out(encryption_key=bytes(20)))
    assert (state.last(one), state.last(two)) == (0, 0)
    state.record({one: 100})
    state.record({two: 1 << 63})
    assert (state.last(one), state.last(two)) == (100, 1 << 63)
    state.close()
    with StateFile(path) as again:
        assert again.identity(out()) == one
        assert (again.last(one), again.last(two)) == (100, 1 << 63)
        assert path.stat().st_mode & 0o777 == 0o600
    assert os.listdir(path.parent) == ["state"]


def test_there_are_no_keys_in_it(path: Path, state: StateFile) -> None:
    association = out()
    state.record({state.identity(association): 7})
    content = path.read_text()
    for key in (association.encryption_key, association.encryption_key[:-4]):
        assert bytes(key).hex() not in content
    assert "Do not edit" in content
    other = path.with_name("other")
    with StateFile(other, create=True) as another:
        assert another.identity(association) != state.identity(association), "keyed by the file"


def test_what_a_key_is(state: StateFile) -> None:
    """What counts is under which key an IV or number must not repeat, not what else the SA says."""
    ctr = keys(Encr.AES_CTR, Integ.HMAC_SHA2_256_128)
    cbc = keys(Encr.AES_CBC, Integ.HMAC_SHA2_256_128)
    gcm = out(**keys(Encr.AES_GCM_16))
    assert state.identity(out(**ctr)) == state.identity(out(**{**ctr, "integrity_key": bytes(32)}))
    assert state.identity(out(**ctr)) == state.identity(gcm), "the same blocks, whatever the transform"
    assert state.identity(gcm) == state.identity(out(**keys(Encr.AES_GCM_8), spi=777, esn=True))
    assert state.identity(out(**cbc)) != state.identity(out(**{**cbc, "integrity_key": bytes(32)}))


def test_a_key_of_the_peer_is_not_for_sealing(state: StateFile) -> None:
    received = state.identity(sa(Direction.IN))
    state.record({received: 5})
    assert state.last(received) == 5
    with pytest.raises(NatCompatError, match="the peer has sealed") as caught:
        state.last(state.identity(out()))
    assert caught.value.errno == errno.EINVAL


def test_one_at_a_time(path: Path, state: StateFile) -> None:
    assert refused(path).errno == errno.EBUSY
    state.record({state.identity(out()): 1})  # another file in its place: locked as well
    assert refused(path).errno == errno.EBUSY
    state.close()
    with StateFile(path):
        assert refused(path).errno == errno.EBUSY
    state.close()


def test_the_lock_ends_with_the_process(path: Path, state: StateFile) -> None:
    state.close()
    program = (
        "import sys, pathlib; from natcompat.commands.tunnel.state import StateFile\n"
        "state = StateFile(pathlib.Path(sys.argv[1])); print('locked', flush=True); sys.stdin.read()"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"locked\n"
        assert refused(path).errno == errno.EBUSY
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    StateFile(path).close()


def test_it_is_made_only_when_asked_for(path: Path) -> None:
    error = refused(path)
    assert error.errno == errno.ENOENT
    assert "--create-state" in error.remedy
    assert not path.exists()
    StateFile(path, create=True).close()
    error = refused(path, create=True)
    assert error.errno == errno.EEXIST
    StateFile(path).close()


@pytest.mark.parametrize("mode", [0o640, 0o602, 0o610, 0o666])
def test_others_may_not_touch_it(path: Path, state: StateFile, mode: int) -> None:
    state.close()
    path.chmod(mode)
    assert refused(path).errno == errno.EACCES


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o702, 0o1777, 0o3770], ids=oct)
def test_others_may_write_to_no_part_of_its_path(path: Path, state: StateFile, mode: int) -> None:
    """Nor to a sticky directory: there they make the temporary file that a record needs."""
    state.close()
    path.parent.chmod(mode)
    for create in (False, True):
        error = refused(path, create=create)
        assert error.errno == errno.EACCES
        assert "directory" in str(error)
    path.parent.chmod(0o755)
    StateFile(path).close()


@becomes_nobody
def test_of_another_user(path: Path, state: StateFile) -> None:
    state.close()
    os.chown(path, NOBODY, -1)
    assert refused(path).errno == errno.EACCES


def test_no_links(path: Path, state: StateFile) -> None:
    """The file is replaced as a whole, which would leave behind what a link names."""
    state.close()
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")
    assert refused(path).errno == errno.ELOOP


@pytest.mark.parametrize("make", [Path.mkdir, os.mkfifo])
def test_nothing_but_a_file(path: Path, make: Callable[[Path], None]) -> None:
    make(path)
    error = refused(path)
    assert error.errno == errno.EINVAL
    assert "regular file" in str(error)


def test_no_directory(tmp_path: Path) -> None:
    assert refused(tmp_path / "none" / "state").errno == errno.ENOENT


DAMAGE = st.one_of(
    st.binary(max_size=100),
    st.sampled_from([b"", b"{}", b"[]", b"3", b"null", b'{"natcompat tunnel state": 2}']),
)


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(content=DAMAGE)
def test_any_damage(path: Path, content: bytes) -> None:
    path.write_bytes(content)
    path.chmod(0o600)
    assert refused(path).errno == errno.EINVAL


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("salt", "00"),
        ("salt", "xy"),
        ("salt", 3),
        ("last", []),
        ("last", {"out": 1}),
        ("last", {"both " + "00" * 16: 1}),
        ("last", {"out " + "00" * 16: -1}),
        ("last", {"out " + "00" * 16: 1 << 64}),
        ("last", {"out " + "00" * 16: "1"}),
        ("last", {"out " + "00" * 16: True}),
        ("last", {"out " + "00" * 15: 1}),
        ("peer", 3),
        ("peer", {}),
        ("peer", {"configured": ["192.0.2.2", 4500], "address": "nowhere", "port": 1}),
        ("peer", {"configured": ["192.0.2.2", 4500], "address": "224.0.0.1", "port": 1}),
        ("peer", {"configured": ["192.0.2.2", 4500], "address": "0.0.0.0", "port": 1}),
        ("peer", {"configured": ["192.0.2.2", 4500], "address": 3221225986, "port": 1}),
        ("peer", {"configured": ["192.0.2.2", 4500], "address": "192.0.2.3", "port": 0}),
        ("peer", {"configured": ["192.0.2.2", 4500], "address": "192.0.2.3", "port": 65536}),
        ("peer", {"configured": ["192.0.2.2", 4500], "address": "192.0.2.3", "port": True}),
        ("peer", {"configured": [1, 4500], "address": "192.0.2.3", "port": 1}),
        ("peer", {"configured": ["192.0.2.2"], "address": "192.0.2.3", "port": 1}),
    ],
)
def test_damage_of_one_value(path: Path, state: StateFile, name: str, value: object) -> None:
    state.close()
    said = json.loads(path.read_text())
    path.write_text(json.dumps({**said, name: value}))
    assert refused(path).errno == errno.EINVAL


def test_a_learnt_peer_is_kept_beside_the_numbers(path: Path, state: StateFile) -> None:
    """As long as the tunnel's file names the same peer as when it was learnt."""
    identity, configured = state.identity(out()), ("192.0.2.2", 4500)
    assert state.peer(configured) is None
    learnt = LearntPeer(configured, ip_address("203.0.113.7"), 20001)
    state.record_peer(learnt)
    state.record({identity: 9})
    state.close()
    with StateFile(path) as again:
        assert again.peer(configured) == learnt
        assert again.last(identity) == 9
        assert again.peer(("192.0.2.2", 4501)) is None
        assert again.peer(("192.0.2.3", 4500)) is None


def test_what_cannot_be_written_is_not_recorded(
    path: Path, state: StateFile, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk: the error comes out, the file is what it was, and nothing else lies about."""
    identity = state.identity(out())
    state.record({identity: 10})
    before = path.read_bytes()

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(NatCompatError, match="No space left") as caught:
        state.record({identity: 20})
    assert str(path) in str(caught.value)
    assert caught.value.remedy
    monkeypatch.undo()
    assert state.last(identity) == 10
    assert path.read_bytes() == before
    assert os.listdir(path.parent) == ["state"]
    state.record({identity: 30})
    assert refused(path).errno == errno.EBUSY
    state.close()
    with StateFile(path) as again:
        assert again.last(identity) == 30


def test_a_write_that_the_kernel_refuses(path: Path, state: StateFile) -> None:
    """The same in earnest, by a limit to the size of files."""
    import resource

    identity = state.identity(out())
    state.record({identity: 10})
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            state.record({identity: 20})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert state.last(identity) == 10
    assert os.listdir(path.parent) == ["state"]
    state.record({identity: 30})
    state.close()
    with StateFile(path) as again:
        assert again.last(identity) == 30


def test_one_that_cannot_be_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as disk:
        disk.setattr(os, "fsync", full)
        assert refused(path, create=True).errno == errno.ENOSPC
    assert os.listdir(path.parent) == []
    StateFile(path, create=True).close()


def test_the_file_of_one_that_was_killed_while_writing(path: Path, state: StateFile) -> None:
    (path.parent / ".state.new").write_text("half")
    identity = state.identity(out())
    state.record({identity: 4})
    assert os.listdir(path.parent) == ["state"]


def test_order_of_writing(path: Path, state: StateFile, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new content is on the disk before it has the name, and the name before `record` returns."""
    calls: list[str] = []
    real_sync, real_rename = os.fsync, os.rename

    def sync(descriptor: int) -> None:
        calls.append("directory" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real_sync(descriptor)

    def rename(*args: Any, **kwargs: Any) -> None:
        calls.append("rename")
        real_rename(*args, **kwargs)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "rename", rename)
    state.record({Identity("00" * 16, Direction.OUT): 1})
    assert calls == ["file", "rename", "directory"]
