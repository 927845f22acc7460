"""The control socket of user-space IPsec: a read-only view for ``natcompat sad``, ``spd`` and others.

Each `ControlSocket` is a unix stream socket ``<pid>-<number>.sock`` of mode 0600 in a directory of mode 0700:
``/run/natcompat`` for root, ``$XDG_RUNTIME_DIR/natcompat`` for other users. The peer has to be the owner or
root (SO_PEERCRED, where the system has it).

The protocol is JSON lines. The server begins with a greeting: ``natcompat`` (version), ``protocol`` (1),
``pid``, ``netns`` (inode of the network namespace, or null) and ``requests`` (a list of names). The client
sends one request, ``{"request": NAME}``. The answer is a line for each object and a last line
``{"end": true}``, with ``"truncated": true`` if there were more than `MOST_ROWS`; or a line
``{"error": TEXT}``. A stream of events begins with ``{"listening": true}`` and has no end. No request changes
anything, and no answer contains keys.

NATCOMPAT_CONTROL: ``none`` for no socket, or an absolute path in place of the directory.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import socket
import struct
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final, Protocol

from natcompat.errors import get_logger
from natcompat.esp.control_directory import directory, listen
from natcompat.ipsec import Events, InstalledSA, PolicyUsage
from natcompat.ipsec.describe import describe_event, describe_policy, describe_sa
from natcompat.ipsec.device import PacketDevice

PROTOCOL: Final = 1
MOST_CLIENTS: Final = 8
"""Clients at one time; more are refused with an error."""
MOST_ROWS: Final = 100_000
"""Objects in one answer."""
LONGEST_REQUEST: Final = 1024
"""Bytes of a request, its line end included."""
PATIENCE: Final = 5.0
"""Seconds for a client to send its request, and to read each part of the answer."""

Objects = Callable[[], Iterable[Mapping[str, Any]]]
"""Returns the objects of an answer. Runs in a thread of the control socket."""

_log = get_logger()


class ControlSocket:
    """Serves `requests` and the streams of `streams` from `start` until `close`, in threads of its own.

    Where no socket can be made, `path` is None and nothing is served: IPsec does not depend on the socket. A
    forked child serves nothing. Raises `NatCompatError` (EINVAL) for a wrong NATCOMPAT_CONTROL.
    """

    def __init__(
        self, requests: Mapping[str, Objects], streams: Mapping[str, Callable[[], Events]] | None = None
    ) -> None:
        self._directory = directory()
        self._requests = dict(requests)
        self._streams = dict(streams or {})
        self._pid = os.getpid()
        self._lock = threading.Lock()
        self._clients: set[threading.Thread] = set()
        self._listener: socket.socket | None = None
        self._stop: tuple[socket.socket, socket.socket] | None = None
        self.path: Path | None = None
        """The path of the socket; None: there is none."""

    def start(self) -> None:
        """Make the socket and serve it; never raises."""
        if self._directory is None:
            return
        try:
            self._listener, self.path = listen(self._directory, MOST_CLIENTS)
        except OSError as error:
            _log.debug("there is no control socket for natcompat sad, spd, events and top: %s", error)
            return
        self._stop = socket.socketpair()
        _open.add(self)
        self._thread = threading.Thread(target=self._accept, name="natcompat-control", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Remove the socket, and end the threads; a client that reads slowly is cut off."""
        if self._listener is None or self._stop is None or os.getpid() != self._pid:
            return
        with self._lock:
            listener, self._listener = self._listener, None
            clients = list(self._clients)
        if listener is None or self.path is None:
            return
        with contextlib.suppress(OSError):  # privileges were given up, or somebody has removed it
            os.unlink(self.path)
        self._stop[1].close()  # wakes every thread
        for thread in (self._thread, *clients):
            if thread is not threading.current_thread():
                thread.join()
        listener.close()
        self._stop[0].close()
        _open.discard(self)

    def abandon(self) -> None:
        """Let go of the descriptors that a forked child has inherited."""
        for sock in (self._listener, *(self._stop or ())):
            if sock is not None:
                sock.close()
        self._listener = self._stop = None

    # --- threads -----------------------------------------------------------------------------------

    def _accept(self) -> None:
        listener, stop = self._listener, self._stop
        if listener is None or stop is None:
            return
        while stop[0] not in _wait(listener, stop[0]):
            try:
                client, _ = listener.accept()
            except OSError:  # it has gone again, or there are too many files
                time.sleep(0.05)
                continue
            thread = threading.Thread(
                target=self._serve, args=(client, stop[0]), name="natcompat-control-client", daemon=True
            )
            with self._lock:
                refused = self._listener is None or len(self._clients) >= MOST_CLIENTS
                if not refused:
                    self._clients.add(thread)
            if refused:
                client.close()
            else:
                thread.start()

    def _serve(self, client: socket.socket, stop: socket.socket) -> None:
        try:
            with client, contextlib.suppress(OSError, ValueError):
                client.settimeout(PATIENCE)
                if _may_ask(client):
                    self._converse(client, stop)
        except Exception:  # noqa: BLE001 - a request that fails must not end this process
            _log.exception("a request to the control socket failed")
        finally:
            with self._lock:
                self._clients.discard(threading.current_thread())

    def _converse(self, client: socket.socket, stop: socket.socket) -> None:
        _send(client, stop, [_greeting([*self._requests, *self._streams])])
        name = _read_request(client, stop)
        if name in self._streams:
            with self._streams[name]() as events:
                _send(client, stop, [{"listening": True}])
                self._stream(client, stop, events)
        elif name in self._requests:
            _send(client, stop, _rows(self._requests[name]()))
        else:
            _send(client, stop, [{"error": "there is no such request"}])

    @staticmethod
    def _stream(client: socket.socket, stop: socket.socket, events: Events) -> None:
        while True:
            ready = _wait(client, stop, events)
            if client in ready or stop in ready:  # a client has nothing more to say: it has gone
                return
            _send(client, stop, ({"time": time.time(), **describe_event(event)} for event in events.read()))


