"""SAs, policies and events as JSON objects; the package says what their keys mean."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from natcompat.commands.tables import Row

if TYPE_CHECKING:
    from natcompat.ipsec import Event, InstalledSA, Mark, PolicyUsage, TrafficSelector


def describe_selector(selector: TrafficSelector) -> str:
    """Return a selector in one line."""
    names = {0: "any", 1: "icmp", 6: "tcp", 17: "udp", 58: "ipv6-icmp", 132: "sctp"}
    ends = []
    for network, port in (
        (selector.source, selector.source_port),
        (selector.destination, selector.destination_port),
    ):
        text = str(network.network_address) if network.prefixlen == network.max_prefixlen else str(network)
        ends.append(f"{text} port {port}" if port else text)
    protocol = "" if selector.protocol == 0 else f" {names.get(selector.protocol, selector.protocol)}"
    return " to ".join(ends) + protocol


def describe_sas(installed: Iterable[InstalledSA], *, show_keys: bool = False) -> list[Row]:
    """Return SAs as JSON objects, in the order of their addresses."""
    rows = [describe_sa(sa, show_keys=show_keys) for sa in installed]
    return sorted(rows, key=lambda row: (row["source"], row["destination"], row["spi"]))


def describe_sa(installed: InstalledSA, *, show_keys: bool = False) -> Row:
    """Return an SA as a JSON object; its keys (hexadecimal) only with `show_keys`."""
    sa, usage = installed.association, installed.usage
    row: Row = {
        "spi": f"0x{installed.sa_id.spi:08x}",
        "source": str(installed.sa_id.source),
        "destination": str(installed.sa_id.destination),
        "state": "larval" if installed.larval else "mature",
        "description": installed.description,
        "packets": usage.packets,
        "octets": usage.octets,
        "added": usage.added,
        "first_used": usage.first_used,
        "last_used": usage.last_used,
        "sequence": usage.sequence,
        "replay_drops": usage.replay_drops,
        "window_drops": usage.window_drops,
        "integrity_drops": usage.integrity_drops,
        "mark": _describe_mark(installed.sa_id.mark),
    }
    if sa is not None:
        udp = sa.encapsulation
        row |= {
            "direction": sa.direction.value,
            "mode": sa.mode.value,
            "encryption": sa.encryption.name,
            "encryption_bits": 8 * (len(sa.encryption_key) - sa.encryption.salt_length),
            "integrity": sa.integrity.name,
            "esn": sa.esn,
            "replay_window": sa.replay_window,
            "local_port": udp.local_port if udp else None,
            "remote_port": udp.remote_port if udp else None,
            "reqid": sa.reqid,
            "nat_keepalive": sa.nat_keepalive,
            "interface_id": sa.interface_id,
            "selectors": [describe_selector(selector) for selector in sa.selectors],
            "lifetime": {
                name: getattr(sa.lifetime, name)
                for name in sa.lifetime.__slots__
                if getattr(sa.lifetime, name) is not None
            },
        }
        if show_keys:
            row |= {
                "encryption_key": bytes(sa.encryption_key).hex(),
                "integrity_key": bytes(sa.integrity_key).hex(),
            }
    return row


def describe_policy(usage: PolicyUsage) -> Row:
    """Return a policy as a JSON object."""
    policy = usage.policy
    return {
        "direction": policy.direction.value,
        "selector": describe_selector(policy.selector),
        "action": policy.action.value,
        "mode": policy.mode.value,
        "source": None if policy.source is None else str(policy.source),
        "destination": None if policy.destination is None else str(policy.destination),
        "reqid": policy.reqid,
        "priority": policy.priority,
        "optional": policy.optional,
        "mark": _describe_mark(policy.mark),
        "interface_id": policy.interface_id,
        "added": usage.added,
        "last_used": usage.last_used,
    }


def describe_event(event: Event) -> Row:
    """Return an event as a JSON object; ``event`` says which."""
    from natcompat.ipsec import Acquire, Expire, MappingChange

    if isinstance(event, Acquire):
        return {
            "event": "acquire",
            "source": str(event.source),
            "destination": str(event.destination),
            "reqid": event.reqid,
            "selector": describe_selector(event.selector),
            "sequence": event.sequence,
        }
    if isinstance(event, Expire):
        return {
            "event": "hard expire" if event.hard else "soft expire",
            "spi": f"0x{event.sa_id.spi:08x}",
            "destination": str(event.sa_id.destination),
            "reqid": event.reqid,
        }
    if isinstance(event, MappingChange):
        return {
            "event": "mapping change",
            "spi": f"0x{event.sa_id.spi:08x}",
            "destination": str(event.sa_id.destination),
            "reqid": event.reqid,
            "old": f"{event.old_address} port {event.old_port}",
            "new": f"{event.new_address} port {event.new_port}",
        }
    return {"event": "events lost"}


def _describe_mark(mark: Mark | None) -> str | None:
    return None if mark is None else f"0x{mark.value:x}/0x{mark.mask:x}"
