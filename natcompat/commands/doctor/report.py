"""Prints the report of `natcompat.commands.doctor.examine.examine` for people."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from natcompat.commands.report import Printer, Words, bad, doubtful, good, quiet
from natcompat.contract import IKE_PORT, NAT_T_PORT, Duty

_WHAT_FOR: Final = {
    "CAP_NET_ADMIN": "to install SAs and policies, and for TUN",
    "CAP_NET_BIND_SERVICE": "to bind port 500; 4500 needs no privilege",
    "CAP_NET_RAW": "to send keepalives of SAs where the kernel does not; nothing else needs it",
}


def show(report: dict[str, Any]) -> None:
    """Print `report` for people."""
    out = Printer()
    system, requested = report["system"], report["requested"]
    out.line(
        f"natcompat {report['natcompat']} on {system['kernel']} {system['machine']}, {system['python']}, "
        f"user {report['privileges']['user']}"
    )

    out.heading("Backends", "the performer of each duty: kernel, filter or steering in the kernel, process")
    out.table(
        ["name", "viable", "runts", "ESP", "strip", "insert", "why"],
        [
            [
                backend["name"],
                good("yes") if backend["viable"] else bad("no"),
                *[backend["duties"].get(str(duty.name).lower(), "-") for duty in Duty],
                backend["reason"],
            ]
            for backend in report["backends"]
        ],
    )
    for backend in report["backends"]:
        if backend["remedy"]:
            out.line(Words(f"  {backend['name']}: ", "bold"), backend["remedy"])
    if report["auto"] is None:
        out.line(bad("auto finds no backend that works here."))
    elif report["auto"] == report["auto_with_consumer"]:
        out.line("auto takes ", Words(report["auto"], "bold green"), " here.")
    else:
        out.line(
            "auto takes ",
            Words(report["auto"], "bold green"),
            " here, and where the program takes ESP itself (esp=) ",
            Words(report["auto_with_consumer"] or "none", "bold green"),
            ".",
        )
    if requested["error"]:
        out.line(bad(f"NATCOMPAT_BACKEND={requested['value']} cannot be had: "), requested["error"], ".")
    elif requested["value"]:
        out.line(f"NATCOMPAT_BACKEND={requested['value']} takes {requested['backend']} instead.")
    else:
        out.line(quiet("NATCOMPAT_BACKEND is not set."))

    out.heading(
        "ESP in the kernel", "by a request for an SA that the kernel has to refuse; none was installed"
    )
    out.table(["family", "algorithm", "SA", "why"], list(_esp_rows(report["esp"])))
    for remedy in dict.fromkeys(row["remedy"] for row in report["esp"] if row["remedy"]):
        out.line("  ", remedy)

    out.heading("IPsec policies and SAs")
    out.table(["", "", ""], list(_xfrm_rows(report["xfrm"])))
    if report["xfrm"]["remedy"]:
        out.line("  ", report["xfrm"]["remedy"])

    pfkey = report["pfkey"]
    out.heading("IPsec over PF_KEY", "on Linux only where NATCOMPAT_IPSEC=pfkey asks for it")
    usable = {True: good("yes"), False: doubtful("no"), None: doubtful("?")}[pfkey["usable"]]
    out.table(["", "", ""], [[pfkey["dialect"] or "none", usable, pfkey["reason"]]])
    if pfkey["remedy"]:
        out.line("  ", pfkey["remedy"])
    if pfkey["error"]:
        out.line(bad(f"  NATCOMPAT_IPSEC={pfkey['asked']} cannot be had: "), pfkey["error"])
    if pfkey["asked"] == "pfkey" or pfkey["dialect"] not in ("linux", None):
        for limit in pfkey["limits"]:
            out.line("  ", limit)

    out.heading("Privileges and devices")
    rows: list[list[str]] = []
    for name, has in (report["privileges"]["capabilities"] or {}).items():
        rows.append([name, good("yes") if has else doubtful("no"), _WHAT_FOR[name]])
    tun = report["tun"]
    usable = {True: good("yes"), False: doubtful("no"), None: doubtful("?")}[tun["usable"]]
    rows.append(["TUN", usable, " ".join(filter(None, (tun["reason"], tun["remedy"])))])
    if tun["stale_rules"]:
        stale = f"{tun['stale_rules']} of a tunnel that was killed: harmless, as they lead to empty tables"
        rows.append(["routing rules", doubtful("stale"), f"{stale}, and gone with the next tunnel."])
    out.table(["", "", ""], rows)

    esp = report["userspace_esp"]
    out.heading("ESP in this process", 'open_ipsec("userspace")')
    out.table(
        ["data path", "works", ""],
        [
            [datapath["name"], good("yes") if datapath["viable"] else doubtful("no"), datapath["reason"]]
            for datapath in esp["datapaths"]
        ],
    )
    asked = f" (NATCOMPAT_DATAPATH={esp['requested']})" if esp["requested"] else ""
    device = {"tun": "a TUN interface", "queue": "a queue of the program's"}[esp["device"]]
    if esp["datapath"] is None:
        subject = f"NATCOMPAT_DATAPATH={esp['requested']}" if esp["requested"] else "It"
        out.line(bad(f"  {subject} cannot be had: "), esp["error"])
    else:
        out.line(
            "  Packets go by ", Words(esp["datapath"], "bold green"), f"{asked}, inner ones by {device}."
        )

    guard, hand_back = report["guard"], report["hand_back"]
    usable = {True: good("yes"), False: doubtful("no"), None: doubtful("?")}[guard["usable"]]
    way = good(hand_back["way"]) if hand_back["way"] != "none" else doubtful("none")
    rows = [
        ["guard", usable, " ".join(filter(None, (guard["reason"], guard["remedy"])))],
        ["hand-back", way, hand_back["reason"]],
    ]
    for name, state in report["offloads"].items():
        rows.append([name, *([good("on"), ""] if state == "on" else [doubtful("off"), state])])
    out.table(["", "", ""], rows)

    out.heading("UDP ports of IKE", "in this network namespace")
    out.table(["", "", ""], list(_port_rows(report["ports"])))

    out.heading("System")
    seccomp = {"off": "off", "strict": "strict", "filter": "a filter is on: it may refuse socket options"}
    bpf = {"0": "allowed", "1": "forbidden", "2": "forbidden"}.get(
        system["unprivileged_bpf"] or "", "unknown"
    )
    out.table(
        ["", ""],
        [
            ["sandbox", ", ".join(system["sandbox"]) or "no sign of one"],
            ["seccomp", seccomp.get(system["seccomp"] or "", "unknown")],
            ["unprivileged eBPF", f"{bpf}; natcompat uses classic BPF, which needs no permission"],
            [
                "gevent",
                f"{system['gevent']}; its sockets are served" if system["gevent"] else "not installed",
            ],
            [
                "uvloop",
                f"{system['uvloop']}; use natcompat.endpoint.loops.asyncio on its loops"
                if system["uvloop"]
                else "not installed",
            ],
            *(["beyond Solaris", sentence] for sentence in report["beyond_solaris"]),
        ],
    )


def _esp_rows(esp: list[dict[str, str]]) -> Iterator[list[str]]:
    """Yield a row for each algorithm, or one row for a family whose algorithms share one reason."""
    words = {"available": good("yes"), "no privilege": doubtful("?"), "unknown": doubtful("?")}
    for family in dict.fromkeys(row["family"] for row in esp):
        rows = [row for row in esp if row["family"] == family]
        if len({row["reason"] for row in rows}) == 1:
            rows = [{**rows[0], "algorithm": "any"}]
        for row in rows:
            yield [family, row["algorithm"], words.get(row["support"], bad("no")), row["reason"]]


def _xfrm_rows(xfrm: dict[str, Any]) -> Iterator[list[str]]:
    for key, name, effect in (
        ("bypass", "exempt endpoints", "no IPsec policy stops IKE or ESP-in-UDP on a socket with the option"),
        ("keepalive", "keepalives", "the kernel sends those of SAs; otherwise natcompat does"),
        ("sa_direction", "SA direction", "the kernel refuses to use an SA the wrong way"),
    ):
        word = {True: good("yes"), False: doubtful("no"), None: doubtful("?")}[xfrm[key]]
        yield [name, word, xfrm["reason"] if key == "bypass" and xfrm["reason"] else effect]


def _port_rows(ports: list[dict[str, Any]]) -> Iterator[list[str]]:
    for port in (IKE_PORT, NAT_T_PORT):
        holders = [holder for holder in ports if holder["port"] == port]
        for holder in holders:
            owners = ", ".join(f"{owner['command']} (pid {owner['pid']})" for owner in holder["owners"])
            hidden = f"a process of user {holder['user']}, which this user may not see"
            address = f"[{holder['address']}]" if holder["family"] == "IPv6" else holder["address"]
            yield [str(port), doubtful("taken"), f"{address} by {owners or hidden}"]
        if not holders:
            yield [str(port), good("free"), "over IPv4 and IPv6"]
