"""A tunnel whose inner side is idle stays up through a NAT that forgets, and says when its peer is gone."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from natcompat.commands.tunnel.keepalive import KeepAlive
from natcompat.commands.verify.namespaces import Namespace, Topology
from natcompat.esp import choice as datapaths
from natcompat.esp.device.queue import QueueDevice
from natcompat.esp.userspace import UserspaceIPsec
from natcompat.ipsec import Direction, Event, InstalledSA, PeerSilent, SaId
from tests.commands.tunnel.making import put
from tests.commands.tunnel.running import FAR, NEAR, examples, inside, ping, run, topology, tunnel
from tests.support.esp import sa
from tests.support.linux import LINUX
from tests.support.running import COMMAND, environment
from tests.support.tun import TUN

pytestmark = [LINUX, TUN]
DATAPATHS = [datapath.name for datapath in datapaths.probe() if datapath.viable]


@pytest.fixture
def network() -> Iterator[Topology]:
    with topology() as made:
        yield made


def edit(path: Path, *changes: tuple[str, str]) -> None:
    text = path.read_text()
    for old, new in changes:
        text, count = re.subn(old, new, text, count=1, flags=re.MULTILINE)
        assert count, old
    put(path, text)


def forget_mappings(router: Namespace, seconds: int, first_port: int | None = None) -> None:
    """Let the NAT forget what is idle for `seconds`, and give new mappings ports from `first_port` on."""
    for name in ("nf_conntrack_udp_timeout", "nf_conntrack_udp_timeout_stream"):
        router.call(Path.write_text, Path(f"/proc/sys/net/netfilter/{name}"), str(seconds))
    if first_port is not None:
        rules = "flush chain ip natcompat out\n"
        rules += "add rule ip natcompat out oifname outside meta l4proto udp masquerade to "
        rules += f":{first_port}-{first_port + 9}\n"
        router.call(subprocess.run, ["nft", "-f", "-"], input=rules, text=True, check=True)


@pytest.mark.parametrize("datapath", DATAPATHS)
def test_an_idle_tunnel_survives_a_nat_that_forgets(
    network: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, datapath: str
) -> None:
    """No inner packet is sent: the peer learns each new mapping from dummy packets alone."""
    if network.nat != "nft":
        pytest.skip("changes the NAT by nft")
    monkeypatch.setenv(datapaths.ENVIRONMENT_VARIABLE, datapath)
    first, second = examples(tmp_path)
    edit(first, ("^nat_keepalive = 20 .*", "nat_keepalive = 1"))
    edit(second, ("^# follow_mapping = false|^follow_mapping = true", "follow_mapping = true"))
    with (
        tunnel(network, network.responder, second, "--create-state") as responder,
        tunnel(network, network.initiator, first, "--create-state"),
    ):
        responder.until("mapping change")
        forget_mappings(network.router, 1, 31000)
        moved = responder.until("mapping change")
        assert 31000 <= int(moved["new"].split()[-1]) <= 31009
        forget_mappings(network.router, 120)
        time.sleep(1.5)
        assert ping(network, network.responder, NEAR) == 3


def test_a_learnt_address_outlives_a_restart(network: Topology, tmp_path: Path) -> None:
    """The peer, silent by itself, is reached at once; without follow_mapping nothing is kept."""
    first, second = examples(tmp_path)
    edit(first, ("^nat_keepalive = 20 .*", "nat_keepalive = 3600"))
    edit(second, ("^# follow_mapping = false|^follow_mapping = true", "follow_mapping = true"))
    edit(second, ("^# keepalive = .*|^local_address", 'keepalive = "none"\nlocal_address'))
    with tunnel(network, network.initiator, first, "--create-state"):
        with tunnel(network, network.responder, second, "--create-state") as responder:
            assert ping(network, network.initiator, FAR, count=1) in (0, 1)
            responder.until("mapping change")
            assert responder.end() == 128 + signal.SIGTERM
        with tunnel(network, network.responder, second):
            (row,) = [row for row in status(network) if row["file"] == str(second)]
            assert row["peer"]["learnt"]
            assert ping(network, network.responder, NEAR) == 3


def test_silence_is_reported_and_logged_with_its_causes(network: Topology, tmp_path: Path) -> None:
    first, second = examples(tmp_path)
    edit(second, ("^local_address", "silence = 2\nlocal_address"))
    edit(second, ("^# follow_mapping = false|^follow_mapping = true", "follow_mapping = true"))
    log = tmp_path / "log"
    with tunnel(network, network.initiator, first, "--create-state") as initiator:
        command = [*COMMAND, "tunnel", "--json", "--log-level", "debug", "--create-state", str(second)]
        with (
            log.open("w") as stderr,
            subprocess.Popen(
                [*inside(network, network.responder), *command],
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
                env=environment(),
            ) as responder,
        ):
            try:
                assert responder.stdout is not None
                events = map(json.loads, responder.stdout)
                assert next(event for event in events if event["event"] == "up")
                assert ping(network, network.initiator, FAR, count=2) >= 1
                initiator.process.kill()
                initiator.process.wait()
                run(network, network.responder, "ping", "-c", "40", "-i", "0.1", "-W", "1", NEAR)
                silent = next(event for event in events if event["event"] == "peer silent")
                assert silent["seconds"] >= 2
                assert [row["silent"] for row in status(network) if row["pid"] == responder.pid] == [True]
                responder.terminate()
                assert responder.wait(20) == 128 + signal.SIGTERM
            finally:
                responder.kill()
    text = log.read_text()
    assert re.search(r"INFO tunnel .*tunnel-peer.toml is up", text)
    assert re.search(r"INFO mapping change: spi 0x00c0de01", text)
    assert re.search(r"WARNING peer silent: .*usual causes: the peer is down or has other keys", text)
    assert "INFO tunnel" in text
    assert "goes down with status 143" in text


@pytest.mark.parametrize("datapath", DATAPATHS)
def test_another_key_is_explained_at_both_ends(
    network: Topology, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, datapath: str
) -> None:
    """One end sees packets that fail authentication, the other gets no answer; each says so, once."""
    monkeypatch.setenv(datapaths.ENVIRONMENT_VARIABLE, datapath)
    first, second = examples(tmp_path)
    put(tmp_path / "wrong.key", "77" * 36)
    edit(second, ("from-peer.key|to-peer.key", "from-peer.key"))
    text = second.read_text()
    inbound = text.index('direction = "in"')
    put(
        second,
        text[:inbound] + re.sub(r'key_file = "[^"]*"', 'key_file = "wrong.key"', text[inbound:], count=1),
    )
    edit(first, ("^local_address", "silence = 2\nlocal_address"))
    with (
        tunnel(network, network.responder, second, "--create-state", "--log-level", "warning") as responder,
        tunnel(network, network.initiator, first, "--create-state") as initiator,
    ):
        ping(network, network.initiator, FAR, "-W", "1", count=4)
        silent = initiator.until("peer silent")
        assert silent["spi"] == "0x00c0de01"
        assert "the peer is down or has other keys" in next_line(initiator, "peer silent: ")
        failure = responder.until("integrity failure")
        assert (failure["spi"], failure["count"] >= 1) == ("0x00c0de01", True)
        logged = next_line(responder, "WARNING integrity failure")
        assert "usual causes: the peer has another key or other transforms" in logged


def next_line(running: Any, words: str) -> str:
    """Return the next line of the output that contains `words`."""
    for line in running.process.stdout:
        if words in line:
            return str(line)
    raise AssertionError(f"no line with {words!r}")


# --- natcompat tunnel status -----------------------------------------------------------------------


def status(network: Topology) -> list[dict[str, Any]]:
    done = run(network, network.router, *COMMAND, "tunnel", "status", "--json")
    assert not done.stderr
    rows: list[dict[str, Any]] = json.loads(done.stdout)
    assert done.returncode == (0 if rows else 1)
    return rows


def test_status_of_running_tunnels(network: Topology, tmp_path: Path) -> None:
    first, second = examples(tmp_path)
    edit(first, ("^# lifetime = .*", "lifetime = { soft_seconds = 3000, hard_seconds = 3600 }"))
    assert [row for row in status(network) if row["file"].startswith(str(tmp_path))] == []
    with (
        tunnel(network, network.responder, second, "--create-state") as responder,
        tunnel(network, network.initiator, first, "--create-state") as initiator,
    ):
        responder.until("mapping change")
        assert ping(network, network.initiator, FAR) == 3
        rows = {row["pid"]: row for row in status(network)}
        near, far = rows[initiator.process.pid], rows[responder.process.pid]
        assert (near["file"], near["backend"], near["keepalive"]) == (str(first), "userspace", "esp")
        assert near["peer"]["configured"] == "203.0.113.2 port 4500"
        assert not near["peer"]["learnt"]
        assert far["peer"]["learnt"]
        assert far["peer"]["port"] != 4500
        for row in (near, far):
            assert row["received"]["packets"] >= 3
            assert row["sent"]["bytes"] > 0
            assert abs(row["last_received"] - time.time()) < 30
            assert row["device"].startswith("natcompat")
            assert not row["silent"]
            assert len(row["sas"]) == 2
            assert "key" not in json.dumps(row).replace("replace_keys", "")
        assert near["replace_keys"]["limit"] == "soft_seconds"
        assert 2900 < near["replace_keys"]["seconds"] <= 3000
        shown = run(network, network.router, *COMMAND, "tunnel", "status").stdout
        assert str(first) in shown
        assert "learnt (the file says" in shown
        assert "keepalive esp" in shown


# --- the thread ------------------------------------------------------------------------------------


class Ends:
    """An engine with one SA in each direction, and a peer that is the test."""

    def __init__(self) -> None:
        self.ipsec = UserspaceIPsec(QueueDevice())
        self.ipsec.add_sa(sa(Direction.OUT))
        self.dummies: list[SaId] = []

    def installed(self) -> list[InstalledSA]:
        return self.ipsec.list_sas()

    def send_dummy(self, sa_id: SaId) -> None:
        self.dummies.append(sa_id)
        self.ipsec.seal_dummy(sa_id, 0)


@pytest.fixture
def ends() -> Iterator[Ends]:
    made = Ends()
    yield made
    made.ipsec.close()


def test_only_idle_sas_send(ends: Ends) -> None:
    keepalive = KeepAlive(ends, intervals={sa(Direction.OUT).spi: 0.3}, silence=0, report=lambda event: None)
    keepalive.look()
    keepalive.look()
    assert len(ends.dummies) == 1, "at once, and then not before the interval is over"
    time.sleep(0.35)
    ends.ipsec.seal_dummy(sa(Direction.OUT).sa_id, 0)  # as any packet
    keepalive.look()
    assert len(ends.dummies) == 1
    time.sleep(0.35)
    keepalive.look()
    assert len(ends.dummies) == 2


def test_an_sa_without_an_interval_sends_nothing(ends: Ends) -> None:
    KeepAlive(ends, intervals={}, silence=0, report=lambda event: None).look()
    assert ends.dummies == []


def test_silence_is_reported_once_and_only_to_who_sends(ends: Ends) -> None:
    reported: list[Event] = []
    keepalive = KeepAlive(ends, intervals={}, silence=0.2, report=reported.append)
    time.sleep(0.25)
    keepalive.look()
    assert reported == [], "this end has sent nothing, so no answer is missing"
    ends.ipsec.seal_dummy(sa(Direction.OUT).sa_id, 0)
    keepalive.look()
    keepalive.look()
    (event,) = reported
    assert isinstance(event, PeerSilent)
    assert event.sa_id == sa(Direction.OUT).sa_id
    assert event.seconds >= 0.2
    assert keepalive.silent


def test_the_thread_ends(ends: Ends) -> None:
    keepalive = KeepAlive(ends, intervals={sa(Direction.OUT).spi: 0.1}, silence=0, report=lambda event: None)
    keepalive.start()
    time.sleep(0.3)
    began = time.monotonic()
    keepalive.close()
    assert time.monotonic() - began < 2
    assert ends.dummies
