"""How fast ESP in user space is: both data paths, scapy, many SAs; and what an SA weighs.

    python tests/bench/bench_esp.py [--json] [--rounds N]

Contenders alternate within each round, and medians of the rounds are compared, so a machine whose
speed changes changes both; seconds are of CPU time. One thread, no sockets:
AES-128-GCM-16, tunnel mode, inner packets of 1400 bytes, which go in and come out as Python's bytes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path.insert(0, str(Path(__file__).parents[2]))

from natcompat.esp.engine.data_path import DataPathFactory
from natcompat.esp.engine.engine import EspEngine
from natcompat.esp.engine.portable import PortableDataPath
from natcompat.esp.engine.results import Dropped, Opened
from natcompat.ipsec import (
    Direction,
    Encr,
    Policy,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)
from tests.support.esp import native_providers

SIZE = 1400
BURST = 64
LOCAL, REMOTE = IPv4Address("192.0.2.1"), IPv4Address("192.0.2.2")
PORTS = UDPEncapsulation(local_port=4500, remote_port=4500)
SOURCE = (str(REMOTE), 4500)


def inner_packet(number: int, size: int = SIZE) -> bytes:
    """Return a UDP packet from a host behind this end to host `number` behind the other."""
    from natcompat.esp.engine.packet import checksum

    addresses = IPv4Address("10.0.0.1").packed + (0x0B000000 + number).to_bytes(4)
    start = bytes((0x45, 0)) + size.to_bytes(2) + bytes((0, 0, 0x40, 0, 64, 17))
    header = start + checksum(start + bytes(2) + addresses).to_bytes(2) + addresses
    return header + bytes.fromhex("04d2 162e") + (size - 20).to_bytes(2) + bytes(2) + bytes(size - 28)


def association(number: int, direction: Direction, *, sender: bool, reqid: int) -> SecurityAssociation:
    """Return an SA of pair `number`: of the end that seals (`sender`), or of the one that opens."""
    out = direction is Direction.OUT
    question = out is sender
    return SecurityAssociation(
        spi=(0x10000000 if question else 0x20000000) + number,
        source=LOCAL if out else REMOTE,
        destination=REMOTE if out else LOCAL,
        direction=direction,
        encryption=Encr.AES_GCM_16,
        encryption_key=(number if question else number + (1 << 40)).to_bytes(20),
        encapsulation=PORTS,
        reqid=reqid,
    )


def install(engine: EspEngine, number: int, direction: Direction, *, sender: bool) -> None:
    """Install such an SA, and the policy for what goes by it."""
    sa = association(number, direction, sender=sender, reqid=number + 1)
    ends = IPv4Address("10.0.0.1"), IPv4Address(0x0B000000 + number)
    source, destination = ends if (direction is Direction.OUT) is sender else ends[::-1]
    engine.add_sa(sa)
    engine.add_policy(
        Policy(
            direction=direction,
            selector=TrafficSelector(source=source, destination=destination),
            source=sa.source,
            destination=sa.destination,
            reqid=sa.reqid,
        )
    )


def paths() -> dict[str, DataPathFactory]:
    """Return the data paths that there are here, by name."""
    found: dict[str, DataPathFactory] = {"python": PortableDataPath}
    providers = native_providers()
    if providers:
        from natcompat.esp.datapath.native import NativeDataPath

        found |= {f"c, {provider}": partial(NativeDataPath, provider=provider) for provider in providers}
    return found


def pair(count: int, path: DataPathFactory) -> tuple[EspEngine, EspEngine]:
    """Return a sender and a receiver with `count` pairs of SAs each."""
    sender, receiver = EspEngine(datapath=path), EspEngine(datapath=path)
    for number in range(count):
        for direction in Direction:
            install(sender, number, direction, sender=True)
            install(receiver, number, direction, sender=False)
    return sender, receiver


def measure(work: Callable[[], int], seconds: float) -> float:
    """Return how many packets per second of CPU time `work` does, called for at least `seconds`."""
    packets, start = 0, time.process_time()
    while (elapsed := time.process_time() - start) < seconds:
        packets += work()
    return packets / elapsed


def natcompat_both(sender: EspEngine, receiver: EspEngine, flows: int) -> dict[str, Callable[[float], float]]:
    """Return the measurements of sealing and opening over `flows` flows."""
    inners = [inner_packet(number) for number in range(flows)]
    burst = [inners[number % flows] for number in range(BURST)]

    def seal() -> int:
        return len(sender.seal_burst(burst))

    def open_for(seconds: float) -> float:
        packets, elapsed = 0, 0.0
        while elapsed < seconds:
            sealed = [
                (memoryview(each[0]), SOURCE)
                for each in sender.seal_burst(burst)
                if not isinstance(each, Dropped)
            ]
            start = time.process_time()
            opened = receiver.open_burst(sealed)
            elapsed += time.process_time() - start
            assert all(isinstance(each, Opened) for each in opened), opened
            packets += len(opened)
        return packets / elapsed

    return {"seal": lambda seconds: measure(seal, seconds), "open": open_for}


def garbage(sender: EspEngine, receiver: EspEngine) -> dict[str, Callable[[float], float]]:
    """Return the measurements of refusing what whoever knows the port, or the SPI, too, can send."""
    sealed = [
        each[0] for each in sender.seal_burst([inner_packet(0)] * BURST) if not isinstance(each, Dropped)
    ]
    unknown = [(memoryview(b"\xff" + packet[1:]), SOURCE) for packet in sealed]
    # numbers that are not behind the window, so that nothing but the ICV tells
    forged = [(memoryview(packet[:4] + b"\xff\xff\xff\xff" + packet[8:]), SOURCE) for packet in sealed]
    return {
        "unknown": lambda seconds: measure(lambda: len(receiver.open_burst(unknown)), seconds),
        "forged": lambda seconds: measure(lambda: len(receiver.open_burst(forged)), seconds),
    }


def scapy_both() -> dict[str, Callable[[float], float]]:
    """Return the same of scapy's SecurityAssociation."""
    from scapy.layers.inet import IP, UDP
    from scapy.layers.ipsec import ESP
    from scapy.layers.ipsec import SecurityAssociation as ScapySA

    make: Any = ScapySA
    sa = make(
        ESP,
        spi=0x10000000,
        crypt_algo="AES-GCM",
        crypt_key=bytes(20),
        tunnel_header=IP(src=str(LOCAL), dst=str(REMOTE)),
        nat_t_header=UDP(sport=4500, dport=4500),
    )
    inner = IP(inner_packet(0))
    wire = bytes(sa.encrypt(inner))

    def seal() -> int:
        bytes(sa.encrypt(inner))
        return 1

    def open_() -> int:
        bytes(sa.decrypt(IP(wire)))
        return 1

    return {
        "seal": lambda seconds: measure(seal, seconds),
        "open": lambda seconds: measure(open_, seconds),
    }


