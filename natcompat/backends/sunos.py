"""Option numbers, privileges and kernel statistics of Solaris and illumos.

They come through the extension `natcompat.backends._solaris` (ffi/solaris/build_solaris.py), which takes
numbers and layouts from the headers of the system on which it is built. Without the extension they come
through ctypes, with the numbers of those headers since 2008. This module has not run on Solaris: see
docs/backends.md.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import struct
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from natcompat.contract import UDP_NAT_T_ENDPOINT

SYS_IP_CONFIG: Final = "sys_ip_config"
"""The privilege for the option and for PF_KEY (secpolicy_ip_config() in policy.c)."""
SYS_NET_CONFIG: Final = "sys_net_config"
"""Implies SYS_IP_CONFIG, in a zone that shares the IP stack of the global zone."""
NET_RAWACCESS: Final = "net_rawaccess"
"""The privilege for raw sockets."""

STATISTICS: Final = (
    ("ip", "ipdrop", "esp_nat_t_ka"),  # payloads under four bytes, NAT-keepalives among them
    ("ip", "ipdrop", "esp_nat_t_ipsec"),  # came to a NAT-T socket protected by IPsec
    ("ip", "ipdrop", "esp_no_sa"),  # ESP whose SA is not one for ESP-in-UDP, or the other way round
    ("ipsecesp", "esp_stat", "sa_port_renumbers"),  # SAs whose peer's port has changed
)
"""Module, name and statistic of the kstats about ESP-in-UDP (ip_drop.c, ipsecesp.c)."""

_KSTAT_NAMED: Final = struct.Struct("=31sB8s")  # kstat_named_t: name, type, the value's first 8 bytes
_KSTAT_TYPES: Final = {1: "=i", 2: "=I", 3: "=q", 4: "=Q"}  # KSTAT_DATA_INT32 and on


class Numbers(NamedTuple):
    """Numbers that the headers of the system define."""

    udp_nat_t_endpoint: int = UDP_NAT_T_ENDPOINT  # netinet/udp.h
    ip_sec_opt: int = 0x22  # netinet/in.h
    ipv6_sec_opt: int = 0x22
    ipsec_pref_never: int = 1
    ipsec_request_size: int = 16  # sizeof (ipsec_req_t)


@functools.cache
def extension() -> Any:
    """Return the extension, None if it was not built."""
    try:
        return importlib.import_module("natcompat.backends._solaris")
    except ImportError:
        return None


def numbers() -> Numbers:
    """Return the numbers of the system's headers, or those that have held since 2008."""
    module = extension()
    if module is None:
        return Numbers()
    lib = module.lib
    return Numbers(
        lib.UDP_NAT_T_ENDPOINT,
        lib.IP_SEC_OPT,
        lib.IPV6_SEC_OPT,
        lib.IPSEC_PREF_NEVER,
        module.ffi.sizeof("ipsec_req_t"),
    )


def security_request(preference: int) -> bytes:
    """Return an ``ipsec_req_t`` with `preference` for AH, ESP and self-encapsulation; 0 requests nothing."""
    module = extension()
    if module is None:
        return struct.pack("=III4x", preference, preference, preference)
    request = module.ffi.new("ipsec_req_t *")
    request.ipsr_ah_req = request.ipsr_esp_req = request.ipsr_self_encap_req = preference
    return bytes(module.ffi.buffer(request))


def in_effect(privilege: str) -> bool | None:
    """Return whether `privilege` is in this process's effective set; None if that is unknown."""
    name = privilege.encode()
    module = extension()
    if module is not None:
        return bool(module.lib.priv_ineffect(name))
    try:
        return bool(ctypes.CDLL(None).priv_ineffect(name))
    except (AttributeError, OSError, TypeError):
        return None


def statistics() -> Mapping[str, int]:
    """Return the kstats about ESP-in-UDP that the kernel has, by their full names.

    They count for all sockets of the IP stack, since it was started.
    """
    module = extension()
    return _statistics_by_ctypes() if module is None else _statistics_by_extension(module)


def _statistics_by_extension(module: Any) -> Mapping[str, int]:
    values = {}
    value = module.ffi.new("uint64_t *")
    for names in STATISTICS:
        if module.lib.natcompat_kstat(*(name.encode() for name in names), value) == 0:
            values[_full_name(*names)] = int(value[0])
    return values


def _statistics_by_ctypes() -> Mapping[str, int]:
    values: dict[str, int] = {}
    with contextlib.suppress(AttributeError, OSError):
        library = ctypes.CDLL("libkstat.so.1", use_errno=True)
        for function in ("kstat_open", "kstat_lookup", "kstat_data_lookup"):
            getattr(library, function).restype = ctypes.c_void_p
        control = library.kstat_open()
        if not control:
            return values
        try:
            for module, name, statistic in STATISTICS:
                value = _kstat(library, ctypes.c_void_p(control), module, name, statistic)
                if value is not None:
                    values[_full_name(module, name, statistic)] = value
        finally:
            library.kstat_close(ctypes.c_void_p(control))
    return values


def _kstat(
    library: ctypes.CDLL, control: ctypes.c_void_p, module: str, name: str, statistic: str
) -> int | None:
    kstat = library.kstat_lookup(control, module.encode(), 0, name.encode())
    if not kstat or library.kstat_read(control, ctypes.c_void_p(kstat), None) < 0:
        return None
    named = library.kstat_data_lookup(ctypes.c_void_p(kstat), statistic.encode())
    if not named:
        return None
    _, kind, octets = _KSTAT_NAMED.unpack(ctypes.string_at(named, _KSTAT_NAMED.size))
    if kind not in _KSTAT_TYPES:
        return None
    value: int = struct.unpack_from(_KSTAT_TYPES[kind], octets)[0]
    return value


def _full_name(module: str, name: str, statistic: str) -> str:
    return f"{module}:0:{name}:{statistic}"  # as kstat(8) writes it
