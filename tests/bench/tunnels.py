"""Two network namespaces with a tunnel between them, by natcompat or a peer, for bench_datapath.py."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import select
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, Self

from tests.bench.tunnel_end import INNER, OUTER

_numbers: Final = itertools.count(1)


def run(*command: str) -> str:
    """Run a command, and return what it printed."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stdout}{done.stderr}")
    return done.stdout


def cpu_seconds(pid: int) -> float:
    """Return how much time of processors a process has taken, its system calls included."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


class Design:
    """Two namespaces, joined by veth; this one without a tunnel. A context manager."""

    name = "bare veth"
    target = OUTER[1]
    """Where traffic for the second end goes."""

    def __init__(self) -> None:
        self._undo = contextlib.ExitStack()
        self.ends = [f"natcompat-bench-{os.getpid()}-{next(_numbers)}" for _ in OUTER]
        self.processes: list[subprocess.Popen[str]] = []

    def __enter__(self) -> Self:
        try:
            for end in self.ends:
                run("ip", "netns", "add", end)
                self._undo.callback(run, "ip", "netns", "delete", end)
            first, second = self.ends
            run("ip", "link", "add", "wire", "netns", first, "type", "veth", "peer", "wire", "netns", second)
            for end, address in zip(self.ends, OUTER, strict=True):
                run("ip", "-n", end, "address", "add", f"{address}/24", "dev", "wire")
                for device in ("wire", "lo"):
                    run("ip", "-n", end, "link", "set", device, "up")
            self.set_up()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            with contextlib.suppress(OSError):
                process.terminate()
        for process in self.processes:
            try:
                process.communicate(timeout=10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()
        self._undo.close()

    def set_up(self) -> None:
        """Make the tunnel."""

    def command(self, end: int, *command: str) -> list[str]:
        """Return the command that runs `command` at an end."""
        return ["ip", "netns", "exec", self.ends[end], *command]

    def start(self, end: int, *command: str, **options: Any) -> subprocess.Popen[str]:
        """Start a command at an end; it ends with the design at the latest."""
        process = subprocess.Popen(self.command(end, *command), text=True, **options)
        self.processes.append(process)
        return process

    def wait_until_it_passes(self) -> None:
        """Wait for the first answer through the tunnel."""
        for _ in range(40):
            ping = self.command(0, "ping", "-c", "1", "-W", "1", self.target)
            if subprocess.run(ping, capture_output=True, check=False).returncode == 0:
                return
            time.sleep(0.1)
        raise RuntimeError(f"{self.name}: nothing passes")

    def carriers(self) -> list[int]:
        """Return the processes that are the tunnel."""
        return []

    def cpu(self) -> float:
        """Return the processor time of both ends."""
        return sum(map(cpu_seconds, self.carriers()))


class Natcompat(Design):
    """This project's tunnel; `options` are for natcompat's `tunnel_end`."""

    target = INNER[1]

    def __init__(self, name: str, **options: Any) -> None:
        super().__init__()
        self.name = name
        self._options = {"path": "c", **options}

    def set_up(self) -> None:
        """Start both ends."""
        environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
        self._pipes = []
        for number in range(2):
            options = json.dumps({**self._options, "number": number})
            process = self.start(
                number, sys.executable, "-m", "tests.bench.tunnel_end", options,
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=Path(__file__).parents[2],
            )  # fmt: skip
            self._pipes.append(process)
        for process in self._pipes:
            self._line(process, 300)
        if self._options.get("pairs", 1) == 1:
            self.wait_until_it_passes()

    def _line(self, process: subprocess.Popen[str], seconds: float = 30) -> str:
        assert process.stdout is not None
        if not select.select([process.stdout], [], [], seconds)[0]:
            raise RuntimeError(f"{self.name}: an end says nothing")
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.name}: an end has ended")
        return line

    def say(self, end: int, word: str = "stats") -> None:
        """Give an end something to do; `answer` waits for it."""
        pipe = self._pipes[end].stdin
        assert pipe is not None
        pipe.write(word + "\n")
        pipe.flush()

    def answer(self, end: int) -> dict[str, Any]:
        """Return what an end answers."""
        answer: dict[str, Any] = json.loads(self._line(self._pipes[end], 60))
        return answer

    def carriers(self) -> list[int]:
        """Return both ends: `ip netns exec` has become them."""
        return [process.pid for process in self._pipes]


_PLUGINS: Final = (
    "random nonce openssl hmac kdf x509 pubkey pem pkcs1 constraints kernel-libipsec kernel-netlink "
    "socket-default vici updown"
)


class Libipsec(Design):
    """strongSwan's kernel-libipsec with the plugin openssl: ESP in user space, over a TUN."""

    name = "strongSwan kernel-libipsec"
    target = INNER[1]

    def set_up(self) -> None:
        """Start two daemons, which agree by IKE."""
        directory = Path(self._undo.enter_context(tempfile.TemporaryDirectory()))
        daemons = [self._start(directory, number) for number in range(2)]
        self._daemons = [process.pid for process in daemons]
        for number in range(2):
            uri = f"unix://{directory}/{number}.vici"
            self._swanctl(number, "--load-all", "--uri", uri, "--file", str(directory / f"{number}.swanctl"))
        self._swanctl(0, "--initiate", "--child", "child", "--uri", f"unix://{directory}/0.vici")
        self.wait_until_it_passes()

    def _swanctl(self, end: int, *arguments: str) -> None:
        for attempt in range(50):  # until the daemon listens
            with contextlib.suppress(RuntimeError):
                run(*self.command(end, "swanctl", *arguments))
                return
            time.sleep(0.1 if attempt < 49 else 0)
        run(*self.command(end, "swanctl", *arguments))

    def _start(self, directory: Path, number: int) -> subprocess.Popen[str]:
        own, peer, inside, beyond = OUTER[number], OUTER[1 - number], INNER[number], INNER[1 - number]
        run("ip", "-n", self.ends[number], "address", "add", f"{inside}/32", "dev", "lo")
        configuration = directory / f"{number}.conf"
        configuration.write_text(
            f"""charon-systemd {{
  load_modular = no
  load = {_PLUGINS}
  journal {{ default = -1 }}
  plugins {{
    vici {{ socket = unix://{directory}/{number}.vici }}
    kernel-libipsec {{ load = yes }}
  }}
}}
"""
        )
        (directory / f"{number}.swanctl").write_text(
            f"""connections {{ tunnel {{
  version = 2
  local_addrs = {own}
  remote_addrs = {peer}
  proposals = aes128gcm16-prfsha256-x25519
  local {{ auth = psk
    id = {own} }}
  remote {{ auth = psk
    id = {peer} }}
  children {{ child {{
    local_ts = {inside}/32
    remote_ts = {beyond}/32
    esp_proposals = aes128gcm16
  }} }}
}} }}
secrets {{ ike-1 {{ secret = "{"benchmark" * 3}" }} }}
"""
        )
        with open(directory / f"{number}.log", "w") as log:
            return self.start(
                number, "/usr/sbin/charon-systemd", stdout=log, stderr=log,
                env={**os.environ, "STRONGSWAN_CONF": str(configuration)},
            )  # fmt: skip

    def carriers(self) -> list[int]:
        """Return the daemons."""
        return self._daemons


