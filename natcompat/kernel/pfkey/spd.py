"""Policies as KAME's descendants and Linux have them: SADB_X_SPDADD and its kin (Policies.SPD)."""

from __future__ import annotations

import errno
import struct
from collections.abc import Iterator

from natcompat.errors import NatCompatError
from natcompat.ipsec import PolicyUsage
from natcompat.ipsec.policies import Policy, default_priority
from natcompat.ipsec.selectors import TrafficSelector
from natcompat.ipsec.values import Action, Direction, IPAddress, Mode
from natcompat.kernel.pfkey import numbers as n
from natcompat.kernel.pfkey.dialects import Dialect
from natcompat.kernel.pfkey.messages import (
    Extension,
    LifetimeFields,
    MalformedMessageError,
    Message,
    address_extension,
    extension,
    read_address,
    read_lifetime,
    read_sockaddr,
    sockaddr,
    unpack,
)
from natcompat.kernel.pfkey.readback import optional, required
from natcompat.kernel.pfkey.translate import network, refusal
from natcompat.kernel.pfkey.transport import PfKeySocket, failure
from natcompat.kernel.verbs import words

ANY_PROTOCOL = 255
_ESP = 50
_POLICY = "=HBxII"
"""Behind the header of struct sadb_x_policy: type, direction, id, priority."""
_DIRECTIONS = {Direction.IN: n.IPSEC_DIR_INBOUND, Direction.OUT: n.IPSEC_DIR_OUTBOUND}
_REMEDIES = {
    errno.EEXIST: "Delete the other one first",
    errno.EINVAL: "Outbound tunnel policies cannot be optional: add a BYPASS policy until there is an SA",
}


class SpdPolicies:
    """The policies behind a PF_KEY socket."""

    def __init__(self, dialect: Dialect, sock: PfKeySocket) -> None:
        self._dialect = dialect
        self._socket = sock

    def add(self, policy: Policy) -> None:
        """Install `policy`, whole or not at all."""
        check_policy(self._dialect, policy)
        self._install(policy, n.SADB_X_SPDADD, None)

    def replace(self, policy: Policy) -> None:
        """Install `policy`, whole or not at all, in the place of one with its selector and direction."""
        check_policy(self._dialect, policy)
        before = None
        try:
            before = self.get(policy).policy
        except NatCompatError as error:
            if error.errno != errno.ESRCH:
                raise
        self._install(policy, n.SADB_X_SPDUPDATE, before)

    def _install(self, policy: Policy, kind: int, before: Policy | None) -> None:
        done: list[int] = []
        for direction in kernel_directions(self._dialect, policy):
            try:
                self._send(policy, kind, direction)
            except BaseException:
                for installed in done:
                    if before is None:
                        self._delete(policy, installed)
                    else:
                        self._send(before, n.SADB_X_SPDUPDATE, installed)
                raise
            done.append(direction)

    def _send(self, policy: Policy, kind: int, direction: int) -> None:
        message = encode_policy(self._dialect, policy, direction, kind)
        self._socket.request(f"Adding the policy for {words(policy)}", message, remedies=_REMEDIES)

    def get(self, policy: Policy) -> PolicyUsage:
        """Return the installed policy of this selector and direction. ESRCH: none."""
        for found in self.list():
            if (found.policy.direction, found.policy.selector) == (policy.direction, policy.selector):
                return found
        raise failure(f"Looking at the policy for {words(policy)}", errno.ESRCH)

    def by_id(self, number: int) -> Policy | None:
        """Return the policy that the kernel gave this number; None where it is not one of natcompat's."""
        body = struct.pack(_POLICY, 0, 0, number, 0)
        message = Message(n.SADB_X_SPDGET, extensions=[extension(n.SADB_X_EXT_POLICY, body)])
        try:
            return policy_of(self._dialect, self._socket.request("Looking at a policy", message)).policy
        except (NatCompatError, ValueError):
            return None

    def delete(self, policy: Policy) -> None:
        """Remove the policy of this selector and direction. ESRCH: there is none."""
        first, *others = kernel_directions(self._dialect, policy)
        self._delete(policy, first)
        if policy.direction is Direction.IN and self._dialect.forward_policies:
            others = [n.IPSEC_DIR_FWD]
        for direction in others:
            try:
                self._delete(policy, direction)
            except NatCompatError as error:
                if error.errno != errno.ESRCH:
                    raise

    def _delete(self, policy: Policy, direction: int) -> None:
        what = f"Deleting the policy for {words(policy)}"
        body = struct.pack(_POLICY, 0, direction, 0, 0)
        extensions = [*_selector(self._dialect, policy.selector), extension(n.SADB_X_EXT_POLICY, body)]
        try:
            self._socket.request(what, Message(n.SADB_X_SPDDELETE, extensions=extensions))
        except NatCompatError as error:
            if error.errno == errno.ENOENT:
                raise failure(what, errno.ESRCH) from None
            raise

    def flush(self) -> None:
        """Remove every policy."""
        self._socket.request("Flushing policies", Message(n.SADB_X_SPDFLUSH))

    def list(self) -> list[PolicyUsage]:
        """Return every IN and OUT policy that natcompat has words for."""
        found = []
        for message in self._socket.dump("Listing policies", Message(n.SADB_X_SPDDUMP)):
            try:
                found.append(policy_of(self._dialect, message))
            except ValueError:
                continue
        return found


