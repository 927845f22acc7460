"""The log of a running tunnel: INFO for changes, WARNING for faults of peer or path, DEBUG for causes."""

from __future__ import annotations

from collections.abc import Mapping

from natcompat.commands.ipsec.lines import CAUSES
from natcompat.commands.tunnel.file import Tunnel
from natcompat.errors import get_logger
from natcompat.ipsec import Event, IntegrityFailure, PeerSilent
from natcompat.ipsec.describe import describe_event

_log = get_logger()


def log_up(tunnel: Tunnel, device: str | None, mtu: int | None) -> None:
    """Log that the tunnel is up."""
    endpoint = tunnel.endpoint
    _log.info(
        "tunnel %s is up: %s port %d to %s port %d, backend %s, device %s, MTU %s",
        tunnel.path,
        endpoint.local_address,
        endpoint.local_port,
        endpoint.remote_address,
        endpoint.remote_port,
        endpoint.backend,
        device or "none",
        mtu or "-",
    )


def log_down(tunnel: Tunnel, status: int) -> None:
    """Log that the tunnel goes down."""
    _log.info("tunnel %s goes down with status %d", tunnel.path, status)


def log_event(event: Event) -> None:
    """Log an event; faults with their usual causes."""
    row = describe_event(event)
    name = row.pop("event")
    text = f"{name}: " + ", ".join(f"{key} {value}" for key, value in row.items() if value is not None)
    if isinstance(event, (IntegrityFailure, PeerSilent)):
        _log.warning("%s; %s", text, CAUSES[name])
    else:
        _log.info("%s", text)


class DropLog:
    """Logs drops as they grow."""

    def __init__(self) -> None:
        self._before: dict[str, int] = {}

    def log(self, drops: Mapping[str, int]) -> None:
        """Log, at DEBUG, how many more packets were dropped since the last call, by cause."""
        grown = {cause: count - self._before.get(cause, 0) for cause, count in drops.items()}
        words = ", ".join(f"{count} {cause}" for cause, count in grown.items() if count > 0)
        if words:
            _log.debug("dropped since the last round: %s", words)
        self._before = dict(drops)
