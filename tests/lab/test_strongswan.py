"""strongSwan as the other end: natcompat takes over one side of what two strongSwans negotiated."""

from __future__ import annotations

import dataclasses
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from natcompat.ipsec import Direction, Encr
from tests.lab.topology import Host, Network, wait_for

pytestmark = [
    pytest.mark.kernel_esp,
    pytest.mark.skipif(
        not Path("/usr/sbin/charon-systemd").exists() or shutil.which("swanctl") is None,
        reason="strongSwan is not installed (Debian: charon-systemd, strongswan-swanctl)",
    ),
]

PLUGINS = (
    "random nonce drbg aes sha1 sha2 hmac kdf ctr cbc gcm cmac curve25519 gmp mgf1 pem pkcs1 pkcs8 x509 "
    "pubkey constraints kernel-netlink socket-default vici updown counters"
)

DAEMON = """
charon-systemd {{
  load_modular = no
  load = {plugins}
  install_routes = no
  retransmit_tries = 2
  journal {{ default = -1 }}
  filelog {{ log {{ path = {directory}/log
    default = 1 }} }}
  plugins {{ vici {{ socket = unix://{directory}/vici }} }}
}}
"""

CONNECTION = """
connections {{
  nat {{
    version = 2
    local_addrs = {local}
    remote_addrs = {remote}
    proposals = aes256-sha256-x25519
    local {{ auth = psk
      id = {name} }}
    remote {{ auth = psk
      id = {peer} }}
    children {{ tunnel {{
      local_ts = {inner}/32
      remote_ts = {peer_inner}/32
      esp_proposals = {proposal}
    }} }}
  }}
}}
secrets {{ ike {{ secret = correct-horse-battery-staple
  id-1 = initiator
  id-2 = responder }} }}
"""


class Daemon:
    """A charon of a host, with its files in a directory of its own."""

    def __init__(self, host: Host, peer: Host, remote: str, proposal: str, directory: Path) -> None:
        directory.mkdir()
        self.host, self.directory = host, directory
        (directory / "strongswan.conf").write_text(DAEMON.format(plugins=PLUGINS, directory=directory))
        (directory / "swanctl.conf").write_text(
            CONNECTION.format(
                local=host.address,
                remote=remote,
                name=host.name,
                peer=peer.name,
                inner=host.inner,
                peer_inner=peer.inner,
                proposal=proposal,
            )
        )
        configuration = f"STRONGSWAN_CONF={directory}/strongswan.conf"
        with (directory / "output").open("wb") as output:
            self.process = subprocess.Popen(
                ["ip", "netns", "exec", host.name, "env", configuration, "/usr/sbin/charon-systemd"],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
        wait_for("charon", lambda: (directory / "vici").exists() or self.process.poll() is not None, 30)
        self.control("--load-all", "--file", str(directory / "swanctl.conf"))

    def control(self, *arguments: str) -> str:
        """Run swanctl."""
        command = ["swanctl", *arguments, "--uri", f"unix://{self.directory}/vici"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
        log = self.directory / "log"
        said = (self.directory / "output").read_text(errors="replace")
        assert done.returncode == 0, done.stderr + said + (log.read_text()[-3000:] if log.exists() else "")
        return done.stdout

    def kill(self) -> None:
        """End the daemon before it can clean up after itself."""
        self.process.kill()
        self.process.wait(10)


@contextmanager
def negotiated(network: Network, proposal: str, directory: Path) -> Iterator[tuple[Daemon, Daemon]]:
    """Let two strongSwans negotiate a tunnel through the NAT."""
    near, far = network.initiator, network.responder
    with ExitStack() as stack:
        responder = Daemon(far, near, "%any", proposal, directory / "responder")
        stack.callback(responder.kill)
        initiator = Daemon(near, far, far.address, proposal, directory / "initiator")
        stack.callback(initiator.kill)
        initiator.control("--initiate", "--child", "tunnel")
        yield initiator, responder


@pytest.mark.parametrize(
    ("proposal", "transform"),
    [("aes256gcm16-x25519", Encr.AES_GCM_16), ("aes128-sha256-x25519-esn", Encr.AES_CBC)],
    ids=["AES-GCM", "AES-CBC with HMAC-SHA2 and ESN"],
)
@pytest.mark.parametrize("replaced", ["responder", "initiator"])
def test_natcompat_takes_the_place_of_one_strongswan(
    network: Network, tmp_path: Path, proposal: str, transform: Encr, replaced: str
) -> None:
    near, far = network.initiator, network.responder
    host = far if replaced == "responder" else near
    with negotiated(network, proposal, tmp_path) as daemons:
        daemon = daemons[1] if replaced == "responder" else daemons[0]
        found = host.ipsec.list_sas()
        policies = [each.policy for each in host.ipsec.list_policies() if each.policy.reqid]
        assert len(found) == 2
        assert {policy.direction for policy in policies} == set(Direction)
        daemon.kill()
        host.ipsec.flush_sas()
        host.ipsec.flush_policies()
        assert near.ping("10.2.0.1", "-W", "1", count=1) == 0

        ids = {}
        for each in found:
            association = each.association
            assert association is not None, each.description
            assert association.encryption is transform
            assert association.esn == proposal.endswith("esn")
            assert association.encapsulation is not None
            assert association.encapsulation.local_port == 4500
            ids[association.direction] = host.ipsec.add_sa(association)
        for policy in policies:
            host.ipsec.add_policy(dataclasses.replace(policy, priority=None))
        with host.udp() as sock:
            host.ipsec.bypass(sock)
            assert near.ping("10.2.0.1") == 3
            assert {way: host.ipsec.get_sa(ids[way]).packets for way in ids} == dict.fromkeys(Direction, 3)
