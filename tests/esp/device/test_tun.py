"""TUN devices of this kernel, each test in a network namespace of its own."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
from ipaddress import ip_address

import pytest

from natcompat.errors import NatCompatError
from natcompat.esp.device import tun as tun_module
from natcompat.esp.device.tun import TunDevice
from natcompat.ipsec.device import PacketDevice
from tests.support.esp import ip_packet, udp
from tests.support.linux import LINUX, ip, isolated, nothing_left
from tests.support.tun import TUN, interfaces, mtu_of, read_until

pytestmark = [LINUX, TUN]

NEAR = {4: "10.1.0.1", 6: "fd00:1::1"}
FAR = {4: "10.1.0.9", 6: "fd00:1::9"}
PREFIX = {4: 24, 6: 64}


def udp_with_checksum(source: str, destination: str, source_port: int, destination_port: int) -> bytes:
    """Return a UDP packet as the kernel takes it: over IPv6 only with a checksum."""
    from natcompat.esp.engine.packet import checksum

    datagram = udp(b"an answer", source_port=source_port, destination_port=destination_port)
    pseudo = ip_address(source).packed + ip_address(destination).packed
    pseudo += len(datagram).to_bytes(4) + (17).to_bytes(4)
    return ip_packet(
        source, destination, datagram[:6] + checksum(pseudo + datagram).to_bytes(2) + datagram[8:]
    )


def is_to(destination: str, packet: bytes) -> bool:
    packed = ip_address(destination).packed
    return packet[16:20] == packed if packet[0] >> 4 == 4 else packet[24:40] == packed


@isolated(network=True)
def _carry_packets(version: int, vnet_header: bool) -> None:
    family = {4: socket.AF_INET, 6: socket.AF_INET6}[version]
    with nothing_left(), TunDevice(mtu=1380, vnet_header=vnet_header) as made:
        device: PacketDevice = made
        assert made.name == "natcompat0"
        assert made.index == socket.if_nametoindex("natcompat0")
        assert device.mtu == mtu_of("natcompat0") == 1380
        made.add_address(f"{NEAR[version]}/{PREFIX[version]}")
        with socket.socket(family, socket.SOCK_DGRAM) as sock:
            sock.settimeout(10)
            sock.sendto(b"a question", (FAR[version], 7))
            assert sock.getsockname()[1]
            packet, _ = read_until(made, lambda each: is_to(FAR[version], each))
            assert packet.endswith(b"a question")
            assert packet[0] >> 4 == version
            answer = udp_with_checksum(FAR[version], NEAR[version], 7, sock.getsockname()[1])
            for _ in range(1000):  # the kernel takes an IPv6 address into use a moment after it is given
                assert device.write_burst([answer, answer]) == 2
                if select.select([sock], [], [], 0.01)[0]:
                    break
            assert sock.recvfrom(100)[0] == b"an answer"
            for number in range(10):
                sock.sendto(b"%d" % number, (FAR[version], 7))
            seen: list[bytes] = []
            while len(seen) < 10:
                assert select.select([device], [], [], 10)[0]
                burst = device.read_burst(most=3)
                assert len(burst) <= 3
                seen += [each for each in burst if is_to(FAR[version], each)]
            assert [each[-1:] for each in seen] == [b"%d" % number for number in range(10)]
        made.mtu = 1300
        assert device.mtu == mtu_of("natcompat0") == 1300
        with pytest.raises(ValueError, match="mtu"):
            made.mtu = 67
    assert interfaces() == {"lo"}
    assert device.fileno() == -1
    assert device.read_burst() == []
    assert device.write_burst([packet]) == 0
    made.close()
    with pytest.raises(NatCompatError, match="closed"):
        made.mtu = 1400


@pytest.mark.parametrize("vnet_header", [False, True], ids=["bare", "vnet header"])
@pytest.mark.parametrize("version", [4, 6], ids=["v4", "v6"])
def test_packets_both_ways(version: int, vnet_header: bool) -> None:
    _carry_packets(version, vnet_header)


@isolated(network=True)
def test_no_packet_is_bad_enough_to_raise() -> None:
    with TunDevice() as device:
        device.add_address("10.1.0.1/24")
        good = ip_packet(FAR[4], NEAR[4], udp())
        bad = [b"", b"\x45", b"\xf0" * 40, bytes(100), b"\xff" * 70000]
        assert device.write_burst([*bad, good]) == 1 + (len(bad) - device.write_errors)
        assert device.write_errors >= 4
        malformed = [good[:10], b"\x45" + bytes(19), b"\x60" + bytes(60), good[:-1]]
        for packet in malformed:  # what looks like IP is the stack's to judge
            device.write_burst([packet])
        ip("link", "set", device.name, "down")
        device.read_burst()
        assert device.write_burst([good]) == 0
        ip("link", "del", device.name)
        assert device.read_burst() == []
        assert device.write_burst([good]) == 0
        with pytest.raises(NatCompatError, match="somebody deleted it"):
            device.mtu = 1300


@isolated(network=True)
def test_routes_with_a_source_and_a_table() -> None:
    with TunDevice() as device:
        device.add_address("10.1.0.1")
        device.add_address("10.1.0.2")
        device.add_address("fd00:1::1")
        device.add_route("10.2.0.0/16", source="10.1.0.2")
        device.add_route("fd00:2::/64", source="fd00:1::1")
        device.add_route("10.3.0.0/16", table=77)
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.connect(("10.2.0.1", 7))
            assert sock.getsockname()[0] == "10.1.0.2"
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock:
            sock.connect(("fd00:2::1", 7))
            assert sock.getsockname()[0] == "fd00:1::1"
        with pytest.raises(NatCompatError, match=r"10\.2\.0\.0/16.*already") as caught:
            device.add_route("10.2.0.0/16")
        assert caught.value.errno == errno.EEXIST
        device.remove_route("10.2.0.0/16")
        device.remove_route("10.3.0.0/16", table=77)
        with pytest.raises(NatCompatError, match="removed it") as caught:
            device.remove_route("10.2.0.0/16")
        assert caught.value.errno == errno.ESRCH
        with socket.socket(type=socket.SOCK_DGRAM) as sock, pytest.raises(OSError, match="unreachable"):
            sock.connect(("10.2.0.1", 7))


@isolated(network=True)
def test_it_works_inside_a_running_event_loop() -> None:
    async def carry() -> bytes:
        loop = asyncio.get_running_loop()
        arrived: asyncio.Future[bytes] = loop.create_future()
        with TunDevice() as device:
            device.add_address("10.1.0.1/24")

            def read() -> None:
                for packet in device.read_burst():
                    if is_to(FAR[4], packet) and not arrived.done():
                        arrived.set_result(packet)

            loop.add_reader(device.fileno(), read)
            with socket.socket(type=socket.SOCK_DGRAM) as sock:
                sock.sendto(b"a question", (FAR[4], 7))
            try:
                return await asyncio.wait_for(arrived, 10)
            finally:
                loop.remove_reader(device.fileno())

    assert asyncio.run(carry()).endswith(b"a question")


@isolated(network=True)
def test_close_wakes_who_polls() -> None:
    with open("/proc/sys/net/ipv6/conf/default/disable_ipv6", "w") as file:
        file.write("1")  # or the kernel talks into it
    device = TunDevice()
    ready = threading.Event()
    woken: list[list[tuple[int, int]]] = []

    def wait() -> None:
        poll = select.poll()
        poll.register(device, select.POLLIN)
        ready.set()
        woken.append(poll.poll(60000))

    thread = threading.Thread(target=wait)
    thread.start()
    ready.wait()
    device.close()
    thread.join(30)
    assert woken
    assert interfaces() == {"lo"}


@isolated(network=True)
def test_what_the_kernel_left_undone_is_dropped() -> None:
    with TunDevice(vnet_header=True) as device:
        device.add_address("10.1.0.1/24")
        device.set_offload(1)  # TUN_F_CSUM: checksums are the reader's
        with socket.socket(type=socket.SOCK_DGRAM) as sock:
            sock.sendto(b"a question", (FAR[4], 7))
            while not device.offloaded:
                assert select.select([device], [], [], 10)[0]
                assert not any(is_to(FAR[4], each) for each in device.read_burst())
            device.set_offload(0)
            sock.sendto(b"a question", (FAR[4], 7))
            read_until(device, lambda each: is_to(FAR[4], each))
        with pytest.raises(NatCompatError, match="offload"):
            device.set_offload(1 << 30)
    with TunDevice() as device, pytest.raises(NatCompatError, match="vnet_header"):
        device.set_offload(0)


@isolated(network=True)
def test_what_comes_in_one_piece_is_sealed_into_one_datagram() -> None:
    def longest() -> int:
        command = ["ip", "-json", "-details", "link", "show", "natcompat0"]
        (link,) = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        return int(link.get("gso_max_size", 0))

    with TunDevice(vnet_header=True) as device:
        if longest() != 65536:
            pytest.skip("this kernel does not tell how much it hands out in one piece")
        for mtu in (1280, 1400, 9000):
            device.mtu = mtu
            device.set_offload(0x01 | 0x02 | 0x04)  # TUN_F_CSUM, _TSO4, _TSO6
            for headers in (40, 40 + 12, 60 + 12):  # IPv4 or IPv6, TCP, time stamps
                for to_come in (192, 320):  # MAX_TCP_HEADER, by how the kernel is made
                    segments = (longest() - to_come - 1) // (mtu - headers)
                    assert 65507 * 0.85 - mtu < segments * (mtu + 73) <= 65507
        device.set_offload(1)
        assert longest() == 65536


@isolated(network=True)
def test_nothing_is_left_after_an_exception() -> None:
    with nothing_left():
        with pytest.raises(ZeroDivisionError), TunDevice():
            raise ZeroDivisionError
        assert interfaces() == {"lo"}
        with pytest.raises(ValueError, match="mtu"):
            TunDevice(mtu=20)
        assert interfaces() == {"lo"}
        device = TunDevice()
        os.close(device._descriptor)
        device._descriptor = -1
        device.close()
        assert interfaces() == {"lo"}


_OPEN_AND_WAIT = """
from natcompat.esp.device.tun import TunDevice
import time
device = TunDevice()
device.add_address("10.1.0.1/24")
device.add_route("10.2.0.0/16")
print(device.name, flush=True)
time.sleep(99)
"""


@isolated(network=True)
def test_nothing_survives_the_process() -> None:
    for how in (signal.SIGTERM, signal.SIGKILL, signal.SIGINT):
        with subprocess.Popen(
            [sys.executable, "-c", _OPEN_AND_WAIT],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        ) as process:
            assert process.stdout is not None
            name = process.stdout.readline().strip()
            assert name in interfaces()
            process.send_signal(how)
        assert interfaces() == {"lo"}


@isolated(network=True)
def test_a_forked_child_leaves_it_alone() -> None:
    device = TunDevice()
    child = os.fork()
    if not child:
        device.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert device.name in interfaces()
    device.mtu = 1300
    device.close()
    assert interfaces() == {"lo"}


@isolated(network=True)
def test_a_device_that_was_there_before_stays() -> None:
    ip("tuntap", "add", "dev", "mine", "mode", "tun")
    ip("address", "add", "10.9.0.1/24", "dev", "mine")
    for _ in range(2):
        with TunDevice("mine") as device:
            assert device.name == "mine"
            for address in ("10.1.0.1/24", "fd00:1::1/64", "10.9.0.1/24"):
                device.add_address(address)
            with pytest.raises(NatCompatError, match="already"):
                device.add_address("10.1.0.1/24")
            device.add_route("10.2.0.0/16")
        said = subprocess.run(
            ["ip", "-oneline", "address"], check=True, capture_output=True, text=True
        ).stdout
        assert [each for each in ("10.1.0.1", "fd00:1::1", "10.9.0.1") if each in said] == ["10.9.0.1"]
        said = subprocess.run(["ip", "route"], check=True, capture_output=True, text=True).stdout
        assert "10.2.0.0" not in said
    assert "mine" in interfaces()


@isolated(network=True)
def test_names() -> None:
    with TunDevice("esp%d") as first, TunDevice("esp%d") as second:
        assert (first.name, second.name) == ("esp0", "esp1")
        with pytest.raises(NatCompatError, match="Choose another name") as caught:
            TunDevice("esp1")
        assert caught.value.errno == errno.EBUSY
        with pytest.raises(NatCompatError, match="no TUN device has this one"):
            TunDevice("lo")
    for name in ("", "x" * 16):
        with pytest.raises(ValueError, match="name"):
            TunDevice(name)


@isolated(ordinary_user=True)
def test_without_privilege_the_error_names_it() -> None:
    with pytest.raises(NatCompatError, match=r"CAP_NET_ADMIN.*--device /dev/net/tun") as caught:
        TunDevice()
    assert caught.value.errno in (errno.EPERM, errno.EACCES)


def test_without_the_module_the_error_names_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tun_module, "PATH", "/nonexistent/net/tun")
    with pytest.raises(NatCompatError, match=r"modprobe tun.*docker run --device /dev/net/tun") as caught:
        TunDevice()
    assert caught.value.errno == errno.ENOENT


def test_other_systems_are_told_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "sunos5")
    with pytest.raises(NatCompatError, match="QueueDevice"):
        TunDevice()


@isolated(network=True)
def test_a_persistent_device_has_the_offloads_of_its_reader_and_no_others() -> None:
    """A process that was killed leaves its own behind: they belong to the interface."""
    ip("tuntap", "add", "dev", "kept0", "mode", "tun")
    child = os.fork()
    if child == 0:
        first = TunDevice("kept0", vnet_header=True)
        first.set_offload(1 | 2 | 4 | 32 | 64)  # TUN_F_CSUM, _TSO4, _TSO6, _USO4, _USO6
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    for vnet_header in (False, True):
        with (
            TunDevice("kept0", vnet_header=vnet_header) as device,
            socket.socket(type=socket.SOCK_DGRAM) as sock,
        ):
            device.add_address("10.1.0.1/24")
            assert "on" not in device.offloads.values()
            sock.setsockopt(socket.IPPROTO_UDP, 103, 500)  # UDP_SEGMENT
            sock.sendto(bytes(2500), (FAR[4], 7))
            lengths: list[int] = []
            while len(lengths) < 5:
                assert select.select([device], [], [], 10)[0]
                lengths += [len(packet) for packet in device.read_burst() if is_to(FAR[4], packet)]
            assert lengths == [528] * 5


@isolated(network=True)
def test_offloads_are_switched_off_by_name() -> None:
    os.environ["NATCOMPAT_OFFLOADS"] = "-uso,-tso6"
    with TunDevice(vnet_header=True) as device:
        assert device.set_offload(1 | 2 | 4 | 8 | 32 | 64) == 1 | 2 | 8
        off = "switched off by NATCOMPAT_OFFLOADS"
        assert device.offloads == {"csum": "on", "tso4": "on", "tso6": off, "uso": off}
        os.environ["NATCOMPAT_OFFLOADS"] = "none"
        assert device.set_offload(1 | 2) == 0
        assert set(device.offloads.values()) == {off}


@isolated(network=True)
def test_an_address_is_taken_away_and_given_again() -> None:
    with TunDevice() as device:
        for _ in range(2):
            for address in ("10.9.0.10/32", "fd00:9::10/64"):
                device.add_address(address)
                assert address in addresses_of(device.name)
                with pytest.raises(NatCompatError) as caught:
                    device.add_address(address)
                assert caught.value.errno == errno.EEXIST
                device.remove_address(address.partition("/")[0])
                assert address not in addresses_of(device.name)
        with pytest.raises(NatCompatError, match="was not given") as caught:
            device.remove_address("10.9.0.10")
        assert caught.value.errno == errno.EADDRNOTAVAIL
        assert device.addresses == []


def addresses_of(name: str) -> str:
    return subprocess.run(["ip", "addr", "show", name], check=True, capture_output=True, text=True).stdout
