"""``natcompat tunnel status``: shows running tunnels, through their control sockets.

``--json`` prints an array with an object for each tunnel. Times are seconds since the epoch, null: never.

``pid``, ``file``, ``backend``, ``up_since``
    the process, the path of its file, and when the tunnel came up
``peer``
    ``address`` and ``port`` that packets are sent to now, ``configured`` ("ADDRESS port NUMBER", of the file)
    and ``learnt`` (whether it is another than the configured one)
``local``
    ``address`` and ``port`` of this end
``device``, ``mtu``
    of the TUN device, or null
``last_received``, ``last_sent``
    when the last authentic packet came, and when the last packet was sent; dummy packets included
``silent``
    whether nothing has come for as long as ``silence`` in the file says, although this end sent
``received``, ``sent``
    ``packets`` and ``bytes``
``drops``
    packets that went no further, by cause (natcompat/esp/engine/results.py); those of an SA (``replay``,
    ``window``, ``integrity``) with the backend linux
``keepalive``
    esp, nat or none
``replace_keys``
    the limit that the SAs reach first: ``spi``, ``limit`` (a name of natcompat.ipsec.Lifetime, or
    ``sequence_numbers``) and ``seconds`` until then, at the mean rate so far; null: none is in sight
``sas``
    an array of SAs as ``natcompat sad`` shows them
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Final, Protocol

from natcompat.commands.ipsec.engines import engines
from natcompat.commands.ipsec.lines import duration
from natcompat.commands.report import Printer, doubtful, good, print_json
from natcompat.commands.tunnel.file import Tunnel
from natcompat.commands.tunnel.keepalive import KeepAlive, last_received, last_sent
from natcompat.ipsec import Direction, InstalledSA, SecurityAssociation
from natcompat.ipsec.describe import Row, describe_sa

_LAST_NUMBER: Final = {False: (1 << 32) - 1, True: (1 << 64) - 1}
"""The last sequence number, by `esn`."""

_FORM: Final[Mapping[str, Any]] = {
    "file": str,
    "backend": str,
    "up_since": (int, float),
    "peer": dict,
    "local": dict,
    "received": dict,
    "sent": dict,
    "drops": dict,
    "sas": list,
}


class Running(Protocol):
    """A tunnel that is up, as far as its status needs it."""

    device: str | None
    mtu: int | None

    def installed(self) -> Sequence[InstalledSA]: ...  # noqa: D102

    def drops(self) -> Mapping[str, int]: ...  # noqa: D102


class Status:
    """The status of one running tunnel, for its control socket."""

    def __init__(self, tunnel: Tunnel, side: Running, keepalive: KeepAlive) -> None:
        self._tunnel, self._side, self._keepalive = tunnel, side, keepalive
        self._began = time.time()

    def __call__(self) -> Iterator[Row]:
        """Yield the object that ``natcompat tunnel status --json`` prints, without ``pid``."""
        endpoint, installed = self._tunnel.endpoint, self._side.installed()
        outbound = [sa for sa in installed if _direction(sa) is Direction.OUT]
        inbound = [sa for sa in installed if _direction(sa) is Direction.IN]
        configured = endpoint.remote_address, endpoint.remote_port
        peer = next((_peer_of(sa.association) for sa in outbound if sa.association is not None), configured)
        yield {
            "file": str(self._tunnel.path),
            "backend": endpoint.backend,
            "up_since": self._began,
            "peer": {
                "address": str(peer[0]),
                "port": peer[1],
                "configured": f"{endpoint.remote_address} port {endpoint.remote_port}",
                "learnt": peer != configured,
            },
            "local": {"address": str(endpoint.local_address), "port": endpoint.local_port},
            "device": self._side.device,
            "mtu": self._side.mtu,
            "last_received": max(filter(None, map(last_received, inbound)), default=None),
            "last_sent": max(filter(None, map(last_sent, outbound)), default=None),
            "silent": self._keepalive.silent,
            "received": _total(inbound),
            "sent": _total(outbound),
            "drops": dict(self._side.drops()) or _drops_of(installed),
            "keepalive": endpoint.keepalive,
            "replace_keys": first_limit(installed, self._began),
            "sas": [describe_sa(sa) for sa in installed],
        }


def first_limit(installed: Sequence[InstalledSA], began: float) -> Row | None:
    """Return the limit that one of the SAs reaches first at its mean rate since `began`."""
    now = time.time()
    passed = max(now - began, 1.0)
    limits: list[tuple[float, str, int]] = []
    for sa in installed:
        if sa.association is None:
            continue
        usage, lifetime = sa.usage, sa.association.lifetime
        last = _LAST_NUMBER[sa.association.esn]
        used = {"seconds": now - usage.added, "bytes": usage.octets, "packets": usage.packets}
        rates = {"seconds": 1.0, "bytes": usage.octets / passed, "packets": usage.packets / passed}
        for unit, rate in rates.items():
            for kind in ("soft", "hard"):
                limit = getattr(lifetime, f"{kind}_{unit}")
                if limit is not None and rate and limit > used[unit]:
                    limits.append(((limit - used[unit]) / rate, f"{kind}_{unit}", sa.sa_id.spi))
        if rates["packets"] and usage.sequence is not None:
            limits.append(((last - usage.sequence) / rates["packets"], "sequence_numbers", sa.sa_id.spi))
    if not limits:
        return None
    seconds, name, spi = min(limits)
    return {"spi": f"0x{spi:08x}", "limit": name, "seconds": round(seconds)}


def _direction(sa: InstalledSA) -> Direction | None:
    return None if sa.association is None else sa.association.direction


def _peer_of(sa: SecurityAssociation) -> tuple[Any, int]:
    return sa.destination, sa.encapsulation.remote_port if sa.encapsulation is not None else 0


def _total(installed: Sequence[InstalledSA]) -> Row:
    return {
        "packets": sum(sa.usage.packets for sa in installed),
        "bytes": sum(sa.usage.octets for sa in installed),
    }


def _drops_of(installed: Sequence[InstalledSA]) -> Row:
    names = ("replay", "window", "integrity")
    counted = {name: sum(getattr(sa.usage, f"{name}_drops") or 0 for sa in installed) for name in names}
    return {name: count for name, count in counted.items() if count}


# --- the command -----------------------------------------------------------------------------------


def running_tunnels() -> list[Row]:
    """Return the status of every tunnel of this user, for root of every user, in any network namespace."""
    rows = []
    for engine in engines("tunnel", everywhere=True):
        with engine, contextlib.suppress(OSError, ValueError):
            rows += [
                {"pid": engine.pid, **row}
                for row in engine.ask("tunnel")
                if all(isinstance(row.get(name), kind) for name, kind in _FORM.items())
            ]
    return rows


def show_status(*, as_json: bool) -> int:
    """Print the status of running tunnels; return the exit status: 0, or 1 if there is none."""
    rows = running_tunnels()
    if as_json:
        print_json(rows)
        return 0 if rows else 1
    out = Printer()
    if not rows:
        out.line("No tunnel runs that this user may ask about.")
    for row in rows:
        _show(out, row)
    return 0 if rows else 1


def _show(out: Printer, row: Row) -> None:
    peer, local = row["peer"], row["local"]
    out.heading(str(row["file"]), f"pid {row['pid']}, backend {row['backend']}, up {_ago(row['up_since'])}")
    due = row.get("replace_keys") or {}
    mapping = f", learnt (the file says {peer.get('configured')})" if peer.get("learnt") else ""
    silent = doubtful("silent") if row.get("silent") else good("heard") if row.get("last_received") else ""
    drops = ", ".join(f"{count} {cause}" for cause, count in row["drops"].items())
    limit = "no limit in sight"
    if due:
        limit = f"{_in(due.get('seconds'))}: {due.get('limit')} of {due.get('spi')}"
    out.table(
        ["", "", ""],
        [
            ["peer", f"{peer.get('address')} port {peer.get('port')}{mapping}", ""],
            ["local", f"{local.get('address')} port {local.get('port')}", ""],
            ["device", f"{row['device']}, MTU {row['mtu']}" if row.get("device") else "none", ""],
            ["last received", _since(row.get("last_received")), silent],
            ["last sent", _since(row.get("last_sent")), f"keepalive {row.get('keepalive')}"],
            ["received", _amount(row["received"]), ""],
            ["sent", _amount(row["sent"]), ""],
            ["dropped", drops or "none", ""],
            ["replace keys", limit, ""],
        ],
    )


def _amount(counted: Row) -> str:
    return f"{counted.get('packets')} packets, {counted.get('bytes')} bytes"


def _ago(moment: Any) -> str:
    return f"since {duration(moment)}" if isinstance(moment, (int, float)) else ""


def _since(moment: Any) -> str:
    return f"{duration(moment)} ago" if isinstance(moment, (int, float)) else "never"


def _in(seconds: Any) -> str:
    return f"in {duration(time.time() - seconds)}" if isinstance(seconds, (int, float)) else ""
