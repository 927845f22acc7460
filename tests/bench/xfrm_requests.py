"""Adding and deleting many SAs: natcompat against `ip -batch`, encoder and kernel apart.

Run as root on a kernel with ESP, in a network namespace of its own, from the top of the project:

    unshare -n python -m tests.bench.xfrm_requests [COUNT]
    python -m tests.lab.guest python -m tests.bench.xfrm_requests [COUNT]     # without such a kernel
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable

from natcompat.ipsec import Direction, Encr, SecurityAssociation, UDPEncapsulation
from natcompat.kernel.xfrm.kernel import XfrmIPsec
from natcompat.kernel.xfrm.translate import encode_sa, encode_sa_id

ROUNDS = 3


def associations(count: int) -> list[SecurityAssociation]:
    """Return `count` SAs as a gateway has them: one shape, many peers."""
    return [
        SecurityAssociation(
            spi=0x10000 + number,
            source="192.0.2.1",
            destination=f"198.51.{number % 100}.{number % 250 + 1}",
            direction=Direction.OUT,
            encryption=Encr.AES_GCM_16,
            encryption_key=number.to_bytes(20, "big"),
            encapsulation=UDPEncapsulation(local_port=4500, remote_port=1024 + number % 60000),
            reqid=number + 1,
        )
        for number in range(count)
    ]


def batch(sas: list[SecurityAssociation]) -> tuple[str, str]:
    """Return what `ip -batch` is to read to add and to delete `sas`."""
    add = []
    delete = []
    for sa in sas:
        name = f"src {sa.source} dst {sa.destination} proto esp spi {sa.spi}"
        ports = sa.encapsulation
        assert ports
        key = bytes(sa.encryption_key).hex()
        add.append(
            f"xfrm state add {name} reqid {sa.reqid} mode tunnel aead rfc4106(gcm(aes)) 0x{key} 128 "
            f"encap espinudp {ports.local_port} {ports.remote_port} 0.0.0.0 flag af-unspec"
        )
        delete.append(f"xfrm state delete {name}")
    return "\n".join(add) + "\n", "\n".join(delete) + "\n"


def delete_all(ipsec: XfrmIPsec, sas: list[SecurityAssociation]) -> None:
    """Delete `sas` one by one."""
    for sa in sas:
        ipsec.delete_sa(sa.sa_id)


def seconds(work: Callable[[], object]) -> float:
    """Return how long `work` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(count: int, rounds: int = ROUNDS) -> dict[str, float]:
    """Return microseconds per SA, the best of some rounds each, and the two ratios to `ip -batch`."""
    sas = associations(count)
    best: dict[str, float] = {}

    def note(name: str, value: float) -> None:
        best[name] = min(value / count * 1e6, best.get(name, float("inf")))

    with XfrmIPsec() as ipsec, tempfile.TemporaryDirectory() as directory:
        ipsec.flush_sas()
        paths = []
        for name, text in zip(("add", "delete"), batch(sas), strict=True):
            paths.append(os.path.join(directory, name))
            with open(paths[-1], "w", encoding="ascii") as stream:
                stream.write(text)
        for _ in range(rounds):
            note("ip -batch add", seconds(lambda: subprocess.run(["ip", "-batch", paths[0]], check=True)))
            note("ip -batch delete", seconds(lambda: subprocess.run(["ip", "-batch", paths[1]], check=True)))
            assert not ipsec._dump_sas()
            note("encode", seconds(lambda: [encode_sa(sa, ipsec._kernel) for sa in sas]))
            note("encode name", seconds(lambda: [encode_sa_id(sa.sa_id) for sa in sas]))
            note("add", seconds(lambda: [ipsec.add_sa(sa) for sa in sas]))
            note("look", seconds(lambda: [ipsec.get_sa(sa.sa_id) for sa in sas]))
            assert len(ipsec._dump_sas()) == count
            if rounds > 1 and "list" not in best:
                note("list", seconds(ipsec.list_sas))
            note("delete", seconds(lambda: delete_all(ipsec, sas)))
    best["add / ip -batch"] = best["add"] / best["ip -batch add"]
    best["delete / ip -batch"] = best["delete"] / best["ip -batch delete"]
    return best


if __name__ == "__main__":
    asked = [int(argument) for argument in sys.argv[1:]] or [10_000]  # SAs, and rounds
    print(json.dumps({name: round(value, 2) for name, value in measure(*asked).items()}, indent=1))