class WireGuard(Design):
    """wireguard-go."""

    name = "wireguard-go"
    target = INNER[1]

    def set_up(self) -> None:
        """Start two, and configure them by their own protocol."""
        from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

        keys = [X25519PrivateKey.generate() for _ in range(2)]
        self._daemons = []
        for number in range(2):
            device = f"wgbench{os.getpid() % 10000}{number}"
            kernels = {**os.environ, "WG_I_PREFER_BUGGY_USERSPACE_TO_POLISHED_KMOD": "1"}
            quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": kernels}
            process = self.start(number, "wireguard-go", "-f", device, **quiet)
            self._daemons.append(process.pid)
            text = (
                f"set=1\nprivate_key={keys[number].private_bytes_raw().hex()}\nlisten_port=51820\n"
                f"public_key={keys[1 - number].public_key().public_bytes_raw().hex()}\n"
                f"endpoint={OUTER[1 - number]}:51820\nallowed_ip={INNER[1 - number]}/32\n\n"
            )
            self._configure(f"/var/run/wireguard/{device}.sock", text)
            end = self.ends[number]
            run("ip", "-n", end, "address", "add", f"{INNER[number]}/24", "dev", device)
            run("ip", "-n", end, "link", "set", device, "mtu", "1400", "up")
        self.wait_until_it_passes()

    @staticmethod
    def _configure(path: str, text: str) -> None:
        for attempt in range(100):
            with socket.socket(socket.AF_UNIX) as sock:
                try:
                    sock.connect(path)
                except OSError:
                    if attempt == 99:
                        raise
                    time.sleep(0.05)
                    continue
                sock.sendall(text.encode())
                answer = sock.recv(4096)
                if b"errno=0" not in answer:
                    raise RuntimeError(f"wireguard-go: {answer!r}")
                return

    def carriers(self) -> list[int]:
        """Return both."""
        return self._daemons


def missing() -> list[str]:
    """Return the Debian packages that the peers and the load need and that are not here."""
    needed = {
        "charon-systemd": "/usr/sbin/charon-systemd",
        "strongswan-swanctl": "swanctl",
        "wireguard-go": "wireguard-go",
        "iperf3": "iperf3",
        "ethtool": "ethtool",
        "iproute2": "ip",
        "iputils-ping": "ping",
        "gcc": "gcc",
    }
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    packages = [package for package, command in needed.items() if not shutil.which(command, path=path)]
    if not Path("/usr/lib/ipsec/plugins/libstrongswan-kernel-libipsec.so").exists():
        packages.append("libcharon-extra-plugins")
    if not Path("/usr/lib/ipsec/plugins/libstrongswan-openssl.so").exists():
        packages.append("libstrongswan-standard-plugins")
    return packages


def install(packages: Sequence[str]) -> None:
    """Install packages with apt-get, as root on Debian."""
    if os.geteuid() or not shutil.which("apt-get"):
        raise SystemExit(f"as root: apt-get install {' '.join(packages)}")
    print(f"installing: {' '.join(packages)}", file=sys.stderr)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    command = ["apt-get", "-qq", "-y", "--no-install-recommends", "-o", "DPkg::Lock::Timeout=300", "install"]
    done = subprocess.run([*command, *packages], env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])
