"""The classic BPF programs, run by the kernel, and the calls that put them on and take them off."""

from __future__ import annotations

import ctypes
import errno
import os
import socket

import pytest

from natcompat import set_nat_t_endpoint
from natcompat.backends.linux_sockets import filters
from natcompat.contract import NON_ESP_MARKER, TABLE, Row, Verdict
from tests.support.linux import FAMILIES, LINUX, at, isolated, queued, readable, udp, wait_until

pytestmark = LINUX

ROWS = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.name)
TAIL = NON_ESP_MARKER + b"the tail"


def interpret(program: filters.Program, packet: bytes) -> int:
    """Run `program` as the kernel does: a model, for what one machine cannot show (many engines)."""
    accumulator = counter = 0
    while True:
        code, if_true, if_false, k = program[counter]
        counter += 1
        match code:
            case 0x20:  # load a word
                if k + 4 > len(packet):
                    return 0
                accumulator = int.from_bytes(packet[k : k + 4], "big")
            case 0x80:
                accumulator = len(packet)
            case 0x15:
                counter += if_true if accumulator == k else if_false
            case 0x35:
                counter += if_true if accumulator >= k else if_false
            case 0x04:
                accumulator = (accumulator + k) & 0xFFFFFFFF
            case 0x94:
                accumulator %= k
            case 0x06:
                return k
            case 0x16:
                return accumulator
            case _:
                raise AssertionError(f"an instruction that no program here has: {code:#x}")


@ROWS
@FAMILIES
@pytest.mark.parametrize("name", ["IKE_ONLY", "NO_RUNTS"])
def test_a_filter_passes_the_payloads_of_its_name(family: socket.AddressFamily, name: str, row: Row) -> None:
    passed = (
        row.verdict is Verdict.IKE
        if name == "IKE_ONLY"
        else row.verdict not in (Verdict.RUNT, Verdict.KEEPALIVE)
    )
    with udp(family) as sock, udp(family) as peer:
        filters.attach_filter(sock, getattr(filters, name))
        for payload in (row.payload, TAIL):
            peer.sendto(payload, at(sock))
        assert queued(sock) == ([row.payload, TAIL] if passed else [TAIL])


@ROWS
@pytest.mark.parametrize("engines", [1, 2, 7])
def test_the_steering_program_selects_the_application_for_marked_datagrams_alone(
    row: Row, engines: int
) -> None:
    chosen = interpret(filters.steering(engines), row.payload)
    if row.verdict is Verdict.IKE:
        assert chosen == 0
    else:
        assert 1 <= chosen <= engines


def test_an_spi_stays_with_one_engine_and_spis_are_spread() -> None:
    program = filters.steering(4)
    chosen = [interpret(program, spi.to_bytes(4, "big") + bytes(60)) for spi in range(1 << 8, 1 << 12)]
    assert {chosen.count(engine) for engine in (1, 2, 3, 4)} == {len(chosen) // 4}
    assert chosen[5] == interpret(program, (256 + 5).to_bytes(4, "big") + b"\xff" * 9)


def test_the_kernel_decides_like_the_model() -> None:
    with udp() as sock, udp() as peer:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        with socket.socket(type=socket.SOCK_DGRAM) as second:
            second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
            second.bind(sock.getsockname())
            filters.attach_steering(sock, 1)
            for row in TABLE:
                peer.sendto(row.payload, at(sock))
                expected = (sock, second)[interpret(filters.steering(1), row.payload)]
                assert readable(expected, 5), row.name
                assert queued(expected) == [row.payload]
            assert not readable(sock)
            assert not readable(second)


def test_has_filter_sees_every_kind_of_filter() -> None:
    with udp() as sock:
        assert not filters.has_filter(sock)
        filters.attach_filter(sock, filters.IKE_ONLY)
        assert filters.has_filter(sock)
        filters.detach_filter(sock)
        assert not filters.has_filter(sock)


def test_has_filter_sees_an_ebpf_filter() -> None:
    """Its text cannot be read, which the kernel answers with EACCES."""
    program = load_ebpf_filter()
    if program < 0:
        pytest.skip("loading an eBPF program is not allowed here")
    with udp() as sock:
        try:
            sock.setsockopt(socket.SOL_SOCKET, filters.SO_ATTACH_BPF, program)
        finally:
            os.close(program)
        assert filters.has_filter(sock)


def load_ebpf_filter() -> int:
    """Return a descriptor of an eBPF socket filter that passes everything; -1 where it is refused."""
    code = ctypes.create_string_buffer(
        bytes.fromhex("b700000000000100 9500000000000000")  # r0 = 65536; exit
    )
    text = ctypes.create_string_buffer(b"GPL")
    attributes = ctypes.create_string_buffer(128)
    fields = (ctypes.c_uint32 * 2).from_buffer(attributes)
    fields[0], fields[1] = 1, 2  # BPF_PROG_TYPE_SOCKET_FILTER, two instructions
    pointers = (ctypes.c_uint64 * 2).from_buffer(attributes, 8)
    pointers[0], pointers[1] = ctypes.addressof(code), ctypes.addressof(text)
    number = {"x86_64": 321, "aarch64": 280, "riscv64": 280}[os.uname().machine]
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.syscall(number, 5, attributes, 128))  # BPF_PROG_LOAD


