"""Classic BPF programs for socket filters and SO_REUSEPORT groups, and functions that attach them.

None of this needs a privilege (socket(7), SO_ATTACH_FILTER and SO_ATTACH_REUSEPORT_CBPF).
"""

from __future__ import annotations

import array
import errno
import socket
import struct
from typing import Final, TypeAlias

# include/uapi/asm-generic/socket.h; Python names none of them
SO_ATTACH_FILTER: Final = 26
SO_DETACH_FILTER: Final = 27
SO_GET_FILTER: Final = SO_ATTACH_FILTER  # as a getsockopt
SO_LOCK_FILTER: Final = 44
SO_ATTACH_BPF: Final = 50
SO_ATTACH_REUSEPORT_CBPF: Final = 51
SO_ATTACH_REUSEPORT_EBPF: Final = 52
SO_MEMINFO: Final = 55
SO_DETACH_REUSEPORT_BPF: Final = 68

# include/uapi/linux/bpf_common.h and filter.h
_LD_W_ABS: Final = 0x20
_LD_H_ABS: Final = 0x28
_LD_B_ABS: Final = 0x30
_TAX: Final = 0x07
_AND_K: Final = 0x54
_JEQ_X: Final = 0x1D
_LD_W_LEN: Final = 0x80
_JEQ_K: Final = 0x15
_JGE_K: Final = 0x35
_ADD_K: Final = 0x04
_MOD_K: Final = 0x94
_RET_K: Final = 0x06
_RET_A: Final = 0x16

_MEMINFO: Final = struct.Struct("=9I")
_UDP_HEADER: Final = 8  # struct udphdr: a socket filter sees it in front of the payload
_PASS: Final = 0xFFFFFFFF
_DROP: Final = 0

Instruction: TypeAlias = tuple[int, int, int, int]
"""(code, jump if true, jump if false, k): ``struct sock_filter``."""
Program: TypeAlias = tuple[Instruction, ...]

IKE_ONLY: Final[Program] = (
    (_LD_W_ABS, 0, 0, _UDP_HEADER),  # a load beyond the end drops the datagram: runts
    (_JEQ_K, 0, 1, 0),
    (_RET_K, 0, 0, _PASS),
    (_RET_K, 0, 0, _DROP),
)
"""Socket filter: passes datagrams that begin with the non-ESP marker, drops the others.

It runs after decapsulation (UDP_ENCAP), so XFRM still gets its ESP.
"""

# offsets of a load: from the header of the network layer, of the link layer, and of the device's type
_NETWORK: Final = (1 << 32) - 0x100000  # SKF_NET_OFF
_LINK: Final = (1 << 32) - 0x200000  # SKF_LL_OFF
_DEVICE_TYPE: Final = (1 << 32) - 0x1000 + 28  # SKF_AD_OFF + SKF_AD_HATYPE
_ETHERNET, _LOOPBACK = 1, 772  # ARPHRD_*, include/uapi/linux/if_arp.h
_BEHIND_LINK: Final = _LINK + 14  # ETH_HLEN

IKE_OUTSIDE_ESP: Final[Program] = (
    *IKE_ONLY[:1],
    (_JEQ_K, 0, 23, 0),
    (_LD_W_ABS, 0, 0, _DEVICE_TYPE),
    (_JEQ_K, 1, 0, _ETHERNET),
    (_JEQ_K, 0, 19, _LOOPBACK),
    (_LD_B_ABS, 0, 0, _NETWORK),
    (_AND_K, 0, 0, 0xF0),
    (_JEQ_K, 8, 0, 0x40),
    # IPv6: version, class and flow label are equal, and the length is not
    (_LD_W_ABS, 0, 0, _BEHIND_LINK),
    (_TAX, 0, 0, 0),
    (_LD_W_ABS, 0, 0, _NETWORK),
    (_JEQ_X, 0, 12, 0),
    (_LD_H_ABS, 0, 0, _BEHIND_LINK + 4),
    (_TAX, 0, 0, 0),
    (_LD_H_ABS, 0, 0, _NETWORK + 4),
    (_JEQ_X, 8, 9, 0),
    # IPv4: the identification is equal, and the length is not
    (_LD_W_ABS, 0, 0, _BEHIND_LINK + 4),
    (_TAX, 0, 0, 0),
    (_LD_W_ABS, 0, 0, _NETWORK + 4),
    (_JEQ_X, 0, 4, 0),
    (_LD_H_ABS, 0, 0, _BEHIND_LINK + 2),
    (_TAX, 0, 0, 0),
    (_LD_H_ABS, 0, 0, _NETWORK + 2),
    (_JEQ_X, 0, 1, 0),
    (_RET_K, 0, 0, _PASS),
    (_RET_K, 0, 0, _DROP),
)
"""Socket filter: as `IKE_ONLY`, but drops IKE that came inside a transport-mode SA, as Solaris does.

``xfrm4_transport_input()`` and ``xfrm6_transport_input()`` move the IP header over the ESP header and leave
at least the first 8 bytes of the old one behind the Ethernet header. So the datagram came out of ESP if an IP
header stands there with the same identification (IPv6: flow label) and another length. IKE of tunnel-mode SAs
never gets here: the kernel drops it at a socket exempt from policies (``__xfrm_policy_check()``). Only links
with an Ethernet header are examined. Where esp4_offload or esp6_offload receives, the kernel moves the
Ethernet header, too, and the filter passes the datagram.
"""

