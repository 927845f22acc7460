"""`natcompat verify` finds no difference where there is none, and names the row where there is one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from natcompat import backends
from natcompat.commands.verify import trials as verify
from natcompat.commands.verify.conversation import Conversation, Datagram, load
from natcompat.commands.verify.recorded import replay
from natcompat.commands.verify.values import TrialPath
from natcompat.contract import OUTBOUND_TABLE, TABLE, Verdict, classify
from tests.support.running import (
    COMMAND,
    as_nobody,
    children,
    environment,
    run,
    run_on_terminal,
    wait_until_gone,
)

VIABLE = [each.backend for each in backends.probe() if each.viable]
ON_LOOPBACK = "--no-nat", "--json"

BROKEN = """
    import socket
    from natcompat.backends.linux_sockets import filters
    from natcompat.backends.base import Viability
    from natcompat.backends.userspace import InLineAttachment
    from natcompat.contract import Duty, Performer

    DUTIES = {duty: Performer.PROCESS for duty in Duty}


    class Backend:
        hands_over_esp = True

        def __init__(self, name, program=(), claims=DUTIES):
            self.name, self.program, self.claims = name, program, claims

        def viability(self):
            return Viability(self.name, True, self.claims, "it is broken on purpose", automatic=False)

        def attach(self, sock, diversion):
            if self.program:
                filters.attach_filter(sock, self.program)
            attachment = InLineAttachment("broken")
            attachment.duties = self.claims
            attachment.detach = lambda sock: self.program and filters.detach_filter(sock)
            return attachment


    def loses_four_bytes():  # a filter that takes a bare marker for a runt
        length, compare, give = 0x80, 0x35, 0x06
        program = (length, 0, 0, 0), (compare, 0, 1, 8 + 5), (give, 0, 0, 1 << 31), (give, 0, 0, 0)
        return Backend("loses-four-bytes", program)


    def claims_too_much():
        return Backend("claims-too-much", claims={**DUTIES, Duty.DROP_RUNTS: Performer.KERNEL})


    def cuts_messages():  # a filter that cuts what it lets pass
        give = 0x06
        return Backend("cuts-messages", ((give, 0, 0, 8 + 1000),))


    def encapsulates():  # no difference: the kernel shows ICMP errors to nobody who does this
        class Encapsulating(Backend):
            hands_over_esp = False

            def attach(self, sock, diversion):
                sock.setsockopt(socket.IPPROTO_UDP, 100, 2)  # UDP_ENCAP, UDP_ENCAP_ESPINUDP
                attachment = InLineAttachment("encapsulates")
                attachment.detach = lambda sock: sock.setsockopt(socket.IPPROTO_UDP, 100, 0)
                return attachment

        return Encapsulating("encapsulates")


    def loses_everything():
        return Backend("loses-everything", ((0x06, 0, 0, 0),))
