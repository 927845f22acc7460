"""The loop of most IKE daemons: select over port 500 and port 4500, then receive.

``python select_loop.py [PORT PORT]``; the defaults, 0, let the system choose.
"""

import select
import socket
import sys

from natcompat import NatTEndpoint, set_nat_t_endpoint


def listen(port: int) -> socket.socket:
    """Return a bound UDP socket."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind(("127.0.0.1", port))
    return sock


def esp(packet: memoryview, source: tuple[str, int]) -> None:
    """Handle an ESP packet, which begins with the SPI."""
    print(f"ESP of {len(packet)} bytes with SPI {bytes(packet[:4]).hex()} from {source}", flush=True)


def main() -> None:
    """Print all messages until one is empty."""
    ports = [int(argument) for argument in sys.argv[1:]] or [0, 0]
    plain, nat_t = map(listen, ports)
    endpoint: NatTEndpoint = set_nat_t_endpoint(nat_t, backend="userspace", esp=esp)
    print(f"ports {plain.getsockname()[1]} {nat_t.getsockname()[1]}, {endpoint.mode}", flush=True)
    with plain, nat_t:
        while True:
            ready, _, _ = select.select([plain, nat_t], [], [])
            for sock in ready:
                message, source = sock.recvfrom(65535)  # never hangs: select wakes for IKE alone
                print(f"IKE of {len(message)} bytes from {source}", flush=True)
                if not message:
                    print(endpoint.stats(), flush=True)
                    return


if __name__ == "__main__":
    main()
