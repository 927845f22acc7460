"""One end of natcompat's tunnel for bench_datapath.py, in a process of its own.

    python -m tests.bench.tunnel_end '{"number": 0, "path": "c", ...}'

Prints "ready"; then answers each line on stdin with a line of JSON, until stdin ends: "stats", or
"ike HOST COUNT", which sends that many messages and tells when all have left.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import socket
import subprocess
import sys
import threading
import time
from ipaddress import IPv4Address
from typing import Any, Final

from natcompat import set_nat_t_endpoint
from natcompat.esp import choice as datapaths
from natcompat.esp.carrier import native as native_carrier
from natcompat.esp.datapath.native import NativeDataPath
from natcompat.esp.device.tun import TunDevice
from natcompat.esp.userspace import UserspaceIPsec
from natcompat.ipsec import (
    Direction,
    Encr,
    Policy,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)

OUTER: Final = "192.0.2.1", "192.0.2.2"
INNER: Final = "10.9.0.1", "10.9.0.2"
CROWD: Final = IPv4Address("10.128.0.0")
"""Behind the second end are as many hosts from here on as there are SAs, if there is more than one pair."""

_SO_NO_CHECK: Final = 11  # include/uapi/asm-generic/socket.h


def install(ipsec: UserspaceIPsec, number: int, pair: int, pairs: int) -> None:
    """Install pair `pair` of SAs and its policies at end `number`."""
    far = INNER[1] if pairs == 1 else str(CROWD + pair)
    for direction in Direction:
        out = direction is Direction.OUT
        to_far = (number == 0) is out
        source, destination = (OUTER[number], OUTER[1 - number])[:: 1 if out else -1]
        inside = (INNER[0], far)[:: 1 if to_far else -1]
        ipsec.add_sa(
            SecurityAssociation(
                spi=(0x10000000 if to_far else 0x20000000) + pair,
                source=source,
                destination=destination,
                direction=direction,
                encryption=Encr.AES_GCM_16,
                encryption_key=(pair + ((1 if to_far else 2) << 60)).to_bytes(20),
                replay_window=1024,
                encapsulation=UDPEncapsulation(local_port=4500, remote_port=4500),
                reqid=pair + 1,
            )
        )
        ipsec.add_policy(
            Policy(
                direction=direction,
                selector=TrafficSelector(source=inside[0], destination=inside[1]),
                source=source,
                destination=destination,
                reqid=pair + 1,
            )
        )


def main() -> None:
    """Be one end."""
    options: dict[str, Any] = json.loads(sys.argv[1])
    number, path, pairs = options["number"], options["path"], options.get("pairs", 1)
    if options.get("provider"):
        by = functools.partial(NativeDataPath, provider=options["provider"])
        chosen = dataclasses.replace(datapaths.select("c"), make_path=by)
        datapaths.select = lambda requested=None: chosen
    if options.get("engines"):
        native_carrier.receiving_threads = lambda: int(options["engines"])
    tun = TunDevice("bench", mtu=1400, vnet_header=path == "c")
    tun.add_address(f"{INNER[number]}/24")
    subprocess.run(["ip", "link", "set", "bench", "txqueuelen", "1000"], check=True)
    if pairs > 1 and number == 0:
        tun.add_route(f"{CROWD}/9")
    elif pairs > 1:
        subprocess.run(["ip", "route", "add", "local", f"{CROWD}/9", "dev", "lo"], check=True)
    ipsec = UserspaceIPsec(tun, datapath=path)
    sock = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sock.bind((OUTER[number], 4500))
    endpoint = set_nat_t_endpoint(sock, backend="userspace", esp=ipsec)
    if options.get("no_checksum"):
        endpoint._switch.attachment().esp_socket.setsockopt(socket.SOL_SOCKET, _SO_NO_CHECK, 1)  # type: ignore[union-attr]
    for pair in range(pairs):
        install(ipsec, number, pair, pairs)
    messages: set[bytes] = set()

    def receive() -> None:
        while True:
            messages.add(sock.recv(2048))

    threading.Thread(target=receive, daemon=True).start()
    print("ready", flush=True)
    for line in sys.stdin:
        word, *arguments = line.split()
        if word == "ike":
            for index in range(int(arguments[1])):
                sock.sendto(index.to_bytes(4).ljust(200, b"i"), (arguments[0], 4500))
                time.sleep(0.001)
        stats = endpoint.stats()
        answer = {
            "ike": len(messages),
            "handed_back": stats.handed_back,
            "esp": stats.esp,
            "queue_drops": stats.esp_dropped_in_kernel,
            "drops": {reason.value: count for reason, count in ipsec.counters().items() if count},
            "cpu": sum(time.clock_gettime(clock) for clock in (time.CLOCK_PROCESS_CPUTIME_ID,)),
        }
        print(json.dumps(answer), flush=True)
    endpoint.close()
    ipsec.close()
    sock.close()


if __name__ == "__main__":
    main()
