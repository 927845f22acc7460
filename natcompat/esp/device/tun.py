"""The TUN device of Linux: inner packets come from this host's applications, and go to them.

    with TunDevice(mtu=1400) as tun:
        tun.add_address("10.1.0.1/24")
        tun.add_route("10.2.0.0/16")

The interface exists as long as the object is open, or the process lives: when the descriptor goes, whatever
the reason, the kernel removes the interface with its addresses and routes. One that was there before
(``ip tuntap add``) stays, and `close` takes away what it was given. For routes that may cover the address
of a peer use `natcompat.esp.device.routes`.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import socket
import struct
import sys
from collections.abc import Callable, Sequence
from functools import partial
from ipaddress import IPv4Interface, IPv6Interface, ip_address, ip_interface, ip_network
from typing import TYPE_CHECKING, Final, Self

from natcompat.errors import NatCompatError
from natcompat.esp.device.offloads import OFFLOADS, TUN_F_CSUM, VARIABLE, enabled, tun_flags, tun_names
from natcompat.esp.device.queue import DEFAULT_MTU, LARGEST_PACKET
from natcompat.ipsec import IPAddress, IPNetwork

if TYPE_CHECKING:
    from natcompat.esp.device.rtnetlink import Rtnetlink

PATH: Final = "/dev/net/tun"

# linux/if_tun.h
_TUNSETIFF: Final = 0x400454CA
_TUNSETOFFLOAD: Final = 0x400454D0
_TUNGETIFF: Final = 0x800454D2
_IFF_TUN: Final = 0x0001
_IFF_PERSIST: Final = 0x0800
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_IFREQ: Final = struct.Struct("=16sH22x")  # struct ifreq, linux/if.h
_LONGEST_NAME: Final = 15

_LARGEST_SEGMENTED: Final = 65536  # GSO_LEGACY_MAX_SIZE (linux/netdevice.h), what interfaces begin with
_MOST_SEGMENTS: Final = 64  # UDP_MAX_SEGMENTS (linux/udp.h) of older kernels
_LARGEST_DATAGRAM: Final = 65535 - 20 - 8
_LONGEST_HEADERS: Final = 40 + 20 + 12
"""IPv6, TCP, time stamps."""
_HEADERS_TO_COME: Final = 320 + 1
"""MAX_TCP_HEADER + 1 (net/tcp.h), in which the kernel does not put anything."""
_LARGEST_OVERHEAD: Final = 8 + 16 + 17 + 32
"""Bytes that ESP adds at most: header, IV and padding of AES-CBC, check value of HMAC-SHA2-512."""

VNET_HEADER_LENGTH: Final = 10
"""Bytes of struct virtio_net_hdr, without the number of buffers (linux/virtio_net.h)."""
_NOTHING_LEFT_TO_DO: Final = bytes(2)  # flags, GSO type: the checksum is there, and this is one packet

_REMEDIES: Final = {
    errno.ENOENT: "Load the module tun (modprobe tun); in a container: docker run --device /dev/net/tun",
    errno.EPERM: "Run as root, or grant CAP_NET_ADMIN (docker run --cap-add NET_ADMIN --device /dev/net/tun)",
    errno.EBUSY: "Choose another name; with %d in it the kernel numbers the devices",
    errno.EINVAL: "Choose another name: something that is no TUN device has this one",
}
_REMEDIES[errno.ENOTTY] = f"Put the device there (mknod {PATH} c 10 200): this is something else"
_REMEDIES[errno.ENODEV] = _REMEDIES[errno.ENXIO] = _REMEDIES[errno.ENOENT]
_REMEDIES[errno.EACCES] = _REMEDIES[errno.EPERM]


class TunDevice:
    """A TUN interface, up, in the network namespace of the thread that made it; a `PacketDevice`.

    `name`: with ``%d`` in it the kernel puts a number there. `vnet_header`: each packet on the descriptor
    has a struct virtio_net_hdr in front, for who reads it without this object, and `set_offload`.

    Methods may be called from any thread. A forked child shares the interface; it should only close.
    Raises ENOENT or ENODEV without /dev/net/tun, EPERM without CAP_NET_ADMIN, EBUSY where the name is taken.
    """

    def __init__(
        self, name: str = "natcompat%d", *, mtu: int = DEFAULT_MTU, vnet_header: bool = False
    ) -> None:
        if sys.platform != "linux":
            raise NatCompatError(
                errno.ENOTSUP, "TUN devices are here for Linux only", "Use a QueueDevice or a CallbackDevice"
            )
        if not 0 < len(name.encode()) <= _LONGEST_NAME:
            raise ValueError(f"name: an interface's has 1 to {_LONGEST_NAME} bytes, not {name!r}")
        self.vnet_header: bool = vnet_header
        self.addresses: list[IPAddress] = []
        """Those that `add_address` gave to the interface."""
        self.addresses_changed: Callable[[], object] = _do_nothing
        """Called after `add_address` and `remove_address`."""
        self._interfaces: dict[IPAddress, IPv4Interface | IPv6Interface] = {}
        self.write_errors: int = 0
        """Packets that the kernel did not take: malformed, of an unknown version, or there was no memory."""
        self.offloaded: int = 0
        """Packets that `read_burst` dropped, since they were to be segmented or lacked a checksum."""
        self._header_length = VNET_HEADER_LENGTH if vnet_header else 0
        self._segments = False
        self._offloads = 0
        self._refused: frozenset[str] = frozenset()
        self._netlink: Rtnetlink | None = None
        self._descriptor = -1
        self._undo: dict[object, Callable[[], object]] = {}
        """Of an interface that stays: what takes away what was given to it."""
        try:
            flags = _IFF_TUN | _IFF_NO_PI | (_IFF_VNET_HDR if vnet_header else 0)
            self._descriptor, self.name, self._persists = _open(name, flags)
            from natcompat.esp.device.rtnetlink import Rtnetlink

            # those of a persistent interface are what its last reader asked for
            with contextlib.suppress(OSError):
                fcntl.ioctl(self._descriptor, _TUNSETOFFLOAD, 0)
            self._netlink = Rtnetlink()
            self.index: int = socket.if_nametoindex(self.name)
            self.mtu = mtu
            self._netlink.set_link(self.index, up=True)
        except BaseException:
            self.close()
            raise

    # --- the interface

    name: str
    """Of the interface."""

    @property
    def mtu(self) -> int:
        """The MTU of the interface, in bytes, as it was last set here. To set it changes the interface."""
        return self._mtu

    @mtu.setter
    def mtu(self, mtu: int) -> None:
        if not 68 <= mtu <= LARGEST_PACKET:
            raise ValueError(f"mtu: {mtu} is not 68 (RFC 791) to {LARGEST_PACKET}")
        self._routes().set_link(self.index, mtu=mtu)
        self._mtu = mtu
        if self._segments:
            self._limit_segments()

    def add_address(self, address: str) -> None:
        """Give the interface an address, with or without a prefix length: "10.1.0.1/24", "fd00:1::1".

        One that stays may have had it before, and then keeps it.
        """
        interface = ip_interface(address)
        netlink, wanted = self._routes(), (self.index, interface.ip, interface.network.prefixlen)
        try:
            netlink.add_address(*wanted)
        except NatCompatError as error:
            if error.errno != errno.EEXIST or not self._persists or interface.ip in self.addresses:
                raise
        else:
            if self._persists:
                self._undo[interface] = partial(netlink.delete_address, *wanted)
        self.addresses.append(interface.ip)
        self._interfaces[interface.ip] = interface
        self.addresses_changed()

    def remove_address(self, address: str | IPAddress) -> None:
        """Take away an address that `add_address` gave; its prefix length may be omitted.

        EADDRNOTAVAIL: the interface was not given it.
        """
        removed = ip_interface(address).ip
        interface = self._interfaces.get(removed)
        if interface is None:
            raise NatCompatError(
                errno.EADDRNOTAVAIL, f"{self.name} was not given {removed}", "Give the address that was added"
            )
        netlink = self._routes()
        with contextlib.suppress(NatCompatError):  # somebody else did
            netlink.delete_address(self.index, removed, interface.network.prefixlen)
        del self._interfaces[removed]
        self.addresses.remove(removed)
        self._undo.pop(interface, None)
        self.addresses_changed()

    def restore(self) -> list[str]:
        """Bring the interface up and give it its addresses again; return what was missing, in words.

        ENODEV: it is gone from this network namespace.
        """
        netlink = self._routes()
        link = netlink.link(self.index)
        if link is None:
            raise NatCompatError(
                errno.ENODEV,
                f"the interface {self.name} was deleted or moved to another network namespace",
                "Open IPsec anew",
            )
        restored = []
        if not link.up:
            netlink.set_link(self.index, up=True)
            restored.append(f"the interface {link.name} was down")
        present = netlink.addresses_of(self.index)
        for interface in self._interfaces.values():
            if interface.ip not in present:
                netlink.add_address(self.index, interface.ip, interface.network.prefixlen)
                restored.append(f"the address {interface}")
        return restored

    def add_route(
        self, network: IPNetwork | str, source: IPAddress | str | None = None, *, table: int | None = None
    ) -> None:
        """Lead packets to `network` into the interface.

        `source`: what this host's applications shall have for their address there. `table`: another
        than the main one. Does not look whether the route covers a peer: see `natcompat.esp.device.routes`.
        """
        from natcompat.esp.device.rtnetlink import MAIN_TABLE

        netlink, network, table = self._routes(), ip_network(network), table or MAIN_TABLE
        preferred = None if source is None else ip_address(source)
        netlink.add_route(self.index, network, table=table, source=preferred)
        if self._persists:
            self._undo[network, table] = partial(netlink.delete_route, self.index, network, table=table)

    def remove_route(self, network: IPNetwork | str, *, table: int | None = None) -> None:
        """Undo `add_route`. ESRCH: there is none."""
        from natcompat.esp.device.rtnetlink import MAIN_TABLE

        network, table = ip_network(network), table or MAIN_TABLE
        self._routes().delete_route(self.index, network, table=table)
        self._undo.pop((network, table), None)

    def set_offload(self, flags: int) -> int:
        """Say which work the reader of the descriptor takes over: TUN_F_* of linux/if_tun.h, 0: none.

        Returns the flags that are on: those that NATCOMPAT_OFFLOADS allows. `read_burst` drops packets on
        which work is left. EINVAL: this kernel does not know a flag, or there is no `vnet_header`.
        """
        if not self.vnet_header:
            raise NatCompatError(
                errno.EINVAL, "without a header nothing says what is to be done", "Use vnet_header=True"
            )
        if self._descriptor < 0:
            raise NatCompatError(errno.EBADF, "the TUN device is closed")
        allowed = flags & ~(tun_flags(OFFLOADS) & ~tun_flags(enabled()))
        try:
            fcntl.ioctl(self._descriptor, _TUNSETOFFLOAD, allowed)
        except OSError as error:
            self._refused |= tun_names(allowed)
            raise _failure("offload", error) from None
        self._refused -= tun_names(allowed)
        self._offloads = allowed
        self._segments = bool(allowed & ~TUN_F_CSUM)
        self._limit_segments()
        return allowed

    @property
    def offloads(self) -> dict[str, str]:
        """The offloads of the reader, by the names of NATCOMPAT_OFFLOADS: "on", or the reason."""
        on, allowed = tun_names(self._offloads), enabled()
        reasons = {}
        for name in sorted(tun_names(~0)):
            if name in on:
                reasons[name] = "on"
            elif name not in allowed:
                reasons[name] = f"switched off by {VARIABLE}"
            elif name in self._refused:
                reasons[name] = "this kernel does not have it"
            else:
                reasons[name] = "the reader does not take it over"
        return reasons

    def _limit_segments(self) -> None:
        """Let the kernel hand out so much in one piece as one UDP datagram carries when it is sealed.

        ESP of a longer one would leave in two, the second of them almost empty.
        """
        if self._persists:
            return  # how it was made is its owner's affair
        size = _LARGEST_SEGMENTED
        if self._segments:
            most = max(1, min(_MOST_SEGMENTS, _LARGEST_DATAGRAM // (self._mtu + _LARGEST_OVERHEAD)))
            size = min(size, most * max(0, self._mtu - _LONGEST_HEADERS) + _HEADERS_TO_COME)
        with contextlib.suppress(NatCompatError):  # this kernel has no such limit
            self._routes().set_link(self.index, segmented=size)

    def _routes(self) -> Rtnetlink:
        if self._netlink is None:
            raise NatCompatError(errno.EBADF, "the TUN device is closed")
        return self._netlink

    # --- packets

    def fileno(self) -> int:
        """Return the TUN descriptor, which never blocks; -1 after `close`."""
        return self._descriptor

    def read_burst(self, most: int = 64) -> list[bytes]:
        """Return what this host sends into the interface, oldest first; none when there is none."""
        burst: list[bytes] = []
        read, descriptor, header = os.read, self._descriptor, self._header_length
        size = LARGEST_PACKET + header
        try:
            if header:
                for _ in range(most):
                    packet = read(descriptor, size)
                    if packet[:2] == _NOTHING_LEFT_TO_DO:
                        burst.append(packet[header:])
                    else:
                        self.offloaded += 1
            else:
                for _ in range(most):
                    burst.append(read(descriptor, size))  # noqa: PERF401 - an exception ends it
        except OSError:  # EAGAIN; EBADFD or EIO: the interface is gone or down, which is as empty
            pass
        return burst

    def write_burst(self, packets: Sequence[bytes]) -> int:
        """Give packets to this host; return how many it took. Never raises, whatever they hold."""
        taken = 0
        write, descriptor = os.write, self._descriptor
        header = bytes(self._header_length)
        for packet in packets:
            try:
                write(descriptor, header + packet if header else packet)
            except OSError:  # EINVAL: no IP packet; ENOMEM, ENOBUFS, EAGAIN; EIO: not up; EBADFD: gone
                self.write_errors += 1
            else:
                taken += 1
        return taken

    def close(self) -> None:
        """Remove the interface, and with it addresses and routes. Wakes who polls. May be repeated.

        Not while another thread is in `read_burst` or `write_burst`.
        """
        descriptor, self._descriptor = self._descriptor, -1
        netlink, self._netlink = self._netlink, None
        if netlink is not None:
            # a poll in another thread would keep the interface alive for as long as it waits
            for undo in reversed(self._undo.values()):
                with contextlib.suppress(OSError):  # somebody else took it away, or privileges are gone
                    undo()
            with contextlib.suppress(OSError, AttributeError):
                if not self._persists:
                    netlink.delete_link(self.index)
            netlink.close()
        if descriptor >= 0:
            os.close(descriptor)

    def abandon(self) -> None:
        """Close this process's descriptor, a forked child's, and leave the interface to its parent."""
        descriptor, self._descriptor = self._descriptor, -1
        netlink, self._netlink = self._netlink, None
        if netlink is not None:
            netlink.close()
        if descriptor >= 0:
            os.close(descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, OSError):  # it was never opened; the interpreter ends
            if self._descriptor >= 0:
                os.close(self._descriptor)


def _do_nothing() -> None:
    """Be called for nothing."""


def _open(name: str, flags: int) -> tuple[int, str, bool]:
    """Return a descriptor of a TUN interface, its name, and whether it stays when that is closed."""
    try:
        descriptor = os.open(PATH, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise _failure(PATH, error) from None
    try:
        fcntl.ioctl(descriptor, _TUNSETIFF, _IFREQ.pack(name.encode(), flags))
        raw, flags = _IFREQ.unpack(fcntl.ioctl(descriptor, _TUNGETIFF, bytes(_IFREQ.size)))
    except OSError as error:
        os.close(descriptor)
        raise _failure(name, error) from None
    return descriptor, raw.rstrip(b"\0").decode(), bool(flags & _IFF_PERSIST)


def _failure(what: str, error: OSError) -> NatCompatError:
    code = error.errno or errno.EIO
    text = f"no TUN device ({what}): {error.strerror}"
    return NatCompatError(code, text, _REMEDIES.get(code, ""))
