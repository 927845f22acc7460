"""Security policies in the words of RFC 4301, 4.4.1, and the order among them."""

from __future__ import annotations

from dataclasses import dataclass

from natcompat.ipsec.offload import HardwareOffload
from natcompat.ipsec.selectors import ANY_PORT, TrafficSelector
from natcompat.ipsec.values import (
    Action,
    Direction,
    IPAddress,
    Mark,
    Mode,
    check_address,
    check_range,
    describe,
)

PRIORITY_BASE = 0x2000
"""Priority of the most specific selector; there is room for others before it and behind it."""


@dataclass(frozen=True, slots=True, kw_only=True, init=False)
class Policy:
    """One entry of the security policy database (RFC 4301, 4.4.1), one direction."""

    direction: Direction
    selector: TrafficSelector
    source: IPAddress | None = None
    destination: IPAddress | None = None
    """The tunnel's outer addresses; transport mode and the other actions have none."""
    mode: Mode = Mode.TUNNEL
    reqid: int = 0
    action: Action = Action.PROTECT
    priority: int | None = None
    """The smaller, the earlier; None: the more specific selector first."""
    optional: bool = False
    """Let packets pass in the clear while there is no SA."""
    mark: Mark | None = None
    interface_id: int | None = None
    hw_offload: HardwareOffload | None = None
    """Of its SAs, where they have one with `packet`."""

    __repr__ = describe

    def __init__(
        self,
        *,
        direction: Direction,
        selector: TrafficSelector,
        source: IPAddress | str | None = None,
        destination: IPAddress | str | None = None,
        mode: Mode = Mode.TUNNEL,
        reqid: int = 0,
        action: Action = Action.PROTECT,
        priority: int | None = None,
        optional: bool = False,
        mark: Mark | int | None = None,
        interface_id: int | None = None,
        hw_offload: HardwareOffload | None = None,
    ) -> None:
        put = object.__setattr__
        put(self, "direction", Direction(direction))
        put(self, "selector", selector)
        put(self, "source", None if source is None else check_address("source", source))
        put(self, "destination", None if destination is None else check_address("destination", destination))
        put(self, "mode", Mode(mode))
        put(self, "reqid", check_range("reqid", reqid, 0, 0xFFFF_FFFF))
        put(self, "action", Action(action))
        put(self, "priority", priority)
        put(self, "optional", bool(optional))
        put(self, "mark", Mark(value=mark) if isinstance(mark, int) else mark)
        put(self, "interface_id", interface_id)
        put(self, "hw_offload", hw_offload)
        if priority is not None:
            check_range("priority", priority, 0, 0xFFFF_FFFF)
        if interface_id is not None:
            check_range("interface_id", interface_id, 1, 0xFFFF_FFFF)
        if hw_offload is not None and not hw_offload.packet:
            raise ValueError("hw_offload: only cards that handle whole packets (packet=True) know policies")
        tunnel = self.action is Action.PROTECT and self.mode is Mode.TUNNEL
        if tunnel and (self.source is None or self.destination is None):
            raise ValueError("source, destination: a tunnel policy needs both outer addresses")
        if self.source and self.destination and self.source.version != self.destination.version:
            raise ValueError("source, destination: a tunnel has one outer address family")

    @property
    def kernel_services(self) -> tuple[str, ...]:
        """The arguments of this policy that ask for what only a kernel does, by name; empty: none."""
        names = ("mark", "interface_id", "hw_offload")
        return tuple(name for name in names if getattr(self, name) is not None)


def default_priority(selector: TrafficSelector) -> int:
    """Return the priority of a policy that has none: the more specific, the smaller."""
    bits = selector.source.prefixlen + selector.destination.prefixlen
    any_source, any_destination = selector.source_ports == ANY_PORT, selector.destination_ports == ANY_PORT
    wide = (not selector.protocol) * 4 + any_source * 2 + any_destination
    return PRIORITY_BASE + (256 - bits) * 8 + wide
