"""Describes a tunnel's file for people and for programs, without its keys."""

from __future__ import annotations

from natcompat.commands.report import Printer, doubtful
from natcompat.commands.tunnel.file import Tunnel
from natcompat.ipsec import InstalledSA, Policy, PolicyUsage, SecurityAssociation, Usage
from natcompat.ipsec.describe import Row, describe_policy, describe_sa

_UNUSED = Usage(
    packets=0,
    octets=0,
    added=0.0,
    first_used=None,
    last_used=None,
    replay_drops=0,
    window_drops=0,
    integrity_drops=0,
    sequence=0,
)
_NOT_YET = frozenset(_UNUSED.__slots__) | {"state", "description", "mark", "interface_id"}
_KEEPALIVES = {
    "esp": "authentic dummy packets, which a peer can follow to a new mapping",
    "nat": "NAT-keepalives, of SAs with nat_keepalive",
    "none": "none",
}
_LOCKDOWN = (
    "what the policies cover stays blocked if the process dies, until the next start or doctor --clean"
)


def describe(tunnel: Tunnel) -> Row:
    """Return the tunnel as a JSON object: SAs and policies as ``natcompat sad`` and ``spd`` say them."""
    endpoint, device = tunnel.endpoint, tunnel.device
    return {
        "file": str(tunnel.path),
        "backend": endpoint.backend,
        "state_file": None if tunnel.state is None else str(tunnel.state),
        "endpoint": {
            "local_address": str(endpoint.local_address),
            "local_port": endpoint.local_port,
            "remote_address": str(endpoint.remote_address),
            "remote_port": endpoint.remote_port,
            "follow_mapping": endpoint.follow_mapping,
            "keepalive": endpoint.keepalive,
            "silence": endpoint.silence,
        },
        "device": None
        if device is None
        else {
            "name": device.name,
            "addresses": [str(address) for address in device.addresses],
            "routes": [str(network) for network in device.routes],
            "mtu": device.mtu,
            "lockdown": device.lockdown,
        },
        "sas": [_sa(sa) for sa in tunnel.associations],
        "policies": [_policy(policy) for policy in tunnel.policies],
        "notes": list(tunnel.notes),
    }


def _sa(sa: SecurityAssociation) -> Row:
    row = describe_sa(InstalledSA(sa_id=sa.sa_id, association=sa, usage=_UNUSED))
    return {name: value for name, value in row.items() if name not in _NOT_YET}


def _policy(policy: Policy) -> Row:
    row = describe_policy(PolicyUsage(policy=policy, added=0.0, last_used=None))
    return {name: value for name, value in row.items() if name not in _NOT_YET}


def show(tunnel: Tunnel) -> None:
    """Print the tunnel that the file describes."""
    report = describe(tunnel)
    endpoint, device = report["endpoint"], report["device"]
    out = Printer()
    out.heading(f"{report['file']}: right", "This is what it asks for. Nothing has been done.")
    rows = [
        ["backend", report["backend"]],
        ["endpoint", f"{endpoint['local_address']} port {endpoint['local_port']}"],
        ["peer", f"{endpoint['remote_address']} port {endpoint['remote_port']}"],
        ["its mapping", "is followed when it changes" if endpoint["follow_mapping"] else "is not followed"],
        ["keepalive", _KEEPALIVES[endpoint["keepalive"]]],
        [
            "silence",
            f"is reported after {endpoint['silence']} s" if endpoint["silence"] else "is not reported",
        ],
        ["state file", report["state_file"] or "none"],
        ["device", "none" if device is None else device["name"]],
    ]
    if device is not None:
        rows += [
            ["  addresses", ", ".join(device["addresses"]) or "none"],
            ["  routes", ", ".join(device["routes"]) or "none"],
            ["  lockdown", _LOCKDOWN if device["lockdown"] else "no"],
            ["  MTU", str(device["mtu"] or "what the SAs leave of the outer path's")],
        ]
    out.table(["", ""], rows)
    out.heading("SAs")
    out.table(
        ["SPI", "way", "source", "destination", "UDP", "mode", "transform", "window", "reqid"],
        [
            [
                sa["spi"],
                sa["direction"],
                sa["source"],
                sa["destination"],
                f"{sa['local_port']}-{sa['remote_port']}",
                sa["mode"],
                _transform(sa),
                str(sa["replay_window"]) if sa["direction"] == "in" else "",
                str(sa["reqid"]),
            ]
            for sa in report["sas"]
        ],
    )
    out.heading("Policies")
    out.table(
        ["way", "selector", "action", "mode", "tunnel", "reqid"],
        [
            [
                policy["direction"],
                policy["selector"],
                policy["action"] + (" if possible" if policy["optional"] else ""),
                policy["mode"] if policy["action"] == "protect" else "",
                f"{policy['source']} to {policy['destination']}" if policy["source"] else "",
                str(policy["reqid"]),
            ]
            for policy in report["policies"]
        ],
    )
    for note in tunnel.notes:
        out.line("")
        out.line(doubtful("Note: "), note)


def _transform(row: Row) -> str:
    words = [row["encryption"], str(row["encryption_bits"] or "")]
    words += [row["integrity"]] if row["integrity"] != "NONE" else []
    words += ["ESN"] if row["esn"] else []
    return " ".join(word for word in words if word)
