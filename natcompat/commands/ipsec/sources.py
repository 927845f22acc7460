"""The databases that a command shows: those of the kernel, and those of running user-space IPsec."""

from __future__ import annotations

import contextlib
import errno
import select
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Self

import click

from natcompat.commands.ipsec.engines import Engine, engines
from natcompat.commands.report import complain
from natcompat.errors import NatCompatError
from natcompat.ipsec.describe import Row, describe_event, describe_policy, describe_sa

if TYPE_CHECKING:
    from natcompat.ipsec import Events, IPsec

_RESCAN: Final = 2.0
"""Seconds between two looks for engines that have begun."""
_NUMBER: Final = (int, float)
_MAYBE: Final = (int, float, type(None))
_FORM_OF_SA: Final = {
    "spi": str,
    "source": str,
    "destination": str,
    "state": str,
    "description": str,
    "packets": int,
    "octets": int,
    "added": _NUMBER,
    "replay_drops": _MAYBE,
    "window_drops": _MAYBE,
    "integrity_drops": _MAYBE,
}
_FORM_OF_POLICY: Final = {
    "direction": str,
    "selector": str,
    "action": str,
    "mode": str,
    "priority": _MAYBE,
    "optional": bool,
    "last_used": _MAYBE,
}


def open_kernel() -> IPsec:
    """Open the IPsec of this machine's kernel: XFRM, or PF_KEY where that is what there is."""
    from natcompat.backends.linux import LinuxBackend
    from natcompat.kernel import pfkey
    from natcompat.kernel.pfkey.examine import dialect_here

    dialect = dialect_here()
    if dialect is None:
        raise click.ClickException(f"natcompat knows no IPsec databases of {sys.platform}")
    return LinuxBackend().open_ipsec() if dialect.name == "linux" else pfkey.open_ipsec(dialect.name)


class Sources:
    """The kernel's IPsec and every running engine of this network namespace.

    Where engines answer, a kernel that does not is a remark on the standard error; where none does, it is the
    error of the command (`click.ClickException`).
    """

    def __init__(self) -> None:
        self._kernel: IPsec | None = None
        self._refusal: str | None = None
        self._remarked = False

    def __enter__(self) -> Self:
        try:
            self._kernel = open_kernel()
        except NatCompatError as error:
            if error.errno == errno.EINVAL:  # NATCOMPAT_IPSEC asks for what there is not
                raise
            self._refusal = _words(error)
        except click.ClickException as error:
            self._refusal = error.message
        return self

    def __exit__(self, *_: object) -> None:
        if self._kernel is not None:
            self._kernel.close()

    def sas(self, *, show_keys: bool = False) -> list[Row]:
        """Return the SAs as JSON objects, in the order of their addresses; keys only of the kernel's."""
        rows = self._gather(
            "sas",
            _FORM_OF_SA,
            lambda ipsec: (describe_sa(sa, show_keys=show_keys) for sa in ipsec.list_sas()),
        )
        return sorted(rows, key=lambda row: (row["source"], row["destination"], row["spi"]))

    def policies(self) -> list[Row]:
        """Return the policies as JSON objects, in the order in which they are looked up."""
        rows = self._gather(
            "policies", _FORM_OF_POLICY, lambda ipsec: map(describe_policy, ipsec.list_policies())
        )
        return sorted(rows, key=lambda row: (row["direction"], row["engine"], row["priority"] or 0))

    def events(self, timeout: float | None) -> Iterator[Row]:
        """Yield the events of all sources as they happen, until `timeout` seconds are over (None: never)."""
        deadline = None if timeout is None else time.monotonic() + timeout
        listening: dict[Path, Engine] = {}
        with contextlib.ExitStack() as stack:
            stack.callback(_close, listening)
            kernel = self._kernel_events(stack)
            due = time.monotonic()
            while True:
                now = time.monotonic()
                if deadline is not None and now >= deadline:
                    return
                if now >= due:
                    _listen_to_new(listening)
                    self._judge(answered=bool(listening))
                    due = now + _RESCAN
                seconds = due - now if deadline is None else min(due, deadline) - now
                sources: list[Any] = [*listening.values(), *([] if kernel is None else [kernel])]
                for source in select.select(sources, [], [], max(seconds, 0))[0]:
                    if isinstance(source, Engine):
                        yield from _events_of(source, listening)
                    else:
                        for event in source.read():
                            yield {
                                "time": time.time(),
                                "engine": "kernel",
                                "pid": None,
                                **describe_event(event),
                            }

    def _kernel_events(self, stack: contextlib.ExitStack) -> Events | None:
        if self._kernel is None:
            return None
        try:
            return stack.enter_context(self._kernel.events())
        except NatCompatError as error:
            self._refusal = _words(error)
            return None

    def _gather(
        self,
        request: str,
        form: dict[str, Any],
        of_kernel: Callable[[IPsec], Iterable[Row]],
    ) -> list[Row]:
        rows: list[Row] = []
        if self._kernel is not None:
            try:
                rows = [{**row, "engine": "kernel", "pid": None} for row in of_kernel(self._kernel)]
                self._refusal = None
            except NatCompatError as error:
                self._refusal = _words(error)
        answered = False
        for engine in engines(request):
            with engine, contextlib.suppress(OSError, ValueError):
                for row in engine.ask(request):
                    if all(isinstance(row.get(name), kind) for name, kind in form.items()):
                        rows.append({**row, "engine": "userspace", "pid": engine.pid})
                answered = True
        self._judge(answered=answered)
        return rows

    def _judge(self, *, answered: bool) -> None:
        """Raise or remark why the kernel's entries are missing, if they are."""
        if self._refusal is None:
            return
        if not answered:
            raise click.ClickException(self._refusal)
        if not self._remarked:
            self._remarked = True
            complain(f"without the kernel's: {self._refusal}")


def _close(listening: dict[Path, Engine]) -> None:
    for engine in listening.values():
        engine.close()


def _listen_to_new(listening: dict[Path, Engine]) -> None:
    """Listen to the engines that have begun since the last call, too."""
    for engine in engines("events"):
        if engine.path in listening:
            engine.close()
            continue
        try:
            engine.listen()
        except (OSError, ValueError):
            engine.close()
        else:
            listening[engine.path] = engine


def _events_of(engine: Engine, listening: dict[Path, Engine]) -> Iterator[Row]:
    """Yield the events that have arrived from `engine`; forget the engine when it is gone."""
    try:
        events = engine.read_events()
    except (OSError, ValueError):
        events = None
    if events is None:
        engine.close()
        del listening[engine.path]
    for row in events or ():
        if isinstance(row.get("event"), str):
            yield {**row, "time": time.time(), "engine": "userspace", "pid": engine.pid}


def _words(error: NatCompatError) -> str:
    return ". ".join(filter(None, (error.strerror, error.remedy)))
