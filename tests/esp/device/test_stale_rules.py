"""Rules and routes that a killed process left behind."""

from __future__ import annotations

import contextlib
import io
import re
import signal
import subprocess
import sys

from natcompat.commands.doctor import examine as doctor
from natcompat.commands.doctor import report as doctor_report
from natcompat.esp.device.routes import DeviceRoutes
from natcompat.esp.device.tun import TunDevice
from tests.support.linux import LINUX, ip, isolated
from tests.support.routing import (
    PEER,
    goes_to,
    rules,
    thrown,
    uplink,
)
from tests.support.tun import TUN

pytestmark = [LINUX, TUN]


def doctors_report() -> str:
    with contextlib.redirect_stdout(io.StringIO()) as output:
        doctor_report.show(doctor.examine())
    return output.getvalue()


_OPEN_AND_WAIT = """
from natcompat.esp.device.tun import TunDevice
from natcompat.esp.device.routes import DeviceRoutes, _PAST
from ipaddress import ip_network
import time
devices = [TunDevice(), TunDevice()]
for device, prefer_main in zip(devices, (False, True)):
    routes = DeviceRoutes(device, prefer_main=prefer_main)
    routes.add("0.0.0.0/0")
    routes.add("::/0")
    routes._change({ip_network("192.0.2.0/24"): _PAST})
print("ready", flush=True)
time.sleep(99)
"""


@isolated(network=True)
def test_rules_of_a_killed_process_do_nothing_and_are_removed() -> None:
    before = rules()
    with uplink():
        for how in (signal.SIGTERM, signal.SIGKILL):
            with subprocess.Popen(
                [sys.executable, "-c", _OPEN_AND_WAIT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            ) as process:
                assert process.stdout is not None
                assert process.stdout.readline() == b"ready\n"
                assert rules().count("proto 78") == 6
                assert goes_to(PEER[4]).startswith("natcompat")
                with TunDevice() as device, DeviceRoutes(device) as routes:
                    routes.add("::/0")
                    assert rules().count("proto 78") == 7, "those of a process that lives stay"
                    assert doctor.examine()["tun"]["stale_rules"] == 0
                process.send_signal(how)
            assert [goes_to(PEER[4]), goes_to(PEER[6])] == ["uplink0", "uplink0"]
            assert doctor.examine()["tun"]["stale_rules"] == 6
            assert re.search(r"routing rules +stale +6 of a tunnel that was killed", doctors_report())
            with TunDevice() as device, DeviceRoutes(device) as routes:
                assert rules() == before
                assert thrown(routes._netlink) == []
                routes.add("::/0")
                assert rules().count("proto 78") == 1
            assert rules() == before


@isolated(network=True)
def test_a_device_that_persists_is_taken_over_from_a_killed_process() -> None:
    """It still has the number of its interface, and so the table."""
    before = rules()
    with uplink():
        for persisting in ("natcompat0", "natcompat1"):
            ip("tuntap", "add", "mode", "tun", "name", persisting)
        opening = _OPEN_AND_WAIT.replace("[TunDevice(),", '[TunDevice("natcompat0"),').replace(
            " TunDevice()]", ' TunDevice("natcompat1")]'
        )
        for _ in range(2):
            with subprocess.Popen(
                [sys.executable, "-c", opening], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
            ) as process:
                assert process.stdout is not None
                assert process.stdout.readline() == b"ready\n"
                process.kill()
        for persisting in ("natcompat0", "natcompat1"):
            with TunDevice(persisting) as device, DeviceRoutes(device) as routes:
                assert all(table != routes.table for _, _, table in routes._netlink.routes())
                routes.add("0.0.0.0/0")
                assert goes_to(PEER[4]) == persisting
        assert goes_to(PEER[4]) == "uplink0"
    assert rules() == before
