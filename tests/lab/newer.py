"""A newer Linux than User Mode Linux has, as an alternative guest: any kernel package of Debian, in qemu.

NATCOMPAT_LAB_KERNEL names the directory into which the package was unpacked; see README.md. The root is
this machine's file system, shared by virtiofs and mounted read-only. Everything is emulated (TCG), so
that it runs where there is no KVM, and takes several times as long.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

KERNEL = "NATCOMPAT_LAB_KERNEL"
"""Environment variable: a directory with boot/vmlinuz-* and lib/modules."""

MEMORY = "1G"
CPU = "Haswell,-cx16"
"""Kernels that find cmpxchg16b crash under the emulation of qemu 7.2."""


class NewerKernelError(Exception):
    """There is no such kernel here, or nothing to run it; the text says what."""


@contextlib.contextmanager
def machine(directory: Path, init: Path) -> Iterator[list[str]]:
    """Share the file systems, and yield the command that boots the machine with `init`.

    `directory` is the only one in which the guest can write.
    """
    package = Path(os.environ[KERNEL]).resolve()
    kernels = sorted(package.glob("boot/vmlinuz-*"))
    if not kernels:
        raise NewerKernelError(f"{KERNEL}={package}: no boot/vmlinuz-* in it")
    release = kernels[-1].name.removeprefix("vmlinuz-")
    qemu = shutil.which("qemu-system-x86_64")
    sharer = shutil.which("virtiofsd", path="/usr/lib/qemu:/usr/libexec:/usr/bin")
    if qemu is None or sharer is None or platform.machine() != "x86_64":
        raise NewerKernelError("no qemu with virtiofsd (Debian: qemu-system-x86 qemu-system-common)")
    if not (package / "lib/modules" / release / "modules.dep").exists():
        subprocess.run(["/sbin/depmod", "-b", package, release], check=True)
    arguments = [
        qemu, "-accel", "tcg", "-cpu", CPU, "-m", MEMORY, "-nodefaults", "-no-user-config", "-no-reboot",
        "-display", "none", "-serial", "stdio",
        "-object", f"memory-backend-memfd,id=memory,size={MEMORY},share=on", "-numa", "node,memdev=memory",
    ]  # fmt: skip
    with contextlib.ExitStack() as stack:
        for name, source in (("root", Path("/")), ("guest", directory)):
            end = directory / f"{name}.socket"
            stack.enter_context(_share(sharer, source, end, directory / f"{name}.log"))
            arguments += ["-chardev", f"socket,id={name},path={end}"]
            arguments += ["-device", f"vhost-user-fs-pci,chardev={name},tag={name}"]
        line = (
            f"console=ttyS0 rootfstype=virtiofs root=root ro init={init} panic=-1 quiet "
            f"NATCOMPAT_GUEST={directory} NATCOMPAT_MODULES={package}/lib/modules NATCOMPAT_SHARE=virtiofs"
        )
        yield [*arguments, "-kernel", str(kernels[-1]), "-append", line]


@contextlib.contextmanager
def _share(sharer: str, source: Path, end: Path, log: Path) -> Iterator[None]:
    with log.open("wb") as stream:
        process = subprocess.Popen(
            [sharer, f"--socket-path={end}", "-o", f"source={source},sandbox=chroot,cache=auto"],
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
        )
    try:
        deadline = time.monotonic() + 10
        while not end.exists():
            if process.poll() is not None or time.monotonic() > deadline:
                raise NewerKernelError(f"virtiofsd cannot share {source}:\n{log.read_text(errors='replace')}")
            time.sleep(0.02)
        yield
    finally:
        process.terminate()
        process.wait(10)