def resident() -> int:
    """Return the bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def weigh(count: int, path: DataPathFactory, *, policies: bool) -> tuple[float, EspEngine]:
    """Return the bytes that a pair of SAs takes that has carried traffic, keys and ciphers included.

    With `policies`: also its two policies, each with a selector of its own. The engine is returned
    so that nobody takes its memory for free memory.
    """
    packet = inner_packet(0)
    wide = TrafficSelector(source="10.0.0.0/8", destination="0.0.0.0/0")
    engine = EspEngine(datapath=path)
    if not policies:
        engine.add_policy(
            Policy(direction=Direction.OUT, selector=wide, source=LOCAL, destination=REMOTE, reqid=1)
        )

    def add(number: int) -> None:
        for direction in Direction:
            if policies:
                install(engine, number, direction, sender=True)
            else:
                engine.add_sa(association(number, direction, sender=True, reqid=1))
        sealed = engine.seal(inner_packet(number) if policies else packet)
        assert not isinstance(sealed, Dropped)
        engine.open((0x20000000 + number).to_bytes(4) + b"\0\0\0\1" + bytes(60), SOURCE)

    add(count)  # imports and first allocations
    gc.collect()
    before = resident()
    for number in range(count):
        add(number)
    gc.collect()
    return (resident() - before) / count, engine


def run(rounds: int, many: int, seconds: float) -> dict[str, float]:
    """Measure, and return the figures by name."""
    found = paths()
    kept = []
    results = {}
    for name, path in found.items():
        for policies in (False, True):
            size, engine = weigh(10_000, path, policies=policies)
            kept.append(engine)
            results[f"{name}: bytes per SA pair{' and policies' * policies}"] = size
    contenders = {"scapy": scapy_both()}
    for name, path in found.items():
        few, crowd = pair(64, path), pair(many, path)
        contenders |= {
            name: {**natcompat_both(*few, 1), **garbage(*few)},
            f"{name}, 64 SAs": natcompat_both(*few, 64),
            f"{name}, {many} SAs": natcompat_both(*crowd, 64),
        }
    gc.collect()
    gc.freeze()
    samples: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, both in contenders.items():
            for what, function in both.items():
                samples.setdefault(f"{name} {what}", []).append(function(seconds))
    medians = {name: statistics.median(values) for name, values in samples.items()}
    results |= {f"{name} pps": value for name, value in medians.items()}
    both_ways = {
        name: 1 / sum(1 / medians[f"{name} {what}"] for what in ("seal", "open")) for name in contenders
    }
    for name in found:
        for what in ("seal", "open"):
            ratio = medians[f"{name}, {many} SAs {what}"] / medians[f"{name}, 64 SAs {what}"]
            results[f"{name}: {what}, {many} SAs / 64 SAs"] = ratio
        for what in ("unknown", "forged"):
            results[f"{name}: {what} / open"] = medians[f"{name} {what}"] / medians[f"{name} open"]
        results[f"{name}: seal and open / scapy"] = both_ways[name] / both_ways["scapy"]
        results[f"{name}: seal and open / python"] = both_ways[name] / both_ways["python"]
    return results


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--many", type=int, default=100_000, help="SAs of the large installation")
    parser.add_argument("--seconds", type=float, default=0.5, help="per contender and round")
    options = parser.parse_args()
    results = run(options.rounds, options.many, options.seconds)
    if options.json:
        print(json.dumps(results))
    else:
        for name, value in results.items():
            print(f"{name:44} {value:12,.2f}")


if __name__ == "__main__":
    main()
