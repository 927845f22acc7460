"""Policies as Solaris has them: rules, on a socket of the family PF_POLICY (net/pfpolicy.h).

The messages look like those of PF_KEY. A rule's selector has a local and a remote end, and flags for
the directions. A tunnel's rules belong to its interface, which has to be there (dladm create-iptun):
``ip.tunN``, where N is the policy's `interface_id`. They name no SAs, so a reqid means nothing.
"""

from __future__ import annotations

import errno
import struct
import time
from collections.abc import Iterator
from ipaddress import IPv4Address, IPv6Address
from typing import Final

from natcompat.ipsec import PolicyUsage
from natcompat.ipsec.policies import Policy, default_priority
from natcompat.ipsec.selectors import TrafficSelector
from natcompat.ipsec.values import Action, Direction, IPAddress, IPNetwork, Mode
from natcompat.kernel.pfkey.dialects import Dialect
from natcompat.kernel.pfkey.messages import (
    AF_INET,
    Extension,
    MalformedMessageError,
    Message,
    extension,
    pack,
    unpack,
)
from natcompat.kernel.pfkey.readback import required
from natcompat.kernel.pfkey.translate import network, refusal
from natcompat.kernel.pfkey.transport import PfKeySocket, failure
from natcompat.kernel.verbs import words

PF_POLICY: Final = 29
PF_POLICY_V1: Final = 1
SPD_FLUSH, SPD_ADDRULE, SPD_DELETERULE, SPD_DUMP = 1, 2, 3, 6
EXT_LCLPORT, EXT_REMPORT, EXT_PROTO, EXT_LCLADDR, EXT_REMADDR = 1, 2, 3, 4, 5
EXT_ACTION, EXT_RULE, EXT_RULESET, EXT_TUN_NAME = 6, 7, 8, 10
FLAG_INBOUND, FLAG_OUTBOUND, FLAG_TUNNEL = 1, 2, 4
ATTR_END, ATTR_TYPE, ATTR_FLAGS = 1, 0x100, 0x101
APPLY_ESP: Final = 2
HIGHEST: Final = 0x7FFF_FFFF
"""Here the greater priority comes first, and the kernel compares signed numbers."""

_TYPES = {Action.DISCARD: 1, Action.BYPASS: 2, Action.PROTECT: 3}
_TUNNEL = b"ip.tun"


class Rules:
    """The rules behind a PF_POLICY socket."""

    def __init__(self, dialect: Dialect, sock: PfKeySocket) -> None:
        self._dialect = dialect
        self._socket = sock
        self._installed: dict[tuple[Direction, TrafficSelector], PolicyUsage] = {}

    def add(self, policy: Policy) -> None:
        """Install `policy`."""
        message = encode_rule(self._dialect, policy, SPD_ADDRULE)
        remedies = {
            errno.EEXIST: "Delete the other one first",
            errno.ESRCH: "Create the tunnel first (dladm create-iptun)",
        }
        self._socket.request(f"Adding the rule for {words(policy)}", message, remedies=remedies)
        usage = PolicyUsage(policy=policy, added=time.time(), last_used=None)
        self._installed[policy.direction, policy.selector] = usage

    def delete(self, policy: Policy) -> None:
        """Remove the rule of this selector and direction. ESRCH: there is none."""
        key = policy.direction, policy.selector
        usage = self._installed.get(key)
        message = encode_rule(self._dialect, usage.policy if usage else policy, SPD_DELETERULE)
        self._socket.request(f"Deleting the rule for {words(policy)}", message)
        self._installed.pop(key, None)

    def get(self, policy: Policy) -> PolicyUsage:
        """Return the rule of this selector and direction. ESRCH: there is none."""
        for found in self.list():
            if (found.policy.direction, found.policy.selector) == (policy.direction, policy.selector):
                return found
        raise failure(f"Looking at the rule for {words(policy)}", errno.ESRCH)

    def flush(self) -> None:
        """Remove every rule, those of tunnels, too."""
        self._socket.request("Flushing rules", Message(SPD_FLUSH, extensions=[_tunnel_name(b"")]))
        self._installed.clear()

    def list(self) -> list[PolicyUsage]:
        """Return every rule that natcompat has words for, this object's as they were installed."""
        found: list[PolicyUsage] = []
        borders: list[Message] = []  # one message before all rules, and one behind them

        def is_last(message: Message) -> bool:
            if message.find(EXT_RULESET) is not None:
                borders.append(message)
            return len(borders) == 2

        request = Message(SPD_DUMP, extensions=[_tunnel_name(b"")])
        for message in self._socket.dump("Listing rules", request, is_last=is_last):
            try:
                for each in policies_of(self._dialect, message):
                    key = each.policy.direction, each.policy.selector
                    found.append(self._installed.get(key, each))
            except ValueError:
                continue
        return found


