"""Answers to netlink requests are taken from the kernel's port alone, by every reader."""

from __future__ import annotations

import ast
import errno
import os
import socket
import struct
import sys
from pathlib import Path

import pytest

from tests.support.linux import isolated, set_up
from tests.support.running import ROOT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="netlink is Linux's")

NLMSG_ERROR = 2


def forged_error(sequence: int, code: int) -> bytes:
    """Return an NLMSG_ERROR for the request `sequence`."""
    body = struct.pack("=i16x", -code)
    return struct.pack("=IHHII", 16 + len(body), NLMSG_ERROR, 0, sequence, 0) + body


@isolated(network=True)
def test_an_answer_of_another_process_is_passed_over() -> None:
    """Without that, whoever has CAP_NET_ADMIN in the namespace makes requests fail, or seem to succeed."""
    from natcompat.kernel.xfrm.netlink import NETLINK_ROUTE, LocalAddresses, Netlink

    set_up("lo")
    addresses = LocalAddresses()
    netlink: Netlink = addresses._netlink
    port = netlink.socket.getsockname()[0]
    read_end, write_end = os.pipe()
    child = os.fork()
    if not child:
        other = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, NETLINK_ROUTE)
        for sequence in range(1, 5):
            other.sendto(forged_error(sequence, errno.EEXIST), (port, 0))
        os.write(write_end, b"sent")
        os._exit(0)
    assert os.read(read_end, 10) == b"sent"
    os.waitpid(child, 0)
    assert netlink.socket.recv(100, socket.MSG_PEEK), "the forged answers are in the queue"
    from ipaddress import ip_address

    assert ip_address("127.0.0.1") in addresses
    addresses.close()


def test_every_reader_asks_who_sent() -> None:
    """No module calls recv() on a netlink socket but `receive`, or it looks at the port itself."""
    silent = []
    for folder in ("natcompat/kernel/xfrm", "natcompat/esp/device"):
        for path in sorted((ROOT / folder).glob("*.py")):
            tree = ast.parse(path.read_text("utf-8"))
            for call in ast.walk(tree):
                if (
                    isinstance(call, ast.Call)
                    and isinstance(call.func, ast.Attribute)
                    and (
                        call.func.attr in ("recv", "recv_into")
                        and "netlink" in ast.unparse(call.func).lower()
                    )
                ):
                    silent.append(f"{path.name}:{call.lineno}")
    assert not silent
    assert Path(ROOT / "natcompat/kernel/xfrm/netlink.py").exists()
