"""Reads and checks a tunnel's file: endpoint, device, SAs and policies as values of `natcompat.ipsec`."""

from __future__ import annotations

import os
import re
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from ipaddress import IPv4Interface, IPv6Interface
from pathlib import Path
from typing import Any, TypeAlias

from natcompat.commands.tunnel import form
from natcompat.commands.tunnel.files import expand, open_file, read_all, refuse_if_shared
from natcompat.commands.tunnel.form import Place, Table, hide_keys
from natcompat.commands.tunnel.keys import KeyReader
from natcompat.commands.tunnel.state import COUNTING
from natcompat.errors import NatCompatError
from natcompat.ipsec import (
    Action,
    Direction,
    Encr,
    Integ,
    IPAddress,
    IPNetwork,
    Lifetime,
    Mode,
    Policy,
    SecurityAssociation,
    TrafficSelector,
    UDPEncapsulation,
)

IPInterface: TypeAlias = IPv4Interface | IPv6Interface


@dataclass(frozen=True, slots=True, kw_only=True)
class Endpoint:
    """The UDP endpoint that carries ESP."""

    backend: str
    local_address: IPAddress
    local_port: int
    remote_address: IPAddress
    remote_port: int
    follow_mapping: bool
    keepalive: str
    """``esp``: authentic dummy packets; ``nat``: NAT-keepalives, of SAs with nat_keepalive; ``none``."""
    silence: int
    """Seconds without an authentic packet after which the peer counts as silent; 0: never."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """The TUN device for the inner packets."""

    name: str
    addresses: tuple[IPInterface, ...]
    routes: tuple[IPNetwork, ...]
    mtu: int | None
    """None: what the SAs leave of the outer path's."""
    lockdown: bool = False
    """What the policies cover stays blocked after the process, until it starts again."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tunnel:
    """The contents of a tunnel's file."""

    path: Path
    endpoint: Endpoint
    device: Device | None
    associations: tuple[SecurityAssociation, ...]
    policies: tuple[Policy, ...]
    state: Path | None
    """The file that keeps sequence numbers across restarts."""
    notes: tuple[str, ...]
    """Remarks on settings that are permitted but weaken the tunnel."""


def read_tunnel(path: Path, *, backend: str | None = None) -> Tunnel:
    """Read and check the file `path`, and the keys that it names; `backend` takes the place of its own.

    Raises `ConfigurationError`, whose message names file, line, table and key, and never shows key
    material. Touches nothing else: no socket, no device, no state file.
    """
    descriptor = open_file(path, "the file")
    try:
        content = read_all(descriptor, path, "the file")
        refuse_if_shared(descriptor, path, "the file", readable=True)
        tunnel, holds_keys = _read(path, content, backend)
        if holds_keys:
            refuse_if_shared(descriptor, path, "keys stand in it, and the file")
        return tunnel
    finally:
        os.close(descriptor)


def _read(path: Path, content: bytes, backend: str | None) -> tuple[Tunnel, bool]:
    text, top = _parse(path, content)
    place = Place(path, text)
    values = place.read(top, form.TOP)
    keys = KeyReader(place)
    at = Place(path, text, "endpoint")
    settings = at.read(values["endpoint"], form.ENDPOINT)
    if backend is not None:
        settings["backend"] = backend
    endpoint = Endpoint(**{**settings, "keepalive": _keepalive(at, settings, values["device"])})
    if endpoint.local_address.version != endpoint.remote_address.version:
        raise at.error("remote_address", "local_address is of the other IP version", form.ADDRESS.right)
    associations = [
        _association(Place(path, text, "sa", number), table, endpoint, keys)
        for number, table in enumerate(values["sa"], 1)
    ]
    policies = [
        _policy(Place(path, text, "policy", number), table, endpoint)
        for number, table in enumerate(values["policy"], 1)
    ]
    state = values["state"] and path.parent / expand(values["state"], "the state file")
    _check_associations(place, associations)
    _check_policies(place, policies, associations)
    _check_nonces(place, endpoint.backend, associations, state)
    _check_means(place, endpoint.backend, associations)
    device = _device(Place(path, text, "device"), values["device"], policies)
    tunnel = Tunnel(
        path=path,
        endpoint=endpoint,
        device=device,
        associations=tuple(associations),
        policies=tuple(policies),
        state=state,
        notes=tuple(_notes(endpoint, device, associations, state)),
    )
    return tunnel, keys.inline


def _keepalive(place: Place, settings: dict[str, Any], device: Table | None) -> str:
    """Return the kind of keepalives: dummy packets, unless the backend or the device rules them out."""
    asked: str | None = settings["keepalive"]
    if settings["backend"] == "linux":
        if asked == "esp":
            raise place.error(
                "keepalive",
                "the kernel sends no dummy packets",
                'Write "nat", or use the backend userspace',
            )
        return asked or "nat"
    sends = device is not None and device.get("kind", "tun") == "tun"
    return asked or ("esp" if sends else "nat")


