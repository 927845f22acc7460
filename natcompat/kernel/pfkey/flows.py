"""Policies as OpenBSD has them: flows, in messages of its own (Policies.FLOWS).

A flow has no priority (the more specific comes first) and no tie to an SA but addresses. PF_KEY neither
shows flows nor flushes them alone (the kernel shows them by sysctl, and flushes SAs with them), so
that those of others are out of reach here: ipsecctl(8).
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Iterator

from natcompat.errors import NatCompatError
from natcompat.ipsec import PolicyUsage
from natcompat.ipsec.policies import Policy
from natcompat.ipsec.selectors import TrafficSelector
from natcompat.ipsec.values import Action, Direction, IPAddress, IPNetwork, Mode
from natcompat.kernel.pfkey import numbers as n
from natcompat.kernel.pfkey.dialects import Dialect
from natcompat.kernel.pfkey.messages import (
    AddressFields,
    Extension,
    Message,
    address_extension,
    pack,
    read_address,
    unpack,
)
from natcompat.kernel.pfkey.readback import optional, required
from natcompat.kernel.pfkey.translate import network, refusal
from natcompat.kernel.pfkey.transport import PfKeySocket, failure
from natcompat.kernel.verbs import words


class Flows:
    """The flows behind a PF_KEY socket; what is shown and flushed are those that were installed by it."""

    def __init__(self, dialect: Dialect, sock: PfKeySocket) -> None:
        self._dialect = dialect
        self._socket = sock
        self._installed: dict[tuple[Direction, TrafficSelector], PolicyUsage] = {}

    def add(self, policy: Policy) -> None:
        """Install `policy`."""
        message = encode_flow(self._dialect, policy, n.SADB_X_ADDFLOW)
        self._socket.request(f"Adding the flow for {words(policy)}", message)
        usage = PolicyUsage(policy=policy, added=time.time(), last_used=None)
        self._installed[policy.direction, policy.selector] = usage

    def delete(self, policy: Policy) -> None:
        """Remove the flow of this selector and direction. ESRCH: there is none."""
        what = f"Deleting the flow for {words(policy)}"
        # The kernel wants to hear of the whole flow again.
        usage = self._installed.get((policy.direction, policy.selector))
        message = encode_flow(self._dialect, usage.policy if usage else policy, n.SADB_X_DELFLOW)
        try:
            self._socket.request(what, message)
        except NatCompatError as error:
            if error.errno != errno.ENOENT:
                raise
            raise failure(what, errno.ESRCH) from None
        self._installed.pop((policy.direction, policy.selector), None)

    def get(self, policy: Policy) -> PolicyUsage:
        """Return the flow of this selector and direction. ESRCH: this object has installed none."""
        try:
            return self._installed[policy.direction, policy.selector]
        except KeyError:
            raise failure(f"Looking at the flow for {words(policy)}", errno.ESRCH) from None

    def list(self) -> list[PolicyUsage]:
        """Return the flows that this object has installed."""
        return list(self._installed.values())

    def flush(self) -> None:
        """Remove the flows that this object has installed."""
        for usage in self.list():
            with contextlib.suppress(NatCompatError):
                self.delete(usage.policy)
        self._installed.clear()

    def asked(self, number: int) -> TrafficSelector | None:
        """Return the selector of the flow that an acquire is for; None where there is none any more."""
        question = pack(n.SADB_X_EXT_ASKED_POLICY, "=I", number)
        message = Message(n.SADB_X_ASKPOLICY, self._dialect.esp, [question])
        try:
            return selector_of(self._dialect, self._socket.request("Looking at a flow", message))
        except (OSError, ValueError):
            return None


def encode_flow(dialect: Dialect, policy: Policy, kind: int) -> Message:
    """Return the message that installs a flow (SADB_X_ADDFLOW) or removes it (SADB_X_DELFLOW)."""
    for what, asked, remedy in (
        ("has no marks", policy.mark is not None, "Tell flows apart by selectors"),
        ("ties no flow to an interface", policy.interface_id is not None, "Leave interface_id out"),
        ("hands no policy to a network card", policy.hw_offload is not None, "Leave hw_offload out"),
        ("asks the more specific flow first", policy.priority is not None, "Leave priority out"),
    ):
        if asked:
            raise refusal(dialect, what, remedy)
    inbound = policy.direction is Direction.IN
    flow_type = {
        Action.PROTECT: n.SADB_X_FLOW_TYPE_USE if policy.optional else n.SADB_X_FLOW_TYPE_REQUIRE,
        Action.BYPASS: n.SADB_X_FLOW_TYPE_BYPASS,
        Action.DISCARD: n.SADB_X_FLOW_TYPE_DENY,
    }[policy.action]
    direction = n.IPSP_DIRECTION_IN if inbound else n.IPSP_DIRECTION_OUT
    extensions = [pack(n.SADB_X_EXT_FLOW_TYPE, "=BBxx", flow_type, direction)]
    if policy.action is Action.PROTECT:
        # of the SA that the flow wants: ours and the peer's, in both directions
        local, peer = (policy.destination, policy.source) if inbound else (policy.source, policy.destination)
        if policy.mode is Mode.TRANSPORT:
            ends = policy.selector.source.network_address, policy.selector.destination.network_address
            local, peer = ends[::-1] if inbound else ends
        for number, address in ((n.SADB_EXT_ADDRESS_SRC, local), (n.SADB_EXT_ADDRESS_DST, peer)):
            if address is not None:
                extensions.append(address_extension(dialect, number, address))
    extensions += _selector(dialect, policy.selector)
    return Message(kind, dialect.esp, extensions)


def _selector(dialect: Dialect, selector: TrafficSelector) -> Iterator[Extension]:
    for flow, mask, addresses, port in (
        (n.SADB_X_EXT_SRC_FLOW, n.SADB_X_EXT_SRC_MASK, selector.source, selector.source_port),
        (n.SADB_X_EXT_DST_FLOW, n.SADB_X_EXT_DST_MASK, selector.destination, selector.destination_port),
    ):
        yield address_extension(dialect, flow, addresses.network_address, port=port)
        yield address_extension(dialect, mask, addresses.netmask, port=0xFFFF if port else 0)
    if selector.protocol:
        yield pack(n.SADB_X_EXT_PROTOCOL, "=BBxx", selector.protocol, 0)


def selector_of(dialect: Dialect, message: Message) -> TrafficSelector:
    """Return the selector of a flow."""

    def read(kind: int) -> AddressFields:
        return read_address(dialect, required(message, kind))

    source, destination = read(n.SADB_X_EXT_SRC_FLOW), read(n.SADB_X_EXT_DST_FLOW)
    return TrafficSelector(
        source=_masked(source.address, read(n.SADB_X_EXT_SRC_MASK).address),
        destination=_masked(destination.address, read(n.SADB_X_EXT_DST_MASK).address),
        protocol=optional(message, n.SADB_X_EXT_PROTOCOL, lambda found: unpack("=BBxx", found)[0], 0),
        source_port=source.port,
        destination_port=destination.port,
    )


def _masked(address: IPAddress, mask: IPAddress) -> IPNetwork:
    if mask.version != address.version:
        raise ValueError("a flow whose mask is of another family")
    return network(address, int(mask).bit_count())
