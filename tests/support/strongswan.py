"""strongSwan as the other end, for tests and benchmarks: charons of their own in network namespaces.

`negotiated` starts two of them and lets them negotiate a tunnel::

    with Topology() as network, negotiated(
        Side("initiator", namespace(network.initiator), "192.168.1.2", ("10.1.0.1/32",)),
        Side("responder", namespace(network.responder), "203.0.113.2", ("10.2.0.1/32",)),
        "aes128gcm16-x25519",
        libipsec=True,
    ) as (initiator, responder):
        initiator.run("ping", "-c", "1", "10.2.0.1")

With `libipsec` their ESP is the plugin kernel-libipsec, in user space: a TUN device ``ipsec0`` with an
MTU of 1400 in each namespace, routes to the peer's networks in table 220, ESP always in UDP from
port 4500 (behind a NAT or not), tunnel mode only, no extended sequence numbers, a window of 128
packets. Otherwise it is the kernel's. Root is needed either way; `lacking` says what else is.
Addresses of this side's networks that are single hosts are put on ``lo``, if they are not there.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from natcompat.commands.verify.namespaces import Namespace
from tests.support.linux import wait_until

CHARON = "/usr/sbin/charon-systemd"
LIBIPSEC = "/usr/lib/ipsec/plugins/libstrongswan-kernel-libipsec.so"
TUN = "/dev/net/tun"

PLUGINS = (
    "random nonce drbg openssl aes sha1 sha2 hmac kdf ctr ccm gcm cmac chapoly curve25519 pem pkcs1 pkcs8 "
    "x509 pubkey constraints {kernel} kernel-netlink socket-default vici updown counters"
)
"""The ciphers are those of openssl, which comes first, as far as it has them."""

DAEMON = """
charon-systemd {{
  load_modular = no
  load = {plugins}
  install_routes = {routes}
  retransmit_tries = 2
  journal {{ default = -1 }}
  filelog {{ log {{ path = {directory}/log
    flush_line = yes
    default = 1
    chd = 4 }} }}
  plugins {{
    vici {{ socket = unix://{directory}/vici }}
    kernel-libipsec {{ load = {libipsec} }}
  }}
}}
"""

CONNECTION = """
connections {{ nat {{
  version = 2
  local_addrs = {local}
  remote_addrs = {remote}
  proposals = aes256-sha256-x25519
  local {{ auth = psk
    id = {name} }}
  remote {{ auth = psk
    id = {peer} }}
  children {{ tunnel {{
    local_ts = {networks}
    remote_ts = {peer_networks}
    esp_proposals = {proposal}
  }} }}
}} }}
secrets {{ ike {{ secret = correct-horse-battery-staple
  id-1 = {name}
  id-2 = {peer} }} }}
"""


class Side(NamedTuple):
    """One of the two."""

    name: str
    """Its identity in IKE."""
    namespace: str
    """The file of its network namespace: /run/netns/NAME, or what `namespace` returns."""
    address: str
    """Its outer address, before any NAT."""
    networks: tuple[str, ...]
    """What is behind it, with prefix lengths."""


class ChildSA(NamedTuple):
    """What was negotiated, as one side's log tells it; the keys are those of a test."""

    inbound_spi: int
    outbound_spi: int
    encryption_keys: tuple[bytes, bytes]
    integrity_keys: tuple[bytes, bytes]
    """Of the packets that the initiator sends, and of those that the responder sends; salts included."""


def namespace(of: Namespace) -> str:
    """Return the file of a namespace of `natcompat.commands.verify.namespaces.Topology`."""
    return f"/proc/{of.pid}/ns/net"


def lacking(*, libipsec: bool) -> str:
    """Return why no charon can run here, or nothing."""
    if os.name != "posix" or os.geteuid():
        return "strongSwan needs root"
    if not Path(CHARON).exists() or shutil.which("swanctl") is None:
        return "strongSwan is not installed (Debian: charon-systemd, strongswan-swanctl)"
    if libipsec and not Path(LIBIPSEC).exists():
        return "strongSwan's kernel-libipsec is not installed (Debian: libcharon-extra-plugins)"
    if libipsec and not Path(TUN).exists():
        return f"there is no {TUN}"
    return ""


class Charon:
    """A daemon of one side, with its files in a directory of its own."""

    def __init__(
        self, side: Side, peer: Side, remote: str, proposal: str, directory: Path, *, libipsec: bool
    ) -> None:
        """`remote`: where it finds its peer, or %any."""
        self.side, self.directory = side, directory
        directory.mkdir(mode=0o700)
        (directory / "strongswan.conf").write_text(
            DAEMON.format(
                plugins=PLUGINS.format(kernel="kernel-libipsec" if libipsec else ""),
                routes="yes" if libipsec else "no",  # without it nothing would go to the TUN device
                libipsec="yes" if libipsec else "no",
                directory=directory,
            )
        )
        (directory / "swanctl.conf").write_text(
            CONNECTION.format(
                local=side.address,
                remote=remote,
                name=side.name,
                peer=peer.name,
                networks=",".join(side.networks),
                peer_networks=",".join(peer.networks),
                proposal=proposal,
            )
        )
        for network in side.networks:
            if network.endswith(("/32", "/128")):
                self.run("ip", "address", "replace", network, "dev", "lo")
        with (directory / "output").open("wb") as output:
            self.process = subprocess.Popen(
                [*self._inside(), "env", f"STRONGSWAN_CONF={directory}/strongswan.conf", CHARON],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        try:
            wait_until(self._answers, f"charon did not start:\n{self.said()}", 30)
            self.control("--load-all", "--file", str(directory / "swanctl.conf"))
        except BaseException:
            self.kill()
            raise

    def _inside(self) -> list[str]:
        return ["nsenter", f"--net={self.side.namespace}"]

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"charon ended:\n{self.said()}"
        with socket.socket(socket.AF_UNIX) as sock, suppress(OSError):
            sock.connect(f"{self.directory}/vici")
            return True
        return False

    def run(self, *command: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        """Run a program in the namespace of this side."""
        return subprocess.run([*self._inside(), *command], capture_output=True, text=True, check=check)

    def start(self, *command: str) -> subprocess.Popen[str]:
        """Start a program in the namespace of this side."""
        return subprocess.Popen(
            [*self._inside(), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def control(self, *arguments: str) -> str:
        """Run swanctl."""
        command = ["swanctl", *arguments, "--uri", f"unix://{self.directory}/vici"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        assert done.returncode == 0, f"{done.stdout}{done.stderr}{self.said()}"
        return done.stdout

    def packets(self) -> tuple[int, int]:
        """Return how many packets its tunnel has received and sent."""
        said = self.control("--list-sas", "--raw")
        return int(found("packets-in=([0-9]+)", said)), int(found("packets-out=([0-9]+)", said))

    def peer(self) -> tuple[str, int]:
        """Return where its peer is, as it sees it."""
        said = self.control("--list-sas", "--raw")
        return found("remote-host=([^ ]+)", said), int(found("remote-port=([0-9]+)", said))

    def child_sa(self) -> ChildSA:
        """Return what has been negotiated."""
        log = (self.directory / "log").read_text(errors="replace")
        spis = re.findall(r"established with SPIs ([0-9a-f]{8})_i ([0-9a-f]{8})_o", log)[-1]
        return ChildSA(
            int(spis[0], 16),
            int(spis[1], 16),
            (_key(log, "encryption initiator"), _key(log, "encryption responder")),
            (_key(log, "integrity initiator"), _key(log, "integrity responder")),
        )

    def said(self) -> str:
        """Return the end of what it has said, without what it says of keys."""
        text = ""
        for name in ("output", "log"):
            with suppress(OSError):
                text += (self.directory / name).read_text(errors="replace")
        return "\n".join([line for line in text.splitlines() if not re.search(_DUMP, line)][-40:])

    def kill(self) -> None:
        """End the daemon before it can clean up after itself or tell its peer."""
        self.process.kill()
        self.process.wait(10)


_DUMP = r" [0-9]+: ((?:[0-9A-F]{2} ){1,16}) "
"""A line of a dump: offset, bytes, and what they are in ASCII."""


def found(pattern: str, text: str) -> str:
    """Return what the group of `pattern` is in `text`."""
    match = re.search(pattern, text)
    assert match, f"no {pattern} in {text}"
    return match[1]


def _key(log: str, name: str) -> bytes:
    """Return the last key of that name, dumped on the lines that follow its name; none: no bytes."""
    start = log.rfind(f"{name} key => ")
    if start < 0:
        return b""
    length = int(found("=> ([0-9]+) bytes", log[start:]))
    dump = re.findall(_DUMP, log[start:])[: -(-length // 16)]
    key = b"".join(map(bytes.fromhex, dump))
    assert len(key) == length, f"the log shows {len(key)} of the {length} bytes of the key"
    return key


@contextmanager
def negotiated(
    initiator: Side, responder: Side, proposal: str, *, libipsec: bool
) -> Iterator[tuple[Charon, Charon]]:
    """Let two charons negotiate a tunnel by `proposal`; both are killed at the end.

    `proposal` is one of strongSwan's for ESP, such as aes128gcm16-x25519.
    """
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ike-")))
        daemons: list[Charon] = []
        for side, peer, remote in (
            (responder, initiator, "%any"),
            (initiator, responder, responder.address),
        ):
            daemon = Charon(side, peer, remote, proposal, directory / side.name, libipsec=libipsec)
            stack.callback(daemon.kill)
            daemons.insert(0, daemon)
        daemons[0].control("--initiate", "--child", "tunnel")
        yield daemons[0], daemons[1]
