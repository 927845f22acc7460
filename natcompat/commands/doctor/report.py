"""What `natcompat.commands.doctor.examine.examine` found, for people."""

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

    out.heading("Backends", "who would do each duty: the kernel, a filter or steering in it, this process")
    out.table(
        ["name", "viable", "runts", "ESP", "strip", "insert", "why"],
        [
            [
                each["name"],
                good("yes") if each["viable"] else bad("no"),
                *[each["duties"].get(str(duty.name).lower(), "-") for duty in Duty],
                each["reason"],
            ]
            for each in report["backends"]
        ],
    )
    for each in report["backends"]:
        if each["remedy"]:
            out.line(Words(f"  {each['name']}: ", "bold"), each["remedy"])
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
    for remedy in dict.fromkeys(each["remedy"] for each in report["esp"] if each["remedy"]):
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
            [each["name"], good("yes") if each["viable"] else doubtful("no"), each["reason"]]
            for each in esp["datapaths"]
        ],
    )
    asked = f" (NATCOMPAT_DATAPATH={esp['requested']})" if esp["requested"] else ""
    device = {"tun": "a TUN interface", "queue": "a queue of the program's"}[esp["device"]]
    if esp["datapath"] is None:
        wanted = f"NATCOMPAT_DATAPATH={esp['requested']}" if esp["requested"] else "It"
        out.line(bad(f"  {wanted} cannot be had: "), esp["error"])
    else:
        out.line(
            "  Packets go by ", Words(esp["datapath"], "bold green"), f"{asked}, inner ones by {device}."
        )

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
            *(["beyond Solaris", each] for each in report["beyond_solaris"]),
        ],
    )


def _esp_rows(esp: list[dict[str, str]]) -> Iterator[list[str]]:
    """Yield a row for each algorithm; one for all of a family where they have the reason in common."""
    words = {"available": good("yes"), "no privilege": doubtful("?"), "unknown": doubtful("?")}
    for family in dict.fromkeys(each["family"] for each in esp):
        found = [each for each in esp if each["family"] == family]
        if len({each["reason"] for each in found}) == 1:
            found = [{**found[0], "algorithm": "any"}]
        for each in found:
            yield [family, each["algorithm"], words.get(each["support"], bad("no")), each["reason"]]


def _xfrm_rows(xfrm: dict[str, Any]) -> Iterator[list[str]]:
    for key, name, what in (
        ("bypass", "exempt endpoints", "no IPsec policy stops IKE or ESP-in-UDP on a socket with the option"),
        ("keepalive", "keepalives", "the kernel sends those of SAs; otherwise natcompat does"),
        ("sa_direction", "SA direction", "the kernel refuses to use an SA the wrong way"),
    ):
        word = {True: good("yes"), False: doubtful("no"), None: doubtful("?")}[xfrm[key]]
        yield [name, word, xfrm["reason"] if key == "bypass" and xfrm["reason"] else what]


def _port_rows(ports: list[dict[str, Any]]) -> Iterator[list[str]]:
    for port in (IKE_PORT, NAT_T_PORT):
        held = [each for each in ports if each["port"] == port]
        for each in held:
            owners = ", ".join(f"{owner['command']} (pid {owner['pid']})" for owner in each["owners"])
            hidden = f"a process of user {each['user']}, which this user may not see"
            address = f"[{each['address']}]" if each["family"] == "IPv6" else each["address"]
            yield [str(port), doubtful("taken"), f"{address} by {owners or hidden}"]
        if not held:
            yield [str(port), good("free"), "over IPv4 and IPv6"]
