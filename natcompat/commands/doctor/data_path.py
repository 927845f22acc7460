"""The doctor's look at ESP in this process: the guard of policies, offloads, and the way of the hand-back."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import sys
import threading
from collections.abc import Callable
from typing import Any, Final

from natcompat.errors import NatCompatError

_UDP_SEGMENT, _UDP_GRO = 103, 104  # linux/udp.h
_CLONE_NEWNET: Final = 0x4000_0000  # linux/sched.h
_WEAKER: Final = (
    "Protection is weaker: routes and rules alone keep what policies cover from leaving in the clear."
)


def guard() -> dict[str, Any]:
    """Try to create the guard of policies (nf_tables) in a network namespace that ends at once."""
    if sys.platform != "linux":
        return {"usable": None, "reason": "nf_tables is Linux's.", "remedy": ""}

    def attempt() -> None:
        from natcompat.esp.device.guard import Guard
        from natcompat.esp.device.host_traffic import PASSED
        from natcompat.esp.device.routes import MARK

        Guard(1, mark=MARK, passed=PASSED).close()

    refusal = _in_a_new_namespace(attempt)
    if refusal is None:
        return {
            "usable": True,
            "reason": "Traffic that policies cover is guarded by nf_tables.",
            "remedy": "",
        }
    if refusal.errno == errno.EPERM:
        return {"usable": None, "reason": "Trying it takes CAP_NET_ADMIN.", "remedy": "Run as root."}
    remedy = getattr(refusal, "remedy", "")
    reason = f"There is no guard in nf_tables: {refusal.strerror or refusal}."
    return {"usable": False, "reason": f"{reason} {_WEAKER}", "remedy": remedy}


def offloads(datapath: str | None) -> dict[str, str]:
    """Return every offload by name: "on", or the reason why the data path would not use it here."""
    from natcompat.esp.device.offloads import OFFLOADS, VARIABLE, enabled

    if datapath != "c":
        return dict.fromkeys(OFFLOADS, "the data path in Python has none")
    try:
        allowed = enabled()
    except ValueError as error:
        return dict.fromkeys(OFFLOADS, str(error))
    states = {name: f"switched off by {VARIABLE}" for name in OFFLOADS if name not in allowed}
    states |= {name: answer for name, answer in _offloads_of_a_tun().items() if name not in states}
    for name, option in (("gso", _UDP_SEGMENT), ("gro", _UDP_GRO)):
        states.setdefault(name, _socket_offload(option))
    for name in ("tcp-gro", "udp-gro"):  # the writer's own work, which a TUN with a header takes
        needs = "tso4" if name == "tcp-gro" else "uso"
        states.setdefault(name, states.get(needs, "not tried") if states.get(needs) != "on" else "on")
    return {name: states.get(name, "not tried") for name in OFFLOADS}


def hand_back() -> dict[str, str]:
    """Return by which way IKE that came to an ESP socket returns to the application, or why it cannot."""
    if sys.platform != "linux":
        return {"way": "none", "reason": "There is no steering here, so nothing has to be handed back."}
    from natcompat.backends.linux_sockets.features import hand_back_refused

    refusal = hand_back_refused()
    if refusal:
        return {"way": "none", "reason": f"{refusal.rstrip('.')}."}
    return {"way": "loopback", "reason": "In envelopes over loopback, which never leave this host."}


def _offloads_of_a_tun() -> dict[str, str]:
    """Ask a TUN device in a network namespace of its own which work its reader can take over."""
    answers: dict[str, str] = {}

    def attempt() -> None:
        from natcompat.esp.device.offloads import tun_flags
        from natcompat.esp.device.tun import TunDevice

        with TunDevice(vnet_header=True) as device:
            for names in (("csum", "tso4", "tso6", "uso"), ("csum", "tso4", "tso6")):
                with contextlib.suppress(NatCompatError):
                    device.set_offload(tun_flags(names))
                    break
            answers.update(device.offloads)

    refusal = _in_a_new_namespace(attempt)
    if refusal is not None:
        reason = f"not tried: {refusal.strerror or refusal}"
        return dict.fromkeys(("csum", "tso4", "tso6", "uso"), reason)
    return answers


def _socket_offload(option: int) -> str:
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            sock.setsockopt(socket.IPPROTO_UDP, option, 1)
    except OSError as error:
        return f"the kernel refuses it: {error.strerror}"
    return "on"


def _in_a_new_namespace(attempt: Callable[[], None]) -> OSError | None:
    """Run `attempt` in a network namespace that ends with it; return its error, or that of the namespace."""
    refusals: list[OSError] = []

    def run() -> None:
        import ctypes

        # this thread alone moves, and the namespace ends with it
        if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNET):
            number = ctypes.get_errno()
            refusals.append(OSError(number, os.strerror(number)))
            return
        try:
            attempt()
        except OSError as error:
            refusals.append(error)

    thread = threading.Thread(target=run, name="natcompat doctor's probe")
    thread.start()
    thread.join()
    return refusals[0] if refusals else None
