"""A Linux kernel with ESP for tests: User Mode Linux, a kernel that runs as an ordinary process.

It sees this machine's files read-only, has its own memory, network and clock ticks, needs no root,
and leaves nothing behind. Slow at system calls (about 60 us each), as fast as the host at the rest.

Where NATCOMPAT_LAB_KERNEL names another kernel, that one runs instead (tests/lab/newer.py).

By hand: python -m tests.lab.guest COMMAND...
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from tests.lab import newer

PACKAGES = (
    "user-mode-linux",
    "gcc",
    "libc6-dev",
    "iptables",
    "iproute2",
    "procps",
    "kmod",
    "conntrack",
    "iputils-ping",
    "tcpdump",
    "strongswan-swanctl",
    "charon-systemd",
    "libstrongswan-standard-plugins",
    "libcharon-extra-plugins",
)
"""What the tests in the guest need, by the names of Debian."""

MODULES = """
    xfrm_user ipv6 esp4 esp6 xfrm4_tunnel xfrm6_tunnel ip_tunnel tunnel4 tunnel6
    cbc ctr gcm ccm ghash-generic hmac authenc authencesn seqiv echainiv drbg jitterentropy_rng
    sha512_generic chacha_generic poly1305_generic chacha20poly1305 xcbc cmac
    veth dummy bridge tun iptable_filter iptable_nat ip6table_nat xt_MASQUERADE xt_tcpudp xt_mark
    xt_conntrack iptable_mangle nf_conntrack_netlink af_key
"""
"""Loaded at the start, as far as the guest has them; ciphers that are missing here come on demand."""

MEMORY = "1G"
WHOLE_XSTATE = Path(__file__).with_name("whole_xstate.c")
INIT = Path(__file__).with_name("guest-init")


class GuestError(Exception):
    """The guest could not be booted, died, or took too long; the text says why."""


def kernel() -> str | None:
    """Return the path of the kernel (or the directory of another one), or None."""
    return os.environ.get(newer.KERNEL) or os.environ.get("UML_KERNEL") or shutil.which("linux.uml")


def run(
    command: list[str],
    directory: Path,
    *,
    limit: float,
    environment: dict[str, str],
    abandoned: threading.Event | None = None,
) -> int:
    """Run `command` in a guest, as root, and return its exit status.

    `directory` (of the host) is the only one in which the guest can write; `output` there gets
    stdout and stderr of the command, `console` what the kernel says. Who sets `abandoned` ends it.
    Raises GuestError.
    """
    directory = directory.resolve()
    script = [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
    script += [f"cd {shlex.quote(os.getcwd())} || exit 125", "exec " + shlex.join(command)]
    (directory / "command").write_text("\n".join(script) + "\n")
    (directory / "modules").write_text(MODULES)
    init = directory / "init"
    shutil.copyfile(INIT, init)
    init.chmod(0o755)
    with (
        tempfile.TemporaryDirectory(dir=_memory_directory()) as memory,
        _machine(directory, init) as arguments,
        (directory / "console").open("wb") as log,
    ):
        process = subprocess.Popen(
            arguments,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={
                "PATH": os.environ.get("PATH", os.defpath),
                "HOME": str(directory),
                "TMPDIR": memory,
                **_help_with_registers(directory),
            },
        )
        try:
            wait(process, limit, abandoned or threading.Event())
        except subprocess.TimeoutExpired:
            raise GuestError(
                f"time limit of {limit:g} seconds reached\n{_tail(directory / 'output')}"
            ) from None
        finally:
            end_session(process)
    try:
        return int((directory / "status").read_text())
    except (OSError, ValueError):
        raise GuestError(f"the guest died; its console:\n{_tail(directory / 'console')}") from None


def wait(process: subprocess.Popen[bytes], limit: float, abandoned: threading.Event) -> int:
    """Return the exit status of `process`. Raises subprocess.TimeoutExpired, or GuestError when abandoned."""
    deadline = time.monotonic() + limit
    while True:
        try:
            return process.wait(0.2)
        except subprocess.TimeoutExpired:
            if time.monotonic() > deadline:
                raise
        if abandoned.is_set():
            raise GuestError("it was abandoned: the tests outside have ended")


@contextlib.contextmanager
def _machine(directory: Path, init: Path) -> Iterator[list[str]]:
    """Yield the command that boots the guest."""
    if newer.KERNEL in os.environ:
        try:
            with newer.machine(directory, init) as arguments:
                yield arguments
        except newer.NewerKernelError as error:
            raise GuestError(str(error)) from None
        return
    uml = kernel()
    if uml is None:
        raise GuestError("no User Mode Linux kernel (Debian: user-mode-linux)")
    yield [
        uml, f"mem={MEMORY}", "umid=guest", f"uml_dir={directory}/",
        "root=/dev/root", "rootfstype=hostfs", "rootflags=/", "rw", f"init={init}",
        "con=null", "con0=null,fd:1", "ssl=null", "panic=-1", "quiet", "random.trust_cpu=on",
        f"NATCOMPAT_GUEST={directory}",
    ]  # fmt: skip


def _help_with_registers(directory: Path) -> dict[str, str]:
    """Return what the environment must have on a processor whose registers are too many for the guest."""
    if newer.KERNEL in os.environ or " amx_tile " not in Path("/proc/cpuinfo").read_text():
        return {}
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        raise GuestError("on a processor with AMX the guest needs a C compiler (Debian: gcc libc6-dev)")
    library = directory / "whole_xstate.so"
    command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(library), str(WHOLE_XSTATE), "-ldl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise GuestError(f"{WHOLE_XSTATE.name} could not be compiled: {done.stderr[-500:]}")
    return {"LD_PRELOAD": str(library)}


def _memory_directory() -> str:
    """Return a directory for the guest's memory, a sparse file that has to be mapped executable."""
    for candidate in (os.environ.get("UML_MEMORY"), tempfile.gettempdir(), "/dev/shm", "/var/tmp"):
        if not candidate or not os.access(candidate, os.W_OK):
            continue
        state = os.statvfs(candidate)
        if not state.f_flag & getattr(os, "ST_NOEXEC", 8) and state.f_bavail * state.f_frsize >= 1 << 30:
            return candidate
    raise GuestError("no directory with 1 GB to spare that allows execution (set UML_MEMORY to one)")


def end_session(process: subprocess.Popen[bytes]) -> None:
    """End every process of the guest: they are all in the session that was made for it."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        left = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError, IndexError, ValueError):
                    fields = (entry / "stat").read_text().rsplit(")", 1)[1].split()
                    if int(fields[3]) == process.pid and fields[0] != "Z":
                        left.append(int(entry.name))
        if not left:
            break
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    process.wait(10)


def _tail(path: Path, lines: int = 40) -> str:
    with contextlib.suppress(OSError):
        return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])
    return ""


def main() -> int:
    """Run the command of the command line in a guest and show what it says."""
    with tempfile.TemporaryDirectory(prefix="natcompat-guest-") as name:
        try:
            status = run(sys.argv[1:], Path(name), limit=600, environment={"PATH": os.environ["PATH"]})
        except GuestError as error:
            print(error, file=sys.stderr)
            status = 125
        with contextlib.suppress(OSError):
            sys.stdout.write((Path(name) / "output").read_text(errors="replace"))
    return status


if __name__ == "__main__":
    sys.exit(main())
