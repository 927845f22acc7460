"""A model of the kernels that cannot run here: it answers PF_KEY as their documentation and sources say.

It knows the messages from tests/kernel/pfkey/layouts.py and keeps SAs as the extensions that brought
them. What it refuses is what those kernels refuse; that it agrees with natcompat proves only that both
understand the documents alike. Linux is not here: its kernel runs in the lab.
"""

from __future__ import annotations

import contextlib
import errno
import select
import socket
import struct
import threading
import time
from typing import Any

from tests.kernel.pfkey import layouts
from tests.kernel.pfkey.layouts import System, extension

GETSPI, UPDATE, ADD, DELETE, GET, REGISTER, EXPIRE, FLUSH, DUMP = 1, 2, 3, 4, 5, 7, 8, 9, 10
SA, CURRENT, HARD, SOFT, SRC, DST, PROXY, KEY_AUTH, KEY_ENCRYPT, RANGE = 1, 2, 3, 4, 5, 6, 7, 8, 9, 16
KEYS = (KEY_AUTH, KEY_ENCRYPT)
LARGEST = {"freebsd": 28, "netbsd": 25, "openbsd": 40, "macos": 29, "solaris": 27}
"""The greatest extension number of the header."""
SPEED = 10
"""How much faster lifetimes pass."""
SOLARIS_FLAGS = 0x1F_D002 | 0xF << 22 | 0xF << 26

Extensions = dict[int, bytes]
Name = tuple[bytes, int]
SPDUPDATE = 13  # takes the place of a policy, or comes as new (key_spdadd() of KAME, pfkey_spdadd() of Linux)


