"""The choice among the data paths: NATCOMPAT_DATAPATH."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, TypeAlias

from natcompat.errors import NatCompatError

if TYPE_CHECKING:
    from natcompat.esp.carrier.portable import Carrier
    from natcompat.esp.engine.data_path import DataPathFactory
    from natcompat.esp.engine.engine import EspEngine
    from natcompat.ipsec.device import PacketDevice

    CarrierFactory: TypeAlias = Callable[[EspEngine, PacketDevice], Carrier]

ENVIRONMENT_VARIABLE: Final = "NATCOMPAT_DATAPATH"
AUTO: Final = "auto"

_BUILDING: Final = (
    "install natcompat anew where there are a C compiler, Python's headers, and libssl-dev or libipsec-mb-dev"
)


@dataclass(frozen=True, slots=True)
class DataPathChoice:
    """A data path, and whether it works in this process."""

    name: str
    viable: bool
    reason: str
    """Why it does not work, or a description."""
    ciphers: str = ""
    """The library of the ciphers, where there is a choice."""
    make_path: DataPathFactory | None = None
    """The factory that `natcompat.esp.engine.engine.EspEngine` takes; None: it does not work here."""
    make_carrier: CarrierFactory | None = None
    """The factory of the carrier; None: it does not work here."""


def probe() -> list[DataPathChoice]:
    """Return every data path, in the order in which ``auto`` prefers them."""
    return [_find(name) for name in _FINDERS]


def select(requested: str | None = None) -> DataPathChoice:
    """Return the data path to use: `requested`, else what the environment variable asks for, else ``auto``.

    Raises `natcompat.errors.NatCompatError`: EINVAL for an unknown name, ENOTSUP for one that does not
    work here; it is never replaced by another.
    """
    asked = requested or os.environ.get(ENVIRONMENT_VARIABLE) or AUTO
    if asked != AUTO and asked not in _FINDERS:
        raise NatCompatError(
            errno.EINVAL,
            f"there is no data path called {asked!r}",
            f"Choose among {AUTO}, {', '.join(_FINDERS)} ({ENVIRONMENT_VARIABLE})",
        )
    for name in _FINDERS if asked == AUTO else (asked,):
        choice = _find(name)
        if choice.viable:
            return choice
    raise NatCompatError(
        errno.ENOTSUP,
        f"the data path {asked} does not work here: {choice.reason}",
        f"Choose one that does ({ENVIRONMENT_VARIABLE}): `natcompat doctor` tells",
    )


def _find(name: str) -> DataPathChoice:
    try:
        return _FINDERS[name]()
    except NatCompatError as error:  # without cryptography
        return DataPathChoice(name, False, f"{error.strerror}; {error.remedy}")


def _find_c() -> DataPathChoice:
    if sys.platform != "linux":
        return DataPathChoice("c", False, "it uses system calls of Linux")
    try:
        from natcompat.esp.carrier.native import NativeCarrier
        from natcompat.esp.datapath.native import NativeDataPath
        from natcompat.esp.datapath.providers import best_provider
    except ModuleNotFoundError:
        return DataPathChoice("c", False, f"it is not built; {_BUILDING}")
    except ImportError as error:  # a library that it was built with is gone
        return DataPathChoice("c", False, f"it cannot be loaded: {error}; {_BUILDING}")
    provider = best_provider()
    if provider is None:
        return DataPathChoice("c", False, "none of its libraries for ciphers works on this processor")
    return DataPathChoice("c", True, f"in C, ciphers by {provider}", provider, NativeDataPath, NativeCarrier)


def _find_python() -> DataPathChoice:
    from natcompat.esp.carrier.portable import PortableCarrier
    from natcompat.esp.engine.portable import PortableDataPath

    return DataPathChoice("python", True, "works everywhere", "", PortableDataPath, PortableCarrier)


_FINDERS: Final[dict[str, Callable[[], DataPathChoice]]] = {"c": _find_c, "python": _find_python}
