"""Numbers of the socket options of Linux that Python does not name in every version."""

from __future__ import annotations

from typing import Final

# include/uapi/linux/in.h, level IPPROTO_IP
IP_PKTINFO: Final = 8
IP_RECVERR: Final = 11
IP_RECVTOS: Final = 13
IP_FREEBIND: Final = 15
IP_TRANSPARENT: Final = 19
# include/uapi/linux/in6.h, level IPPROTO_IPV6
IPV6_RECVERR: Final = 25
IPV6_RECVTCLASS: Final = 66
IPV6_TCLASS: Final = 67
IPV6_TRANSPARENT: Final = 75
IPV6_FREEBIND: Final = 78
# include/uapi/asm-generic/socket.h, level SOL_SOCKET
SO_BINDTODEVICE: Final = 25
SO_MARK: Final = 36
# include/uapi/linux/udp.h, level IPPROTO_UDP
UDP_ENCAP: Final = 100
UDP_NO_CHECK6_RX: Final = 102
UDP_GRO: Final = 104
