"""Running Python under a model of another kernel."""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Final

from tests.otheros.kernels import KERNELS, header
from tests.support.running import ROOT

HERE: Final = Path(__file__).parent
COMPILER: Final = shutil.which("cc") or shutil.which("gcc")
PRIVILEGES: Final = "root,sys_ip_config,sys_net_config,net_rawaccess"
_CHILD: Final = """
import asyncio, concurrent.futures, ctypes, multiprocessing, pytest, select, selectors, socket
import subprocess, sys, sysconfig
import _pytest.assertion.rewrite, _pytest.main, _pytest.python
import os
sysconfig.get_config_vars()
os.geteuid = lambda: 0 if "root" in os.environ["NATCOMPAT_MODEL_PRIVILEGES"] else 1000
sys.platform = {platform!r}
"""


# beyond the ports that Linux gives by itself, and where another worker is not likely to be
_ports = itertools.count(61000 + os.getpid() * 41 % 4000)


def free_port() -> int:
    """Return a port for a model of a system that has one, which nobody has on loopback; another each time."""
    for port in _ports:
        with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as sock, contextlib.suppress(OSError):
            sock.bind(("::", port))
            return port
    raise AssertionError("itertools.count() ended")


def build(system: str, directory: Path) -> Path:
    """Return the library that makes Linux a model of `system`; it is built in `directory`."""
    assert COMPILER is not None
    (directory / "model.h").write_text(header(KERNELS[system]))
    library = directory / "libkstat.so.1"  # what ctypes asks for on Solaris
    includes = [f"-I{directory}", "-idirafter", str(HERE / "include")]
    command = [COMPILER, "-shared", "-fPIC", "-O1", "-Wall", "-Wextra", "-Werror", *includes]
    subprocess.run([*command, str(HERE / "model.c"), "-o", str(library), "-ldl"], check=True)
    return library


class Model:
    """One model: Python programs run under it."""

    def __init__(self, system: str, directory: Path) -> None:
        self.system = system
        self.library = build(system, directory)

    def run(
        self,
        code: str,
        *arguments: str,
        privileges: str = PRIVILEGES,
        kernel: str = "",
        port: int = 0,
        path: tuple[Path, ...] = (),
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        """Run `code` with `arguments` as ``sys.argv``.

        `privileges`: what the process may; `kernel`: what the kernel lacks (no-ipsec, no-sa,
        no-udpencap, no-kstat, no-demultiplexing); `port`: the one port of the system; `path`: goes in
        front of ``sys.path``.
        """
        start = _CHILD.format(platform=KERNELS[self.system].platform)
        inherited = {key: value for key, value in os.environ.items() if key != "NATCOMPAT_BACKEND"}
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", start + code, *arguments],
            cwd=ROOT,
            env={
                **inherited,
                "LD_PRELOAD": str(self.library),
                "LD_LIBRARY_PATH": str(self.library.parent),
                "PYTHONPATH": os.pathsep.join(map(str, (*path, ROOT, *filter(None, sys.path)))),
                "NATCOMPAT_MODEL": self.system,
                "NATCOMPAT_MODEL_PRIVILEGES": privileges,
                "NATCOMPAT_MODEL_KERNEL": kernel,
                "NATCOMPAT_MODEL_PORT": str(port),
                **environment,
            },
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )

    def pytest(self, target: str, **options: object) -> subprocess.CompletedProcess[str]:
        """Run pytest on `target`, a file beside this one."""
        plugins = ("cacheprovider", "xdist", "cov", "hypothesispytest")
        without = [word for plugin in plugins for word in ("-p", f"no:{plugin}")]
        arguments = ("-q", "--noconftest", "--color=no", *without)
        code = "sys.exit(pytest.main(sys.argv[1:]))"
        return self.run(code, *arguments, str(HERE / target), **options)  # type: ignore[arg-type]