NO_RUNTS: Final[Program] = (
    (_LD_W_LEN, 0, 0, 0),
    (_JGE_K, 0, 1, _UDP_HEADER + 4),
    (_RET_K, 0, 0, _PASS),
    (_RET_K, 0, 0, _DROP),
)
"""Socket filter: drops payloads of fewer than four bytes."""


def steering(engines: int) -> Program:
    """Return the SO_REUSEPORT program: IKE to socket 0 of the group, everything else to 1..`engines`.

    The SPI selects among several ESP sockets, so that an SA stays on one socket. The program sees the UDP
    payload without the header (``reuseport_select_sock()`` pulls it).
    """
    return (
        (_LD_W_LEN, 0, 0, 0),
        (_JGE_K, 1, 0, 4),
        (_RET_K, 0, 0, 1),  # runts: index 0 would wake the application for nothing
        (_LD_W_ABS, 0, 0, 0),
        (_JEQ_K, 0, 1, 0),
        (_RET_K, 0, 0, 0),
        (_MOD_K, 0, 0, engines),
        (_ADD_K, 0, 0, 1),
        (_RET_A, 0, 0, 0),
    )


def other_than(length: int) -> Program:
    """Return a socket filter: drops payloads of exactly `length` bytes."""
    return (
        (_LD_W_LEN, 0, 0, 0),
        (_JEQ_K, 0, 1, _UDP_HEADER + length),
        (_RET_K, 0, 0, _DROP),
        (_RET_K, 0, 0, _PASS),
    )


def attach_filter(sock: socket.socket, program: Program) -> None:
    """Attach `program` to `sock`, replacing any filter there; call `has_filter` first.

    Raises OSError: EPERM after SO_LOCK_FILTER or by a seccomp profile, ENOPROTOOPT in a sandbox
    that has no filters.
    """
    _attach(sock, SO_ATTACH_FILTER, program)


def detach_filter(sock: socket.socket) -> None:
    """Detach the filter of `sock`. Raises OSError: ENOENT if there is none, EPERM if it is locked."""
    sock.setsockopt(socket.SOL_SOCKET, SO_DETACH_FILTER, 0)


def attach_steering(sock: socket.socket, engines: int) -> None:
    """Attach the program of `steering` to the SO_REUSEPORT group of `sock`.

    Raises OSError: EINVAL if a bound `sock` is in no group yet, EPERM by a seccomp profile.
    """
    _attach(sock, SO_ATTACH_REUSEPORT_CBPF, steering(engines))


def detach_steering(sock: socket.socket) -> None:
    """Detach the program from the group of `sock` (Linux 5.3).

    Raises OSError: ENOENT if there is none, EINVAL if there is no group.
    """
    sock.setsockopt(socket.SOL_SOCKET, SO_DETACH_REUSEPORT_BPF, 0)


def has_filter(sock: socket.socket) -> bool:
    """Return whether `sock` has a filter of any kind.

    `socket.getsockopt` must not be used: the length of the option counts instructions, and the kernel
    writes eight bytes for each of them beyond the buffer (``sk_get_filter()``). Length 0 only asks.
    """
    import ctypes

    length = ctypes.c_uint32(0)  # socklen_t
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.getsockopt(sock.fileno(), socket.SOL_SOCKET, SO_GET_FILTER, None, ctypes.byref(length)) == 0:
        return length.value > 0
    # EACCES: an eBPF filter, whose text cannot be read; anything else: no filters here
    return ctypes.get_errno() == errno.EACCES


def drops(sock: socket.socket) -> int | None:
    """Return the number of datagrams that the kernel dropped on `sock`; None if it does not say.

    It counts drops by a filter, a full queue and a bad checksum together.
    """
    info = _meminfo(sock)
    return info[8] if info else None  # SK_MEMINFO_DROPS


def queue(sock: socket.socket) -> tuple[int, int] | None:
    """Return (bytes in the receive queue of `sock`, its size in bytes); None if the kernel does not say."""
    info = _meminfo(sock)
    return (info[0], info[1]) if info else None  # SK_MEMINFO_RMEM_ALLOC, SK_MEMINFO_RCVBUF


def _meminfo(sock: socket.socket) -> tuple[int, ...] | None:
    """Return the values of SO_MEMINFO (Linux 4.12) in the order of include/uapi/linux/sock_diag.h."""
    try:
        return _MEMINFO.unpack(sock.getsockopt(socket.SOL_SOCKET, SO_MEMINFO, _MEMINFO.size))
    except (OSError, struct.error):
        return None


def _attach(sock: socket.socket, option: int, program: Program) -> None:
    code = array.array("B", b"".join(struct.pack("=HBBI", *instruction) for instruction in program))
    address, _ = code.buffer_info()
    fprog = struct.pack("@HP", len(program), address)  # struct sock_fprog
    sock.setsockopt(socket.SOL_SOCKET, option, fprog)
