"""What works on this machine, why, and what would help: ``natcompat doctor``.

`examine` returns the report that ``--json`` prints. ``"schema": 1`` stands for these keys; later
versions of natcompat may add some, and raise the number if one changes its meaning:

``natcompat``
    version of natcompat
``auto``, ``auto_with_consumer``
    the backend that is chosen when nobody asks for one, without and with a consumer of ESP in the
    process (``esp=``); null if none is viable
``requested``
    what NATCOMPAT_BACKEND asks for: ``value`` (null: not set), the ``backend`` that it leads to, or
    the ``error``
``backends``
    a list in the order of preference: ``name``, ``viable``, ``automatic`` (whether auto may choose it),
    ``duties`` (drop_runts, divert_esp, strip_marker, insert_marker: kernel, filter, steering or
    process), ``reason``, ``remedy``
``esp``
    whether this process could install an SA in the kernel: a list with ``family``, ``algorithm``,
    ``support`` (see `natcompat.kernel.xfrm.probe.EspSupport`), ``reason``, ``remedy``
``xfrm``
    what else the kernel's IPsec does for this process, each true, false, or null where it did not
    say: ``bypass`` (endpoints are exempt from IPsec policies), ``keepalive`` (the kernel sends
    NAT-keepalives), ``sa_direction`` (SAs have a direction); ``reason`` and ``remedy`` of what is missing
``pfkey``
    IPsec over PF_KEY, which Linux takes only where NATCOMPAT_IPSEC=pfkey asks for it: ``asked`` (the
    value of NATCOMPAT_IPSEC, or null), ``error`` (why that cannot be had, or null), ``dialect`` (null:
    none is spoken here), ``usable`` (null: not tried), ``reason``, ``remedy``, ``limits`` (a list of
    sentences: what it cannot do)
``privileges``
    ``user`` (effective user id), ``capabilities`` (name to true or false; null where there are none)
``tun``
    ``usable`` (null: cannot be told), ``reason``, ``remedy``, ``stale_rules`` (how many routing rules of
    killed processes there are, which lead to empty tables; null: cannot be told)
``userspace_esp``
    ESP in this process: ``datapath`` (what carries its packets; null: none of those that were asked for
    works, and ``error`` says why), ``requested`` (what NATCOMPAT_DATAPATH asks for, or null), ``datapaths``
    (a list in the order of preference: ``name``, ``viable``, ``reason``), ``device`` (``tun`` or ``queue``:
    where inner packets go unless the program says)
``ports``
    who holds UDP 500 and 4500: ``port``, ``family``, ``address``, ``user``, ``owners`` (a list of
    ``pid`` and ``command``; empty when this process may not see them)
``system``
    ``kernel``, ``machine``, ``python``, ``sandbox`` (a list of what hints at one), ``seccomp``,
    ``unprivileged_bpf``, ``gevent``, ``uvloop`` (versions, or null)
``beyond_solaris``
    what natcompat does and Solaris does not

It changes nothing on the system: what is tried is tried on sockets and in a network namespace of
its own.
"""

from __future__ import annotations

import contextlib
import os
import platform
import socket
import struct
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import click

from natcompat.contract import IKE_PORT, NAT_T_PORT, Duty

SCHEMA: Final = 1

_CAPABILITIES: Final = {
    "CAP_NET_BIND_SERVICE": 10,
    "CAP_NET_ADMIN": 12,
    "CAP_NET_RAW": 13,
}  # linux/capability.h
_ALGORITHMS: Final = (
    ("AES-GCM-16", "rfc4106(gcm(aes))", ""),
    ("ChaCha20-Poly1305", "rfc7539esp(chacha20,poly1305)", ""),
    ("AES-CBC with HMAC-SHA2-256", "cbc(aes)", "hmac(sha256)"),
    ("AES-CBC with HMAC-SHA1", "cbc(aes)", "hmac(sha1)"),
)

_TUN: Final = Path("/dev/net/tun")
_TUNSETIFF: Final = 0x400454CA  # linux/if_tun.h
_IFF_TUN_NO_PI: Final = 0x1001

_GVISOR: Final = "#1 SMP Sun Jan 10 15:06:54 PST 2016"
"""What every gVisor gives for the version of its kernel (pkg/sentry/kernel)."""