@pytest.mark.parametrize("backend", ["userspace", "userspace:in-line"])
def test_no_filter_is_read_through_a_buffer_of_the_library(
    monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    """`socket.getsockopt` with this option overruns its buffer, so it is never called."""
    asked: list[tuple[int, ...]] = []
    plain = socket.socket.getsockopt

    def watched(sock: socket.socket, *arguments: int) -> object:
        asked.append(arguments[:2])
        return plain(sock, *arguments)

    monkeypatch.setattr(socket.socket, "getsockopt", watched)
    with udp() as sock:
        set_nat_t_endpoint(sock, backend=backend, esp=lambda *_: None).close()
    assert asked
    assert (socket.SOL_SOCKET, filters.SO_GET_FILTER) not in asked


def test_a_locked_filter_can_be_neither_replaced_nor_taken_off() -> None:
    with udp() as sock:
        filters.attach_filter(sock, filters.NO_RUNTS)
        sock.setsockopt(socket.SOL_SOCKET, filters.SO_LOCK_FILTER, 1)
        with pytest.raises(PermissionError):
            filters.attach_filter(sock, filters.IKE_ONLY)
        with pytest.raises(PermissionError):
            filters.detach_filter(sock)


@pytest.mark.parametrize(
    ("call", "number"),
    [
        pytest.param(filters.detach_filter, errno.ENOENT, id="no filter"),
        pytest.param(filters.detach_steering, errno.EINVAL, id="no group to take a program off"),
        pytest.param(
            lambda sock: filters.attach_steering(sock, 1), errno.EINVAL, id="no group to give a program to"
        ),
    ],
)
def test_errors_of_the_kernel_come_through(call: object, number: int) -> None:
    assert callable(call)
    with udp() as sock:
        with pytest.raises(OSError, match=str(number)) as raised:
            call(sock)
        assert raised.value.errno == number


def test_drops_counts_datagrams_that_the_filter_dropped() -> None:
    with udp() as sock, udp() as peer:
        assert filters.drops(sock) == 0
        filters.attach_filter(sock, filters.IKE_ONLY)
        for _ in range(3):
            peer.sendto(b"\xff", at(sock))
        wait_until(lambda: filters.drops(sock) == 3)


def test_drops_is_none_where_the_kernel_does_not_say() -> None:
    left, right = socket.socketpair()
    left.close()
    with right:
        assert filters.drops(left) is None


@isolated(refused=(filters.SO_ATTACH_FILTER,))
def test_a_sandbox_that_refuses_filters_raises_eperm() -> None:
    with udp() as sock:
        with pytest.raises(PermissionError):
            filters.attach_filter(sock, filters.IKE_ONLY)
        assert not filters.has_filter(sock)