def encode_rule(dialect: Dialect, policy: Policy, kind: int) -> Message:
    """Return the message that installs a rule (SPD_ADDRULE) or removes it (SPD_DELETERULE)."""
    tunnel = policy.action is Action.PROTECT and policy.mode is Mode.TUNNEL
    if policy.mark is not None:
        raise refusal(dialect, "has no marks", "Tell policies apart by selectors")
    if policy.optional:
        raise refusal(dialect, "has no optional policies", "Add a BYPASS policy until there is an SA")
    if tunnel and policy.interface_id is None:
        raise refusal(
            dialect,
            "has tunnel policies for tunnel interfaces only",
            "Create one called ip.tunN (dladm create-iptun) and say its number: interface_id=N",
            errno.EINVAL,
        )
    priority = default_priority(policy.selector) if policy.priority is None else policy.priority
    if priority >= HIGHEST:
        raise refusal(dialect, f"has no priority above {HIGHEST - 1}", "Choose a smaller one", errno.EINVAL)
    inbound = policy.direction is Direction.IN
    flags = FLAG_INBOUND if inbound else FLAG_OUTBOUND
    extensions = [pack(EXT_RULE, "=IIIQ", HIGHEST - priority, flags | FLAG_TUNNEL * tunnel, 0, 0)]
    if policy.interface_id is not None:
        extensions.append(_tunnel_name(b"%s%d" % (_TUNNEL, policy.interface_id)))
    extensions += _selector(dialect, policy.selector, inbound)
    if kind == SPD_ADDRULE:
        attributes = [(ATTR_TYPE, _TYPES[policy.action])]
        if policy.action is Action.PROTECT:
            attributes.append((ATTR_FLAGS, APPLY_ESP))
        body = struct.pack("=HH", 1, 0) + b"".join(
            struct.pack("=II", *each) for each in (*attributes, (ATTR_END, 0))
        )
        extensions.append(extension(EXT_ACTION, body))
    return Message(kind, extensions=extensions)


def _tunnel_name(name: bytes) -> Extension:
    """Return a struct spd_if_s; without a name it stands for all tunnels."""
    return extension(EXT_TUN_NAME, name + b"\0")


def _selector(dialect: Dialect, selector: TrafficSelector, inbound: bool) -> Iterator[Extension]:
    ends = (selector.source, selector.source_port), (selector.destination, selector.destination_port)
    (local, local_port), (remote, remote_port) = ends[::-1] if inbound else ends
    if selector.protocol:
        yield pack(EXT_PROTO, "=B3x", selector.protocol)
    for kind, addresses in ((EXT_LCLADDR, local), (EXT_REMADDR, remote)):
        family = AF_INET if addresses.version == 4 else dialect.inet6
        start = struct.pack("=BBH", family, addresses.prefixlen, 0)
        yield extension(kind, start + addresses.network_address.packed)
    for kind, port in ((EXT_LCLPORT, local_port), (EXT_REMPORT, remote_port)):
        if port:
            yield extension(kind, port.to_bytes(2, "big") * 2)


def policies_of(dialect: Dialect, message: Message) -> Iterator[PolicyUsage]:
    """Yield what a rule of a dump is in each direction; ValueError for what natcompat has no words for."""
    rule = message.find(EXT_RULE)
    if rule is None:  # beginning and end of the dump
        return
    priority, flags, _, _ = unpack("=IIIQ", rule)
    local = _network(dialect, required(message, EXT_LCLADDR))
    remote = _network(dialect, required(message, EXT_REMADDR))
    protocol = message.find(EXT_PROTO)
    local_port, remote_port = (
        int.from_bytes(found[4:6], "big") if found else 0
        for found in (message.find(EXT_LCLPORT), message.find(EXT_REMPORT))
    )
    action = _action(required(message, EXT_ACTION))
    name = message.find(EXT_TUN_NAME)
    for flag, direction in ((FLAG_INBOUND, Direction.IN), (FLAG_OUTBOUND, Direction.OUT)):
        if not flags & flag:
            continue
        ends = (local, local_port), (remote, remote_port)
        source, destination = ends if direction is Direction.OUT else ends[::-1]
        tunnel = bool(flags & FLAG_TUNNEL)
        policy = Policy(
            direction=direction,
            selector=TrafficSelector(
                source=source[0],
                destination=destination[0],
                protocol=protocol[4] if protocol else 0,
                source_port=source[1],
                destination_port=destination[1],
            ),
            # The tunnel's own addresses are those of its interface.
            source=_unspecified(local) if tunnel else None,
            destination=_unspecified(local) if tunnel else None,
            mode=Mode.TUNNEL if tunnel or action is not Action.PROTECT else Mode.TRANSPORT,
            action=action,
            priority=max(HIGHEST - priority, 0),
            interface_id=_number(name) if name else None,
        )
        yield PolicyUsage(policy=policy, added=0.0, last_used=None)


def _network(dialect: Dialect, found: Extension) -> IPNetwork:
    family, prefix, _ = unpack("=BBH", found)
    size = 4 if family == AF_INET else 16
    if family not in (AF_INET, dialect.inet6) or len(found) < 8 + size:
        raise MalformedMessageError(f"an address of family {family} in {len(found)} bytes")
    packed = bytes(found[8 : 8 + size])
    return network(IPv4Address(packed) if size == 4 else IPv6Address(packed), prefix)


def _unspecified(like: IPNetwork) -> IPAddress:
    return IPv4Address(0) if like.version == 4 else IPv6Address(0)


def _action(found: Extension) -> Action:
    for at in range(8, len(found) - 7, 8):
        tag, value = struct.unpack_from("=II", found, at)
        if tag == ATTR_TYPE:
            for action, number in _TYPES.items():
                if number == value:
                    return action
    raise ValueError("a rule without an action that natcompat has words for")


def _number(found: Extension) -> int | None:
    name = bytes(found[4:]).partition(b"\0")[0]
    digits = name.removeprefix(_TUNNEL)
    return int(digits) if digits != name and digits.isdigit() else None