def examine() -> dict[str, Any]:
    """Look at everything, and return the report; see the module for its keys. Takes well under a second."""
    from natcompat import __version__, backends

    return {
        "schema": SCHEMA,
        "natcompat": __version__,
        "auto": _choice(backends.AUTO),
        "auto_with_consumer": _choice(backends.AUTO, hands_over_esp=True),
        "requested": _requested(),
        "backends": [
            {
                "name": found.backend,
                "viable": found.viable,
                "automatic": found.automatic,
                "duties": {
                    str(duty.name).lower(): found.duties[duty].value for duty in Duty if duty in found.duties
                },
                "reason": _sentence(found.reason),
                "remedy": _sentence(found.remedy),
            }
            for found in backends.probe()
        ],
        "esp": _kernel_esp(),
        "xfrm": _xfrm(),
        "pfkey": _pfkey(),
        "privileges": {
            "user": os.geteuid() if hasattr(os, "geteuid") else None,
            "capabilities": _capabilities(),
        },
        "tun": (tun := _tun() | {"stale_rules": _stale_rules()}),
        "userspace_esp": _userspace_esp(tun),
        "ports": [*_owners(IKE_PORT), *_owners(NAT_T_PORT)],
        "system": _system(),
        "beyond_solaris": [
            "AF_INET6 sockets are served by the backend userspace, if it is asked for; the kernel answers "
            "EAFNOSUPPORT."
            if backends.is_for_this_system("solaris")
            else "AF_INET6 sockets are served; Solaris answers EAFNOSUPPORT."
        ],
    }


def _choice(name: str, *, hands_over_esp: bool = False) -> str | None:
    from natcompat import backends
    from natcompat.errors import BackendUnavailableError

    try:
        return backends.select(name, hands_over_esp=hands_over_esp).name
    except BackendUnavailableError:
        return None


def _requested() -> dict[str, str | None]:
    from natcompat import backends
    from natcompat.errors import BackendUnavailableError

    asked = os.environ.get(backends.ENVIRONMENT_VARIABLE) or None
    try:
        return {"value": asked, "backend": backends.select().name if asked else None, "error": None}
    except BackendUnavailableError as error:
        text = f"{error.strerror}. {error.remedy}" if error.remedy else error.strerror
        return {"value": asked, "backend": None, "error": text}


def _sentence(text: str) -> str:
    text = text.strip()
    return f"{text[0].upper()}{text[1:].rstrip('.')}." if text else ""


def _kernel_esp() -> list[dict[str, str]]:
    from natcompat.kernel.xfrm.probe import EspSupport, probe_esp, probe_esp_unprivileged

    rows = []
    for family, version in ((socket.AF_INET, "IPv4"), (socket.AF_INET6, "IPv6")):
        for algorithm, encryption, integrity in _ALGORITHMS:
            found = probe_esp(encryption, integrity, family=family)
            if found.support is EspSupport.NO_PRIVILEGE:
                # whoever has the privilege may get further: say what can be seen from here
                seen = probe_esp_unprivileged(family)
                if seen.support is not EspSupport.AVAILABLE:
                    found = seen
            rows.append(
                {
                    "family": version,
                    "algorithm": algorithm,
                    "support": found.support.value,
                    "reason": found.reason,
                    "remedy": found.remedy,
                }
            )
    return rows


def _xfrm() -> dict[str, Any]:
    """Exempt a socket from IPsec policies and close it; ask XFRM for what it knows."""
    from natcompat.errors import NatCompatError
    from natcompat.kernel.xfrm.bypass import bypass
    from natcompat.kernel.xfrm.probe import probe_attributes

    known = probe_attributes()
    found: dict[str, Any] = {"bypass": None, "keepalive": known.keepalive, "sa_direction": known.sa_direction}
    if sys.platform != "linux":
        return {**found, "reason": "XFRM is the IPsec of Linux; this is not Linux.", "remedy": ""}
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            bypass(sock)
    except NatCompatError as error:
        reason, remedy = _sentence(error.strerror or ""), _sentence(error.remedy)
        return {**found, "bypass": False, "reason": reason, "remedy": remedy}
    return {**found, "bypass": True, "reason": "", "remedy": ""}


