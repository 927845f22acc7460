"""Output of a running tunnel: a live table on a terminal, plain lines in a pipe, or JSON.

``natcompat tunnel --json`` prints one object a line. Each has ``time`` (seconds since the epoch) and
``event``; later versions may add more:

``up``
    what ``--check --json`` prints: ``file``, ``backend``, ``state_file``, ``endpoint``, ``device`` (null:
    none; ``name``, ``addresses``, ``routes``, ``mtu``), ``sas`` and ``policies`` (as ``natcompat sad`` and
    ``spd`` say them, natcompat/commands/ipsec/__init__.py), ``notes``
``counters``
    each round: ``sas`` (an array as that of ``natcompat top --json``), ``drops`` (why packets went no
    further, and how many so far, as natcompat/esp/engine/results.py counts them; empty with the
    backend linux)
``soft expire``, ``hard expire``, ``mapping change``, ``acquire``, ``events lost``
    as ``natcompat events --json`` says them
``warning``
    ``text``: what is to be known, such as that the state file cannot be written
``down``
    the tunnel is about to be taken down; ``status`` is that of the exit

``--check --json`` prints what ``up`` says, as one object.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Protocol, TextIO

from natcompat.commands.ipsec.lines import event_line
from natcompat.commands.report import Words, complain, print_json, write_line
from natcompat.commands.tables import live, table, write_plain
from natcompat.commands.tunnel.describe import describe
from natcompat.commands.tunnel.file import Tunnel
from natcompat.ipsec import Event
from natcompat.ipsec.describe import Row, describe_event

_REMEMBERED = 6


class Reporter(Protocol):
    """Shows the events of a tunnel. One thread calls it; a method may wait for the reader of its output."""

    def up(self, tunnel: Tunnel, device: str | None, mtu: int | None) -> None:
        """Show that the tunnel is up; `device` is the name of its TUN device."""

    def counters(self, rows: Sequence[Row], drops: Mapping[str, int]) -> None:
        """Show the counters of a round: SAs as rows, and drops by cause."""

    def event(self, event: Event) -> None:
        """Show an event of IPsec."""

    def warn(self, text: str) -> None:
        """Show a warning."""

    def down(self, status: int) -> None:
        """Show that the tunnel is about to be taken down."""

    def close(self) -> None:
        """End the output."""


def reporter(stream: TextIO, *, as_json: bool) -> Reporter:
    """Return the reporter for `stream`: JSON, a live table on a terminal, or lines."""
    if as_json:
        return JsonReporter(stream)
    return LiveReporter(stream) if stream.isatty() else PlainReporter(stream)


class JsonReporter:
    """Prints one JSON object a line."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def up(self, tunnel: Tunnel, device: str | None, mtu: int | None) -> None:  # noqa: D102
        keys = describe(tunnel)
        if keys["device"] is not None and device is not None:
            keys["device"] |= {"name": device, "mtu": mtu}
        self._print("up", keys)

    def counters(self, rows: Sequence[Row], drops: Mapping[str, int]) -> None:  # noqa: D102
        self._print("counters", {"sas": list(rows), "drops": dict(drops)})

    def event(self, event: Event) -> None:  # noqa: D102
        keys = describe_event(event)
        self._print(keys.pop("event"), keys)

    def warn(self, text: str) -> None:  # noqa: D102
        self._print("warning", {"text": text})

    def down(self, status: int) -> None:  # noqa: D102
        self._print("down", {"status": status})

    def close(self) -> None:  # noqa: D102
        pass

    def _print(self, event: str, keys: Row) -> None:
        print_json({"time": time.time(), "event": event, **keys}, stream=self._stream, one_line=True)
        self._stream.flush()


class PlainReporter:
    """Prints lines of text, and warnings on the standard error."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def up(self, tunnel: Tunnel, device: str | None, mtu: int | None) -> None:  # noqa: D102
        self._say(_up(tunnel, device, mtu))
        for note in tunnel.notes:
            self.warn(note)

    def counters(self, rows: Sequence[Row], drops: Mapping[str, int]) -> None:  # noqa: D102
        write_plain(rows, self._stream)
        if drops:
            write_line(_drops(drops), self._stream)
        self._say("")

    def event(self, event: Event) -> None:  # noqa: D102
        self._say(event_line(describe_event(event)))

    def warn(self, text: str) -> None:  # noqa: D102
        complain(text)

    def down(self, status: int) -> None:  # noqa: D102
        self._say(f"{time.strftime('%H:%M:%S')}  going down")

    def close(self) -> None:  # noqa: D102
        pass

    def _say(self, text: str) -> None:
        write_line(text, self._stream)
        self._stream.flush()


class LiveReporter:
    """Draws a table in place, and the last events below."""

    def __init__(self, stream: TextIO) -> None:
        self._live = contextlib.ExitStack()
        self._redraw = self._live.enter_context(live(stream))
        self._title = ""
        self._rows: list[Row] = []
        self._drops: Mapping[str, int] = {}
        self._recent: deque[str] = deque(maxlen=_REMEMBERED)

    def up(self, tunnel: Tunnel, device: str | None, mtu: int | None) -> None:  # noqa: D102
        self._title = _up(tunnel, device, mtu)
        for note in tunnel.notes:
            self.warn(note)

    def counters(self, rows: Sequence[Row], drops: Mapping[str, int]) -> None:  # noqa: D102
        self._rows, self._drops = list(rows), drops
        self._draw()

    def event(self, event: Event) -> None:  # noqa: D102
        self._recent.append(event_line(describe_event(event)))
        self._draw()

    def warn(self, text: str) -> None:  # noqa: D102
        self._recent.append(text)
        self._draw()

    def down(self, status: int) -> None:  # noqa: D102
        self._draw()

    def close(self) -> None:  # noqa: D102
        self._live.close()

    def _draw(self) -> None:
        drops = [_drops(self._drops)] if self._drops else []
        self._redraw(Words(self._title, "bold"), table("SAs", self._rows), *drops, *self._recent)


def _up(tunnel: Tunnel, device: str | None, mtu: int | None) -> str:
    endpoint = tunnel.endpoint
    where = f", device {device} with MTU {mtu}" if device else ""
    return (
        f"Up: {endpoint.local_address} port {endpoint.local_port} to {endpoint.remote_address} port "
        f"{endpoint.remote_port}, backend {endpoint.backend}{where}"
    )


def _drops(drops: Mapping[str, int]) -> str:
    return "dropped: " + ", ".join(f"{count} {reason}" for reason, count in drops.items())
