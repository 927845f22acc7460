"""One end of a tunnel for tests of the C loop: path, SAs, TUN and socket, without the engine of Python."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any, Final, TypeVar

import pytest

from natcompat.esp.engine.packet import expand, flow_key
from tests.support.linux import wait_until

_datapath = pytest.importorskip("natcompat.esp.datapath.compiled", reason="the C data path is not built here")
ffi: Any = _datapath.ffi
lib: Any = _datapath.lib

# below the skip, since it takes the C data path
from natcompat.esp.carrier.native import c_hand_back as c_hand_back  # noqa: E402

Result = TypeVar("Result")

UDP_SEGMENT, UDP_GRO = 103, 104  # include/uapi/linux/udp.h
IP_PKTINFO, IP_RECVTOS = 8, 13  # include/uapi/linux/in.h
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0  # include/uapi/linux/if_tun.h
_IFF_TUN, _IFF_NO_PI, _IFF_VNET_HDR = 0x0001, 0x1000, 0x4000
_CSUM_AND_TSO, _USO = 0x01 | 0x02 | 0x04 | 0x08, 0x20 | 0x40
_CLONE_NEWNET: Final = 0x40000000  # linux/sched.h
MTU: Final = 1400


def in_thread(function: Callable[[], Result], *, new_namespace: bool) -> Result:
    """Run `function` in a thread, which may have a network namespace of its own."""
    results: list[Result] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            if new_namespace and ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "unshare")
            results.append(function())
        except BaseException as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return results[0]


def endpoint(address: tuple[str, int]) -> Any:
    made = ffi.new("struct esp_endpoint *")
    packed = socket.inet_aton(address[0])
    made.address[0 : len(packed)] = list(packed)
    made.port, made.version = address[1], 4
    return made


class End:
    """One end. Its TUN is in a network namespace of its own, its socket on loopback."""

    def __init__(self, number: int, sock: socket.socket, *, threads: int = 2, way: Any = ffi.NULL) -> None:
        """`number`: 1 or 2. `sock` is read by the loop."""
        self.number = number
        self.sock = sock
        self.inner = {4: f"10.9.0.{number}", 6: f"fd09::{number}"}
        self.kept: list[Any] = []
        self.udp = False
        self.tun = in_thread(self._make_tun, new_namespace=True)
        self.path = lib.esp_path_new(ffi.NULL)
        self.ivs = ffi.new("uint64_t *", number << 60)
        self.loop = lib.loop_new(self.path, threads)
        assert lib.loop_set_tun(self.loop, self.tun, 15 if self.udp else 3) == 0
        self.slot = self.add_socket(way)
        assert self.slot >= 0
        self.outbound = self.inbound = ffi.NULL
        self.events: list[tuple[int, bytes]] = []
        self.learning = True
        self._ended = False
        self._python = threading.Thread(target=self._run)

    def _make_tun(self) -> int:
        self.namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        flags = _IFF_TUN | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(tun, _TUNSETIFF, struct.pack("16sH22x", b"inner", flags))
        try:
            fcntl.ioctl(tun, _TUNSETOFFLOAD, _CSUM_AND_TSO | _USO)
            self.udp = True
        except OSError:  # before Linux 6.2
            fcntl.ioctl(tun, _TUNSETOFFLOAD, _CSUM_AND_TSO)
        self.ip(f"address add {self.inner[4]}/24 dev inner")
        self.ip(f"address add {self.inner[6]}/64 dev inner nodad")
        self.ip(f"link set inner mtu {MTU} up")
        return tun

    def ip(self, command: str) -> None:
        """Run the command ``ip`` in the namespace of this thread."""
        subprocess.run(["ip", *command.split()], check=True)

    def add_socket(self, way: Any = ffi.NULL) -> int:
        """Let the loop read and send by the socket; return its number."""
        address = self.sock.getsockname()
        bound = ffi.new("struct loop_address *")
        bound.address, bound.family = endpoint(address)[0], socket.AF_INET
        bound.any = address[0] == "0.0.0.0"
        return int(lib.loop_add_socket(self.loop, self.sock.fileno(), 1, bound, way))

    def inside(self, function: Callable[[], Result]) -> Result:
        """Run `function` in the namespace of the TUN."""

        def run() -> Result:
            if ctypes.CDLL(None, use_errno=True).setns(self.namespace, _CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns")
            return function()

        return in_thread(run, new_namespace=False)

    def udp_socket(self, version: int = 4, port: int = 0) -> socket.socket:
        """Return a UDP socket at the inner address."""
        return self._socket(socket.SOCK_DGRAM, version, port)

    def tcp_socket(self, version: int = 4, port: int = 0) -> socket.socket:
        return self._socket(socket.SOCK_STREAM, version, port)

    def _socket(self, kind: int, version: int, port: int) -> socket.socket:
        def make() -> socket.socket:
            made = socket.socket(socket.AF_INET if version == 4 else socket.AF_INET6, kind)
            made.settimeout(20)
            made.bind((self.inner[version], port))
            return made

        return self.inside(make)

    def install(self, peer: tuple[str, int], local: str = "") -> None:
        """Install the SAs with the other end, at `peer`, and start."""
        address, port = self.sock.getsockname()
        for direction in (1, 2):
            key = ffi.new("uint8_t[20]", bytes(range(direction, direction + 20)))
            parameters = ffi.new("struct esp_parameters *")
            parameters.serial = parameters.spi = 0x1000 + direction
            parameters.encryption, parameters.replay_window = 20, 1024
            parameters.copy_dscp = parameters.copy_ecn = parameters.copy_df = 1
            parameters.key, parameters.key_length = key, 20
            parameters.permitted = 0xFFFFFFFF
            if direction == self.number:
                sa = self.outbound = lib.esp_outbound_new(self.path, parameters)
                lib.esp_sa_draw_ivs(sa, self.ivs)
            else:
                sa = self.inbound = lib.esp_inbound_new(self.path, parameters)
                lib.esp_index(self.path, parameters.spi, sa, 0)
            assert sa
            lib.esp_sa_place(sa, endpoint(peer), endpoint((local or address, port)))
            self.kept += [key, parameters]
        self.peer = peer
        assert lib.loop_start(self.loop) == 0
        self._python.start()

    def _run(self) -> None:
        event, buffer = ffi.new("struct loop_event *"), ffi.new("uint8_t[70000]")
        while not self._ended:
            if self.learning and lib.loop_next_event(self.loop, event, buffer, 70000):
                packet = bytes(ffi.buffer(buffer, event.length if event.kind != lib.LOOP_TUN_GONE else 0))
                self.events.append((event.kind, packet))
                self._answer(event, packet)
            else:
                time.sleep(0.001)

    def _answer(self, event: Any, packet: bytes) -> None:
        """Let every flow through, as Python does that has a policy for all."""
        generation = lib.esp_generation(self.path)
        if event.kind == lib.LOOP_ADMIT:
            lib.esp_admit(self.path, generation, self._flow(packet), self.inbound, ffi.NULL, lib.ESP_DONE)
            with contextlib.suppress(OSError):
                os.write(self.tun, bytes(10) + packet)
        elif event.kind == lib.LOOP_SEAL:
            lib.esp_way(self.path, generation, self._flow(packet), self.outbound, ffi.NULL, lib.ESP_DONE)
            room = ffi.new("uint8_t[]", bytes(24) + packet + bytes(64))
            sealed = ffi.new("struct esp_packet *")
            sealed.data, sealed.length, sealed.room = room + 24, len(packet), len(packet) + 64
            lib.esp_sa_seal(self.outbound, sealed, time.time())
            with contextlib.suppress(OSError):
                self.sock.sendto(bytes(ffi.buffer(sealed.data, sealed.length)), self.peer)

    @staticmethod
    def _flow(packet: bytes) -> Any:
        key = flow_key(packet)
        assert key is not None
        flow = expand(key)
        made = ffi.new("struct esp_flow *")
        size = 4 if flow.version == 4 else 16
        made.source[0:size] = list(flow.source.to_bytes(size))
        made.destination[0:size] = list(flow.destination.to_bytes(size))
        made.source_port, made.destination_port = flow.source_port, flow.destination_port
        made.version, made.protocol = flow.version, flow.protocol
        return made

    def counters(self) -> dict[str, int]:
        """Return the counters of loop and socket, together."""
        found: dict[str, int] = {}
        whole, ours = ffi.new("struct loop_counters *"), ffi.new("struct loop_socket_counters *")
        lib.loop_read_counters(self.loop, whole)
        lib.loop_read_socket_counters(self.loop, self.slot, ours)
        for each in (whole, ours):
            found |= {name: getattr(each, name) for name, _ in ffi.typeof(each).item.fields}
        return found

    def kinds(self) -> set[int]:
        return {kind for kind, _ in self.events}

    def wait_for(self, counter: str, at_least: int = 1) -> int:
        wait_until(lambda: self.counters()[counter] >= at_least, f"{counter}: {self.counters()}", 20)
        return self.counters()[counter]

    def close(self) -> None:
        lib.loop_stop(self.loop)
        self._ended = True
        if self._python.ident:
            self._python.join()
        lib.loop_free(self.loop)
        for sa in (self.outbound, self.inbound):
            if sa:
                lib.esp_sa_free(sa)
        lib.esp_path_release(self.path)
        os.close(self.tun)
        os.close(self.namespace)
        self.sock.close()


def esp_socket(*, coalesce: bool = True, port: int = 0, host: str = "127.0.0.1") -> socket.socket:
    """Return a socket as the steering gives them away."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.setblocking(False)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
    if coalesce:
        sock.setsockopt(socket.IPPROTO_UDP, UDP_GRO, 1)
    sock.setsockopt(socket.IPPROTO_IP, IP_PKTINFO, 1)
    sock.setsockopt(socket.IPPROTO_IP, IP_RECVTOS, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    sock.bind((host, port))
    return sock


@contextlib.contextmanager
def tunnel(**options: Any) -> Any:
    """Two ends with SAs between them; the caller is in a network namespace of his own."""
    with contextlib.ExitStack() as stack:
        ends = [End(number, esp_socket(), **options) for number in (1, 2)]
        for end in ends:
            stack.callback(end.close)
        addresses = [end.sock.getsockname() for end in ends]
        ends[0].install(addresses[1])
        ends[1].install(addresses[0])
        yield ends