def _pfkey() -> dict[str, Any]:
    from natcompat.errors import NatCompatError
    from natcompat.kernel.pfkey.examine import examine as examine_pfkey

    found = {"asked": None, "error": None, **examine_pfkey()}
    if sys.platform == "linux":  # the variable means nothing elsewhere
        from natcompat.backends.linux import MAPPING_VARIABLE, asked_mapping

        found["asked"] = os.environ.get(MAPPING_VARIABLE) or None
        try:
            asked_mapping()
        except NatCompatError as error:
            found["error"] = f"{_sentence(error.strerror or '')} {_sentence(error.remedy)}"
    return found


def _userspace_esp(tun: dict[str, Any]) -> dict[str, Any]:
    from natcompat.errors import NatCompatError
    from natcompat.esp import choice as datapaths

    found: dict[str, Any] = {
        "requested": os.environ.get(datapaths.ENVIRONMENT_VARIABLE) or None,
        "datapath": None,
        "error": None,
        "datapaths": [
            {"name": each.name, "viable": each.viable, "reason": _sentence(each.reason)}
            for each in datapaths.probe()
        ],
        "device": "tun" if tun["usable"] else "queue",
    }
    try:
        found["datapath"] = datapaths.select().name
    except NatCompatError as error:
        found["error"] = f"{_sentence(error.strerror or '')} {_sentence(error.remedy)}"
    return found


def _status() -> dict[str, str]:
    """Return /proc/self/status; nothing where there is none."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {}


def _capabilities() -> dict[str, bool] | None:
    try:
        effective = int(_status()["CapEff"], 16)
    except (KeyError, ValueError):
        return None
    return {name: bool(effective >> bit & 1) for name, bit in _CAPABILITIES.items()}


def _tun() -> dict[str, Any]:
    """Make a TUN device where nobody sees it, if this process may; it is gone when this returns."""

    def answer(usable: bool | None, reason: str, remedy: str = "") -> dict[str, Any]:
        return {"usable": usable, "reason": reason, "remedy": remedy}

    if sys.platform != "linux":
        return answer(None, "Only looked for on Linux.")
    if not _TUN.exists():
        return answer(
            False,
            f"There is no {_TUN}.",
            "Load the module tun (modprobe tun), or give the container the device (docker run --device "
            "/dev/net/tun).",
        )
    try:
        os.close(os.open(_TUN, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return answer(
            False, f"{_TUN} cannot be opened: {error.strerror}.", f"Allow this user to open {_TUN}."
        )
    if not (_capabilities() or {}).get("CAP_NET_ADMIN"):
        return answer(
            None,
            f"{_TUN} can be opened; making a device takes CAP_NET_ADMIN, so it was not tried.",
            "Run as root, or grant CAP_NET_ADMIN.",
        )
    refusal = _try_tun()
    if refusal:
        return answer(False, f"A device could not be made: {refusal}.", "Allow TUNSETIFF to this process.")
    return answer(True, "A device was made and taken away again.")


def _stale_rules() -> int | None:
    """Count the rules that lead to devices that are gone."""
    if sys.platform != "linux":
        return None
    from natcompat.esp.device.routes import stale_rules

    with contextlib.suppress(OSError):  # where the sandbox has no rtnetlink
        return len(stale_rules())
    return None


def _try_tun() -> str:
    """Return why no TUN device can be made; nothing if it can."""
    refusals: list[str] = []

    def attempt() -> None:
        import ctypes
        import fcntl

        # this thread alone moves, and the namespace ends with it; without CAP_SYS_ADMIN it stays
        ctypes.CDLL(None).unshare(0x40000000)  # CLONE_NEWNET, linux/sched.h
        try:
            descriptor = os.open(_TUN, os.O_RDWR | os.O_CLOEXEC)
            try:
                fcntl.ioctl(descriptor, _TUNSETIFF, struct.pack("16sH22x", b"natcompat%d", _IFF_TUN_NO_PI))
            finally:
                os.close(descriptor)
        except OSError as error:
            refusals.append(error.strerror or str(error))

    thread = threading.Thread(target=attempt, name="natcompat TUN probe")
    thread.start()
    thread.join()
    return "".join(refusals)


def _owners(port: int) -> Iterator[dict[str, Any]]:
    """Yield who is bound to UDP `port` in this network namespace."""
    for name, version in (("udp", "IPv4"), ("udp6", "IPv6")):
        try:
            lines = Path(f"/proc/net/{name}").read_text().splitlines()[1:]
        except OSError:
            continue
        for fields in map(str.split, lines):
            address, _, number = fields[1].partition(":")
            if int(number, 16) == port:
                yield {
                    "port": port,
                    "family": version,
                    "address": _address(address),
                    "user": int(fields[7]),
                    "owners": _holders(fields[9]),
                }


def _address(digits: str) -> str:
    """Return the address of a line of /proc/net/udp: words in the machine's byte order."""
    words = [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]
    packed = b"".join(struct.pack("=I", word) for word in words)
    return socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, packed)