def _parse(path: Path, content: bytes) -> tuple[str, Table]:
    place = Place(path, "")
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise place.error("", f"line {line} is no UTF-8 text", "Save the file as UTF-8") from None
    try:
        return text, tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # a number of 5000 digits is not even a TOMLDecodeError
        problem = str(error) if isinstance(error, tomllib.TOMLDecodeError) else "a value is too long or deep"
    position = re.search(r"\s*\(at line (\d+), column (\d+)\)$", problem)
    reason = hide_keys(problem[: position.start()] if position else problem)
    where = f"line {position[1]}, column {position[2]}: " if position else ""
    raise place.error("", f"{where}this is not TOML: {reason}", "See https://toml.io, or --example")


# --- SAs -----------------------------------------------------------------------------------------


def _association(place: Place, table: Table, endpoint: Endpoint, keys: KeyReader) -> SecurityAssociation:
    values = place.read(table, form.SA)
    for name, transform in (("encryption_key", values["encryption"]), ("integrity_key", values["integrity"])):
        given = values[name]
        if given is None and transform not in (Encr.NULL, Integ.NONE):
            raise place.error("", f"{name} is missing", f"{transform.name} takes one")
        values[name] = b"" if given is None else keys.read(place, name, given)
    if values["lifetime"] is not None:
        inner = replace(place, inner="lifetime")
        values["lifetime"] = _made(inner, Lifetime, inner.read(values["lifetime"], form.LIFETIME))
    else:
        del values["lifetime"]
    ends = endpoint.local_address, endpoint.remote_address
    ends = ends if values["direction"] is Direction.OUT else ends[::-1]
    values["source"], values["destination"] = values["source"] or ends[0], values["destination"] or ends[1]
    values["encapsulation"] = UDPEncapsulation(
        local_port=endpoint.local_port, remote_port=values.pop("remote_port") or endpoint.remote_port
    )
    sa: SecurityAssociation = _made(place, SecurityAssociation, values)
    local = sa.source if sa.direction is Direction.OUT else sa.destination
    if local != endpoint.local_address:
        key = "source" if sa.direction is Direction.OUT else "destination"
        raise place.error(
            key,
            f"{local} is not the local_address of [endpoint]",
            f"Leave {key} away, or write {endpoint.local_address}",
        )
    return sa


def _made(place: Place, make: Any, values: dict[str, Any]) -> Any:
    """Return ``make(**values)``; its ValueError begins with the name of the key, and shows no other."""
    try:
        return make(**values)
    except ValueError as error:
        problem = str(error)
    names, _, reason = problem.partition(": ")
    raise place.error(names.partition(",")[0], reason or problem, "See natcompat tunnel --example")


def _check_associations(place: Place, associations: list[SecurityAssociation]) -> None:
    if not associations:
        raise place.error("sa", "there is no SA", "Begin every SA with [[sa]]")
    names: dict[tuple[Direction, int], int] = {}
    holders: dict[bytes, tuple[int, str]] = {}
    for number, sa in enumerate(associations, 1):
        at = replace(place, table="sa", number=number)
        name = sa.direction, sa.spi
        if name in names:
            raise at.error("spi", f"[[sa]] {names[name]} has this SPI, too", "Choose another SPI")
        names[name] = number
        for key_name in ("encryption_key", "integrity_key"):
            key = bytes(getattr(sa, key_name))
            if key and key in holders:
                other, its = holders[key]
                raise at.error(
                    key_name,
                    f"{its} of [[sa]] {other} is the same key",
                    "Make a key for each: two SAs with one key would use one nonce twice, "
                    "and take each other's packets",
                )
            if key:
                holders[key] = number, key_name


def _check_nonces(
    place: Place, backend: str, associations: list[SecurityAssociation], state: Path | None
) -> None:
    """Refuse static keys of counter modes, unless something keeps their IVs from repeating."""
    for number, sa in enumerate(associations, 1):
        if sa.direction is not Direction.OUT or sa.encryption not in COUNTING:
            continue
        at = replace(place, table="sa", number=number)
        name = sa.encryption.name
        if backend == "linux":
            raise at.error(
                "encryption",
                f"{name} with a key that outlives a restart is refused with the backend linux: the kernel "
                "begins its IVs at a number that nobody can choose (seqiv), so nothing rules out that one "
                "repeats, and then the key is lost (RFC 4106, 10; RFC 3686, 7)",
                "Use AES_CBC with an integrity transform, or the backend userspace",
            )
        if state is None:
            raise at.error(
                "encryption",
                f"{name} with a key that outlives a restart needs a state file: an IV that is used twice "
                "gives the key away (RFC 4106, 10; RFC 3686, 7)",
                'Write state = "PATH" above [endpoint], a place that outlives restarts as the key does',
            )


