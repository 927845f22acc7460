"""SAs, policies, selectors and events as JSON objects; `natcompat.commands.ipsec` documents their keys."""

from __future__ import annotations

from typing import Any, TypeAlias

from natcompat.ipsec.protocol import (
    Acquire,
    Event,
    Expire,
    InstalledSA,
    IntegrityFailure,
    MappingChange,
    Mark,
    PeerSilent,
    PolicyUsage,
    ProtectionRestored,
    SaId,
    TrafficSelector,
)
from natcompat.ipsec.selectors import ANY_PORT

Row: TypeAlias = dict[str, Any]
"""One JSON object: names to strings, numbers, booleans, None and lists."""


def describe_selector(selector: TrafficSelector) -> str:
    """Return a selector in one line."""
    names = {0: "any", 1: "icmp", 6: "tcp", 17: "udp", 58: "ipv6-icmp", 132: "sctp"}
    ends = []
    for network, addresses, ports in (
        (selector.source, selector.source_range, selector.source_ports),
        (selector.destination, selector.destination_range, selector.destination_ports),
    ):
        host = network.prefixlen == network.max_prefixlen
        text = str(addresses or (network.network_address if host else network))
        if ports != ANY_PORT:
            text += f" port {ports.first}" if ports.first == ports.last else f" ports {ports}"
        ends.append(text)
    protocol = "" if selector.protocol == 0 else f" {names.get(selector.protocol, selector.protocol)}"
    return " to ".join(ends) + protocol


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
        "last_received": usage.last_received,
        "last_sent": usage.last_sent,
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
    """Return an event as a JSON object; ``event`` names its kind."""
    match event:
        case Acquire():
            return {
                "event": "acquire",
                "source": str(event.source),
                "destination": str(event.destination),
                "reqid": event.reqid,
                "selector": describe_selector(event.selector),
                "sequence": event.sequence,
            }
        case Expire():
            return {
                "event": "hard expire" if event.hard else "soft expire",
                **_of_sa(event.sa_id, event.reqid),
            }
        case MappingChange():
            return {
                "event": "mapping change",
                **_of_sa(event.sa_id, event.reqid),
                "old": f"{event.old_address} port {event.old_port}",
                "new": f"{event.new_address} port {event.new_port}",
            }
        case IntegrityFailure():
            return {
                "event": "integrity failure",
                **_of_sa(event.sa_id, event.reqid),
                "from": None if event.address is None else f"{event.address} port {event.port}",
                "count": event.count,
            }
        case PeerSilent():
            return {
                "event": "peer silent",
                **_of_sa(event.sa_id, event.reqid),
                "seconds": round(event.seconds, 1),
            }
        case ProtectionRestored():
            return {"event": "protection restored", "description": event.description, "count": event.count}
    return {"event": "events lost"}


def _of_sa(sa_id: SaId, reqid: int) -> Row:
    return {"spi": f"0x{sa_id.spi:08x}", "destination": str(sa_id.destination), "reqid": reqid}


def _describe_mark(mark: Mark | None) -> str | None:
    return None if mark is None else f"0x{mark.value:x}/0x{mark.mask:x}"