"""


def report(*arguments: str, status: int = 0, **more: Any) -> dict[str, Any]:
    done = run("verify", *arguments, **more)
    assert (done.returncode, done.stderr) == (status, "")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def differences(found: dict[str, Any]) -> list[dict[str, Any]]:
    return [each for trial in found["trials"] for each in trial["outcomes"] if not each["passed"]]


@pytest.fixture
def broken(tmp_path: Path) -> dict[str, str]:
    """Register the broken backends; return the environment in which they are."""
    (tmp_path / "broken_backends.py").write_text(textwrap.dedent(BROKEN))
    about = tmp_path / "broken_backends-1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: broken-backends\nVersion: 1\n")
    names = "loses_four_bytes", "claims_too_much", "cuts_messages", "loses_everything", "encapsulates"
    points = "".join(f"{name.replace('_', '-')} = broken_backends:{name}\n" for name in names)
    (about / "entry_points.txt").write_text(f"[natcompat.backends]\n{points}")
    return {"PYTHONPATH": str(tmp_path)}


class TestTheReport:
    def test_every_row_of_the_contract_on_every_backend_that_is_viable(self) -> None:
        found = report(*ON_LOOPBACK)
        assert found["schema"] == 1
        assert found["passed"] is True
        assert [(each["backend"], each["version"]) for each in found["trials"]] == [
            (name, version) for name in VIABLE for version in (4, 6)
        ]
        for trial in found["trials"]:
            rows = [(each["section"], each["row"]) for each in trial["outcomes"]]
            assert rows[: len(TABLE)] == [("inbound", row.name) for row in TABLE]
            outbound = [("outbound", row.name) for row in OUTBOUND_TABLE]
            assert rows[len(TABLE) : len(TABLE) + len(outbound)] == outbound
            assert {name for section, name in rows if section == "socket"} == {
                "option read back",
                "largest message",
                "one byte more",
                "to a closed port",
                "switched off again",
            }
            assert set(trial["duties"]) == {"drop_runts", "divert_esp", "strip_marker", "insert_marker"}

    def test_says_who_did_it_and_whether_select_woke(self) -> None:
        found = report(*ON_LOOPBACK, "--backend", "userspace", "--backend", "userspace:in-line")
        for trial in found["trials"]:
            exact = trial["mode"] == "steering"
            assert exact == (trial["backend"] == "userspace")
            for each in trial["outcomes"]:
                if each["section"] == "inbound" and each["solaris"] in ("dropped", "to ESP"):
                    assert each["performer"] == ("steering" if exact else "process")
                    assert each["woke"] is not exact

    def test_what_was_left_out_has_a_reason(self) -> None:
        skipped = {each["what"]: each for each in report(*ON_LOOPBACK)["skipped"]}
        assert skipped.pop("NAT")["reason"] == "--no-nat was given"
        refused = {
            each.backend: each
            for each in backends.probe()
            if not each.viable and backends.is_for_this_system(each.backend)
        }
        assert {f"backend {name}" for name in refused} == skipped.keys()
        for name, viability in refused.items():
            assert skipped[f"backend {name}"]["reason"] == viability.reason
            assert skipped[f"backend {name}"]["remedy"] == viability.remedy

    def test_text_in_a_pipe_has_every_row_once(self) -> None:
        shown = run("verify", "--no-nat", "--backend", "userspace").stdout
        assert "\x1b" not in shown
        assert "As on Solaris" in shown
        for row in TABLE:
            assert shown.count(f"\n  {row.name} ") >= 1

    @pytest.mark.parametrize("width", [80, 120])
    def test_on_a_terminal(self, width: int) -> None:
        status, shown = run_on_terminal("verify", "--no-nat", width=width)
        assert status == 0
        assert "As on Solaris" in shown
        assert "Traceback" not in shown


class TestDifferences:
    @pytest.mark.parametrize(
        ("backend", "expected"),
        [
            (
                "loses-four-bytes",
                {
                    "bare marker": "nothing",
                    "SPI alone": "nothing",
                    "only the last bit of the SPI": "nothing",
                    "only the first bit of the SPI": "nothing",
                    "four bytes FF": "nothing",
                },
            ),
            (
                "claims-too-much",
                {row.name: "nothing, but select woke for it" for row in TABLE if len(row.payload) < 4},
            ),
            (
                "cuts-messages",
                {
                    "marker and 1400 bytes": "IKE, 996: a5a5a5a5...",
                    "marker and 9000 bytes": "IKE, 996: 5a5a5a5a...",
                    "ESP packet of 1400 bytes": "esp=, 1000: c0de0001...",
                },
            ),
        ],
        ids=lambda value: value if isinstance(value, str) else "",
    )
    def test_a_broken_backend(self, backend: str, expected: dict[str, str], broken: dict[str, str]) -> None:
        found = report(*ON_LOOPBACK, "--backend", backend, status=1, env=broken)
        assert found["passed"] is False
        assert Counter((each["row"], each["arrived"]) for each in differences(found)) == Counter(
            dict.fromkeys(expected.items(), 2)
        )

    def test_the_row_is_named(self, broken: dict[str, str]) -> None:
        done = run("verify", "--no-nat", "--backend", "loses-four-bytes", env=broken)
        assert done.returncode == 1
        assert (
            "differs  loses-four-bytes, inbound, row 'bare marker': Solaris: IKE, 0 bytes; "
            "here: nothing (by process); loopback IPv4, loopback IPv6" in done.stdout
        )
        assert "differs  loses-four-bytes, recorded conversation, keepalive: 7 recorded" in done.stdout
        assert "Not as on Solaris: 11 of " in done.stdout

    def test_a_limit_of_the_kernel_is_told_and_no_difference(self, broken: dict[str, str]) -> None:
        found = report(*ON_LOOPBACK, "--backend", "encapsulates", env=broken)
        limits = [
            (each["row"], each["arrived"])
            for trial in found["trials"]
            for each in trial["outcomes"]
            if each["limit"]
        ]
        assert limits == [("to a closed port", "nothing")] * 2
        assert "limit  encapsulates, to a closed port: The kernel shows ICMP errors to no socket" in (
            run("verify", "--no-nat", "--backend", "encapsulates", env=broken).stdout
        )

    def test_a_backend_that_loses_everything_ends_in_time(self, broken: dict[str, str]) -> None:
        script = (
            "from natcompat.commands.verify import trials; trials.PATIENCE = 0.1\n"
            "from natcompat.commands import main; import sys; sys.argv[1:] = "
            "['verify', '--no-nat', '--backend', 'loses-everything']; main.main()"
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            capture_output=True,
            text=True,
            env=environment(broken),
            timeout=60,
            check=False,
        )
        assert done.returncode == 1, done.stderr
        assert "what was sent behind it did not arrive" in done.stdout
        assert "not tried any more" in done.stdout


class TestReplay:
    @pytest.mark.parametrize("backend", VIABLE)
    def test_every_datagram_goes_where_the_classifier_says(self, backend: str) -> None:
        conversation = load()
        recorded = Counter(classify(each.payload).value for each in conversation.received())
        found = replay(backend, conversation)
        assert found.passed
        assert {each.what: each.recorded for each in found.counts if each.what != "sent"} == {
            verdict.value: recorded[verdict.value] for verdict in Verdict
        }
        assert next(each for each in found.counts if each.what == "ike").arrived == "5 to IKE"
        assert next(each for each in found.counts if each.what == "sent").recorded == 5

    def test_a_difference_is_found(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Where the classifier and the endpoint disagree, it is told."""
        payloads = b"\0\0\0\0IKE", b"\xc0\xde\0\1ESP!"
        datagrams = tuple(Datagram(0, "192.0.2.1", 4500, "192.0.2.2", 4500, payload) for payload in payloads)
        monkeypatch.setattr("natcompat.commands.verify.recorded.classify", lambda payload: Verdict.IKE)
        found = replay("userspace:in-line", Conversation(datagrams))
        assert not found.passed
        assert {each.what for each in found.counts if not each.passed} == {"ike", "esp"}


