"""Time to follow one move of a peer (a new NAT mapping) among few and many SAs, on both data paths.

python -m tests.bench.bench_moves [--many 20000] [--moves 3000]
"""

from __future__ import annotations

import argparse
import time

from natcompat.esp.engine.crypto import make_cipher
from natcompat.esp.engine.data_path import DataPathFactory
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.packet import IPV4, PADDINGS
from natcompat.ipsec import Direction
from tests.fuzz.targets import data_paths
from tests.support.esp import SPI, ip_packet, policy, sa, udp


def time_of_a_move(path: DataPathFactory, many: int, moves: int) -> float:
    """Return seconds of one packet that moves its SA, which has `many` others beside it."""
    inbound = sa(Direction.IN)
    cipher = make_cipher(inbound.encryption, inbound.encryption_key, inbound.integrity, inbound.integrity_key)
    packet = ip_packet("10.2.0.1", "10.1.0.1", udp())
    padding = -(len(packet) + 2) % 4
    text = packet + PADDINGS[padding] + bytes((padding, IPV4))
    packets = [
        cipher.seal(SPI.to_bytes(4) + number.to_bytes(4) + number.to_bytes(8), text, b"")
        for number in range(1, moves + 1)
    ]
    with EspEngine(timer=False, datapath=path, follow_mapping=True) as engine:
        engine.add_sa(inbound)
        engine.add_policy(policy(Direction.IN))
        engine.add_sa(sa(Direction.OUT, encryption_key=bytes(20)))
        for number in range(many):
            engine.add_sa(sa(Direction.OUT, spi=0x1000 + number, reqid=8, encryption_key=number.to_bytes(20)))
        start = time.process_time()
        for number, sealed in enumerate(packets):
            engine.open(sealed, ("192.0.2.2", 5000 + number % 2))
        return (time.process_time() - start) / moves


def main() -> int:
    """Run from the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.bench_moves", description=__doc__)
    parser.add_argument("--many", type=int, default=20_000, help="SAs of the large installation")
    parser.add_argument("--moves", type=int, default=3000)
    options = parser.parse_args()
    for path in data_paths():
        few, many = (time_of_a_move(path, size, options.moves) for size in (10, options.many))
        print(
            f"{path.__name__}: {few * 1e6:.0f} us among 10 SAs, {many * 1e6:.0f} us among {options.many},"
            f" ratio {many / few:.2f}"
        )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
