"""A daemon written for Solaris, which uses nothing but the socket option.

On Solaris: ``python solaris_daemon.py PORT``; elsewhere:
``python -m natcompat.commands.run solaris_daemon.py PORT``.
It answers every IKE message with an IKE header, and stops at exchange type 0.
"""

import socket
import struct
import sys

UDP_NAT_T_ENDPOINT = 0x0103  # netinet/udp.h
IKE_HEADER = struct.Struct("!8s8sBBBBII")  # RFC 7296, 3.1


def main() -> None:
    """Serve until told to stop."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", int(sys.argv[1])))
        sock.setsockopt(socket.IPPROTO_UDP, UDP_NAT_T_ENDPOINT, 1)
        print(f"listening on port {sock.getsockname()[1]}", flush=True)
        while True:
            message, peer = sock.recvfrom(65535)
            initiator, _, next_payload, version, exchange, flags, number, length = IKE_HEADER.unpack_from(
                message
            )
            if length != len(message):
                raise SystemExit("this is not IKE: the header's length is not the datagram's")
            if exchange == 0:
                return
            reply = IKE_HEADER.pack(
                initiator, b"RESPONSE", next_payload, version, exchange, flags | 0x20, number, IKE_HEADER.size
            )
            sock.sendto(reply, peer)


if __name__ == "__main__":
    main()