class Served(Protocol):
    """An IPsec of this process, as far as the control socket shows it."""

    datapath: str
    device: PacketDevice

    def list_sas(self) -> list[InstalledSA]: ...  # noqa: D102

    def list_policies(self) -> list[PolicyUsage]: ...  # noqa: D102

    def events(self) -> Events: ...  # noqa: D102

    def counters(self) -> Mapping[Any, int]: ...  # noqa: D102

    def host_counters(self) -> Mapping[str, int]: ...  # noqa: D102


def control_of(ipsec: Served) -> ControlSocket:
    """Return a control socket that shows `ipsec`: ``sas``, ``policies``, ``engine``, ``events``."""

    def engine() -> Iterator[Mapping[str, Any]]:
        yield {
            "datapath": ipsec.datapath,
            "device": getattr(ipsec.device, "name", None),
            "mtu": ipsec.device.mtu,
            "drops": {reason.value: count for reason, count in ipsec.counters().items()},
            "host": dict(ipsec.host_counters()),
        }

    return ControlSocket(
        {
            "sas": lambda: map(describe_sa, ipsec.list_sas()),
            "policies": lambda: map(describe_policy, ipsec.list_policies()),
            "engine": engine,
        },
        {"events": ipsec.events},
    )


_open: weakref.WeakSet[ControlSocket] = weakref.WeakSet()


def _after_fork() -> None:
    for control in list(_open):
        control.abandon()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


# --- one conversation ------------------------------------------------------------------------------


def _greeting(requests: list[str]) -> dict[str, Any]:
    root = sys.modules["natcompat"]  # not imported here: it names the layers above this one
    namespace = None
    with contextlib.suppress(OSError):
        namespace = os.stat("/proc/self/ns/net").st_ino
    return {
        "natcompat": root.__version__,
        "protocol": PROTOCOL,
        "pid": os.getpid(),
        "netns": namespace,
        "requests": requests,
    }


def _wait(*readers: Any, writer: socket.socket | None = None, seconds: float | None = None) -> list[Any]:
    """Return those that are ready, however large their descriptors are; empty after `seconds`."""
    with selectors.DefaultSelector() as selector:
        for reader in readers:
            selector.register(reader, selectors.EVENT_READ)
        if writer is not None:
            selector.register(writer, selectors.EVENT_WRITE)
        return [key.fileobj for key, _ in selector.select(seconds)]


def _may_ask(client: socket.socket) -> bool:
    """Return whether the peer is root or the user of this process; elsewhere the directory's mode decides."""
    if not hasattr(socket, "SO_PEERCRED"):
        return True
    credentials = client.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, user, _ = struct.unpack("3i", credentials)
    return user in (0, os.geteuid(), os.getuid())


def _read_request(client: socket.socket, stop: socket.socket) -> str:
    """Return the name of the request; ValueError: it is none. TimeoutError: it did not come."""
    data, deadline = b"", time.monotonic() + PATIENCE
    while not data.endswith(b"\n"):
        ready = _wait(client, stop, seconds=max(deadline - time.monotonic(), 0))
        if not ready or stop in ready:
            raise TimeoutError
        more = client.recv(LONGEST_REQUEST + 1 - len(data))
        data += more
        if not more or len(data) > LONGEST_REQUEST:
            raise ValueError("no request")
    try:
        request = json.loads(data)
    except RecursionError:
        raise ValueError("no request") from None
    name = request.get("request") if isinstance(request, dict) else None
    if not isinstance(name, str):
        raise ValueError("no request")
    return name


def _rows(objects: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    for number, row in enumerate(objects):
        if number == MOST_ROWS:
            yield {"end": True, "truncated": True}
            return
        yield row
    yield {"end": True}


def _send(client: socket.socket, stop: socket.socket, objects: Iterable[Mapping[str, Any]]) -> None:
    """Send objects as lines; OSError: the client has gone, does not read for `PATIENCE`, or all is to end."""
    buffer = bytearray()
    for row in objects:
        buffer += json.dumps(row).encode("ascii") + b"\n"
        if len(buffer) > 1 << 16:
            _send_all(client, stop, buffer)
            buffer.clear()
    _send_all(client, stop, buffer)


def _send_all(client: socket.socket, stop: socket.socket, data: bytes | bytearray) -> None:
    with memoryview(data) as view:
        sent = 0
        while sent < len(view):
            ready = _wait(stop, writer=client, seconds=PATIENCE)
            if stop in ready or not ready:
                raise TimeoutError
            sent += client.send(view[sent:])
