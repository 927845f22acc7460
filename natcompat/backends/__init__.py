"""The registry of backends, and the choice among them.

Built-in names come first; others through the entry-point group ``natcompat.backends`` (a class or
function that returns a `natcompat.backends.base.Backend`). A name that is asked for is used or
refused, never replaced.
"""

from __future__ import annotations

import errno
import importlib
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final, Literal, cast, overload

from natcompat.backends.base import Backend, Viability
from natcompat.errors import BackendUnavailableError, NatCompatError

if TYPE_CHECKING:
    from natcompat.backends.base import DeviceChoice, IPsecBackend, NetworkNamespace
    from natcompat.backends.userspace import UserspaceIPsec
    from natcompat.ipsec import IPsec

ENVIRONMENT_VARIABLE: Final = "NATCOMPAT_BACKEND"
ENTRY_POINT_GROUP: Final = "natcompat.backends"
AUTO: Final = "auto"

_BUILT_IN: Final[dict[str, tuple[str, str, dict[str, Any]]]] = {
    # name: (module, class, arguments), in the order in which `auto` prefers them
    "linux": ("natcompat.backends.linux", "LinuxBackend", {}),
    "solaris": ("natcompat.backends.solaris", "SolarisBackend", {}),
    "freebsd": ("natcompat.backends.bsd", "BsdBackend", {"name": "freebsd"}),
    "netbsd": ("natcompat.backends.bsd", "BsdBackend", {"name": "netbsd"}),
    "openbsd": ("natcompat.backends.bsd", "BsdBackend", {"name": "openbsd"}),
    "macos": ("natcompat.backends.bsd", "BsdBackend", {"name": "macos"}),
    "userspace": ("natcompat.backends.userspace", "UserspaceBackend", {}),
    "userspace:in-line": ("natcompat.backends.userspace", "UserspaceBackend", {"in_line": True}),
}
_PLATFORMS: Final = {  # how sys.platform begins
    "linux": "linux",
    "solaris": "sunos",
    "freebsd": "freebsd",
    "netbsd": "netbsd",
    "openbsd": "openbsd",
    "macos": "darwin",
}

_instances: dict[str, Backend] = {}


def names() -> list[str]:
    """Return the names of all registered backends, built-in ones first."""
    return [*_BUILT_IN, *sorted(_entry_points().keys() - _BUILT_IN.keys())]


def is_for_this_system(name: str) -> bool:
    """Tell whether the backend called `name` is for this operating system, or for any."""
    return sys.platform.startswith(_PLATFORMS.get(name, ""))


def probe() -> list[Viability]:
    """Return the viability of every registered backend, in the order in which ``auto`` prefers them.

    Changes nothing on the system; the kernel may load the modules of ESP. Takes milliseconds, the
    first time up to two seconds where modules are loaded.
    """
    return [viability(name) for name in names()]


def viability(name: str) -> Viability:
    """Return whether the backend called `name` works here, and why not if it does not.

    Raises `natcompat.errors.BackendUnavailableError` (EINVAL) if nobody registered that name.
    """
    if not is_for_this_system(name):
        return Viability(name, False, reason=f"it is for {_PLATFORMS[name]}; this is {sys.platform}")
    try:
        found = get(name).viability()
        if not isinstance(found, Viability):
            raise TypeError(f"its viability() gave {type(found).__name__}")
        return found
    except BackendUnavailableError:
        raise
    except Exception as error:  # noqa: BLE001 - somebody else's backend must not break the others
        return Viability(
            name, False, reason=f"it failed: {error}", remedy="Report this to the backend's authors."
        )


def get(name: str) -> Backend:
    """Return the backend called `name`, viable or not.

    Raises `natcompat.errors.BackendUnavailableError` (EINVAL) if nobody registered that name.
    """
    backend = _instances.get(name)
    if backend is None:
        if name in _BUILT_IN:
            module, attribute, arguments = _BUILT_IN[name]
            make = cast(Callable[..., Backend], getattr(importlib.import_module(module), attribute))
            backend = make(**arguments)
        else:
            points = _entry_points()
            if name not in points:
                raise BackendUnavailableError(
                    errno.EINVAL,
                    f"there is no backend called {name!r}",
                    f"Choose among {AUTO}, {', '.join(filter(is_for_this_system, names()))}",
                )
            backend = cast(Callable[[], Backend], points[name]())()
        _instances[name] = backend
    return backend


