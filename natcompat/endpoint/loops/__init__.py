"""Endpoints on event loops: asyncio, uvloop and trio."""

from natcompat.endpoint.loops.asyncio import (
    AsyncNatTSocket,
    NatTTransport,
    create_nat_t_endpoint,
    open_nat_t_endpoint,
)

__all__ = ["AsyncNatTSocket", "NatTTransport", "create_nat_t_endpoint", "open_nat_t_endpoint"]