needs_network = pytest.mark.skipif(sys.platform != "linux", reason="network namespaces are of Linux")


@needs_network
class TestThroughNat:
    def test_as_whoever_runs_this(self) -> None:
        found = report("--json", "--backend", "userspace", "--backend", "userspace:in-line")
        self.check(found)

    def test_as_an_ordinary_user(self) -> None:
        prefix = as_nobody()
        if not prefix:
            pytest.skip("no Python of this version is in an ordinary user's reach")
        self.check(report("--json", "--backend", "userspace", prefix=prefix))

    def check(self, found: dict[str, Any]) -> None:
        assert found["passed"], differences(found)
        if found["nat"] is None:
            (left_out,) = [each for each in found["skipped"] if each["what"] == "NAT"]
            assert left_out["reason"]
            assert left_out["remedy"]
            pytest.skip(f"no NAT can be made here: {left_out['reason']}")
        paths = Counter(each["path"] for each in found["trials"])
        assert set(paths) == {"loopback", "from behind NAT", "to behind NAT"}
        assert len(set(paths.values())) == 1


@needs_network
@pytest.mark.parametrize(
    ("how", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["Ctrl-C", "SIGTERM"]
)
def test_interrupted(how: signal.Signals, status: int, broken: dict[str, str]) -> None:
    """Whatever it is doing: a backend that loses everything keeps it busy for long."""
    names = set(os.listdir("/sys/class/net"))
    process = subprocess.Popen(
        [*COMMAND, "verify", "--backend", "loses-everything"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(broken),
        # a shell's background job ignores Ctrl-C, and this may run in one
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler) and None,
    )
    with process:
        helpers = _wait_for_children(process)
        process.send_signal(how)
        output, errors = process.communicate(timeout=30)
    assert process.returncode == status
    assert "Traceback" not in errors
    assert not output
    assert wait_until_gone(helpers) == []
    assert set(os.listdir("/sys/class/net")) == names


def _wait_for_children(process: subprocess.Popen[str]) -> list[int]:
    """Wait until the three processes of the namespaces are there, or the command goes on without them."""
    deadline = time.monotonic() + 10
    while len(found := children(process.pid)) < 3 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.01)
    return found


def test_trial_needs_no_privilege_and_no_namespace() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as peer:
        peer.bind(("127.0.0.1", 0))
        path = TrialPath("loopback", "127.0.0.1", 0, "127.0.0.1", endpoint_begins=True)
        trial = verify.run("userspace", 4, path, peer)
    assert trial.passed
    assert trial.mode == "steering"


@needs_network
def test_where_nothing_can_be_sent_nothing_is_claimed() -> None:
    """In a namespace of its own, whose loopback interface is down."""
    unshare = shutil.which("unshare")
    if unshare is None:
        pytest.skip("there is no unshare(1)")
    alone = [unshare, "--net"] if os.geteuid() == 0 else [unshare, "--user", "--map-root-user", "--net"]
    if subprocess.run([*alone, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no namespace can be made here")
    done = subprocess.run(
        [*alone, *COMMAND, "verify", "--no-nat"],
        capture_output=True,
        text=True,
        env=environment(),
        check=False,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (1, "")
    assert "Nothing was verified." in done.stdout
    assert "127.0.0.1 cannot be used: Network is unreachable." in done.stdout
    assert "ip link set lo up" in done.stdout