def select(requested: str | Backend | None = None, *, hands_over_esp: bool = False) -> Backend:
    """Return the backend to use: `requested`, else what the environment variable asks for, else ``auto``.

    A comma-separated list is an order of preference. `hands_over_esp`: a consumer in this process
    wants ESP. Raises `natcompat.errors.BackendUnavailableError` with a reason for every refusal:
    EINVAL for an unknown name, ENOTSUP if none of those asked for is viable, EPERM if there is one and all
    it lacks is a privilege.
    """
    refusals: list[str] = []
    code = errno.ENOTSUP
    if requested is not None and not isinstance(requested, str):
        found = requested.viability()
        if _viable(found, refusals) and _hands_over(requested, hands_over_esp, refusals):
            return requested
        raise BackendUnavailableError(errno.ENOTSUP if found.viable else found.code, refusals[0])
    asked = requested or os.environ.get(ENVIRONMENT_VARIABLE) or AUTO
    for name in filter(None, map(str.strip, asked.split(","))):
        for candidate in _BUILT_IN if name == AUTO else (name,):
            found = viability(candidate)
            if name == AUTO and not found.automatic:
                continue
            if _viable(found, refusals) and _hands_over(get(candidate), hands_over_esp, refusals):
                return get(candidate)
            code = found.code if len(refusals) == 1 else errno.ENOTSUP
    source = f" ({ENVIRONMENT_VARIABLE}={asked})" if not requested and asked != AUTO else ""
    viable = ", ".join(found.backend for found in probe() if found.viable)
    raise BackendUnavailableError(
        code,
        f"no backend that was asked for works here{source}: {'; '.join(refusals) or 'no name was given'}",
        f"Choose among {AUTO}, {viable}; `natcompat doctor` says more",
    )


@overload
def open_ipsec(
    backend: Literal["userspace", "userspace:in-line"],
    *,
    device: DeviceChoice = "auto",
    netns: NetworkNamespace | None = None,
    lockdown: bool = False,
    follow_mapping: bool = False,
) -> UserspaceIPsec: ...
@overload
def open_ipsec(
    backend: str | Backend | None = None,
    *,
    device: DeviceChoice = "auto",
    netns: NetworkNamespace | None = None,
    lockdown: bool = False,
    follow_mapping: bool = False,
) -> IPsec: ...
def open_ipsec(
    backend: str | Backend | None = None,
    *,
    device: DeviceChoice = "auto",
    netns: NetworkNamespace | None = None,
    lockdown: bool = False,
    follow_mapping: bool = False,
) -> IPsec:
    """Open the SAD and SPD of `backend`, or of the backend that would be chosen without it.

    Close the returned object after use. SAs and policies of a kernel stay in the kernel.

    `device` is where inner packets come from and go to, with ESP in this process: ``"tun"`` a TUN interface,
    ``"queue"`` a `natcompat.esp.device.queue.QueueDevice`, or any `natcompat.ipsec.PacketDevice`. ``"auto"``
    is what the backend has: the kernel's own network stack, or a TUN interface.

    `netns` is the network namespace in which the TUN interface is made: a name of ``ip netns``, the path of
    a namespace file, or its open descriptor. The sockets of endpoints stay in the namespaces where they are.

    With `lockdown`, what the policies cover stays blocked when the process dies, until it starts again or
    `natcompat doctor --clean` ends it. The policies of a kernel outlive the process in any case, so a
    backend whose ESP is the kernel's needs to do nothing for it.

    With `follow_mapping`, ESP in this process follows a peer whose address or port changes, without asking:
    see `natcompat.esp.userspace`.

    Raises `natcompat.errors.BackendUnavailableError` like `natcompat.set_nat_t_endpoint`, and
    `natcompat.errors.NatCompatError`: EPERM without the privilege, ENOTSUP if the backend has no SAD, EINVAL
    if `device`, `netns` or `follow_mapping` is given and ESP is the kernel's.
    """
    chosen = select(backend)
    if not hasattr(chosen, "open_ipsec"):
        raise NatCompatError(
            errno.ENOTSUP,
            f"the backend {chosen.name} keeps no SAs",
            "Take ESP yourself, by the argument esp of set_nat_t_endpoint(), or use the backend linux",
        )
    options: dict[str, Any] = {
        name: value
        for name, value, default in (
            ("device", device, "auto"),
            ("netns", netns, None),
            ("lockdown", lockdown, False),
            ("follow_mapping", follow_mapping, False),
        )
        if value is not default and value != default
    }
    if getattr(chosen, "own_esp", None) is None:
        options.pop("lockdown", None)  # the kernel's policies outlive the process
        if options:
            raise NatCompatError(
                errno.EINVAL,
                f"{', '.join(options)}: for ESP in this process alone; the ESP of the backend "
                f"{chosen.name} is the kernel's",
                "Ask for the backend userspace, or leave them away"
                + ("; or enter the namespace (setns) before open_ipsec()" if "netns" in options else ""),
            )
    return cast("IPsecBackend", chosen).open_ipsec(**options)


def _viable(found: Viability, refusals: list[str]) -> bool:
    """Tell whether the backend works here; if not, say why in `refusals`."""
    if not found.viable:
        remedy = f" ({found.remedy.rstrip('.')})" if found.remedy else ""
        refusals.append(f"{found.backend}: {found.reason.rstrip('.')}{remedy}")
    return found.viable


def _hands_over(backend: Backend, wanted: bool, refusals: list[str]) -> bool:
    """Tell whether `backend` gives ESP to this process, where that is wanted."""
    if wanted and not backend.hands_over_esp:
        refusals.append(f"{backend.name}: ESP goes to the kernel, so the process cannot have it")
    return backend.hands_over_esp or not wanted


def _entry_points() -> dict[str, Callable[[], object]]:
    from importlib.metadata import entry_points

    return {point.name: point.load for point in entry_points(group=ENTRY_POINT_GROUP)}