class RefusedError(Exception):
    """The errno of an answer."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


class ModelKernel:
    """One kernel, served by a thread until `close`."""

    def __init__(self, system: System) -> None:
        self.system = system
        self.esp = 2 if system.name == "openbsd" else 3
        self.sas: dict[Name, Extensions] = {}
        self.added: dict[Name, float] = {}
        self.soft: set[Name] = set()
        self.policies: dict[Any, Extensions] = {}
        self.algorithms = set(range(1, 24))
        """What it has; an SA with another one is refused."""
        self.silent = False
        """It answers nothing any more."""
        self._registered: set[socket.socket] = set()
        self._clients: dict[socket.socket, int] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._wake, self._woken = socket.socketpair()
        self._thread = threading.Thread(target=self._serve, name="model of a kernel")
        self._thread.start()

    def open(self, _: object, family: int, protocol: int, receive_buffer: int) -> socket.socket:
        """Return a PF_KEY socket, or a PF_POLICY socket (protocol 1)."""
        assert (family == 29) if protocol == 1 else (protocol == 2)
        client, server = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with self._lock:
            self._clients[server] = protocol
        self._wake.send(b"x")
        return client

    def close(self) -> None:
        self._closed = True
        self._wake.send(b"x")
        self._thread.join()
        for each in (*self._clients, self._wake, self._woken):
            each.close()

    def _serve(self) -> None:
        while not self._closed:
            with self._lock:
                waiting = [self._woken, *self._clients]
            for each in select.select(waiting, [], [], 0.05)[0]:
                if each is self._woken:
                    each.recv(100)
                    continue
                data = each.recv(1 << 16)
                if data and self.silent:
                    continue
                if data:
                    self._answer(each, data)
                    continue
                with self._lock:
                    del self._clients[each]
                self._registered.discard(each)
                each.close()
            self._expire()

    def _answer(self, client: socket.socket, data: bytes) -> None:
        kind, satype = data[1], data[3]
        seq, pid = struct.unpack_from("=II", data, 8)

        def send(*extensions: bytes, number: int = 0, sequence: int = seq, version: int = data[0]) -> None:
            client.send(
                layouts.message(
                    kind, satype, *extensions, seq=sequence, pid=pid, errno=number, version=version
                )
            )

        try:
            found = self._extensions(data)
            if self._clients[client] == 1:
                self._policy_message(kind, found, send)
            else:
                self._message(client, kind, satype, found, send)
        except RefusedError as refusal:
            echoed = [] if self.system.name in ("solaris", "openbsd") else [_without_key(data[16:])]
            send(*echoed, number=refusal.number)

    def _extensions(self, data: bytes) -> Extensions:
        if struct.unpack_from("=H", data, 4)[0] * 8 != len(data):
            raise RefusedError(errno.EMSGSIZE)
        found: Extensions = {}
        at = 16
        while at < len(data):
            words, number = struct.unpack_from("=HH", data, at)
            if not words or at + 8 * words > len(data) or number in found:
                raise RefusedError(errno.EINVAL)
            if data[0] == 2 and number > LARGEST[self.system.name]:
                raise RefusedError(errno.EINVAL)
            found[number] = data[at : at + 8 * words]
            at += 8 * words
        return found

    # -- SAs

    def _message(self, client: socket.socket, kind: int, satype: int, found: Extensions, send: Any) -> None:
        if kind == REGISTER:
            self._registered.add(client)
            algorithms = b"".join(struct.pack("=BBHHH", number, 8, 0, 512, 0) for number in self.algorithms)
            send(*(extension(layouts.sadb_ext(0, number), bytes(4) + algorithms) for number in (14, 15)))
        elif kind in (GETSPI, ADD, UPDATE, GET, DELETE, FLUSH, DUMP):
            if satype != self.esp:
                raise RefusedError(errno.EINVAL)
            getattr(self, f"_{kind}")(found, send)
        elif self.system.name == "openbsd":
            self._flow(kind, found, send)
        elif self.system.name != "solaris":
            self._spd(kind, found, send)
        else:
            raise RefusedError(errno.EINVAL)

    def _name(self, found: Extensions) -> Name:
        return found[DST][8:], struct.unpack_from(">I", found[SA], 4)[0]

    def _gone(self) -> RefusedError:
        return RefusedError(errno.ENOENT if self.system.name in ("netbsd", "macos") else errno.ESRCH)

    def _1(self, found: Extensions, send: Any) -> None:
        _need(found, SRC, DST, RANGE)
        order = ">" if self.system.name == "solaris" else "="
        smallest, largest = struct.unpack_from(f"{order}II", found[RANGE], 4)
        for spi in range(smallest, min(largest, smallest + 1000) + 1):
            sa = extension(layouts.sadb_sa(0, 1, socket.htonl(spi)))
            new = {SA: sa, SRC: found[SRC], DST: found[DST]}
            if self._name(new) not in self.sas:
                self.sas[self._name(new)] = {**new, CURRENT: _current()}
                send(sa, found[SRC], found[DST])
                return
        raise RefusedError(errno.EEXIST)

    def _3(self, found: Extensions, send: Any) -> None:
        self._check(found)
        name = self._name(found)
        taken = {spi for _, spi in self.sas} if self.system.name == "freebsd" else set()
        if name in self.sas or name[1] in taken:
            raise RefusedError(errno.EEXIST)
        self._install(name, found, send)

    def _2(self, found: Extensions, send: Any) -> None:
        _need(found, SA, SRC, DST)
        name = self._name(found)
        if name not in self.sas:
            raise self._gone()
        old = self.sas[name]
        if old[SA][9] == 0:  # larval
            self._check(found)
            self._install(name, found, send)
            return
        new = {**old, **{number: found[number] for number in (HARD, SOFT) if number in found}}
        if self.system.name == "freebsd":
            new.update({number: found[number] for number in (20, 21, 22) if number in found})
            for number, other in ((27, SRC), (28, DST)):
                if number in found:
                    new[other] = found[number][:2] + other.to_bytes(2, "little") + found[number][4:]
        elif self.system.name == "openbsd":
            if any(number in found for number in KEYS):
                raise RefusedError(errno.EINVAL)
            new.update({number: found[number] for number in (31, SRC) if number in found})
            if PROXY in found:
                new[DST] = found[PROXY][:2] + DST.to_bytes(2, "little") + found[PROXY][4:]
        else:
            raise RefusedError(errno.EINVAL)
        if self._name(new) != name and self._name(new) in self.sas:
            raise RefusedError(errno.EEXIST)
        del self.sas[name]
        self.sas[self._name(new)] = new
        send(*_without_keys(new))

    def _check(self, found: Extensions) -> None:
        """Refuse what the kernel refuses of an SA that is to be installed."""
        _need(found, SA, DST)
        name = self.system.name
        if name != "openbsd":
            _need(found, SRC)
        _, state, auth, encrypt, flags = struct.unpack_from("=BBBBI", found[SA], 8)
        if name in ("freebsd", "netbsd", "macos"):
            _need(found, KEY_ENCRYPT)
            if (HARD in found) != (SOFT in found) or self._name(found)[1] <= 255:
                raise RefusedError(errno.EINVAL)
        if (auth and auth not in self.algorithms) or encrypt not in self.algorithms:
            raise RefusedError(errno.EINVAL)
        for number in KEYS:
            if number in found:
                bits = struct.unpack_from("=H", found[number], 4)[0]
                if len(found[number]) != 8 + -(-bits // 64) * 8:
                    raise RefusedError(errno.EINVAL)
        if name in ("openbsd", "solaris") and state != 1:
            raise RefusedError(errno.EINVAL)
        if name == "openbsd" and (found[DST][4:8] != bytes(4) or bool(flags & 0x200) != (31 in found)):
            raise RefusedError(errno.EINVAL)
        if name == "macos" and flags & 2 and (len(found[SA]) != 24 or found[SA][16:18] == bytes(2)):
            raise RefusedError(errno.EINVAL)
        if name == "freebsd" and flags & ~0xFFF:
            raise RefusedError(errno.EINVAL)
        if name == "solaris":
            self._check_solaris(found, flags, encrypt, auth)

    def _check_solaris(self, found: Extensions, flags: int, encrypt: int, auth: int) -> None:
        tunnel, loc, rem = flags & 0x20000, flags & 0x100000, flags & 0x80000
        outer = {0: None, 4: 2, 41: 26}[found[SRC][4]]
        wrong = (
            flags & ~SOLARIS_FLAGS,
            bool(flags & 0x4000) == bool(flags & 0x8000),  # one direction, in every SA of natcompat's
            bool(loc) != (20 in found),
            bool(rem) != (21 in found),
            bool(tunnel) != (7 in found) or (7 in found) != (22 in found),
            tunnel and struct.unpack_from("=H", found[7], 8)[0] != outer,
            21 in found and found[21][12:16] == bytes(4) and not tunnel,
            (KEY_ENCRYPT in found) == (encrypt == 11),
            encrypt == 11 and not auth,
            CURRENT in found,
        )
        if any(wrong):
            raise RefusedError(errno.EINVAL)

    def _install(self, name: Name, found: Extensions, send: Any) -> None:
        new = dict(found)
        if 20 in new and self.system.name in ("freebsd", "netbsd") and not {21, 22} <= new.keys():
            for number in (20, 21, 22):
                new.pop(number, None)  # not all three: passed over in silence
        self.sas[name] = {**new, CURRENT: _current()}
        self.added[name] = time.monotonic()
        send(*_without_keys(new))

    def _5(self, found: Extensions, send: Any) -> None:
        send(*self._find(found).values())

    def _4(self, found: Extensions, send: Any) -> None:
        self._find(found)
        del self.sas[self._name(found)]
        send(*_without_keys(found))

    def _find(self, found: Extensions) -> Extensions:
        _need(found, SA, DST)
        if self.system.name not in ("openbsd", "solaris"):
            _need(found, SRC)
        sa = self.sas.get(self._name(found))
        # NetBSD: the ports are a part of the addresses
        if sa is None or (self.system.name == "netbsd" and 21 in sa and sa[21] != found.get(21)):
            raise self._gone()
        if SRC in found and found[SRC][8:] != sa[SRC][8:]:
            raise self._gone()
        return sa

    def _9(self, _: Extensions, send: Any) -> None:
        self.sas.clear()
        send()

    def _10(self, _: Extensions, send: Any) -> None:
        self._dump([list(each.values()) for each in self.sas.values()], send)

    def _dump(self, records: list[list[bytes]], send: Any) -> None:
        if self.system.name == "openbsd":
            for record in records:
                send(*record)
        elif self.system.name == "solaris":
            for record in records:
                send(*record)
            send(sequence=0)
        elif not records:
            raise RefusedError(errno.ENOENT)
        for number, record in enumerate(records, 1 - len(records)):
            if self.system.name not in ("openbsd", "solaris"):
                send(*record, sequence=-number)

    def _expire(self) -> None:
        for name, sa in [(name, self.sas[name]) for name in self.added if name in self.sas]:
            age = SPEED * (time.monotonic() - self.added[name])
            for number in (HARD, SOFT):
                limit = struct.unpack_from("=Q", sa[number], 16)[0] if number in sa else 0
                if not limit or age < limit or (number == SOFT and name in self.soft):
                    continue
                if number == HARD:
                    self.sas.pop(name, None)
                self.soft.add(name)
                told = [sa[each] for each in (SA, CURRENT, number, SRC, DST, 19) if each in sa]
                if self.system.name in ("openbsd", "solaris"):
                    told = [each for each in told if each[2] != 19]
                for client in self._registered:
                    with contextlib.suppress(BrokenPipeError):
                        client.send(layouts.message(EXPIRE, self.esp, *told))
                break

    def tell(self, kind: int, *extensions: bytes, seq: int = 0, satype: int | None = None) -> None:
        """Send a message to whoever has registered."""
        message = layouts.message(kind, self.esp if satype is None else satype, *extensions, seq=seq)
        self.tell_raw(message)

    def tell_raw(self, message: bytes) -> None:
        for client in self._registered:
            client.send(message)

    # -- policies

    def _spd(self, kind: int, found: Extensions, send: Any) -> None:
        if kind == 19:
            self.policies.clear()
            send()
        elif kind == 18:
            self._dump([list(each.values()) for each in self.policies.values()], send)
        elif kind in (SPDUPDATE, 14, 15):
            _need(found, SRC, DST, 18)
            name = found[SRC][4:], found[DST][4:], found[18][6]
            if kind != SPDUPDATE and (name in self.policies) == (kind == 14):
                raise RefusedError(errno.EEXIST) if kind == 14 else self._gone()
            if kind in (SPDUPDATE, 14):
                self.policies[name] = {**found, CURRENT: _current()}
            else:
                del self.policies[name]
            send(*found.values())
        elif kind == 16:
            number = struct.unpack_from("=I", found[18], 8)[0]
            if number >= len(self.policies):
                raise self._gone()
            send(*list(self.policies.values())[number].values())
        else:
            raise RefusedError(errno.EINVAL)

    def _flow(self, kind: int, found: Extensions, send: Any) -> None:
        if kind == 15:
            _need(found, 25)
            if not self.policies:
                raise RefusedError(errno.ESRCH)
            send(*next(iter(self.policies.values())).values())
            return
        if kind not in (12, 13):
            raise RefusedError(errno.EINVAL)
        _need(found, 17, 18, 20, 21, 22)
        name = *(found[number][4:] for number in (17, 18, 21, 22)), found.get(19), found[20][5]
        if (name in self.policies) == (kind == 12):
            raise RefusedError(errno.EEXIST if kind == 12 else errno.ESRCH)
        if kind == 12:
            self.policies[name] = found
        else:
            del self.policies[name]
        send(*found.values())

    def _policy_message(self, kind: int, found: Extensions, send: Any) -> None:
        """Answer on a PF_POLICY socket."""
        if kind == 1:
            self.policies.clear()
            send()
        elif kind == 6:
            border = extension(layouts.sadb_ext(0, 8), struct.pack("=IQ", len(self.policies), 1))
            send(border)
            for each in self.policies.values():
                send(*each.values())
            send(border)
        elif kind in (2, 3):
            _need(found, 7, *([6] if kind == 2 else []))
            flags = struct.unpack_from("=I", found[7], 8)[0]
            if not flags & 3 or (flags & 4 and 10 not in found):
                raise RefusedError(errno.EINVAL)
            name = flags, *(found.get(number) for number in (1, 2, 3, 4, 5, 10))
            if (name in self.policies) == (kind == 2):
                raise RefusedError(errno.EEXIST if kind == 2 else errno.ESRCH)
            if kind == 2:
                self.policies[name] = found
            else:
                del self.policies[name]
            send(*found.values())
        else:
            raise RefusedError(errno.EINVAL)


def _need(found: Extensions, *numbers: int) -> None:
    if any(number not in found for number in numbers):
        raise RefusedError(errno.EINVAL)


def _current() -> bytes:
    return extension(layouts.sadb_lifetime(0, CURRENT, 0, 0, int(time.time()), 0))


def _without_keys(found: Extensions) -> list[bytes]:
    return [each for number, each in found.items() if number not in KEYS]


def _without_key(extensions: bytes) -> bytes:
    """Return the extensions of a request as an error echoes them: keys are zeros."""
    found = bytearray(extensions)
    at = 0
    while at + 4 <= len(found):
        words, number = struct.unpack_from("=HH", found, at)
        if not words:
            break
        if number in KEYS:
            found[at + 8 : at + 8 * words] = bytes(len(found[at + 8 : at + 8 * words]))
        at += 8 * words
    return bytes(found)