def check_policy(dialect: Dialect, policy: Policy) -> None:
    """Raise for what `policy` asks for and these kernels have no word for."""
    protects = policy.action is Action.PROTECT
    outer = policy.source.version if policy.source and policy.mode is Mode.TUNNEL else None
    for what, asked, remedy in (
        ("has no marks", policy.mark is not None, "Tell policies apart by selectors"),
        ("ties no policy to an interface", policy.interface_id is not None, "Leave interface_id out"),
        ("hands no policy to a network card", policy.hw_offload is not None, "Leave hw_offload out"),
        (
            "cannot tie an optional policy to an SA",
            protects and policy.optional and policy.reqid,
            "Use reqid 0, or do without optional",
        ),
        (
            f"has no reqid above {n.IPSEC_MANUAL_REQID_MAX} in policies",
            policy.reqid > n.IPSEC_MANUAL_REQID_MAX,
            "Choose a smaller one",
        ),
        (
            "asks policies in the order in which they were installed",
            policy.priority is not None and not dialect.policy_priority,
            "Leave priority out, and install the more specific ones first",
        ),
        (
            "carries only its own IP version in a tunnel",
            protects and outer not in (None, policy.selector.source.version) and not dialect.cross_family,
            "Use a tunnel of the other version, or XFRM (NATCOMPAT_IPSEC=xfrm)",
        ),
    ):
        if asked:
            raise refusal(dialect, what, remedy)


def kernel_directions(dialect: Dialect, policy: Policy) -> tuple[int, ...]:
    """Return the kernel's directions of `policy`: on Linux what comes in may be forwarded, too."""
    direction = _DIRECTIONS[policy.direction]
    to_this_host = policy.action is Action.PROTECT and policy.mode is Mode.TRANSPORT
    if not dialect.forward_policies or policy.direction is Direction.OUT or to_this_host:
        return (direction,)
    return (direction, n.IPSEC_DIR_FWD)


def encode_policy(dialect: Dialect, policy: Policy, direction: int, kind: int = n.SADB_X_SPDADD) -> Message:
    """Return the message that installs `policy` in the kernel's `direction`; or SADB_X_SPDUPDATE."""
    action = {
        Action.PROTECT: n.IPSEC_POLICY_IPSEC,
        Action.BYPASS: n.IPSEC_POLICY_NONE,
        Action.DISCARD: n.IPSEC_POLICY_DISCARD,
    }[policy.action]
    priority = 0
    if dialect.policy_priority:
        priority = default_priority(policy.selector) if policy.priority is None else policy.priority
    body = struct.pack(_POLICY, action, direction, 0, priority)
    if policy.action is Action.PROTECT:
        body += _request(dialect, policy)
    extensions = [*_selector(dialect, policy.selector), extension(n.SADB_X_EXT_POLICY, body)]
    return Message(kind, extensions=extensions)


def _selector(dialect: Dialect, selector: TrafficSelector) -> Iterator[Extension]:
    for kind, addresses, port in (
        (n.SADB_EXT_ADDRESS_SRC, selector.source, selector.source_port),
        (n.SADB_EXT_ADDRESS_DST, selector.destination, selector.destination_port),
    ):
        yield address_extension(
            dialect,
            kind,
            addresses.network_address,
            port=port,
            prefix=addresses.prefixlen,
            protocol=selector.protocol or ANY_PROTOCOL,
        )


