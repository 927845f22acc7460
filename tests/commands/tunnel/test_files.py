"""Files of a tunnel that are none of its user's: each is refused with a remedy, whoever reads it."""

from __future__ import annotations

import errno
import os
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from natcompat.commands.tunnel.file import read_tunnel
from natcompat.commands.tunnel.files import LARGEST_FILE, open_directory_of, open_file, read_file
from natcompat.commands.tunnel.state import StateFile
from natcompat.errors import NatCompatError
from tests.commands.tunnel.making import TUNNEL, put, write
from tests.support.running import NOBODY, becomes_nobody

if not hasattr(os, "fork"):
    pytest.skip("needs modes and openat", allow_module_level=True)


def read_the_tunnel(path: Path) -> object:
    return read_tunnel(path)


def read_a_key(path: Path) -> object:
    """Read a tunnel whose key file is `path`."""
    directory = path.parent / "tunnel of the key"
    directory.mkdir(exist_ok=True)
    return read_tunnel(write(directory, TUNNEL.replace('"out.key"', f'"{path}"', 1)))


def read_the_state(path: Path) -> object:
    with StateFile(path) as state:
        return state


READERS = {"tunnel": read_the_tunnel, "key": read_a_key, "state": read_the_state}
GOOD = {"key": "11" * 36}


@pytest.fixture(params=READERS)
def reader(request: pytest.FixtureRequest) -> str:
    kind: str = request.param
    return kind


@pytest.fixture
def path(tmp_path: Path, reader: str) -> Path:
    """Return the path of a file that `reader` takes."""
    if reader == "state":
        StateFile(tmp_path / "state", create=True).close()
        return tmp_path / "state"
    return write(tmp_path) if reader == "tunnel" else put(tmp_path / "a.key", GOOD["key"])


def refused(reader: str, path: Path) -> NatCompatError:
    """Return the error; it names the file, says what to do, and comes soon."""
    caught: list[BaseException | None] = []

    def attempt() -> None:
        try:
            READERS[reader](path)
        except BaseException as error:  # noqa: BLE001 - whatever it is, it is looked at below
            caught.append(error)
        else:
            caught.append(None)

    thread = threading.Thread(target=attempt, daemon=True)
    thread.start()
    thread.join(10)
    assert caught, "it waits for somebody"
    (error,) = caught
    assert isinstance(error, NatCompatError), error
    assert error.remedy
    assert str(error).isprintable()
    return error


def test_a_good_file_is_read(reader: str, path: Path) -> None:
    READERS[reader](path)


def make_fifo(path: Path) -> None:
    os.mkfifo(path, 0o600)


def make_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(path))
    path.chmod(0o600)


def make_binary(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 40)
    path.chmod(0o600)


def make_huge(path: Path) -> None:
    """A terabyte with holes, which fits on every disk and in no memory."""
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    path.chmod(0o600)


def make_empty(path: Path) -> None:
    put(path, "")


def make_dangling_link(path: Path) -> None:
    path.symlink_to("nowhere")


def make_link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def make_link_to_a_device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def make_link_to_memory(path: Path) -> None:
    path.symlink_to("/proc/self/mem")


@pytest.mark.parametrize(
    "make",
    [
        Path.mkdir,
        make_fifo,
        make_socket,
        make_binary,
        make_huge,
        make_empty,
        make_dangling_link,
        make_link_to_itself,
        make_link_to_a_device,
        make_link_to_memory,
    ],
    ids=lambda make: make.__name__.removeprefix("make_"),
)
def test_anything_else_in_its_place_is_refused(reader: str, path: Path, make: Callable[[Path], None]) -> None:
    path.unlink()
    make(path)
    refused(reader, path)


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="making a device takes root")
def test_a_device_is_refused(reader: str, path: Path) -> None:
    path.unlink()
    try:
        os.mknod(path, 0o020600, os.makedev(1, 5))  # that of /dev/zero, which never ends
    except PermissionError:
        pytest.skip("this container makes no devices")
    assert refused(reader, path).errno == errno.EINVAL


@pytest.mark.parametrize(
    "name", ["a\0b", "x" * 300, "/".join(["x" * 200] * 30), "none/there", "../gone/file"]
)
def test_names_that_name_nothing_are_refused(tmp_path: Path, name: str) -> None:
    for read in (read_the_tunnel, read_the_state, lambda path: read_file(path, "the key file")):
        with pytest.raises(NatCompatError) as caught:
            read(tmp_path / name)
        assert caught.value.remedy
        assert str(caught.value).isprintable()


@pytest.mark.parametrize("name", ["", ".", "..", "/"])
def test_a_state_file_has_a_name_of_its_own(tmp_path: Path, name: str) -> None:
    with pytest.raises(NatCompatError) as caught:
        StateFile(tmp_path / name, create=True)
    assert caught.value.errno in (errno.EINVAL, errno.EEXIST)
    assert caught.value.remedy


