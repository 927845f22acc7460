"""The registry of backends, and the choice among them.

Built-in backends come first. Other packages register theirs in the entry-point group ``natcompat.backends``:
a class or a function that returns a `natcompat.backends.base.Backend`. A backend that is requested by name is
used or refused; natcompat never substitutes another one.
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
_PLATFORMS: Final = {  # the first letters of sys.platform
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
    """Return whether the backend `name` is for this operating system, or for every one."""
    return sys.platform.startswith(_PLATFORMS.get(name, ""))


def probe() -> list[Viability]:
    """Return the viability of every registered backend, in the order in which ``auto`` prefers them.

    Changes nothing on the system, but the kernel may load its modules for ESP. Takes milliseconds; the first
    call takes up to two seconds where the kernel loads modules.
    """
    return [viability(name) for name in names()]


def viability(name: str) -> Viability:
    """Return whether the backend `name` works here, and if not, why.

    Raises `natcompat.errors.BackendUnavailableError` (EINVAL) if no backend has that name.
    """
    if not is_for_this_system(name):
        return Viability(name, False, reason=f"it is for {_PLATFORMS[name]}; this is {sys.platform}")
    try:
        answer = get(name).viability()
        if not isinstance(answer, Viability):
            raise TypeError(f"its viability() returned {type(answer).__name__}")
        return answer
    except BackendUnavailableError:
        raise
    except Exception as error:  # noqa: BLE001 - a third party's backend must not break the others
        return Viability(
            name, False, reason=f"it failed: {error}", remedy="Report this to the backend's authors."
        )


def get(name: str) -> Backend:
    """Return the backend `name`, viable or not.

    Raises `natcompat.errors.BackendUnavailableError` (EINVAL) if no backend has that name.
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
    """Return the backend to use: `requested`, else the one that NATCOMPAT_BACKEND names, else ``auto``.

    A comma-separated list is an order of preference. `hands_over_esp`: a consumer in this process takes
    ESP, so the backend must hand ESP over. Raises `natcompat.errors.BackendUnavailableError` with the reason
    of every refusal: EINVAL for an unknown name, ENOTSUP if no requested backend is viable, EPERM if a single
    backend was requested and lacks nothing but a privilege.
    """
    refusals: list[str] = []
    code = errno.ENOTSUP
    if requested is not None and not isinstance(requested, str):
        answer = requested.viability()
        if _is_viable(answer, refusals) and _hands_over(requested, hands_over_esp, refusals):
            return requested
        raise BackendUnavailableError(errno.ENOTSUP if answer.viable else answer.code, refusals[0])
    wanted = requested or os.environ.get(ENVIRONMENT_VARIABLE) or AUTO
    for name in filter(None, map(str.strip, wanted.split(","))):
        for candidate in _BUILT_IN if name == AUTO else (name,):
            answer = viability(candidate)
            if name == AUTO and not answer.automatic:
                continue
            if _is_viable(answer, refusals) and _hands_over(get(candidate), hands_over_esp, refusals):
                return get(candidate)
            code = answer.code if len(refusals) == 1 else errno.ENOTSUP
    source = f" ({ENVIRONMENT_VARIABLE}={wanted})" if not requested and wanted != AUTO else ""
    viable = ", ".join(answer.backend for answer in probe() if answer.viable)
    raise BackendUnavailableError(
        code,
        f"no requested backend works here{source}: {'; '.join(refusals) or 'no name was given'}",
        f"Choose among {AUTO}, {viable}; `natcompat doctor` shows the reasons",
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
            "Take ESP yourself with the argument esp of set_nat_t_endpoint(), or choose the backend linux",
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


def _is_viable(answer: Viability, refusals: list[str]) -> bool:
    """Return whether the backend works here; if not, add the reason to `refusals`."""
    if not answer.viable:
        remedy = f" ({answer.remedy.rstrip('.')})" if answer.remedy else ""
        refusals.append(f"{answer.backend}: {answer.reason.rstrip('.')}{remedy}")
    return answer.viable


def _hands_over(backend: Backend, wanted: bool, refusals: list[str]) -> bool:
    """Return whether `backend` gives ESP to this process, or need not; if not, add the reason."""
    if wanted and not backend.hands_over_esp:
        refusals.append(f"{backend.name}: ESP goes to the kernel, so the process cannot have it")
    return backend.hands_over_esp or not wanted


def _entry_points() -> dict[str, Callable[[], object]]:
    from importlib.metadata import entry_points

    return {point.name: point.load for point in entry_points(group=ENTRY_POINT_GROUP)}
