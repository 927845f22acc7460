"""Facts about this system: capabilities, the TUN device, the holders of a port, sandboxes."""

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

_CAPABILITIES: Final = {
    "CAP_NET_BIND_SERVICE": 10,
    "CAP_NET_ADMIN": 12,
    "CAP_NET_RAW": 13,
}  # linux/capability.h

_TUN: Final = Path("/dev/net/tun")

_TUNSETIFF: Final = 0x400454CA  # linux/if_tun.h

_IFF_TUN_NO_PI: Final = 0x1001

_GVISOR: Final = "#1 SMP Sun Jan 10 15:06:54 PST 2016"
"""The kernel version that every gVisor reports (pkg/sentry/kernel)."""


def _status() -> dict[str, str]:
    """Return the fields of /proc/self/status; empty on systems without it."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/self/status").read_text().splitlines()
        return {key: value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return {}


def capabilities() -> dict[str, bool] | None:
    """Return whether this process has each capability that natcompat uses; None: the system does not say."""
    try:
        effective = int(_status()["CapEff"], 16)
    except (KeyError, ValueError):
        return None
    return {name: bool(effective >> bit & 1) for name, bit in _CAPABILITIES.items()}


def tun_device() -> dict[str, Any]:
    """Try to make a TUN device, in a network namespace that ends before this function returns."""

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
    if not (capabilities() or {}).get("CAP_NET_ADMIN"):
        return answer(
            None,
            f"{_TUN} can be opened; making a device takes CAP_NET_ADMIN, so it was not tried.",
            "Run as root, or grant CAP_NET_ADMIN.",
        )
    refusal = _try_tun()
    if refusal:
        return answer(False, f"A device could not be made: {refusal}.", "Allow TUNSETIFF to this process.")
    return answer(True, "A device was made and taken away again.")


def stale_rules_left() -> int | None:
    """Count the rules that lead to devices that are gone."""
    if sys.platform != "linux":
        return None
    from natcompat.esp.device.stale_rules import stale_rules

    with contextlib.suppress(OSError):  # where the sandbox has no rtnetlink
        return len(stale_rules())
    return None


def _try_tun() -> str:
    """Return the reason why no TUN device can be made; empty on success."""
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


def owners_of_port(port: int) -> Iterator[dict[str, Any]]:
    """Yield the sockets bound to UDP `port` in this network namespace, with their processes."""
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
    """Return the address of a line of /proc/net/udp, where it stands as words in the machine's byte order."""
    words = [int(digits[at : at + 8], 16) for at in range(0, len(digits), 8)]
    packed = b"".join(struct.pack("=I", word) for word in words)
    return socket.inet_ntop(socket.AF_INET if len(words) == 1 else socket.AF_INET6, packed)


def _holders(inode: str) -> list[dict[str, Any]]:
    """Return the processes that hold the socket with `inode`, as far as this user may see them."""
    target, holders = f"socket:[{inode}]", []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if any(_target(link) == target for link in (process / "fd").iterdir()):
                command = (process / "comm").read_text().strip()
                holders.append({"pid": int(process.name), "command": command})
    return sorted(holders, key=lambda holder: int(holder["pid"]))


def _target(link: Path) -> str:
    with contextlib.suppress(OSError):
        return os.readlink(link)
    return ""


def describe_system() -> dict[str, Any]:
    """Return the report's section on the system, as ``natcompat doctor --json`` prints it."""
    status = _status()
    return {
        "kernel": f"{platform.system()} {platform.release()}",
        "machine": platform.machine(),
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "sandbox": list(sandbox()),
        "seccomp": {"0": "off", "1": "strict", "2": "filter"}.get(status.get("Seccomp", "")),
        "unprivileged_bpf": _read_first("/proc/sys/kernel/unprivileged_bpf_disabled"),
        "gevent": _version("gevent"),
        "uvloop": _version("uvloop"),
    }


def sandbox() -> Iterator[str]:
    """Yield the signs of a container, a sandbox or a virtual kernel around this process."""
    if _GVISOR in platform.version():
        yield "gVisor (a kernel in user space, without socket filters)"
    if "microsoft" in platform.release().lower():
        yield "WSL"
    if "User Mode Linux" in (_read_first("/proc/cpuinfo", "\nvendor_id") or ""):
        yield "User Mode Linux"
    for mark, name in (("/.dockerenv", "a Docker container"), ("/run/.containerenv", "a Podman container")):
        if Path(mark).exists():
            yield name
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