@pytest.mark.parametrize("line", ['state = "state"', 'encryption_key = { key_file = "out.key" }'])
def test_the_home_of_nobody_known_is_refused(tmp_path: Path, line: str) -> None:
    before, _, name = line.rpartition('"')[0].rpartition('"')
    new = line.replace(f'"{name}"', '"~no-such-user-here/file"')
    with pytest.raises(NatCompatError, match="home directory") as caught:
        read_tunnel(write(tmp_path, TUNNEL.replace(line, new, 1)))
    assert "without ~" in caught.value.remedy
    assert before


@pytest.mark.parametrize("reader", ["key", "state"], indirect=True)
def test_a_second_name_of_a_file_is_refused(reader: str, path: Path) -> None:
    os.link(path, path.with_name("other"))
    assert refused(reader, path).errno == errno.EMLINK
    path.with_name("other").unlink()
    READERS[reader](path)


@pytest.mark.parametrize("mode", [0o777, 0o775, 0o2770], ids=oct)
def test_a_directory_that_others_may_write_to_is_refused(reader: str, path: Path, mode: int) -> None:
    path.parent.chmod(mode)
    try:
        error = refused(reader, path)
    finally:
        path.parent.chmod(0o700)
    assert error.errno == errno.EACCES
    assert "directory" in str(error)


def test_a_directory_further_up_that_others_may_write_to_is_refused(reader: str, path: Path) -> None:
    """Whoever may rename a directory above may put an older copy of all below in its place."""
    middle, inner = path.parent / "middle", path.parent / "middle" / "inner"
    inner.mkdir(parents=True)
    moved = inner / path.name
    for file in [*path.parent.glob("*.key"), path]:
        if file.exists():
            file.rename(inner / file.name)
    READERS[reader](moved)
    middle.chmod(0o777)
    assert refused(reader, moved).errno == errno.EACCES
    middle.chmod(0o1777)  # sticky: there nobody else may rename `inner`
    READERS[reader](moved)


@becomes_nobody
def test_a_directory_of_another_user_is_refused(reader: str, path: Path) -> None:
    os.chown(path.parent, NOBODY, -1)
    try:
        assert refused(reader, path).errno == errno.EACCES
    finally:
        os.chown(path.parent, 0, -1)


@becomes_nobody
@pytest.mark.parametrize("reader", ["key"], indirect=True)
def test_a_link_of_another_user_in_a_sticky_directory_is_not_followed(
    reader: str, path: Path, tmp_path: Path
) -> None:
    """It would choose which of the user's own files are read."""
    sticky = tmp_path / "sticky"
    sticky.mkdir()
    sticky.chmod(0o1777)
    link = sticky / "link"
    link.symlink_to(path)
    READERS[reader](link)
    os.chown(link, NOBODY, -1, follow_symlinks=False)
    assert refused(reader, link).errno == errno.EACCES


@pytest.mark.parametrize("reader", ["key"], indirect=True)
def test_links_of_a_mounted_secret_are_followed(reader: str, path: Path) -> None:
    """As Kubernetes has them: a link to a file behind a link to a directory, all of them root's."""
    (path.parent / "..2026").mkdir()
    path.rename(path.parent / "..2026" / "key")
    (path.parent / "..data").symlink_to("..2026")
    path.symlink_to("..data/key")
    path.parent.chmod(0o1777)
    READERS[reader](path)


def test_a_file_that_is_replaced_meanwhile_is_read_whole_or_refused(tmp_path: Path) -> None:
    """The name goes from a good file to a FIFO and to a link, all the time."""
    good, name = put(tmp_path / "good", "11" * 36), tmp_path / "key"
    ended = threading.Event()

    def exchange() -> None:
        while not ended.is_set():
            for make in (lambda to: to.symlink_to(good), make_fifo, lambda to: put(to, "11" * 36)):
                new = tmp_path / "new"
                make(new)
                os.rename(new, name)

    os.link(good, name)
    thread = threading.Thread(target=exchange)
    thread.start()
    contents, refusals = set(), 0
    try:
        for _ in range(400):
            try:
                contents.add(read_file(name, "the key file"))
            except NatCompatError:
                refusals += 1
    finally:
        ended.set()
        thread.join()
    assert contents <= {b"11" * 36, b""}
    assert refusals


def open_descriptors() -> set[str]:
    return set(os.listdir("/proc/self/fd"))


@pytest.fixture
def descriptors() -> Iterator[None]:
    before = len(open_descriptors())
    yield
    assert len(open_descriptors()) == before


@pytest.mark.skipif(sys.platform != "linux", reason="counts descriptors in /proc")
@pytest.mark.usefixtures("descriptors")
def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    key = put(tmp_path / "key", "11")
    os.close(open_file(key, "the key file"))
    os.close(open_directory_of(key, "the state file"))
    huge = tmp_path / "huge"
    make_huge(huge)
    tmp_path.joinpath("loop").symlink_to("loop")
    for name in ("none", "none/below", "loop", "huge", "."):
        for function in (open_file, read_file):
            try:
                result = function(tmp_path / name, "the key file")
            except NatCompatError:
                continue
            if isinstance(result, int):
                os.close(result)
    assert huge.stat().st_size > LARGEST_FILE