def _holders(inode: str) -> list[dict[str, Any]]:
    """Return the processes that have the socket with `inode` open, as far as this user may see them."""
    wanted, found = f"socket:[{inode}]", []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(_target(link) == wanted for link in (process / "fd").iterdir()):
                command = (process / "comm").read_text().strip()
                found.append({"pid": int(process.name), "command": command})
    return sorted(found, key=lambda each: int(each["pid"]))


def _target(link: Path) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(link)
    return ""


def _system() -> dict[str, Any]:
    status = _status()
    return {
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "sandbox": list(_sandbox()),
        "seccomp": {"0": "off", "1": "strict", "2": "filter"}.get(status.get("Seccomp", "")),
        "unprivileged_bpf": _read_first("/proc/sys/kernel/unprivileged_bpf_disabled"),
        "gevent": _version("gevent"),
        "uvloop": _version("uvloop"),
    }


def _sandbox() -> Iterator[str]:
    """Yield what hints at something between this process and a kernel of its own."""
    if _GVISOR in platform.version():
        yield "gVisor (a kernel in user space, without socket filters)"
    if "microsoft" in platform.release().lower():
        yield "WSL"
    if "User Mode Linux" in (_read_first("/proc/cpuinfo", "\nvendor_id") or ""):
        yield "User Mode Linux"
    for mark, what in (("/.dockerenv", "a Docker container"), ("/run/.containerenv", "a Podman container")):
        if Path(mark).exists():
            yield what
    manager = os.environ.get("container")  # noqa: SIM112 - systemd's interface to containers
    if manager:
        yield f"a container ({manager})"
    if os.environ.get("KUBERNETES_SERVICE_HOST"):
        yield "a pod of Kubernetes"


def _read_first(path: str, key: str = "") -> str | None:
    """Return the first line of a file, or of what follows `key`; None if it cannot be read."""
    try:
        text = Path(path).read_text()
    except OSError:
        return None
    return (text.partition(key)[2] if key else text).partition("\n")[0].strip(" \t:")


def _version(distribution: str) -> str | None:
    from importlib import metadata

    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


@click.command("doctor", short_help="Tell what works on this machine, and what would help.")
@click.option(
    "--json",
    "as_json",
    is_flag=True,
    help="Print JSON; natcompat/commands/doctor/examine.py documents its keys.",
)
@click.pass_context
def command(context: click.Context, as_json: bool) -> int:
    """Tell what works on this machine, why, and what would help.

    For every backend: whether it is viable, the reason, a remedy, and who would do each of the four
    duties (drop runts, divert ESP, strip the marker, insert the marker). Further: which backend is
    chosen here and what NATCOMPAT_BACKEND asks for; whether the kernel would install an ESP SA, by
    address family and algorithm; whether endpoints will be exempt from IPsec policies, and whether
    the kernel sends NAT-keepalives and knows the direction of SAs; privileges, TUN, who holds UDP 500
    and 4500, and signs of a sandbox.

    That a kernel accepts the option UDP_ENCAP proves nothing, so ESP is asked for by a request that
    the kernel has to refuse, filters and steering by datagrams over loopback, and TUN by a device in
    a network namespace that ends with the command. The system is not changed.

    It needs no privilege. An ordinary user may not see the processes of others, and without
    CAP_NET_ADMIN the kernel does not say which algorithms it has; the report tells which it was.

    \b
    Exit status:
      0  there is a backend that works here
      1  there is none

    \b
    Examples:
      natcompat doctor
      natcompat doctor --json | jq -r .auto
      NATCOMPAT_BACKEND=linux natcompat doctor
    """
    report = examine()
    if as_json:
        from natcompat.commands.report import print_json

        print_json(report)
    else:
        from natcompat.commands.doctor.report import show

        show(report)
    return 0 if report["auto"] is not None else 1
