"""Examines this machine for ``natcompat doctor``: backends, the kernel's ESP, privileges, devices, ports.

`examine` returns the report that ``--json`` prints. ``"schema": 1`` stands for these keys; later
versions of natcompat may add some, and raise the number if one changes its meaning:

``natcompat``
    version of natcompat
``auto``, ``auto_with_consumer``
    the backend that is chosen when nobody asks for one, without and with a consumer of ESP in the
    process (``esp=``); null if none is viable
``requested``
    what NATCOMPAT_BACKEND asks for: ``value`` (null: not set), the ``backend`` that it leads to, or
    the ``error``
``backends``
    a list in the order of preference: ``name``, ``viable``, ``automatic`` (whether auto may choose it),
    ``duties`` (drop_runts, divert_esp, strip_marker, insert_marker: kernel, filter, steering or
    process), ``reason``, ``remedy``
``esp``
    whether this process could install an SA in the kernel: a list with ``family``, ``algorithm``,
    ``support`` (see `natcompat.kernel.xfrm.probe.EspSupport`), ``reason``, ``remedy``
``xfrm``
    what else the kernel's IPsec does for this process, each true, false, or null where it did not
    say: ``bypass`` (endpoints are exempt from IPsec policies), ``keepalive`` (the kernel sends
    NAT-keepalives), ``sa_direction`` (SAs have a direction); ``reason`` and ``remedy`` of what is missing
``pfkey``
    IPsec over PF_KEY, which Linux takes only where NATCOMPAT_IPSEC=pfkey asks for it: ``asked`` (the
    value of NATCOMPAT_IPSEC, or null), ``error`` (why that cannot be had, or null), ``dialect`` (null:
    none is spoken here), ``usable`` (null: not tried), ``reason``, ``remedy``, ``limits`` (a list of
    sentences: what it cannot do)
``privileges``
    ``user`` (effective user id), ``capabilities`` (name to true or false; null where there are none)
``tun``
    ``usable`` (null: cannot be told), ``reason``, ``remedy``, ``stale_rules`` (how many routing rules of
    killed processes there are, which lead to empty tables; null: cannot be told)
``userspace_esp``
    ESP in this process: ``datapath`` (what carries its packets; null: none of those that were asked for
    works, and ``error`` says why), ``requested`` (what NATCOMPAT_DATAPATH asks for, or null), ``datapaths``
    (a list in the order of preference: ``name``, ``viable``, ``reason``), ``device`` (``tun`` or ``queue``:
    where inner packets go unless the program says)
``guard``
    whether policies of ESP in this process are guarded by nf_tables: ``usable`` (null: not tried),
    ``reason``, ``remedy``; without it protection is weaker
``offloads``
    every name of NATCOMPAT_OFFLOADS: ``on``, or why the data path would not use it here
``hand_back``
    how IKE that came to an ESP socket returns to the application: ``way`` (loopback, none), ``reason``
``ports``
    who holds UDP 500 and 4500: ``port``, ``family``, ``address``, ``user``, ``owners`` (a list of
    ``pid`` and ``command``; empty when this process may not see them)
``system``
    ``kernel``, ``machine``, ``python``, ``sandbox`` (a list of what hints at one), ``seccomp``,
    ``unprivileged_bpf``, ``gevent``, ``uvloop`` (versions, or null)
``beyond_solaris``
    what natcompat does and Solaris does not

It changes nothing on the system: what is tried is tried on sockets and in a network namespace of
its own.
"""

from __future__ import annotations

import os
import socket
import sys
from typing import Any, Final

from natcompat.commands.doctor import data_path
from natcompat.commands.doctor.system import (
    capabilities,
    describe_system,
    owners_of_port,
    stale_rules_left,
    tun_device,
)
from natcompat.contract import IKE_PORT, NAT_T_PORT, Duty

SCHEMA: Final = 1

_ALGORITHMS: Final = (
    ("AES-GCM-16", "rfc4106(gcm(aes))", ""),
    ("ChaCha20-Poly1305", "rfc7539esp(chacha20,poly1305)", ""),
    ("AES-CBC with HMAC-SHA2-256", "cbc(aes)", "hmac(sha256)"),
    ("AES-CBC with HMAC-SHA1", "cbc(aes)", "hmac(sha1)"),
)


