"""How much of one peer's traffic arrives beside another's flood: 200,000 packets a second in 60,000 flows.

    python tests/bench/bench_fairness.py [--json] [--rounds N]      as root

Both peers have keys. The gateway is natcompat with a TUN device in a network namespace; the peers are
processes of this script that send ESP sealed before. The quiet peer sends 2,000 packets of one flow.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any, Final

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[2]))

from natcompat.esp.datapath.native import NativeDataPath
from natcompat.esp.engine import Dropped, EspEngine
from natcompat.ipsec import (
    Direction,
    Encr,
    Policy,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)
from tests.support.tunnels import End, elsewhere

ROOT: Final = Path(__file__).parents[2]
FLOOD: Final = 200_000
FLOWS: Final = 60_000
QUIET: Final = 2_000
QUIET_RATE: Final = 1_333
SECONDS: Final = 2.0
BAR: Final = 0.97
GATEWAY: Final = "127.0.0.1"
NOISY_PEER, QUIET_PEER = "127.0.0.3", "127.0.0.4"
UDP_SEGMENT: Final = 103
TARGET: Final = 7777


def udp(source: str, destination: str, source_port: int, destination_port: int, payload: bytes) -> bytes:
    """Return an inner packet, with no UDP checksum."""
    body = struct.pack("!HHHH", source_port, destination_port, 8 + len(payload), 0) + payload
    header = struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(body), 0, 0, 64, 17, 0)
    header += socket.inet_aton(source) + socket.inet_aton(destination)
    total = sum(struct.unpack("!10H", header))
    total = (total & 0xFFFF) + (total >> 16)
    total = (total & 0xFFFF) + (total >> 16)
    return header[:10] + struct.pack("!H", ~total & 0xFFFF) + header[12:] + body


def association(peer: str, spi: int, direction: Direction, ports: tuple[int, int]) -> SecurityAssociation:
    """Return the SA from `peer` to the gateway, as one end sees it; `ports`: the gateway's and the peer's."""
    local, remote = ports if direction is Direction.IN else ports[::-1]
    return SecurityAssociation(
        spi=spi,
        source=peer,
        destination=GATEWAY,
        direction=direction,
        encryption=Encr.AES_GCM_16,
        encryption_key=spi.to_bytes(4) * 5,
        reqid=spi,
        replay_window=4096,
        encapsulation=UDPEncapsulation(local_port=local, remote_port=remote),
    )


def policy(peer: str, network: str, spi: int, direction: Direction) -> Policy:
    """Return the policy for what comes from the network behind `peer`."""
    return Policy(
        direction=direction,
        selector=TrafficSelector(source=network, destination="10.9.0.1/32"),
        source=peer,
        destination=GATEWAY,
        reqid=spi,
    )


def send(peer: str, network: int, spi: int, gateway_port: int, rate: int, count: int, flows: int) -> None:
    """Be a peer: seal everything, say so, wait for a word, send at `rate`."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((peer, 0))
    sock.connect((GATEWAY, gateway_port))
    port = sock.getsockname()[1]
    engine = EspEngine(timer=False, datapath=NativeDataPath)
    engine.add_sa(association(peer, spi, Direction.OUT, (gateway_port, port)))
    engine.add_policy(policy(peer, f"10.{network}.0.0/16", spi, Direction.OUT))
    sealed: list[bytes] = []
    for begin in range(0, count, 1000):
        inner = [
            udp(
                f"10.{network}.{flow % flows >> 8 & 0xFF}.{flow % flows & 0xFF}",
                "10.9.0.1",
                1024 + flow % flows % 60_000,
                TARGET + (flows > 1),
                struct.pack("!I", flow).ljust(32, b"x"),
            )
            for flow in range(begin, min(begin + 1000, count))
        ]
        for result in engine.seal_burst(inner):
            assert not isinstance(result, Dropped)
            sealed.append(bytes(result[0]))
    burst = 40 if rate > 50_000 else 1
    if burst > 1:
        sock.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, len(sealed[0]))
    messages = [b"".join(sealed[at : at + burst]) for at in range(0, len(sealed), burst)]
    print(port, flush=True)
    sys.stdin.readline()
    begun, interval = time.perf_counter(), burst / rate
    for number, message in enumerate(messages):
        while (ahead := begun + number * interval - time.perf_counter()) > 0:
            time.sleep(ahead)
        try:
            sock.send(message)
        except OSError:
            continue
    print(round(len(sealed) / (time.perf_counter() - begun)), flush=True)