def _check_means(place: Place, backend: str, associations: list[SecurityAssociation]) -> None:
    """Refuse what the backend cannot do, as far as that is known without a request to the kernel."""
    if backend == "linux":
        if sys.platform != "linux":
            raise place.error(
                "", f"the backend linux is refused: this is {sys.platform}", "Use the backend userspace"
            )
        return
    from natcompat.esp.engine.crypto import make_cipher

    for number, sa in enumerate(associations, 1):
        try:
            make_cipher(sa.encryption, sa.encryption_key, sa.integrity, sa.integrity_key)
        except NatCompatError as error:
            at = replace(place, table="sa", number=number)
            raise at.error("encryption", error.strerror or "", error.remedy) from None


# --- policies ------------------------------------------------------------------------------------


def _policy(place: Place, table: Table, endpoint: Endpoint) -> Policy:
    values = place.read(table, form.POLICY)
    fields = ("source", "destination", "protocol", "source_port", "destination_port")
    selector = _made(place, TrafficSelector, {name: values.pop(name) for name in fields})
    ends = endpoint.local_address, endpoint.remote_address
    ends = ends if values["direction"] is Direction.OUT else ends[::-1]
    tunnel = values.pop("tunnel_source"), values.pop("tunnel_destination")
    if values["action"] is Action.PROTECT and values["mode"] is Mode.TUNNEL:
        values["source"], values["destination"] = tunnel[0] or ends[0], tunnel[1] or ends[1]
    elif any(tunnel):
        raise place.error(
            "tunnel_source" if tunnel[0] else "tunnel_destination",
            'only action = "protect" in tunnel mode has one',
            "Leave it away",
        )
    policy: Policy = _made(place, Policy, {**values, "selector": selector})
    return policy


def _check_policies(place: Place, policies: list[Policy], associations: list[SecurityAssociation]) -> None:
    names: dict[tuple[Direction, TrafficSelector], int] = {}
    used: set[int] = set()
    for number, policy in enumerate(policies, 1):
        at = replace(place, table="policy", number=number)
        name = policy.direction, policy.selector
        if name in names:
            raise at.error(
                "", f"[[policy]] {names[name]} is for the same packets", "Leave one of the two away"
            )
        names[name] = number
        if policy.action is not Action.PROTECT:
            continue
        numbers = [index for index, sa in enumerate(associations) if _belongs(sa, policy)]
        if not numbers:
            ends = f" from {policy.source} to {policy.destination}" if policy.source else ""
            raise at.error(
                "",
                f"no SA is for it: none is {policy.direction.value}bound in {policy.mode.value} mode{ends} "
                f"with reqid {policy.reqid}",
                "Write such an [[sa]], or give both the same reqid",
            )
        used.update(numbers)
    for index in range(len(associations)):
        if index not in used:
            at = replace(place, table="sa", number=index + 1)
            raise at.error(
                "",
                "no policy leads to it, so nothing would pass it",
                "Write a [[policy]] with its direction, mode and reqid",
            )


def _belongs(sa: SecurityAssociation, policy: Policy) -> bool:
    same = (sa.direction, sa.mode, sa.reqid) == (policy.direction, policy.mode, policy.reqid)
    if policy.mode is Mode.TUNNEL:
        same = same and (sa.source, sa.destination) == (policy.source, policy.destination)
    return same


# --- the device ----------------------------------------------------------------------------------


def _device(place: Place, table: Table | None, policies: list[Policy]) -> Device | None:
    if table is None:
        return None
    values = place.read(table, form.DEVICE)
    if values.pop("kind") == "none":
        for key in table:
            if key != "kind":
                raise place.error(key, 'a device of kind "none" has none', "Leave it away")
        return None
    if values["routes"] is None:  # what leaves by a policy has to come into the device first
        values["routes"] = tuple(
            dict.fromkeys(
                policy.selector.destination
                for policy in policies
                if policy.direction is Direction.OUT
                and policy.action is Action.PROTECT
                and policy.mode is Mode.TUNNEL
            )
        )
    return Device(**values)


def _notes(
    endpoint: Endpoint, device: Device | None, associations: list[SecurityAssociation], state: Path | None
) -> Iterator[str]:
    if state is None:
        yield (
            "There is no state file. After a restart sequence numbers begin at 1 again: a peer with a replay "
            "window drops what this end sends until they have caught up, and what this end received before "
            "can be replayed to it."
        )
    if any(not sa.replay_window for sa in associations if sa.direction is Direction.IN):
        yield "An inbound SA has no replay window: whoever records packets can have them taken again."
    if endpoint.backend == "linux" and device is not None:
        yield (
            "The backend linux needs no device: name and mtu do not count, addresses are put on lo, and "
            "routes lead where remote_address is."
        )
    if endpoint.backend == "userspace" and device is None:
        yield "There is no device: nothing is sent, and what arrives is counted and dropped."