def _request(dialect: Dialect, policy: Policy) -> bytes:
    """Return a struct sadb_x_ipsecrequest, whose length is in bytes, with the tunnel's addresses."""
    mode = n.IPSEC_MODE_TUNNEL if policy.mode is Mode.TUNNEL else n.IPSEC_MODE_TRANSPORT
    level = n.IPSEC_LEVEL_UNIQUE if policy.reqid else n.IPSEC_LEVEL_REQUIRE
    if policy.optional:
        level = n.IPSEC_LEVEL_USE
    addresses = b""
    if policy.mode is Mode.TUNNEL and policy.source and policy.destination:
        addresses = sockaddr(dialect, policy.source) + sockaddr(dialect, policy.destination)
    size = -(-(dialect.request_size + len(addresses)) // 8) * 8
    if dialect.request_size == 8:
        start = struct.pack("=HHBBH", size, _ESP, mode, level, policy.reqid)
    else:  # Linux
        start = struct.pack("=HHBBHII", size, _ESP, mode, level, 0, policy.reqid, 0)
    return (start + addresses).ljust(size, b"\0")


def policy_of(dialect: Dialect, message: Message) -> PolicyUsage:
    """Return the policy in an answer; ValueError for what natcompat has no words for."""
    found = required(message, n.SADB_X_EXT_POLICY)
    kind, number, _, priority = unpack(_POLICY, found)
    direction = {value: key for key, value in _DIRECTIONS.items()}.get(number)
    if direction is None:
        raise ValueError(f"a policy of direction {number}")
    source = read_address(dialect, required(message, n.SADB_EXT_ADDRESS_SRC))
    destination = read_address(dialect, required(message, n.SADB_EXT_ADDRESS_DST))
    selector = TrafficSelector(
        source=network(source.address, source.prefix),
        destination=network(destination.address, destination.prefix),
        protocol=0 if source.protocol == ANY_PROTOCOL else source.protocol,
        source_port=source.port,
        destination_port=destination.port,
    )
    action = {n.IPSEC_POLICY_DISCARD: Action.DISCARD, n.IPSEC_POLICY_IPSEC: Action.PROTECT}.get(
        kind, Action.BYPASS
    )
    mode, level, reqid = Mode.TUNNEL, n.IPSEC_LEVEL_REQUIRE, 0
    ends: tuple[IPAddress | None, IPAddress | None] = (None, None)
    if action is Action.PROTECT:
        mode, level, reqid, ends = _read_request(dialect, found[16:])
    current = optional(message, n.SADB_EXT_LIFETIME_CURRENT, read_lifetime, LifetimeFields())
    policy = Policy(
        direction=direction,
        selector=selector,
        source=ends[0],
        destination=ends[1],
        mode=mode,
        reqid=reqid,
        action=action,
        priority=priority if dialect.policy_priority else None,
        optional=level == n.IPSEC_LEVEL_USE,
    )
    return PolicyUsage(policy=policy, added=float(current.added), last_used=float(current.used) or None)


def _read_request(
    dialect: Dialect, data: bytes
) -> tuple[Mode, int, int, tuple[IPAddress | None, IPAddress | None]]:
    """Take the one struct sadb_x_ipsecrequest of a policy apart."""
    if len(data) < dialect.request_size:
        raise MalformedMessageError(f"a request of {len(data)} bytes")
    size, protocol, number, level = struct.unpack_from("=HHBB", data)
    if size != len(data) or protocol != _ESP:
        raise ValueError("the policy is not one that natcompat installs")
    reqid = (
        struct.unpack_from("=H", data, 6)[0]
        if dialect.request_size == 8
        else struct.unpack_from("=I", data, 8)[0]
    )
    if number == n.IPSEC_MODE_TRANSPORT:
        return Mode.TRANSPORT, level, reqid, (None, None)
    addresses = data[dialect.request_size :]
    source, _, used = read_sockaddr(dialect, addresses)
    destination, _, _ = read_sockaddr(dialect, addresses[used:])
    return Mode.TUNNEL, level, reqid, (source, destination)
