"""Endpoints on event loops: `create_nat_t_endpoint` (asyncio, uvloop), `open_nat_t_endpoint` (trio, too).

asyncio's selector loop needs neither: its ``create_datagram_endpoint(sock=...)`` serves an endpoint as it is.
"""

from natcompat.endpoint.loops.asyncio import NatTTransport, create_nat_t_endpoint
from natcompat.endpoint.loops.awaitable import AsyncNatTSocket, open_nat_t_endpoint

__all__ = ["AsyncNatTSocket", "NatTTransport", "create_nat_t_endpoint", "open_nat_t_endpoint"]