def set_up_host() -> None:
    """Prepare the gateway's inside."""
    for command in ("ip link set lo up", "sysctl -qw net.ipv4.conf.all.rp_filter=0"):
        subprocess.run(command.split(), check=True)


def measure(path: str, flood: bool) -> dict[str, Any]:
    """Return what share of the quiet peer's packets arrive."""
    end = End(0, path)
    peers: list[subprocess.Popen[str]] = []

    def start(peer: str, network: int, spi: int, rate: int, count: int, flows: int) -> subprocess.Popen[str]:
        command = [sys.executable, __file__, "--peer", peer, str(network), str(spi), str(end.port)]
        process = subprocess.Popen(
            [*command, str(rate), str(count), str(flows)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        assert process.stdout is not None
        port = int(process.stdout.readline())
        end.ipsec.add_sa(association(peer, spi, Direction.IN, (end.port, port)))
        end.ipsec.add_policy(policy(peer, f"10.{network}.0.0/16", spi, Direction.IN))
        peers.append(process)
        return process

    def target(port: int) -> socket.socket:
        """Return a socket for the quiet peer's packets, or one that nobody reads for the flood."""
        made = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 22 if port == TARGET else 4096)
        made.bind((end.inner[4], port))
        made.settimeout(1.0)
        return made

    sock = unread = socket.socket()
    try:
        elsewhere(end.namespace, set_up_host)
        sock, unread = elsewhere(end.namespace, lambda: (target(TARGET), target(TARGET + 1)))
        quiet = start(QUIET_PEER, 30, 0x2222, QUIET_RATE, QUIET, 1)
        noisy = start(NOISY_PEER, 20, 0x1111, FLOOD, int(FLOOD * SECONDS), FLOWS) if flood else None
        arrived: set[int] = set()
        done = threading.Event()

        def receive() -> None:
            while True:
                try:
                    arrived.add(struct.unpack("!I", sock.recv(100)[:4])[0])
                except TimeoutError:
                    if done.is_set():
                        return

        thread = threading.Thread(target=receive)
        thread.start()
        for process in filter(None, (noisy, quiet)):
            assert process.stdin is not None
            process.stdin.write("go\n")
            process.stdin.flush()
            time.sleep(0.3 if process is noisy else 0)
        rates = [int(process.stdout.readline()) for process in (quiet, noisy) if process and process.stdout]
        done.set()
        thread.join()
        return {
            "path": path,
            "flood": flood,
            "arrived": len(arrived) / QUIET,
            "rates": rates,
            "drops": {reason.value: count for reason, count in end.ipsec.counters().items()},
            "kernel drops": end.endpoint.stats().esp_dropped_in_kernel,
        }
    finally:
        for process in peers:
            process.stdin and process.stdin.close()
            process.wait(30)
        sock.close()
        unread.close()
        end.close()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peer", nargs=7, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peer:
        peer, *numbers = options.peer
        send(peer, *map(int, numbers))
        return
    results = [
        measure(path, flood)
        for _ in range(options.rounds)
        for path in ("c", "python")
        for flood in (True, False)
    ]
    if options.json:
        print(json.dumps(results, indent=1))
        return
    for path in ("c", "python"):
        shares = [result["arrived"] for result in results if result["path"] == path and result["flood"]]
        alone = [result["arrived"] for result in results if result["path"] == path and not result["flood"]]
        print(
            f"{path:7} beside the flood {statistics.median(shares):.3f} (bar {BAR}; {min(shares):.3f} at the "
            f"least), alone {statistics.median(alone):.3f}"
        )


if __name__ == "__main__":
    main()