def examine() -> dict[str, Any]:
    """Return the report, whose keys the module documents. Takes well under a second."""
    from natcompat import __version__, backends

    return {
        "schema": SCHEMA,
        "natcompat": __version__,
        "auto": _choice(backends.AUTO),
        "auto_with_consumer": _choice(backends.AUTO, hands_over_esp=True),
        "requested": _requested(),
        "backends": [
            {
                "name": viability.backend,
                "viable": viability.viable,
                "automatic": viability.automatic,
                "duties": {
                    str(duty.name).lower(): viability.duties[duty].value
                    for duty in Duty
                    if duty in viability.duties
                },
                "reason": _sentence(viability.reason),
                "remedy": _sentence(viability.remedy),
            }
            for viability in backends.probe()
        ],
        "esp": _kernel_esp(),
        "xfrm": _xfrm(),
        "pfkey": _pfkey(),
        "privileges": {
            "user": os.geteuid() if hasattr(os, "geteuid") else None,
            "capabilities": capabilities(),
        },
        "tun": (tun := tun_device() | {"stale_rules": stale_rules_left()}),
        "userspace_esp": (esp := _userspace_esp(tun)),
        "guard": data_path.guard(),
        "offloads": data_path.offloads(esp["datapath"]),
        "hand_back": data_path.hand_back(),
        "ports": [*owners_of_port(IKE_PORT), *owners_of_port(NAT_T_PORT)],
        "system": describe_system(),
        "beyond_solaris": [
            "AF_INET6 sockets are served by the backend userspace, if it is asked for; the kernel answers "
            "EAFNOSUPPORT."
            if backends.is_for_this_system("solaris")
            else "AF_INET6 sockets are served; Solaris answers EAFNOSUPPORT."
        ],
    }


def _choice(name: str, *, hands_over_esp: bool = False) -> str | None:
    from natcompat import backends
    from natcompat.errors import BackendUnavailableError

    try:
        return backends.select(name, hands_over_esp=hands_over_esp).name
    except BackendUnavailableError:
        return None


def _requested() -> dict[str, str | None]:
    from natcompat import backends
    from natcompat.errors import BackendUnavailableError

    asked = os.environ.get(backends.ENVIRONMENT_VARIABLE) or None
    try:
        return {"value": asked, "backend": backends.select().name if asked else None, "error": None}
    except BackendUnavailableError as error:
        text = f"{error.strerror}. {error.remedy}" if error.remedy else error.strerror
        return {"value": asked, "backend": None, "error": text}


def _sentence(text: str) -> str:
    text = text.strip()
    return f"{text[0].upper()}{text[1:].rstrip('.')}." if text else ""


def _kernel_esp() -> list[dict[str, str]]:
    from natcompat.kernel.xfrm.esp_support import EspSupport
    from natcompat.kernel.xfrm.probe import probe_esp, probe_esp_unprivileged

    rows = []
    for family, version in ((socket.AF_INET, "IPv4"), (socket.AF_INET6, "IPv6")):
        for algorithm, encryption, integrity in _ALGORITHMS:
            verdict = probe_esp(encryption, integrity, family=family)
            if verdict.support is EspSupport.NO_PRIVILEGE:
                # whoever has the privilege may get further: say what can be seen from here
                unprivileged = probe_esp_unprivileged(family)
                if unprivileged.support is not EspSupport.AVAILABLE:
                    verdict = unprivileged
            rows.append(
                {
                    "family": version,
                    "algorithm": algorithm,
                    "support": verdict.support.value,
                    "reason": verdict.reason,
                    "remedy": verdict.remedy,
                }
            )
    return rows


def _xfrm() -> dict[str, Any]:
    """Try the exemption of a socket from IPsec policies, and ask XFRM which attributes it knows."""
    from natcompat.errors import NatCompatError
    from natcompat.kernel.xfrm.bypass import bypass
    from natcompat.kernel.xfrm.probe import probe_attributes

    attributes = probe_attributes()
    section: dict[str, Any] = {
        "bypass": None,
        "keepalive": attributes.keepalive,
        "sa_direction": attributes.sa_direction,
    }
    if sys.platform != "linux":
        return {**section, "reason": "XFRM is the IPsec of Linux; this is not Linux.", "remedy": ""}
    try:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
            bypass(sock)
    except NatCompatError as error:
        reason, remedy = _sentence(error.strerror or ""), _sentence(error.remedy)
        return {**section, "bypass": False, "reason": reason, "remedy": remedy}
    return {**section, "bypass": True, "reason": "", "remedy": ""}


def _pfkey() -> dict[str, Any]:
    from natcompat.errors import NatCompatError
    from natcompat.kernel.pfkey.examine import examine as examine_pfkey

    section = {"asked": None, "error": None, **examine_pfkey()}
    if sys.platform == "linux":  # the variable means nothing elsewhere
        from natcompat.backends.linux import MAPPING_VARIABLE, requested_mapping

        section["asked"] = os.environ.get(MAPPING_VARIABLE) or None
        try:
            requested_mapping()
        except NatCompatError as error:
            section["error"] = f"{_sentence(error.strerror or '')} {_sentence(error.remedy)}"
    return section


def _userspace_esp(tun: dict[str, Any]) -> dict[str, Any]:
    from natcompat.errors import NatCompatError
    from natcompat.esp import choice as datapaths

    section: dict[str, Any] = {
        "requested": os.environ.get(datapaths.ENVIRONMENT_VARIABLE) or None,
        "datapath": None,
        "error": None,
        "datapaths": [
            {"name": datapath.name, "viable": datapath.viable, "reason": _sentence(datapath.reason)}
            for datapath in datapaths.probe()
        ],
        "device": "tun" if tun["usable"] else "queue",
    }
    try:
        section["datapath"] = datapaths.select().name
    except NatCompatError as error:
        section["error"] = f"{_sentence(error.strerror or '')} {_sentence(error.remedy)}"
    return section
